"""Types and shapes of every value, by onnx.shape_inference on the graph without its weights."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from ._rewrite import constant, merge_shape

_WITH_VALUE = 1024  # bytes; a larger initializer is given to the inference by type and shape only


class InferShapes(ir.passes.InPlacePass):
    """Fills in the types and shapes that are missing.

    Given::

        f (float[batch, 16] x, float[16, 4] w) => (float[batch, 4] z) {
            y = MatMul (x, w)
            z = Relu (y)
        }

    Result: the same nodes, with `float[batch, 4] y`.

    What a value already says stays: the names of symbolic sizes are the caller's, and the inference only adds to them. (onnx_ir's own
    ShapeInferencePass overwrites them.) Where the two contradict each other the annotation that was there stays, and the checker is left
    to say so. Names that the inference makes up for unknown sizes (`unk__0`) are not taken over. Weights never enter the protobuf, which
    holds 2 GiB at most; they are not read either. Values are not propagated: FoldShapes does that for shapes, while onnx's own
    `data_prop` also computes a Range or ConstantOfShape of any length (two million elements take 0.4 s).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        inferred = onnx.shape_inference.infer_shapes(_skeleton(model), check_type=False, strict_mode=False, data_prop=False)
        return ir.passes.PassResult(model, _merge(model.graph, inferred.graph))


def _skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model as a protobuf, its weights given as inputs."""
    proto = onnx.ModelProto(ir_version=model.ir_version)
    proto.opset_import.extend(onnx.OperatorSetIdProto(domain=domain, version=version) for domain, version in model.opset_imports.items())
    graph = proto.graph
    graph.name = model.graph.name or "main"
    inputs = list(model.graph.inputs)
    graph.input.extend(ir.serde.serialize_value(value) for value in inputs)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if value.is_graph_input() or tensor is None:
            continue
        value.dtype = value.dtype or tensor.dtype
        value.shape = value.shape if value.shape is not None else ir.Shape(tensor.shape.numpy())
        if constant(value, _WITH_VALUE) is not None:
            graph.initializer.append(ir.serde.serialize_tensor(tensor))
        else:
            graph.input.append(ir.serde.serialize_value(value))
    outputs = set(model.graph.outputs)
    for node in model.graph:
        graph.node.append(ir.serde.serialize_node(node))
        graph.value_info.extend(
            ir.serde.serialize_value(value) for value in node.outputs if value.name and value.type is not None and value not in outputs
        )
    graph.output.extend(ir.serde.serialize_value(value) for value in model.graph.outputs)
    proto.functions.extend(ir.serde.serialize_function(function) for function in model.functions.values())
    return proto


def _merge(graph: ir.Graph, proto: onnx.GraphProto) -> bool:
    modified = False
    found = {info.name: info.type for info in (*proto.value_info, *proto.output)}
    for node, node_proto in zip(graph, proto.node, strict=True):
        for value in node.outputs:
            if value.name in found:
                modified |= _annotate(value, found[value.name])
        for attribute in node_proto.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                modified |= _merge(node.attributes[attribute.name].as_graph(), attribute.g)
    return modified


def _annotate(value: ir.Value, proto: onnx.TypeProto) -> bool:
    modified = False
    if value.type is None:
        inferred = ir.serde.deserialize_type_proto_for_type(proto)
        if inferred is not None and inferred.dtype != ir.DataType.UNDEFINED:
            value.type, modified = inferred, True
    shape = ir.serde.deserialize_type_proto_for_shape(proto)
    if shape is None or not isinstance(value.type, ir.TensorType):
        return modified
    known = ir.Shape([None if isinstance(d, ir.SymbolicDim) and (d.value or "").startswith("unk__") else d for d in shape])
    return merge_shape(value, known) or modified
