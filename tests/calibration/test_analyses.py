"""Every registered analysis against figures that are known in closed form, and on every model that names it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import isthmus
from isthmus import analysing
from isthmus.calibration.analyses.mutual_information import sliced_information
from isthmus.calibration.analysis import ANALYSES, Finding, Seen, findings
from isthmus.calibration.verify import module_runner, to_array
from isthmus.exporter.errors import IsthmusError, UsageError
from isthmus.exporter.spec import MODELS, Analysis
from isthmus.exporter.weights import random_weights

from ..architectures import marks_of

REQUESTS = [(name, request) for name in MODELS if name.endswith("-tiny") for request in MODELS[name].spec().analyses]


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def seen(outputs, *, inputs=None, expected=None, run=None, fine=True):
    """One call."""
    return Seen([inputs or {}], [outputs], [outputs if expected is None else expected], run or (lambda arrays: arrays), fine)


def both(request, reference, artifact, **more):
    """The findings by name, of two sides that gave these outputs."""
    ours, theirs = seen(reference, **more), seen(artifact, expected=reference, **more)
    return {f.figure: f for f in findings(request, ours, theirs)}


def test_entropy_of_uniform_codes_is_their_logarithm():
    codes = np.tile(np.arange(8), 500)
    found = both(Analysis("entropy", ("codes",), settings={"size": 16}), {"codes": codes}, {"codes": codes})
    assert found["entropy"].reference == pytest.approx(3 + 7 / (2 * 4000 * math.log(2)))
    assert found["used"].artifact == 0.5
    assert found["agreement"].artifact == 1.0
    assert all(f.holds for f in found.values())


def test_the_correction_takes_the_bias_out():
    codes = rng().integers(0, 64, 400)  # 6 bits; the plug-in estimate is about 0.11 bits short
    found = both(Analysis("entropy", ("codes",), settings={"size": 64}), {"codes": codes}, {"codes": codes})
    assert found["entropy"].reference == pytest.approx(6.0, abs=0.06)


def test_one_code_that_differs_is_a_miss():
    codes = np.arange(8)
    found = both(Analysis("entropy", ("codes",), settings={"size": 8}), {"codes": codes}, {"codes": np.where(codes == 3, 4, codes)})
    assert found["agreement"].artifact == 0.875
    assert not found["agreement"].holds


def test_codes_of_a_network_in_half_precision_may_differ_where_they_are_allowed_to():
    codes = np.arange(200) % 8
    request = Analysis("entropy", ("codes",), settings={"size": 8, "agreement": 0.99})
    for wrong, fine, holds in ((2, False, True), (3, False, False), (1, True, False)):
        artifact = np.where(np.arange(200) < wrong, 7 - codes, codes)
        sides = seen({"codes": codes}), seen({"codes": artifact}, expected={"codes": codes}, fine=fine)
        assert {f.figure: f.holds for f in findings(request, *sides)}["agreement"] == holds


def test_codebooks_apart():
    codes = np.stack([np.tile(np.arange(4), 100), np.zeros(400, np.int64)], 1)[None]
    found = both(Analysis("entropy", ("codes",), settings={"size": 4, "axis": -1}), {"codes": codes}, {"codes": codes})
    assert found["entropy, 1"].reference == pytest.approx(2)
    assert (found["entropy, 2"].reference, found["used, 2"].reference) == (0.0, 0.25)
    assert found["agreement"].holds


def test_codes_that_do_not_exist_are_an_error():
    with pytest.raises(ValueError, match="expected 0 to 7"):
        both(Analysis("entropy", ("codes",), settings={"size": 8}), {"codes": np.array([8])}, {"codes": np.array([8])})


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.95])
def test_information_between_gaussians(correlation):
    x, noise = rng(1).standard_normal((2, 2000, 1))
    y = correlation * x + math.sqrt(1 - correlation**2) * noise
    assert sliced_information(x, y) == pytest.approx(-0.5 * math.log2(1 - correlation**2), abs=0.08)


def test_information_that_is_lost_is_a_miss():
    x = rng(2).standard_normal((500, 1))
    request = Analysis("mutual-information", ("z",), ("x",))
    found = both(request, {"z": x}, {"z": rng(3).standard_normal((500, 1))}, inputs={"x": x})["sliced"]
    assert found.reference > 2
    assert found.artifact < 0.2
    assert not found.holds


def test_vectors_instead_of_rows():
    x = rng(8).standard_normal((20, 50, 1))
    request = Analysis("mutual-information", ("z",), ("x",), {"vectors": True})
    found = both(request, {"z": 0.6 * x + 0.8 * rng(9).standard_normal(x.shape)}, {"z": x}, inputs={"x": x})["sliced"]
    assert found.reference == pytest.approx(-0.5 * math.log2(1 - 0.36), abs=0.1)


def test_the_rate_of_a_gaussian_code():
    mean, log_variance = np.full((300, 2), 1.5), np.full((300, 2), math.log(0.25))
    code = {"mean": mean + 1e-9 * rng().standard_normal(mean.shape), "logvar": log_variance, "decoded": rng(1).standard_normal((300, 3))}
    found = both(Analysis("information-bottleneck", ("mean", "logvar", "decoded")), code, code)
    assert found["rate"].reference == pytest.approx(2 * 0.5 * (1.5**2 + 0.25 - 1 - math.log(0.25)) / math.log(2))
    assert found["relevance"].reference < 0.2


def test_the_drift_of_an_energy():
    energies = 2.0 + np.array([[0.0, 0.1, -0.3], [0.0, 0.0, 0.1]])
    found = both(Analysis("energy", ("H",)), {"H": energies}, {"H": energies + np.array([0.0, 0.0, -0.2])})
    assert found["drift"].reference == pytest.approx((0.15 + 0.05) / 2)
    assert found["worst drift"].artifact == pytest.approx(0.25)
    assert not found["drift"].holds


def test_the_parts_of_an_energy_are_summed():
    exchanged = np.array([[[1.0, 2.0], [1.5, 1.5], [2.5, 0.5]]])  # kinetic and potential
    found = both(Analysis("energy", ("H",)), {"H": exchanged}, {"H": exchanged})
    assert found["drift"].reference == 0.0


def test_what_has_to_sum_to_an_input():
    plan = rng(6).random((3, 4, 5))
    request = Analysis("constraint", ("plan",), ("b",), {"axis": 1})
    found = both(request, {"plan": plan}, {"plan": plan * 1.01}, inputs={"b": plan.sum(1)})
    assert found["violation"].reference == pytest.approx(0, abs=1e-12)
    assert found["violation"].artifact == pytest.approx(0.01 * plan.sum(1).max())


def test_a_loop_that_is_cut_open_is_a_miss():
    angles = np.linspace(0, 2 * np.pi, 100, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    found = both(Analysis("betti", ("z",)), {"z": circle}, {"z": np.where(angles[:, None] > 5, circle[:1], circle)})
    assert [(found[f"betti {k}"].reference, found[f"betti {k}"].holds) for k in (0, 1)] == [(1.0, True), (1.0, False)]
    assert (found["moved 1"].reference, found["moved 1"].holds) == (0.0, False)
    near = both(Analysis("betti", ("z",)), {"z": circle}, {"z": circle + 1e-6 * rng().standard_normal(circle.shape)})
    assert all(f.holds for f in near.values())


def test_what_has_to_sum_to_one():
    rows = np.full((4, 5), 0.2)
    found = both(Analysis("constraint", ("p",)), {"p": rows}, {"p": rows - np.eye(4, 5) * 0.3})
    assert found["violation"].reference == pytest.approx(0, abs=1e-12)
    assert found["violation"].artifact == pytest.approx(0.3)
    assert found["negative"].artifact == pytest.approx(0.1)
    assert not found["violation"].holds


def test_a_row_that_notices_another_is_found():
    inputs = {"x": rng(4).standard_normal((4, 3))}

    def apart(arrays):
        return {"y": arrays["x"] * 2}

    def leaking(arrays):
        return {"y": arrays["x"] * 2 + 0.1 * arrays["x"][:1]}

    request = Analysis("coherence")
    ours = seen(apart(inputs), inputs=inputs, run=apart)
    (found,) = findings(request, ours, seen(leaking(inputs), inputs=inputs, run=leaking))
    assert found.reference == 0.0
    assert found.artifact > 0.01
    assert not found.holds
    assert findings(request, ours, ours)[0].holds


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_further_call_that_is_not_finite_is_found(wrong):
    inputs = {"x": rng(4).standard_normal((4, 3))}

    def right(arrays):
        return {"y": arrays["x"] * 2}

    def broken(arrays):
        return {"y": np.where(np.arange(4)[:, None] == 1, wrong, arrays["x"])}

    good = seen(right(inputs), inputs=inputs, run=right)
    (found,) = findings(Analysis("coherence"), good, seen(right(inputs), inputs=inputs, run=broken))
    assert found.artifact == math.inf
    assert not found.holds


@pytest.mark.parametrize("name", ["betti", "mutual-information", "information-bottleneck"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_an_artifact_whose_outputs_are_not_finite_misses_every_figure(name, wrong):
    model, request = next((model, request) for model, request in REQUESTS if request.name == name)
    spec = MODELS[model].spec()
    generator = rng(7)
    inputs = [{key: to_array(tensor) for key, tensor in spec.inputs(generator, spec.sizes).items()} for _ in range(24)]
    run = module_runner(random_weights(spec, seed=0), spec.inputs(rng(7), spec.sizes), spec.outputs)
    outputs = [dict(run(arrays)) for arrays in inputs]
    broken = [
        {key: np.full_like(array, wrong) if array.dtype.kind == "f" else array for key, array in arrays.items()} for arrays in outputs
    ]
    found = findings(request, Seen(inputs, outputs, outputs, run), Seen(inputs, broken, outputs, run))
    assert found
    assert all(math.isnan(finding.artifact) and not finding.holds for finding in found)


def test_codes_that_do_not_exist_miss_every_figure():
    codes, request = rng(3).integers(0, 8, (64, 4)), Analysis("entropy", outputs=("codes",), settings={"size": 8})
    good, bad = seen({"codes": codes}), seen({"codes": codes + 5})
    assert all(finding.holds for finding in findings(request, good, good))
    assert all(math.isnan(finding.artifact) and not finding.holds for finding in findings(request, good, bad))
    with pytest.raises(ValueError, match="expected 0 to 7"):
        findings(request, bad, good)


def test_equivalent_inputs_of_the_models_own():
    """Tokens in another order, for a model that has no positions."""
    inputs = {"x": rng(5).standard_normal((2, 6, 3))}
    request = Analysis("coherence", settings={"transform": lambda a: {"x": a["x"][:, ::-1]}, "back": lambda a: {"y": a["y"][:, ::-1]}})

    def positionless(arrays):
        return {"y": arrays["x"] ** 2}

    def with_positions(arrays):
        return {"y": arrays["x"] ** 2 + 0.1 * np.arange(6)[:, None]}

    good, bad = (seen(f(inputs), inputs=inputs, run=f) for f in (positionless, with_positions))
    assert findings(request, good, good)[0].holds
    assert not findings(request, good, bad)[0].holds


def test_a_figure_that_is_no_number_is_a_miss():
    assert not Finding("a", "x", "f", "", math.nan, math.nan, None).holds
    assert not Finding("a", "x", "f", "", 1.0, math.nan, None).holds
    assert Finding("a", "x", "f", "", math.inf, math.inf, 0.0).holds


UNKEPT = {("sinkhorn-tiny", "a, plan")}
"""Constraints that PyTorch itself keeps only in the limit: the marginal that is scaled first."""


@pytest.mark.parametrize(("name", "request_"), REQUESTS, ids=[f"{name}, {request.name}" for name, request in REQUESTS])
def test_a_model_is_as_near_to_itself_as_it_has_to_be(name, request_):
    spec = MODELS[name].spec()
    generator = rng(7)
    inputs = [{key: to_array(tensor) for key, tensor in spec.inputs(generator, spec.sizes).items()} for _ in range(24)]
    run = module_runner(random_weights(spec, seed=0), spec.inputs(rng(7), spec.sizes), spec.outputs)
    outputs = [dict(run(arrays)) for arrays in inputs]
    side = Seen(inputs, outputs, outputs, run, fine=True)
    for finding in findings(request_, side, side):
        assert math.isfinite(finding.reference), finding
        if finding.analysis in ("coherence", "constraint") and (name, finding.of) not in UNKEPT:
            assert finding.reference <= 1e-5, finding
        assert finding.holds, finding


ANALYSED = sorted({name for name, _ in REQUESTS})
ARTIFACTS = [
    pytest.param(
        name,
        target,
        precision,
        marks=marks_of(name, quick=(name, target) == ("topology-vae-encode-tiny", "onnxruntime"), first=target == "onnxruntime"),
    )
    for name in ANALYSED
    for target, precision in (("onnxruntime", "fp32"), ("coreml", "fp16"))
]


@pytest.mark.parametrize(("name", "target", "precision"), ARTIFACTS)
def test_an_artifact_behaves_as_its_model(name, target, precision, tmp_path):
    """Betti numbers, energies, sums and codes of what each target computes are PyTorch's."""
    isthmus.export(name, target, tmp_path / "bundle", precision=precision)
    report = isthmus.analyse(tmp_path / "bundle", ["all"]).report
    assert {figure.analysis for figure in report.figures} >= {request.name for model, request in REQUESTS if model == name}
    assert all(math.isfinite(figure.artifact) for figure in report.figures)
    assert report.missed == []


