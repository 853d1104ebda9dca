"""What the Core ML lowerings share: how one is registered, and short names for MIL's verbose operations.

A lowering sees a torch operator (`torch.ops.isthmus.NAME`, which survives torch.export) and emits operations of MIL, coremltools'
intermediate language, of opset iOS 16 and with tensors of rank 5 at most, which are Core ML's limits.

Precision. With `compute_precision=FLOAT16` coremltools makes every operation float16, whatever casts the lowering emits: casts are left
as they are, and the operations between them are cast again (coremltools 9.0, `FP16ComputePrecision`, whose only exceptions are chosen by
the converter's `op_selector`). A lowering can therefore not make a float32 island by itself, and each is written so that it holds in
float16. Where the converter is ours to call, `float16_around` keeps the operations of our lowerings in float32. Each lowering says what
both reach: peak of a channel over its root mean square error, worst channel, from the lowest to the highest case of the operator's table,
by the interpreter of `targets/coreml`, which rounds after each operation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
from coremltools.converters.mil import Builder, register_torch_op
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.block import curr_block

from ..errors import Reason, UnsupportedError
from ..op import DOMAIN, CustomOp

Var = Any
"""A variable of MIL (`coremltools.converters.mil.mil.Var`); coremltools has no types."""

mb: Any = Builder
"""MIL's builder, by the name that coremltools' own code gives it."""

Build = Callable[[dict[str, Var], dict[str, Any]], tuple[Var, ...]]
"""Emits the operations: from the inputs that are given, in float32 and of static shape, and all attributes to the outputs."""

LOWEST = -60000.0
"""Where sums of logarithms of decays end: exp of it is 0 in every dtype, and float16's numbers end at -65504."""

LOWEST_STEP = -1000.0
"""Where the logarithm of one token's decay ends: exp of it is 0 as well, and the sum over a chunk of 64 tokens is a float16 number."""

_PREFIX = f"{DOMAIN}_"

_SEQUENTIAL: ContextVar[bool] = ContextVar("sequential", default=False)


@contextlib.contextmanager
def sequential() -> Iterator[None]:
    """While the block runs, recurrences are lowered token by token to a `while_loop`, instead of in chunks.

    The program is smaller and its memory is that of one token, but loops stay off the Neural Engine, and in float16 the state is rounded
    at every token: it is for few tokens, or for float32. What the chunked and the sequential forms reach is said in each lowering.
    """
    token = _SEQUENTIAL.set(True)
    try:
        yield
    finally:
        _SEQUENTIAL.reset(token)


def is_sequential() -> bool:
    """Whether the lowering runs inside `sequential`."""
    return _SEQUENTIAL.get()


def float16_around(*operators: str) -> Any:
    """A compute precision for `coremltools.convert`: float16, but float32 inside the lowerings of the operators named (all when none is).

    Such islands run on the CPU or the GPU, never on the Neural Engine, which has no float32.
    """
    import coremltools as ct

    prefixes = tuple(f"{_PREFIX}{name}_" for name in operators) or (_PREFIX,)
    return ct.transform.FP16ComputePrecision(op_selector=lambda operation: not operation.name.startswith(prefixes))


def register_lowering(op: CustomOp, build: Build) -> None:
    """Registers the lowering of `torch.ops.isthmus.NAME` with coremltools' torch front end, in place of an earlier one."""

    def lower(context: Any, node: Any) -> None:
        inputs, attributes = _bind(op, context, node)
        block, before = curr_block(), len(curr_block().operations)
        outputs = build({name: _as(x, "fp32") for name, x in inputs.items()}, attributes)
        activation = types.builtin_to_string(inputs[op.inputs[0].name].dtype)
        outputs = tuple(x if a.wide else _as(x, activation) for a, x in zip(op.outputs, outputs, strict=True))
        _name(list(block.operations)[before:], f"{_PREFIX}{op.name}_")
        context.add(outputs if len(outputs) > 1 else outputs[0], torch_name=node.name)

    lower.__name__ = f"{DOMAIN}_{op.name}"
    register_torch_op(lower, torch_alias=[f"{DOMAIN}::{op.name}"], override=True)


