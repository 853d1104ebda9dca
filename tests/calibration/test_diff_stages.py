"""The stages that a program goes through: their values, what quantisation is taken out of, and where an error arose."""

import tracemalloc

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from isthmus.calibration.bisect import Form, StageDiff, arisen, culprit, examine
from isthmus.calibration.diff import Reference, diff
from isthmus.calibration.onnx_values import OnnxValues
from isthmus.calibration.rounded_values import RoundedValues
from isthmus.calibration.row import Figures, Row
from isthmus.calibration.trajectory import against_timestep, sampled_calls
from isthmus.calibration.unquantised import RemoveQuantisation, dequantised
from isthmus.exporter.errors import IsthmusError, MachineError
from isthmus.exporter.flow import RunnerValues
from isthmus.exporter.runner import Runner
from isthmus.exporter.trace import trace


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 8), nn.GELU()

    def forward(self, x):
        return self.act(self.linear(x)) * 2


@pytest.fixture
def net():
    torch.manual_seed(0)
    module = Net().eval()
    return Reference(module, {"x": torch.randn(3, 4)})


def graph(text, **weights):
    """A model from ONNX's text syntax; nodes named `MODULE__NAME` belong to that module."""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    model = ir.from_proto(proto)
    for node in model.graph:
        module, _, name = (node.name or "").rpartition("__")
        node.name = name
        node.metadata_props["isthmus.module"] = module
    return model


# Values of ONNX graphs


