"""The native selective scan against a torch loop, the ONNX node's Scan body, and a probe that only computes the exponentials.

B1 D1536 N16 L4096 in float32. Runs are interleaved; every figure is the best of some. On one thread it is the CPU time of that thread, so
that other work on the machine weighs less; two threads are compared with one by the clock.

    python benchmarks/selective_scan.py            about a minute
    python benchmarks/selective_scan.py --quick    L512, fewer runs; for trying, the goals are those of the full size
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from isthmus.exporter.op import OPS, CustomOp
from isthmus.exporter.ops import native
from isthmus.exporter.ops.native.numpy_call import buffer
from isthmus.exporter.ops.onnx_models import node_of, one_node

Array = np.ndarray[Any, Any]
EXP = 0
H100 = {"bytes_per_s": 3.35e12, "flops_per_s": 989e12, "exponentials_per_s": 16 * 132 * 1.755e9}
"""HBM3 of the SXM part, dense bfloat16 tensor cores, and 16 exponentials a clock on each of 132 processors."""


def machine() -> str:
    """The processor, in words."""
    return f"{platform.machine()}, {native.load(native.build()).levels()[0]}, Python {platform.python_version()}"


def roofline(kernel: str, *, bytes_moved: float, flops: float, exponentials: float, shape: str) -> dict[str, Any]:
    """A row with the time below which an H100 cannot be: predicted from its data sheet, not run."""
    floors = {
        "memory": bytes_moved / H100["bytes_per_s"],
        "tensor cores": flops / H100["flops_per_s"],
        "exponentials": exponentials / H100["exponentials_per_s"],
    }
    bound = max(floors, key=lambda name: floors[name])
    return {
        "kind": "predicted", "device": "H100 (SXM)", "kernel": kernel, "shape": shape, "bytes": bytes_moved, "flops": flops,
        "exponentials": exponentials, "predicted_floor_us": floors[bound] * 1e6, "bound": bound,
    }  # fmt: skip


def interleave(
    jobs: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float], skip: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Milliseconds of each job, the best of some rounds; `skip` names jobs that only every n-th round runs."""
    best = dict.fromkeys(jobs, float("inf"))
    for i in range(rounds):
        for name, job in jobs.items():
            if i % (skip or {}).get(name, 1):
                continue
            begin = clock()
            job()
            best[name] = min(best[name], (clock() - begin) * 1e3)
    return best


def kernel(op: CustomOp, inputs: Mapping[str, Array], attributes: Mapping[str, Any]) -> Callable[[int], None]:
    """The native kernel into outputs that are there, as a function of the number of threads."""
    library = native.load(native.build())
    shapes = op.output_shapes(op.infer({n: x.shape for n, x in inputs.items()}, attributes))
    outputs = [np.zeros(shapes[a.name], np.float32) for a in op.outputs]
    buffers = {n: buffer(x) for n, x in inputs.items()}

    def run(threads: int) -> None:
        library.run(op, buffers, [buffer(x) for x in outputs], attributes, threads=threads)

    return run


def session(
    op: CustomOp, inputs: Mapping[str, Array], attributes: Mapping[str, Any], *, library: bool, contrib: bool = False
) -> Callable[[], object]:
    """The operator's node in ONNX Runtime on one thread: its body, or with the native library.

    Inputs and outputs are bound to memory that is there, as they are for a node in the middle of a model: `run` would copy each output into
    an array of new pages.
    """
    import onnxruntime as ort

    form, settled, operands = node_of(op, inputs, attributes)
    model = one_node(op, form, settled, ir.DataType.FLOAT, contrib=contrib)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if library:
        options.register_custom_ops_library(str(native.build()))
    opened = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = opened.io_binding()
    for name, x in operands.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(x))
    for output, x in zip(opened.get_outputs(), opened.run(None, operands), strict=True):
        binding.bind_ortvalue_output(output.name, ort.OrtValue.ortvalue_from_numpy(x))
    return lambda: opened.run_with_iobinding(binding)


