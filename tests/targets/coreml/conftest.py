"""Programs of MIL made from a function, for the tests of the interpreter."""

import numpy as np
import pytest

from isthmus.exporter.quiet import quiet

with quiet("coremltools"):  # it reports on import that it was not tested with this torch, and that no Core ML is here
    import coremltools as ct
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import types

KINDS = {np.dtype("float32"): types.fp32, np.dtype("float16"): types.fp16, np.dtype("int32"): types.int32, np.dtype("bool"): types.bool}


@pytest.fixture
def program():
    """The MIL program of `function`, with inputs like the arrays. MIL computes what does not depend on an input when it is built."""

    def build(function, *arrays):
        # MIL takes the inputs' names from the function's own.
        def one(a):
            return function(a)

        def two(a, b):
            return function(a, b)

        def three(a, b, c):
            return function(a, b, c)

        specs = [Builder.TensorSpec(shape=a.shape, dtype=KINDS[a.dtype]) for a in arrays]
        built = Builder.program(input_specs=specs, opset_version=ct.target.iOS18)((one, two, three)[len(arrays) - 1])
        return built, dict(zip("abc", arrays, strict=False))

    return build
