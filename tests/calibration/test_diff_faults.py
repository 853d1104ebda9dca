"""The fault corpus: an edit of an exported graph is found in the module that it was made in."""

import functools
import importlib.util
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

import isthmus
from isthmus.calibration.bisect import Form, culprit, examine
from isthmus.calibration.diff import Reference
from isthmus.calibration.onnx_values import OnnxValues
from isthmus.calibration.unquantised import RemoveQuantisation
from isthmus.differences import rebuild
from isthmus.exporter.bundle import INPUTS, read_cases, read_manifest
from isthmus.exporter.ops.native.torch_hook import native_kernels


def _load():
    """The corpus, as a package of its own: pytest's import mode knows no packages among the tests."""
    folder = Path(__file__).with_name("faults")
    spec = importlib.util.spec_from_file_location("isthmus_faults", folder / "__init__.py", submodule_search_locations=[str(folder)])
    package = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = package
    spec.loader.exec_module(package)
    return package.load()


FAULTS = _load()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are tiny: threads cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A bundle, its graph, its PyTorch module and the inputs of one case; every bundle is exported once."""

    @functools.cache
    def make(model, precision):
        folder = tmp_path_factory.mktemp("faults") / model
        quantised = precision != "fp32"
        isthmus.export(
            model,
            "tensorrt" if quantised else "onnxruntime",
            folder,
            precision=precision,
            **({"calibration_data": "random"} if quantised else {}),
        )
        cases = read_cases(folder / INPUTS)
        source = rebuild(read_manifest(folder), cases["example"], model=None, weights=None)
        return folder, ir.load(folder / "model.onnx"), Reference(source.module, source.example), {"example": cases["example"]}

    return make


def bisected(graph, reference, cases, precision):
    """What bisect finds in a graph: the stages `onnx` and, where it is quantised, `quantized`."""
    forms = [Form("onnx", precision, lambda: OnnxValues(graph))]
    if precision == "fp8":
        plain = graph.clone()
        RemoveQuantisation(dict(reference.module.named_parameters()))(plain)
        forms = [Form("onnx", "fp16", lambda: OnnxValues(plain)), Form("quantized", precision, lambda: OnnxValues(graph))]
    with native_kernels(False):
        return culprit([examine(reference, form, cases) for form in forms])


def test_there_are_enough_faults_over_three_models():
    assert len(FAULTS) >= 24
    assert {fault.model for fault in FAULTS} == {"dit-tiny", "sana-tiny", "diffussm-tiny"}


@pytest.mark.matrix
@pytest.mark.parametrize(("model", "precision"), sorted({(fault.model, fault.precision) for fault in FAULTS}))
def test_nothing_is_found_where_there_is_no_fault(exported, model, precision):
    _, *parts = exported(model, precision)
    found = bisected(*parts, precision)
    assert found is None, found.row


@pytest.mark.matrix
def test_bisect_names_the_right_module_in_at_least_95_percent(exported):
    misses = {}
    for fault in FAULTS:
        _, graph, reference, cases = exported(fault.model, fault.precision)
        found = bisected(fault.inject(graph), reference, cases, fault.precision)
        stage = "quantized" if fault.precision == "fp8" else "onnx"
        named = (found.row.module, found.stage.name) if found is not None else None
        if named != (fault.module, stage):
            misses[f"{fault.model}: {fault.name}"] = f"named {named}, it is in {fault.module!r}"
    text = "\n".join(f"{name}: {what}" for name, what in misses.items())
    print(f"bisect names {len(FAULTS) - len(misses)} of {len(FAULTS)} faults\n{text}")
    assert len(FAULTS) - len(misses) >= 0.95 * len(FAULTS), text


SOME = {
    "dit-digits": (
        "one weight has the wrong sign", "the layer norm has another epsilon", "the residual around the MLP skips the attention",
        "queries and keys are exchanged", "sines come before cosines", "labels are off by one", "a bias is dropped",
    ),
    "sana-digits": (
        "keys are not rectified", "the linear attention is not normalised", "keys and values of the caption are exchanged",
        "a convolution is padded on one side", "a gated unit's halves are exchanged", "the RMS norm has another epsilon",
        "the table of scales and shifts is turned round",
    ),
    "diffussm-digits": (
        "the scan's output is one step late", "the step has no softplus", "B and C are exchanged",
        "the taps of the backward convolution are not turned round", "the two directions are subtracted",
        "the hourglass's skip is dropped", "the norm at the end has another epsilon",
    ),
}  # fmt: skip
"""Faults whose edits apply to a model with trained weights too: it has the names of the tiny one, and more blocks.

Of sana-tiny's, GELU's erf form in the caption's embedder is none here: on what the trained embedder computes both forms are 3.4e-7 apart,
which is what float32 rounds by.
"""


@pytest.mark.matrix
@pytest.mark.parametrize("model", ["dit-digits", *(pytest.param(name, marks=pytest.mark.full) for name in SOME if name != "dit-digits")])
def test_bisect_names_the_right_module_of_trained_models(exported, model):
    _, graph, reference, cases = exported(model, "fp32")
    assert bisected(graph, reference, cases, "fp32") is None
    faults = {fault.name: fault for fault in FAULTS}
    named = {}
    for name in SOME[model]:
        found = bisected(faults[name].inject(graph), reference, cases, "fp32")
        named[name] = found and found.row.module
    assert named == {name: faults[name].module for name in SOME[model]}


def test_the_stages_of_a_quantised_bundle_in_their_order(exported):
    folder, *_ = exported("dit-tiny", "fp8")
    result = isthmus.bisect(folder, cases=["example"])
    assert [(stage.name, stage.precision) for stage in result.stages] == [
        ("torch-dtype", "fp16"),
        ("onnx", "fp16"),
        ("quantized", "fp8"),
        ("device", "fp8"),
    ]
    assert result.culprit is None
    assert result.exit_code == 0
    *run, device = result.stages
    assert all(len(stage.rows) == 42 and all(row.visible for row in stage.rows) for stage in run)
    assert "engine.plan is not built" in device.reason
    assert not device.rows
    # Quantisation is in the layers that were quantised, and nowhere else.
    since = result.summary()["arisen"]
    assert since["blocks.0.attn.qkv"] == since["blocks.1.mlp.fc2"] == "quantized"
    assert since["blocks.0.norm1"] != "quantized"
    assert since["final_layer.linear"] != "quantized"
