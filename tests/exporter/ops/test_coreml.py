"""The Core ML lowerings beyond the sweep: size of the program, the other forms, precision, what they refuse."""

import importlib.util
import pathlib
from collections import Counter

import numpy as np
import pytest
import torch

from isthmus.exporter.errors import UnsupportedError
from isthmus.exporter.op import OPS
from isthmus.exporter.quiet import quiet
from isthmus.targets.coreml.convert import convert
from isthmus.targets.coreml.interpreter import Interpreter, load
from isthmus.targets.coreml.interpreter.program import operations_in

with quiet("coremltools"):  # it reports on import that it was not tested with this torch, and that no Core ML is here
    from coremltools.converters.mil.mil import types

    from isthmus.exporter.ops import mil


def _load():
    spec = importlib.util.spec_from_file_location("coreml_models", pathlib.Path(__file__).with_name("coreml_models.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models = _load()

# One hard case of each operator.
HARD = {
    "selective_scan": "everything, reversed",
    "linear_attention": "gated delta, a key channel",
    "normalized_linear_attention": "rows of zero",
    "rwkv7": "initial state",
    "causal_conv1d": "everything",
}


def _operations(model):
    return list(operations_in(load(model).functions["main"]))


def _normal(*shape, seed=0):
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)


def _scan_inputs(length, batch=2, channels=6, state=4, groups=2):
    tokens = (batch, length)
    return {
        "u": _normal(*tokens, channels),
        "delta": _normal(*tokens, channels, seed=1) - 2.0,
        "A": -np.exp(_normal(channels, state, seed=2)),
        "B": _normal(*tokens, groups * state, seed=3),
        "C": _normal(*tokens, groups * state, seed=4),
        "initial_state": _normal(batch, channels, state, seed=5),
    }


SCAN = {"delta_softplus": True, "reverse": False}


@pytest.mark.matrix
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", HARD)
def test_the_passes_that_the_sweep_leaves_out_change_nothing(name, precision, sweep):
    op = OPS[name]
    dtype = {"fp32": "float32", "fp16": "float16"}[precision]
    inputs, attributes, reference = sweep.prepared(name, HARD[name], dtype)
    model, names = models.converted(op, inputs, attributes, precision, unchecked=False)
    results = models.execute(op, model, names, inputs)
    sweep.check(op, {a.name: results[a.name].astype("float32" if a.wide else dtype) for a in op.outputs}, reference, dtype, dtype)
    kinds = {op.op_type for op in _operations(model)}
    assert kinds.isdisjoint({"while_loop", "cumsum", "custom"})
    assert max(len(v.shape) for op in _operations(model) for v in op.outputs if v.shape is not None) <= 5


@pytest.mark.parametrize("name", ["selective_scan", "linear_attention", "rwkv7"])
def test_the_program_grows_with_the_logarithm_of_the_length(name, sweep):
    op = OPS[name]
    given, attributes, _ = sweep.prepared(name, HARD[name], "float32")
    counts = []
    for length in (256, 512, 1024):
        sized = {a.name for a in op.inputs if "length" in a.shape}
        inputs = {n: np.resize(x, (x.shape[0], length, x.shape[2])) if n in sized else x for n, x in given.items()}
        model, _ = models.converted(op, inputs, attributes, "fp32", passes=models.SHORT)
        counts.append(sum(op.op_type != "const" for op in _operations(model)))
    steps = np.diff(counts)
    assert steps.max() <= 20
    assert len(set(steps)) == 1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("selective_scan", "everything"),
        ("selective_scan", "everything, reversed"),
        ("linear_attention", "gated delta, one token"),
        ("linear_attention", "delta"),
        ("rwkv7", "initial state"),
    ],
)
def test_the_form_with_a_loop(name, case, precision, sweep):
    op = OPS[name]
    dtype = {"fp32": "float32", "fp16": "float16"}[precision]
    inputs, attributes, reference = sweep.prepared(name, case, dtype)
    with mil.sequential():
        model, names = models.converted(op, inputs, attributes, precision, passes=models.SHORT)
    assert Counter(op.op_type for op in _operations(model))["while_loop"] == 1
    results = models.execute(op, model, names, inputs)
    sweep.check(op, {a.name: results[a.name].astype("float32" if a.wide else dtype) for a in op.outputs}, reference, dtype, dtype)


def test_the_form_with_a_loop_is_the_smaller_one_for_a_stream():
    op = OPS["selective_scan"]
    inputs = _scan_inputs(64)
    counts = {}
    for name, context in (("chunks", None), ("loop", mil.sequential())):
        if context is None:
            model, _ = models.converted(op, inputs, SCAN, "fp32", passes=models.SHORT)
        else:
            with context:
                model, _ = models.converted(op, inputs, SCAN, "fp32", passes=models.SHORT)
        counts[name] = sum(op.op_type != "const" for op in _operations(model))
    assert counts["loop"] < counts["chunks"] / 1.5
    assert not mil.is_sequential()


