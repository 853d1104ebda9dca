"""From exported programs to ML Programs: names, types, systems, precision by module, and what is refused."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isthmus
from isthmus.exporter.errors import IsthmusError, UnsupportedError
from isthmus.exporter.quiet import quiet
from isthmus.exporter.trace import trace
from isthmus.targets.coreml.convert import convert, converted, decomposed, identifiers
from isthmus.targets.coreml.interpreter import Interpreter, load
from isthmus.targets.coreml.interpreter.program import operations_in
from isthmus.targets.coreml.modules import KEY, read_modules

with quiet("coremltools"):  # it reports on import that it was not tested with this torch, and that no Core ML is here
    from coremltools.converters.mil.mil import types


class Two(nn.Module):
    """Two layers, the first of which may be large; inputs and outputs of every type."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.scale = scale

    def forward(self, x, keep, index, time):
        y = self.second(torch.tanh(self.first(x * self.scale)) * keep)
        return y[:, index[0]] * time, (x > 0), y.softmax(-1).argmax(-1), y.sum()


def given(seed=0):
    rng = np.random.Generator(np.random.PCG64(seed))
    return {
        "x": rng.standard_normal((4, 8), dtype=np.float32),
        "keep": rng.random((4, 8)) > 0.3,
        "index": rng.integers(0, 8, (2,)),
        "time": np.float32(0.75),
    }


@functools.cache
def two(scale=1.0):
    torch.manual_seed(0)
    module = Two(scale).eval()
    with quiet():
        return module, trace(module, {name: torch.as_tensor(value) for name, value in given().items()})


def results(module, inputs):
    with torch.no_grad():
        return [value.numpy() for value in module(*(torch.as_tensor(value) for value in inputs.values()))]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("target", ["iOS16", "iOS17", "iOS18", "iOS26"])
def test_names_and_types_are_those_of_pytorch_for_every_system(target, precision):
    module, program = two()
    names = {"input_names": ["x", "keep", "index", "time"], "output_names": ["first", "mask", "class", "sum"]}
    model = convert(program, precision, deployment_target=target, **names)
    assert model.get_spec().specificationVersion == {"iOS16": 7, "iOS17": 8, "iOS18": 9, "iOS26": 10}[target]
    runner = Interpreter(load(model))
    # Core ML has no booleans and no 64-bit integers outside of a program, and no scalars.
    kinds = {name: (shape, str(dtype)) for name, (shape, dtype) in runner.inputs.items()}
    assert kinds == {"x": ((4, 8), "float32"), "keep": ((4, 8), "int32"), "index": ((2,), "int32"), "time": ((1,), "float32")}
    assert runner.outputs == ("first", "mask", "class", "sum")
    for seed in range(2):
        inputs = given(seed)
        got = runner.run({name: np.atleast_1d(value) for name, value in inputs.items()}).values()
        for value, expected in zip(got, results(module, inputs), strict=True):
            assert value.dtype == ("float32" if expected.dtype.kind == "f" else "int32")
            np.testing.assert_allclose(value.reshape(expected.shape), expected, atol=1e-5 if precision == "fp32" else 2e-2)


def test_names_that_core_ml_does_not_take_are_replaced():
    assert identifiers(["x", "state", "é", "1st", "a.b", "a_b", "_"]) == ["x", "state_", "__1", "_1st", "a_b_1", "a_b", "_"]
    assert identifiers(["state", "state_"]) == ["state__1", "state_"]
    assert identifiers([]) == []


def computed(model):
    """For each operation with a weight its type and the dtype that it computes in."""
    program = load(model)
    ops = operations_in(program.functions["main"])
    return [(op.op_type, types.builtin_to_string(op.outputs[0].dtype)) for op in ops if op.op_type in ("linear", "tanh", "sin", "mul")]


