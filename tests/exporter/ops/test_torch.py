"""The torch operators as torch sees them: `opcheck`, export with dynamic sizes, and `exporter.ops.torch_library`."""

import numpy as np
import pytest
import torch
from torch.export import Dim

from isthmus.exporter.errors import UsageError
from isthmus.exporter.op import OPS
from isthmus.exporter.ops.torch_library import signature, wide

CASES = {
    "selective_scan": ("everything", "everything, reversed", "short, odd channels"),
    "linear_attention": ("linear, grouped heads", "gated, odd sizes", "delta", "gated delta, one token"),
    "normalized_linear_attention": ("short, odd sizes", "more keys than queries"),
    "rwkv7": ("short, odd sizes", "more values than keys"),
    "causal_conv1d": ("everything", "shorter than the carry"),
}
ROWS = [(name, case) for name, cases in CASES.items() for case in cases]

for _name in OPS:
    OPS[_name].part("torch")


def _tensors(inputs):
    return {name: torch.from_numpy(x.copy()) for name, x in inputs.items()}


@pytest.mark.parametrize(("name", "case"), ROWS)
def test_opcheck(name, case, sweep):
    inputs, attributes, _ = sweep.prepared(name, case, "float32")
    operator = getattr(torch.ops.isthmus, name).default
    results = torch.library.opcheck(operator, (), _tensors(inputs) | attributes)
    assert set(results.values()) == {"SUCCESS"}


class _Call(torch.nn.Module):
    def __init__(self, name, inputs, attributes):
        super().__init__()
        self.operator, self.inputs, self.attributes = getattr(torch.ops.isthmus, name), inputs, attributes

    def forward(self, *tensors):
        return self.operator(**dict(zip(self.inputs, tensors, strict=True)), **self.attributes)


@pytest.mark.parametrize("name", list(CASES))
def test_one_export_takes_every_batch_and_length(name, sweep):
    op, case = OPS[name], CASES[name][0]
    inputs, attributes, _ = sweep.prepared(name, case, "float32")
    dims = {"batch": Dim("batch", max=64), "length": Dim("length", max=4096), "tokens": Dim("tokens", max=4096)}
    dynamic = tuple({i: dims[dim] for i, dim in enumerate(a.shape) if dim in dims} for a in op.inputs if a.name in inputs)

    def resized(batch, length):
        sizes = {"batch": batch, "length": length, "tokens": length + 3}
        chosen = {}
        for a in op.inputs:
            if a.name in inputs:
                x = inputs[a.name]
                for axis, dim in enumerate(a.shape):
                    if dim in sizes:
                        x = x.take(np.arange(sizes[dim]) % x.shape[axis], axis)
                chosen[a.name] = x
        return chosen

    example = tuple(_tensors(resized(2, 9)).values())
    program = torch.export.export(_Call(name, tuple(inputs), attributes), example, dynamic_shapes={"tensors": dynamic})
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(getattr(torch.ops.isthmus, name).default) == 1
    for batch, length in ((1, 1), (3, 70), (2, 129)):
        chosen = resized(batch, length)
        results = program.module()(*_tensors(chosen).values())
        results = results if isinstance(results, tuple) else (results,)
        outputs = {a.name: x.numpy() for a, x in zip(op.outputs, results, strict=True)}
        sweep.check(op, outputs, op.part("reference").reference(chosen, attributes), "float32", "float32")


@pytest.mark.parametrize("name", list(CASES))
def test_no_output_aliases_an_input(name, sweep):
    inputs, attributes, _ = sweep.prepared(name, CASES[name][0], "float32")
    tensors = _tensors(inputs)
    before = {n: x.clone() for n, x in tensors.items()}
    results = getattr(torch.ops.isthmus, name)(**tensors, **attributes)
    for result in results if isinstance(results, tuple) else (results,):
        assert result.untyped_storage().data_ptr() not in {x.untyped_storage().data_ptr() for x in tensors.values()}
        result.zero_()
    assert all(torch.equal(x, before[n]) for n, x in tensors.items())


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_fake_kernel_gives_the_shapes_and_dtypes_of_the_real_one(name, dtype, sweep):
    inputs, attributes, _ = sweep.prepared(name, CASES[name][0], "float32")
    wides = {a.name for a in OPS[name].inputs if a.wide}
    tensors = {n: x.to(wide(dtype) if n in wides else dtype) for n, x in _tensors(inputs).items()}
    operator = getattr(torch.ops.isthmus, name)
    real = operator(**tensors, **attributes)
    fake = operator(**{n: x.to("meta") for n, x in tensors.items()}, **attributes)
    for x, y in zip(*((r if isinstance(r, tuple) else (r,)) for r in (real, fake)), strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
        assert y.device.type == "meta"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_inputs_that_do_not_fit_give_every_reason(device):
    shapes = {"u": (2, 7, 6), "delta": (2, 8, 6), "A": (6, 4), "B": (2, 7, 4), "C": (2, 7, 4), "D": (5,)}
    tensors = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
    with pytest.raises(UsageError) as caught:
        torch.ops.isthmus.selective_scan(**tensors)
    assert {reason.where for reason in caught.value.reasons} == {"delta", "D"}


def test_positional_arguments_are_those_of_the_schema(sweep):
    inputs, attributes, _ = sweep.prepared("selective_scan", "everything", "float32")
    tensors = _tensors(inputs)
    positional = [tensors.get(a.name) for a in OPS["selective_scan"].inputs]
    by_position = torch.ops.isthmus.selective_scan(*positional, **attributes)
    by_name = torch.ops.isthmus.selective_scan(**tensors, **attributes)
    assert all(torch.equal(x, y) for x, y in zip(by_position, by_name, strict=True))


def test_signatures():
    assert signature(OPS["causal_conv1d"]) == (
        "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? initial_state=None, *, bool silu=False) -> (Tensor y, Tensor last_state)"
    )
    assert signature(OPS["normalized_linear_attention"]) == (
        "(Tensor q, Tensor k, Tensor v, *, int num_heads, float eps=1e-15) -> (Tensor y)"
    )


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_wide(dtype, expected):
    assert wide(dtype) is expected


@pytest.mark.parametrize("name", list(CASES))
def test_a_gradient_is_refused_and_not_lost(name, sweep):
    inputs, attributes, _ = sweep.prepared(name, CASES[name][0], "float32")
    tensors = _tensors(inputs)
    tensors[next(iter(tensors))].requires_grad_()
    results = getattr(torch.ops.isthmus, name)(**tensors, **attributes)
    y = results[0] if isinstance(results, tuple) else results
    with pytest.raises(UsageError, match=f"isthmus::{name} has no gradient"):
        y.sum().backward()
