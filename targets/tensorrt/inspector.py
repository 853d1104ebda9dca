"""What TensorRT made of the layers that have to compute in FP8, read from its inspector's description of the engine.

The description (TensorRT documentation, "Engine Inspector") is JSON: `Layers`, each with `Name`, `LayerType`, `Inputs` and `Outputs` (each
`Name`, `Dimensions`, `Format/Datatype`), for convolutions `Weights` with a `Type`, `TacticName`, and `Metadata`, which names the ONNX
nodes that were fused into the layer as `[ONNX Layer: NAME]`, separated by the control characters 0x1E and 0x1F.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...exporter.errors import IsthmusError, Reason
from .recipe import Fp8Layer

_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]\x1e\x1f]*)\]")

_FP8_TYPE = re.compile(r"fp8|e4m3|float8", re.IGNORECASE)

# Kernels are named after the types of A and C, then of B and the accumulator: sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_… multiplies FP8 by FP8,
# sm90_xmma_gemm_f16e4m3_f16f32_f32_… multiplies halves and only writes FP8.
_FP8_KERNEL = re.compile(r"_e4m3[a-z0-9]*_e4m3", re.IGNORECASE)


@dataclass(frozen=True)
class EngineLayer:
    """A layer of an engine.

    Attributes:
        name: TensorRT's.
        kind: Its type, such as `gemm`, `kgen` or `CaskConvolution`.
        nodes: The ONNX nodes in it.
        inputs: The datatypes and formats of its inputs.
        weights: The type of its weights, where they are described apart from the inputs.
        tactic: The kernel.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    weights: str
    tactic: str

    def multiplies_fp8(self, operands: int) -> bool:
        """Whether the layer shows that it multiplies in FP8: by its kernel's name, or by as many FP8 inputs as there are activations.

        Weights in FP8 alone are no evidence: a kernel may widen them and multiply in half precision.
        """
        if _FP8_KERNEL.search(self.tactic):
            return True
        return sum(bool(_FP8_TYPE.search(text)) for text in self.inputs) >= operands

    def described(self) -> str:
        """What the layer reads, in words."""
        reads = ", ".join(dict.fromkeys(self.inputs)) or "no input that is described"
        weights = f", with weights in {self.weights}" if self.weights else ""
        return f"{self.name} ({self.kind}) reads {reads}{weights}" + (f", kernel {self.tactic}" if self.tactic else "")


def parse_layers(text: str) -> list[EngineLayer]:
    """Reads the description of an engine.

    Raises:
        IsthmusError: It is not what the documentation says, or the engine was built without detailed descriptions.
    """
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise IsthmusError(f"TensorRT's description of the engine cannot be read: {type(error).__name__}: {error}") from error
    if not all(isinstance(layer, dict) for layer in layers):
        raise IsthmusError(
            "TensorRT describes the engine's layers by their names alone", hint="build it with profiling verbosity `detailed`"
        )
    return [_layer(layer) for layer in layers]


def _layer(values: Mapping[str, Any]) -> EngineLayer:
    weights = values.get("Weights")
    return EngineLayer(
        name=str(values.get("Name", "")),
        kind=str(values.get("LayerType", "")),
        nodes=tuple(_ORIGIN.findall(str(values.get("Metadata", "")))),
        inputs=tuple(_type(value) for value in values.get("Inputs", ()) if isinstance(value, dict)),
        weights=str(weights.get("Type", "")) if isinstance(weights, dict) else "",
        tactic=str(values.get("TacticName", "")),
    )


def _type(value: Mapping[str, Any]) -> str:
    # One field, as documented; or two, should a version split them.
    return str(value.get("Format/Datatype") or " ".join(str(value[key]) for key in ("Datatype", "Format") if key in value))


def not_fp8(layers: Iterable[EngineLayer], expected: Iterable[Fp8Layer]) -> list[Reason]:
    """Every node that has to compute in FP8 and is not shown to, by its PyTorch module.

    Args:
        layers: The engine's.
        expected: The nodes.
    """
    found: dict[str, list[EngineLayer]] = {}
    for layer in layers:
        for node in dict.fromkeys(layer.nodes):
            found.setdefault(node, []).append(layer)
    reasons = []
    for want in expected:
        candidates = found.get(want.node, [])
        if any(layer.multiplies_fp8(want.operands) for layer in candidates):
            continue
        got = "; ".join(layer.described() for layer in candidates) or "no layer of the engine names it"
        fix = f"leave it out with --fp8-exclude '{want.module}', or see `isthmus lint`" if want.module else "see `isthmus lint`"
        reasons.append(Reason(f"expected FP8: {got} (node {want.node})", where=want.module or want.node, fix=fix))
    return reasons
