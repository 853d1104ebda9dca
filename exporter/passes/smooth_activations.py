"""Moves the range of outlier channels from activations, whose scale serves all channels, into weights, whose scale is that of an output.

SmoothQuant (Xiao et al., arXiv:2211.10438, section 4): X W = (X / s) (s W) with one factor s a channel of X.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..errors import Reason
from ._quantized import constant_of, drop_unread, unused
from ._rewrite import Array, attribute_int, constant_tensor, dims, input_at, ints, is_op, new_node
from .scope import module_of

LARGEST_SHIFT = 20
"""Factors are from 2 ** -20 to 2 ** 20: what needs more is not an outlier but a channel of zeros."""


@dataclass(frozen=True)
class _Edit:
    """Multiplies what a node reads along its last axis: in place for a constant, by a new node for a value.

    Attributes:
        node: The reader.
        index: Of its input.
        factor: (channels,) or, where `rows`, (channels, 1): what a constant is multiplied by.
        constant: Whether the input is a constant.
    """

    node: ir.Node
    index: int
    factor: Array
    constant: bool = True


class SmoothActivations(ir.passes.InPlacePass):
    """Divides an activation by one factor a channel where that costs nothing, and multiplies the weights of all its readers by them.

    The factor of channel c is max|X_c| ** alpha / max|W_c| ** (1 - alpha), over the median channel's. The graph computes the same, up to
    rounding. The division goes into the affine of a normalisation, the weight of a linear layer, or a constant; only where that is
    shared, into a multiplication of one row a sample.

    Given, with weight (16, 32) and conditions (batch, 1, 16)::

        n = LayerNormalization<axis=-1>(h, g, b)
        y = MatMul(n, weight)

    Result::

        n = LayerNormalization<axis=-1>(h, g / s, b / s)
        y = MatMul(n, weight * s[:, None])

    Given::

        shift, gain = Split<axis=1, num_outputs=2>(Gemm<transB=1>(c, w, b))
        n = LayerNormalization<axis=-1>(h, g)
        m = Mul(n, Add(Unsqueeze(gain, 1), 1.0))
        x = Add(m, Unsqueeze(shift, 1))
        y = MatMul(x, weight)

    Result::

        shift, gain = Split<axis=1, num_outputs=2>(Gemm<transB=1>(c, w with the rows of shift / s, b likewise))
        n = LayerNormalization<axis=-1>(h, g / s)
        m = Mul(n, Add(Unsqueeze(gain, 1), 1.0))
        x = Add(m, Unsqueeze(shift, 1))
        y = MatMul(x, weight * s[:, None])

    Args:
        peaks: The largest |value| of every channel of the activations to smooth, (channels,) by the value's name.
        alpha: How much of the range moves, from 0 (all that weights can give up) to 1 (all that activations can).

    Attributes:
        smoothed: The names of the values that were, with their factors (channels,).
        skipped: Those that were not, and why.
    """

    def __init__(self, peaks: Mapping[str, Array], *, alpha: float = 0.5) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
        self._peaks, self._alpha = peaks, alpha
        self._taken: set[str] = set()
        self.smoothed: dict[str, Array] = {}
        self.skipped: list[Reason] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph in place."""
        values = {value.name: value for node in model.graph for value in node.outputs}
        self._taken = {name for name in values if name is not None}
        for name, peaks in self._peaks.items():
            if (value := values.get(name)) is None:
                self.skipped.append(Reason("no node makes it", where=name))
                continue
            reason = self._smooth(model.graph, value, np.asarray(peaks, np.float64))
            if reason:
                self.skipped.append(Reason(reason, where=name))
        return ir.passes.PassResult(model, modified=bool(self.smoothed))

    def _smooth(self, graph: ir.Graph, value: ir.Value, peaks: Array) -> str:
        """Smooths one value. Returns why it cannot be; empty when it was."""
        weights = _readers(value)
        if isinstance(weights, str):
            return weights
        factors = self._factors(peaks, weights)
        if (factors == 1).all():
            return "its channels are alike"
        edits = _divided(value, 1 / factors)
        if isinstance(edits, str):
            return edits
        for edit in (*edits, *(_Edit(node, 1, _along(node, factors)) for node in weights)):
            _apply(graph, edit, self._taken)
        assert value.name is not None
        self.smoothed[value.name] = factors
        return ""

    def _factors(self, peaks: Array, readers: Sequence[ir.Node]) -> Array:
        largest = np.zeros_like(peaks)
        for node in readers:
            weight = _tensor(node, 1).numpy().astype(np.float64)
            largest = np.maximum(largest, np.abs(weight).max(axis=1 - _input_axis(node)))
        live = (peaks > 0) & (largest > 0) & np.isfinite(peaks)
        exponents = self._alpha * np.log2(peaks, where=live, out=np.zeros_like(peaks))
        exponents -= (1 - self._alpha) * np.log2(largest, where=live, out=np.zeros_like(peaks))
        # What matters is how the factors differ: one for all channels would change nothing but the scale.
        exponents = exponents - np.median(exponents[live]) if live.any() else exponents
        return np.asarray(np.exp2(np.clip(np.where(live, exponents, 0), -LARGEST_SHIFT, LARGEST_SHIFT)))


