"""What is installed is the package, all of it, and works away from the checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import efficient_attention

ROOT = Path(__file__).parent.parent
TREE = ["src", "pyproject.toml", "README.md", "LICENSE"]


@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not a checkout")
def test_the_wheel_holds_the_package_and_needs_torch_alone(tmp_path):
    pytest.importorskip("build")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        else:
            shutil.copy(source, tree)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(tree),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"efficient_attention-{efficient_attention.__version__}-py3-none-any.whl"

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [n for n in names if n.endswith("METADATA")]
        requirements = [
            line
            for line in archive.read(metadata).decode().splitlines()
            if line.startswith("Requires-Dist: ")
        ]
        archive.extractall(tmp_path / "installed")
    expected = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src").rglob("*.py")}
    expected |= {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src").rglob("native/*")}
    assert expected | {"efficient_attention/py.typed"} <= names
    assert "efficient_attention/ops/native/operators.c" in names
    assert [r for r in requirements if "extra ==" not in r] == ["Requires-Dist: torch>=2.11"]

    code = (
        "import sys; sys.path.insert(0, 'installed')\n"
        "import torch, efficient_attention as ea\n"
        "assert ea.__file__.startswith(sys.argv[1]), ea.__file__\n"
        "x = torch.randn(1, 8, 5, 5)\n"
        "assert torch.equal(ea.EfficientAttention2d(8)(x), x)\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path)], cwd=tmp_path, check=True)
