"""One calibration table for ONNX Runtime and Core ML: the same file gives both their ranges, and layers are found by their modules."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import isthmus
from isthmus.exporter import onnx as onnx_files
from isthmus.exporter.bundle import read_manifest
from isthmus.exporter.errors import IsthmusError, UsageError
from isthmus.exporter.grids import GRIDS
from isthmus.exporter.passes import optimise
from isthmus.exporter.passes.layer_values import layer_values
from isthmus.exporter.ranges import FILE, CalibrationTable, read_table
from isthmus.exporter.spec import Dynamic, SizeRange
from isthmus.exporter.trace import trace
from isthmus.targets.coreml.convert import converted
from isthmus.targets.coreml.interpreter import load
from isthmus.targets.coreml.lower import operations
from isthmus.targets.coreml.modules import KEY, read_modules
from isthmus.targets.coreml.ranges import calibration_of, layer_operations, result_of, source_of


class Net(nn.Module):
    """A layer of each kind; one that is called twice, two of one module, and one with a function that is computed with it."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(16, 64)
        self.gate = nn.Linear(64, 64)
        self.twice = nn.Linear(64, 64)
        self.conv = nn.Conv2d(64, 64, 3, padding=1)
        self.first = nn.Parameter(torch.randn(64, 64) / 8)
        self.second = nn.Parameter(torch.randn(64, 64) / 8)
        self.outside = nn.Linear(64, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inside(x)
        x = x + 3 * torch.relu(self.gate(x))
        x = self.twice(nn.functional.gelu(self.twice(x) * 5))
        x = self.conv(x.mT.unflatten(2, (4, 4))).flatten(2).mT
        x = x + (x @ self.first).sin() @ self.second
        return self.outside(x)


class Named(nn.Module):
    """Its input is called x."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(x)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(2, 16, 16),)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "samples.npz"
    rng = np.random.Generator(np.random.PCG64(1))
    np.savez(path, **{f"{i}/x": rng.standard_normal((2, 16, 16), dtype=np.float32) for i in range(6)})
    return path


@pytest.fixture(scope="module")
def table(model, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "table.json"
    isthmus.calibrate(model, path, calibration_data=str(data), calibration_method="mse")
    return path


def pairs(folder):
    """By the name of a value of the package, the scale of its `quantize` operation."""
    found = [op for op in operations(load(folder / "model.mlpackage")) if op.op_type == "quantize"]
    return {re.sub("_quantized$|_int8$", "", op.name): op.scale.val for op in found}


def sqnr(folder, stage):
    (rows,) = [s.metrics for s in read_manifest(folder).stages if s.name == stage]
    return min(row.sqnr_db for row in rows)


def test_one_table_gives_onnx_runtime_and_core_ml_their_scales(model, table, tmp_path):
    seen = read_table(table)
    both = {
        (target, precision): isthmus.export(model, target, tmp_path / target, precision=precision, calibration_table=table).bundle
        for target, precision in (("onnxruntime", "int8"), ("coreml", "w8a8"))
    }
    for folder in both.values():
        assert (folder / FILE).read_bytes() == table.read_bytes()
        assert FILE in read_manifest(folder).files
        assert read_manifest(folder).details["calibration"]["method"] == "mse"
    package, file = both["coreml", "w8a8"], both["onnxruntime", "int8"]
    assert {s.name: s.verdict for s in read_manifest(package).stages}["mil"] == "verified"
    assert sqnr(package, "mil") > 28

    # Core ML: every layer but the one that is too small, on both sides, on the scales of the table.
    done = {entry["name"]: entry for entry in read_manifest(package).details["compression"] if "value" in entry}
    scales = pairs(package)
    assert set(scales) == set(done)
    for name, entry in done.items():
        bounds = seen.values[entry["value"]].ranges["int8"]
        assert entry["range"] == [bounds.low, bounds.high]
        assert scales[name] == np.float16(bounds.high / 127), name
    narrow = [op for op in operations(load(package / "model.mlpackage")) if op.op_type in ("linear", "conv") and op.x.op is not None]
    assert sum(op.x.op.op_type == "dequantize" for op in narrow) >= 5

    # ONNX Runtime: the same values of the same table, on a grid without sign.
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(file / "model.onnx").graph.initializer}
    shared = {name.removesuffix(".zero_point") for name in stored if name.endswith(".zero_point")}
    assert len(shared) >= 4
    for name in shared:
        bounds = seen.values[name].ranges["uint8"]
        assert stored[f"{name}.scale"] == np.float32((bounds.high - bounds.low) / 255)
    assert len(shared & {entry["value"] for entry in done.values()}) >= 4


def test_every_layer_is_found_by_its_module(model):
    """The values have the numbers that PyTorch computes: those of the table are read off the ONNX graph, those here off the package."""
    from isthmus.targets.coreml.interpreter import observe

    program = trace(model[0], {"x": model[1][0]})
    graph = optimise(onnx_files.to_onnx(program, opset=23, input_names=["x"], output_names=["y"]))
    layers = layer_values(graph)
    names = list(dict.fromkeys(name for layer in layers for name in (layer.operand, layer.result)))
    result = converted(program, "fp32")
    package = load(result.model)
    modules = read_modules({KEY: result.modules})
    # What the package computes stands for what the table says: the ranges must be those of the values in the ONNX graph.
    from isthmus.calibration.observe import Observer

    observer = Observer(graph, names)
    peaks = {name: float(np.abs(array).max()) for _, name, array in observer.stream([{"x": model[1][0].numpy()}])}
    table = CalibrationTable.of_ranges(peaks, grid="int8")
    found = calibration_of(package, modules, layers, table)
    (given,) = package.functions["main"].inputs
    here = observe(package, [{given: model[1][0].numpy()}])
    found_layers = list(layer_operations(package))
    assert len(found_layers) == len(layers) == 8
    assert not found.reasons
    for layer in found_layers:
        for value in (source_of(layer), result_of(layer)):
            assert found.ranges[value.name].amax == pytest.approx(here[value.name].peak, rel=1e-4), value.name
    gate = next(layer for layer in layers if layer.module == "gate")
    assert gate.activation == "Relu"
    assert gate.result != gate.product


def test_a_module_with_other_layers_than_the_graph_is_left(model):
    program = trace(model[0], {"x": model[1][0]})
    graph = optimise(onnx_files.to_onnx(program, opset=23, input_names=["x"], output_names=["y"]))
    layers = tuple(layer for layer in layer_values(graph) if layer.weight != "first")
    table = CalibrationTable.of_ranges({name: 1.0 for layer in layers for name in (layer.operand, layer.result)}, grid="int8")
    result = converted(program, "fp16")
    package = load(result.model)
    found = calibration_of(package, read_modules({KEY: result.modules}), layers, table)
    whole = "the model has 2 layers in this program and 1 in the graph that was calibrated"
    assert set(found.reasons.values()) == {whole}
    assert len(found.ranges) >= 8


def test_gptq_is_nearer_and_its_codes_are_in_the_package(data, tmp_path):
    """Inputs that vary together, for which GPTQ is made, and a large weight a row, so that it is the weights that lose most."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 128), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 64)).eval()
    with torch.no_grad():
        module[0].weight[0] /= 10
        module[1].weight[:, 0] *= 10
    given = {"precision": "w8a8", "calibration_data": str(data), "inputs": {"x": torch.randn(2, 16, 16)}}
    folders = {
        name: isthmus.export(Named(module), "coreml", tmp_path / name, **given, **options).bundle
        for name, options in {"nearest": {}, "gptq": {"weight_rounding": "gptq"}, "old": {
            "weight_rounding": "gptq", "options": {"minimum_deployment_target": "iOS17"}}}.items()
    }  # fmt: skip
    hows = {entry.get("how") for entry in read_manifest(folders["gptq"]).details["compression"]}
    assert "a scale for each output channel, rounded by GPTQ" in hows
    stored = {
        name: [op for op in operations(load(folder / "model.mlpackage")) if op.op_type.startswith("constexpr")]
        for name, folder in folders.items()
    }
    assert [len(found) for found in stored.values()] == [3, 3, 3]
    assert {op.op_type for op in stored["gptq"]} == {"constexpr_blockwise_shift_scale"}
    assert {op.op_type for op in stored["old"]} == {"constexpr_affine_dequantize"}
    assert all(np.abs(op.data.val).max() <= GRIDS["int8"].high for op in stored["gptq"])
    assert sqnr(folders["old"], "mil") == pytest.approx(sqnr(folders["gptq"], "mil"), abs=0.5)
    assert any(not np.array_equal(a.data.val, b.data.val) for a, b in zip(stored["nearest"], stored["gptq"], strict=True))
    assert sqnr(folders["gptq"], "mil") > sqnr(folders["nearest"], "mil") + 0.5  # 29.8 and 28.6 dB
    assert {s.name: s.verdict for s in read_manifest(folders["gptq"]).stages}["mil"] == "verified"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"calibration_data": "random"}, "ranges that are chosen already"),
        ({"calibration_method": "mse"}, "ranges that are chosen already"),
        ({"weight_rounding": "gptq"}, "it needs the inputs"),
        ({"target": "onnxruntime", "precision": "int8", "smooth": 0.5}, "it needs the inputs"),
        ({"target": "onnxruntime", "precision": "fp32"}, "is not calibrated"),
    ],
)
def test_what_a_table_cannot_give_is_refused(model, table, tmp_path, options, words):
    given = {"target": "coreml", "precision": "w8a8", **options}
    with pytest.raises(UsageError) as caught:
        isthmus.export(model, given.pop("target"), tmp_path / "b", calibration_table=table, **given)
    assert words in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_a_table_of_another_model_is_refused(model, table, tmp_path):
    other = Net().eval()
    with pytest.raises(UsageError, match="was observed on other weights"):
        isthmus.export((other, model[1]), "coreml", tmp_path / "b", precision="w8a8", calibration_table=table)
    broken = read_table(table).model_copy(update={"values": dict(list(read_table(table).values.items())[:3])})
    (tmp_path / "few.json").write_text(broken.json_text())
    with pytest.raises(IsthmusError, match="the calibration table is of another model"):
        isthmus.export(model, "coreml", tmp_path / "b", precision="w8a8", calibration_table=tmp_path / "few.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(IsthmusError, match="is no calibration table"):
        isthmus.export(model, "coreml", tmp_path / "b", precision="w8a8", calibration_table=tmp_path / "bad.json")


class Step(nn.Module):
    """One step of a recurrent model: its state comes in and goes out."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.keep, self.tell = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = 0.9 * h + torch.tanh(self.read(x) + self.keep(h))
        return self.tell(h), h


@pytest.mark.parametrize("options", [{"states": ("h",)}, {"shapes": "functions"}])
def test_states_and_functions_have_the_ranges_of_the_table(options, tmp_path):
    torch.manual_seed(0)
    rng = np.random.Generator(np.random.PCG64(0))
    step = "states" in options
    module = Step() if step else Named(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)))
    inputs = {"x": torch.randn(2, 64), **({"h": torch.zeros(2, 64)} if step else {})}
    np.savez(tmp_path / "data.npz", **{f"{i}/{name}": rng.standard_normal((2, 64), dtype=np.float32) for i in range(8) for name in inputs})
    result = isthmus.export(
        module.eval(), "coreml", tmp_path / "b", precision="w8a8", calibration_data=str(tmp_path / "data.npz"), options=options,
        inputs=inputs, dynamic=[] if step else [Dynamic("x", 0, SizeRange(1, 2, 4))],
    )  # fmt: skip
    (stage,) = (s for s in result.manifest.stages if s.name == "mil")
    assert stage.verdict == "verified", stage.reason
    programs = load(result.bundle / "model.mlpackage").functions
    assert len(programs) == (1 if step else 3)
    scales = [[float(op.scale.val) for op in function.operations if op.op_type == "quantize"] for function in programs.values()]
    assert len(scales[0]) >= 3
    assert all(sorted(found) == sorted(scales[0]) for found in scales)
    table = read_table(result.bundle / FILE)
    known = {float(np.float16(seen.ranges["int8"].high / 127)) for seen in table.values.values()}
    assert set(scales[0]) <= known