def _bind(op: CustomOp, context: Any, node: Any) -> tuple[dict[str, Var], dict[str, Any]]:
    # The front end looks strings up among the names of values (coremltools 9.0, _get_bindings), so that update_rule="linear" would become
    # the output of a layer called linear: attributes are read as the node has them.
    keywords = {name: value[0] for name, value in (node.kwinputs or {}).items()}
    attributes = {a.name: a.type(keywords.pop(a.name)) for a in op.attributes if a.name in keywords}
    names = dict(zip((a.name for a in op.inputs), node.inputs, strict=False)) | keywords
    inputs = {name: context[value] for name, value in names.items() if value is not None}
    attributes = op.resolve(attributes)
    reasons = [
        Reason(
            f"has the dynamic shape {tuple(map(str, x.shape))}; the lowering's chunks are laid out for fixed sizes",
            where=f"{node.name}, {name}",
            fix="export with fixed sizes, one function for each",
        )
        for name, x in inputs.items()
        if not all(isinstance(size, int | np.integer) for size in x.shape)
    ]
    if reasons:
        raise UnsupportedError(f"the Core ML lowering of {op.name} takes static shapes", reasons=reasons)
    op.infer({name: tuple(int(size) for size in x.shape) for name, x in inputs.items()}, attributes)
    return inputs, attributes


def _name(operations: Sequence[Any], prefix: str) -> None:
    for operation in operations:
        operation.name = prefix + operation.name
        for block in operation.blocks:
            _name(list(block.operations), prefix)


def _as(x: Var, dtype: str) -> Var:
    return x if types.builtin_to_string(x.dtype) == dtype else mb.cast(x=x, dtype=dtype)


# Short names.


def sizes(x: Var) -> tuple[int, ...]:
    """The static shape."""
    return tuple(int(size) for size in x.shape)


def cut(x: Var, axis: int, start: int, stop: int, step: int = 1) -> Var:
    """x[..., start:stop:step, ...] on one axis."""
    shape = sizes(x)
    begin, end, stride = [0] * len(shape), list(shape), [1] * len(shape)
    begin[axis], end[axis], stride[axis] = start, stop, step
    return x if (start, stop, step) == (0, shape[axis], 1) else mb.slice_by_index(x=x, begin=begin, end=end, stride=stride)


def pad(x: Var, axis: int, before: int = 0, after: int = 0) -> Var:
    """Zeros before and after on one axis."""
    widths = [0] * (2 * x.rank)
    widths[2 * axis : 2 * axis + 2] = before, after
    return mb.pad(x=x, pad=widths, mode="constant", constant_val=0.0) if before or after else x


def shift(x: Var, axis: int, count: int) -> Var:
    """Every element moved by `count` places, towards the end when it is positive; zeros come in."""
    size = sizes(x)[axis]
    if count > 0:
        return pad(cut(x, axis, 0, size - count), axis, before=count)
    return pad(cut(x, axis, -count, size), axis, after=-count)


def bounded(log: Var, lowest: float = LOWEST) -> Var:
    """A sum of logarithms of decays, kept from leaving float16's range."""
    return mb.maximum(x=log, y=lowest)


def over_tokens(
    length: int,
    sequences: Sequence[Var],
    state: Var,
    output: tuple[int, ...],
    step: Callable[[list[Var], Var], tuple[Var, Var]],
    *,
    reverse: bool = False,
) -> tuple[Var, Var]:
    """A `while_loop` over tokens.

    Args:
        length: The number of tokens.
        sequences: What is read, tokens on axis 1.
        state: The state before the first token that is visited.
        output: The shape of all outputs together, tokens on axis 1.
        step: From each sequence's slice (tokens on axis 1, one of them) and the state to the output's slice and the next state.
        reverse: Whether tokens are visited from the last to the first.

    Returns:
        All outputs, and the last state.
    """

    def body(i: Var, state: Var, outputs: Var) -> tuple[Var, Var, Var]:
        at = mb.expand_dims(x=mb.sub(x=length - 1, y=i) if reverse else i, axes=[0])
        y, state = step([mb.gather(x=x, indices=at, axis=1) for x in sequences], state)
        return mb.add(x=i, y=1), state, mb.scatter(data=outputs, indices=at, updates=y, axis=1, mode="update")

    _, last, outputs = mb.while_loop(
        _cond=lambda i, state, outputs: mb.less(x=i, y=length),  # noqa: ARG005 - MIL passes every carried value
        _body=body,
        loop_vars=(mb.const(val=np.int32(0)), state, mb.fill(shape=output, value=np.float32(0))),
    )
    return outputs, last
