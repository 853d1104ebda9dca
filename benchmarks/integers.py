"""int8 and int4 in ONNX Runtime against float32: products and convolutions, each as `isthmus export` writes it, one thread.

Every row is a layer of its own, exported in float32 and in the other precision; both files run in turn, and the time of a row is the median
of its runs. A ratio is the other precision's time over float32's.

    python benchmarks/integers.py            a minute or two
    python benchmarks/integers.py --quick    two rows, few rounds
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from selective_scan import check, report
from torch import nn

import isthmus

ROWS: tuple[tuple[str, nn.Module, tuple[int, ...], str, dict[str, Any], float | None], ...] = (
    # name, layer, shape of the input, precision, options, the ratio that docs/onnxruntime.md promises at most
    ("product, 256 rows of 1152 by 4608", nn.Linear(1152, 4608), (256, 1152), "int8", {}, 0.5),
    ("convolution 3x3, 64 to 64 at 32x32", nn.Conv2d(64, 64, 3, padding=1), (1, 64, 32, 32), "int8", {}, 0.75),
    ("convolution 3x3, 128 to 128 at 32x32", nn.Conv2d(128, 128, 3, padding=1), (1, 128, 32, 32), "int8", {}, 0.75),
    ("convolution 1x1, 128 to 256 at 32x32", nn.Conv2d(128, 256, 1), (1, 128, 32, 32), "int8", {}, 0.75),
    ("product, 1 row of 1152 by 4608, blocks of 32", nn.Linear(1152, 4608), (1, 1152), "int4", {"int4_block": 32}, 0.5),
    ("product, 1 row of 1152 by 4608, blocks of 128", nn.Linear(1152, 4608), (1, 1152), "int4", {"int4_block": 128}, 0.5),
    ("product, 64 rows of 384 by 1536, blocks of 32", nn.Linear(384, 1536), (64, 384), "int4", {"int4_block": 32}, None),
    ("product, 64 rows of 384 by 1536, blocks of 128", nn.Linear(384, 1536), (64, 384), "int4", {"int4_block": 128}, None),
    ("product, 256 rows of 1152 by 4608, blocks of 32", nn.Linear(1152, 4608), (256, 1152), "int4", {"int4_block": 32}, None),
)
"""What pays has a bound; on CPUs without VNNI the int8 rows may miss it."""


class Alone(nn.Module):
    """A layer under a name, which the patterns of an export need.

    A convolution's result is doubled: integers are convolved where something reads 8 bits.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's result."""
        result: torch.Tensor = self.layer(x)
        return result * 2 if isinstance(self.layer, nn.Conv2d) else result


def session(layer: nn.Module, x: torch.Tensor, precision: str, options: dict[str, Any], folder: Path) -> Any:
    """ONNX Runtime over an export, with one thread."""
    more: dict[str, Any] = {}
    if precision != "fp32":
        more["options"] = {**options, f"{precision}_include": ("*",)}
    if precision == "int8":
        np.savez(folder / "data.npz", x=x.numpy())
        more["calibration_data"] = str(folder / "data.npz")
    isthmus.export((Alone(layer).eval(), (x,)), "onnxruntime", folder / precision, precision=precision, **more)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(folder / precision / "model.onnx", settings, providers=["CPUExecutionProvider"])


def measured(layer: nn.Module, shape: tuple[int, ...], precision: str, options: dict[str, Any], rounds: int) -> dict[str, float]:
    """The median times of both, in turn."""
    x = torch.from_numpy(np.random.Generator(np.random.PCG64(0)).standard_normal(shape, dtype="float32"))
    times: dict[str, list[float]] = {"fp32": [], precision: []}
    with tempfile.TemporaryDirectory() as name:
        runs = {which: session(layer, x, which, options, Path(name)) for which in times}
        for run in runs.values():
            run.run(None, {"x": x.numpy()})
        for _ in range(rounds):
            for which, run in runs.items():
                begin = time.perf_counter()
                run.run(None, {"x": x.numpy()})
                times[which].append(time.perf_counter() - begin)
    return {which: statistics.median(found) for which, found in times.items()}


def main() -> int:
    """Measures and prints one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, checks = [], []
    for name, layer, shape, precision, options, bound in ROWS[:5:4] if arguments.quick else ROWS:
        found = measured(layer, shape, precision, options, 20 if arguments.quick else 200)
        ratio = found[precision] / found["fp32"]
        rows.append({"layer": name, "precision": precision, "fp32_s": found["fp32"], "s": found[precision], "ratio": ratio})
        if bound is not None:
            checks.append(check(f"{precision}, {name}: of float32's time", ratio, bound, least=False))
    return report("integers", rows, checks)


if __name__ == "__main__":
    raise SystemExit(main())
