"""Building, finding and loading the native library."""

import pytest

from isthmus.exporter.errors import IsthmusError, MachineError
from isthmus.exporter.ops import native
from isthmus.exporter.ops.native import cmake


def test_without_tools_everything_else_works(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MachineError, match="CMake and a C") as caught:
        native.build()
    assert "install" in caught.value.hint
    available, detail, fix = native.state()
    assert not available
    assert "not found" in detail
    assert fix
    assert native.library() is None


def test_a_library_of_other_sources_is_not_found(monkeypatch, tmp_path):
    monkeypatch.setenv("ISTHMUS_CACHE_DIR", str(tmp_path))
    (tmp_path / "libisthmus_ops-0123456789abcdef0123.so").write_bytes(b"")
    assert native.library() is None
    available, detail, fix = native.state()
    assert not available
    assert "not built" in detail
    assert fix == cmake.COMMAND


def test_a_damaged_library_is_reported(monkeypatch, tmp_path):
    built = native.build()
    monkeypatch.setenv("ISTHMUS_CACHE_DIR", str(tmp_path))
    (tmp_path / built.name).write_bytes(b"not a library")
    available, detail, fix = native.state()
    assert not available
    assert "cannot be loaded" in detail
    assert fix
    with pytest.raises(IsthmusError, match="cannot be loaded"):
        native.load(tmp_path / built.name)


def test_state_of_the_built_library():
    path = native.build()
    available, detail, fix = native.state()
    assert (available, fix) == (True, "")
    assert detail.startswith(path.name)
