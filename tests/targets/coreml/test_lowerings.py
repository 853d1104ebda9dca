"""Our lowerings against torch, over every call of `calls_*.py`, and what plain coremltools makes of the same calls."""

import functools
import importlib.util
import inspect
import pathlib
import unittest.mock
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from isthmus.exporter.memory import settled
from isthmus.exporter.quiet import quiet
from isthmus.targets.coreml import lowerings
from isthmus.targets.coreml.convert import convert
from isthmus.targets.coreml.interpreter import OPERATIONS, Interpreter, load
from isthmus.targets.coreml.interpreter.program import operations_in
from isthmus.targets.coreml.lowerings.attention import guarded
from isthmus.targets.coreml.support import unsupported

with quiet("coremltools"):  # it reports on import that it was not tested with this torch, and that no Core ML is here
    import coremltools as ct
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    lowerings.register()
    from isthmus.targets.coreml.lowerings import binding


pytestmark = [
    # torch 2.13 copies a class that it deprecates itself, when a program is copied.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # It deprecates scatter(reduce=) for a tensor, which models call still.
    pytest.mark.filterwarnings("ignore:The reduce argument of torch.scatter:UserWarning"),
]


def _load(name):
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


calls = _load("calls")
FAMILIES = {
    name: family
    for file in sorted(pathlib.Path(__file__).parent.glob("calls_*.py"))
    for name, family in _load(file.stem).families_of(calls).items()
}


class Calls(torch.nn.Module):
    """Makes several calls on the same inputs; all results in a row."""

    def __init__(self, functions, names):
        super().__init__()
        self.functions, self.names = functions, names

    def results(self, *inputs):
        given = dict(zip(self.names, inputs, strict=True))
        for function in self.functions:
            named = [n for n, p in inspect.signature(function).parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
            yield _flat(function(*(given[name] for name in named)))

    def forward(self, *inputs):
        return tuple(tensor for result in self.results(*inputs) for tensor in result)


def _flat(value):
    return [tensor for v in value for tensor in _flat(v)] if isinstance(value, tuple | list) else [value]


@contextmanager
def plain():
    """coremltools as it comes, without our lowerings."""
    theirs = {kind: function for kind, function in binding.INSTALLED.items() if function is not None}
    mapping = {kind: f for kind, f in _TORCH_OPS_REGISTRY.name_to_func_mapping.items() if kind not in binding.INSTALLED}
    with unittest.mock.patch.object(_TORCH_OPS_REGISTRY, "name_to_func_mapping", mapping | theirs):
        yield


def converted(program, precision="fp32", target="iOS18"):
    named = {"fp32": ct.precision.FLOAT32, "fp16": ct.precision.FLOAT16}
    # coremltools checks the program after every pass, which is half of the time that a conversion takes.
    with quiet("coremltools"), unittest.mock.patch("coremltools.converters.mil.mil.Program.validate", return_value=None), settled():
        return ct.convert(
            program, minimum_deployment_target=getattr(ct.target, target), skip_model_load=True, compute_precision=named[precision]
        )


def run(model, inputs):
    interpreter = Interpreter(load(model))
    return list(interpreter.run({key: x.numpy() for key, x in zip(interpreter.inputs, inputs.values(), strict=True)}).values())


def _exported(module, inputs):
    with torch.no_grad(), quiet("torch.export", "torch.fx"):
        return torch.export.export(module, tuple(inputs), strict=False)


def _module(pairs):
    """A module of the calls (family, name), which are of families without inputs of the same name; and its inputs."""
    functions = [FAMILIES[family].calls[name] for family, name in pairs]
    every = {}
    for family, _ in pairs:
        every |= FAMILIES[family].inputs
    names = {n for f in functions for n, p in inspect.signature(f).parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY}
    inputs = {name: x for name, x in every.items() if name in names}
    return Calls(functions, list(inputs)), inputs


def _grouped(module, inputs, got):
    """What torch gives for each call, and what was got."""
    got = iter(got)
    with torch.no_grad():
        return [[(y.numpy(), next(got)) for y in result] for result in module.results(*inputs.values())]


EXERCISED = set()
EMITTED = set()
REFUSED = {}


@functools.cache
def _family(family):
    """For every call of a family the results of torch and of the ML Program."""
    table = lowerings.table()
    ours = {operator: table[operator] for operator in lowerings.DECOMPOSITIONS}

    def recorded(operator, function):
        @functools.wraps(function)
        def call(*arguments, **keywords):
            result = function(*arguments, **keywords)
            if result is not NotImplemented:
                EXERCISED.add(operator)
            return result

        return call

    module, inputs = _module([(family, name) for name in FAMILIES[family].calls])
    program = _exported(module, inputs.values())
    with unittest.mock.patch.dict(table, {operator: recorded(operator, function) for operator, function in ours.items()}):
        program = guarded(lowerings.decomposed(program))
    REFUSED[family] = unsupported(program, "iOS16")
    kinds = {lowerings.kind_of(node.target) for node in program.graph.nodes if node.op == "call_function"}
    EXERCISED.update(operator for operator in lowerings.LOWERINGS if lowerings.kind_of(operator) in kinds)
    model = converted(program)
    EMITTED.update(operation.op_type for operation in operations_in(load(model).functions["main"]))
    return dict(zip(FAMILIES[family].calls, _grouped(module, inputs, run(model, inputs)), strict=True))


def agrees(expected, got):
    """Whether two results are equal up to the rounding of float32."""
    if got.shape != expected.shape and (got.size, expected.size) != (1, 1):
        return False
    expected, got = expected.astype(np.float64), got.reshape(expected.shape).astype(np.float64)
    finite = np.abs(expected[np.isfinite(expected)])
    return np.allclose(got, expected, rtol=3e-5, atol=3e-6 * finite.max(initial=1e-3), equal_nan=True)


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in FAMILIES for name in FAMILIES[family].calls])
def test_the_call_is_that_of_torch(family, name):
    for expected, got in _family(family)[name]:
        assert agrees(expected, got), f"{got} is not {expected}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_guard_lets_every_call_through(family):
    _family(family)
    assert REFUSED[family] == []