def _readers(value: ir.Value) -> list[ir.Node] | str:
    """The nodes that read a value, all of which multiply it by a weight; else what else reads it."""
    if value.is_graph_output():
        return "it is an output of the model"
    found = []
    for node, index in value.uses():
        weight = input_at(node, 1)
        product = is_op(node, "MatMul") or (is_op(node, "Gemm") and not attribute_int(node, "transA", 0))
        tensor = constant_tensor(weight) if weight is not None else None
        if not product or index != 0 or tensor is None or len(tensor.shape) != 2:
            return f"{node.op_type} reads it in {module_of(node) or 'the model'}"
        found.append(node)
    return found or "nothing reads it"


def _input_axis(node: ir.Node) -> int:
    return 1 if is_op(node, "Gemm") and attribute_int(node, "transB", 0) else 0


def _along(node: ir.Node, factors: Array) -> Array:
    """Factors of a product's input channels, in the shape of its weight."""
    return factors if _input_axis(node) == 1 else factors[:, None]


def _tensor(node: ir.Node, index: int) -> ir.TensorProtocol:
    value = node.inputs[index]
    tensor = constant_tensor(value) if value is not None else None
    assert tensor is not None
    return tensor


def _divided(value: ir.Value, factor: Array) -> list[_Edit] | str:
    """What has to be changed so that a value comes out multiplied along its last axis; a reason where it cannot.

    The value's own readers are not looked at.
    """
    node = value.producer()
    if node is None:
        return "it is an input of the model"
    if is_op(node, "LayerNormalization", "RMSNormalization"):
        return _normalisation(node, factor)
    if is_op(node, "MatMul", "Gemm"):
        return _linear(node, factor)
    if is_op(node, "Add", "Sub"):
        plans = [_input_divided(node, index, factor) for index in (0, 1)]
        return _all(plans)
    if is_op(node, "Mul"):
        plans = [_input_divided(node, index, factor) for index in (0, 1)]
        possible = [plan for plan in plans if not isinstance(plan, str)]
        # One side is enough, and best without a new node.
        return min(possible, key=lambda plan: sum(not edit.constant for edit in plan)) if possible else plans[0]
    if is_op(node, "Split"):
        return _split(node, value, factor)
    if is_op(node, "Unsqueeze", "Squeeze", "Reshape", "Identity"):
        before, after = dims(node.inputs[0]), dims(value)
        if before and after and before[-1] == after[-1] == factor.size:
            return _input_divided(node, 0, factor)
    if is_op(node, "Relu"):
        return _input_divided(node, 0, factor)
    return f"{node.op_type} computes it in {module_of(node) or 'the model'}"


