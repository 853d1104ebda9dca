"""The GPU kernels, interpreted on the CPU; what the interpreter gets wrong is put right in `isthmus.exporter.ops.gpu.interpreter_fixes`."""

from isthmus.exporter.ops.gpu import interpret

PART = "gpu"
DTYPES = ("float32", "float16", "bfloat16")
ARITHMETIC = "float32"


def run(op, inputs, attributes):
    return interpret.run(op, inputs, attributes)
