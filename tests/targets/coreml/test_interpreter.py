"""Programs in memory and from files, control flow, states, and what the interpreter refuses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isthmus.exporter.errors import IsthmusError, UnsupportedError, UsageError
from isthmus.exporter.quiet import quiet
from isthmus.targets.coreml.convert import convert
from isthmus.targets.coreml.interpreter import Interpreter, load

with quiet("coremltools"):  # it reports on import that it was not tested with this torch, and that no Core ML is here
    import coremltools as ct
    from coremltools.converters.mil import Builder

mb = Builder


def normal(*shape, seed=0):
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, dtype=np.float32)


X = normal(2, 3, 4)


def _results(program, function, *arrays):
    built, inputs = program(function, *arrays)
    return list(Interpreter(built).run(inputs).values())


# Rounding, control flow, states.


def test_results_are_rounded_after_every_operation(program):
    x, y = np.float16([2048.0, 60000.0]), np.float16([1.0, 60000.0])
    (got,) = _results(program, lambda a, b: mb.sub(x=mb.add(x=a, y=b), y=a), x, y)
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, [0.0, np.inf])  # 2049 is no float16 number, and 120000 is beyond the largest


def test_a_loop(program):
    def function(x):
        def body(i, v):
            return mb.add(x=i, y=1), mb.mul(x=v, y=x)

        return mb.while_loop(_cond=lambda i, _: mb.less(x=i, y=3), _body=body, loop_vars=(np.int32(0), x))

    count, got = _results(program, function, X)
    assert count == 3
    np.testing.assert_allclose(got, X**4, rtol=1e-5)


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_a_branch(value, program):
    def function(x):
        positive = mb.greater(x=mb.reduce_sum(x=x, axes=[0], keep_dims=False), y=0.0)
        return mb.cond(pred=positive, _true_fn=lambda: mb.mul(x=x, y=2.0), _false_fn=lambda: mb.sub(x=x, y=5.0))

    (got,) = _results(program, function, np.full(3, value, np.float32))
    np.testing.assert_array_equal(got, np.full(3, 2.0 if value > 0 else -6.0))


class Accumulator(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(2, 3))

    def forward(self, x):
        self.total.mul_(0.5)
        self.total.add_(x)
        return self.total * 2


def test_states_are_carried_from_call_to_call():
    with quiet("coremltools"):
        exported = torch.export.export(Accumulator(), (torch.zeros(2, 3),), strict=False).run_decompositions({})
        model = ct.convert(exported, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
    interpreter = Interpreter(load(model))
    assert list(interpreter.states.values()) == [((2, 3), np.dtype("float16"))]
    states, expected = {}, np.zeros((2, 3))
    for value in (1.0, 2.0, -3.0):
        x = np.full((2, 3), value, np.float32)
        (got,) = interpreter.run(dict.fromkeys(interpreter.inputs, x), states).values()
        expected = expected * 0.5 + x
        np.testing.assert_array_equal(got, expected * 2)


def test_states_begin_as_they_are_given():
    with quiet("coremltools"):
        exported = torch.export.export(Accumulator(), (torch.zeros(2, 3),), strict=False).run_decompositions({})
        model = ct.convert(exported, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
    interpreter = Interpreter(load(model))
    (name,) = interpreter.states
    states = {name: np.full((2, 3), 4.0, np.float16)}
    (got,) = interpreter.run(dict.fromkeys(interpreter.inputs, np.ones((2, 3), np.float32)), states).values()
    np.testing.assert_array_equal(got, 2 * (4.0 * 0.5 + 1.0))
    np.testing.assert_array_equal(states[name], 4.0 * 0.5 + 1.0)


# Shapes that vary, and several functions.


class Rows(nn.Module):
    """Depends on the number of its rows, and has weights that are kept in a file."""

    def __init__(self, factor):
        super().__init__()
        self.register_buffer("weight", factor * torch.eye(40))

    def forward(self, x):
        return (x @ self.weight) / x.shape[0] + x.mean(0, keepdim=True)


def _rows(factor=1.0, **options):
    varying = {"dynamic_shapes": ({0: torch.export.Dim("rows", min=2, max=9)},)} if options else {}
    with quiet("coremltools"):
        exported = torch.export.export(Rows(factor), (torch.zeros(4, 40),), strict=False, **varying).run_decompositions({})
        return ct.convert(
            exported,
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
            compute_precision=ct.precision.FLOAT32,
            **options,
        )


SHAPES = {
    "enumerated": ([ct.TensorType(shape=ct.EnumeratedShapes([[4, 40], [6, 40]]))], "one of"),
    "range": ([ct.TensorType(shape=(ct.RangeDim(4, 6, default=4), 40))], "4 to 6"),
}


@pytest.mark.parametrize("how", SHAPES)
def test_shapes_that_vary(how):
    inputs, said = SHAPES[how]
    interpreter = Interpreter(load(_rows(inputs=inputs)))
    for count in (4, 6):
        x = normal(count, 40)
        (got,) = interpreter.run(dict.fromkeys(interpreter.inputs, x)).values()
        np.testing.assert_allclose(got, Rows(1.0)(torch.from_numpy(x)).numpy(), atol=1e-6)
    with pytest.raises(UsageError) as caught:
        interpreter.run(dict.fromkeys(interpreter.inputs, normal(9, 40)))
    assert [said in reason.what for reason in caught.value.reasons] == [True]


def test_functions_of_one_package(tmp_path):
    with quiet("coremltools"):
        description = ct.utils.MultiFunctionDescriptor()
        for name, factor in (("once", 1.0), ("twice", 2.0)):
            _rows(factor).save(str(tmp_path / f"{name}.mlpackage"))
            description.add_function(str(tmp_path / f"{name}.mlpackage"), src_function_name="main", target_function_name=name)
        description.default_function_name = "twice"
        ct.utils.save_multifunction(description, str(tmp_path / "both.mlpackage"))
        program = load(tmp_path / "both.mlpackage")
    x = normal(4, 40)
    for function, factor in ((None, 2.0), ("once", 1.0), ("twice", 2.0)):
        interpreter = Interpreter(program, function)
        (got,) = interpreter.run(dict.fromkeys(interpreter.inputs, x)).values()
        np.testing.assert_allclose(got, Rows(factor)(torch.from_numpy(x)).numpy(), atol=1e-6)


# Whole models, through a file.


class Network(nn.Module):
    """Something of everything that image models have."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.layer = nn.LayerNorm(32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.ConvTranspose2d(32, 3, 4, stride=2, padding=1)

    def forward(self, x):
        x = F.silu(self.norm(self.stem(x)))
        tokens = self.layer(x.flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        tokens = tokens + self.mlp(tokens)
        return self.head(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    module, x = Network().eval(), torch.from_numpy(normal(2, 3, 16, 16))
    with quiet("coremltools"):
        exported = torch.export.export(module, (x,), strict=False)
    with torch.no_grad():
        return exported, x.numpy(), module(x).numpy()


def _run(model, x):
    interpreter = Interpreter(load(model))
    return next(iter(interpreter.run(dict.fromkeys(interpreter.inputs, x)).values()))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 5e-3)])