def torch_loop(inputs: Mapping[str, Array]) -> None:
    """The scan as its formula reads, one token after the other."""
    u, delta, A, B, C = (torch.from_numpy(inputs[n]) for n in ("u", "delta", "A", "B", "C"))
    h = torch.zeros(u.shape[0], *A.shape)
    y = torch.empty_like(u)
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t].unsqueeze(-1) * A) * h + (delta[:, t] * u[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(1)
        y[:, t] = (h * C[:, t].unsqueeze(1)).sum(-1)


def probe(count: int) -> Callable[[], None]:
    """As many exponentials as the scan computes, of a buffer that stays in the first cache."""
    library = native.load(native.build())
    x = np.linspace(-3.0, 0.0, 2048, dtype=np.float32)
    y = np.empty_like(x)
    return lambda: library.probe(EXP, buffer(x), buffer(y), x.size, count // x.size)


def peak_growth(job: Callable[[], object]) -> int:
    """Bytes by which a job raises the resident memory of this process at its highest. Linux keeps the peak, and lets it be reset."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmHWM")
    job()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def check(name: str, value: float, goal: float, *, least: bool) -> dict[str, Any]:
    """One entry of the checks."""
    return {"name": name, "value": value, "goal": f"{'>=' if least else '<='} {goal:g}", "holds": value >= goal if least else value <= goal}


def report(name: str, rows: list[dict[str, Any]], checks: list[dict[str, Any]]) -> int:
    """Prints the JSON; 0 when every check holds."""
    print(json.dumps({"name": name, "machine": machine(), "rows": rows, "checks": checks}, indent=2))
    return 0 if all(c["holds"] for c in checks) else 1


def main() -> int:
    """Measures and prints one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    batch, length, channels, state, rounds = 1, 512 if arguments.quick else 4096, 1536, 16, 3 if arguments.quick else 12
    rng = np.random.Generator(np.random.PCG64(0))
    inputs = {
        "u": rng.standard_normal((batch, length, channels)),
        "delta": np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), (batch, length, channels))),
        "A": -np.tile(np.arange(1.0, state + 1), (channels, 1)),
        "B": rng.standard_normal((batch, length, state)),
        "C": rng.standard_normal((batch, length, state)),
    }
    inputs = {n: x.astype(np.float32) for n, x in inputs.items()}
    op = OPS["selective_scan"]
    attributes = op.resolve({})
    run = kernel(op, inputs, attributes)
    run(2)  # the outputs' pages are touched now, and are not extra memory
    extra = peak_growth(lambda: run(2))
    exponentials = batch * length * channels * state
    jobs: dict[str, Callable[[], object]] = {
        "native": lambda: run(1),
        "exponentials only": probe(exponentials),
        "native in ONNX Runtime": session(op, inputs, attributes, library=True),
        "torch loop": lambda: torch_loop(inputs),
        "ONNX Scan body": session(op, inputs, attributes, library=False),
    }
    one = interleave(jobs, rounds, time.thread_time, {"torch loop": 4, "ONNX Scan body": 4})
    threads = interleave({"1": lambda: run(1), "2": lambda: run(2)}, 4 * rounds, time.perf_counter)
    shape = f"B{batch} D{channels} N{state} L{length} float32"
    rows: list[dict[str, Any]] = [{"kind": "measured", "kernel": n, "shape": shape, "threads": 1, "cpu_ms": ms} for n, ms in one.items()]
    rows += [{"kind": "measured", "kernel": "native", "shape": shape, "threads": int(n), "wall_ms": ms} for n, ms in threads.items()]
    tokens = batch * length
    rows.append(
        roofline(
            "selective_scan",
            bytes_moved=2 * tokens * (3 * channels + 2 * state) + 4 * channels * state * (1 + 2 * batch),
            flops=6 * exponentials, exponentials=exponentials, shape=shape.replace("float32", "bfloat16"),
        )
    )  # fmt: skip
    checks = [
        check("torch loop / native", one["torch loop"] / one["native"], 8, least=True),
        check("ONNX Scan body / native", one["ONNX Scan body"] / one["native in ONNX Runtime"], 15, least=True),
        check("native / exponentials only", one["native"] / one["exponentials only"], 2, least=False),
        check("one thread / two threads", threads["1"] / threads["2"], 1.7, least=True),
        # Scratch is the state and the decay; threads touch a stack each, and the allocator rounds up.
        check(
            "extra memory in units of B D N floats",
            extra / (4 * batch * channels * state),
            2 + 2**20 / (batch * channels * state),
            least=False,
        ),
    ]
    return report("selective_scan", rows, checks)


if __name__ == "__main__":
    sys.exit(main())
