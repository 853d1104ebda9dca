"""Between coremltools' torch front end and the lowerings: the arguments of a node, bound by the schema of its operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from . import kind_of

INSTALLED: dict[str, Callable[..., None] | None] = {}
"""For each kind that a lowering of ours was handed over for, what coremltools had for it before; None where it had nothing."""

PLACEMENT = frozenset({"device", "layout", "memory_format", "non_blocking", "pin_memory"})
"""Keywords that say where and how a tensor is kept, which Core ML decides."""


def install(lowerings: Mapping[Any, Callable[..., Any]]) -> None:
    """Hands the lowerings to coremltools; those that decline a call pass it on to coremltools' own."""
    from coremltools.converters.mil import register_torch_op
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    for operator, lowering in lowerings.items():
        kind = kind_of(operator)
        if kind in INSTALLED:
            continue
        INSTALLED[kind] = _TORCH_OPS_REGISTRY.get_func(kind)
        convert = _converter(operator, lowering, INSTALLED[kind])
        convert.__name__ = f"isthmus_{kind.replace('.', '_')}"
        register_torch_op(convert, torch_alias=[kind], override=True)


def _converter(operator: Any, lowering: Callable[..., Any], theirs: Callable[..., None] | None) -> Callable[[Any, Any], None]:
    from coremltools.converters.mil.mil import Var

    def convert(context: Any, node: Any) -> None:
        arguments, keywords = bound(operator, context, node)
        results = lowering(*arguments, **keywords)
        if results is not NotImplemented:
            if isinstance(results, Var) and results.op is not None and results.op.op_type != "const" and results.name not in context:
                results.set_name(node.name)  # else two outputs may have one name: the builder's own `add_1`, and that of torch's node
            context.add(results, torch_name=node.name)
        elif theirs is not None:
            theirs(context, node)
        else:
            raise NotImplementedError(f"nothing lowers this call of {operator}")

    return convert


def bound(operator: Any, context: Any, node: Any) -> tuple[list[Any], dict[str, Any]]:
    """The arguments and keywords of a node of coremltools' graph: variables of MIL for tensors, Python's values for all else.

    coremltools' own lookup takes strings for names of values; here the schema tells them apart.
    """
    schema = operator._schema.arguments
    positional = [argument for argument in schema if not argument.kwarg_only]
    arguments = [_value(value, argument, context) for value, argument in zip(node.inputs, positional, strict=False)]
    named = {argument.name: argument for argument in schema}
    keywords = {
        name: _value(value[0], named[name], context) for name, value in (node.kwinputs or {}).items() if value and name not in PLACEMENT
    }
    return arguments, keywords


def _value(value: Any, argument: Any, context: Any) -> Any:
    kind = str(argument.type)
    if isinstance(value, str):
        if "str" in kind:
            return value
        variable = context[value]
        return variable if "Tensor" in kind or variable.val is None else _plain(variable.val)
    if isinstance(value, list | tuple):
        return [_value(v, argument, context) for v in value]
    return value


def _plain(value: Any) -> Any:
    """A number that the program computes from constants alone."""
    array = np.asarray(value)
    return array.item() if array.size == 1 else array.tolist()
