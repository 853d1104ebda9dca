"""The native kernels through the C interface: AVX-512."""

from isthmus.exporter.ops.native import numpy_call

PART = "onnxruntime"
DTYPES = ("float32", "float16", "bfloat16")
ARITHMETIC = "float32"


def run(op, inputs, attributes):
    return numpy_call.run(op, inputs, attributes, level="avx512")


def not_run():
    return numpy_call.missing("avx512")
