"""`isthmus calibrate`: a table without an export, the same for the same seed, and what the command line refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import isthmus
from isthmus import calibrating
from isthmus.calibrating import operands
from isthmus.exporter import onnx as onnx_files
from isthmus.exporter.errors import UnknownNameError, UnsupportedError, UsageError
from isthmus.exporter.passes import optimise
from isthmus.exporter.passes.fp8_layers import select
from isthmus.exporter.passes.layer_values import layer_values
from isthmus.exporter.passes.quantize_int8 import choose
from isthmus.exporter.ranges import read_table
from isthmus.exporter.spec import MODELS
from isthmus.exporter.trace import trace


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net(), (torch.randn(4, 16),)


def test_a_table_is_written_and_two_runs_give_the_same_bytes(model, tmp_path):
    a, b = (isthmus.calibrate(model, tmp_path / name, calibration_data="random", calibration_method="mse", seed=5) for name in "ab")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_table(a.path) == a.table == b.table
    # What both read, and what both compute: the first behind its Relu is what the second reads.
    assert [seen.module for seen in a.table.values.values()] == ["up", "down", "up", "down"]
    hidden = list(a.table.values.values())[1]
    assert hidden.min == 0 < hidden.max
    assert set(hidden.ranges) == {"e4m3", "uint8", "int8"}
    assert (a.table.model, a.table.method, a.table.seed, a.table.data.source) == ("module", "mse", 5, "random")
    assert a.warnings
    assert a.summary()["values"] == 4
    other = isthmus.calibrate(model, tmp_path / "c", calibration_data="random", seed=6)
    assert other.table.data.sha256 != a.table.data.sha256
    assert not list(tmp_path.glob(".*"))


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.out(x + self.embed(y))


def test_a_label_that_the_model_does_not_know_is_found_before_it_is_translated(tmp_path, monkeypatch):
    labels = {f"{i}/y": np.full(2, label) for i, label in enumerate((0, 3, 99, 10))}
    np.savez(tmp_path / "data.npz", **labels, **{f"{i}/x": np.ones((2, 16), np.float32) for i in range(4)})
    monkeypatch.setattr(calibrating, "trace", lambda *_, **__: pytest.fail("it was traced"))
    model = (Labelled().eval(), (torch.ones(2, 16), torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(UsageError, match="the model fails on inputs of") as caught:
        isthmus.calibrate(model, tmp_path / "t", calibration_data=str(tmp_path / "data.npz"))
    (reason,) = caught.value.reasons
    assert reason.where == "data.npz, 2"
    assert "IndexError: index out of range" in reason.what
    assert "y from 99 to 99" in reason.what
    assert caught.value.hint


def test_the_manifest_holds_what_the_data_was_made_with(tmp_path):
    for i in range(3):
        Image.fromarray(np.full((2, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    net = nn.Sequential(nn.Flatten(2), nn.Linear(16, 4)).eval()
    asked = {"calibration_data": str(tmp_path), "calibration_size": 2, "calibration_preprocess": "mean=0.5,std=0.5"}
    found = isthmus.export((net, (torch.ones(1, 3, 2, 8),)), "onnxruntime", precision="int8", dry_run=True, **asked)
    assert {name: found.manifest.options.get(name) for name in asked} == {**asked, "calibration_data": None}


def test_data_is_checked_before_anything_runs(model, tmp_path, monkeypatch):
    np.savez(tmp_path / "bad.npz", x=np.full((4, 16), np.nan, np.float32))
    monkeypatch.setattr(Net, "forward", lambda self, x: pytest.fail(f"{self} ran on {x}"))
    with pytest.raises(UsageError, match="holds NaN or Inf"):
        isthmus.calibrate(model, tmp_path / "t", calibration_data=str(tmp_path / "bad.npz"))
    with pytest.raises(UsageError, match="needs calibration data"):
        isthmus.calibrate(model, tmp_path / "t")
    with pytest.raises(UsageError, match="is for a folder of pictures"):
        isthmus.calibrate(model, tmp_path / "t", calibration_data="random", calibration_preprocess="input=x")
    with pytest.raises(UnknownNameError, match="calibration method 'best'"):
        isthmus.calibrate(model, tmp_path / "t", calibration_data="random", calibration_method="best")
    with pytest.raises(UnknownNameError, match="opset"):
        isthmus.calibrate(model, tmp_path / "t", opset=3)
    (tmp_path / "t").touch()
    with pytest.raises(UsageError, match="exists"):
        isthmus.calibrate(model, tmp_path / "t", calibration_data="random")


def test_a_model_without_products_has_nothing_to_calibrate(tmp_path):
    with pytest.raises(UnsupportedError, match="no matrix product of module"):
        isthmus.calibrate((nn.ReLU(), (torch.randn(3, 4),)), tmp_path / "t", calibration_data="random")
    assert not (tmp_path / "t").exists()


def test_everything_that_fp8_reads_is_observed():
    spec = MODELS["dit-tiny"].spec()
    torch.manual_seed(0)
    example = spec.inputs(np.random.Generator(np.random.PCG64(0)), spec.sizes)
    program = trace(spec.build(), example)
    graph = optimise(onnx_files.to_onnx(program, opset=23, input_names=list(example), output_names=list(spec.outputs)))
    assert set(select(graph, include=["*"]).observed()) <= set(operands(graph))


def test_everything_that_int8_and_core_ml_read_is_observed(tmp_path):
    """Convolutions and Core ML's layers store what they compute in 8 bits too."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Tanh(), nn.Conv2d(16, 16, 1)).eval()
    example = (torch.randn(2, 16, 8, 8),)
    table = isthmus.calibrate((module, example), tmp_path / "t", calibration_data="random").table
    graph = optimise(onnx_files.to_onnx(trace(module, {"x": example[0]}), opset=23, input_names=["x"], output_names=["y"]))
    for layer in layer_values(graph):
        assert {layer.product, layer.result} - {"y"} <= set(table.values)
    layers, _ = choose(select(graph, include=["*"]), graph)
    assert len(layers) == 2  # the last one's result is the model's
    assert {name for layer in layers for name in layer.observed} - {"x", "y"} <= set(table.values)


def test_the_command_prints_where_the_table_is(run, tmp_path):
    path = tmp_path / "calibration.json"
    call = ["calibrate", "dit-tiny", "-o", path, "--calibration-data", "random", "--calibration-size", "2", "--set", "depth=1"]
    result = run(*call)
    assert result.exit_code == 0, result.stderr
    assert f"{path}: " in result.stdout
    assert "warning: Calibrated on random inputs" in result.stdout
    assert run(*call).exit_code == 2
    again = run(*call, "--force", "--format", "json")
    assert again.exit_code == 0, again.stderr
    value = json.loads(again.stdout)
    assert (value["path"], value["method"], value["size"], value["exit_code"]) == (str(path), "max", 2, 0)
    assert read_table(path).timestep == ""


def test_all_that_is_wrong_with_a_call_is_told_at_once(run, tmp_path):
    result = run(
        "calibrate", "dit-tiny", "--opset", "9", "--calibration-data", "nowhere", "--calibration-method", "best", "--calibration-size", "0",
        "--calibration-preprocess", "size=3", "--set", "depth",
    )  # fmt: skip
    assert result.exit_code == 2
    for text in (
        "--opset: got 9", "nowhere does not exist", "got 'best', expected one of entropy, max, mse, percentile",
        "--calibration-size: got '0'", "--calibration-preprocess cannot be read", "--set: got 'depth'", "-o is missing",
    ):  # fmt: skip
        assert text in result.stderr.replace("\n", " "), text
