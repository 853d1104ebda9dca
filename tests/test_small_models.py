"""Every model that is small enough, the whole way to every target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training.judge import draw, judge

import isthmus
from isthmus.exporter.bundle import read_manifest
from isthmus.exporter.errors import UnsupportedError
from isthmus.exporter.manifest import Manifest
from isthmus.exporter.ops.plugin import headers
from isthmus.exporter.spec import MODELS
from isthmus.exporter.target import TARGETS
from isthmus.models.flow import RectifiedFlowSampler

from .architectures import CELLS, FIRST, REFUSALS, TINY, cell_of, marks_of, record, refused

_LONG = ("sdxl-unet-tiny", "consistency-tiny", "ctm-tiny", "video-dit-tiny")


def _is_swept_quickly(name: str, target: str) -> bool:
    """What `make test` sweeps: one form of each system in ONNX Runtime, without U-Nets and videos, of 10 to 20 seconds each; Core ML for
    one of each kind of mixer; every target for two. Tensorrt's graph is tensorrt-rtx's, where scans take plugins, for a minute.
    """
    if target == "onnxruntime":
        return name in FIRST and name not in _LONG
    return (name in ("dit-tiny", "sana-tiny") and target != "tensorrt") or (name, target) == ("diffussm-tiny", "coreml")


SWEPT = [
    pytest.param(
        name,
        target,
        precision,
        marks=[
            pytest.mark.xdist_group(name),
            *marks_of(name, quick=_is_swept_quickly(name, target), first=target in ("tensorrt-rtx", "coreml") and name not in _LONG),
        ],
    )
    for name in TINY
    for target, precision in CELLS
]

DEEP = [name for name in MODELS if name in ("dit-tiny", "sana-tiny", "diffussm-tiny") or name.endswith("-digits")]
"""Those that are also carried to every precision: one of each kind of mixer. What other models add shows in one precision."""

PRECISIONS = [(target, precision) for target in TARGETS for precision in TARGETS[target].precisions]


def _takes_part(name: str, target: str, precision: str) -> bool:
    """Models that draw pictures take long, and are tried where that says more than the tiny ones say."""
    digits = name.endswith("-digits")
    if not digits and (target, precision) in CELLS:  # swept with all others
        return False
    if target == "tensorrt":  # shares everything with tensorrt-rtx but the build, which happens here for the latter alone
        return precision == "fp8" if digits else name == "dit-tiny"
    if target == "coreml":  # a conversion for each; how weights are stored does not depend on the model
        return precision in ("fp16", "fp32", "int8") if digits else name == "dit-tiny" or precision in ("fp16", "fp32")
    return not digits or target in ("onnxruntime", "coreai") or precision == "fp8"


_DRAWING = {("onnxruntime", "fp32")}


def _is_quick(name: str, target: str, precision: str) -> bool:
    """What `make test` runs; `make matrix` runs the others."""
    slow = target in ("tensorrt", "tensorrt-rtx", "coreml")  # some seconds each
    if slow and precision not in ("fp8", "w8a8", "palette4"):
        return False
    return name == "dit-tiny" or (name == "dit-digits" and (target, precision) in _DRAWING)


def _marks(name: str, target: str, precision: str) -> tuple[pytest.MarkDecorator, ...]:
    """Of models that draw pictures .ci/run takes dit-digits where ranges are calibrated on what it draws."""
    if _is_quick(name, target, precision):
        return ()
    taken = name == "dit-tiny" or (name == "dit-digits" and (target, precision) in (("onnxruntime", "int8"), ("tensorrt", "fp8")))
    return (pytest.mark.matrix,) if taken else (pytest.mark.matrix, pytest.mark.full)


COMBINATIONS = [
    pytest.param(
        name,
        target,
        precision,
        marks=[pytest.mark.xdist_group(f"{name}, {target}"), *_marks(name, target, precision)],
    )
    for name in DEEP
    for target, precision in PRECISIONS
    if _takes_part(name, target, precision)
]


@pytest.fixture(scope="module")
def _headers() -> None:
    """TensorRT's headers, from which the plugins of models with scans are built."""
    headers.find_or_fetch()


@pytest.mark.usefixtures("_headers")
@pytest.mark.parametrize(("name", "target", "precision"), SWEPT)
def test_every_tiny_model_on_every_target(name: str, target: str, precision: str, tmp_path: Path) -> None:
    if refusal := REFUSALS.get((name, target)):
        with pytest.raises(UnsupportedError) as caught:
            isthmus.export(name, target, tmp_path / "bundle", precision=precision)
        assert refusal.operator in str(caught.value)
        record(refused(name, target, precision, caught.value))
        return
    manifest = isthmus.export(name, target, tmp_path / "bundle", precision=precision).manifest
    holds(manifest)
    record(cell_of(manifest))


@pytest.mark.usefixtures("_headers")
@pytest.mark.parametrize(("name", "target", "precision"), COMBINATIONS)
def test_one_model_of_each_kind_in_every_precision(name: str, target: str, precision: str, tmp_path: Path) -> None:
    calibration = {"calibration_data": "random", "calibration_size": 2} if precision in TARGETS[target].calibrated else {}
    if name.endswith("-digits"):
        calibration = {}
    result = isthmus.export(name, target, tmp_path / "bundle", precision=precision, **calibration)

    manifest = read_manifest(tmp_path / "bundle")
    assert manifest == result.manifest
    holds(manifest)
    if precision == "fp8" and name.endswith("-digits"):
        assert min(m.sqnr_db for s in manifest.stages if s.name == "quantized" for m in s.metrics) >= 25
        assert named_rightly(name, tmp_path / "bundle") >= 0.85
    report = json.loads((tmp_path / "bundle" / "report.json").read_text())
    assert report["verdict"] == manifest.verdict
    assert bool(report["warnings"]) == (calibration.get("calibration_data") == "random")
    assert isthmus.verify(tmp_path / "bundle").verdict == "verified"


def holds(manifest: Manifest) -> None:
    """Everything that can be executed here was, and was near enough to PyTorch; engines were built where that can be done."""
    executed = [s for s in manifest.stages if s.name != "plan" and s.verdict != "not run"]
    assert {s.verdict for s in executed} == {"verified"}
    assert {s.name for s in executed} > {"torch"}
    plans = [s for s in manifest.stages if s.name == "plan"]
    builds = {c.name: c.available for c in TARGETS[manifest.target]().capabilities()}["build"]
    assert manifest.verdict == (("built" if builds else "lowered") if plans else "verified")
    assert [s.verdict for s in plans] == ([manifest.verdict] if plans else [])
    cases = {m.case for s in manifest.stages for m in s.metrics}
    assert cases >= {"example", "second"}
    assert ("resized" in cases) == bool(manifest.sizes)
    assert ("samples" in cases) == manifest.model.endswith("-digits")
    if manifest.precision == "fp32":
        assert max(m.max_relative for s in manifest.stages for m in s.metrics if m.case != "samples") < 1e-5


def named_rightly(name: str, bundle: Path) -> float:
    """Share of the pictures drawn with the file of a bundle that a classifier of real digits names as the digit asked for."""
    sampler = MODELS[name].spec().sampler
    assert isinstance(sampler, RectifiedFlowSampler)
    manifest = read_manifest(bundle)
    (stage,) = (s for s in TARGETS[manifest.target]().stages(bundle, manifest) if s.name == "quantized")
    assert stage.open is not None
    with stage.open() as runner:
        images, labels = draw(sampler, runner.run, per_class=6, seed=5)
    return judge(images, labels).sample_accuracy
