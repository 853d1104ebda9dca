"""Finds the implementations beside this file, and holds the one table of tolerances.

An implementation is a file of `implementations/` with

- `PART`: the part of an operator (`isthmus.exporter.op.PARTS`) that it executes;
- `DTYPES`: the dtypes of the activations that it takes;
- `ARITHMETIC`: "float32" where states and sums are float32 whatever the activations are, "float16" where everything is rounded to float16;
- `run(op, inputs, attributes)`: from numpy inputs in their dtypes (activations in the dtype of the case, wide ones in float32, absent ones
  left out) and all attributes to the outputs by name;
- optionally `not_run()`: why the hardware of this machine cannot execute it, or "".

Every operator, every case and every dtype then runs through it.
"""

import functools
import importlib.util
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from isthmus.exporter.op import OPS, Case, CustomOp

HERE = Path(__file__).parent

# The largest error over the peak of its channel, by the dtype of the activations and of the arithmetic. With float32 sums, what float16 and
# bfloat16 activations cost is the rounding of the result: half a unit in the last place of the peak is 2^-12 and 2^-9 at worst, and four
# times that is allowed. float32: some 300 units of 2^-24, for sums of 64 products, and for decays whose logarithms, up to 64, are summed
# over a chunk. Arithmetic in float16 throughout: a hundredth, which two-level scans in logarithms keep and sequential ones do not.
TOLERANCES = {
    ("float32", "float32"): 2e-5,
    ("float16", "float32"): 2.0**-10,
    ("bfloat16", "float32"): 2.0**-7,
    ("float16", "float16"): 1e-2,
}


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"implementations_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def implementations() -> dict[str, ModuleType]:
    return {path.stem: _load(path) for path in sorted((HERE / "implementations").glob("*.py"))}


def cases(op: CustomOp) -> tuple[Case, ...]:
    return op.part("cases").cases() if op.has("cases") else ()


NUMPY = {"float32": np.dtype("float32"), "float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@functools.lru_cache(maxsize=64)
def prepared(name: str, case: str, dtype: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Inputs in their dtypes, all attributes, and the float64 reference of the inputs as they were rounded."""
    op = OPS[name]
    chosen = next(c for c in cases(op) if c.name == case)
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"{name}/{case}".encode())))
    wide = {a.name for a in op.inputs if a.wide}
    inputs = {n: x.astype(NUMPY["float32"] if n in wide else NUMPY[dtype]) for n, x in chosen.make(rng).items() if x is not None}
    attributes = op.resolve(chosen.attributes)
    reference = op.part("reference").reference(inputs, attributes)
    for array in (*inputs.values(), *reference.values()):
        array.setflags(write=False)
    return inputs, attributes, reference


def error(got: np.ndarray, expected: np.ndarray, channels: int) -> float:
    """The largest error, each channel's over its own peak; a channel that is almost silent counts as a hundredth of the loudest."""
    assert np.isfinite(expected).all()
    if not np.isfinite(got).all():
        return float("inf")
    axes = tuple(i for i in range(expected.ndim) if i != channels)
    peaks = np.abs(expected).max(axis=axes, keepdims=True)
    peaks = np.maximum(peaks, max(peaks.max() / 100, np.finfo(np.float64).tiny))
    return float((np.abs(got.astype(np.float64) - expected) / peaks).max())


def check(op: CustomOp, outputs: dict[str, np.ndarray], reference: dict[str, np.ndarray], dtype: str, arithmetic: str) -> None:
    """Every output is there, has its shape and dtype, and lies within the tolerance."""
    assert list(outputs) == [a.name for a in op.outputs]
    for argument in op.outputs:
        got, expected = outputs[argument.name], reference[argument.name]
        assert got.shape == expected.shape, argument.name
        assert got.dtype == (NUMPY["float32"] if argument.wide else NUMPY[dtype]), argument.name
        # Channels are the last axis, or that of the name "channels".
        axis = argument.shape.index("channels") if "channels" in argument.shape else len(argument.shape) - 1
        key = ("float32" if argument.wide and arithmetic == "float32" else dtype, arithmetic)
        found = error(got, expected, axis)
        assert found <= TOLERANCES[key], f"{argument.name}: {found:.3g} of its channel's peak, {TOLERANCES[key]:.3g} allowed"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "swept" in metafunc.fixturenames:
        rows = [
            pytest.param((op, name, case.name, dtype), id=f"{op}-{name}-{case.name}-{dtype}", marks=_marks(name, case.name, dtype))
            for op in OPS
            for name, module in implementations().items()
            if OPS[op].has(module.PART)
            for case in cases(OPS[op])
            for dtype in module.DTYPES
        ]
        metafunc.parametrize("swept", rows)


_SLOW = ("tensorrt_quick", "coreml_fp16", "coreml_fp32", "coreai")
"""What `make matrix` runs: the quick plugins launch the kernels of the others; Core ML and Core AI translate each case for a second or two,
and test_coreml.py and test_coreai.py have the operators in `make test`."""

_FULL = ("tensorrt_quick", "coreml_fp32")
"""Of these, what .ci/run leaves to `make matrix`: the sweep has the same kernels and the same program otherwise."""

_INTERPRETED = {"triton_interpreter": "float32", "tensorrt_launch": "float16"}
"""The dtype in which `make test` runs what Triton's interpreter executes, which is slow; long cases are for `make matrix`, and so are the
other dtypes, which differ where numbers are read and written."""


def _marks(implementation: str, case: str, dtype: str) -> tuple[pytest.MarkDecorator, ...]:
    if implementation in _FULL:
        return (pytest.mark.matrix, pytest.mark.full)
    interpreted = _INTERPRETED.get(implementation)
    slow = implementation in _SLOW or (interpreted is not None and ("long" in case or dtype != interpreted))
    return (pytest.mark.matrix,) if slow else ()


@pytest.fixture
def sweep():
    """The pieces above, for the tests."""
    return _Sweep


class _Sweep:
    implementations = staticmethod(implementations)
    prepared = staticmethod(prepared)
    check = staticmethod(check)
    cases = staticmethod(cases)
    error = staticmethod(error)
    tolerances = TOLERANCES
