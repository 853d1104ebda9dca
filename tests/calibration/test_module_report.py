"""The modules on the page: what a comparison writes is what the report reads and shows."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from isthmus.calibration.bisect import StageDiff, arisen, culprit
from isthmus.calibration.module_report import FILE, ModuleReport, read_modules
from isthmus.calibration.report import render
from isthmus.calibration.row import Figures, Row
from isthmus.exporter.bundle import write_manifest
from isthmus.exporter.errors import IntegrityError


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


samples = _load("report_samples")
words = samples.words


def figures(error):
    return Figures(error, -20 * math.log10(error) if error else math.inf, error)


def row(module, order, injected, inherited=0.0, **more):
    return Row(module, "Linear", order, figures(injected + inherited), figures(inherited), figures(injected), case="example", **more)


STAGES = (
    StageDiff("onnx", "fp32", 1e-5, (row("blocks.0", 0, 1e-7), row("blocks.1", 1, 0.0), row("", 2, 2e-7)), "CPU"),
    StageDiff(
        "quantized", "fp8", 0.1,
        (
            row("blocks.0", 0, 0.02), row("blocks.1", 1, 0.4, 0.02, nodes=("MatMul a", "Add b", "Mul c", "Add d")), row("", 2, 0.01, 0.4),
            Row("norm", "LayerNorm", 3, reason="it was fused"), row("broken", 4, math.inf),
        ),
        "CPU",
    ),
    StageDiff("device", "fp8", 0.1, reason="no GPU here"),
)  # fmt: skip
TIMES = [
    {"timestep": t, "module": m, "total": t / 1000, "inherited": 0.0, "injected": e}
    for t in (100.0, 500.0, 900.0)
    for m, e in (("blocks.0", 0.01), ("blocks.1", 0.3), ("", None))
]


def value(stages=STAGES, **more):
    """As `isthmus report BUNDLE --modules` writes it."""
    found = culprit(stages)
    return {
        "culprit": {"stage": found.stage.name, "module": found.row.module} if found else None,
        "arisen": arisen(stages),
        "stages": [stage.value() for stage in stages],
        "timesteps": TIMES,
        **more,
    }


@pytest.fixture
def page(tmp_path):
    """Writes a bundle with a comparison, and gives its page."""

    def make(content):
        samples.written(tmp_path)
        (tmp_path / FILE).write_text(content if isinstance(content, str) else json.dumps(content, allow_nan=False))
        write_manifest(tmp_path, samples.manifest())
        return render(tmp_path)

    return make


def test_the_module_that_went_wrong_is_named(page):
    text = words(page(value()))
    assert "blocks.1 (Linear) is the first module over the threshold, in stage quantized: it injects a relative error of 0.4." in text
    assert "Stage quantized, fp8: 2 of 4 modules over 0.1" in text
    assert "Stage onnx, fp32: 0 of 3 modules over 1e-5" in text
    assert text.index("Stage quantized") < text.index("Stage onnx, fp32"), "the last stage is nearest to the artifact"
    assert "Stage device was not run: no GPU here." in text
    assert "Not visible, it was fused: norm." in text
    assert "the whole model" in text
    assert "4 nodes MatMul a, Add b, Mul c, Add d" in text


def test_the_charts_hold_every_error(page):
    report = ModuleReport.model_validate_json(json.dumps(value()))
    quantized = report.ran[0]
    assert [stage.name for stage in report.ran] == ["quantized", "onnx"]
    tips = {series.name: [mark.tip for mark in series.marks] for series in quantized.chart.series}
    assert len(tips["injected"]) == len(tips["total"]) == 4
    assert tips["injected"][1] == "blocks.1 (Linear)\ninjected 0.4"
    assert len(report.ran[1].chart.series[-1].marks) == 2, "an error of exactly 0 has no place on a logarithmic scale"
    whole, injected = report.timestep_chart.series
    assert [mark.tip for mark in whole.marks][-1] == "timestep 900\nerror of the output 0.9"
    assert injected.marks[0].tip == "timestep 100\nblocks.1 injects 0.3"
    assert whole.marks[0].x < whole.marks[1].x < whole.marks[2].x
    assert whole.marks[0].y > whole.marks[2].y
    shown = page(value())
    assert shown.count('data-tip="blocks.1 (Linear)') == 3, "of the last stage; in the other its errors are 0"
    assert "Error against timestep" in shown


def test_bars_are_logarithmic():
    stage = ModuleReport.model_validate_json(json.dumps(value())).ran[0]
    small, large = stage.bar(0.02), stage.bar(0.4)
    assert 0 < small < large <= 100
    assert stage.bar(0.2) - stage.bar(0.1) == pytest.approx(stage.bar(0.4) - stage.bar(0.2))
    assert (stage.bar(0.0), stage.bar(None), stage.bar(math.inf)) == (0.0, 0.0, 100.0)


def test_without_a_culprit_or_a_trajectory(page):
    text = words(page(value(STAGES[:1], timesteps=[], no_timesteps="dit-digits draws no pictures")))
    assert "No module is over the threshold in any stage that was run." in text
    assert "No errors against the timestep: dit-digits draws no pictures." in text


def test_a_bundle_without_a_comparison_says_how_to_make_one(tmp_path):
    page = samples.written(tmp_path)
    assert "Where accuracy was lost" not in page
    assert "isthmus report BUNDLE --modules does that." in words(page)


def test_smoothing_is_no_fault_of_a_module(tmp_path):
    """It divides results on purpose, which the page has to say."""
    for smooth, told in ((None, False), (0.5, True)):
        folder = tmp_path / str(smooth)
        folder.mkdir()
        made = samples.manifest(options={"smooth": smooth})
        samples.written(folder, made)
        (folder / FILE).write_text(json.dumps(value()))
        write_manifest(folder, made)
        assert ("were smoothed ( --smooth 0.5 )" in words(render(folder))) is told


def test_hostile_modules_stay_text(page):
    hostile = samples.HOSTILE
    stage = StageDiff(hostile, hostile, 0.1, (row(hostile, 0, 0.5, nodes=(hostile,)), Row(hostile, hostile, 1, reason=hostile)), hostile)
    shown = page(value((stage,)))
    assert shown.lower().count("<script") == 1, "the page's own"
    assert "<img" not in shown


@pytest.mark.parametrize(
    "content", ["{", '{"stages": [], "more": 1}', '{"stages": [{"name": "x"}]}'], ids=["cut", "unknown key", "missing keys"]
)
def test_a_damaged_comparison_is_named(page, content):
    with pytest.raises(IntegrityError, match=r"diff\.json is no comparison of this version"):
        page(content)


def test_a_link_out_of_the_bundle_is_not_read(tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(value()))
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / FILE).symlink_to(other)
    with pytest.raises(IntegrityError, match="leads out of"):
        read_modules(bundle)
