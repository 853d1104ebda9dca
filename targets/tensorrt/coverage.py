"""How much of a graph's matrix products is in FP8: for each PyTorch module, FLOPs in FP8 over all, counted at given sizes.

Counted are MatMul, Gemm, Conv, ConvTranspose, Einsum of two operands, and the two products of an Attention node: two operations for each
multiplication and addition. A product is in FP8 when both operands come out of a DequantizeLinear of E4M3, through nodes that only move
values. What TensorRT makes of that is the rules' concern (`rules`), and the engine's inspector's. Products inside the operators of our own
are theirs and are not counted; those of a Loop or Scan are counted for every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir

from ...exporter.errors import Reason
from ...exporter.manifest import Column, Table
from ...exporter.op import DOMAIN
from ...exporter.passes import module_of
from ...exporter.passes._rewrite import attribute_int, is_op
from ...exporter.subject import evaluate
from .quantized import PRODUCTS, product, shape_of
from .rules.loops import loop_steps


@dataclass(frozen=True)
class Row:
    """The matrix products of one PyTorch module.

    Attributes:
        module: Its path.
        products: Number of nodes that multiply matrices.
        flops: Their floating-point operations.
        fp8: Those of them that are done in FP8.
    """

    module: str
    products: int
    flops: int
    fp8: int


@dataclass(frozen=True)
class Coverage:
    """The share of FP8 in a graph.

    Attributes:
        rows: By module, in the order of the graph.
        uncounted: Products whose sizes are not known, with the reason; they are in no row.
    """

    rows: tuple[Row, ...]
    uncounted: tuple[Reason, ...] = ()

    @property
    def flops(self) -> int:
        """Floating-point operations of all products that were counted."""
        return sum(row.flops for row in self.rows)

    @property
    def fp8(self) -> int:
        """Those of them that are done in FP8."""
        return sum(row.fp8 for row in self.rows)

    @property
    def share(self) -> float:
        """FP8 over all, from 0 to 1; 0 when there is no product."""
        return self.fp8 / self.flops if self.flops else 0.0

    def table(self) -> Table:
        """As a table of the report."""
        lead = (
            f"{100 * self.share:.1f} % of the floating-point operations of matrix products compute in FP8, counted at the sizes that the "
            "engine is tuned for. Products inside scans and linear attention are not counted."
        )
        return Table(
            name="fp8-coverage",
            title="FP8 coverage",
            lead=" ".join([lead, *(f"Not counted: {reason}." for reason in self.uncounted)]),
            columns=(
                Column(name="PyTorch module", kind="code"),
                Column(name="Products", kind="count"),
                Column(name="FLOPs", kind="count"),
                Column(name="Of them in FP8", kind="count"),
                Column(name="Share", kind="share"),
            ),
            rows=tuple((r.module, r.products, r.flops, r.fp8, r.fp8 / r.flops if r.flops else None) for r in self.rows),
        )

    def value(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "share": self.share,
            "flops": self.flops,
            "fp8": self.fp8,
            "modules": [asdict(row) for row in self.rows],
            "uncounted": [asdict(reason) for reason in self.uncounted],
        }


def coverage(model: ir.Model, sizes: Mapping[str, int]) -> Coverage:
    """Counts the matrix products of a graph.

    Args:
        model: The graph, with shapes on its values.
        sizes: The value of every named size.
    """
    counter = _Counter(model, sizes)
    counter.graph(model.graph, 1)
    return Coverage(tuple(Row(module, *counts) for module, counts in counter.rows.items()), tuple(dict.fromkeys(counter.uncounted)))


class _UnknownSizeError(Exception):
    """Why the operations of a product cannot be counted."""


class _Counter:
    def __init__(self, model: ir.Model, sizes: Mapping[str, int]) -> None:
        self.functions = model.functions
        self.sizes = sizes
        self.rows: dict[str, tuple[int, int, int]] = {}
        self.uncounted: list[Reason] = []

    def graph(self, graph: ir.Graph | ir.Function, times: int) -> None:
        """Counts the nodes of a graph that is executed so many times."""
        for node in graph:
            module = module_of(node)
            try:
                flops = self.flops(node)
            except _UnknownSizeError as reason:
                self.uncounted.append(Reason(f"the {node.op_type} is not counted: {reason}", where=module or node.name or ""))
                continue
            if flops is not None:
                found = product(node)
                fp8 = flops if found is not None and found.a.fp8 and found.b.fp8 else 0
                before = self.rows.get(module, (0, 0, 0))
                self.rows[module] = (before[0] + 1, before[1] + flops * times, before[2] + fp8 * times)
            self.inner(node, times, module)

    def inner(self, node: ir.Node, times: int, module: str) -> None:
        """Counts the graphs inside a node."""
        bodies = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
        function = self.functions.get(node.op_identifier())
        if function is not None and node.domain != DOMAIN and any(is_op(n, *PRODUCTS, "Attention", "Einsum") for n in function):
            self.uncounted.append(Reason(f"products in the function {function.name} are not counted: it has no shapes", where=module))
        if not bodies:
            return
        steps: int | None = 1
        if is_op(node, "Loop", "Scan"):
            steps = loop_steps(node, self.sizes)
            if steps is None and any(is_op(n, *PRODUCTS, "Attention", "Einsum") for body in bodies for n in body):
                self.uncounted.append(
                    Reason(f"products in a {node.op_type} are counted once: its number of steps is not known", where=module)
                )
        for body in bodies:
            self.graph(body, times * (steps if steps is not None else 1))

    def flops(self, node: ir.Node) -> int | None:
        """The floating-point operations of a node; None when it is no product.

        Raises:
            _UnknownSizeError: A size is not known.
        """
        if is_op(node, "MatMul"):
            return self.matmul(node)
        if is_op(node, "Gemm"):
            a, b = self.shape(node.inputs[0]), self.shape(node.inputs[1])
            return 2 * math.prod(a) * b[0 if attribute_int(node, "transB", 0) else 1]
        if is_op(node, "Conv"):
            return 2 * math.prod(self.shape(node.outputs[0])) * math.prod(self.shape(node.inputs[1])[1:])
        if is_op(node, "ConvTranspose"):
            return 2 * math.prod(self.shape(node.inputs[0])) * math.prod(self.shape(node.inputs[1])[1:])
        if is_op(node, "Attention"):
            return self.attention(node)
        if is_op(node, "Einsum"):
            return self.einsum(node)
        return None

    def shape(self, value: ir.Value | None) -> list[int]:
        shape = shape_of(value)
        if value is None or shape is None:
            raise _UnknownSizeError(f"the shape of {value.name if value is not None else 'an input'} is not known")
        found = [evaluate(d, self.sizes) for d in shape]
        missing = [str(d) for d, size in zip(shape, found, strict=True) if size is None]
        if missing:
            raise _UnknownSizeError(f"{' and '.join(missing)} in the shape of {value.name} has no value")
        return [size for size in found if size is not None]

    def matmul(self, node: ir.Node) -> int:
        a, b = self.shape(node.inputs[0]), self.shape(node.inputs[1])
        rows, columns = (a[-2] if len(a) > 1 else 1), (b[-1] if len(b) > 1 else 1)
        return 2 * math.prod(_broadcast(a[:-2], b[:-2])) * rows * a[-1] * columns

    def attention(self, node: ir.Node) -> int:
        """Both products of an Attention node over tensors of rank 4, or of rank 3 with the heads side by side."""
        q, k, v = (self.shape(node.inputs[i]) for i in range(3))
        past = self.shape(node.inputs[4])[2] if len(node.inputs) > 4 and node.inputs[4] is not None else 0
        heads = q[1] if len(q) == 4 else (attribute_int(node, "q_num_heads", 0) or 0)
        groups = k[1] if len(k) == 4 else (attribute_int(node, "kv_num_heads", 0) or 0)
        if not heads or not groups:
            raise _UnknownSizeError("its number of heads is not known")
        keys = k[-2] + past
        head, value = (q[-1], v[-1]) if len(q) == 4 else (q[-1] // heads, v[-1] // groups)
        return 2 * q[0] * heads * q[-2] * keys * (head + value)

    def einsum(self, node: ir.Node) -> int | None:
        equation = node.attributes["equation"].as_string().replace(" ", "")
        inputs = equation.partition("->")[0].split(",")
        if len(inputs) != 2:
            return None
        if "." in equation:
            raise _UnknownSizeError(f"the equation {equation} has an ellipsis")
        sizes: dict[str, int] = {}
        for letters, value in zip(inputs, node.inputs, strict=True):
            for letter, size in zip(letters, self.shape(value), strict=True):
                sizes[letter] = max(size, sizes.get(letter, 1))
        return 2 * math.prod(sizes.values())


def _broadcast(a: list[int], b: list[int]) -> Iterator[int]:
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    padded = [1] * (len(longer) - len(shorter)) + shorter
    return (max(x, y) for x, y in zip(longer, padded, strict=True))