def test_modules_that_leave_float16_compute_in_float32():
    module, program = two(1e6)
    inputs = given()
    wide = converted(program, "fp16", wide=["", "first"], input_names=list(inputs))
    kinds = computed(wide.model)
    assert ("linear", "fp32") in kinds
    assert ("linear", "fp16") in kinds
    runner = Interpreter(load(wide.model))
    values = [
        v.reshape(e.shape)
        for v, e in zip(runner.run({n: np.atleast_1d(v) for n, v in inputs.items()}).values(), results(module, inputs), strict=True)
    ]
    for value, expected in zip(values, results(module, inputs), strict=True):
        np.testing.assert_allclose(value, expected, atol=5e-3)
    narrow = Interpreter(load(convert(program, "fp16", input_names=list(inputs))))
    (first, *_) = narrow.run({n: np.atleast_1d(v) for n, v in inputs.items()}).values()
    assert not np.isfinite(first).all() or np.abs(first - results(module, inputs)[0]).max() > 5e-3


class Angles(nn.Module):
    """A timestep's embedding, and a layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.register_buffer("frequencies", torch.logspace(0, -3, 16))

    def forward(self, t):
        angles = t[:, None] * self.frequencies
        return self.layer(torch.cat([angles.cos(), angles.sin()], -1))


def test_angles_stay_in_float32():
    torch.manual_seed(0)
    module = Angles().eval()
    t = torch.tensor([999.7, 3.1, 512.3])
    with quiet():
        model = convert(trace(module, {"t": t}), "fp16", input_names=["t"])
    assert dict(computed(model)) == {"mul": "fp32", "sin": "fp32", "linear": "fp16"}
    with torch.no_grad():
        expected = module(t).numpy()
    (got,) = Interpreter(load(model)).run({"t": t.numpy()}).values()
    assert 20 * np.log10(np.ptp(expected) / np.sqrt(np.mean((got - expected) ** 2))) > 60


class Nearest(nn.Module):
    """A layer, the nearest of 16 vectors to what it gives, and the thirds that the choice stands for."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.vectors = nn.Parameter(torch.randn(16, 4))

    def forward(self, x):
        y = F.gelu(self.layer(x))
        index = (self.vectors.square().sum(-1) / 2 - y @ self.vectors.T).argmin(-1)
        return index, (index.float() - 8) * (1 / 3)


def test_what_decisions_are_made_of_stays_in_float32():
    torch.manual_seed(0)
    module = Nearest().eval()
    x = torch.randn(4, 8)
    with quiet():
        model = convert(trace(module, {"x": x}), "fp16", input_names=["x"])
    assert computed(model) == [("linear", "fp16"), ("linear", "fp32"), ("mul", "fp32")]
    with torch.no_grad():
        expected = [value.numpy() for value in module(x)]
    for got, value in zip(Interpreter(load(model)).run({"x": x.numpy()}).values(), expected, strict=True):
        np.testing.assert_array_equal(got, value)


def test_the_modules_of_values_are_written_down():
    _, program = two()
    modules = read_modules({KEY: converted(program, "fp16").modules})
    assert set(modules.values()) == {"", "first", "second"}


def test_a_program_is_not_changed_and_converts_twice():
    _, program = two()
    ready = decomposed(program)
    assert decomposed(program) is ready
    before = str(ready.graph)
    one, other = (convert(ready, "fp32").get_spec() for _ in range(2))
    assert str(ready.graph) == before
    assert [v.name for v in one.description.output] == [v.name for v in other.description.output]


def test_what_coremltools_raises_is_one_message():
    _, program = two()
    with pytest.raises(ValueError, match="got precision 'bf16', expected one of fp32"):
        convert(program, "bf16")
    with pytest.raises(IsthmusError, match="coremltools cannot convert this program: ") as caught:
        convert(program, "fp16", input_names=["x", "keep", "index", "time"], shapes=[[(4, 8), (5, 8)], [(4, 8)], [(2,)], [()]])
    assert "\n" not in caught.value.message


class Axes(nn.Module):
    def forward(self, x):
        return (x[:, None, None] * torch.linspace(0, 1, 7)).cos()


class Complex(nn.Module):
    def forward(self, x):
        return torch.view_as_complex(x).abs()


@pytest.mark.parametrize(
    ("module", "shape", "words"), [(Axes, (2, 3, 4, 7), "6 axes (2, 1, 1, 3, 4, 7)"), (Complex, (4, 3, 2), "complex numbers (complex64)")]
)
def test_what_core_ml_lacks_exits_with_4(module, shape, words, tmp_path):
    with pytest.raises(UnsupportedError) as caught:
        isthmus.export((module(), (torch.randn(shape),)), "coreml", tmp_path / "out")
    assert caught.value.exit_code == 4
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()