# What torch.export takes apart before any table of decompositions is asked.
ELSEWHERE = {"aten.upsample_bilinear2d.default", "aten.upsample_bicubic2d.default"}


def test_every_lowering_is_exercised():
    for family in FAMILIES:
        _family(family)
    registered = {*lowerings.DECOMPOSITIONS, *lowerings.LOWERINGS}
    assert {str(operator) for operator in registered - EXERCISED} == ELSEWHERE


def test_the_interpreter_knows_every_operation_that_is_emitted():
    for family in FAMILIES:
        _family(family)
    assert EMITTED - set(OPERATIONS) == {"const"}


# Plain coremltools 9.0: when one of these tests fails, what it names was mended, and our lowering may go.

SILENT = [
    ("activations", "gelu, tanh"),
    ("activations", "elu, scales"),
    ("activations", "softplus, threshold"),
    ("activations", "log_softmax"),
    ("arithmetic", "add, alpha"),
    ("arithmetic", "add, number and alpha"),
    ("arithmetic", "sub, alpha"),
    ("arithmetic", "rsub, tensor"),
    ("arithmetic", "reciprocal"),
    ("arithmetic", "number by tensor"),
    ("functions", "log of zero"),
    ("integers", "mean, dtype"),
    ("reductions", "var, all"),
    ("reductions", "argmax, all"),
    ("reductions", "argmax, all, kept"),
    ("reductions", "any, numbers"),
    ("normalization", "instance_norm, kept moments"),
    ("normalization", "rms_norm"),
    ("convolutions", "transposed, uneven"),
    ("pooling", "avg, ceil"),
    ("pooling", "avg, one axis, ceil"),
    ("resizing", "nearest, scale_factor 1.3, recompute_scale_factor True"),
    ("resizing", "bilinear, size (5, 7)"),
    ("resizing", "bilinear, antialias, (4, 5), False"),
    ("resizing", "linear"),
]


@functools.cache
def _plain(family):
    names = [name for f, name in SILENT if f == family]
    module, inputs = _module([(family, name) for name in names])
    with plain():
        model = converted(_exported(module, inputs.values()).run_decompositions({}))
    return dict(zip(names, _grouped(module, inputs, run(model, inputs)), strict=True))


@pytest.mark.parametrize(("family", "name"), SILENT)
def test_plain_coremltools_converts_it_wrongly_and_says_nothing(family, name):
    assert not all(agrees(expected, got) for expected, got in _plain(family)[name])


