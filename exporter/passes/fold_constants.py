"""Constant folding: nodes whose inputs are all constant, evaluated by the ONNX reference implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from ._rewrite import Array, Scope, constant, constant_tensor, is_op, new_constant, replace, scopes, size

# The output has at most as many elements as all inputs together.
_BOUNDED = frozenset(
    "Abs Acos Asin Atan Cast CastLike Ceil Clip Concat Cos CumSum Erf Exp Flatten Floor Gelu Identity IsInf IsNaN LeakyRelu Log Neg Not "
    "Reciprocal ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Round Shape Sigmoid Sign Sin Size "
    "Slice Softmax "
    "Split Sqrt Squeeze Tan Tanh Transpose Trilu Unsqueeze".split()
)
# The output has the shape that the inputs broadcast to.
_BROADCAST = frozenset(
    "Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mod Mul Or Pow PRelu Sub "
    "Where Xor".split()
)


def _gathered(inputs: Sequence[Array]) -> int:
    # Whatever the axis, an element of the indices takes at most the whole of the data.
    return int(inputs[0].size) * max(int(inputs[1].size), 1)


def _range(inputs: Sequence[Array]) -> int:
    start, limit, delta = (float(i.reshape(())) for i in inputs)
    return max(int(np.ceil((limit - start) / delta)), 0) if delta else 0


def _matmul(inputs: Sequence[Array]) -> int:
    a, b = inputs
    if a.ndim < 2 or b.ndim < 2:
        return max(a.size, b.size)
    return int(size(np.broadcast_shapes(a.shape[:-2], b.shape[:-2])) * a.shape[-2] * b.shape[-1])


# How many elements the output has, at most, for the operators whose output can be larger than their inputs.
_EXPANDING: dict[str, Callable[[Sequence[Array]], int]] = {
    "ConstantOfShape": lambda inputs: size(inputs[0].tolist()),
    "Expand": lambda inputs: size(np.broadcast_shapes(inputs[0].shape, tuple(inputs[1].tolist()))),
    "Gather": _gathered,
    "MatMul": _matmul,
    "Range": _range,
    "Tile": lambda inputs: inputs[0].size * size(inputs[1].tolist()),
}


class FoldConstants(ir.passes.InPlacePass):
    """Replaces by its value every node whose inputs are all constant, and turns Constant nodes into initializers.

    Given::

        f (float[2, 3] x) => (float[2, 3] z) {
            one = Constant <value: tensor = int64 {1}> ()
            one_f = Cast <to: int = 1> (one)
            z = Add (x, one_f)
        }

    Result::

        f (float[2, 3] x) => (float[2, 3] z) <float one_f = {1}> {
            z = Add (x, one_f)
        }

    Nothing is inferred from the value of one operand alone: `x + 1e-15` stays as it is.
    Only operators of the default domain that are functions of their inputs are folded. Inputs and outputs are both bounded by
    `limit_bytes`, so that neither a weight is copied nor a mask of many MiB written into the model. Transposes of weights are
    FoldTransposes' work. In functions, which have no initializers, the results are Constant nodes.

    Args:
        limit_bytes: The most that the inputs of a folded node, and its output, may take.
    """

    def __init__(self, limit_bytes: int = 4 << 20) -> None:
        super().__init__()
        self.limit_bytes = limit_bytes
        self._evaluators: dict[tuple[bytes, int], ReferenceEvaluator] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        modified = False
        for scope in scopes(model):
            for node in scope.graph:
                modified |= self._lift(scope, node) if is_op(node, "Constant") else self._fold(scope, node)
        return ir.passes.PassResult(model, modified)

    def _lift(self, scope: Scope, node: ir.Node) -> bool:
        value = node.outputs[0]
        tensor = None if scope.is_function or value.is_graph_output() else constant_tensor(value)
        if tensor is None:
            return False
        replace(value, new_constant(scope, node, tensor))
        scope.graph.remove(node, safe=True)
        return True

    def _fold(self, scope: Scope, node: ir.Node) -> bool:
        op = node.op_type
        if node.domain != "" or (op not in _BOUNDED and op not in _BROADCAST and op not in _EXPANDING) or not node.inputs:
            return False
        if any(v.is_graph_output() for v in node.outputs) or any(a.is_ref() for a in node.attributes.values()):
            return False
        if any(value is not None and constant_tensor(value) is None for value in node.inputs):
            return False
        inputs = [constant(value, self.limit_bytes) for value in node.inputs]
        given = [array for array in inputs if array is not None]
        if len(given) != sum(value is not None for value in node.inputs):
            return False  # too large, or strings
        try:
            if self._output_bytes(node, given) > self.limit_bytes:
                return False
            results = self._evaluate(node, inputs, scope.opset)
        except (ValueError, IndexError, TypeError, NotImplementedError, RuntimeError):
            return False  # the node is invalid, or the reference lacks it: leave the verdict to the checker and the run time
        for value, result in zip(node.outputs, results, strict=True):
            expected = value.dtype
            if expected is not None and ir.DataType.from_numpy(result.dtype) != expected:
                return False
        for value, result in zip(node.outputs, results, strict=True):
            if value.uses():
                replace(value, new_constant(scope, node, result))
        scope.graph.remove(node, safe=True)
        return True

    def _output_bytes(self, node: ir.Node, inputs: Sequence[Array]) -> int:
        if node.op_type in _EXPANDING:
            # The first input has the output's type, or (ConstantOfShape) one at least as large.
            return _EXPANDING[node.op_type](inputs) * inputs[0].itemsize
        if node.op_type in _BROADCAST:
            elements = size(np.broadcast_shapes(*(array.shape for array in inputs)))
        else:
            elements = sum(array.size for array in inputs)
        return elements * max(8 if node.op_type in ("Shape", "Size", "Cast") else 1, *(array.itemsize for array in inputs))

    def _evaluate(self, node: ir.Node, inputs: Sequence[Array | None], opset: int) -> list[Array]:
        proto = ir.serde.serialize_node(node)
        del proto.input[:], proto.output[:], proto.metadata_props[:]
        proto.name = proto.doc_string = ""
        proto.input.extend("" if array is None else f"i{i}" for i, array in enumerate(inputs))
        proto.output.extend(f"o{i}" for i in range(len(node.outputs)))
        key = (proto.SerializeToString(), opset)
        evaluator = self._evaluators.get(key)
        if evaluator is None:
            evaluator = self._evaluators[key] = ReferenceEvaluator(proto, opsets={"": opset})
        feeds = {f"i{i}": array for i, array in enumerate(inputs) if array is not None}
        with np.errstate(all="ignore"):  # inf and nan are what the run time would compute, too
            results = evaluator.run(None, feeds)
        return [np.asarray(result) for result in results]