def test_values_are_taken_out_a_few_at_a_time_and_the_graph_stays_as_it_was():
    model = graph("""
        <ir_version: 10, opset_import: ["" : 20]>
        f (float[2, n] x) => (float[2, n] y) { a = Neg (x) b = Abs (a) y = Sqrt (b) }
    """)
    x = np.array([[1.0, -4.0, 9.0], [0.0, 1.0, 4.0]], np.float32)
    with OnnxValues(model) as values:
        assert values.shapes({"x": x}, ["a", "x", "nothing"]) == {"a": (2, 3), "x": (2, 3)}
        found = values.read({"x": x}, ["b", "x", "y"])
        assert list(values.read({"x": x}, ["a"])) == ["a"]
    np.testing.assert_array_equal(found["b"], np.abs(x))
    np.testing.assert_array_equal(found["x"], x)
    np.testing.assert_allclose(found["y"], np.sqrt(np.abs(x)))
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_types_that_numpy_lacks_come_as_float32():
    model = graph("""
        <ir_version: 10, opset_import: ["" : 21]>
        f (float[3] x) => (float[3] y) <float s = {0.5}> {
            h = Cast <to = 16> (x)
            q = QuantizeLinear <output_dtype = 17> (x, s)
            d = DequantizeLinear (q, s)
            i = Cast <to = 1> (h)
            y = Add (d, i)
        }
    """)
    x = np.array([1.01, -3.3, 200.0], np.float32)
    with OnnxValues(model) as values:
        found = values.read({"x": x}, ["h", "q"])
    np.testing.assert_array_equal(found["h"], x.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(found["q"], (x / 0.5).astype(ml_dtypes.float8_e4m3fn).astype(np.float32))


def test_large_weights_stay_in_a_file(tmp_path):
    weight = np.random.default_rng(0).standard_normal((512, 640)).astype(np.float32)  # 1.25 MiB
    model = graph(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        f (float[1, 512] x) => (float[1, 640] y) { y = MatMul (x, w) }
        """,
        w=weight,
    )
    x = np.ones((1, 512), np.float32)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    for source in (model, tmp_path / "model.onnx"):
        with OnnxValues(source) as values:
            assert all(isinstance(v.const_value, ir.ExternalTensor) for v in values._model.graph.initializers.values())
            np.testing.assert_allclose(values.read({"x": x}, ["y"])["y"], x @ weight, rtol=1e-4, atol=1e-4)


def test_a_graph_that_fails_says_where():
    model = graph("""
        <ir_version: 10, opset_import: ["" : 20]>
        f (float[2] x, int64[1] s) => (float[m] y) { y = Reshape (x, s) }
    """)
    with OnnxValues(model) as values, pytest.raises(IsthmusError, match=r"ONNX Runtime failed on the graph: .*Reshape"):
        values.read({"x": np.zeros(2, np.float32), "s": np.array([3])}, ["y"])


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no")
    with pytest.raises(IsthmusError, match="cannot be read as ONNX"):
        OnnxValues(tmp_path / "model.onnx")


# Quantisation taken out


QUANTISED = """
    <ir_version: 10, opset_import: ["" : 21]>
    f (float[3, 4] x) => (float[3, 8] y) <float s = {0.05}> {
        [linear__q] q = QuantizeLinear <output_dtype = 3> (x, s)
        [linear__d] d = DequantizeLinear (q, s)
        [linear__v] v = DequantizeLinear <axis = 1> (w, ws)
        [linear__m] y = MatMul (d, v)
    }
"""


def quantised(reference, scale=1.0):
    weight = reference.module.linear.weight.detach().numpy().T
    scales = (np.abs(weight).max(0) / 127).astype(np.float32)
    return graph(QUANTISED, w=np.round(weight / scales).astype(np.int8), ws=scales * np.float32(scale)), weight


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["right scale", "wrong scale"])
def test_a_quantised_layer_gets_its_parameter_back(net, scale):
    model, weight = quantised(net, scale)
    remove = RemoveQuantisation(dict(net.module.named_parameters()))
    remove(model)
    (node,) = model.graph
    assert node.op_type == "MatMul"
    assert remove.kept == []
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    with OnnxValues(model) as values:
        np.testing.assert_allclose(values.read({"x": x}, ["y"])["y"], x @ weight, rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_near_to_no_parameter_stays_quantised(net):
    model, _ = quantised(net)
    other = {"linear.weight": torch.randn(8, 4, generator=torch.Generator().manual_seed(3))}
    remove = RemoveQuantisation(other)
    remove(model)
    assert remove.kept == ["v"]
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "MatMul"]


@pytest.mark.parametrize(
    ("attributes", "scale_shape", "with_zero"),
    [("", (), True), ("axis = 0", (6,), True), ("axis = -1", (8,), False), ("axis = 1, block_size = 4", (6, 2), True)],
    ids=["tensor", "axis 0", "last axis", "blocks"],
)
def test_dequantised_is_what_onnx_says(attributes, scale_shape, with_zero):
    rng = np.random.default_rng(0)
    arrays = {"q": rng.integers(-128, 127, (6, 8), np.int8), "s": rng.uniform(0.1, 1, scale_shape).astype(np.float32)}
    if with_zero:
        arrays["z"] = rng.integers(-5, 5, scale_shape).astype(np.int8)
    names = ", ".join(arrays)
    model = onnx.parser.parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 21]>
        f () => (float[6, 8] y) {{ y = DequantizeLinear <{attributes}> ({names}) }}
    """.replace(" <>", "")
    )
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    (expected,) = ReferenceEvaluator(model).run(None, {})
    (node,) = ir.from_proto(model).graph
    np.testing.assert_allclose(dequantised(node), expected, rtol=1e-6)


# PyTorch, rounded


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)], ids=["fp16", "bf16"])
def test_a_rounded_program_loses_what_the_dtype_costs(net, dtype, bound):
    program = trace(net.module, net.example)
    values = RoundedValues(program, net.example, dtype)
    rows = {row.module: row for row in diff(net, values, {"x": net.example["x"].numpy()}, threshold=bound)}
    linear = net.module.linear
    rounded = nn.functional.linear(net.example["x"].to(dtype).float(), linear.weight.to(dtype).float(), linear.bias.to(dtype).float())
    rounded = rounded.detach().to(dtype).float()
    exact = linear(net.example["x"]).detach()
    assert rows["linear"].injected.relative_l2 == pytest.approx(float((rounded - exact).norm() / exact.norm()), rel=1e-3)
    assert 0 < rows["act"].error < bound
    assert any("linear" in node for node in rows["linear"].nodes)


def test_a_rounded_program_refuses_other_sizes(net):
    values = RoundedValues(trace(net.module, net.example), net.example, torch.float16)
    with pytest.raises(IsthmusError, match="does not take these inputs"):
        values.read({"x": np.zeros((5, 4), np.float32)}, ["linear"])


# Stages


class Fixed(Runner):
    device = "a device"

    def __init__(self, module):
        self.module, self.closed = module, False

    def run(self, inputs):
        return {"y": self.module(torch.from_numpy(inputs["x"])).detach().numpy() * np.float32(1.5)}

    def close(self):
        self.closed = True


def test_what_gives_its_outputs_only_is_compared_at_the_outputs(net):
    runner = Fixed(net.module)
    form = Form("plan", "fp16", lambda: RunnerValues(runner, ["x"], ["y"]))
    found = examine(net, form, {"example": {"x": net.example["x"].numpy()}})
    rows = {row.module: row for row in found.rows}
    assert rows[""].total.relative_l2 == pytest.approx(0.5, rel=1e-5)
    assert rows["linear"].reason == rows["act"].reason == "not run: a device gives the model's outputs only"
    assert not rows["linear"].visible
    assert [row.module for row in found.over] == [""]
    assert runner.closed