def test_a_network_through_a_file(network, precision, tolerance, tmp_path):
    exported, x, expected = network
    model = convert(exported, precision)
    with quiet("coremltools"):
        model.save(str(tmp_path / "model.mlpackage"))
        got = _run(tmp_path / "model.mlpackage", x)
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()
    np.testing.assert_array_equal(got, _run(model._mil_program, x))


def test_compressed_weights_in_a_network(network):
    exported, x, expected = network
    model = convert(exported, "fp16")
    with quiet("coremltools"):
        import coremltools.optimize.coreml as cto

        config = cto.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=32, weight_threshold=0
        )
        narrow = cto.linear_quantize_weights(model, cto.OptimizationConfig(global_config=config))
    kinds = {op.op_type for op in load(narrow).functions["main"].operations}
    assert "constexpr_blockwise_shift_scale" in kinds
    error = np.abs(_run(narrow, x) - expected).max() / np.abs(expected).max()
    assert 1e-3 < error < 0.3  # four bits: visible, and not wrong


# What is refused.


def test_unknown_operations_are_listed_together(program):
    def function(x):
        noise = mb.random_normal(shape=mb.shape(x=x), mean=0.0, stddev=1.0, seed=1)
        return mb.add(x=mb.add(x=noise, y=mb.random_uniform(shape=mb.shape(x=x), low=0.0, high=1.0)), y=noise)

    built, _ = program(function, X)
    with pytest.raises(UnsupportedError) as caught:
        Interpreter(built)
    assert [reason.what for reason in caught.value.reasons] == [
        "the operation 'random_normal' (1 times) is not implemented",
        "the operation 'random_uniform' (1 times) is not implemented",
    ]


def test_inputs_that_do_not_fit_are_listed_together(program):
    built, _ = program(lambda x, y: mb.add(x=x, y=y), X, X)
    with pytest.raises(UsageError) as caught:
        Interpreter(built).run({"a": X[0], "z": X})
    assert {(r.where, r.what) for r in caught.value.reasons} == {
        ("a", "has shape (3, 4), expected (2, 3, 4)"),
        ("b", "is missing"),
        ("z", "is no input"),
    }


def test_an_unknown_function(program):
    built, _ = program(lambda x: mb.abs(x=x), X)
    with pytest.raises(UsageError, match="no function 'prefill'"):
        Interpreter(built, "prefill")


def test_an_operation_that_fails_is_named(program):
    built, inputs = program(lambda x, i: mb.gather(x=x, indices=i, axis=1), X, np.array([99], np.int32))
    with pytest.raises(IsthmusError, match=r"gather .* failed"):
        Interpreter(built).run(inputs)


@pytest.mark.parametrize(
    ("missing", "what"),
    [
        ("Data/com.apple.CoreML/weights/weight.bin", "a weight file is missing or damaged"),
        ("Data/com.apple.CoreML/model.mlmodel", "its manifest or specification is missing or damaged"),
        ("Manifest.json", "it has no Manifest.json"),
    ],
)
def test_a_package_that_lacks_a_file(missing, what, tmp_path):
    path = tmp_path / "model.mlpackage"
    with quiet("coremltools"):
        _rows().save(str(path))
        (path / missing).unlink()
        with pytest.raises(IsthmusError, match=what) as caught:
            load(path)
    assert caught.value.hint


def test_a_package_that_is_not_there(tmp_path):
    with pytest.raises(IsthmusError, match="it is not there"):
        load(tmp_path / "model.mlpackage")


def test_a_model_that_is_no_program():
    spec = ct.proto.Model_pb2.Model()
    spec.specificationVersion = 4
    spec.neuralNetwork.SetInParent()

    class Network:
        weights_dir = None

        def get_spec(self):
            return spec

    with pytest.raises(UsageError, match="the model is a neuralNetwork"):
        load(Network())
