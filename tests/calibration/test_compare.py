"""Two bundles side by side: what is a regression, what is not, and what is refused."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from isthmus.calibration.compare import Figure, compare_bundles, comparison_page
from isthmus.exporter.bundle import write_manifest
from isthmus.exporter.errors import UsageError
from isthmus.exporter.manifest import StageResult, WeightsInfo


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


samples = _load("report_samples")
HOSTILE = samples.HOSTILE
digits = samples.digits
manifest = samples.manifest
rows = samples.rows
stages = samples.stages
words = samples.words


@pytest.fixture
def made(tmp_path):
    """Writes a bundle of some name: `made("a", verdict=…, size=…)`."""

    def make(name, *, pictures=None, size=2_500_000, **changes):
        folder = tmp_path / name
        folder.mkdir()
        found = manifest(**changes)
        samples.written(folder, found, pictures=pictures, size=size)
        write_manifest(folder, found)
        return folder

    return make


def lossy(error, verdict="verified", name="onnx"):
    """PyTorch's stage, and one of the artifact with that error."""
    return (stages()[0], StageResult(name=name, verdict=verdict, metrics=rows(error), device="CPU"))


def test_a_bundle_is_no_regression_of_itself(made):
    a, b = made("a"), made("b")
    found = compare_bundles(a, b)
    assert found.exit_code == 0
    assert found.regressions == found.notes == ()
    assert (found.versions, found.options) == ([], [])
    assert {f.change for f in found.figures} == {0.0}
    assert len(found.figures) == 2 * 3 * 2
    page = comparison_page(found)
    assert "No regression dit-digits No SQNR or PSNR of B is lower than A's by more than 1 dB, and no verdict is weaker." in words(page)


def test_the_figures_are_those_of_the_manifests(made):
    a, b = made("a", stages=lossy(1e-3)), made("b", stages=lossy(2e-3))
    found = compare_bundles(a, b)
    by_key = {(f.stage, f.case, f.metric): f for f in found.figures}
    for metric in ("sqnr_db", "psnr_db"):
        for i, case in enumerate(("example", "second", "resized")):
            figure = by_key["onnx", case, metric]
            assert figure.a == getattr(rows(1e-3)[i], metric)
            assert figure.b == getattr(rows(2e-3)[i], metric)
            # The same draws, twice as far away: 20 log10 2. Float32 holds the candidates, which costs a little.
            assert figure.change == pytest.approx(-20 * math.log10(2), abs=0.01)


@pytest.mark.parametrize(("threshold", "code"), [(1.0, 3), (6.0, 3), (6.1, 0), (1000.0, 0)])
def test_a_loss_is_a_regression_over_the_threshold(made, threshold, code):
    found = compare_bundles(made("a", stages=lossy(1e-3)), made("b", stages=lossy(2e-3)), threshold=threshold)
    assert found.exit_code == code
    if code:
        assert len(found.regressions) == 6
        assert found.regressions[0].where == "stage onnx, case example, output noise"
        assert f"allowed is −{threshold:g} dB" in found.regressions[0].what
        page = comparison_page(found)
        assert page.count('class="n miss"') == 6
        assert "B is worse than A in 6 respects" in words(page)


def test_a_gain_is_none(made):
    assert compare_bundles(made("a", stages=lossy(2e-3)), made("b", stages=lossy(1e-3))).exit_code == 0


@pytest.mark.parametrize(
    ("a", "b", "fell"),
    [
        (40.0, 38.9, True), (40.0, 39.0, False), (40.0, 41.0, False), (math.inf, 150.0, False), (math.inf, 118.0, True),
        (140.0, 125.0, False), (math.inf, math.inf, False), (-math.inf, -math.inf, False), (40.0, -math.inf, True),
        (-math.inf, 40.0, False), (40.0, math.nan, True), (math.nan, 40.0, False), (None, 40.0, False), (40.0, None, False),
    ],
)  # fmt: skip
def test_what_has_fallen(a, b, fell):
    assert Figure("onnx", "example", "y", "sqnr_db", a, b).fell(1.0) is fell


@pytest.mark.parametrize(
    ("before", "now", "code"),
    [
        ("verified", "failed", 3), ("verified", "not run", 3), ("verified", "built", 3), ("built", "lowered", 3), ("lowered", "not run", 3),
        ("not run", "blocked", 3), ("verified", "verified", 0), ("lowered", "built", 0), ("not run", "verified", 0),
    ],
)  # fmt: skip
def test_a_weaker_verdict_is_a_regression(made, before, now, code):
    device = {v: StageResult(name="device", verdict=v, reason="as it is") for v in (before, now)}
    found = compare_bundles(made("a", stages=(*stages(), device[before])), made("b", stages=(*stages(), device[now])))
    assert found.exit_code == code
    assert [r.where for r in found.regressions] == (["stage device"] if code else [])


