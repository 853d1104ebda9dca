"""INT4 weights for ONNX Runtime and TensorRT, the whole way: read in 4 bits, smaller on the disk, and near PyTorch."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from pydantic import ValidationError
from torch import nn

import isthmus
from isthmus.exporter.bundle import read_manifest
from isthmus.exporter.errors import UnsupportedError, UsageError
from isthmus.exporter.ranges import FILE, read_table
from isthmus.targets.onnxruntime import OnnxRuntimeOptions


class Net(nn.Module):
    """Inputs that vary together, as GPTQ wants them; a Gemm for two axes, and MatMul and Add for three."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(16, 64)
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 64)
        self.label = nn.Linear(64, 64)
        self.odd = nn.Linear(64, 20)
        self.odder = nn.Linear(20, 64)
        self.outside = nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inside(x)
        x = x + self.down(nn.functional.gelu(self.up(x))) + self.odder(self.odd(x))
        return self.outside(x + self.label(x.mean(1))[:, None])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(4, 8, 16),)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "samples.npz"
    rng = np.random.Generator(np.random.PCG64(1))
    np.savez(path, **{f"{i}/x": rng.standard_normal((4, 8, 16), dtype=np.float32) for i in range(16)})
    return path


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    return isthmus.export(model, "onnxruntime", tmp_path_factory.mktemp("int4") / "bundle", precision="int4").bundle


def sqnr(folder):
    (rows,) = [s.metrics for s in read_manifest(folder).stages if s.name == "quantized"]
    return min(row.sqnr_db for row in rows)


def test_it_is_verified_and_read_in_4_bits(bundle):
    manifest = read_manifest(bundle)
    assert {s.name: s.verdict for s in manifest.stages} == {"torch": "verified", "quantized": "verified"}
    assert manifest.tolerance == {"min_psnr": 20.0}
    assert [layer["module"] for layer in manifest.details["int4"]["layers"]] == ["up", "down", "odd", "label"]
    assert {e["module"]: e["reason"] for e in manifest.details["int4"]["excluded"]} == {
        "inside": "first layer", "outside": "last layer", "odder": "20 input channels, no multiple of the block of 32",
    }  # fmt: skip
    assert manifest.details["int4_products"] == 4
    assert FILE not in manifest.files
    graph = onnx.load(bundle / "model.onnx").graph
    codes = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT4]
    assert sorted(list(t.dims) for t in codes) == [[64, 20], [64, 64], [64, 256], [256, 64]]
    assert all(len(t.raw_data) == np.prod(t.dims) / 2 for t in codes)
    assert isthmus.verify(bundle).verdict == "verified"
    assert "Layers whose weights stay in float32" in (bundle / "report.html").read_text()


def test_blocks_of_128_are_smaller_and_farther(model, bundle, tmp_path):
    options = {"int4_block": 128, "int4_include": ["down"], "int4_exclude": ["label"]}
    wide = isthmus.export(model, "onnxruntime", tmp_path / "b", precision="int4", options=options).bundle
    same = isthmus.export(model, "onnxruntime", tmp_path / "c", precision="int4", options={"int4_exclude": ["up", "odd", "label"]}).bundle
    assert [layer["module"] for layer in read_manifest(wide).details["int4"]["layers"]] == ["down"]
    assert [layer["module"] for layer in read_manifest(same).details["int4"]["layers"]] == ["down"]
    assert read_manifest(wide).details["weight_bytes"] < read_manifest(same).details["weight_bytes"]
    assert sqnr(wide) < sqnr(same)


def test_gptq_is_nearer_and_two_runs_give_the_same_files(model, data, bundle, tmp_path):
    given = {"precision": "int4", "weight_rounding": "gptq", "calibration_data": str(data)}
    a, b = (isthmus.export(model, "onnxruntime", tmp_path / name, **given).bundle for name in "ab")
    for name in (FILE, "model.onnx"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    manifest = read_manifest(a)
    assert {s.name: s.verdict for s in manifest.stages} == {"torch": "verified", "onnx": "verified", "quantized": "verified"}
    assert manifest.details["int4_products"] == 4
    assert manifest.options["weight_rounding"] == "gptq"
    assert not any(seen.ranges for seen in read_table(a / FILE).values.values())
    assert sqnr(a) > sqnr(bundle) + 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"calibration_data": "random"}, "only --weight-rounding gptq reads it"),
        ({"weight_rounding": "gptq"}, "needs calibration data"),
        ({"smooth": 0.5}, "has no ranges of activations"),
        ({"calibration_method": "mse", "weight_rounding": "gptq", "calibration_data": "random"}, "has no ranges of activations"),
        ({"options": {"int8_exclude": ["up"]}}, "are for --precision int8, not int4"),
        ({"options": {"int4_exclude": ["nowhere"]}}, "no module with a matrix product matches nowhere"),
    ],
)
def test_what_has_no_use_is_refused(model, tmp_path, given, words):
    with pytest.raises(UsageError) as caught:
        isthmus.export(model, "onnxruntime", tmp_path / "b", precision="int4", **given)
    assert words in str(caught.value)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["int8_include", "int8_exclude", "int4_include", "int4_exclude"])
def test_an_empty_pattern_is_refused(name):
    with pytest.raises(ValidationError, match="a pattern is empty"):
        OnnxRuntimeOptions.model_validate({name: ["up", ""]})


def test_an_opset_without_int4_is_refused(model, tmp_path):
    with pytest.raises(UnsupportedError, match="INT4 weights in blocks are of opset 21, got 20"):
        isthmus.export(model, "onnxruntime", tmp_path / "b", precision="int4", opset=20)


def test_tensorrt_gets_the_same_codes_with_half_precision_scales(model, bundle, tmp_path):
    folder = isthmus.export(model, "tensorrt", tmp_path / "b", precision="int4").bundle
    manifest = read_manifest(folder)
    assert {s.name: s.verdict for s in manifest.stages if s.name in ("torch-dtype", "quantized")} == {
        "torch-dtype": "verified", "quantized": "verified"
    }  # fmt: skip
    ours, theirs = ({t.name: t for t in onnx.load(f / "model.onnx").graph.initializer} for f in (bundle, folder))
    names = [name for name in ours if name.endswith(".int4")]
    assert len(names) == 4
    for name in names:
        assert ours[name].raw_data == theirs[name].raw_data
        scales = [onnx.numpy_helper.to_array(of[name.replace(".int4", ".scale")]) for of in (ours, theirs)]
        assert [s.dtype for s in scales] == [np.float32, np.float16]
        np.testing.assert_array_equal(*scales)


def test_tensorrt_rtx_refuses_gpus_that_do_not_read_int4(model, tmp_path):
    with pytest.raises(UnsupportedError, match=r"compute capability 7\.5 read no INT4 weights"):
        isthmus.export(model, "tensorrt-rtx", tmp_path / "b", precision="int4", options={"compute_capability": ["7.5"]})


def test_a_plan_keeps_its_weights_in_4_bits(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="not run: tensorrt-rtx is not installed (pip install 'isthmus[tensorrt-rtx]')")
    wide = nn.Sequential(nn.Linear(64, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 64)).eval()
    sizes = {}
    for precision in ("int4", "fp16"):
        given = {"precision": precision, "options": {"compute_capability": ["8.9"]}}
        folder = isthmus.export((wide, (torch.randn(4, 8, 64),)), "tensorrt-rtx", tmp_path / precision, **given).bundle
        sizes[precision] = read_manifest(folder).details["engine"]["bytes"]
    assert sizes["fp16"] - sizes["int4"] > 1024 * 1024  # two bytes a weight become a half; other kernels are of other sizes