def test_a_sequence_may_be_split_where_the_chunks_do_not_end():
    op = OPS["selective_scan"]
    whole = {n: x.astype(np.float32) for n, x in _scan_inputs(50).items()}
    expected = op.part("reference").reference(whole, SCAN)
    state, ys = whole["initial_state"], []
    for start, stop in ((0, 19), (19, 20), (20, 50)):
        part = {n: x[:, start:stop] if x.ndim == 3 and x.shape[1] == 50 else x for n, x in whole.items()} | {"initial_state": state}
        model, names = models.converted(op, part, SCAN, "fp32", passes=models.SHORT)
        results = models.execute(op, model, names, part)
        state, ys = results["last_state"], [*ys, results["y"]]
    np.testing.assert_allclose(np.concatenate(ys, axis=1), expected["y"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(state, expected["last_state"], rtol=0, atol=2e-5)


def test_float32_islands_are_for_the_converter_to_choose(sweep):
    """A float16 program whose scan is float32, and nothing else: the conversion's own setting, and closer to the reference."""
    op = OPS["selective_scan"]
    inputs, attributes, reference = sweep.prepared("selective_scan", "everything, reversed", "float16")
    errors = {}
    for precision in ("fp16", "fp16-wide-scans"):
        model, names = models.converted(op, inputs, attributes, precision)
        errors[precision] = sweep.error(models.execute(op, model, names, inputs)["y"], reference["y"], 2)
        narrow = {types.builtin_to_string(v.dtype) for op in _operations(model) if op.op_type == "exp" for v in op.outputs}
        assert narrow == {"fp16" if precision == "fp16" else "fp32"}
    assert errors["fp16-wide-scans"] < errors["fp16"] / 1.5


class Half(torch.nn.Module):
    def forward(self, u, delta, A, B, C):
        return torch.ops.isthmus.selective_scan(u, delta, A, B, C, delta_softplus=True)


def test_a_half_precision_model_has_a_float32_state():
    OPS["selective_scan"].part("torch")
    given = {n: x.astype(np.float32) for n, x in _scan_inputs(20).items() if n != "initial_state"}
    tensors = [torch.from_numpy(x) if n == "A" else torch.from_numpy(x).half() for n, x in given.items()]
    program = torch.export.export(Half(), tuple(tensors), strict=False)
    interpreter = Interpreter(load(convert(program, "fp32")))
    assert [dtype for _, dtype in interpreter.inputs.values()] == [np.float16, np.float16, np.float32, np.float16, np.float16]
    y, last = interpreter.run({key: t.numpy() for key, t in zip(interpreter.inputs, tensors, strict=True)}).values()
    assert (y.dtype, last.dtype) == (np.float16, np.float32)
    rounded = {n: t.numpy() for n, t in zip(given, tensors, strict=True)}
    expected = OPS["selective_scan"].part("reference").reference(rounded, SCAN)
    np.testing.assert_allclose(y, expected["y"], rtol=0, atol=2e-3 * np.abs(expected["y"]).max())
    np.testing.assert_allclose(last, expected["last_state"], rtol=0, atol=2e-5)


def test_convolution_weights_that_are_computed():
    op = OPS["causal_conv1d"]
    inputs = {
        "x": _normal(2, 5, 20),
        "weight": _normal(5, 1, 4, seed=1),
        "bias": _normal(5, seed=2),
        "initial_state": _normal(2, 5, 3, seed=3),
    }
    expected = op.part("reference").reference(inputs, {"silu": True})
    model, names = models.converted(op, inputs, {"silu": True}, "fp32", dynamic=("weight", "bias"))
    assert "conv" not in {op.op_type for op in _operations(model)}
    results = models.execute(op, model, names, inputs)
    np.testing.assert_allclose(results["y"], expected["y"], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(results["last_state"], expected["last_state"].astype(np.float32))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 2e3])
def test_the_normaliser_does_not_depend_on_the_size_of_the_features(scale):
    """float16's sums would overflow with the large features, and its epsilon would outweigh the small ones."""
    op = OPS["normalized_linear_attention"]
    inputs = {n: (_normal(1, 40, 16, seed=i) * (scale if n != "v" else 1.0)).astype(np.float16) for i, n in enumerate("qkv")}
    inputs["q"][:, ::5] = 0.0
    attributes = {"num_heads": 2, "eps": 1e-15}
    expected = op.part("reference").reference(inputs, attributes)["y"]
    model, names = models.converted(op, inputs, attributes, "fp16", passes=models.SHORT)
    y = models.execute(op, model, names, inputs)["y"].astype(np.float64)
    assert np.abs(y - expected).max() <= 5e-3 * np.abs(expected).max()
    np.testing.assert_array_equal(y[:, ::5], 0.0)


def _long_scan(length=4096, channels=32, state=16):
    """Mamba's A, and steps from 1e-4 to 8, as float16 numbers; no D u, which hides errors of the scan."""
    rng = np.random.Generator(np.random.PCG64(0))
    usual = np.exp(rng.uniform(np.log(1e-4), np.log(0.5), channels))
    delta = (usual * np.exp(rng.standard_normal((1, length, channels)))).clip(max=8.0)
    delta[:, ::512] = 8.0
    arrays = {"u": rng.standard_normal((1, length, channels)), "delta": delta, "A": -np.tile(np.arange(1.0, state + 1), (channels, 1))}
    arrays |= {name: rng.standard_normal((1, length, state)) for name in "BC"}
    return {name: x.astype(np.float16).astype(np.float64) for name, x in arrays.items()}


def test_a_long_selective_scan_holds_in_float16():
    op = OPS["selective_scan"]
    inputs, attributes = _long_scan(), op.resolve({})
    expected = op.part("reference").reference(inputs, attributes)["y"]
    model, names = models.converted(op, inputs, attributes, "fp16")
    error = models.execute(op, model, names, inputs)["y"] - expected
    decibels = 20 * np.log10(abs(expected).max(1) / np.sqrt((error**2).mean(1)))  # for each channel
    assert decibels.min() >= 65


class Softplus(torch.nn.Module):
    def forward(self, u, delta, A, B, C):
        return torch.ops.isthmus.selective_scan(u, delta, A, B, C, delta_softplus=True)[1]


def test_softplus_holds_in_float16_where_its_formula_does_not():
    """The state after one token with u = B = 1 is softplus(delta): small ones keep their digits, large ones do not overflow."""
    OPS["selective_scan"].part("torch")
    delta = np.float32([-9.0, -8.0, -7.0, -3.0, 0.0, 3.0, 10.5, 11.5, 12.0, 25.0, 1000.0])
    one = np.ones((1, 1, len(delta)), np.float32)
    A, B = np.full((len(delta), 1), -1.0, np.float32), np.ones((1, 1, 1), np.float32)
    arrays = [one, delta.reshape(one.shape), A, B, B]
    program = torch.export.export(Softplus(), tuple(map(torch.from_numpy, arrays)), strict=False)
    interpreter = Interpreter(load(convert(program, "fp16")))
    (got,) = interpreter.run(dict(zip(interpreter.inputs, arrays, strict=True))).values()
    np.testing.assert_allclose(got.reshape(-1), np.logaddexp(delta.astype(np.float64), 0.0), rtol=2e-3)


class Named(torch.nn.Module):
    """Has a value that is called what an attribute's value is."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, q):
        x = self.linear(q)
        return torch.ops.isthmus.linear_attention(x, x, x, q_num_heads=2, kv_num_heads=2, update_rule="linear")


def test_an_attribute_is_not_taken_for_a_value_of_that_name():
    OPS["linear_attention"].part("torch")
    torch.manual_seed(0)
    module, q = Named(), torch.from_numpy(_normal(1, 9, 8).astype(np.float32))
    program = torch.export.export(module, (q,), strict=False)
    assert "linear" in {node.name for node in program.graph.nodes}
    interpreter = Interpreter(load(convert(program, "fp32")))
    with torch.no_grad():
        expected = module(q)
    for got, y in zip(interpreter.run(dict.fromkeys(interpreter.inputs, q.numpy())).values(), expected, strict=True):
        np.testing.assert_allclose(got, y.numpy(), rtol=0, atol=1e-5)


def test_dynamic_shapes_are_refused_with_every_reason():
    OPS["linear_attention"].part("torch")
    length = torch.export.Dim("length", min=2, max=64)
    x = torch.zeros(1, 16, 8)

    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return torch.ops.isthmus.linear_attention(q, k, v, q_num_heads=2, kv_num_heads=2, update_rule="linear")

    shapes = {name: {1: length} for name in "qkv"}
    program = torch.export.export(Attention(), (x, x, x), dynamic_shapes=shapes, strict=False)
    with pytest.raises(UnsupportedError, match="static shapes") as caught:
        convert(program, "fp32")
    assert len(caught.value.reasons) == 3
    assert all("dynamic shape" in reason.what and reason.fix for reason in caught.value.reasons)
