"""Two exports with one seed, each in a process of its own, write the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FP8 = ("tensorrt", "fp8", "--weight-rounding", "gptq")
INT8 = ("onnxruntime", "int8", "--weight-rounding", "gptq", "--smooth", "0.5", "--calibration-method", "mse")
CASES = {
    "dit-digits in int8": ("dit-digits", "onnxruntime", "int8"),
    "dit-digits in fp8": ("dit-digits", "tensorrt", "fp8"),
    "dit-digits in int8, smoothed and rounded": ("dit-digits", *INT8),
    "sana-digits in fp8, rounded": ("sana-digits", *FP8),
    "diffussm-digits in int8, smoothed and rounded": ("diffussm-digits", *INT8),
}


def _written(folder: Path, hashes: str, model: str, target: str, precision: str, *options: str) -> dict[str, bytes]:
    """The calibration and the model files of an export. Sets and dictionaries of strings are in another order with other hashes."""
    command = [sys.executable, "-m", "isthmus.cli", "export", model, "--target", target, "--precision", precision, "--seed", "3", *options]
    environment = {**os.environ, "PYTHONHASHSEED": hashes}
    done = subprocess.run([*command, "-o", str(folder)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name == "calibration.json" or path.name.startswith("model.")}


@pytest.mark.matrix
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name != "dit-digits in int8")) for name in CASES])
def test_one_seed_gives_one_bundle(name: str, tmp_path: Path) -> None:
    first, second = (_written(tmp_path / hashes, hashes, *CASES[name]) for hashes in ("1", "2"))
    assert {"calibration.json", "model.onnx"} <= set(first)
    assert first == second