@pytest.mark.parametrize(
    "operator",
    "celu log_sigmoid remainder.Scalar_Tensor fmod.Tensor trunc lerp.Scalar addcmul where.ScalarOther alias diff cdist prod.dim_int cummax "
    "var_mean.correction aminmax _upsample_nearest_exact2d.vec upsample_bicubic2d.vec unfold bucketize.Tensor scatter_reduce.two "
    "index_add median.dim sort.stable diag_embed rot90 new_ones round.decimals".split(),
)
def test_plain_coremltools_lacks_it(operator):
    name, _, overload = operator.partition(".")
    found = getattr(getattr(torch.ops.aten, name), overload or "default")
    assert lowerings.kind_of(found) not in lowerings.known_kinds()


# float16.


def _halves(function, *arrays):
    """The result of a function as a float16 program, in float64."""

    class Call(torch.nn.Module):
        def forward(self, *inputs):
            return function(*inputs)

    inputs = {f"x{i}": torch.from_numpy(np.asarray(x, np.float32)) for i, x in enumerate(arrays)}
    return run(converted(lowerings.decomposed(_exported(Call(), inputs.values())), "fp16"), inputs)[0].astype(np.float64)


ROWS = {
    "large": 60000.0 * np.sin(np.arange(1, 65)),
    "beyond the square root of the largest": 300.0 * np.cos(np.arange(64.0)),
    "ordinary": np.cos(np.arange(64.0)),
    "small": 1e-3 * np.cos(np.arange(64.0)),
    "at the epsilon": 1e-5 * np.cos(np.arange(64.0)),
    "one number": np.eye(1, 64)[0] * 60000.0,
    "constant": np.full(64, 255.0),
    "zero": np.zeros(64),
}


@pytest.mark.parametrize("eps", [None, 1e-6, 1e-5, 0.0])
def test_rms_norm_holds_in_float16(eps):
    x = np.float16(np.stack(list(ROWS.values()))).astype(np.float64)
    weight = np.linspace(-2, 2, 64).astype(np.float32)
    got = _halves(lambda x: F.rms_norm(x, (64,), torch.from_numpy(weight), eps), x)
    mean = (x * x).mean(axis=1, keepdims=True) + (np.finfo(np.float32).eps if eps is None else eps)
    expected = x / np.sqrt(np.where(mean == 0, 1.0, mean)) * weight
    for name, row, of in zip(ROWS, got, expected, strict=True):
        # Five operations, each rounded to 11 bits; float16's numbers below 6e-5 have fewer, which concerns the smallest rows alone.
        coarse = 2e-2 if name == "at the epsilon" else 3e-3
        np.testing.assert_allclose(row, of, rtol=0, atol=coarse * max(np.abs(of).max(), 1e-4), err_msg=name)


def test_plain_coremltools_has_no_rms_norm_of_zeros():
    class Norm(torch.nn.Module):
        def forward(self, x):
            return F.rms_norm(x, (64,), None, 1e-6)

    x = torch.zeros(2, 64)
    with plain():
        model = converted(_exported(Norm(), [x]).run_decompositions({}), "fp16")
    (got,) = run(model, {"x": x})
    assert np.isnan(got).any()


@pytest.mark.parametrize(
    ("function", "oracle"),
    [
        (lambda x: x.std(-1), lambda x: x.std(-1, ddof=1)),
        (lambda x: x.std(-1, correction=0), lambda x: x.std(-1)),
        (lambda x: torch.hypot(x, x), lambda x: np.sqrt(2.0) * np.abs(x)),
        (lambda x: F.log_softmax(x, -1), lambda x: x - _log_sum_exp(x)),
        (F.logsigmoid, lambda x: -np.logaddexp(0.0, -x)),
        (F.softplus, lambda x: np.logaddexp(0.0, x)),
        (lambda x: F.group_norm(x, 2), lambda x: np.concatenate([_standard(x[:, :32]), _standard(x[:, 32:])], 1)),
    ],
    ids=["std", "std, biased", "hypot", "log_softmax", "logsigmoid", "softplus", "group_norm"],
)  # fmt: skip
def test_large_numbers_hold_in_float16(function, oracle):
    x = np.float16(1000.0 * np.stack([np.sin(np.arange(64.0)), np.cos(np.arange(64.0))])).astype(np.float64)
    got = _halves(function, x)
    expected = oracle(x)
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-3 * np.abs(expected).max())


