"""What SmoothQuant, GPTQ and another calibrator gain on the trained models: the SQNR at the outputs, on inputs that are held out.

Every trained model is exported in INT8 to ONNX Runtime and in FP8 to TensorRT, with every product quantised that the precision takes; the
files run in ONNX Runtime with no optimisation. docs/calibration.md says what is recommended because of it, and benchmarks/calibration.py
has the same settings on a model with outlier channels.

    python benchmarks/smoothing.py            some minutes
    python benchmarks/smoothing.py --quick    dit-digits alone
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from held_out import SETTINGS, TARGETS, drawn, exported, outputs, sqnr
from selective_scan import report

MODELS = ("dit-digits", "sana-digits", "diffussm-digits")
SETS = 16


def compare(model: str, folder: Path) -> list[dict[str, Any]]:
    """A row for each precision, with the SQNR of every setting."""
    sets = drawn(model, None, seed=1, count=SETS)
    reference = outputs(exported(model, "onnxruntime", folder / f"{model}-fp32", "fp32"), sets)
    rows = []
    for precision, target in TARGETS.items():
        row: dict[str, Any] = {"model": model, "precision": precision}
        for setting, arguments in SETTINGS.items():
            where = folder / f"{model}-{precision}-{setting}"
            options = {f"{precision}_include": ("*",)}
            path = exported(model, target, where, precision, calibration_size=SETS, options=options, **arguments)
            row[setting] = sqnr(reference, outputs(path, sets))
        print(json.dumps(row), file=sys.stderr)
        rows.append(row)
    return rows


def main() -> int:
    """Measures and prints one JSON object. Nothing is promised of these figures, so nothing is checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    models = MODELS[:1] if parser.parse_args().quick else MODELS
    with tempfile.TemporaryDirectory() as temporary:
        rows = [row for model in models for row in compare(model, Path(temporary))]
    return report("smoothing", rows, [])


if __name__ == "__main__":
    raise SystemExit(main())
