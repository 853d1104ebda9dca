"""The ONNX node with the body of ONNX Runtime's own operators that files for ONNX Runtime have, where there is one."""

import functools

import onnx
import onnx_ir as ir
import onnxruntime as ort

from isthmus.exporter.ops.onnx_models import node_of, one_node

PART = "onnx"
DTYPES = ("float32", "float16")
ARITHMETIC = "float32"
TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}


@functools.cache
def session(op, op_type, dtype, attributes):
    form = next(f for f in op.forms if f.op_type == op_type)
    model = one_node(op, form, dict(attributes), TYPES[dtype], contrib=True)
    contrib = {node.op_type for function in model.functions.values() for node in function if node.domain == "com.microsoft"}
    assert bool(contrib) == hasattr(op.part("onnx"), "CONTRIB")
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(op, inputs, attributes):
    form, attributes, operands = node_of(op, inputs, attributes)
    dtype = str(inputs[op.inputs[0].name].dtype)
    names = [a.name for a in op.outputs]
    results = session(op, form.op_type, dtype, tuple(attributes.items())).run(names, operands)
    return dict(zip(names, results, strict=True))
