"""`isthmus embed`: what it prints, what it refuses, and what it leaves behind."""

import json
import shutil

import numpy as np
import pytest

import isthmus
from isthmus.embedding import MARKER
from isthmus.exporter.bundle import INPUTS, OUTPUTS, write_cases, write_manifest
from isthmus.exporter.manifest import MANIFEST, Manifest, StageResult, TensorInfo, WeightsInfo
from isthmus.exporter.target import TARGETS


@pytest.fixture
def coreml(tmp_path):
    """A bundle for Core ML whose package is a few bytes."""
    folder = tmp_path / "bundle"
    (folder / "model.mlpackage" / "Data").mkdir(parents=True)
    (folder / "model.mlpackage" / "Manifest.json").write_text("{}")
    (folder / "model.mlpackage" / "Data" / "weight.bin").write_bytes(bytes(64))
    array = np.zeros((2, 3), np.float32)
    write_cases(folder / INPUTS, {"example": {"x": array}})
    write_cases(folder / OUTPUTS, {"example": {"y": array}})
    info = {"dtype": "float32", "shape": (2, 3)}
    write_manifest(
        folder,
        Manifest(
            model="my-net",
            target="coreml",
            precision="fp16",
            inputs=(TensorInfo(name="x", **info),),
            outputs=(TensorInfo(name="y", **info),),
            weights=WeightsInfo(origin="module"),
            tolerance={"min_psnr": 60.0},
            verdict="verified",
            stages=(StageResult(name="mil", verdict="verified"),),
        ),
    )
    return folder


def _left(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def test_a_package_is_written(run, coreml, tmp_path):
    result = run("embed", coreml, "--language", "swift", "-o", tmp_path / "package")
    assert result.exit_code == 0, result.stderr
    first, *notes = result.stdout.splitlines()
    assert first.startswith(f"{tmp_path / 'package'}: MyNet, my-net for coreml in swift, ")
    assert notes[0].startswith("  Not compiled here, and not run")
    assert (tmp_path / "package" / "Package.swift").is_file()
    assert _left(tmp_path) == ["bundle", "package"]


def test_as_json(run, coreml, tmp_path):
    result = run("embed", coreml, "--language=swift", "--output", tmp_path / "package", "--format", "json")
    value = json.loads(result.stdout)
    assert value["name"] == "MyNet"
    assert value["exit_code"] == 0
    here = {path.relative_to(tmp_path / "package").as_posix() for path in (tmp_path / "package").rglob("*") if path.is_file()}
    assert set(value["files"]) == here
    origin = json.loads((tmp_path / "package" / MARKER).read_text())
    assert set(origin["files"]) == here - {MARKER}
    assert origin["model"] == value["model"] == "my-net"


def test_from_python(coreml, tmp_path):
    result = isthmus.embed(coreml, "swift", tmp_path / "package")
    assert isinstance(result, isthmus.EmbedResult)
    assert result.name == "MyNet"
    assert result.manifest.model == "my-net"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--language", "swfit", "-o", "p"], "unknown language 'swfit'\nhint: did you mean swift?"),
        (["--language", "cobol", "-o", "p"], "unknown language 'cobol'\nhint: known: swift"),
        (["--language", "swift"], "missing option '-o'"),
        (["-o", "p"], "missing option '--language'"),
    ],
)
def test_bad_calls(run, coreml, arguments, message):
    result = run("embed", coreml, *arguments)
    assert result.exit_code == 2
    assert message.lower() in result.stderr.lower()
    assert result.stdout == ""


def test_what_is_no_bundle(run, tmp_path):
    result = run("embed", tmp_path, "--language", "swift", "-o", tmp_path / "package")
    assert result.exit_code == 2
    assert "is not a bundle" in result.stderr


def test_usage_errors_import_nothing_heavy(child, coreml, tmp_path):
    code = """
import sys, isthmus.cli
try:
    isthmus.cli.main()
finally:
    print("HEAVY", *sorted({"torch", "onnx", "coremltools"} & set(sys.modules)))
"""
    result = child("embed", coreml, "--language", "swfit", "-o", "p", code=code)
    assert result.returncode == 2
    assert result.stdout.splitlines()[-1] == "HEAVY"


def test_a_bundle_of_another_target(run, bundle, tmp_path):
    result = run("embed", bundle, "--language", "swift", "-o", tmp_path / "package")
    assert result.exit_code == 4
    assert "a bundle for onnxruntime cannot be embedded in swift" in result.stderr
    assert "hint: export dit-tiny with --target coreml" in result.stderr
    assert not (tmp_path / "package").exists()


def test_every_targets_languages_are_what_it_embeds_in():
    for name in TARGETS:
        target = TARGETS[name]
        assert bool(target.languages) == ("embed" in vars(target)), name


def test_a_changed_bundle(run, coreml, tmp_path):
    (coreml / "model.mlpackage" / "Data" / "weight.bin").write_bytes(bytes(63) + b"x")
    result = run("embed", coreml, "--language", "swift", "-o", tmp_path / "package", "--format", "json")
    assert result.exit_code == 1
    assert "model.mlpackage/Data/weight.bin: sha256 is" in result.stderr
    assert json.loads(result.stdout)["error"]["type"] == "IntegrityError"
    assert _left(tmp_path) == ["bundle"]


def test_an_output_that_exists(run, coreml, tmp_path):
    call = ("embed", coreml, "--language", "swift", "-o", tmp_path / "package")
    assert run(*call).exit_code == 0
    (tmp_path / "package" / "Package.swift").write_text("changed")
    result = run(*call)
    assert result.exit_code == 2
    assert "give --force to replace it" in result.stderr
    assert (tmp_path / "package" / "Package.swift").read_text() == "changed"
    assert run(*call, "--force").exit_code == 0
    assert (tmp_path / "package" / "Package.swift").read_text() != "changed"
    assert _left(tmp_path) == ["bundle", "package"]


def test_force_replaces_nothing_but_a_program(run, coreml, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "Package.swift").write_text("mine")
    other = shutil.copytree(coreml, tmp_path / "other")
    for folder in (mine, other):
        result = run("embed", coreml, "--language", "swift", "-o", folder, "--force")
        assert result.exit_code == 2
        assert "exists and is not a program that `isthmus embed` wrote, so --force does not replace it" in result.stderr
    assert (mine / "Package.swift").read_text() == "mine"
    assert (other / MANIFEST).is_file()


@pytest.mark.parametrize("where", [".", "inside", "..", "model.mlpackage/package"])
def test_an_output_in_the_bundle_or_around_it(run, coreml, where):
    result = run("embed", coreml, "--language", "swift", "-o", coreml / where, "--force")
    assert result.exit_code == 2
    assert "lies in the bundle" in result.stderr
    assert (coreml / MANIFEST).is_file()


def test_a_failure_leaves_nothing(run, coreml, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("isthmus.targets.coreml.swift.write_golden", fails)
    result = run("embed", coreml, "--language", "swift", "-o", tmp_path / "package")
    assert result.exit_code == 1
    assert "cannot write the program into" in result.stderr
    assert _left(tmp_path) == ["bundle"]
