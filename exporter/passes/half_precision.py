"""Lowers a float32 graph to float16 or bfloat16, with islands of float32 where that is not enough."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np
import onnx
import onnx_ir as ir

from ..op import DOMAIN
from ..ops.onnx_forms import register
from .scope import module_of

FLOAT16_MAX = 65504.0
_SMALLEST_NORMAL = 6.104e-5  # below this float16 loses bits, and below 6e-8 it is zero: an epsilon must not end there

_HEAVY = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Attention"})
"""Where the time goes: always in half precision unless a value leaves its range, accumulated in float32 by every target."""

_NORMS = frozenset(
    {"LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization", "LpNormalization"}
)
_SUMS = frozenset(
    {"ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceProd", "ReduceLogSumExp", "ReduceLogSum", "CumSum"}
)
_CURVES = frozenset({"Exp", "Log", "Softplus", "Sin", "Cos", "Tan"})
_DISCRETE = frozenset(
    {"Floor", "Ceil", "Round", "Mod", "ArgMax", "ArgMin", "TopK", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Equal", "OneHot"}
)
_PICKS = frozenset({"ArgMax", "ArgMin", "TopK"})
"""Decisions between numbers that lie near each other, such as distances to the vectors of a codebook."""

_STEEP = frozenset({"Pow", "Sqrt", "Reciprocal", "Softmax", "LogSoftmax"})

_MOVES = frozenset(
    """Reshape Transpose Squeeze Unsqueeze Slice Split Concat Gather Expand Pad Flatten Identity Tile GatherND GatherElements
    ScatterND Where DepthToSpace SpaceToDepth""".split()
)
_ELEMENTWISE = frozenset("Add Sub Mul Neg Abs Relu Min Max Clip Sum Cast CastLike Sigmoid".split())

_SMALL = 16
"""Elements up to which a constant is taken for an epsilon or a mask's value, and not for a weight."""

_SHORT = {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
_SUFFIX = {ir.DataType.FLOAT16: "f16", ir.DataType.BFLOAT16: "bf16", ir.DataType.FLOAT: "f32"}
_TYPE = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}
"""How ONNX's schemas name the types."""

PRECISION = "isthmus.precision"
"""Metadata property of the nodes that stay in float32."""


def overflowing(peaks: Mapping[str, float], largest: float = FLOAT16_MAX) -> list[str]:
    """The modules that are kept out of a dtype, by the largest |value| that each was seen to read or compute.

    Args:
        peaks: Module path to peak.
        largest: The dtype's largest value. Half of it is the limit, because other inputs than those seen may be larger.
    """
    return [path for path, peak in peaks.items() if peak > largest / 2]


