"""INT8 for ONNX Runtime, the whole way: its own graph has integer products, and they are near PyTorch."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import isthmus
from isthmus.exporter.bundle import read_manifest
from isthmus.exporter.errors import UsageError
from isthmus.exporter.ranges import FILE, read_table
from isthmus.targets.onnxruntime.integers import integer_products


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(16, 32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.outside = nn.Linear(32, 16)
        self.norm = nn.Parameter(torch.ones(32), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inside(x)
        x = x + self.down(nn.functional.gelu(self.up(nn.functional.layer_norm(x, (32,), self.norm))))
        return self.outside(x)


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
def bundle(model, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    return isthmus.export(model, "onnxruntime", folder, precision="int8", calibration_data=str(data)).bundle


def test_it_is_verified_and_computes_in_integers(bundle, data):
    manifest = read_manifest(bundle)
    assert {s.name: s.verdict for s in manifest.stages} == {"torch": "verified", "onnx": "verified", "quantized": "verified"}
    (rows,) = [s.metrics for s in manifest.stages if s.name == "quantized"]
    assert min(row.sqnr_db for row in rows) > 30
    assert [layer["module"] for layer in manifest.details["int8"]["layers"]] == ["up", "down"]
    assert {e["module"]: e["reason"] for e in manifest.details["int8"]["excluded"]} == {"inside": "first layer", "outside": "last layer"}
    assert manifest.details["integer_products"] == 2
    assert manifest.details["calibration"]["source"] == data.name
    assert manifest.details["calibration"]["sha256"] == read_table(bundle / FILE).data.sha256
    assert FILE in manifest.files
    operators = [node.op_type for node in onnx.load(bundle / "model.onnx").graph.node]
    assert operators.count("QuantizeLinear") == 2
    assert isthmus.verify(bundle).verdict == "verified"
    assert "Ranges of activations" in (bundle / "report.html").read_text()


def test_two_runs_give_the_same_files(model, data, bundle, tmp_path):
    again = isthmus.export(model, "onnxruntime", tmp_path / "again", precision="int8", calibration_data=str(data)).bundle
    for name in (FILE, "model.onnx"):
        assert (again / name).read_bytes() == (bundle / name).read_bytes()


@pytest.mark.parametrize("method", ["entropy", "mse", "percentile"])
def test_other_methods_change_the_ranges(model, data, bundle, tmp_path, method):
    """Layers are chosen by name here, and each method is near PyTorch as well."""
    options = {"int8_include": ["inside"], "int8_exclude": ["down"]}
    folder = isthmus.export(
        model, "onnxruntime", tmp_path / method, precision="int8", calibration_data=str(data), calibration_method=method, options=options
    ).bundle
    table, whole = read_table(folder / FILE), read_table(bundle / FILE)
    assert table.method == method
    assert [seen.module for seen in table.values.values()] == ["inside", "up"]
    (name,) = set(table.values) & set(whole.values)
    assert table.values[name].ranges != whole.values[name].ranges
    assert read_manifest(folder).details["integer_products"] == 2


def sqnr(bundle):
    (rows,) = [s.metrics for s in read_manifest(bundle).stages if s.name == "quantized"]
    return min(row.sqnr_db for row in rows)


def test_smoothing_and_rounding_bring_outlier_channels_nearer(model, data, tmp_path):
    """Two channels of the norm's output are 40 times as large as the others, and their weights as much smaller."""
    outliers, example = Net().eval(), model[1]
    outliers.load_state_dict(model[0].state_dict())
    outliers.norm = nn.Parameter(torch.where(torch.arange(32) % 16 == 3, 40.0, 1.0), requires_grad=False)
    with torch.no_grad():
        outliers.up.weight.div_(outliers.norm)
    found = {}
    for name, options in {"plain": {}, "gptq": {"weight_rounding": "gptq"}, "both": {"weight_rounding": "gptq", "smooth": 0.5}}.items():
        result = isthmus.export(
            (outliers, example), "onnxruntime", tmp_path / name, precision="int8", calibration_data=str(data), **options
        )
        found[name] = sqnr(result.bundle)
        assert read_manifest(result.bundle).details["integer_products"] == 2
    assert found["both"] > found["plain"] + 6
    assert found["both"] > found["gptq"]
    options = read_manifest(tmp_path / "both").options
    assert (options["weight_rounding"], options["smooth"]) == ("gptq", 0.5)
    again = isthmus.export(
        (outliers, example),
        "onnxruntime",
        tmp_path / "again",
        precision="int8",
        calibration_data=str(data),
        weight_rounding="gptq",
        smooth=0.5,
    )
    for name in (FILE, "model.onnx"):
        assert (again.bundle / name).read_bytes() == (tmp_path / "both" / name).read_bytes()


@pytest.mark.parametrize("given", [{"smooth": 2.0}, {"weight_rounding": "best"}])
def test_what_is_no_option_is_refused(model, data, tmp_path, given):
    with pytest.raises(UsageError):
        isthmus.export(model, "onnxruntime", tmp_path / "b", precision="int8", calibration_data=str(data), **given)
    with pytest.raises(UsageError, match="has no use"):
        isthmus.export(
            model,
            "onnxruntime",
            tmp_path / "b",
            precision="fp32",
            **({"smooth": 0.5} if "smooth" in given else {"weight_rounding": "gptq"}),
        )


def test_patterns_that_match_nothing_are_told(model, data, tmp_path):
    with pytest.raises(UsageError, match=r"no module with a matrix product matches nowhere\.\*"):
        isthmus.export(
            model, "onnxruntime", tmp_path / "b", precision="int8", calibration_data=str(data), options={"int8_exclude": ["nowhere.*"]}
        )
    with pytest.raises(UsageError, match="needs calibration data"):
        isthmus.export(model, "onnxruntime", tmp_path / "b", precision="int8")
    with pytest.raises(UsageError, match="has no use for all of these"):
        isthmus.export(model, "onnxruntime", tmp_path / "b", precision="fp16", calibration_data=str(data))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.GroupNorm(4, 32)
        self.first = nn.Conv2d(32, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.each = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.down = nn.Conv2d(32, 48, 1, stride=2, bias=False)
        self.outside = nn.Conv2d(48, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inside(x)
        x = x + self.second(torch.relu(self.first(nn.functional.silu(self.norm(x)))))
        return self.outside(torch.sigmoid(self.down(self.each(x))))


def test_convolutions_compute_in_integers(tmp_path):
    torch.manual_seed(0)
    rng = np.random.Generator(np.random.PCG64(1))
    np.savez(tmp_path / "data.npz", **{f"{i}/x": rng.standard_normal((2, 3, 12, 12), dtype=np.float32) for i in range(8)})
    result = isthmus.export(
        (Convolutions().eval(), (torch.randn(2, 3, 12, 12),)), "onnxruntime", tmp_path / "b", precision="int8",
        calibration_data=str(tmp_path / "data.npz"),
    )  # fmt: skip
    details = result.manifest.details
    assert result.manifest.verdict == "verified"
    assert [layer["module"] for layer in details["int8"]["layers"]] == ["first", "second", "down"]
    assert details["integer_products"] == 3
    assert {e["module"]: e["reason"] for e in details["int8"]["excluded"]} == {
        "inside": "3 input channels, not a multiple of 16",
        "each": "a convolution of 32 groups",
        "outside": "3 output channels, not a multiple of 16",
    }
    assert sqnr(result.bundle) > 30


def test_large_files_are_not_written_again_to_be_counted(bundle):
    assert integer_products(bundle / "model.onnx", weight_bytes=2**31) is None
