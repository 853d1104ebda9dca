"""The native kernels as custom ops of ONNX Runtime, at the best instruction set of this machine. No body is in the model."""

from isthmus.exporter.ops import native
from isthmus.exporter.ops.native import sessions

PART = "onnxruntime"
DTYPES = ("float32", "float16", "bfloat16")
ARITHMETIC = "float32"


def run(op, inputs, attributes):
    return sessions.run(op, inputs, attributes, native.build())