class ToHalf(ir.passes.InPlacePass):
    """Lowers float32 to float16 or bfloat16, keeping islands of float32.

    Inputs and outputs of the graph keep their types. A node stays in float32 when it

    1. normalises, sums, takes an exponential, logarithm, power, root, sine or softmax, or makes a decision of a number (a rounding, a
       comparison, a cast to an integer);
    2. has a small constant that float16 cannot hold (an epsilon of 1e-6), or a weight beyond 65504; bfloat16 has float32's range;
    3. belongs to a module in which a value beyond the dtype's range was seen;
    4. feeds a sine, cosine, exponential, softplus or a decision through elementwise operators (the angle of a timestep embedding needs
       more than 11 bits), or continues an exponential through them (the decay and the state of a scan), or is the product that an argmin,
       argmax or top-k chooses from, such as the distances to a codebook, or feeds that product through elementwise operators;
    5. is one of the products that a division normalises afterwards (linear attention sums over all tokens before it divides);
    6. stands between such nodes only, so that nothing is gained by two casts;
    7. computes floats from integers and booleans alone, element by element, such as what codes stand for.

    Nodes of our own operators take what their schemas let them: activations in half precision, parameters and states in float32. Inside
    they sum in float32.

    Given::

        h = MatMul(x, w)
        y = Softmax(h)

    Result::

        x_f16 = Cast<to=FLOAT16>(x)
        h = MatMul(x_f16, w)              # w stored as float16
        h_f32 = Cast<to=FLOAT>(h)
        y = Softmax(h_f32)

    Args:
        keep_modules: PyTorch module paths whose nodes stay in float32 (rule 3).
        dtype: FLOAT16 or BFLOAT16.
    """

    def __init__(self, keep_modules: Collection[str] = (), dtype: ir.DataType = ir.DataType.FLOAT16) -> None:
        self._keep_modules = frozenset(keep_modules)
        self._dtype = dtype
        self._half = 0
        self._single = 0

    def summary(self) -> str:
        """One sentence on what the last call did."""
        half = f"{self._half} floating point nodes compute in {_SHORT[self._dtype]}"
        return f"{half}, {self._single} stay in fp32 (norms, softmax, accumulations, overflow)"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph in place. Nodes with subgraphs, and calls of others' functions, stay in float32 as a whole."""
        graph = model.graph
        opset = model.opset_imports.get("", 1)
        floating = [node for node in graph if _touches_float(node)]
        single = self._islands(floating, opset)
        casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        half_weights: dict[ir.Value, ir.Value] = {}
        outputs = {value: i for i, value in enumerate(graph.outputs)}

        for node in floating:
            if node in single:
                node.metadata_props[PRECISION] = "float32"
        self._single = len(single)
        self._half = len(floating) - len(single)
        for node in floating:
            half = node not in single
            accepts = _half_inputs(node, opset, self._dtype) if half else frozenset()
            for i, value in enumerate(node.inputs):
                if value is None:
                    continue
                if half and i in accepts and value.dtype == ir.DataType.FLOAT:
                    if value.is_initializer():
                        node.replace_input_with(i, _half_weight(value, graph, half_weights, self._dtype))
                    else:
                        node.replace_input_with(i, _cast(value, self._dtype, node, graph, casts))
                elif value.dtype == self._dtype and not (half and i in accepts):
                    node.replace_input_with(i, _cast(value, ir.DataType.FLOAT, node, graph, casts))
            if half:
                if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
                    node.attributes["to"] = ir.AttrInt64("to", int(self._dtype))
                if node.op_type == "Attention":
                    node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", int(ir.DataType.FLOAT))
                for value, narrow in zip(node.outputs, _half_outputs(node, opset, self._dtype), strict=True):
                    if value.dtype == ir.DataType.FLOAT and narrow:
                        # A new type: Model.clone shares the type objects, and setting `dtype` would change the original too.
                        value.type = ir.TensorType(self._dtype)
        for node in single:
            _restore_captures(node, graph, casts, self._dtype)
        for value, i in outputs.items():
            if value.dtype == self._dtype:
                _restore_output(graph, i, value)
        for weight, lowered in half_weights.items():
            if not weight.uses() and weight.name is not None and lowered.name is not None:
                del graph.initializers[weight.name]
                del graph.initializers[lowered.name]
                lowered.name = weight.name
                graph.initializers[weight.name] = lowered
        return ir.passes.PassResult(model, modified=bool(floating))

    def _islands(self, floating: list[ir.Node], opset: int) -> set[ir.Node]:
        single = {node for node in floating if self._stays(node, opset)} | _of_integers(floating)
        known = set(floating)
        for node in list(single):
            if node.op_type in _CURVES or _decides(node):
                reached = _spread(node, single, known, _producers, _is_summed if _decides(node) else _is_elementwise)
                if node.op_type in _PICKS:
                    for product in [p for n in reached for p in _producers(n) if p in known and p.op_type in ("MatMul", "Gemm")]:
                        single.add(product)
                        _spread(product, single, known, _producers, _is_elementwise)
            if node.op_type == "Exp":
                _spread(node, single, known, _consumers, lambda n: n.op_type in _ELEMENTWISE | _MOVES | {"Div"})
            if node.op_type in ("Div", "Reciprocal"):
                _spread(node, single, known, _producers, _is_unnormalised_product)
        grown = True
        while grown:
            between = {
                node
                for node in floating
                if node not in single
                and node.op_type in _ELEMENTWISE | _MOVES
                and _all_in(_producers(node), single)
                and _all_in(_consumers(node), single)
            }
            grown = bool(between)
            single |= between
        return single

    def _stays(self, node: ir.Node, opset: int) -> bool:
        if node.domain not in ("", DOMAIN) or any(
            a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()
        ):
            return True
        if not _may_be_half(node, opset, self._dtype) or module_of(node) in self._keep_modules:
            return True
        if node.op_type in _NORMS | _SUMS | _CURVES | _STEEP or _decides(node):
            return True
        if node.op_type == "Div" and node.inputs[1] is not None and not node.inputs[1].is_initializer():
            return True
        return self._dtype == ir.DataType.FLOAT16 and any(_is_beyond_half(value) for value in node.inputs)


