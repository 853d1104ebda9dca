"""Every operation of the interpreter against torch."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.targets.coreml.interpreter import OPERATIONS, Interpreter


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


given = _load("operations")
CASES = {
    name: case for file in sorted(Path(__file__).parent.glob("operations_*.py")) for name, case in _load(file.stem).cases_of(given).items()
}


def _tensor(x):
    return torch.from_numpy(x.copy())


@pytest.mark.parametrize("name", CASES)
def test_the_operation_is_that_of_torch(name, program):
    build, oracle, *arrays = CASES[name]
    built, inputs = program(build, *arrays)
    assert name.partition(",")[0] in {op.op_type for op in built.functions["main"].operations}
    expected = oracle(*map(_tensor, arrays))
    expected = expected if isinstance(expected, tuple) else (expected,)
    got = list(Interpreter(built).run(inputs).values())
    assert len(got) == len(expected)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x.astype(np.float64), y.double().numpy(), rtol=2e-5, atol=2e-6)


# What MIL computes itself when the program is built, or has only under older opsets, and what `test_compressed_weights.py` covers.
ELSEWHERE = {
    "shape", "fill", "range_1d", "reshape_like",
    *(name for name in OPERATIONS if name.startswith("constexpr_")),
}  # fmt: skip


def test_every_operation_has_a_case():
    assert set(OPERATIONS) - ELSEWHERE == {name.partition(",")[0] for name in CASES}


@pytest.mark.parametrize(
    ("name", "inputs", "expected"),
    [
        ("shape", {"x": given.X}, [2, 3, 4]),
        ("fill", {"shape": np.int32([2, 1]), "value": np.float32(3)}, [[3.0], [3.0]]),
        ("range_1d", {"start": np.int32(2), "end": np.int32(9), "step": np.int32(3)}, [2, 5, 8]),
        (
            "reshape_like",
            {
                "x": np.arange(6),
                "ref_tensors": (np.zeros((5, 3)), np.zeros((2, 7))),
                "begins": np.int32([1, 0]),
                "ends": np.int32([0, 1]),
                "end_masks": np.array([True, False]),
            },
            [[0, 1], [2, 3], [4, 5]],
        ),
    ],
)
def test_operations_that_a_program_with_fixed_sizes_does_not_keep(name, inputs, expected):
    np.testing.assert_array_equal(OPERATIONS[name](**inputs), expected)
