"""The native linear attention against com.microsoft.LinearAttention, and the native RWKV-7 against the ONNX node's Scan body.

B1 H16 64x64 L4096 in float32 on one thread; see selective_scan.py for how times are taken.

    python benchmarks/linear_attention.py            about a minute
    python benchmarks/linear_attention.py --quick    L512, fewer runs; for trying, the goals are those of the full size
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np
import torch
from selective_scan import check, interleave, report, roofline, session

from isthmus.exporter.op import OPS


def main() -> int:
    """Measures and prints one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    length, heads, size, rounds = 512 if arguments.quick else 4096, 16, 64, 3 if arguments.quick else 12
    rng = np.random.Generator(np.random.PCG64(0))

    def normal(width: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal((1, length, width), dtype=np.float32)

    def unit() -> np.ndarray[Any, Any]:
        x = normal(heads * size).reshape(1, length, heads, size)
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).reshape(1, length, -1)

    wide = heads * size
    gated = {"q": normal(wide), "k": unit(), "v": normal(wide), "decay": -0.1 * np.abs(normal(heads))}
    removal = unit()
    mixing = {
        "r": normal(wide),
        "decay": -0.1 * np.abs(normal(wide)),
        "k": 0.3 * normal(wide),
        "v": normal(wide),
        "a": -removal,
        "b": 0.5 * removal,
    }
    attention, rwkv = OPS["linear_attention"], OPS["rwkv7"]
    settings = attention.resolve({"q_num_heads": heads, "kv_num_heads": heads, "update_rule": "gated"})
    jobs = {
        "linear_attention, native": session(attention, gated, settings, library=True),
        "linear_attention, com.microsoft": session(attention, gated, settings, library=False, contrib=True),
        "rwkv7, native": session(rwkv, mixing, {"num_heads": heads}, library=True),
        "rwkv7, Scan body": session(rwkv, mixing, {"num_heads": heads}, library=False),
    }
    one = interleave(jobs, rounds, time.thread_time, {"rwkv7, Scan body": 4})
    shape = f"B1 H{heads} {size}x{size} L{length}"
    rows: list[dict[str, Any]] = [
        {"kind": "measured", "kernel": n, "shape": f"{shape} float32", "threads": 1, "cpu_ms": ms} for n, ms in one.items()
    ]
    # Chunks of 64 tokens on the tensor cores: scores, their product with the values, reading and writing the state.
    products = 2 * length * heads * (64 * size + 64 * size + 2 * size * size)
    state = 2 * 4 * heads * size * size
    half = f"{shape} bfloat16"
    rows += [
        roofline(
            "linear_attention, gated", bytes_moved=2 * length * (4 * wide + heads) + state, flops=products,
            exponentials=length * heads * 2, shape=half,
        ),
        roofline(
            "rwkv7", bytes_moved=2 * length * 7 * wide + state, flops=3 * products, exponentials=length * wide * 2, shape=half,
        ),
        roofline(
            "normalized_linear_attention", bytes_moved=2 * length * 4 * wide, flops=4 * length * heads * size * size, exponentials=0,
            shape=half,
        ),
        roofline(
            "causal_conv1d, width 4 with SiLU", bytes_moved=2 * length * 2 * wide, flops=2 * length * wide * 4, exponentials=length * wide,
            shape=f"B1 C{wide} L{length} bfloat16",
        ),
    ]  # fmt: skip
    checks = [
        check(
            "com.microsoft.LinearAttention / native",
            one["linear_attention, com.microsoft"] / one["linear_attention, native"],
            1,
            least=True,
        ),
        check("ONNX Scan body / native rwkv7", one["rwkv7, Scan body"] / one["rwkv7, native"], 10, least=True),
    ]
    return report("linear_attention", rows, checks)


if __name__ == "__main__":
    sys.exit(main())