def _decides(node: ir.Node) -> bool:
    if node.op_type == "Cast" and node.outputs[0].dtype is not None:
        return not node.outputs[0].dtype.is_floating_point()
    return node.op_type in _DISCRETE


def _touches_float(node: ir.Node) -> bool:
    return any(v is not None and v.dtype == ir.DataType.FLOAT for v in (*node.inputs, *node.outputs))


def _producers(node: ir.Node) -> list[ir.Node]:
    return [p for v in node.inputs if v is not None and v.dtype == ir.DataType.FLOAT and (p := v.producer()) is not None]


def _consumers(node: ir.Node) -> list[ir.Node]:
    return [user for v in node.outputs if v.dtype == ir.DataType.FLOAT for user, _ in v.uses()]


def _all_in(nodes: list[ir.Node], single: set[ir.Node]) -> bool:
    return bool(nodes) and all(node in single for node in nodes)


def _of_integers(floating: list[ir.Node]) -> set[ir.Node]:
    """The nodes of rule 7; `floating` is in the order of the graph."""
    found: set[ir.Node] = set()
    for node in floating:
        producers = _producers(node)
        if node.op_type == "Cast" and not _reads(node, ir.DataType.FLOAT):
            found.add(node)
        elif node.op_type in _ELEMENTWISE | _MOVES | _SUMS | {"Div"} and producers and all(p in found for p in producers):
            varying = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.FLOAT and not v.is_initializer()]
            if all(v.producer() is not None for v in varying):
                found.add(node)
    return found


def _reads(node: ir.Node, dtype: ir.DataType) -> bool:
    return any(value is not None and value.dtype == dtype for value in node.inputs)


def _is_elementwise(node: ir.Node) -> bool:
    return node.op_type in _ELEMENTWISE | _MOVES | {"Div"} | _CURVES


def _is_summed(node: ir.Node) -> bool:
    return node.op_type in _SUMS or _is_elementwise(node)


def _spread(
    start: ir.Node,
    single: set[ir.Node],
    known: set[ir.Node],
    step: Callable[[ir.Node], Iterable[ir.Node]],
    through: Callable[[ir.Node], bool],
) -> set[ir.Node]:
    """Adds to `single` what is reached from `start`, and returns it with `start`."""
    queue, seen = collections.deque([start]), {start}
    while queue:
        for node in step(queue.popleft()):
            if node in known and node not in seen and through(node):
                seen.add(node)
                single.add(node)
                queue.append(node)
    return seen


def _is_unnormalised_product(node: ir.Node) -> bool:
    if node.op_type in _MOVES | {"Add", "Mul"}:
        return True
    # A product of two activations; a product with a weight is an ordinary layer and stays in float16.
    return node.op_type == "MatMul" and all(value is not None and not value.is_initializer() for value in node.inputs)


def _is_beyond_half(value: ir.Value | None) -> bool:
    if value is None or value.const_value is None or value.dtype != ir.DataType.FLOAT:
        return False
    array = value.const_value.numpy()
    if array.size == 0:
        return False
    if array.size <= _SMALL:
        magnitude = np.abs(array)
        finite = magnitude[np.isfinite(magnitude)]  # an infinite constant is a mask; it is infinite in float16 as well
        if bool(((finite > 0) & (finite < _SMALLEST_NORMAL)).any()):
            return True
        return finite.size > 0 and float(finite.max()) > FLOAT16_MAX
    # A large weight is looked at without a copy of it, unless it is a mask.
    peak = max(float(array.max()), -float(array.min()))
    if not np.isfinite(peak):
        finite = array[np.isfinite(array)]
        peak = float(np.abs(finite).max()) if finite.size else 0.0
    return peak > FLOAT16_MAX


def _formal_types(node: ir.Node, opset: int) -> tuple[list[set[str]], list[set[str]]] | None:
    if node.domain == DOMAIN:
        register()
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return None

    def expand(formal: list[onnx.defs.OpSchema.FormalParameter], count: int) -> list[set[str]]:
        return [set(formal[min(i, len(formal) - 1)].types) for i in range(count)] if formal else []

    return expand(list(schema.inputs), len(node.inputs)), expand(list(schema.outputs), len(node.outputs))


