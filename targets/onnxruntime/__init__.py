"""ONNX Runtime, on any machine: `model.onnx` (and `model.onnx.data`), fp32, fp16, int8, or weights in int4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, Field

from ...exporter.errors import Reason
from ...exporter.manifest import Manifest
from ...exporter.onnx import OPSETS
from ...exporter.op import DOMAIN
from ...exporter.precision_options import NarrowOptions
from ...exporter.runner import Runner
from ...exporter.sampling import FILE as SAMPLER
from ...exporter.target import Capability, Job, Lowered, Stage, Target, register_target

if TYPE_CHECKING:
    from ...exporter.passes.fp8_layers import Layer

MODEL = "model.onnx"


class OnnxRuntimeOptions(NarrowOptions):
    """Options of `--target onnxruntime`."""

    execution_provider: Literal["cpu", "cuda"] = Field(
        "cpu", description="Where the artifact is verified. cuda that is missing, or that would fall back to the CPU, is an error."
    )
    graph_optimization: Literal["disable", "basic", "extended", "all"] = Field(
        "all", description="Graph optimisation level of the session."
    )
    int8_include: tuple[str, ...] = Field(
        (), description="With --precision int8: patterns of PyTorch module paths that compute in INT8 although the default leaves them out."
    )
    int8_exclude: tuple[str, ...] = Field(
        (), description="With --precision int8: patterns of PyTorch module paths that stay in float32, for example 'blocks.0.*'."
    )
    threads: int = Field(0, ge=0, le=1024, description="Threads within an operator; 0 lets ONNX Runtime decide.")
    ssm_op: Literal["onnx27", "plugin", "decomposed"] = Field(
        "plugin",
        description="How scans and linear attention are written: as the standard operators of opset 27, as nodes of our own with a body in "
        "the same file (any ONNX Runtime runs the body, our library runs the node), or as plain operators only.",
    )
    experts: Literal["fused", "dense"] = Field(
        "fused",
        description="How mixtures of experts are written: as com.microsoft.MoE, which only ONNX Runtime has and in which each expert "
        "multiplies its own tokens, or as standard operators that send every token through every expert. With --execution-provider cuda "
        "always the latter.",
    )


@register_target("onnxruntime", summary="ONNX Runtime on any machine: one ONNX file, fp32, fp16, int8 or int4 weights")
class OnnxRuntime(Target[OnnxRuntimeOptions]):
    """Lowers to one ONNX file of the standard operators and runs it in ONNX Runtime."""

    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8", "int4")
    calibrated: ClassVar[tuple[str, ...]] = ("int8",)
    rounded: ClassVar[tuple[str, ...]] = ("int4",)
    samplers: ClassVar[tuple[str, ...]] = ("step", "loop")
    opsets: ClassVar[tuple[int, ...]] = OPSETS
    Options: ClassVar[type[BaseModel]] = OnnxRuntimeOptions

    def capabilities(self) -> list[Capability]:
        """Lowering works everywhere; verification needs the `onnxruntime` package."""
        from ...exporter.ops import native
        from .session import installed

        version, providers = installed()
        built, kernels, fix = native.state()
        found = f"onnxruntime {version}, {', '.join(providers)}" if version else "the onnxruntime package is not installed"
        return [
            Capability("lower", available=True, detail="writes ONNX on any machine"),
            Capability("build", available=True, detail="an ONNX file needs no build"),
            Capability("verify", available=bool(version), detail=found, fix="" if version else "pip install 'isthmus[cpu]'"),
            Capability("native kernels", available=built, detail=kernels, fix=fix),
        ]

    def check_machine(self, options: OnnxRuntimeOptions) -> None:
        """Refuses `--execution-provider cuda` where it is missing. That it does not fall back is checked once a session is open."""
        from .session import check_provider

        if options.execution_provider != "cpu":
            check_provider(options.execution_provider)

    def unsupported(self, job: Job[OnnxRuntimeOptions]) -> list[Reason]:
        """Nodes that ONNX Runtime does not know, element types that its CPU kernels lack, and what `--ssm-op onnx27` cannot express.

        Raises:
            UsageError: Patterns of layers are given for another precision.
        """
        from .support import too_old, unsupported, without_standard_operator

        job.options.check_precision(job.precision)
        return [
            *unsupported(job.onnx),
            *(without_standard_operator(job.onnx) if job.options.ssm_op == "onnx27" else []),
            *(too_old(job.onnx) if job.precision == "int4" else []),
        ]

    def observed(self, job: Job[OnnxRuntimeOptions]) -> tuple[str, ...]:
        """The activations of the layers that compute in INT8, or have INT4 weights; see `quantised`."""
        return tuple(dict.fromkeys(name for layer in self.quantised(job) for name in layer.observed))

    def quantised(self, job: Job[OnnxRuntimeOptions]) -> tuple[Layer, ...]:
        """The layers that compute in INT8, or have INT4 weights; see `integers.selection` and `narrow.selection`."""
        from . import integers, narrow

        return narrow.selection(job).layers if job.precision == "int4" else integers.selection(job)[0]

    def lower(self, job: Job[OnnxRuntimeOptions], folder: Path) -> Lowered:
        """Writes `model.onnx`, and `sampler.onnx` where that is asked for; in fp16, norms, softmax, accumulations and whatever leaves
        fp16's range stay in fp32; in int8, products of an activation and a weight are 8 bits wide; in int4, weights are 4 bits wide.
        """
        from .lower import lower

        return lower(job, folder / MODEL)

    def stages(self, folder: Path, manifest: Manifest, *, trust: bool = False) -> list[Stage]:  # noqa: ARG002 - an ONNX file holds no code
        """`onnx` (in int8 and int4 `quantized`): the file as every ONNX Runtime runs it, on the CPU. `native`, where the file has nodes
        of our own: with our kernels in place of the nodes' bodies. `sampler`, with `--sampler loop`: the sampling graph, on the CPU. With
        `--execution-provider cuda` also `device`.
        """
        options = OnnxRuntimeOptions.model_validate(manifest.options.get(self.name, {}))
        path, cpu = folder / MODEL, options.model_copy(update={"execution_provider": "cpu"})
        stages = [Stage("quantized" if manifest.precision in ("int8", "int4") else "onnx", _opener(path, cpu))]
        if _has_nodes_of_ours(path):
            from ...exporter.ops import native

            built, detail, fix = native.state()
            stages.append(Stage("native", _opener(path, cpu, native.library()) if built else None, reason=f"{detail} (fix: {fix})"))
        if "sampler" in manifest.details:
            stages.append(Stage("sampler", _opener(folder / SAMPLER, cpu), sampling=True))
        if options.execution_provider == "cuda":
            stages.append(Stage("device", _opener(path, options), required=True))
        return stages


def _has_nodes_of_ours(path: Path) -> bool:
    import onnx

    return any(entry.domain == DOMAIN for entry in onnx.load(path, load_external_data=False).opset_import)


def _opener(path: Path, options: OnnxRuntimeOptions, kernels: Path | None = None) -> Callable[[], Runner]:
    def make() -> Runner:
        from .session import OnnxRuntimeRunner

        return OnnxRuntimeRunner(
            path,
            provider=options.execution_provider,
            optimization=options.graph_optimization,
            threads=options.threads,
            kernels=kernels,
        )

    return make
