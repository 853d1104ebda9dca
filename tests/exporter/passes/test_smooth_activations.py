"""SmoothActivations: the graph before and after, and that it computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from isthmus.exporter import onnx as onnx_files
from isthmus.exporter.passes import optimise
from isthmus.exporter.passes.infer_shapes import InferShapes
from isthmus.exporter.passes.smooth_activations import SmoothActivations
from isthmus.exporter.spec import MODELS
from isthmus.exporter.trace import trace


def model_of(text, weights):
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 23]> {text}')
    for name, array in weights.items():
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
        model.graph.register_initializer(value)
    InferShapes()(model)
    return model


def normal(*shape, seed=0):
    return np.random.Generator(np.random.PCG64([seed, *shape])).standard_normal(shape).astype(np.float32)


def run(model, inputs, names):
    copy = model.clone()
    values = {v.name: v for node in copy.graph for v in node.outputs}
    copy.graph.outputs.extend(values[name] for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(copy)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def assert_same(got, expected):
    """Up to rounding in float32: 16 ulp of the largest number, over sums of some 30 to 100 terms."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=16 * 2.0**-23 * np.abs(expected).max())


def smoothed(model, inputs, names, **options):
    """Runs the pass on what the model does to these inputs; checks that outputs are the same and activations are divided. Gives the pass."""
    before = run(model, inputs, names)
    count = len(before) - len(names)
    peaks = {name: np.abs(array).reshape(-1, array.shape[-1]).max(axis=0) for name, array in zip(names, before[count:], strict=True)}
    smooth = SmoothActivations(peaks, **options)
    assert smooth(model).modified == bool(smooth.smoothed)
    after = run(model, inputs, names)
    for got, expected in zip(after[:count], before[:count], strict=True):
        assert_same(got, expected)
    for name, got, expected in zip(names, after[count:], before[count:], strict=True):
        assert_same(got * smooth.smoothed.get(name, np.ones(1)), expected)
    return smooth


NORM = """f (float[b, 4, 16] h) => (float[b, 4, 32] y, float[b, 4, 8] z) {
    n = LayerNormalization <axis = -1> (h, g, b0)  y = MatMul (n, w)  z = Gemm3 (n) }"""
MODULATED = """f (float[b, 4, 16] h, float[b, 8] c) => (float[b, 4, 32] y, float[b, 16] other) {
    m = Gemm <transB = 1> (c, w_mod, b_mod)  shift, gain, other = Split <axis = 1, num_outputs = 3> (m)
    n = LayerNormalization <axis = -1> (h, g)  gain3 = Unsqueeze (gain, one)  gain1 = Add (gain3, unit)  s = Mul (n, gain1)
    shift3 = Unsqueeze (shift, one)  x = Add (s, shift3)  y = MatMul (x, w) }"""
AXIS = {"one": np.array([1]), "unit": np.float32(1)}
MODULATION = {"w_mod": normal(48, 8), "b_mod": normal(48), "g": np.ones(16, np.float32), "w": normal(16, 32), **AXIS}
OUTLIERS = np.where(np.arange(16) % 5 == 2, 64, 1).astype(np.float32)


def test_a_normalisation_takes_the_division():
    text = NORM.replace("z = Gemm3 (n)", "z = MatMul (n, w2)")
    model = model_of(text, {"g": normal(16) * OUTLIERS, "b0": normal(16), "w": normal(16, 32), "w2": normal(16, 8)})
    smooth = smoothed(model, {"h": normal(3, 4, 16)}, ["n"])
    assert [node.op_type for node in model.graph] == ["LayerNormalization", "MatMul", "MatMul"]  # both readers get the factors
    factors = smooth.smoothed["n"]
    assert factors[2] > 4 * factors[0]


def test_the_factors_are_those_of_the_paper():
    weight, peaks = normal(16, 32), np.exp2(np.arange(-8.0, 8.0))
    text = "f (float[b, 16] h) => (float[b, 32] y) { n = RMSNormalization <axis = -1> (h, g)  y = MatMul (n, w) }"
    for alpha in (0.0, 0.3, 0.5, 1.0):
        smooth = SmoothActivations({"n": peaks}, alpha=alpha)
        smooth(model_of(text, {"g": np.ones(16, np.float32), "w": weight}))
        exact = peaks**alpha / np.abs(weight).max(axis=1).astype(np.float64) ** (1 - alpha)
        ratio = smooth.smoothed["n"] / exact
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)  # but for one factor of all channels
        assert np.exp2(np.median(np.log2(smooth.smoothed["n"]))) == pytest.approx(1)
    with pytest.raises(ValueError, match="alpha"):
        SmoothActivations({}, alpha=2)


def test_the_modulation_of_a_diffusion_transformer_takes_its_part():
    model = model_of(MODULATED, {**MODULATION, "w": normal(16, 32) / OUTLIERS[:, None]})
    nodes = [node.op_type for node in model.graph]
    other = run(model, {"h": normal(2, 4, 16), "c": normal(2, 8)}, [])[1]
    smooth = smoothed(model, {"h": normal(2, 4, 16), "c": normal(2, 8)}, ["x"])
    assert [node.op_type for node in model.graph] == nodes
    assert smooth.smoothed["x"].max() > smooth.smoothed["x"].min()
    np.testing.assert_array_equal(run(model, {"h": normal(2, 4, 16), "c": normal(2, 8)}, [])[1], other)  # the same, to the last bit
    assert "w_mod" not in model.graph.initializers
    assert "w_mod.smoothed" in model.graph.initializers
    assert model.graph.initializers["w_mod.smoothed"].shape == [48, 8]


