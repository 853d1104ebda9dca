"""TensorRT's layer for mixtures of experts: why docs/design/0008-mixture-of-experts.md leaves them dense."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("tensorrt_rtx", reason="not run: tensorrt-rtx is not installed (pip install 'isthmus[tensorrt-rtx]')")

SCRIPT = """
import json, sys
import numpy as np
import tensorrt_rtx as trt

class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.lines = []
    def log(self, severity, text):
        if severity <= trt.ILogger.ERROR:
            self.lines.append(text)

log, found = Log(), {}
parser = trt.OnnxParser(trt.Builder(log).create_network(0), log)
found["known"] = [name for name in ("MoE", "QMoE", "TRT_MoE") if parser.supports_operator(name)]
for device in ("SM89", "SM120"):
    for fused in (True, False):
        builder = trt.Builder(log)
        network = builder.create_network(0)
        tokens, experts, width, hidden = 16, 8, 64, 128
        def weight(*shape):
            return network.add_constant(shape, np.ones(shape, np.float16)).get_output(0)
        x = network.add_input("x", trt.float16, (1, tokens, width))
        if fused:
            chosen = network.add_input("chosen", trt.int32, (1, tokens, 2))
            layer = network.add_moe(x, chosen, network.add_input("scores", trt.float16, (1, tokens, 2)))
            up, down = (experts, width, hidden), (experts, hidden, width)
            layer.set_gated_weights(weight(*up), weight(*up), weight(*down), trt.MoEActType.SILU)
        else:
            layer = network.add_matrix_multiply(x, trt.MatrixOperation.NONE, weight(1, width, hidden), trt.MatrixOperation.NONE)
        network.mark_output(layer.get_output(0))
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, device), 0)
        log.lines.clear()
        plan = builder.build_serialized_network(network, config)
        found[f"{device} {'experts' if fused else 'product'}"] = [plan is not None, " ".join(log.lines)]
print(json.dumps(found))
"""


def test_tensorrt_rtx_does_not_build_its_layer_of_experts() -> None:
    """When this fails, look again at what design note 0008 says of TensorRT: in a process of its own, for the library may abort."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("known") == ["QMoE", "TRT_MoE"]  # and not com.microsoft.MoE
    for case, (built, log) in found.items():
        assert built == case.endswith("product"), (case, log)
        assert built or "moe_lowering" in log
