"""The guard: what it refuses, how it says so, and that it refuses nothing else."""

import collections
import inspect
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isthmus.exporter.quiet import quiet
from isthmus.exporter.spec import MODELS
from isthmus.exporter.trace import trace
from isthmus.targets.coreml import lowerings
from isthmus.targets.coreml.support import DROPPED, NO_EFFECT, unsupported

from ...architectures import marks_of

# torch 2.13 copies a class that it deprecates itself, when a program is copied.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

SMALL = [
    pytest.param(name, marks=marks_of(name, quick=name in ("dit-tiny", "sana-tiny", "diffussm-tiny"), first=False))
    for name in MODELS
    if name.endswith("-tiny")
]
X = torch.zeros(2, 3, 4)
IMAGE = torch.zeros(1, 3, 6, 6)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def exported(module, *inputs):
    module = module if isinstance(module, nn.Module) else Call(module)
    with torch.no_grad(), quiet("torch.export", "torch.fx"):
        return torch.export.export(module, inputs, strict=False)


def reasons(module, *inputs, target="iOS18"):
    return unsupported(exported(module, *inputs), target)


REFUSED = {
    "an operator that nobody has": (torch.lgamma, (X,), "the operator aten.lgamma.default has no lowering to Core ML"),
    "bits": (lambda x: x | 5, (torch.zeros(2, dtype=torch.int32),), "the operator aten.bitwise_or.Scalar has no lowering"),
    "an inverse": (torch.linalg.inv, (torch.eye(3),), "aten.linalg_inv.default has no operation in MIL"),
    "a loss": (lambda x: F.cross_entropy(x, torch.tensor([1, 2])), (torch.zeros(2, 4),), "aten.nll_loss_nd.default is a loss"),
    "random numbers": (lambda x: x + torch.randn_like(x), (X,), "aten.randn_like.default draws random numbers"),
    "dropout": (lambda x: F.dropout(x, 0.5, training=True), (X,), "aten.native_dropout.default with train=True draws random numbers"),
    "attention with dropout": (
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
        (X,),
        "aten.scaled_dot_product_attention.default with dropout_p=0.1 draws random numbers",
    ),
    "indices of a pooling": (
        lambda x: F.max_pool2d(x, 2, return_indices=True)[1],
        (IMAGE,),
        "aten.max_pool2d_with_indices.default with its indices (return_indices=True)",
    ),
    "bicubic sampling": (
        lambda x: F.grid_sample(x, torch.zeros(1, 2, 2, 2), "bicubic", align_corners=False),
        (IMAGE,),
        "aten.grid_sampler.default with interpolation_mode=2 (bicubic)",
    ),
    "complex numbers": (lambda x: torch.fft.fft(x).abs(), (X,), "has complex numbers (complex64), which Core ML lacks"),
    "float64": (lambda x: x.double().cumsum(-1).float(), (X,), "aten.cumsum.default computes in float64"),
    "six axes": (lambda x: x.reshape(2, 3, 1, 2, 2, 1) + 1, (X,), "aten.view.default has 6 axes (2, 3, 1, 2, 2, 1)"),
    "an input of six axes": (lambda x: x.flatten(0, 1) + 1, (torch.zeros(1, 2, 1, 2, 1, 2),), "the input inputs_0 has 6 axes"),
    "large integers": (lambda x: x + torch.tensor([2**40]), (torch.zeros(2, dtype=torch.int64),), f"integers from {2**40} to {2**40}"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_that_nobody_lowers_is_refused_by_name(name):
    module, inputs, what = REFUSED[name]
    found = reasons(module, *inputs)
    assert any(what in reason.what for reason in found), found
    assert all(reason.where for reason in found)


def test_a_size_that_varies_is_refused_where_a_matrix_would_depend_on_it():
    height = {0: {2: torch.export.Dim("height", min=2, max=16)}}
    resize = Call(lambda x: F.interpolate(x, scale_factor=1.5, mode="bicubic"))
    with torch.no_grad(), quiet("torch.export", "torch.fx"):
        program = torch.export.export(resize, (IMAGE,), dynamic_shapes={"inputs": tuple(height.values())}, strict=False)
    found = unsupported(program, "iOS18")
    assert ["aten.upsample_bicubic2d.vec of an image whose size varies" in reason.what for reason in found] == [True]


class Layer(nn.Module):
    def forward(self, x):
        return torch.lgamma(x) + torch.randn_like(x)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Layer() for _ in range(6))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return torch.digamma(x)


def test_all_reasons_come_at_once_with_the_modules_that_call():
    found = reasons(Stack(), X)
    assert [(reason.what.partition(" draws")[0], reason.where) for reason in found] == [
        ("the operator aten.lgamma.default has no lowering to Core ML", "blocks.0, blocks.1, blocks.2 and 3 more"),
        ("aten.randn_like.default", "blocks.0, blocks.1, blocks.2 and 3 more"),
        ("the operator aten.digamma.default has no lowering to Core ML", "digamma"),
    ]
    assert all(reason.fix for reason in found)


def test_branches_and_loops_are_looked_into():
    def branch(x):
        return torch.cond(x.sum() > 0, torch.lgamma, torch.sin, (x,))

    def loop(x):
        return torch.while_loop(lambda i, _: i < 3, lambda i, x: (i + 1, torch.digamma(x)), (torch.tensor(0), x))

    assert ["aten.lgamma.default" in r.what for r in reasons(branch, X)] == [True]
    assert ["aten.digamma.default" in r.what for r in reasons(loop, X)] == [True]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.reshape(2, 3, 1, 2, 2, 1).permute(0, 3, 1, 5, 2, 4).reshape(4, 6),
        lambda x: torch.einsum("abcdef->afbdce", x.reshape(2, 3, 1, 2, 2, 1)).reshape(4, 6),
        lambda x: x.double().float() + 1,
        lambda x: x + torch.arange(4, dtype=torch.float64).cumsum(0).float(),
        lambda x: F.dropout(x, 0.5, training=False) + 1,
        lambda x: torch.add(x, x, alpha=2),
        lambda x: torch.arange(4, dtype=torch.float32) + x,
        lambda x: torch.cond(x.sum() > 0, torch.cos, torch.sin, (x,)),
    ],
)
def test_what_can_be_lowered_is_not_refused(function):
    assert reasons(function, X) == []


