"""Settings, inputs that are held out, what a file computes on them, and how far two files are apart, for the benchmarks of quantisation."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.exporter.spec import Arrays

TARGETS = {"fp8": "tensorrt", "int8": "onnxruntime"}
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "gptq": {"weight_rounding": "gptq"},
    "smooth": {"smooth": 0.5},
    "gptq, smooth": {"weight_rounding": "gptq", "smooth": 0.5},
    "gptq, smooth, mse": {"weight_rounding": "gptq", "smooth": 0.5, "calibration_method": "mse"},
}


def drawn(model: str, weights: Path | None, *, seed: int, count: int) -> list[Arrays]:
    """Sets of inputs: of the model's own trajectories where its weights are trained, else random."""
    from isthmus.calibrating import draw_data, read_data
    from isthmus.calibration.verify import module_runner
    from isthmus.exporter.source import load_source

    source = load_source(model, settings={}, weights=weights, inputs=None, dynamic=(), batch_size=None, seed=0)
    assert source.spec is not None
    data = read_data(source, "random" if weights else None, seed=seed, size=count)
    if data is None:
        data = draw_data(source, module_runner(source.module, source.example, source.spec.outputs), seed=seed, size=count)
    return [dict(arrays) for arrays in data.sets]


def exported(model: str, target: str, folder: Path, precision: str, **arguments: Any) -> Path:
    """The file of an export, whose verdict is not judged here."""
    import isthmus
    from isthmus.exporter.errors import AccuracyError

    try:
        isthmus.export(model, target, folder, precision=precision, **arguments)
    except AccuracyError:
        print(f"{folder.name}: not within the export's own bound", file=sys.stderr)
    return folder / "model.onnx"


def outputs(path: Path, sets: Sequence[Arrays]) -> list[list[np.ndarray[Any, Any]]]:
    """What a file computes, in ONNX Runtime on the CPU, as it is written."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [session.run(None, one) for one in sets]


def sqnr(reference: Sequence[Sequence[np.ndarray[Any, Any]]], found: Sequence[Sequence[np.ndarray[Any, Any]]]) -> float:
    """The signal-to-quantisation-noise ratio of the worst output over all sets, dB."""
    worst = math.inf
    for i in range(len(reference[0])):
        signal = sum(float(np.square(one[i].astype(np.float64)).sum()) for one in reference)
        pairs = zip(reference, found, strict=True)
        noise = sum(float(np.square(one[i].astype(np.float64) - other[i].astype(np.float64)).sum()) for one, other in pairs)
        worst = min(worst, 10 * math.log10(signal / noise) if noise else math.inf)
    return worst
