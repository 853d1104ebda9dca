"""Quantises one ONNX file with nvidia-modelopt. Runs in the environment of `requirements.txt` beside it, started by `calibration.py`.

Reads one JSON object from standard input: `model` and `output` (paths), `data` (.npz, sets of inputs under `INDEX/NAME`), `mode` (`fp8` or
`int8`), `method` (`entropy` or `max`). Prints one JSON object as its last line: `cpu_s`, user and system time of the call to
`modelopt.onnx.quantization.quantize` alone, without imports; `versions`.

    python worker.py < job.json
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import resource
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from modelopt.onnx.quantization import quantize
from onnxruntime.quantization.calibrate import CalibrationDataReader


class Sets(CalibrationDataReader):  # type: ignore[misc]
    """The sets of a file, one call of the model each, as they are: modelopt's own reader would cut all inputs alike."""

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
        """The first set, which modelopt reads the shapes of products from."""
        return self._sets[0]

    def rewind(self) -> None:
        """Begins again."""
        self._left: Iterator[dict[str, Any]] = iter(self._sets)


def cpu_seconds() -> float:
    """User and system time of this process and of the children that ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def main() -> int:
    """Quantises, and prints what it took."""
    job = json.load(sys.stdin)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - what modelopt draws, it draws from the global generator
    reader = Sets(job["data"])
    begin = cpu_seconds()
    quantize(
        onnx_path=job["model"],
        output_path=job["output"],
        quantize_mode=job["mode"],
        calibration_method=job["method"],
        calibration_data_reader=reader,
        calibration_eps=["cpu"],
        high_precision_dtype=job["high_precision"],
        log_level="WARNING",
    )
    used = cpu_seconds() - begin
    versions = {name: importlib.metadata.version(name) for name in ("nvidia-modelopt", "onnx", "onnxruntime-gpu", "torch", "numpy")}
    print(json.dumps({"cpu_s": used, "versions": versions}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
