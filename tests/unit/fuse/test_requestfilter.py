"""The loader of the request filter, and what its functions refuse without a mount."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap

import pytest

from snapfs.fuse import requestfilter


def run(source: str) -> str:
    """Run `source` in a fresh interpreter and return its stdout."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(source)],
        check=False,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.stderr == ""
    assert result.returncode == 0
    return result.stdout


def test_load_precedes_pyfuse3_and_is_idempotent() -> None:
    assert "True\n" == run(
        """
        import os, sys
        flags = sys.getdlopenflags()
        from snapfs.fuse import requestfilter
        requestfilter.load()
        import pyfuse3
        requestfilter.load()
        print(sys.getdlopenflags() == flags and not requestfilter.attached())
        """
    )


def test_load_refuses_after_pyfuse3() -> None:
    assert "snapfs.fuse.requestfilter.load() must run before pyfuse3 is imported\n" == run(
        """
        import pyfuse3
        from snapfs.fuse import requestfilter
        try:
            requestfilter.load()
        except RuntimeError as error:
            print(error)
        """
    )


def test_load_refuses_an_extension_outside_the_global_scope() -> None:
    assert "snapfs.port._requestfilter was imported directly: use load()\n" == run(
        """
        import snapfs.port._requestfilter
        from snapfs.fuse import requestfilter
        try:
            requestfilter.load()
        except RuntimeError as error:
            print(error)
        """
    )


def test_a_missing_extension_says_how_to_build_it() -> None:
    output = run(
        """
        import sys
        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name == "snapfs.port._requestfilter":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Missing())
        flags = sys.getdlopenflags()
        from snapfs.fuse import requestfilter
        try:
            requestfilter.load()
        except ImportError as error:
            print(error.name, error)
        assert sys.getdlopenflags() == flags
        """
    )
    assert output.startswith(
        "snapfs.port._requestfilter the extension snapfs.port._requestfilter cannot"
    )
    assert "pip install ." in output
    assert "libfuse3-dev" in output


def test_functions_need_load() -> None:
    assert "requestfilter.load() has not been called\n" == run(
        """
        from snapfs.fuse import requestfilter
        try:
            requestfilter.statistics()
        except RuntimeError as error:
            print(error)
        """
    )


def test_the_extension_exists_once() -> None:
    assert "the request filter exists once in a process\n0\n" == run(
        """
        import gc, sys
        from snapfs.fuse import requestfilter
        requestfilter.load()
        first = sys.modules.pop("snapfs.port._requestfilter")
        try:
            import snapfs.port._requestfilter
        except ImportError as error:
            print(error)
        gc.collect()
        print(requestfilter.statistics()["outstanding"])
        """
    )


def test_handlers_are_freed_at_exit() -> None:
    assert "gone\n" == run(
        """
        import weakref
        from snapfs.fuse import requestfilter
        class Handler:
            def __call__(self, *args): pass
        requestfilter.load()
        handler = Handler()
        requestfilter.set_handlers(fallocate=handler, lseek=handler)
        weakref.finalize(handler, print, "gone")
        requestfilter.set_handlers()
        del handler
        """
    )


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    requestfilter.load()


@pytest.mark.parametrize("request_", [0, 1, -1, 0x7FFF_FFFF_FFFF, 2**64 - 1, 2**64, -(2**70)])
def test_bogus_requests_are_refused(request_: int) -> None:
    with pytest.raises(ValueError, match="is not outstanding"):
        requestfilter.reply_error(request_, errno.EIO)
    with pytest.raises(ValueError, match="is not outstanding"):
        requestfilter.reply_offset(request_, 0)


def test_arguments_of_the_wrong_type_are_refused() -> None:
    with pytest.raises(TypeError):
        requestfilter.reply_error("1", errno.EIO)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        requestfilter.set_handlers(fallocate=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        requestfilter.invalidate_range(2.0, 0, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1), (0, 0), (0, -1), (1, 2**63 - 1), (2**63 - 1, 1)]
)
def test_ranges_that_are_none_are_refused(offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="no byte range"):
        requestfilter.invalidate_range(2, offset, length)


def test_without_a_session() -> None:
    assert not requestfilter.attached()
    assert not requestfilter.direct_read()
    with pytest.raises(OSError) as caught:
        requestfilter.invalidate_range(2, 0, 4096)
    assert caught.value.errno == errno.ENODEV
