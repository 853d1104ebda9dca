"""The native kernels through the C interface: the 16 lanes of AVX-512, each vector made of two of AVX2's."""

from isthmus.exporter.ops.native import numpy_call

PART = "onnxruntime"
DTYPES = ("float32", "float16", "bfloat16")
ARITHMETIC = "float32"


def run(op, inputs, attributes):
    return numpy_call.run(op, inputs, attributes, level="avx2x16")


def not_run():
    return numpy_call.missing("avx2x16")
