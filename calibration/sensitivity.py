"""What may be quantised of a graph, module by module: how many floating point operations it saves, and how much noise it makes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ..exporter.passes._rewrite import attribute_int, dims
from ..exporter.passes.fp8_layers import Layer
from ..exporter.subject import evaluate
from .switches import products
from .trials import Noise


@dataclass(frozen=True)
class Unit:
    """A module whose own products are quantised together: a recipe names modules.

    Attributes:
        module: Its path.
        layers: Its matrix products and attentions, in the order of the graph.
        flops: Their floating point operations, two for a multiplication with its addition.
    """

    module: str
    layers: tuple[Layer, ...]
    flops: int


def units_of(model: ir.Model, layers: Sequence[Layer], sizes: Mapping[str, int]) -> tuple[Unit, ...]:
    """The layers by module, in the order of the graph.

    Args:
        model: The float32 graph.
        layers: Those that can be quantised.
        sizes: A number for each named size.
    """
    nodes = {node.name: node for node in model.graph}
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.module, []).append(layer)
    return tuple(Unit(module, tuple(own), sum(flops(nodes[x.node], sizes) for x in own)) for module, own in found.items())


def all_flops(model: ir.Model, sizes: Mapping[str, int]) -> int:
    """The floating point operations of all matrix products and attentions of the main graph."""
    return sum(flops(node, sizes) for node in products(model))


def flops(node: ir.Node, sizes: Mapping[str, int]) -> int:
    """The floating point operations of a MatMul, Gemm, Conv or Attention; 0 where a size is not known.

    Of a product, twice the inner size for every number of the result; of an attention over (batch, heads, length, size), those of both its
    products.
    """
    shapes = [_shape(value, sizes) for value in (*node.inputs[:3], node.outputs[0])]
    if node.op_type == "Attention":
        q, k, v = shapes[:3]
        if q is None or k is None or v is None or not len(q) == len(k) == len(v) == 4:
            return 0
        return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])
    a, b, result = shapes[0], shapes[1], shapes[-1]
    if a is None or b is None or result is None:
        return 0
    if node.op_type == "ConvTranspose":
        return 2 * math.prod(a) * math.prod(b[1:])
    if node.op_type == "Conv":
        return 2 * math.prod(result) * math.prod(b[1:])
    if node.op_type == "Gemm":
        return 2 * math.prod(result) * a[0 if attribute_int(node, "transA", 0) else 1]
    return 2 * math.prod(result) * (a[-1] if a else 1)


def _shape(value: ir.Value | None, sizes: Mapping[str, int]) -> list[int] | None:
    known = [evaluate(size, sizes) for size in dims(value) or ()] if value is not None and value.shape is not None else [None]
    return None if any(size is None for size in known) else [size for size in known if size is not None]


def predicted(noises: Sequence[Noise], on: Collection[int]) -> Noise:
    """The noise of several modules at each output, where the errors that they make are independent: its energies add up."""
    return tuple(sum(column) for column in zip(*(noises[i] for i in sorted(on)), strict=True)) if on else ()


def by_price(units: Sequence[Unit], noises: Sequence[Noise]) -> tuple[int, ...]:
    """The indices of modules, those first that make the least noise for a floating point operation saved; the order of the graph where two
    are equal. Modules of no operations come last.
    """

    def price(index: int) -> tuple[float, int]:
        saved = units[index].flops
        return (max(noises[index], default=0.0) / saved if saved else math.inf, index)

    return tuple(sorted(range(len(units)), key=price))