def _input_divided(node: ir.Node, index: int, factor: Array) -> list[_Edit] | str:
    value = node.inputs[index]
    assert value is not None
    tensor = constant_tensor(value)
    if tensor is not None:
        last = tensor.shape[-1] if len(tensor.shape) else 1
        return (
            [_Edit(node, index, factor)] if last in (1, factor.size) else f"a constant of shape {tuple(tensor.shape.numpy())} is in its way"
        )
    plan: list[_Edit] | str = "what it is made of is read elsewhere too"
    if len(value.uses()) == 1 and not value.is_graph_output():
        plan = _divided(value, factor)
    shape = dims(value)
    if (
        isinstance(plan, str)
        and shape is not None
        and len(shape) > 1
        and shape[-1] == factor.size
        and all(size == 1 for size in shape[1:-1])
    ):
        return [_Edit(node, index, factor, constant=False)]
    return plan


def _all(plans: Sequence[list[_Edit] | str]) -> list[_Edit] | str:
    edits: list[_Edit] = []
    for plan in plans:
        if isinstance(plan, str):
            return plan
        edits += plan
    return edits


def _normalisation(node: ir.Node, factor: Array) -> list[_Edit] | str:
    shape = dims(node.inputs[0])
    axis = attribute_int(node, "axis", -1)
    if shape is None or axis is None or axis % len(shape) != len(shape) - 1:
        return f"{node.op_type} normalises over more than the channels"
    affine = [index for index in (1, 2) if input_at(node, index) is not None]
    return _all([_input_divided(node, index, factor) for index in affine])


def _linear(node: ir.Node, factor: Array) -> list[_Edit] | str:
    weight = input_at(node, 1)
    tensor = constant_tensor(weight) if weight is not None else None
    if tensor is None or len(tensor.shape) != 2:
        return "a product of two activations computes it"
    along = factor[:, None] if is_op(node, "Gemm") and attribute_int(node, "transB", 0) else factor
    edits = [_Edit(node, 1, along)]
    if input_at(node, 2) is not None:
        bias = _input_divided(node, 2, factor)
        return bias if isinstance(bias, str) else edits + bias
    return edits


def _split(node: ir.Node, value: ir.Value, factor: Array) -> list[_Edit] | str:
    shape = dims(node.inputs[0])
    axis = attribute_int(node, "axis", 0)
    if shape is None or axis is None or axis % len(shape) != len(shape) - 1 or not isinstance(shape[-1], int):
        return "a split of unknown sizes computes it"
    parts = [dims(output) for output in node.outputs]
    sizes = ints(input_at(node, 1)) or [part[-1] if part and isinstance(part[-1], int) else 0 for part in parts]
    if sum(sizes) != shape[-1]:
        return "a split of unknown sizes computes it"
    whole = np.ones(shape[-1])
    start = sum(sizes[: node.outputs.index(value)])
    whole[start : start + factor.size] = factor
    return _input_divided(node, 0, whole)


def _apply(graph: ir.Graph, edit: _Edit, taken: set[str]) -> None:
    value = edit.node.inputs[edit.index]
    assert value is not None
    assert value.dtype is not None
    if not edit.constant:
        factor = constant_of(graph, f"{value.name}.smoothing", ir.tensor(edit.factor.astype(value.dtype.numpy())), taken=taken)
        node = new_node(edit.node, "Mul", [value, factor])
        made = node.outputs[0]
        made.name = node.name = unused(f"{value.name}.smoothed", graph.initializers, taken)
        made.type, made.shape = value.type, value.shape
        taken.add(made.name)
        graph.insert_before(edit.node, node)
        edit.node.replace_input_with(edit.index, made)
        return
    source, factor_array = _tensor(edit.node, edit.index), edit.factor
    shape = np.broadcast_shapes(tuple(source.shape.numpy()), factor_array.shape)
    dtype = value.dtype
    tensor = ir.LazyTensor(
        lambda: ir.tensor((source.numpy() * factor_array).astype(dtype.numpy())), dtype=dtype, shape=ir.Shape(shape), cache=False
    )
    edit.node.replace_input_with(edit.index, constant_of(graph, f"{value.name}.smoothed", tensor, taken=taken))
    drop_unread(graph, value)
