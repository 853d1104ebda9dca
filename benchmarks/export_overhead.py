"""What isthmus adds to a plain torch.onnx.export: CPU time, nodes, and peak memory of the whole command.

Three child processes, one after the other, so that each has a peak memory of its own:

1. `plain`: `torch.onnx.export(module, inputs, dynamo=True)` with its optimiser, same opset, and save.
2. `isthmus`: `isthmus.export` with a progress object that records the CPU time of each step.
3. `command`: `isthmus export MODEL --target onnxruntime`, verification included, for its peak resident memory.

Building the module is left out of both CPU times; tracing, translating, passes, writing, checking and hashing are in.

    python benchmarks/export_overhead.py            dit-xl-2, 675 M parameters: some minutes, 8 GiB of disk, 6 GiB of memory
    python benchmarks/export_overhead.py --quick    dit-s-2; memory is not judged, because the libraries outweigh the weights
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CPU_RATIO = 1.3
RSS_RATIO = 1.6
VERIFICATION = ("running PyTorch", "checking the trace", "verifying the artifact")
OPSET = 23


def plain(model: str, folder: Path) -> dict[str, Any]:
    """Exports with torch alone; returns its CPU seconds and number of nodes."""
    import numpy as np
    import torch

    from isthmus.exporter.quiet import quiet
    from isthmus.exporter.spec import MODELS
    from isthmus.exporter.weights import random_weights

    spec = MODELS[model].spec()
    module = random_weights(spec, 0)
    inputs = tuple(spec.inputs(np.random.Generator(np.random.PCG64(0)), spec.sizes).values())
    begin = time.process_time()
    with quiet("torch.onnx"):
        program = torch.onnx.export(module, inputs, dynamo=True, opset_version=OPSET, verbose=False)
        assert program is not None
        program.save(folder / "model.onnx", external_data=True)
    return {"cpu_s": time.process_time() - begin, "nodes": sum(1 for _ in program.model.graph.all_nodes())}


def isthmus_steps(model: str, folder: Path) -> dict[str, Any]:
    """Exports with isthmus; returns the CPU seconds of the steps that are not verification, and the number of nodes."""
    import isthmus

    steps: dict[str, float] = {}

    class Recorder:
        @contextlib.contextmanager
        def step(self, title: str) -> Iterator[None]:
            begin = time.process_time()
            yield
            steps[title] = steps.get(title, 0.0) + time.process_time() - begin

    result = isthmus.export(model, "onnxruntime", folder / "bundle", opset=OPSET, progress=Recorder())
    counted = {t: s for t, s in steps.items() if not t.startswith(VERIFICATION) and t != "building the model"}
    return {
        "cpu_s": sum(counted.values()),
        "nodes": result.manifest.details["nodes"],
        "steps": steps,
        "weight_bytes": result.manifest.weights.bytes,
        "verdict": result.manifest.verdict,
    }


def child(kind: str, model: str, folder: Path) -> dict[str, Any]:
    """Runs one kind in a process of its own; adds its peak resident memory in bytes."""
    if kind == "command":
        arguments = [sys.executable, "-m", "isthmus.cli", "export", model, "--target", "onnxruntime", "--opset", str(OPSET)]
        arguments += ["-o", str(folder / "bundle"), "--format", "json"]
    else:
        arguments = [sys.executable, __file__, "--child", kind, "--model", model, "--folder", str(folder)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        assert process.stderr is not None
        raise SystemExit(f"{kind} exited with {code}: {process.stderr.read()[-2000:]}")
    value = json.loads(output)
    result: dict[str, Any] = {"verdict": value["verdict"]} if kind == "command" else value
    return {"kind": kind, **result, "peak_rss_bytes": usage.ru_maxrss * 1024, "total_cpu_s": usage.ru_utime + usage.ru_stime}


def main() -> int:
    """Runs the three children and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--child", choices=["plain", "isthmus"])
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    model = arguments.model or ("dit-s-2" if arguments.quick else "dit-xl-2")
    if arguments.child:
        print(json.dumps((plain if arguments.child == "plain" else isthmus_steps)(model, arguments.folder)))
        return 0
    rows = []
    for kind in ("plain", "isthmus", "command"):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(child(kind, model, Path(folder)))
    by_kind = {row["kind"]: row for row in rows}
    cpu = by_kind["isthmus"]["cpu_s"] / by_kind["plain"]["cpu_s"]
    checks = [
        {"name": "CPU time of the export, isthmus / plain", "value": cpu, "goal": f"<= {CPU_RATIO}", "holds": cpu <= CPU_RATIO},
        {
            "name": "nodes, isthmus - plain",
            "value": by_kind["isthmus"]["nodes"] - by_kind["plain"]["nodes"],
            "goal": "<= 0",
            "holds": by_kind["isthmus"]["nodes"] <= by_kind["plain"]["nodes"],
        },
        {
            "name": "verdict",
            "value": by_kind["command"]["verdict"],
            "goal": "verified",
            "holds": by_kind["command"]["verdict"] == "verified",
        },
    ]
    if not arguments.quick:
        rss = by_kind["command"]["peak_rss_bytes"] / by_kind["isthmus"]["weight_bytes"]
        checks.append(
            {"name": "peak RSS of the command / weight bytes", "value": rss, "goal": f"<= {RSS_RATIO}", "holds": rss <= RSS_RATIO}
        )
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps({"name": "export_overhead", "machine": machine, "model": model, "rows": rows, "checks": checks}, indent=2))
    return 0 if all(check["holds"] for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
