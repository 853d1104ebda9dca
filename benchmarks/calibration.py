"""Calibration and rounding against nvidia-modelopt 0.47: SQNR at the output, products quantised, CPU time; and what `isthmus tune` finds.

Two models:

- `dit-digits`, with its trained weights. Calibrated on its own sampling trajectories from seed 0, judged on those from seed 1.
- `dit-s-2`, with random weights and outlier channels: in every block, of 4 channels of either normalisation, what the linear layers read
  is multiplied by a factor between 20 and 60 (the rows of the modulation's last layer that make 1 + scale and shift, by PCG64(0)). The
  weights that read them stay as they are. Calibrated and judged on random inputs.

Both sides get the same weights, the same sets of inputs in the same batches, one core, and one thread:

- modelopt quantises an ONNX file of isthmus in float32, opset 20, where attention is written out. It runs with both of its methods
  (`entropy`, its default, and `max`), each on the products that it chooses itself, and on those that isthmus quantises, in an environment
  of its own (`.venv-modelopt`, made here from modelopt/requirements.txt). Where it chooses itself it quantises residual additions too.
- isthmus exports with every product included that the precision takes: fp8 for TensorRT, int8 for ONNX Runtime. `none` is no option,
  `gptq` is `--weight-rounding gptq`, `smooth` is `--smooth 0.5`, `mse` is `--calibration-method mse`, and others are several of these.

What is not quantised is in float16 in fp8, and in float32 in int8, on both sides. All files run in isthmus's ONNX Runtime as they are
written, without graph optimisations, so that each Q/DQ pair rounds as the file says. The SQNR is that over all elements of all held-out
sets, against the float32 file. A product counts as quantised when both of its operands come from DequantizeLinear.

CPU time is user and system time of calibrating, quantising and writing: of modelopt the call of `quantize`, of isthmus the steps
`calibrating` and `lowering`. Imports, tracing, the translation to ONNX and isthmus's check of the graph that it observed are in neither;
modelopt's call checks nothing against PyTorch. `process_cpu_s` is that of the whole process,
with them, and for isthmus with its verification.

Checked is what README.md recommends (`recommended`) against the modelopt row that has the highest SQNR, in all three respects; the rows say
how the other settings compare with it. modelopt has no smoothing for ONNX files.

    python benchmarks/calibration.py            some minutes, 1 GiB of downloads and 3 GiB of disk the first time
    python benchmarks/calibration.py --quick    dit-digits (or --model) in fp8, with fewer sets, and no tuning
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from held_out import SETTINGS, TARGETS, drawn, outputs, sqnr
from selective_scan import check, report

Arrays = dict[str, np.ndarray[Any, Any]]

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv-modelopt"
WORKER = Path(__file__).resolve().parent / "modelopt" / "worker.py"
REQUIREMENTS = WORKER.with_name("requirements.txt")

OPSET = 20
"""Of the file that modelopt reads: the newest without Attention, whose products it would not see."""

CPU_RATIO = 0.5
TUNE_SECONDS = 300.0
GAIN_DB = {"dit-digits": 0.0, "dit-s-2 with outliers": 1.0}
"""By how much isthmus's SQNR has to be above modelopt's."""

HELD_OUT = {"dit-digits": 16, "dit-s-2 with outliers": 4}
"""Sets that are judged on. A set of dit-s-2 has 64 times the numbers, and FP8 is slow on the CPU."""

HIGH_PRECISION = {"fp8": "fp16", "int8": "fp32"}

PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
MOVES = ("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
OUTLIERS = 4


def environment() -> Path:
    """The Python of modelopt's environment, which is made if it is not there, or if the requirements have changed."""
    python, ready = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".ready"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if not ready.is_file() or ready.read_text("utf-8") != wanted:
        print(f"making {ENVIRONMENT}", file=sys.stderr)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-input", "--requirement", str(REQUIREMENTS)]
        for command in ([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], pip):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(
                    f"nvidia-modelopt cannot be installed here, so there is nothing to compare with.\n{' '.join(command)} exited with "
                    f"{done.returncode}: {done.stderr[-2000:]}"
                )
        ready.write_text(wanted, "utf-8")
    return python


def child(command: Sequence[str], job: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a process that reads a job and prints a JSON object as its last line; adds the CPU time of the whole process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command,
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {done.returncode} on {json.dumps(job)}: {done.stderr[-2000:]}")
    whole = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "process_cpu_s": whole}


