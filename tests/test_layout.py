"""The folders, the links, the packaging map and the registries agree with each other."""

import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest

from isthmus.exporter.op import OPS, CustomOp
from isthmus.exporter.spec import MODELS
from isthmus.exporter.target import TARGETS

ROOT = Path(__file__).parent.parent
FOLDERS = ("exporter", "targets", "models", "calibration")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = sorted(p for folder in (*FOLDERS, "tests", "benchmarks", "training") for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("name", [*FOLDERS, "cli.py"])
def test_development_links_are_relative_and_lead_to_the_top(name):
    link = ROOT / "src" / "isthmus" / name
    assert link.is_symlink()
    assert link.readlink() == Path("../..") / name


def test_the_wheel_maps_every_folder():
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    here = {p.name for p in (ROOT / "src" / "isthmus").iterdir() if not p.name.startswith("__pycache__")}
    mapped = {Path(p).name for p in wheel["only-include"]} | set(wheel["force-include"])
    assert mapped == here
    for folder in FOLDERS:
        assert wheel["sources"][folder] == f"isthmus/{folder}"


def test_every_folder_with_python_files_is_a_package():
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            if "runtime" not in path.relative_to(ROOT).parts:
                assert (path.parent / "__init__.py").is_file(), path


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_bare_import_of_our_folders(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        assert not {name.partition(".")[0] for name in names} & set(FOLDERS)


@pytest.mark.parametrize("registry", [MODELS, TARGETS, OPS], ids=lambda r: r.kind)
def test_the_index_is_what_the_decorators_register(registry):
    for name in registry:
        importlib.import_module(registry.entry(name).module)
    assert set(registry._loaded) >= set(registry.index)
    ours = {name for name, value in registry._loaded.items() if _module_of(value).startswith("isthmus.")}
    assert ours == set(registry.index)
    for name, entry in registry.index.items():
        assert entry.summary
        assert registry[name].name == name
        assert registry[name].summary == entry.summary
        assert _module_of(registry[name]) == entry.module


def _module_of(value: object) -> str:
    if isinstance(value, type):
        return value.__module__
    return type(value).__module__ if isinstance(value, CustomOp) else value.make.__module__


@pytest.mark.parametrize("name", list(MODELS))
def test_the_index_has_the_settings_of_the_model(name):
    import dataclasses

    config = MODELS[name].config
    assert {o.name: o.default for o in MODELS.entry(name).options.values()} == dataclasses.asdict(config)
    assert {o.name: o.annotation for o in MODELS.entry(name).options.values()} == {f.name: f.type for f in dataclasses.fields(config)}


@pytest.mark.parametrize("name", list(MODELS))
def test_every_setting_can_be_given_as_text(name):
    from isthmus.exporter.options import coerce

    for option in MODELS.entry(name).options.values():
        assert coerce(option.annotation, str(option.default)) == option.default


def test_constraints_pin_what_the_project_depends_on():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), "exact versions, no paths, no local builds"
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    project = PROJECT["project"]
    # onnxruntime-gpu stands in onnxruntime's place, and is not installed where the tests run.
    extras = [text for name, texts in project["optional-dependencies"].items() if name != "gpu" for text in texts]
    wanted = [*project["dependencies"], *extras, *PROJECT["dependency-groups"]["dev"]]
    names = {re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", text).group()).lower() for text in wanted}
    assert names <= pinned


def test_version_is_said_once_more_in_the_package():
    import isthmus

    assert isthmus.__version__ == PROJECT["project"]["version"]
