"""The plot of a search: what `isthmus tune` writes is what the report shows, of the right bundle only."""

import importlib.util
import json
from pathlib import Path

import pytest

from isthmus.calibration.charts import BOTTOM, TOP, Points, scatter_chart
from isthmus.calibration.tune_report import FILE, read_tune
from isthmus.exporter.bundle import check_integrity, read_manifest, write_manifest
from isthmus.exporter.errors import IntegrityError


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


samples = _load("report_samples")
RECIPE = "ab" * 32


def found(**changes):
    """As `isthmus tune` writes it, in short."""
    measured = ((0.2, 40.0), (0.6, 34.0), (0.5, 30.0), (0.9, 29.0))
    points = [{"flop_share": share, "sqnr_db": sqnr, "psnr_db": None, "modules": []} for share, sqnr in measured]
    made = samples.manifest()
    return {
        "schema": 1, "model": made.model, "weights": made.weights.sha256, "target": made.target, "precision": made.precision,
        "budget": {"min_sqnr_db": 32.0, "min_psnr_db": None, "max_lpips_style": 0.1},
        "chosen": {**points[1], "psnr_db": 41.0, "lpips_style": 0.0213},
        "uniform": {"calibration_method": "max", "weight_rounding": "nearest", "flop_share": 0.97, "sqnr_db": 26.5},
        "front": [points[i] for i in (0, 1, 3)], "points": points,
        "recipe": RECIPE,
        "modules": [{"module": f"blocks.{i}", "flops": 1000 * i, "sqnr_db": 30.0 + i, "chosen": i > 1} for i in range(4)],
        **changes,
    }  # fmt: skip


@pytest.fixture
def bundle(tmp_path):
    """A made-up bundle."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    samples.written(folder)
    write_manifest(folder, samples.manifest())
    return folder


def test_a_search_comes_into_the_report(run, bundle, tmp_path):
    search = tmp_path / "r.pareto.json"
    search.write_text(json.dumps(found()))
    result = run("report", bundle, "--tune", search)
    assert result.exit_code == 0, result.stderr
    page = (bundle / "report.html").read_text()
    text = samples.words(page)
    assert "measured 4 choices of modules in fp32. It chose 60 % of the operations at 34.0 dB" in text
    assert "is 97 % at 26.5 dB" in text
    assert "blocks.3 3 000 33.0 yes" in text.replace("\u202f", " ")
    assert page.count("chosen\n60 % of the operations in fp32\nSQNR 34.0 dB, pictures 41.0 dB") == 1
    check_integrity(bundle, read_manifest(bundle))
    assert run("report", bundle).exit_code == 0
    assert (bundle / "report.html").read_text() == page


def test_a_search_of_another_model_is_refused(run, bundle, tmp_path):
    search = tmp_path / "r.pareto.json"
    search.write_text(json.dumps(found(model="sana-digits", precision="fp8")))
    result = run("report", bundle, "--tune", search, "--format", "json")
    assert result.exit_code == 2
    assert [r["where"] for r in json.loads(result.stdout)["error"]["reasons"]] == ["model", "precision"]
    assert not (bundle / FILE).exists()


@pytest.mark.parametrize(
    ("used", "wrote", "says"),
    [
        (RECIPE, RECIPE, None),
        (None, RECIPE, "This bundle was exported without the recipe of this search"),
        ("cd" * 32, RECIPE, "This bundle was not exported with the recipe of this search, but with another one (sha256 cdcdcdcdcdcd…, "),
        (RECIPE, None, "This search does not say which recipe it wrote"),
    ],
    ids=["the-same", "none", "another", "not-known"],
)
def test_a_bundle_of_another_recipe_is_marked(run, bundle, tmp_path, used, wrote, says):
    made = samples.manifest(options={"seed": 0, **({"recipe": used} if used else {})})
    samples.written(bundle, made)
    write_manifest(bundle, made)
    search = tmp_path / "r.pareto.json"
    value = found()
    if wrote is None:
        del value["recipe"]
    search.write_text(json.dumps(value))
    assert run("report", bundle, "--tune", search).exit_code == 0
    page = (bundle / "report.html").read_text()
    assert "It chose 60 % of the operations" in samples.words(page), "the front is shown all the same"
    assert ('id="other-recipe"' in page) == (says is not None)
    assert says is None or says in samples.words(page)


def test_what_each_module_alone_leaves_of_the_pictures(bundle, run, tmp_path):
    search = tmp_path / "r.pareto.json"
    value = found()
    modules = [{**m, "psnr_db": 50.0 + i, "lpips_style": 0.01 * (i + 1)} for i, m in enumerate(value["modules"])]
    search.write_text(json.dumps({**value, "modules": modules}))
    assert run("report", bundle, "--tune", search).exit_code == 0
    text = samples.words((bundle / "report.html").read_text()).replace("\u202f", " ")
    assert "PSNR of pictures alone, dB LPIPS-style alone" in text
    assert "blocks.3 3 000 33.0 53.0 0.04 yes" in text
    search.write_text(json.dumps(value))
    assert run("report", bundle, "--tune", search).exit_code == 0
    assert "pictures alone" not in (bundle / "report.html").read_text()


@pytest.mark.parametrize("content", ["{", "{}", None], ids=["cut", "empty", "missing"])
def test_what_is_no_search_is_named(tmp_path, content):
    path = tmp_path / "r.pareto.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(IntegrityError, match=r"is not what|cannot be read"):
        read_tune(path)


def test_the_plot_is_linear_in_both(tmp_path):
    path = tmp_path / "r.pareto.json"
    path.write_text(json.dumps(found()))
    chart = read_tune(path).chart
    marks = {series.name: series.marks for series in chart.series}
    x, y = zip(*((mark.x, mark.y) for mark in marks["measured"]), strict=True)
    assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(0.4 / 0.3)
    assert (y[1] - y[0]) / (y[2] - y[0]) == pytest.approx(6 / 10)
    assert y[0] < y[1] < y[2], "a higher SQNR lies higher"
    assert marks["chosen"][0].tip.endswith("pictures 41.0 dB, LPIPS-style 0.0213")
    assert [mark.x for mark in marks["front of Pareto"]] == sorted(mark.x for mark in marks["front of Pareto"])
    assert next(line.y for line in chart.lines if line.kind == "bound") == pytest.approx((y[1] + y[2]) / 2)


@pytest.mark.parametrize("values", [(30.0,), (30.0, 30.0), (-5.0, 400.0), (30.0, float("inf")), (float("inf"),), ()])
def test_every_point_has_a_place(values):
    chart = scatter_chart("t", [Points("a", "total", [(i / 2, y, "") for i, y in enumerate(values)])])
    assert all(TOP <= mark.y <= BOTTOM for series in chart.series for mark in series.marks)
    assert 2 <= len(chart.lines) <= 9