def test_what_only_a_measured_is_a_regression_of_the_same_target_alone(made):
    plan = StageResult(name="plan", verdict="built")
    a = made("a", stages=(*stages(), plan))
    short = made("short", stages=(stages()[0], stages()[1].model_copy(update={"metrics": stages()[1].metrics[:2]})))
    found = compare_bundles(a, short)
    assert [r.where for r in found.regressions] == ["stage plan", "stage onnx, case resized, output noise"]
    other = made("other", stages=stages(), target="coreml")
    assert compare_bundles(a, other).exit_code == 0


def test_the_last_stages_are_compared_where_their_names_differ(made):
    a, b = made("a", stages=lossy(1e-4), precision="fp16"), made("b", stages=lossy(1e-2, name="quantized"), precision="int8")
    found = compare_bundles(a, b)
    assert {f.stage for f in found.figures if f.change is not None} == {"torch", "artifact"}
    assert {r.where.partition(",")[0] for r in found.regressions} == {"stage artifact"}
    assert ("precision", "fp16", "int8") in found.options


def test_bundles_of_different_models_are_refused_with_every_reason(made):
    a = made("a")
    b = made("b", weights=WeightsInfo(origin="random", sha256="00" * 32), config={"hidden_size": 96}, outputs=())
    with pytest.raises(UsageError) as caught:
        compare_bundles(a, b)
    assert {r.where for r in caught.value.reasons} >= {"config hidden_size", "config depth", "weights", "outputs"}
    with pytest.raises(UsageError, match="not of one model") as caught:
        compare_bundles(a, made("c", model="sana-digits"))
    assert [r.where for r in caught.value.reasons] == ["model"]
    with pytest.raises(UsageError, match="not a bundle"):
        compare_bundles(a, a.parent)


def test_sizes_coverage_and_versions_are_shown(made):
    counted = {
        share: {"coverage": {"share": share, "modules": [{"module": "blocks.0", "flops": 100, "fp8": round(100 * share)}]}}
        for share in (0.5, 0.9)
    }
    a = made("a", details=counted[0.9], versions={"torch": "2.13.0", "onnx": "1.22"})
    b = made("b", details=counted[0.5], versions={"torch": "2.14.0", "onnx": "1.22"}, size=5_000_000)
    found = compare_bundles(a, b)
    value = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert (value["a"]["fp8_share"], value["b"]["fp8_share"]) == (0.9, 0.5)
    assert (value["a"]["bytes"], value["b"]["bytes"]) == (2_500_000, 5_000_000)
    assert value["versions"] == [{"tool": "torch", "a": "2.13.0", "b": "2.14.0"}]
    assert value["exit_code"] == 0, "size and coverage are told, not judged"
    text = words(comparison_page(found))
    assert "model.onnx 2.38 MiB 4.77 MiB 2" in text
    assert "blocks.0 90 % 50 % -0.4" in text
    assert "torch 2.13.0 2.14.0" in text


def test_other_inputs_are_noted(made):
    a, b = made("a"), made("b")
    for folder, content in ((a, b"x"), (b, b"y")):
        (folder / "reference").mkdir()
        (folder / "reference/inputs.npz").write_bytes(content)
        write_manifest(folder, manifest())
    assert ["other inputs" in note for note in compare_bundles(a, b).notes] == [True]


def test_pictures_of_both_are_side_by_side(made):
    page = comparison_page(compare_bundles(made("a", pictures=digits(3)), made("b", pictures=digits(3, error=0.1))))
    assert page.count("<img") == 9


def test_hostile_names_stay_text(made):
    metrics = tuple(m.model_copy(update={"case": HOSTILE, "output": HOSTILE}) for m in rows(1e-3))
    hostile = {
        "model": HOSTILE, "target": HOSTILE, "precision": HOSTILE, "device": HOSTILE,
        "stages": (StageResult(name=HOSTILE, verdict="verified", metrics=metrics),),
    }  # fmt: skip
    a = made("a", **hostile, versions={HOSTILE: HOSTILE}, options={HOSTILE: HOSTILE})
    page = comparison_page(compare_bundles(a, made("b", **hostile)))
    assert page.lower().count("<script") == 1, "the page's own"
    assert "<img" not in page
    assert "{{ 7*7 }}" in page
