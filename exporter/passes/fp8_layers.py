"""Which layers of a graph compute in FP8: decided once, for the calibration that observes them and for the pass that rewrites them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from ..errors import UsageError
from ..patterns import matches
from ._rewrite import attribute_int, constant_tensor, dims, input_at, is_op, reads
from .scope import module_of

ALIGNMENT = 16
"""FP8 matrix products take sizes that are multiples of 16 (cuBLASLt documentation, "Tensor Core Usage": 16 bytes)."""

HEAD_LIMIT = 256
"""Largest head size that TensorRT fuses into FP8 attention."""

Kind = Literal["weight", "attention"]

_GEMM = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True)
class Layer:
    """A node that computes in FP8.

    Attributes:
        node: Its name.
        module: Its PyTorch module.
        kind: `weight`: an activation times a weight; `attention`: both products of an Attention node.
        observed: Names of the activations whose ranges are needed: one for a weight, q, k and v for attention.
        axis: The axis of the weight that counts the output channels.
        block: How many neighbouring inputs of the weight share a scale; 0 for all of an output channel.
    """

    node: str
    module: str
    kind: Kind
    observed: tuple[str, ...]
    axis: int = 0
    block: int = 0


@dataclass(frozen=True)
class Excluded:
    """A product that stays in half precision.

    Attributes:
        node: Its name.
        module: Its PyTorch module.
        reason: Why.
        chosen: Whether `include` could change it: it was left out to keep accuracy, not because FP8 cannot take it.
    """

    node: str
    module: str
    reason: str
    chosen: bool = False


@dataclass(frozen=True)
class Selection:
    """What becomes FP8 and what does not.

    Attributes:
        layers: In the order of the graph.
        excluded: Every other matrix product with a weight, and every other attention.
        unmatched: Patterns of `include` and `exclude` that no module matches.
    """

    layers: tuple[Layer, ...]
    excluded: tuple[Excluded, ...]
    unmatched: tuple[str, ...] = ()

    def observed(self) -> tuple[str, ...]:
        """The names of all activations whose ranges are needed, each once."""
        return tuple(dict.fromkeys(name for layer in self.layers for name in layer.observed))

    def matched(self) -> Selection:
        """This selection, all patterns of which match a module.

        Raises:
            UsageError: Some match none.
        """
        if self.unmatched:
            modules = sorted({x.module for x in self.layers} | {x.module for x in self.excluded})
            raise UsageError(
                f"no module with a matrix product matches {', '.join(self.unmatched)}",
                hint=f"patterns match module paths, such as {', '.join(modules[:4])}",
            )
        return self


def select(
    model: ir.Model,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    alignment: int = ALIGNMENT,
    conditioning: bool = False,
) -> Selection:
    """Chooses the nodes of the main graph that compute in FP8.

    A node can when it is a MatMul, Gemm or Conv of an activation and a weight whose input and output channels are multiples of 16 (a Conv:
    of one group), or an Attention without mask whose head size is a multiple of 16 up to 256. By default those are left out that cost
    accuracy and save no time:

    - the first products on the way from an input of the model, and the last on the way to an output;
    - those of the conditioning (timestep, label and modulation), which see one row a sample and not one a token.

    Args:
        model: In float32, with shapes on its values.
        include: Patterns (see `exporter.patterns`) of module paths that are taken although the default leaves them out.
        exclude: Patterns of module paths that are left in half precision. It wins over `include`.
        alignment: What the numbers of channels have to be multiples of.
        conditioning: Take the products of the conditioning as well: where weights alone are quantised, they gain the most.
    """
    nodes = list(model.graph)
    candidates = [node for node in nodes if _is_candidate(node)]
    first, last = _ends(nodes, set(candidates))
    batch = {shape[0] for value in model.graph.inputs if (shape := dims(value))}
    layers: list[Layer] = []
    excluded: list[Excluded] = []
    for node in candidates:
        name, module = node.name or "", module_of(node)
        if reason := _impossible(node, alignment):
            excluded.append(Excluded(name, module, reason))
        elif matches(module, exclude):
            excluded.append(Excluded(name, module, "excluded by name", chosen=True))
        elif (reason := _sensitive(node, first, last, batch, conditioning=conditioning)) and not matches(module, include):
            excluded.append(Excluded(name, module, reason, chosen=True))
        else:
            layers.append(_layer(node, name, module))
    modules = {module_of(node) for node in candidates}
    unmatched = [p for p in (*include, *exclude) if not any(matches(m, [p]) for m in modules)]
    return Selection(tuple(layers), tuple(excluded), tuple(unmatched))


def _is_candidate(node: ir.Node) -> bool:
    if is_op(node, "Attention"):
        return node.outputs[0].dtype == ir.DataType.FLOAT
    weight = input_at(node, 1) if is_op(node, *_GEMM) else None
    activation = node.inputs[0] if weight is not None else None
    return (
        weight is not None
        and activation is not None
        and constant_tensor(weight) is not None
        and constant_tensor(activation) is None
        and activation.dtype == ir.DataType.FLOAT
    )


def _ends(nodes: Sequence[ir.Node], candidates: Collection[ir.Node]) -> tuple[set[ir.Node], set[ir.Node]]:
    """The candidates before which, and after which, there is no other."""
    after: set[ir.Node] = set()  # reached from a candidate
    first, last = set(), set()
    for node in nodes:
        sources = [p for v in reads(node) if (p := v.producer()) is not None]
        if any(p in after or p in candidates for p in sources):
            after.add(node)
        elif node in candidates:
            first.add(node)
    before: set[ir.Node] = set()  # reaches a candidate
    for node in reversed(nodes):
        users = [user for value in node.outputs for user, _ in value.uses()]
        if any(u in before or u in candidates for u in users):
            before.add(node)
        elif node in candidates:
            last.add(node)
    return first, last


def _impossible(node: ir.Node, alignment: int) -> str:
    """Why FP8 cannot take a candidate; empty when it can."""
    if is_op(node, "Attention"):
        return _impossible_attention(node)
    weight = node.inputs[1]
    assert weight is not None
    shape = dims(weight) or []
    if is_op(node, "Conv"):
        if (groups := attribute_int(node, "group", 1)) != 1:
            return f"a convolution of {groups} groups"
        inputs, outputs = shape[1], shape[0]
    else:
        if len(shape) != 2:
            return f"a weight of rank {len(shape)}"
        if is_op(node, "Gemm") and attribute_int(node, "transA", 0):
            return "a transposed activation"
        outputs, inputs = shape[_output_axis(node)], shape[1 - _output_axis(node)]
    odd = [f"{n} {what} channels" for n, what in ((inputs, "input"), (outputs, "output")) if not isinstance(n, int) or n % alignment]
    return f"{' and '.join(odd)}, not a multiple of {alignment}" if odd else ""


def _impossible_attention(node: ir.Node) -> str:
    q, k, v = (dims(node.inputs[i]) for i in range(3))
    if any(input_at(node, i) is not None for i in range(3, len(node.inputs))) or attribute_int(node, "is_causal", 0):
        return "attention with a mask"
    softcap = node.attributes.get("softcap")
    if (softcap is not None and (softcap.is_ref() or softcap.as_float() != 0)) or any(v.uses() for v in node.outputs[1:]):
        return "attention with a soft cap or key and value outputs"
    if q is None or k is None or v is None or not len(q) == len(k) == len(v) == 4:
        return "attention over tensors that are not of the shape (batch, heads, length, size)"
    if not q[1] == k[1] == v[1]:
        return f"attention of {q[1]} query heads over {k[1]} key heads"
    sizes = (q[3], v[3])
    if not all(isinstance(s, int) and s % ALIGNMENT == 0 and s <= HEAD_LIMIT for s in sizes):
        return f"a head size of {q[3]}, not a multiple of {ALIGNMENT} up to {HEAD_LIMIT}"
    return ""


def _sensitive(
    node: ir.Node, first: Collection[ir.Node], last: Collection[ir.Node], batch: Collection[int | str | None], *, conditioning: bool
) -> str:
    """Why a node is left out by default; empty when it is not."""
    if not conditioning and not is_op(node, "Attention", "Conv"):
        shape = dims(node.inputs[0]) or []
        rows = shape[:-1]
        if rows and rows[0] in batch and all(size == 1 for size in rows[1:]):
            return "conditioning: one row a sample"
    if node in first:
        return "first layer"
    return "last layer" if node in last else ""


def _output_axis(node: ir.Node) -> int:
    return 0 if is_op(node, "Conv") or (is_op(node, "Gemm") and attribute_int(node, "transB", 0)) else 1


def _layer(node: ir.Node, name: str, module: str) -> Layer:
    if is_op(node, "Attention"):
        return Layer(name, module, "attention", tuple(v.name or "" for v in node.inputs[:3] if v is not None))
    assert node.inputs[0] is not None
    return Layer(name, module, "weight", (node.inputs[0].name or "",), _output_axis(node))
