"""Makes torch operators of the schemas: `torch.ops.isthmus.NAME`, with a fake kernel that the schema implies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..op import DOMAIN, CustomOp

_TYPES = {bool: "bool", int: "int", float: "float", str: "str"}

# Lives as long as the process: torch forgets the operators of a library that is collected.
_LIBRARY: Any = torch.library.Library(DOMAIN, "FRAGMENT")  # type: ignore[no-untyped-call]  # untyped

Compute = Callable[[dict[str, Tensor], dict[str, Any]], tuple[Tensor, ...]]
"""Computes the outputs from the inputs that are given and all attributes. The inputs fit each other, and no output may alias an input."""


def define(op: CustomOp, compute: Compute) -> Callable[..., Any]:
    """Defines `torch.ops.isthmus.NAME` and returns it.

    Its arguments are the schema's inputs in order, then its attributes as keywords; its results are the schema's outputs: one tensor, or a
    tuple. Outputs have the dtype of the first input, wide ones float32 at least. Calls with inputs that do not fit raise UsageError with
    every reason. The operator has no gradient: a backward pass through it raises UsageError.

    Args:
        op: The operator.
        compute: Its kernel, for every device.
    """
    _LIBRARY.define(f"{op.name}{signature(op)}", tags=(torch.Tag.pt2_compliant_tag,))

    def bind(tensors: tuple[Tensor | None, ...], keywords: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        attributes = {a.name: keywords.pop(a.name) for a in op.attributes if a.name in keywords}
        given = dict(zip((a.name for a in op.inputs), tensors, strict=False)) | keywords
        inputs = {name: tensor for name, tensor in given.items() if tensor is not None}
        attributes = op.resolve(attributes)
        return inputs, attributes, op.infer({name: tuple(t.shape) for name, t in inputs.items()}, attributes)

    def kernel(*tensors: Tensor | None, **keywords: Any) -> Any:
        inputs, attributes, _ = bind(tensors, keywords)
        outputs = compute(inputs, attributes)
        return outputs if len(outputs) > 1 else outputs[0]

    def fake(*tensors: Tensor | None, **keywords: Any) -> Any:
        inputs, _, sizes = bind(tensors, keywords)
        first = inputs[op.inputs[0].name]
        shapes = op.output_shapes(sizes)
        outputs = tuple(first.new_empty(shapes[a.name], dtype=wide(first.dtype) if a.wide else first.dtype) for a in op.outputs)
        return outputs if len(outputs) > 1 else outputs[0]

    def backward(*_: Any) -> Any:
        raise UsageError(
            f"{DOMAIN}::{op.name} has no gradient", hint="train with a form in plain torch operators, and export with this one"
        )

    _LIBRARY.impl(op.name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{DOMAIN}::{op.name}", fake, lib=_LIBRARY)
    # Without it torch would let a gradient end here, with no more than a warning.
    torch.library.register_autograd(f"{DOMAIN}::{op.name}", backward, lib=_LIBRARY)
    return getattr(getattr(torch.ops, DOMAIN), op.name)  # type: ignore[no-any-return]  # untyped


def signature(op: CustomOp) -> str:
    """The operator's arguments and results in torch's schema language."""
    arguments = [f"Tensor? {a.name}=None" if a.optional else f"Tensor {a.name}" for a in op.inputs]
    attributes = [f"{_TYPES[a.type]} {a.name}" + ("" if a.default is None else f"={a.default}") for a in op.attributes]
    results = ", ".join(f"Tensor {a.name}" for a in op.outputs)
    keywords = ["*", *attributes] if attributes else []
    return f"({', '.join([*arguments, *keywords])}) -> ({results})"


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which states are kept and sums are made beside activations of `dtype`: float32, or float64 beside float64."""
    return torch.promote_types(dtype, torch.float32)


def split(x: Tensor, heads: int) -> Tensor:
    """(..., heads * width) to (..., heads, width)."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def read(state: Tensor, by: Tensor) -> Tensor:
    """What a key or query reads of a matrix state: `by` (..., key) and `state` (..., key, value) to (..., value).

    A product and a sum, not a matrix product of one row: exported, that is a product of matrices in one batch axis, where the run time of
    coreai-core 1.0.0b3 fails ("Cannot broadcast shapes [2, 2] and [4]"), because its compiler takes the reshape off one operand alone.
    """
    return (by.unsqueeze(-1) * state).sum(-2)
