"""A mixture of experts in ONNX Runtime: com.microsoft.MoE against the dense form, and against the gathered one.

8 experts of 512 by 1792, 2 a token, float32, one thread; see selective_scan.py for how times are taken.

    python benchmarks/experts.py            about a minute
    python benchmarks/experts.py --quick    fewer runs; for trying
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from selective_scan import check, interleave, report

from isthmus.exporter.onnx import to_onnx
from isthmus.exporter.passes import optimise
from isthmus.exporter.spec import MODELS
from isthmus.exporter.trace import trace
from isthmus.exporter.weights import random_weights
from isthmus.targets.onnxruntime.experts import Experts, write_experts

SETTINGS = {"dim": 512, "hidden_dim": 1792, "num_experts": 8, "top_k": 2}
COUNTS = (1, 4, 16, 64, 256)


def opened(name: str, experts: Experts) -> Callable[[np.ndarray[Any, Any]], Any]:
    """The mixture in ONNX Runtime on one thread, as a function of its tokens (n, 512)."""
    import onnxruntime as ort

    spec = MODELS[name].spec(SETTINGS)
    example = spec.inputs(np.random.Generator(np.random.PCG64(0)), spec.sizes)
    program = trace(random_weights(spec, seed=0), example, dynamic=spec.dynamic, ranges=spec.ranges)
    model = optimise(to_onnx(program, opset=23, input_names=("x",), output_names=("y",)))
    write_experts(model, experts, "cpu")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x if "step" in name else x[None]})[0].reshape(x.shape)


def main() -> int:
    """Measures and prints one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    forms = {
        "dense": opened("moe-tiny", "dense"),
        "gathered": opened("moe-step-tiny", "dense"),
        "com.microsoft.MoE": opened("moe-tiny", "fused"),
    }
    rows: list[dict[str, Any]] = []
    ratio: dict[tuple[str, int], float] = {}
    worst = 0.0
    for count in COUNTS:
        x = np.random.Generator(np.random.PCG64(1)).standard_normal((count, SETTINGS["dim"]), dtype=np.float32)
        want = forms["dense"](x)
        worst = max(worst, *(float(np.abs(form(x) - want).max() / np.ptp(want)) for form in forms.values()))
        jobs = {name: (lambda form=form, x=x: form(x)) for name, form in forms.items() if name != "gathered" or count <= COUNTS[2]}
        times = interleave(jobs, 4 if arguments.quick else 16, time.thread_time)
        shape = f"{count} tokens, 2 of 8 experts, 512 by 1792, float32"
        rows += [{"kind": "measured", "kernel": name, "shape": shape, "threads": 1, "cpu_ms": ms} for name, ms in times.items()]
        ratio |= {(name, count): ms / times["com.microsoft.MoE"] for name, ms in times.items()}
    checks = [
        check("dense / MoE, 256 tokens", ratio["dense", 256], 2, least=True),
        check("dense / MoE, 16 tokens", ratio["dense", 16], 0.7, least=True),
        check("dense / MoE, 1 token", ratio["dense", 1], 2, least=True),
        check("gathered / MoE, 1 token", ratio["gathered", 1], 2, least=True),
        check("largest difference over the output's range", worst, 1e-6, least=False),
    ]
    return report("experts", rows, checks)


if __name__ == "__main__":
    sys.exit(main())