def cpu_seconds() -> float:
    """User and system time of this process, and of its children that ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def export_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """One export of isthmus, in this process; returns the CPU seconds of the steps that calibrate and write."""
    if hasattr(os, "sched_setaffinity"):  # before anything makes a pool of threads: spinning would be counted as work
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    import onnx  # noqa: F401 - no import is counted, on neither side
    import onnxruntime  # noqa: F401 - nor is this one

    import isthmus
    from isthmus.exporter.errors import AccuracyError

    steps: dict[str, float] = {}

    class Recorder:
        @contextlib.contextmanager
        def step(self, title: str) -> Iterator[None]:
            begin = cpu_seconds()
            yield
            steps[title] = steps.get(title, 0.0) + cpu_seconds() - begin

    arguments = dict(job["arguments"])
    arguments["weights"] = Path(job["weights"]) if job["weights"] else None
    # What is judged here is the SQNR; an export whose own, absolute bound is not met has written its files all the same.
    with contextlib.suppress(AccuracyError):
        isthmus.export(job["model"], job["target"], Path(job["output"]), progress=Recorder(), seed=0, **arguments)
    return {"cpu_s": sum(s for title, s in steps.items() if title.startswith(("calibrating", "lowering"))), "steps": steps}


def with_outliers(path: Path) -> None:
    """Writes dit-s-2's random weights with outlier channels; see the top of this file."""
    from safetensors.torch import save_file

    from isthmus.exporter.spec import MODELS
    from isthmus.exporter.weights import random_weights

    state = {name: tensor.clone() for name, tensor in random_weights(MODELS["dit-s-2"].spec(), 0).state_dict().items()}
    rng = np.random.Generator(np.random.PCG64(0))
    for name in [name for name in state if name.startswith("blocks.") and name.endswith("adaLN_modulation.1.bias")]:
        weight, bias = state[f"{name[: -len('bias')]}weight"], state[name]
        width = bias.shape[0] // 6
        # shift, scale and gate of the attention, then of the MLP
        for shift, scale in ((0, 1), (3, 4)):
            channels = rng.choice(width, OUTLIERS, replace=False)
            for channel, factor in zip(channels.tolist(), rng.uniform(20, 60, OUTLIERS).tolist(), strict=True):
                for row in (shift * width + channel, scale * width + channel):
                    weight[row] *= factor
                    bias[row] *= factor
                bias[scale * width + channel] += factor - 1  # of the 1 in 1 + scale
    save_file(state, path)


def write_sets(path: Path, sets: Sequence[Arrays]) -> None:
    """The sets as `--calibration-data` and the worker read them."""
    arrays: Mapping[str, np.ndarray[Any, Any]] = {f"{i:03d}/{name}": array for i, one in enumerate(sets) for name, array in one.items()}
    np.savez(path, **arrays)


def quantised(path: Path) -> list[str]:
    """The names of the products both of whose operands come from DequantizeLinear."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    producers = {output: node for node in graph.node for output in node.output}

    def dequantised(value: str) -> bool:
        while (node := producers.get(value)) is not None and node.op_type in MOVES:
            value = node.input[0]
        return node is not None and node.op_type == "DequantizeLinear"

    return [node.name for node in graph.node if node.op_type in PRODUCTS and all(map(dequantised, node.input[:2]))]


def products_of(path: Path, modules: set[str]) -> list[str]:
    """The names of the products that belong to some PyTorch modules. A node's name begins with its module's path."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return [node.name for node in graph.node if node.op_type in PRODUCTS and node.name.partition("/")[0] in modules]


def recommended(name: str, precision: str) -> str:
    """The setting that README.md recommends for a precision, and for a model of which one knows that it has outlier channels."""
    if precision == "int8":
        return "smooth"
    return "gptq, smooth" if name.endswith("with outliers") else "gptq"