def _may_be_half(node: ir.Node, opset: int, dtype: ir.DataType) -> bool:
    types = _formal_types(node, opset)
    if types is None or node.op_type in ("Constant", "ConstantOfShape", "Range", "RandomNormal", "RandomUniform", "EyeLike"):
        return False
    # The type of such an output is given by an attribute, or by the elements of a sequence.
    if {"dtype", "output_datatype"} & set(node.attributes) or any(
        value is not None and value.type is not None and not isinstance(value.type, ir.TensorType)
        for value in (*node.inputs, *node.outputs)
    ):
        return False
    if node.domain == DOMAIN:
        return True
    return all(_TYPE[dtype] in allowed for value, allowed in zip(node.outputs, types[1], strict=True) if value.dtype == ir.DataType.FLOAT)


def _half_inputs(node: ir.Node, opset: int, dtype: ir.DataType) -> frozenset[int]:
    types = _formal_types(node, opset)
    return frozenset(i for i, allowed in enumerate(types[0]) if _TYPE[dtype] in allowed) if types else frozenset()


def _half_outputs(node: ir.Node, opset: int, dtype: ir.DataType) -> list[bool]:
    types = _formal_types(node, opset)
    return [_TYPE[dtype] in allowed for allowed in types[1]] if types else [True] * len(node.outputs)


def _half_weight(value: ir.Value, graph: ir.Graph, made: dict[ir.Value, ir.Value], dtype: ir.DataType) -> ir.Value:
    if value not in made:
        tensor = value.const_value
        assert tensor is not None
        name = f"{value.name}.{dtype.name.lower()}"

        # Lazily, and not cached: a second copy of all weights is never held.
        def convert(tensor: ir.TensorProtocol = tensor, name: str = name) -> ir.TensorProtocol:
            return ir.tensor(tensor.numpy().astype(dtype.numpy()), name=name)

        shape = ir.Shape(tensor.numpy().shape)
        half = ir.LazyTensor(convert, dtype=dtype, shape=shape, name=name, cache=False)
        made[value] = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape, const_value=half)
        graph.register_initializer(made[value])
    return made[value]


def _cast(
    value: ir.Value, to: ir.DataType, before: ir.Node, graph: ir.Graph, made: dict[tuple[ir.Value, ir.DataType], ir.Value]
) -> ir.Value:
    if (value, to) not in made:
        producer = value.producer()
        # Back to the type that it was cast from: take the original.
        if (
            producer is not None
            and producer.op_type == "Cast"
            and producer.metadata_props.get("isthmus.cast")
            and producer.inputs[0] is not None
        ):
            return producer.inputs[0]
        suffix = _SUFFIX[to]
        node = ir.node("Cast", [value], attributes={"to": int(to)}, name=f"{value.name}.{suffix}")
        node.metadata_props.update((producer or before).metadata_props)
        node.metadata_props.pop(PRECISION, None)
        node.metadata_props["isthmus.cast"] = suffix
        output = node.outputs[0]
        output.name, output.dtype, output.shape = f"{value.name}.{suffix}", to, value.shape
        if producer is not None and producer.graph is graph:
            graph.insert_after(producer, node)
        else:
            graph.insert_before(graph[0], node)
        made[(value, to)] = output
    return made[(value, to)]


def _restore_captures(node: ir.Node, graph: ir.Graph, made: dict[tuple[ir.Value, ir.DataType], ir.Value], dtype: ir.DataType) -> None:
    """Gives the subgraphs of a node, which stay in float32, the float32 form of what they read from the graph around them."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            bodies = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            bodies = list(attribute.as_graphs())
        else:
            continue
        for body in bodies:
            for inner in ir.traversal.RecursiveGraphIterator(body):
                for i, value in enumerate(inner.inputs):
                    if value is not None and value.dtype == dtype and not value.is_initializer():
                        inner.replace_input_with(i, _cast(value, ir.DataType.FLOAT, node, graph, made))


def _restore_output(graph: ir.Graph, index: int, value: ir.Value) -> None:
    producer = value.producer()
    assert producer is not None
    name = value.name
    assert value.dtype is not None
    value.name = f"{name}.{_SUFFIX[value.dtype]}"
    node = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{name}.f32")
    node.metadata_props.update(producer.metadata_props)
    output = node.outputs[0]
    output.name, output.dtype, output.shape = name, ir.DataType.FLOAT, value.shape
    graph.append(node)
    graph.outputs[index] = output
