"""Mixtures of experts, as ONNX Runtime's MoE: each expert multiplies its own tokens, and no others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ..ops.onnx_forms import CONTRIB_DOMAIN
from ._match import call_it, operands
from ._rewrite import (
    Array,
    Scope,
    attribute_int,
    constant,
    constant_tensor,
    dims,
    input_at,
    ints,
    is_op,
    new_constant,
    new_node,
    producer,
    replace_node,
    scalar,
    scopes,
    size,
)

_F32 = ir.DataType.FLOAT
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_SWIGLU: dict[str, int | float | str] = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
"""silu(gate) * up, with gate and up of a channel in neighbouring rows: the only layout that the CPU kernel takes."""


class FuseExperts(ir.passes.InPlacePass):
    """Replaces a mixture of SwiGLU experts, dense or gathered (models/moe.py), by com.microsoft.MoE.

    Given, for E = 3 experts of h = 4 channels, the first k = 2 chosen, and tokens of d = 5 channels::

        f (float[b, l, 5] x, float[b, l, 3] logits) => (float[b, l, 5] y) <float[5, 24] up_weight, float[12, 5] down_weight> {
            mine = Unsqueeze (logits, minus_1)
            others = Unsqueeze (logits, minus_2)
            larger = Greater (others, mine)
            equal = Equal (others, mine)
            before = And (equal, earlier)                       # earlier[e, f] = f < e: of equal logits the lower index goes first
            ahead = Or (larger, before)
            counted = Cast <to: int = 7> (ahead)
            places = ReduceSum <keepdims: int = 0> (counted, minus_1)
            chosen = Less (places, two)
            all = Softmax <axis: int = -1> (logits)
            some = Where (chosen, all, zero)
            total = ReduceSum <keepdims: int = 1> (some, minus_1)
            weights = Div (some, total)                         # absent in a mixture whose weights are not normalised
            weight = Unsqueeze (weights, minus_1)
            layer = MatMul (x, up_weight)
            apart = Reshape (layer, [0, -1, 3, 8])
            gate, up = Split <axis: int = 3, num_outputs: int = 2> (apart)
            sigmoid = Sigmoid (gate)
            silu = Mul (gate, sigmoid)
            weighted = Mul (weight, silu)
            product = Mul (weighted, up)
            positive = Greater (weight, zero)
            hidden = Where (positive, product, zero)
            flat = Reshape (hidden, [0, -1, 12])
            y = MatMul (flat, down_weight)
        }

    Result::

        f (float[b, l, 5] x, float[b, l, 3] logits) => (float[b, l, 5] y) <float[3, 8, 5] up_experts, float[3, 5, 4] down_experts> {
            backwards = Gather <axis: int = -1> (logits, two_one_zero)
            rows = Reshape (backwards, [-1, 3])
            y = com.microsoft.MoE <k: int = 2, normalize_routing_weights: int = 1, activation_type: string = "swiglu",
                                   swiglu_fusion: int = 1, activation_alpha: float = 1.0, activation_beta: float = 0.0>
                (x, rows, up_experts, "", down_experts)
        }

    The operator takes logits, whatever its second input's name, `router_probs`, says. It computes the softmax over all experts, chooses k
    of the *probabilities*, and of equal ones the expert with the **higher** index; therefore the experts stand in reverse order. (Logits
    that differ by a unit in the last place can have equal probabilities, and the lower index is taken then, where the comparisons above
    take the larger logit: as in the published models, which choose after the softmax.) Its weights are those of the two products with
    the rows of gate and up interleaved, `[E, 2 h, d]`, and transposed, `[E, d, h]`; they are rearranged as they are written, one tensor at
    a time.

    The gathered form computes the same from the indices of the chosen experts, `GatherND` of the weights and batched products.

    Half precision: weights and values in float16 get casts around a float32 MoE, the only type for which ONNX Runtime 1.32 has a kernel
    on the CPU (tests/targets/test_onnxruntime_experts.py); the weights are stored in float16.

    Left as they are: other activations, biases, weights that are no constants (quantised ones among them), tokens of more than three axes,
    and bodies of functions.

    Attributes:
        fused: How many mixtures the last call replaced.
    """

    def __init__(self) -> None:
        self.fused = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        self.fused = 0
        for scope in scopes(model):
            for node in () if scope.is_function else scope.graph:
                found = _dense(node) or _gathered(node)
                if found is not None and found.is_by_token:
                    _write(scope, node, found)
                    self.fused += 1
        if self.fused:
            model.opset_imports.setdefault(CONTRIB_DOMAIN, 1)
        return ir.passes.PassResult(model, bool(self.fused))


@dataclass(frozen=True)
class _Weight:
    """A constant, seen through the reshapes and transpositions between it and its use.

    Attributes:
        root: The initializer.
        steps: A shape or a permutation each, the one next to the initializer first.
        shape: What comes out.
    """

    root: ir.Value
    steps: tuple[tuple[str, tuple[int, ...]], ...]
    shape: tuple[int, ...]

    def numpy(self) -> Array:
        tensor = self.root.const_value
        assert tensor is not None
        array: Array = tensor.numpy()
        for kind, numbers in self.steps:
            array = array.reshape(numbers) if kind == "Reshape" else array.transpose(numbers)
        return array


@dataclass(frozen=True)
class _Mixture:
    """What a mixture is made of; `up` has the shape (E, 2 h, d) or (d, E 2 h), `down` (E, h, d) or (E h, d)."""

    x: ir.Value
    logits: ir.Value
    experts: int
    k: int
    normalize: bool
    up: _Weight
    down: _Weight

    @property
    def is_by_token(self) -> bool:
        """Whether each token has logits of its own, and the axes are as many as the operator takes."""
        sizes, logits = dims(self.x) or [], dims(self.logits)
        return len(sizes) in (2, 3) and None not in sizes and logits == [*sizes[:-1], self.experts]


def _dense(node: ir.Node) -> _Mixture | None:
    down = _layer(node)
    flat = _made(down[0], "Reshape") if down is not None else None
    hidden = _made(flat.inputs[0], "Where") if flat is not None else None
    if down is None or flat is None or hidden is None or scalar(hidden.inputs[2]) != 0:
        return None
    positive, shape = producer(hidden.inputs[0], "Greater"), dims(hidden.outputs[0])
    parts = _swiglu(hidden.inputs[1])
    if positive is None or shape is None or parts is None or scalar(positive.inputs[1]) != 0 or len(shape) < 3:
        return None
    experts, channels = shape[-2:]
    if _uncast(positive.inputs[0]) is not parts.weight or not isinstance(experts, int) or not isinstance(channels, int):
        return None
    apart = _made(parts.split.inputs[0], "Reshape")
    first = _made(apart.inputs[0], "MatMul", "Gemm") if apart is not None else None
    up = _layer(first) if first is not None else None
    weight = _unsqueezed(parts.weight, -1)
    routing = _routing(weight, experts) if weight is not None else None
    if up is None or apart is None or routing is None:
        return None
    width, sizes = up[1].shape[0], dims(up[0]) or []
    fits = up[1].shape == (width, experts * 2 * channels) and down[1].shape == (experts * channels, width) and sizes[-1:] == [width]
    laid_out = (
        _same(dims(apart.outputs[0]), [*sizes[:-1], experts, 2 * channels])
        and _same(shape, [*sizes[:-1], experts, channels])
        and _same(dims(flat.outputs[0]), [*sizes[:-1], experts * channels])
    )
    return _Mixture(up[0], routing.logits, experts, routing.k, routing.normalize, up[1], down[1]) if fits and laid_out else None


def _same(shape: list[int | str | None] | None, expected: list[int | str | None]) -> bool:
    """Whether a reshape gives these sizes. One may be unknown: the number of elements says what it is."""
    if shape is None or len(shape) != len(expected):
        return False
    pairs = [(a, b) for a, b in zip(shape, expected, strict=True) if a is None or a != b]
    return not pairs or (len(pairs) == 1 and None in pairs[0])


def _gathered(node: ir.Node) -> _Mixture | None:
    summed = _summed(node.outputs[0], -2, keepdims=False) if node.op_type == "ReduceSum" else None
    product = _made(_squeezed(summed, -2), "MatMul")
    if product is None:
        return None
    hidden, down = _unsqueezed(product.inputs[0], -2), _picked(product.inputs[1])
    parts = _swiglu(hidden) if hidden is not None else None
    if parts is None or down is None:
        return None
    first = _made(_squeezed(parts.split.inputs[0], -1), "MatMul")
    up = _picked(first.inputs[0]) if first is not None else None
    if first is None or up is None or up[1] is not down[1] or len(up[0].shape) != 3 or len(down[0].shape) != 3:
        return None
    experts, rows, width = up[0].shape
    picked = _summed(down[1], -1, keepdims=True)
    indicator = _times_numbers(picked, experts) if picked is not None else None
    taken = _summed(parts.weight, -1, keepdims=True)
    weight = _made(taken, "Where")
    if indicator is None or weight is None or scalar(weight.inputs[2]) != 0 or weight.inputs[0] is not indicator:
        return None
    spread = _unsqueezed(_uncast(weight.inputs[1]), -2)
    routing = _routing(spread, experts) if spread is not None else None
    equal = producer(indicator, "Equal")
    if routing is None or equal is None or not _is_place(equal, routing):
        return None
    x, shape = first.inputs[1], dims(node.outputs[0])
    if shape is None or None in shape or dims(x) != [*shape[:-1], 1, width, 1] or down[0].shape != (experts, rows // 2, width) or rows % 2:
        return None
    while dims(x) != shape and (above := _made(x, "Unsqueeze")) is not None:
        x = above.inputs[0]
    if x is None or dims(x) != shape:
        return None
    return _Mixture(x, routing.logits, experts, routing.k, routing.normalize, up[0], down[0])


@dataclass(frozen=True)
class _SwiGLU:
    """`weight * silu(gate) * up`, with gate and up from `split`."""

    weight: ir.Value
    split: ir.Node


def _swiglu(value: ir.Value | None) -> _SwiGLU | None:
    """Four factors in any order: a weight of one channel, a gate, its sigmoid, and what is gated."""
    factors: list[ir.Value] = []
    queue = [value]
    while queue:
        each = _uncast(queue.pop())
        product = producer(each, "Mul")
        if product is not None:
            queue += product.inputs
        elif each is not None:
            factors.append(each)
    sigmoids = [f for f in factors if producer(f, "Sigmoid")]
    if len(factors) != 4 or len(sigmoids) != 1:
        return None
    sigmoid = sigmoids[0].producer()
    assert sigmoid is not None
    gate = _uncast(sigmoid.inputs[0])
    split = producer(gate, "Split")
    if gate is None or split is None or len(split.outputs) != 2 or gate is not split.outputs[0]:
        return None
    rest = [f for f in factors if f is not sigmoids[0] and f is not gate and f is not split.outputs[1]]
    sizes, whole = [dims(v) for v in split.outputs], dims(split.inputs[0])
    if len(rest) != 1 or whole is None or sizes[0] is None or sizes[0] != sizes[1] or not _same(dims(rest[0]), [*whole[:-1], 1]):
        return None
    halves = attribute_int(split, "axis", 0) in (-1, len(whole) - 1) and isinstance(sizes[0][-1], int) and whole[-1] == 2 * sizes[0][-1]
    return _SwiGLU(rest[0], split) if halves else None


@dataclass(frozen=True)
class _Routing:
    """A router: the `k` experts whose `places` are the first by `logits`."""

    logits: ir.Value
    places: ir.Value
    k: int
    normalize: bool


def _routing(weights: ir.Value, experts: int) -> _Routing | None:
    """The router that made weights (…, E) of which all but k are 0."""
    some, divided = _uncast(weights), producer(_uncast(weights), "Div")
    if divided is not None:
        some = _uncast(divided.inputs[0])
        if some is None or _summed(divided.inputs[1], -1, keepdims=True) is not some:
            return None
    where = producer(some, "Where")
    less = producer(where.inputs[0], "Less") if where is not None else None
    softmax = _made(where.inputs[1], "Softmax") if where is not None else None
    if where is None or less is None or softmax is None or scalar(where.inputs[2]) != 0:
        return None
    logits, places, k = softmax.inputs[0], less.inputs[0], scalar(less.inputs[1])
    shape = dims(logits)
    if logits is None or places is None or k is None or shape is None or shape[-1] != experts or k != int(k) or not 1 <= k <= experts:
        return None
    if attribute_int(softmax, "axis", -1) not in (-1, len(shape) - 1) or logits.dtype != _F32 or not _are_places(places, logits, experts):
        return None
    return _Routing(logits, places, int(k), divided is not None)


def _are_places(places: ir.Value, logits: ir.Value, experts: int) -> bool:
    """Whether each place is the number of experts with a larger logit, or an equal one and a lower index."""
    counted = producer(_summed(places, -1, keepdims=False), "Cast")
    either = producer(counted.inputs[0], "Or") if counted is not None else None
    if either is None:
        return False
    for a, b in operands(either):
        larger, before = producer(a, "Greater"), producer(b, "And")
        if larger is None or before is None or not _is_pair(larger.inputs, logits):
            continue
        for c, table in operands(before):
            equal, lower = producer(c, "Equal"), constant(table)
            pair = equal is not None and any(_is_pair(each, logits) for each in operands(equal))
            if pair and lower is not None and np.array_equal(lower, np.tri(experts, k=-1, dtype=bool)):
                return True
    return False


def _is_pair(pair: Sequence[ir.Value | None], logits: ir.Value) -> bool:
    """Whether these are the logits of all the others, and of each one, to be compared."""
    return _unsqueezed(pair[0], -2) is logits and _unsqueezed(pair[1], -1) is logits


def _is_place(equal: ir.Node, routing: _Routing) -> bool:
    """Whether a comparison says which expert has each of the first k places: (…, k, E)."""
    wanted = np.arange(routing.k).reshape(-1, 1)
    return any(
        _unsqueezed(a, -2) is routing.places and (numbers := constant(b)) is not None and np.array_equal(numbers, wanted)
        for a, b in operands(equal)
    )


def _times_numbers(value: ir.Value, experts: int) -> ir.Value | None:
    """The booleans of `Cast(booleans) * [0, 1, .., E - 1]`."""
    product = producer(value, "Mul")
    for a, b in operands(product) if product is not None else ():
        cast, numbers = producer(a, "Cast"), constant(b)
        if cast is not None and numbers is not None and np.array_equal(numbers.reshape(-1), np.arange(experts)):
            return cast.inputs[0]
    return None


def _picked(value: ir.Value | None) -> tuple[_Weight, ir.Value] | None:
    """(weight, indices) of matrices picked by index, one index each."""
    node = _made(value, "GatherND")
    weight = _weight(node.inputs[0]) if node is not None else None
    indices, shape = (node.inputs[1], dims(node.inputs[1])) if node is not None else (None, None)
    if node is None or weight is None or indices is None or shape is None or shape[-1] != 1 or attribute_int(node, "batch_dims", 0) != 0:
        return None
    return weight, indices


def _layer(node: ir.Node) -> tuple[ir.Value, _Weight] | None:
    """(x, weight) of `x weight`, the weight a constant (in, out)."""
    if not is_op(node, "MatMul", "Gemm"):
        return None
    x, weight = node.inputs[0], _weight(node.inputs[1])
    if x is None or weight is None or len(weight.shape) != 2:
        return None
    if node.op_type == "Gemm":
        numbers = [node.attributes[name].as_float() for name in ("alpha", "beta") if name in node.attributes]
        if input_at(node, 2) is not None or any(number != 1 for number in numbers) or attribute_int(node, "transA", 0) != 0:
            return None
        if attribute_int(node, "transB", 0):
            weight = _Weight(weight.root, (*weight.steps, ("Transpose", (1, 0))), weight.shape[::-1])
    return x, weight


def _weight(value: ir.Value | None) -> _Weight | None:
    """A constant of floats, with what stands between it and this value."""
    shape = dims(value)
    if value is None or shape is None or value.dtype not in _FLOATS or not all(isinstance(d, int) for d in shape):
        return None
    static = tuple(d for d in shape if isinstance(d, int))
    if constant_tensor(value) is not None and value.is_initializer():
        return _Weight(value, (), static)
    node = producer(value, "Reshape", "Transpose")
    inner = _weight(node.inputs[0]) if node is not None else None
    if node is None or inner is None:
        return None
    perm = tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else tuple(range(len(static)))[::-1]
    return _Weight(inner.root, (*inner.steps, (node.op_type, static if node.op_type == "Reshape" else perm)), static)


def _uncast(value: ir.Value | None) -> ir.Value | None:
    """The value before casts between float32 and float16."""
    while (node := producer(value, "Cast")) is not None:
        source = node.inputs[0]
        if source is None or source.dtype not in _FLOATS or node.outputs[0].dtype not in _FLOATS:
            break
        value = source
    return value


def _made(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    return producer(_uncast(value), *op_types)


def _along(node: ir.Node | None, axis: int, of: ir.Value | None) -> bool:
    """Whether a node works along this axis alone, counted from the end of the shape of `of`."""
    shape, axes = dims(of), ints(input_at(node, 1)) if node is not None else None
    return shape is not None and axes is not None and [each % len(shape) for each in axes] == [axis % len(shape)]


def _unsqueezed(value: ir.Value | None, axis: int) -> ir.Value | None:
    node = _made(value, "Unsqueeze")
    return node.inputs[0] if node is not None and _along(node, axis, node.outputs[0]) else None


def _squeezed(value: ir.Value | None, axis: int) -> ir.Value | None:
    node = _made(value, "Squeeze")
    return node.inputs[0] if node is not None and _along(node, axis, node.inputs[0]) else None


def _summed(value: ir.Value | None, axis: int, *, keepdims: bool) -> ir.Value | None:
    node = _made(value, "ReduceSum")
    whole = node is not None and attribute_int(node, "keepdims", 1) == keepdims and _along(node, axis, node.inputs[0])
    return node.inputs[0] if node is not None and whole else None


def _write(scope: Scope, node: ir.Node, found: _Mixture) -> None:
    graph, out = scope.graph, node.outputs[0]

    def add(op_type: str, inputs: Sequence[ir.Value | None], attributes: dict[str, Any], what: str, dtype: ir.DataType) -> ir.Value:
        made = new_node(node, op_type, inputs, attributes)
        made.name = made.outputs[0].name = f"{out.name}/{what}"
        made.outputs[0].dtype = dtype
        graph.insert_before(node, made)
        return made.outputs[0]

    def widened(value: ir.Value, what: str) -> ir.Value:
        return value if value.dtype == _F32 else add("Cast", [value], {"to": int(_F32)}, what, _F32)

    backwards = new_constant(scope, node, np.arange(found.experts, dtype=np.int64)[::-1].copy())
    rows = add("Gather", [found.logits, backwards], {"axis": -1}, "experts/Gather", _F32)
    if len(dims(found.x) or ()) != 2:
        rows = add("Reshape", [rows, new_constant(scope, node, np.array([-1, found.experts]))], {}, "experts/Reshape", _F32)
    width = found.down.shape[-1]
    hidden = size(found.down.shape) // (found.experts * width)
    up = widened(_rearranged(found.up, _interleaved, (found.experts, 2 * hidden, width)), "experts/up")
    down = widened(_rearranged(found.down, _transposed, (found.experts, width, hidden)), "experts/down")
    x = widened(found.x, "experts/x")
    attributes: dict[str, int | float | str] = {"k": found.k, "normalize_routing_weights": int(found.normalize), **_SWIGLU}
    mixture = ir.node("MoE", [x, rows, up, None, down], attributes, domain=CONTRIB_DOMAIN)
    mixture.metadata_props.update(node.metadata_props)
    mixture.meta.update(node.meta)
    if out.dtype != _F32:
        mixture.name = mixture.outputs[0].name = f"{out.name}/experts"
        mixture.outputs[0].dtype, mixture.outputs[0].shape = _F32, out.shape
        graph.insert_before(node, mixture)
        mixture = new_node(node, "Cast", [mixture.outputs[0]], {"to": int(out.dtype or _F32)})
    mixture.name = node.name
    replace_node(node, call_it(mixture, "experts"))


def _rearranged(weight: _Weight, how: Callable[[Array, int], Array], sizes: tuple[int, int, int]) -> ir.Value:
    """An initializer with the weight as the operator wants it, computed when it is written."""
    graph = weight.root.graph
    assert graph is not None
    base = name = f"{weight.root.name}.experts"
    count = 0
    while name in graph.initializers:
        count += 1
        name = f"{base}.{count}"
    dtype, shape = weight.root.dtype or _F32, ir.Shape(sizes)
    # Not cached: a second copy of all weights is never held.
    lazy = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(how(weight.numpy(), sizes[0])), dtype=dtype, name=name),
        dtype=dtype,
        shape=shape,
        name=name,
        cache=False,
    )
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=lazy)
    value.meta.update(weight.root.meta)
    graph.register_initializer(value)
    return value


def _interleaved(array: Array, experts: int) -> Array:
    """(E, 2 h, d) or (d, E 2 h), gates before ups, to (E, 2 h, d) with gate and up by turns and the last expert first."""
    width = array.shape[-1] if array.ndim == 3 else array.shape[0]
    apart = (array if array.ndim == 3 else array.T).reshape(experts, 2, -1, width)
    return apart[::-1].transpose(0, 2, 1, 3).reshape(experts, -1, width)


def _transposed(array: Array, experts: int) -> Array:
    """(E, h, d) or (E h, d) to (E, d, h), the last expert first."""
    return array.reshape(experts, -1, array.shape[-1])[::-1].transpose(0, 2, 1)