@pytest.mark.parametrize("name", SMALL)
def test_models_of_the_registry_are_not_refused(name):
    spec = MODELS[name].spec()
    inputs = spec.inputs(np.random.Generator(np.random.PCG64(0)), spec.sizes)
    assert unsupported(trace(spec.build(), inputs), "iOS16") == []


# The table of keywords that coremltools drops.


def _taken_apart_no_further(function, *inputs):
    """A program that `decomposed` takes for one of its own."""
    program = exported(function, *inputs).run_decompositions({})
    program.graph_module.meta[lowerings._DONE] = True
    return program


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda x: torch.add(x, x, alpha=2), "aten.add.Tensor with alpha=2: coremltools drops alpha"),
        (lambda x: x.int().sum(-1, dtype=torch.float32), "aten.sum.dim_IntList with dtype=float32: coremltools drops dtype"),
        (lambda x: x + torch.arange(4, dtype=torch.float32), "aten.arange.default with dtype=float32: coremltools drops dtype"),
        (
            lambda x: F.scaled_dot_product_attention(x[None], x[None, :1], x[None, :1], enable_gqa=True),
            "aten.scaled_dot_product_attention.default with enable_gqa=True: coremltools drops enable_gqa",
        ),
    ],
)
def test_a_keyword_that_is_dropped_is_refused_by_name(function, what):
    found = unsupported(_taken_apart_no_further(function, X), "iOS18")
    assert [reason.what for reason in found] == [what]


def test_a_keyword_with_its_default_is_not_refused():
    program = _taken_apart_no_further(lambda x: torch.add(x, x, alpha=1) + torch.arange(4, dtype=torch.int64).sum(dtype=torch.int64), X)
    assert unsupported(program, "iOS18") == []


def test_the_table_is_what_coremltools_reads():
    """Every keyword of an operator that the function of coremltools for it does not name is in the table, and no other."""
    with quiet("coremltools"):
        from coremltools.converters.mil.frontend.torch import ops
        from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    from isthmus.targets.coreml.lowerings import binding

    shared = {"_get_inputs", "_get_kwinputs", "_get_bindings", "register_torch_op"}

    def source(function, seen):
        if function in seen:
            return ""
        seen.add(function)
        text = inspect.getsource(function)
        called = {function.__globals__.get(name) for name in re.findall(r"\b(\w+)\(", text) if name not in shared}
        return text + "".join(source(f, seen) for f in called if inspect.isfunction(f) and f.__module__ == ops.__name__)

    overloads = collections.defaultdict(list)
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        packet = getattr(torch.ops.aten, base, None) if namespace == "aten" and (base.startswith("__") or not base.endswith("_")) else None
        operator = getattr(packet, overload or "default", None)
        if operator is not None and not overload.endswith("out"):
            overloads[lowerings.kind_of(operator)].append(operator)
    found = collections.defaultdict(set)
    theirs = {kind: binding.INSTALLED.get(kind) or function for kind, function in _TORCH_OPS_REGISTRY.name_to_func_mapping.items()}
    for kind in lowerings.known_kinds() & set(overloads):
        text = source(theirs[kind], set())
        for operator in overloads[kind]:
            keywords = {a.name for a in operator._schema.arguments if a.kwarg_only} - NO_EFFECT - {"out"}
            found[kind] |= {keyword for keyword in keywords if f'"{keyword}"' not in text and f"'{keyword}'" not in text}
    # Drawing random numbers is refused as such; the ranges of symbols are what torch itself has checked.
    elsewhere = {"rand", "rand_like", "randint", "randint.low", "randn", "sym_constrain_range", "sym_constrain_range_for_size"}
    dropped = {kind: keywords for kind, keywords in found.items() if keywords and kind not in elsewhere | lowerings.lowered_kinds()}
    assert dropped == {kind: set(keywords) for kind, keywords in DROPPED.items()}
