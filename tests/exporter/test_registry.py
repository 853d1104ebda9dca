"""The registries: read from the source, loaded when asked for."""

import sys
from pathlib import Path

import pytest

from isthmus.exporter import registry as registries
from isthmus.exporter.errors import UnknownNameError
from isthmus.exporter.registry import Registry


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's root, moved to an empty folder that has `things/`."""
    monkeypatch.setattr(registries, "_ROOT", tmp_path)
    (tmp_path / "things").mkdir()
    return tmp_path / "things"


def _registry() -> Registry[object]:
    return Registry("thing", "things", "register_thing")


SOURCE = """
from dataclasses import dataclass
raise RuntimeError("the file was imported")
@dataclass(frozen=True)
class Config:
    depth: int = 2
    sizes: tuple[int, ...] = (1, 2)
    name: str | None = None
    required: float

@register_thing("a", Config(depth=3, required=0.5), summary="an a")
@register_thing("b", Config(required=1.0), summary="a b")
def make(config): ...

@register_thing("c", summary="a class")
class Thing: ...

@other("d")
def no(): ...
"""


def test_entries_are_read_without_importing(folder):
    (folder / "one.py").write_text(SOURCE)
    index = _registry().index
    assert list(index) == ["a", "b", "c"]
    assert index["a"].module == "isthmus.things.one"
    assert index["a"].summary == "an a"
    options = {o.name: (o.annotation, o.default) for o in index["a"].options.values()}
    assert options == {
        "depth": ("int", 3),
        "sizes": ("tuple[int, ...]", (1, 2)),
        "name": ("str | None", None),
        "required": ("float", 0.5),
    }
    assert index["b"].options["depth"].default == 2
    assert index["c"].options == {}


def test_settings_that_are_inherited_come_first(folder):
    (folder / "one.py").write_text(
        "class Plain:\n    depth: int = 2\n    width: int = 8\n"
        "class Config(Plain):\n    depth: int = 3\n    name: str = 'x'\n"
        '@register_thing("a", Config(width=9), summary="an a")\ndef make(config): ...\n'
    )
    assert [(o.name, o.default) for o in _registry().index["a"].options.values()] == [("depth", 3), ("width", 9), ("name", "x")]


def test_a_packages_init_is_its_module(folder):
    (folder / "kind").mkdir()
    (folder / "kind" / "__init__.py").write_text('@register_thing("k", summary="s")\nclass K: ...\n')
    assert _registry().index["k"].module == "isthmus.things.kind"


def test_a_name_registered_twice_is_an_error(folder):
    for name in ("one", "two"):
        (folder / f"{name}.py").write_text('@register_thing("same", summary="s")\nclass K: ...\n')
    with pytest.raises(ValueError, match=r"'same' is registered in isthmus\.things\.one and in isthmus\.things\.two"):
        _ = _registry().index


@pytest.mark.parametrize(
    "source",
    [
        '@register_thing("n" + "m", summary="s")\nclass K: ...\n',
        'S = "s"\n@register_thing("n", summary=S)\nclass K: ...\n',
        '@register_thing("n", Elsewhere(), summary="s")\ndef f(c): ...\n',
    ],
)
def test_arguments_that_are_not_literals_are_an_error(folder, source):
    (folder / "one.py").write_text(source)
    with pytest.raises(ValueError, match=r"malformed|must be a call of a class of that file"):
        _ = _registry().index


def test_an_unknown_name_lists_the_near_ones(folder):
    (folder / "one.py").write_text(SOURCE.replace('"a"', '"alpha"').replace('"b"', '"beta"'))
    registry = _registry()
    with pytest.raises(UnknownNameError) as near:
        registry.entry("alhpa")
    assert near.value.near == ("alpha",)
    assert near.value.exit_code == 2
    assert "did you mean alpha?" in str(near.value)
    with pytest.raises(UnknownNameError, match="known: alpha, beta, c"):
        _ = registry["zzzzzz"]
    assert "alpha" in registry
    assert "alhpa" not in registry
    assert (len(registry), list(registry)) == (3, ["alpha", "beta", "c"])


def test_an_entry_is_imported_when_it_is_used(folder, monkeypatch):
    (folder / "one.py").write_text(
        "from isthmus.exporter.registry import registering\nimport builtins\n"
        "def register_thing(name, summary): return registering(builtins.thing_registry, name)\n"
        '@register_thing("late", summary="s")\nclass Late: ...\n'
    )
    registry = _registry()
    monkeypatch.setattr("builtins.thing_registry", registry, raising=False)
    assert "late" in registry.index
    assert "isthmus.things.one" not in sys.modules
    import isthmus

    monkeypatch.setattr(isthmus, "__path__", [*isthmus.__path__, str(folder.parent)])
    try:
        assert registry["late"].__name__ == "Late"
    finally:
        for name in ("isthmus.things.one", "isthmus.things"):
            sys.modules.pop(name, None)
