"""The standard operators of opset 27, LinearAttention and CausalConvWithState, in ONNX Runtime."""

import functools

import onnx
import onnx_ir as ir
import onnxruntime as ort

from isthmus.exporter.ops.onnx_models import node_of, one_node
from isthmus.exporter.passes import optimise
from isthmus.exporter.passes.convert_opset import ConvertOpset
from isthmus.exporter.passes.to_standard_operators import ToStandardOperators

PART = "onnx27"
DTYPES = ("float32", "float16")
ARITHMETIC = "float32"
TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}


@functools.cache
def session(op, op_type, dtype, attributes, static):
    form = next(f for f in op.forms if f.op_type == op_type)
    model = one_node(op, form, dict(attributes), TYPES[dtype], static=dict(static), opset=23)
    ConvertOpset(27)(model)
    ToStandardOperators()(model)
    optimise(model)
    types = [node.op_type for node in model.graph.all_nodes()]
    assert {node.domain for node in model.graph.all_nodes()} == {""}
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert types.count("LinearAttention") + types.count("CausalConvWithState") == 1
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(op, inputs, attributes):
    form, attributes, operands = node_of(op, inputs, attributes)
    dtype = str(inputs[op.inputs[0].name].dtype)
    sizes = op.infer({name: x.shape for name, x in inputs.items()}, attributes)
    static = tuple((name, size) for name, size in sizes.items() if name not in ("batch", "length", "tokens"))
    names = [a.name for a in op.outputs]
    results = session(op, form.op_type, dtype, tuple(attributes.items()), static).run(names, operands)
    return dict(zip(names, results, strict=True))
