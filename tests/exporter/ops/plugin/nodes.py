"""The node types of the plugin library, with sizes and attributes to try them with."""

import numpy as np
from onnx import TensorProto

from isthmus.exporter.op import OPS
from isthmus.exporter.ops.gpu import plan as plans

STANDARD = ("LinearAttention", "CausalConvWithState")
FORMS = [(name, form.op_type) for name in OPS if OPS[name].has("tensorrt") for form in OPS[name].forms]
SIZES = {
    "batch": 2, "length": 40, "channels": 12, "groups": 3, "state": 16, "width": 4, "tokens": 24, "key": 16, "value": 24,
    "num_heads": 2, "q_num_heads": 4, "kv_num_heads": 2, "decays": 1, "betas": 2,
}  # fmt: skip
ATTRIBUTES = {
    "delta_softplus": 1, "reverse": 1, "num_heads": 2, "eps": 0.25, "q_num_heads": 4, "kv_num_heads": 2, "scale": 0.5, "silu": 1,
}  # fmt: skip
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def size(dim, sizes):
    return dim if isinstance(dim, int) else sizes[dim[:-2]] - 1 if dim.endswith("-1") else int(np.prod([sizes[f] for f in dim.split("*")]))


def described(op, op_type, dtype, sizes=SIZES):
    """Dtype and shape of the inputs and of the outputs of a node."""
    known = {a.name: a for a in op.inputs}
    arguments = [[known[n] for n in plans.form_of(op, op_type).inputs], list(op.outputs)]
    return [[("float32" if a.wide else dtype, tuple(size(d, sizes) for d in a.shape)) for a in some] for some in arguments]


FP8 = "float8_e4m3fn"


def described_fp8(op_type, out):
    """As `described`, for linear attention of FP8 queries, keys and values; `out` is the dtype of the other activations."""
    op = OPS["linear_attention"]
    inputs, outputs = described(op, op_type, out)
    names = plans.form_of(op, op_type).inputs
    return [[(FP8 if n in ("q", "k", "v") else t, s) for n, (t, s) in zip(names, inputs, strict=True)], outputs]


def fields(op, op_type):
    form = plans.form_of(op, op_type)
    return {a.name: ATTRIBUTES[a.name] for a in op.attributes if a.name not in form.fixed}
