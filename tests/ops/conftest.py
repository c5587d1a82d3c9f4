"""The native kernels, for each set of instructions that this machine has."""

import functools

import pytest

from efficient_attention.ops import native_build, native_short


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """The kernels for each set of instructions, built when they are first asked for."""

    @functools.cache
    def library(instructions, *more_flags):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
            flags = [f"-march={instructions}" if "march" in f else f for f in native_build.FLAGS]
            patch.setattr(native_build, "FLAGS", (*flags, *more_flags))
            return native_build.load.__wrapped__()

    return library


@pytest.fixture(params=["native", "x86-64-v3"])
def kernels(request, libraries, monkeypatch):
    """The kernels for this processor, and for any with AVX2."""
    reason = native_build.why_not()
    if reason is not None:
        pytest.skip(reason)
    library = libraries(request.param)
    monkeypatch.setattr(native_build, "load", lambda: library)
    return library


@pytest.fixture
def two_passes(monkeypatch):
    """Short inputs take the way of long ones."""
    monkeypatch.setattr(native_short, "LONGEST", -1)


@pytest.fixture(params=["at once", "in two passes"])
def way(request):
    if request.param == "in two passes":
        request.getfixturevalue("two_passes")
