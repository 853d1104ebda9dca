"""What the sweep does not say of the Core AI lowerings: sizes, dynamic shapes, carried states, and arithmetic that is delicate."""

import numpy as np
import pytest
import torch
from torch.export import Dim

from isthmus.exporter.op import OPS
from isthmus.exporter.ops.coreai_table import decompose, decompositions

LONG = {
    "selective_scan": "everything",
    "linear_attention": "gated delta, a key channel",
    "rwkv7": "initial state",
    "causal_conv1d": "everything",
    "normalized_linear_attention": "more keys than queries",
}
TOKENS = ("length", "tokens")
_PROGRAMS = {}


def _resized(op, inputs, batch, length, start=0):
    """The inputs with another batch and tokens `start` to `start + length`, repeated from their beginning where they end."""
    resized = {}
    for argument in op.inputs:
        if argument.name in inputs:
            x = inputs[argument.name]
            for axis, dim in enumerate(argument.shape):
                if dim == "batch" or dim in TOKENS:
                    at = np.arange(batch) if dim == "batch" else np.arange(start, start + length)
                    x = x.take(at % x.shape[axis], axis)
            resized[argument.name] = x
    return resized


def _dynamic(op, inputs):
    dims = {"batch": Dim("batch", max=64), "length": Dim("length", max=65536), "tokens": Dim("tokens", max=65536)}
    return {a.name: {axis: dims[dim] for axis, dim in enumerate(a.shape) if dim in dims} for a in op.inputs if a.name in inputs}


@pytest.fixture
def coreai(sweep):
    return sweep.implementations()["coreai"]


@pytest.fixture
def prepared(sweep):
    return lambda name, dtype="float32": sweep.prepared(name, LONG[name], dtype)[:2]


@pytest.fixture
def dynamic(prepared, coreai):
    """The program of an operator for every batch and length, converted once."""

    def convert(name):
        if name not in _PROGRAMS:
            op = OPS[name]
            inputs, attributes = prepared(name)
            _PROGRAMS[name] = coreai.convert(op, attributes, {"call": _resized(op, inputs, 2, 100)}, _dynamic(op, inputs))
        return _PROGRAMS[name]

    return convert


def test_every_lowering_is_in_the_table():
    for name in OPS:
        OPS[name].part("torch")
    assert set(decompositions()) == {getattr(torch.ops.isthmus, name).default for name in OPS}


@pytest.mark.parametrize("name", list(LONG))
def test_the_size_does_not_depend_on_the_length(name, prepared, coreai):
    op = OPS[name]
    inputs, attributes = prepared(name, "float16")
    sizes = []
    for length in (130, 4002):  # neither fills its last chunk: one that does is not padded
        program = decompose(coreai.exported(op, attributes, {"call": _resized(op, inputs, 2, length)}))
        modules = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
        sizes.append(sum(len(m.graph.nodes) for m in modules))
    assert sizes[0] == sizes[1] < 300


@pytest.mark.parametrize("name", list(LONG))
def test_one_program_takes_every_batch_and_length(name, sweep, prepared, dynamic, coreai):
    op, program = OPS[name], dynamic(name)
    inputs, attributes = prepared(name)
    for batch, length in ((1, 1), (3, 7), (2, 16), (1, 257)):
        chosen = _resized(op, inputs, batch, length)
        outputs = coreai.execute(program, {"call": chosen})["call"]
        sweep.check(op, outputs, op.part("reference").reference(chosen, attributes), "float32", "float32")


@pytest.mark.parametrize("name", [name for name in LONG if name != "normalized_linear_attention"])
def test_a_stream_in_two_parts_is_the_whole(name, sweep, prepared, dynamic, coreai):
    op, program = OPS[name], dynamic(name)
    inputs, attributes = prepared(name)
    axis = op.inputs[0].shape.index("length")
    whole = _resized(op, inputs, 1, 41)
    first = coreai.execute(program, {"call": _resized(op, inputs, 1, 23)})["call"]
    rest = _resized(op, inputs, 1, 18, start=23) | {"initial_state": first["last_state"]}
    second = coreai.execute(program, {"call": rest})["call"]
    joined = {"y": np.concatenate([first["y"], second["y"]], axis), "last_state": second["last_state"]}
    sweep.check(op, joined, op.part("reference").reference(whole, attributes), "float32", "float32")


@pytest.mark.parametrize("decay", [None, -1e-4])
def test_equal_keys_do_not_cancel(decay, sweep):
    # Equal unit keys with a rate of 1, as of an image's flat regions: powers of the system's matrix grow to 5e17 in a chunk of 64.
    op, length, key = OPS["linear_attention"], 64, 16
    rng = np.random.Generator(np.random.PCG64(3))
    inputs = {
        "q": rng.standard_normal((1, length, key)),
        "k": np.full((1, length, key), key**-0.5),
        "v": rng.standard_normal((1, length, key)),
        "beta": np.ones((1, length, 1)),
    }
    if decay is not None:
        inputs["decay"] = np.full((1, length, 1), decay)
    inputs = {name: x.astype(np.float32) for name, x in inputs.items()}
    rule = "delta" if decay is None else "gated_delta"
    attributes = op.resolve({"q_num_heads": 1, "kv_num_heads": 1, "update_rule": rule})
    got = op.part("coreai").decompose({name: torch.from_numpy(x) for name, x in inputs.items()}, attributes)
    outputs = {a.name: x.numpy() for a, x in zip(op.outputs, got, strict=True)}
    sweep.check(op, outputs, op.part("reference").reference(inputs, attributes), "float32", "float32")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 4e-3)])
def test_softplus_keeps_the_digits_of_small_steps(dtype, bound):
    # In float16 the bound is some eight roundings of 2^-11; below -8 its results lose digits as subnormal numbers.
    x = torch.linspace(-30.0 if dtype == torch.float32 else -8.0, 60.0, 1501).to(dtype)
    got = OPS["selective_scan"].part("coreai")._softplus(x).double()
    assert torch.isfinite(got).all()
    assert ((got - torch.logaddexp(x.double(), torch.zeros(()).double())) / got).abs().max() <= bound