def test_an_artifact_with_other_dynamics_is_a_miss():
    """A tenth longer steps than the model has moves the energy by more than rounding explains."""
    spec = MODELS["hamiltonian-flow-tiny"].spec()
    wrong = MODELS["hamiltonian-flow-tiny"].spec({"dt": 1.0})
    inputs = [{key: to_array(tensor) for key, tensor in spec.inputs(rng(7), spec.sizes).items()}]
    sides = []
    for model in (spec, wrong):
        run = module_runner(random_weights(model, seed=0), spec.inputs(rng(7), spec.sizes), spec.outputs)
        sides.append(Seen(inputs, [dict(run(arrays)) for arrays in inputs], [], run))
    (request,) = spec.analyses
    found = findings(request, *sides)
    assert found[0].reference > 3e-4, "the tiny model's steps are coarse, so that there is a drift to compare"
    assert not any(finding.holds for finding in found)


def test_every_analysis_suits_a_model():
    # Any model with a batch can be asked for coherence.
    assert {request.name for _, request in REQUESTS} | {"coherence"} == set(ANALYSES)


def test_the_documentation_has_every_analysis():
    table = [line for line in (Path(__file__).parents[2] / "docs/analyses.md").read_text("utf-8").splitlines() if line.startswith("| `")]
    assert {line.split("`")[1] for line in table} == set(ANALYSES)


