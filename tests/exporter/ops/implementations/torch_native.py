"""The torch operator on the CPU with the native library, which it uses when it is built."""

import ml_dtypes
import numpy as np
import torch

from isthmus.exporter.ops import native
from isthmus.exporter.ops.native.torch_hook import native_kernels

PART = "torch"
DTYPES = ("float32", "float16", "bfloat16")
ARITHMETIC = "float32"


def _tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.float32)).bfloat16() if x.dtype == ml_dtypes.bfloat16 else torch.from_numpy(x.copy())


def _array(x: torch.Tensor) -> np.ndarray:
    return x.float().numpy().astype(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def run(op, inputs, attributes):
    native.build()
    op.part("torch")
    with native_kernels(True):
        results = getattr(torch.ops.isthmus, op.name)(**{n: _tensor(x) for n, x in inputs.items()}, **attributes)
    results = results if isinstance(results, tuple) else (results,)
    return {a.name: _array(x) for a, x in zip(op.outputs, results, strict=True)}
