"""`isthmus report A B --compare` on the command line: exit codes, the page, JSON, and what is refused."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from isthmus.calibration.compare import PAGE_MARK
from isthmus.exporter.bundle import read_manifest, write_manifest


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "calibration" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


samples = _load("report_samples")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A made-up bundle."""
    folder = tmp_path_factory.mktemp("made")
    samples.written(folder)
    write_manifest(folder, samples.manifest())
    return folder


@pytest.fixture
def bundle(made, tmp_path):
    """A copy of it that the test may change."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def weaken(folder, by=10.0):
    """Takes some dB from every figure of the bundle's artifact."""
    manifest = read_manifest(folder)
    changed = [
        s.model_copy(update={"metrics": tuple(m.model_copy(update={"sqnr_db": 80 - by, "psnr_db": 90 - by}) for m in s.metrics)})
        for s in manifest.stages
    ]
    write_manifest(folder, manifest.model_copy(update={"stages": tuple(changed)}))


def test_two_equal_bundles_are_no_regression(run, made, bundle, tmp_path):
    page = tmp_path / "deep" / "compare.html"
    before = {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    result = run("report", made, bundle, "--compare", "-o", page)
    assert result.exit_code == 0, result.stderr
    assert "no regression" in result.stdout
    assert result.stdout.splitlines()[-1] == f"page: {page}"
    assert PAGE_MARK in page.read_text()
    assert {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()} == before
    assert run("report", made, bundle, "--compare", "-o", page).exit_code == 0, "a page of its own is replaced"


def test_a_regression_ends_with_3(run, made, bundle, tmp_path):
    weaken(bundle)
    page = tmp_path / "compare.html"
    result = run("report", made, bundle, "--compare", "-o", page, "--format", "json")
    assert result.exit_code == 3
    value = json.loads(result.stdout)
    assert (value["exit_code"], value["threshold_db"], value["page"]) == (3, 1.0, str(page))
    assert value["regressions"]
    assert run("report", made, bundle, "--compare", "-o", page, "--threshold", "200").exit_code == 0
    result = run("report", made, bundle, "--compare", "-o", page)
    assert result.exit_code == 3
    assert "regression: stage onnx, case example" in result.stdout


def test_the_page_is_written_here_by_default(run, made, bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("report", made, bundle, "--compare")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "page: compare.html"
    assert PAGE_MARK in (tmp_path / "compare.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("A", "--compare"), "--compare takes two bundles"),
        (("A", "B"), "got a second bundle"),
        (("A", "--threshold", "2"), "--threshold is for --compare"),
        (("A", "-o", "x.html"), "-o is for --compare"),
        (("A", "B", "--compare", "--threshold", "nan"), "expected a number"),
        (("A", "B", "--compare", "--threshold", "-1"), "expected a number"),
        (("A", "/nowhere", "--compare"), "is not a bundle"),
    ],
)
def test_a_wrong_call_ends_with_2(run, made, arguments, words):
    result = run("report", *(made if a in ("A", "B") else a for a in arguments))
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_file_of_another_kind_is_not_replaced(run, made, bundle, tmp_path):
    mine = tmp_path / "mine.html"
    mine.write_text("my notes")
    for output in (mine, tmp_path):
        result = run("report", made, bundle, "--compare", "-o", output)
        assert result.exit_code == 2
        assert "is not a page of an earlier comparison" in result.stderr
    assert mine.read_text() == "my notes"


def test_another_model_ends_with_2(run, made, bundle):
    write_manifest(bundle, read_manifest(bundle).model_copy(update={"model": "other"}))
    result = run("report", made, bundle, "--compare", "--format", "json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["reasons"][0]["where"] == "model"