def _log_sum_exp(x):
    peak = x.max(-1, keepdims=True)
    return peak + np.log(np.exp(x - peak).sum(-1, keepdims=True))


def _standard(x):
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)


class Tokens(torch.nn.Module):
    def forward(self, ids):
        return ids.squeeze(1) + 1, ids.flatten(1)[:, torch.tensor([2, 0])] * 2


def test_integers_keep_their_range_in_float16():
    ids = torch.tensor([[[49407, 1, -7, 70000]]], dtype=torch.int32)
    expected = Tokens()(ids)
    program = _exported(Tokens(), [ids])
    for got, of in zip(run(convert(program, "fp16"), {"ids": ids}), expected, strict=True):
        np.testing.assert_array_equal(got, of.numpy())
    with plain():
        results = run(converted(program.run_decompositions({}), "fp16"), {"ids": ids})
    assert not all(np.array_equal(got, of.numpy()) for got, of in zip(results, expected, strict=True))


class Varying(torch.nn.Module):
    """What is lowered to MIL in another form where sizes vary, and some of what is not."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.GroupNorm(2, 8)
        self.slopes = torch.nn.PReLU(8)

    def forward(self, x):
        y = self.slopes(self.norm(x))
        y = F.gelu(y, approximate="tanh") + torch.add(y, y, alpha=2) + x.std(1, keepdim=True) + torch.fmod(x, 0.7)
        tokens = y.flatten(2).transpose(1, 2)
        return F.rms_norm(tokens, (8,)) + F.layer_norm(tokens, (8,), None, torch.arange(8.0)) + tokens.reciprocal()


def test_sizes_may_vary():
    torch.manual_seed(0)
    module = Varying().eval()
    dims = {0: torch.export.Dim("batch", min=2, max=8), 2: torch.export.Dim("height", min=2, max=16)}
    with torch.no_grad(), quiet("torch.export", "torch.fx"):
        program = torch.export.export(module, (calls.normal(2, 8, 4, 5),), dynamic_shapes=({0: dims[0], 2: dims[2]},), strict=False)
    interpreter = Interpreter(load(converted(lowerings.decomposed(program))))
    for shape in ((2, 8, 4, 5), (3, 8, 7, 5)):
        x = calls.normal(*shape, seed=1)
        (got,) = interpreter.run(dict.fromkeys(interpreter.inputs, x.numpy())).values()
        with torch.no_grad():
            assert agrees(module(x).numpy(), got)


def test_registering_again_changes_nothing():
    before = dict(_TORCH_OPS_REGISTRY.name_to_func_mapping)
    lowerings.register()
    assert _TORCH_OPS_REGISTRY.name_to_func_mapping == before


def test_what_is_decomposed_is_returned_as_it_is():
    class Scaled(torch.nn.Module):
        def forward(self, x):
            return torch.add(x, x, alpha=2) + 1

    once = lowerings.decomposed(_exported(Scaled(), [torch.zeros(2)]))
    assert lowerings.decomposed(once) is once
    assert not any("alpha" in node.kwargs for node in once.graph.nodes)


def test_branches_are_decomposed_as_well():
    class Branch(torch.nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: torch.add(x, x, alpha=2), lambda x: torch.fmod(x, 2.0), (x,))

    program = lowerings.decomposed(_exported(Branch(), [torch.ones(3)]))
    inner = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule) and m is not program.graph_module]
    targets = {str(node.target) for m in inner for node in m.graph.nodes}
    assert "aten.remainder.Scalar" in targets
    assert "aten.fmod.Scalar" not in targets
    assert not any("alpha" in node.kwargs for m in inner for node in m.graph.nodes)


def test_attention_and_normalisations_stay_whole():
    class Block(torch.nn.Module):
        def forward(self, x):
            y = F.scaled_dot_product_attention(x, x, x)
            return F.rms_norm(F.layer_norm(y, (8,)), (8,)) + F.gelu(y, approximate="tanh")

    program = lowerings.decomposed(_exported(Block(), [torch.ones(1, 2, 4, 8)]))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets == {
        "aten.scaled_dot_product_attention.default",
        "aten.layer_norm.default",
        "aten.rms_norm.default",
        "aten.gelu.default",
        "aten.add.Tensor",
    }
    kinds = [op.op_type for op in load(converted(program)).functions["main"].operations]
    assert "scaled_dot_product_attention" in kinds
    assert "gelu" in kinds
