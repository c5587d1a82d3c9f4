"""The drawing in DESIGN.md, enforced: imports point one way, and importing the package is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import efficient_attention

PACKAGE = Path(efficient_attention.__file__).parent

# Each layer may import from the layers above its own line, and from itself.
LAYERS = [
    {"errors", "files", "memory", "progress", "testing"},
    {"ops"},
    {"modules"},
    {"surgery"},
    {"planning"},
    {"models"},
    {"model_sources"},
    {"data", "metrics"},
    {"training"},
    {"benchmark", "visualize"},
    {"prediction"},
    {"demo"},
    {"cli"},
]
# Inside the operator: what each file may import. The oracle and the implementations never meet.
OPS = {
    "arguments": {"precision"},
    "context": set(),
    "flops": set(),
    "huge_pages": set(),
    "layout": {"huge_pages"},
    "limits": set(),
    "precision": set(),
    "planner": set(),
    "reference": {"precision"},
    "blocks": {"planner"},
    "folding": set(),
    "blocked": {"blocks", "layout", "pages", "precision"},
    "pages": {"blocks", "layout", "precision"},
    "streamed": {"blocks", "folding", "layout", "pages", "precision"},
    "plain": {"layout", "precision"},
    "watching": set(),
    "differentiation": set(),
    "short": {
        "arguments",
        "differentiation",
        "native_build",
        "native_short",
        "plain",
        "planner",
        "precision",
        "reference",
        "watching",
    },
    "tiling": set(),
    "triton_blocks": set(),
    "triton_kernels": {"triton_blocks"},
    "triton_module_kernels": {"triton_blocks"},
    "tuning": {"tiling"},
    "triton_programs": {"tiling", "triton_blocks", "triton_kernels", "tuning"},
    "triton_launch": {"layout", "tiling", "triton_kernels", "triton_programs"},
    "triton_module_launch": {
        "folding",
        "layout",
        "tiling",
        "triton_module_kernels",
        "triton_programs",
    },
    "chunks": set(),
    "native_build": set(),
    "native_calls": {"chunks", "native_build"},
    "native_launch": {"chunks", "layout", "native_build", "native_calls"},
    "native_short": {"chunks", "huge_pages", "layout", "native_calls", "planner", "watching"},
    "native_module_launch": {"chunks", "layout", "native_build", "native_calls"},
    "backends": {
        "blocked",
        "native_launch",
        "native_module_launch",
        "precision",
        "streamed",
        "tiling",
        "triton_blocks",
        "triton_launch",
        "triton_module_launch",
    },
    "library": {"backends", "differentiation", "flops", "layout", "precision", "reference"},
    "functional": {
        "arguments",
        "backends",
        "blocked",
        "context",
        "library",
        "layout",
        "limits",
        "native_launch",
        "planner",
        "precision",
        "reference",
        "short",
        "watching",
    },
    "__init__": {"context", "functional", "native_build"},
}
# Beside the standard library and torch: who may import what.
THIRD_PARTY = {
    "benchmark": {"matplotlib", "pytorch_lightning", "yaml"},
    "data": {"PIL", "numpy", "pycocotools", "torchvision"},
    "metrics": {"faster_coco_eval", "numpy", "pycocotools"},
    "models": {"huggingface_hub", "safetensors", "torchvision"},
    "demo": {"PIL", "numpy", "skimage"},
    "prediction": {"PIL", "matplotlib", "numpy"},
    "training": {"numpy", "pytorch_lightning"},
    "visualize": {"PIL", "matplotlib", "numpy"},
}
# The only files that import triton.
KERNELS = [("ops", f"triton_{name}") for name in ("blocks", "kernels", "module_kernels")]
TRITON = [*KERNELS, ("benchmark", "compilation")]


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def parts(path):
    return path.relative_to(PACKAGE).with_suffix("").parts


def imports(path):
    """Absolute names of all that a file imports, wherever in the file."""
    package = ("efficient_attention", *parts(path))[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def level(layer):
    (index,) = [i for i, names in enumerate(LAYERS) if layer in names]
    return index


@pytest.mark.parametrize("path", sources(), ids=lambda p: "/".join(parts(p)))
def test_imports_point_one_way(path):
    here = parts(path)[0]
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "efficient_attention":
            there = rest.split(".")[0]
            if here == "__init__" or there == "__version__":
                continue
            same = here == there
            assert same or level(there) < level(here), f"{here} imports {name}"
        elif top != "torch" and top not in sys.stdlib_module_names:
            allowed = {"triton"} if parts(path) in TRITON else THIRD_PARTY.get(here, set())
            assert top in allowed, f"{here} imports {name}"


@pytest.mark.parametrize("name", OPS)
def test_the_oracle_and_the_implementations_never_meet(name):
    assert {p.stem for p in (PACKAGE / "ops").glob("*.py")} == set(OPS)
    found = {
        imported.split(".")[2]
        for imported in imports(PACKAGE / "ops" / f"{name}.py")
        if imported.startswith("efficient_attention.ops.")
    }
    assert found <= OPS[name]


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import efficient_attention, efficient_attention.cli, efficient_attention.visualize\n"
        "efficient_attention.plan\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'torchvision', 'lightning', 'pytorch_lightning', 'matplotlib', 'triton', 'PIL', 'skimage'}\n"
        "heavy = new & (heavy | {'safetensors', 'huggingface_hub'})\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(PACKAGE.parent)}
    )


def test_help_of_the_light_commands_does_not_wait_for_torch():
    code = (
        "import sys\n"
        "from efficient_attention.cli import main\n"
        "commands = ('demo', 'plan', 'advise', 'bench')\n"
        "for arguments in (['--help'], *([name, '--help'] for name in commands), ['dance']):\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit as exit_:\n"
        "        assert exit_.code == 2 * (arguments == ['dance'])\n"
        "assert 'torch' not in sys.modules\n"
        "import efficient_attention\n"
        "assert efficient_attention.ops.efficient_attention is efficient_attention.efficient_attention\n"
        "assert set(efficient_attention.__all__) <= set(dir(efficient_attention))\n"
        "assert not hasattr(efficient_attention, 'nothing')\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(PACKAGE.parent)}
    )


def test_public_names_are_these():
    assert efficient_attention.__all__ == [
        "Context",
        "EfficientAttention",
        "EfficientAttention1d",
        "EfficientAttention2d",
        "EfficientAttention3d",
        "EfficientAttentionChannelsLast",
        "MultiheadEfficientAttention",
        "NonLocal1d",
        "NonLocal2d",
        "NonLocal3d",
        "Plan",
        "Report",
        "ViTEfficientAttention",
        "attend",
        "attend_tiles",
        "build_native",
        "create_model",
        "dot_product_attention",
        "efficient_attention",
        "freeze",
        "import_attention",
        "insert",
        "list_models",
        "load_checkpoint",
        "masked",
        "plan",
        "remove",
        "replace",
        "summarize",
    ]
    assert all(hasattr(efficient_attention, name) for name in efficient_attention.__all__)


def test_files_stay_within_their_budget():
    lengths = {"/".join(parts(p)): len(p.read_text().splitlines()) for p in sources()}
    budgets = {"/".join(kernels): 600 for kernels in KERNELS}
    assert {name: n for name, n in lengths.items() if n > budgets.get(name, 400)} == {}
