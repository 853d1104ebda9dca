"""Peak memory of exporting the published sizes: TensorRT in FP8 and Core ML, each below 20 GiB.

Each row is one `isthmus export`, as a user calls it, in a process of its own: random weights, a fixed batch of 1, and, in FP8, one set of
random inputs to calibrate on. Memory is the largest resident set of that process, its verification included. Latents of 32 x 32 for MMDiT
and the U-Net, and pictures of 128 x 128 for DC-AE, keep the executions on a CPU short; the weights are those of the published sizes.

FP8 accuracy is not judged here: ranges of one random set need not fit the sizes that an export also verifies, and random weights are not
trained. The verdict of a row says what the export ended with.

    python benchmarks/published_sizes.py                                  an hour, 20 GiB of disk
    python benchmarks/published_sizes.py --model dit-xl-2 --target coreml   one row; both can be given several times
    python benchmarks/published_sizes.py --quick                          DC-AE alone
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from selective_scan import check, report

LIMIT_GIB = 20.0
MODELS: dict[str, tuple[str, ...]] = {
    "dc-ae-encode-f32c32-sana": ("sample_size=128",),
    "dc-ae-decode-f32c32-sana": ("sample_size=128",),
    "dit-xl-2": (),
    "sana-1.6b": (),
    "mmdit-sd3-medium": ("sample_size=32",),
    "sdxl-unet-base": ("sample_size=32",),
}
QUICK = ("dc-ae-encode-f32c32-sana", "dc-ae-decode-f32c32-sana")
OPTIONS = {
    "tensorrt": ("--precision", "fp8", "--calibration-data", "random", "--calibration-size", "1"),
    "coreml": (),
}
ENDS = (0, 3)
"""Exit codes of an export that wrote its bundle: within tolerance, or not."""


def export(model: str, target: str) -> dict[str, Any]:
    """One export; its figures.

    Raises:
        SystemExit: It wrote no bundle.
    """
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        asked = ["export", model, "--target", target, "--batch-size", "1", *OPTIONS[target]]
        asked += [part for setting in MODELS[model] for part in ("--set", setting)]
        command = [sys.executable, "-m", "isthmus.cli", *asked, "-o", str(bundle)]
        begin = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            said = process.stderr.read()
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in ENDS:
            raise SystemExit(f"{' '.join(command)} exited with {process.returncode}: {said[-2000:]}")
        manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
        return {
            "model": model,
            "target": target,
            "command": " ".join(["isthmus", *asked, "-o", "BUNDLE"]),
            "exit_code": process.returncode,
            "stages": {stage["name"]: stage["verdict"] for stage in manifest["stages"]},
            "weights_gib": manifest["weights"]["bytes"] / 2**30,
            "peak_gib": used.ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20),
            "wall_s": time.monotonic() - begin,
        }


def main() -> int:
    """Exports and prints one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--target", action="append", choices=OPTIONS)
    arguments = parser.parse_args()
    rows = []
    for model in arguments.model or (QUICK if arguments.quick else MODELS):
        for target in arguments.target or OPTIONS:
            rows.append(export(model, target))
            print(json.dumps(rows[-1]), file=sys.stderr)
    checks = [check(f"{row['model']} to {row['target']}: peak GiB", row["peak_gib"], LIMIT_GIB, least=False) for row in rows]
    return report("published_sizes", rows, checks)


if __name__ == "__main__":
    raise SystemExit(main())