def test_a_stage_that_this_machine_lacks_is_not_run(net):
    def missing():
        raise MachineError("there is no such device here")

    cases = {"example": {"x": net.example["x"].numpy()}}
    assert examine(net, Form("device", "fp16", missing), cases).reason == "there is no such device here"
    assert examine(net, Form("device", "fp16", None, "no GPU"), cases).value()["reason"] == "no GPU"


def row(module, error, order=0):
    return Row(module, "Linear", order, injected=Figures(error, 0.0, error))


def test_an_error_is_put_down_to_the_stage_that_it_arose_in():
    stages = [
        StageDiff("torch-dtype", "fp16", 2e-3, (row("a", 4e-4), row("b", 4e-4), row("c", 5e-3))),
        StageDiff("onnx", "fp16", 2e-3, (row("a", 5e-4), row("b", 0.2), row("c", 5e-3))),
        StageDiff("quantized", "fp8", 0.1, (row("a", 0.03), row("b", 0.2), row("c", 6e-3))),
        StageDiff("device", "fp8", 0.1, reason="no GPU"),
    ]
    assert arisen(stages) == {"a": "quantized", "b": "onnx", "c": "torch-dtype"}
    found = culprit(stages)
    assert (found.stage.name, found.row.module) == ("torch-dtype", "c")
    assert culprit(stages[1:]).row.module == "b"
    assert culprit(stages[3:]) is None


# Trajectories


def test_errors_against_the_timestep():
    class Timed(nn.Module):
        def forward(self, x, t):
            return x * t[:, None]

    reference = Reference(Timed(), {"x": torch.zeros(2, 3), "t": torch.zeros(2)})
    model = graph("""
        <ir_version: 10, opset_import: ["" : 20]>
        f (float[2, 3] x, float[2] t) => (float[2, 3] y) <int64[1] one = {1}, float h = {0.01}> {
            u = Unsqueeze (t, one)
            v = Add (u, h)
            y = Mul (x, v)
        }
    """)

    def sampler(step, rng):
        x = rng.standard_normal((2, 3), dtype=np.float32)
        for time in np.arange(9, -1, -1):
            step({"x": x, "t": np.full(2, time + 1, np.float32)})

    calls = sampled_calls(sampler, lambda inputs: inputs, seed=0, count=4)
    with OnnxValues(model) as values:
        rows = against_timestep(reference, values, calls, "t", threshold=1e-5)
    assert [row["timestep"] for row in rows] == [10.0, 7.0, 4.0, 1.0]
    for row in rows:
        assert row["module"] == ""
        assert row["total"] == pytest.approx(0.01 / row["timestep"], rel=1e-3)
        assert row["injected"] == row["total"]
        assert row["inherited"] == 0


@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "depends-on-the-model"])
def test_the_calls_that_are_chosen_are_what_the_model_saw_then(adaptive):
    def run(inputs):
        return {"y": inputs["x"] + 1}

    def sampler(step, rng):
        x, calls = rng.standard_normal((2, 3)).astype(np.float32), 0
        while calls < 10 or (adaptive and calls < 17 and float(x.max()) > 8):
            x[:] = step({"x": x, "t": np.full(2, calls, np.float32)})["y"]  # one buffer for all calls
            calls += 1

    calls = sampled_calls(sampler, run, seed=0, count=4)
    assert [int(inputs["t"][0]) for inputs in calls] == ([0, 5, 11, 16] if adaptive else [0, 3, 6, 9])
    assert [float((inputs["x"] - calls[0]["x"]).mean()) for inputs in calls] == pytest.approx([inputs["t"][0] for inputs in calls])


def test_fewer_calls_than_asked_for_are_all_of_them():
    def sampler(step, rng):
        for time in range(3):
            step({"x": np.full(1, time)})

    assert [int(call["x"][0]) for call in sampled_calls(sampler, lambda inputs: inputs, seed=0, count=8)] == [0, 1, 2]


def test_only_the_calls_that_are_chosen_are_held():
    def sampler(step, rng):
        x = rng.standard_normal(2**18).astype(np.float32)
        for _ in range(40):
            x = step({"x": x})["y"]

    tracemalloc.start()
    try:
        calls = sampled_calls(sampler, lambda inputs: {"y": inputs["x"] + 1}, seed=0, count=4)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(calls) == 4
    assert peak < 12 * calls[0]["x"].nbytes, "of 40 calls"
