"""Build the development environment, once, and print the path of its python.

One environment serves every clone: it is named after all that decides what is in it, and the package itself is not
installed there (clones are used from ``src``). It lives in ``$EFFICIENT_ATTENTION_ENVS``, by default
``~/.cache/efficient-attention``, and may be deleted at any time. Everything but the path goes to standard error.
"""

import fcntl
import hashlib
import importlib.util
import itertools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

# First, and in words that an older python can read.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        f"environment: python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}: "
        "name another with make PYTHON=python3.11"
    )

import tomllib

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
# Extras that nothing here is developed or tested with.
LEFT_OUT = {"peers"}


def main() -> None:
    packages = requirements()
    environment = home() / name(packages)
    if not is_complete(environment):
        environment.parent.mkdir(parents=True, exist_ok=True)
        with environment.with_name(environment.name + ".lock").open("w") as lock:
            acquire(lock)
            if not is_complete(environment):  # else another process has built it while we waited
                build(environment, packages, lock)
    print(environment / "bin" / "python")


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = (packages for extra, packages in extras.items() if extra not in LEFT_OUT)
    return [*project["dependencies"], *itertools.chain.from_iterable(needed)]


def home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("EFFICIENT_ATTENTION_ENVS") or f"{cache}/efficient-attention"
    return Path(folder).expanduser().absolute()


def name(packages: list[str]) -> str:
    # The platform, because a home folder may be shared by machines of several kinds.
    python = f"python{sys.version_info.major}.{sys.version_info.minor}-{os.uname().machine}"
    contents = "\n".join([python, sys.platform, CONSTRAINTS.read_text(), *packages])
    return f"{python}-{hashlib.sha256(contents.encode()).hexdigest()[:12]}"


def is_complete(environment: Path) -> bool:
    # The python is a link: it breaks when the interpreter that it was made from is removed.
    return (environment / "complete").exists() and (environment / "bin" / "python").exists()


def acquire(lock: IO[str]) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"another process is building it; waiting for {lock.name}")
        fcntl.flock(lock, fcntl.LOCK_EX)


def build(environment: Path, packages: list[str], lock: IO[str]) -> None:
    say(f"building {environment}: several GB and some minutes, once for all clones with these pins")
    (environment / "complete").unlink(missing_ok=True)
    if environment.exists():
        shutil.rmtree(environment)
    python = str(environment / "bin" / "python")
    if importlib.util.find_spec("ensurepip"):
        run(lock, sys.executable, "-m", "venv", str(environment))
        pip = [python, "-I", "-m", "pip"]
    elif importlib.util.find_spec("pip"):  # as on Debian without python3-venv
        run(lock, sys.executable, "-m", "venv", "--without-pip", str(environment))
        pip = [sys.executable, "-m", "pip", "--python", python]
    else:
        sys.exit(f"environment: {sys.executable} has neither ensurepip nor pip to install with")
    options = ["--disable-pip-version-check", "--no-input", "--constraint", str(CONSTRAINTS)]
    run(lock, *pip, "install", *options, *packages)
    (environment / "complete").touch()


def run(lock: IO[str], *command: str) -> None:
    # The child holds the lock too: if this process is killed, nobody builds over a pip still at work.
    done = subprocess.run(command, stdout=sys.stderr, pass_fds=[lock.fileno()], check=False)
    if done.returncode:
        sys.exit(f"environment: exit code {done.returncode} from: {shlex.join(command)}")


def say(message: str) -> None:
    print(f"environment: {message}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("environment: interrupted; the next run starts it anew")
    except OSError as error:
        sys.exit(f"environment: {error}; EFFICIENT_ATTENTION_ENVS names another folder for it")
