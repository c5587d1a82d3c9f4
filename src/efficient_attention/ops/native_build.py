"""The native kernels (native/*.c): compiled once by the C compiler of this machine, and kept in the user's cache.

They are compiled for the processor at hand, and their name in the cache follows from all that decides what they are:
source, flags, compiler and processor. So whatever of these changes, or whoever shares a home directory, gets others.
Nothing is compiled unless somebody asks for it, by ``build_native()`` or by ``backend="native"``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["build_native"]

SOURCE = Path(__file__).with_name("native")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fopenmp", "-shared", "-fPIC")
INSTRUCTIONS = {"avx2", "fma"}

_set_aside: set[bool] = set()


def build_native() -> Path:
    """Compile the CPU kernels in C, within some seconds, unless they have been: ``backend="auto"`` then takes them.

    They serve float32 and bfloat16 on Linux, on x86-64 processors with AVX2, AVX-512 or AMX. Needed are a C compiler
    with OpenMP (gcc, or clang with libomp) and a place to keep them, ``$XDG_CACHE_HOME`` or ``~/.cache``. Any number of
    processes may build at the same time.

    Returns:
        The shared library in the cache. Removing it undoes the call.

    Raises:
        NotImplementedError: this machine cannot have them; the message says why.
        RuntimeError: the compiler failed; the message has what it said.
        OSError: the cache cannot be written.

    Example:
        >>> efficient_attention.build_native().name  # doctest: +SKIP
        'native-5f0d9e6a4c1b2d37.so'

    Paper: Shen et al. 2021, Sec. 3.2, is what they compute.
    """
    reason = why_not()
    if reason is not None:
        raise NotImplementedError(f"the native kernels cannot be built: {reason}")
    path = _path()
    if _existing() is None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Beside its place and then moved to it, so that nobody ever loads half a library.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unfinished = Path(folder, path.name)
            _compile(unfinished)
            unfinished.replace(path)
        _opened.cache_clear()
        if _existing() is None:
            raise RuntimeError(f"the native kernels were built, but do not load: {path}")
    is_built.cache_clear()
    return path


def why_not() -> str | None:
    """Why this machine cannot have the native kernels, or ``None`` if it can."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        return f"they are for Linux on x86-64; this is {system} on {machine}"
    missing = INSTRUCTIONS - set(_processor().split())
    if missing:
        return f"/proc/cpuinfo tells of no {' and no '.join(sorted(missing))}"
    if _compiler() is None:
        return f"there is no C compiler: none of {', '.join(COMPILERS)} is on the PATH"
    if _cache() is None:
        return "there is nowhere to keep them: neither $XDG_CACHE_HOME nor a home directory"
    return None


def set_aside() -> None:
    """Let ``"auto"`` be, for the rest of this process, what it is where nobody has built them; by name they serve."""
    _set_aside.add(True)


def is_preferred() -> bool:
    """Whether ``"auto"`` takes them for what they serve: they have been built, and nobody has set them aside."""
    return is_built() and not _set_aside


@functools.cache
def is_built() -> bool:
    """Whether somebody has built them already, for this machine, and they load."""
    return why_not() is None and _existing() is not None


@functools.cache
def load() -> ctypes.CDLL:
    """The kernels, built if need be; errors are those of :func:`build_native`."""
    build_native()
    library = _existing()
    assert library is not None, "build_native has seen that it loads"
    return library


def _existing() -> ctypes.CDLL | None:
    """The kernels if they are there, and can be used."""
    try:
        return _opened(_path())
    except OSError:
        return None


@functools.cache
def _opened(path: Path) -> ctypes.CDLL | None:
    """A library; ``None`` where it cannot be read or loaded, or another user may have put it there.

    It needs OpenMP by a name under which PyTorch has loaded it, so that both share one pool of threads.
    """
    try:
        trusted = all(_is_ours(x) for x in (path.parent, path))
        return ctypes.CDLL(str(path)) if trusted else None
    except OSError:
        return None


def _is_ours(path: Path) -> bool:
    status = path.stat()
    return status.st_uid == os.getuid() and not status.st_mode & stat.S_IWOTH


def _compile(path: Path) -> None:
    """Each file by itself, at the same time, as each takes seconds; then what they make together."""
    sources = sorted(SOURCE.glob("*.c"))
    objects = [path.with_name(f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda c, o: _call_compiler("-c", str(c), "-o", str(o)), sources, objects))
    _call_compiler(*map(str, objects), "-lm", "-o", str(path))


def _call_compiler(*arguments: str) -> None:
    compiler = _compiler()
    assert compiler is not None
    command = [compiler, *FLAGS, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the native kernels do not compile: {' '.join(command)}\n{done.stderr}")


def _path() -> Path:
    cache = _cache()
    assert cache is not None
    return Path(cache, "efficient-attention", f"native-{_fingerprint()}.so")


def _cache() -> Path | None:
    named = os.environ.get("XDG_CACHE_HOME", "")
    # As its specification has it, a relative path is none.
    if Path(named).is_absolute():
        return Path(named)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return None


def _fingerprint() -> str:
    compiler = Path(_compiler() or "").resolve()
    status = compiler.stat()
    parts = [*FLAGS, str(compiler), str(status.st_size), str(status.st_mtime_ns), _processor()]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sorted(SOURCE.glob("*.[ch]")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, COMPILERS)), None)


@functools.cache
def _processor() -> str:
    """The model and the instructions of the first processor, in words."""
    try:
        told = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return ""
    return "\n".join(line for line in told if line.startswith(("model name", "flags")))