def test_the_command_line(bundle, run):
    result = run("verify", bundle, "--analysis", "all", "--rows", 6, "--format", "json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)["analyses"]
    (figure,) = value["figures"]
    assert (figure["analysis"], figure["holds"], value["rows"], value["stage"]) == ("coherence", True, 6, "onnx")
    assert 'id="analyses"' in (bundle / "report.html").read_text()
    assert run("verify", bundle).exit_code == 0, "the bundle's hashes are those of the files"
    assert "as near as they have to be" in (bundle / "report.html").read_text()
    shown = run("verify", bundle, "--analysis", "coherence", "--rows", 2)
    assert "coherence" in shown.stdout
    assert "MISSED" not in shown.stdout


def test_rows_that_do_not_fit_are_refused(bundle, monkeypatch):
    monkeypatch.setattr(analysing, "MAX_BYTES", 10_000)
    with pytest.raises(UsageError, match="of 0 GiB at most") as caught:
        isthmus.analyse(bundle, ["all"], rows=2**20)
    assert caught.value.hint.startswith("--rows ")


def test_a_model_that_no_analysis_suits_is_refused(tmp_path, monkeypatch):
    (tmp_path / "of_mine.py").write_text("import torch\n\ndef model():\n    return torch.nn.Tanh(), [torch.ones(1, 3)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    isthmus.export("of_mine:model", "onnxruntime", tmp_path / "bundle")
    with pytest.raises(UsageError, match="no analysis suits"):
        isthmus.analyse(tmp_path / "bundle", ["all"], model="of_mine:model")


def test_a_model_without_finite_outputs_has_nothing_to_compare(bundle, monkeypatch):
    def broken(*_):
        return lambda _: {"sample": np.full(3, math.nan)}

    monkeypatch.setattr(analysing, "module_runner", broken)
    with pytest.raises(IsthmusError, match="PyTorch's own outputs are not finite"):
        isthmus.analyse(bundle, ["all"], rows=2)


def test_wrong_calls(bundle, run):
    unknown = run("verify", bundle, "--analysis", "entropie")
    assert (unknown.exit_code, "entropy" in unknown.stderr) == (2, True)
    unsuited = run("verify", bundle, "--analysis", "energy")
    assert unsuited.exit_code == 2
    assert "energy does not suit dit-tiny" in unsuited.stderr
    assert "what suits it: coherence" in unsuited.stderr
    alone = run("verify", bundle, "--rows", 3)
    assert (alone.exit_code, "--rows is for --analysis" in alone.stderr) == (2, True)


def test_the_list_has_every_analysis(run):
    listed = json.loads(run("list", "analyses", "--format", "json").stdout)["analyses"]
    assert [entry["name"] for entry in listed] == sorted(ANALYSES)
    assert all(entry["summary"] for entry in listed)