class Comparison:
    """One model: its weights, its data, the float32 file that modelopt reads, and what that file computes on the held-out sets.

    Args:
        python: The Python of modelopt's environment.
        name: A name of `GAIN_DB`.
        folder: An empty folder for all files.
        sets: Number of sets to calibrate on.
    """

    def __init__(self, python: Path, name: str, folder: Path, *, sets: int) -> None:
        self._python, self._name, self._folder, self._sets = python, name, folder, sets
        self._model, self._weights = name.partition(" ")[0], None
        if name.endswith("with outliers"):
            self._weights = folder / "weights.safetensors"
            with_outliers(self._weights)
        self._data = folder / "data.npz"
        write_sets(self._data, drawn(self._model, self._weights, seed=0, count=sets))
        self._held_out = drawn(self._model, self._weights, seed=1, count=HELD_OUT[name])
        self._plain, _ = self._exported("float32", "onnxruntime", opset=OPSET)
        self._reference = outputs(self._plain, self._held_out)
        self.rows: list[dict[str, Any]] = []

    def compare(self, precision: str) -> list[dict[str, Any]]:
        """Adds the rows of one precision; returns its checks."""
        taken: list[str] = []
        for setting, options in SETTINGS.items():
            path, figures = self._exported(
                f"{precision}-{setting}",
                TARGETS[precision],
                precision=precision,
                calibration_data=str(self._data),
                calibration_size=self._sets,
                options={f"{precision}_include": ["*"]},
                **options,
            )
            taken = quantised(path)
            self._row("isthmus", precision, setting, path, figures)
        same = products_of(self._plain, {product.partition("/")[0] for product in taken})
        for method in ("entropy", "max"):
            for where, nodes in {"its own products": [], "isthmus's products": same}.items():
                path, figures = self._quantized(precision, method, nodes)
                self._row("modelopt", precision, f"{method}, {where}", path, figures)
        rows = [row for row in self.rows if row["precision"] == precision]
        ours = next(row for row in rows if row["setting"] == recommended(self._name, precision))
        peer = max((row for row in rows if row["system"] == "modelopt"), key=lambda row: float(row["sqnr_db"]))
        for row in rows:
            if row["system"] == "isthmus":
                row |= {"sqnr_above_modelopt_db": row["sqnr_db"] - peer["sqnr_db"], "cpu_of_modelopt": row["cpu_s"] / peer["cpu_s"]}
        title = f"{self._name} in {precision}, isthmus ({ours['setting']}) against modelopt ({peer['setting']})"
        return [
            check(f"{title}: products quantised more", ours["products"] - peer["products"], 0, least=True),
            check(f"{title}: SQNR above, dB", ours["sqnr_db"] - peer["sqnr_db"], GAIN_DB[self._name], least=True),
            check(f"{title}: CPU time, of modelopt's", ours["cpu_s"] / peer["cpu_s"], CPU_RATIO, least=False),
        ]

    def _exported(self, folder: str, target: str, **arguments: Any) -> tuple[Path, dict[str, Any]]:
        output = self._folder / folder
        job = {"model": self._model, "weights": str(self._weights or ""), "target": target, "output": str(output), "arguments": arguments}
        return output / "model.onnx", child([sys.executable, __file__, "--child"], job)

    def _quantized(self, precision: str, method: str, nodes: Sequence[str]) -> tuple[Path, dict[str, Any]]:
        output = self._folder / f"{precision}-{method}-{len(nodes)}.onnx"
        job: dict[str, Any] = {
            "model": str(self._plain),
            "output": str(output),
            "data": str(self._data),
            "mode": precision,
            "method": method,
        }
        job |= {"nodes": list(nodes), "high_precision": HIGH_PRECISION[precision]}
        return output, child([str(self._python), str(WORKER)], job)

    def _row(self, system: str, precision: str, setting: str, path: Path, figures: Mapping[str, Any]) -> None:
        row = {
            "model": self._name,
            "precision": precision,
            "system": system,
            "setting": setting,
            "sqnr_db": sqnr(self._reference, outputs(path, self._held_out)),
            "products": len(quantised(path)),
            **{key: figures[key] for key in ("cpu_s", "process_cpu_s", "versions") if key in figures},
        }
        print(json.dumps(row), file=sys.stderr)
        self.rows.append(row)


def tuned(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row and checks of `isthmus tune` on dit-digits, a command of its own, with two processes."""
    output = folder / "recipe.yaml"
    command = [sys.executable, "-m", "isthmus.cli", "tune", "dit-digits", "--precision", "fp8", "--min-sqnr", "36", "--jobs", "2"]
    begin = time.perf_counter()
    done = subprocess.run([*command, "-o", str(output), "--format", "json"], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {done.returncode}: {done.stderr[-2000:]}")
    value = json.loads(output.with_name("recipe.pareto.json").read_text("utf-8"))
    front = [{key: point[key] for key in ("flop_share", "sqnr_db")} for point in value["front"]]
    uniform = value["uniform"]
    # A front dominates a choice when one of its points is at least as good in both respects, and better in one.
    best = max((p["sqnr_db"] for p in front if p["flop_share"] >= uniform["flop_share"]), default=-math.inf)
    row = {"model": "dit-digits", "precision": "fp8", "system": "isthmus tune", "wall_s": seconds, "front": front, "uniform": uniform}
    more = any(p["flop_share"] > uniform["flop_share"] and p["sqnr_db"] >= uniform["sqnr_db"] for p in front)
    return row, [
        check("tune dit-digits: seconds", seconds, TUNE_SECONDS, least=False),
        {
            "name": "tune dit-digits: the front's SQNR with as many operations as uniform max, above that of uniform max, dB",
            "value": best - uniform["sqnr_db"],
            "goal": "> 0",
            "holds": best > uniform["sqnr_db"] or more,
        },
    ]


def main() -> int:
    """Measures and prints one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", choices=list(GAIN_DB), help="only this one")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(export_job(json.load(sys.stdin))))
        return 0
    python = environment()
    rows: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    names = [arguments.model] if arguments.model else ["dit-digits"] if arguments.quick else list(GAIN_DB)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            comparison = Comparison(python, name, Path(folder), sets=8 if arguments.quick else 16)
            for precision in ("fp8",) if arguments.quick else TARGETS:
                checks += comparison.compare(precision)
            rows += comparison.rows
    if "dit-digits" in names and not arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            found_row, judged = tuned(Path(folder))
            rows.append(found_row)
            checks += judged
    return report("calibration", rows, checks)


if __name__ == "__main__":
    sys.exit(main())
