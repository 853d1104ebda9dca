"""What the cases of the interpreter's operations share: MIL's builder, and inputs. The cases are in `operations_*.py`."""

import numpy as np

from isthmus.exporter.quiet import quiet

with quiet("coremltools"):  # it reports on import that it was not tested with this torch, and that no Core ML is here
    from coremltools.converters.mil import Builder

mb = Builder


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def normal(*shape, seed=0):
    return rng(seed).standard_normal(shape, dtype=np.float32)


X = normal(2, 3, 4)
POSITIVE = np.abs(X) + np.float32(0.1)
UNIT = np.tanh(X)
IMAGE = normal(2, 4, 7, 9)
INTEGERS = rng(1).integers(-9, 9, (2, 3, 4), dtype=np.int32)
NONZERO = np.where(INTEGERS == 0, 3, INTEGERS).astype(np.int32)
TRUTH = X > 0
KERNEL = normal(6, 2, 3, 3, seed=2)
TRANSPOSED = normal(4, 3, 3, 3, seed=3)
PLACES = np.array([2, 0, -1], np.int32)
ALONG = rng(4).integers(0, 4, (2, 3, 5), dtype=np.int32)
SQUARE = normal(2, 5, 5)
POOL = {"kernel_sizes": [3, 2], "strides": [2, 2]}
