"""Quantises one ONNX file with nvidia-modelopt: runs in the environment of `requirements.txt` beside it, started by `calibration.py`.

    python worker.py < job.json

The job is one JSON object:

- `model`, `output`: the ONNX file that is read, in float32, and the one that is written;
- `data`: an .npz file with sets of inputs under `INDEX/NAME`;
- `mode`: `fp8` or `int8`; `method`: `entropy` or `max`; `high_precision`: what is not quantised, `fp16` or `fp32`;
- `nodes`: names of the nodes to quantise; empty for those that modelopt chooses.

The last line that is printed is a JSON object: `cpu_s`, the user and system time of the call of `modelopt.onnx.quantization.quantize`
alone, without imports, and `versions`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import re
import resource
import sys
from collections.abc import Iterator
from typing import Any

if hasattr(os, "sched_setaffinity"):  # before anything makes a pool of threads: spinning would be counted as work
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])

import numpy as np
from modelopt.onnx.quantization import quantize  # type: ignore[import-not-found]  # of the other environment
from onnxruntime.quantization.calibrate import CalibrationDataReader


class Sets(CalibrationDataReader):  # type: ignore[misc]  # untyped
    """The sets of a file, one call of the model each. modelopt's own reader takes one array, and guesses how to cut it."""

    def __init__(self, path: str) -> None:
        sets: dict[int, dict[str, Any]] = {}
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                index, _, name = key.partition("/")
                sets.setdefault(int(index), {})[name] = file[key]
        self._sets = [sets[index] for index in sorted(sets)]
        self.rewind()

    def get_next(self) -> dict[str, Any] | None:
        """The next set; None after the last."""
        return next(self._left, None)

    def get_first(self) -> dict[str, Any]:
        """The first set, from which modelopt takes the shapes of products."""
        return self._sets[0]

    def rewind(self) -> None:
        """Begins again."""
        self._left: Iterator[dict[str, Any]] = iter(self._sets)


def cpu_seconds() -> float:
    """User and system time of this process, and of its children that ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def main() -> int:
    """Quantises, and prints what it took."""
    job = json.load(sys.stdin)
    random.seed(0)
    np.random.seed(0)  # what a library draws, it draws from the global generator
    reader = Sets(job["data"])
    begin = cpu_seconds()
    quantize(
        onnx_path=job["model"],
        output_path=job["output"],
        quantize_mode=job["mode"],
        calibration_method=job["method"],
        calibration_data_reader=reader,
        calibration_eps=["cpu"],
        nodes_to_quantize=[f"{re.escape(name)}$" for name in job["nodes"]] or None,
        high_precision_dtype=job["high_precision"],
        log_level="WARNING",
    )
    used = cpu_seconds() - begin
    versions = {name: importlib.metadata.version(name) for name in ("nvidia-modelopt", "onnx", "onnxruntime-gpu", "torch", "numpy")}
    print(json.dumps({"cpu_s": used, "versions": versions}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