def test_what_is_shared_gets_one_row_a_sample_multiplied():
    """SANA's blocks share the modulation, and each adds a table of its own."""
    text = """f (float[b, 4, 16] h, float[b, 16] c) => (float[b, 4, 32] y, float[b, 4, 16] u) {
        r = Unsqueeze (c, one)  shift = Add (r, table)  n = LayerNormalization <axis = -1> (h, g)  x = Add (n, shift)  y = MatMul (x, w)
        u = Add (h, shift) }"""
    model = model_of(text, {"table": normal(1, 16), "g": OUTLIERS, "w": normal(16, 32), "one": np.array([1])})
    smoothed(model, {"h": normal(2, 4, 16), "c": normal(2, 16)}, ["x"])
    (new,) = [node for node in model.graph if node.op_type == "Mul"]
    assert new.inputs[0].name == "shift"
    assert new.outputs[0].shape[1] == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("x = Gelu (h)  y = MatMul (x, w)", "Gelu computes it"),
        ("y = MatMul (h, w)", "no node makes it"),
        (
            "x = LayerNormalization <axis = -1> (h, g)  y0 = MatMul (x, w)  y = Add (y0, k)  k = ReduceSum <keepdims = 1> (x)",
            "ReduceSum reads it",
        ),
        ("n = Relu (h)  x = Add (n, n)  y = MatMul (x, w)", "read elsewhere too"),
        ("x = LayerNormalization <axis = 1> (h, g2)  y = MatMul (x, w)", "more than the channels"),
        ("x = MatMul (h, h2)  h2 = Transpose (h)  y = MatMul (x, w)", "product of two activations"),
        ("x = Relu (h)  y = MatMul (x, w)", "it is an input of the model"),
    ],
)
def test_what_cannot_be_divided_is_left_and_told(body, reason):
    parts = body.split("  ")
    body = "  ".join(sorted(parts, key=lambda p: (p.startswith("y = "), p.startswith("y0"), p.startswith("x = MatMul (h, h2)"))))
    weights = {"w": normal(16, 32), "g": np.ones(16, np.float32), "g2": np.ones((16, 16), np.float32)}
    text = f"f (float[16, 16] h) => (float[16, 32] y) {{ {body} }}"
    if "h2" not in body:
        text = text.replace("float[16, 16] h", "float[2, 16, 16] h").replace("float[16, 32] y", "float[2, 16, 32] y")
    model = model_of(text, {name: array for name, array in weights.items() if f" {name})" in text or f" {name}," in text})
    before = ir.to_proto(model).SerializeToString()
    smooth = SmoothActivations({"x": OUTLIERS})
    assert not smooth(model).modified
    assert [reason in r.what for r in smooth.skipped] == [True], smooth.skipped
    assert ir.to_proto(model).SerializeToString() == before


def test_channels_of_zeros_stay_as_they_are():
    weight = normal(16, 32)
    weight[3] = 0
    text = "f (float[b, 16] h) => (float[b, 32] y) { n = RMSNormalization <axis = -1> (h, g)  y = MatMul (n, w) }"
    gain = OUTLIERS.copy()
    gain[5] = 0
    model = model_of(text, {"g": gain, "w": weight})
    smooth = smoothed(model, {"h": normal(9, 16)}, ["n"])
    assert smooth.smoothed["n"][[3, 5]].tolist() == [1, 1]
    alike = SmoothActivations({"n": np.zeros(16)})
    assert not alike(model_of(text, {"g": gain, "w": weight})).modified
    assert alike.skipped[0].what == "its channels are alike"


@pytest.mark.parametrize("name", ["dit-tiny", "sana-tiny", "diffussm-tiny"])
def test_models_compute_the_same(name):
    spec = MODELS[name].spec()
    torch.manual_seed(0)
    module = spec.build().requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=0.2)  # what is initialised as zeros would hide errors
    example = spec.inputs(np.random.Generator(np.random.PCG64(0)), spec.sizes)
    model = optimise(onnx_files.to_onnx(trace(module, example), opset=23, input_names=list(example), output_names=list(spec.outputs)))
    inputs = {n: t.numpy() for n, t in example.items()}
    products = [n for n in model.graph if n.op_type == "MatMul" and n.inputs[1].is_initializer() and n.inputs[0].producer() is not None]
    names = list(dict.fromkeys(n.inputs[0].name for n in products))
    generator = np.random.Generator(np.random.PCG64(1))
    peaks = {n: np.exp2(generator.normal(0, 4, model_shape(model, n)[-1])) for n in names}
    before = session_run(model, inputs)
    smooth = SmoothActivations(peaks)
    smooth(model)
    blocks = [n for n in smooth.smoothed if n.startswith("blocks.")]
    assert len(blocks) >= {"dit-tiny": 4, "sana-tiny": 2, "diffussm-tiny": 2}[name], smooth.skipped
    for got, expected in zip(session_run(model, inputs), before, strict=True):
        assert np.abs(got - expected).max() <= 1e-5 * np.ptp(expected)  # what a float32 artifact may lose


def model_shape(model, name):
    return next(v for node in model.graph for v in node.outputs if v.name == name).shape


def session_run(model, inputs):
    from isthmus.calibration.session import GraphSession

    return list(GraphSession(model).run(inputs).values())
