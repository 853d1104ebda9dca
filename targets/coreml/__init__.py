"""Core ML: ML Programs for Apple's devices, `model.mlpackage`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from ...exporter.errors import Reason
from ...exporter.manifest import Manifest
from ...exporter.runner import Runner
from ...exporter.sampling import LoopSampler
from ...exporter.spec import Arrays, Tolerance
from ...exporter.target import Capability, Embedded, Examined, Job, Lowered, Stage, Target, register_target
from .options import CoreMLOptions

if TYPE_CHECKING:
    from ...exporter.passes.fp8_layers import Layer

MODEL = "model.mlpackage"
_PALETTES = ("palette8", "palette6", "palette4", "palette2")


@register_target("coreml", summary="Core ML on Apple silicon: an ML Program, checked by an interpreter on any machine")
class CoreML(Target[CoreMLOptions]):
    """Lowers the PyTorch program to an ML Program, and executes it in an interpreter; on a Mac, in Core ML as well."""

    precisions: ClassVar[tuple[str, ...]] = ("fp16", "fp32", "int8", "int4", "w8a8", *_PALETTES)
    calibrated: ClassVar[tuple[str, ...]] = ("w8a8",)
    computes: ClassVar[Mapping[str, str]] = {name: "fp16" for name in precisions if name != "fp32"}
    tolerances: ClassVar[Mapping[str, Tolerance]] = {
        # Weights alone, a scale for each channel: 41 dB of SQNR for a normal variable and more for weights, which average out over the
        # terms of a product; ten layers cost 10 dB, the range (8 standard deviations) gives back 18 dB. 45 dB are required.
        "int8": Tolerance(min_psnr=45.0),
        "palette8": Tolerance(min_psnr=45.0),
        # Activations as well, one scale for a tensor, whose outliers cost ten decibels and more.
        "w8a8": Tolerance(min_psnr=30.0),
        # Two bits of index more or less are 12 dB. 40 levels of 64 for a normal variable, 16 levels 20 dB, 4 levels 9 dB (Lloyd and Max).
        "palette6": Tolerance(min_psnr=35.0),
        "palette4": Tolerance(min_psnr=22.0),
        "palette2": Tolerance(min_psnr=10.0),
    }
    languages: ClassVar[tuple[str, ...]] = ("swift",)
    opsets: ClassVar[tuple[int, ...]] = ()
    Options: ClassVar[type[BaseModel]] = CoreMLOptions

    def capabilities(self) -> list[Capability]:
        """Lowering and the interpreter work wherever coremltools is installed; execution needs a Mac."""
        from .session import on_a_mac

        version = _installed()
        found = f"coremltools {version}" if version else "the coremltools package is not installed"
        fix = "" if version else "pip install 'isthmus[coreml]'"
        mac = on_a_mac()
        return [
            Capability("lower", available=bool(version), detail=found, fix=fix),
            Capability("build", available=True, detail="a package is compiled on the device that loads it"),
            Capability("verify", available=bool(version), detail="interpreter of ML Programs" if version else found, fix=fix),
            Capability("device", available=mac, detail="Core ML" if mac else "this is no Mac", fix="" if mac else "verify on a Mac"),
        ]

    def check_machine(self, options: CoreMLOptions) -> None:  # noqa: ARG002 - every option can be lowered wherever coremltools is
        """Refuses a machine without coremltools."""
        from ...exporter.errors import MachineError

        if not _installed():
            raise MachineError("coremltools is not installed, so nothing can be lowered to Core ML", hint="pip install 'isthmus[coreml]'")

    def fixes_sizes(self, options: CoreMLOptions) -> str:
        """Core ML's default: the Neural Engine runs fixed sizes only."""
        return "--shapes fixed" if options.shapes == "fixed" else ""

    def unsupported(self, job: Job[CoreMLOptions]) -> list[Reason]:
        """Calls that nobody lowers rightly, what the deployment target is too old for, and what the layout cannot take."""
        from .lower import unsupported

        return unsupported(job)

    def observed(self, job: Job[CoreMLOptions]) -> tuple[str, ...]:
        """What the layers read and compute, in the ONNX graph that all targets are calibrated on."""
        from .lower import calibrated_layers

        return tuple(dict.fromkeys(name for layer in calibrated_layers(job) for name in (layer.operand, layer.result)))

    def quantised(self, job: Job[CoreMLOptions]) -> tuple[Layer, ...]:
        """The layers whose weights GPTQ can round: products with a matrix."""
        from ...exporter.passes.fp8_layers import Layer
        from .lower import calibrated_layers

        return tuple(Layer(layer.node, layer.module, "weight", (layer.operand,), layer.axis) for layer in calibrated_layers(job))

    def lower(self, job: Job[CoreMLOptions], folder: Path) -> Lowered:
        """Writes `model.mlpackage`, or one of its chunks after the other with `--chunk-size`."""
        from .lower import lower

        return lower(job, folder)

    def examine(self, folder: Path, manifest: Manifest, example: Arrays) -> Examined:
        """See `lower.examine`: of the packages as they are on the disk."""
        from .lower import examine

        return examine([folder / name for name in _packages(manifest.details)], manifest, example)

    def embed(self, folder: Path, manifest: Manifest, language: str, destination: Path, *, sampler: LoopSampler | None = None) -> Embedded:
        """Writes a Swift package; see `swift`."""
        from .swift import write_package

        assert language in self.languages
        return write_package(folder, manifest, destination, sampler=sampler)

    def stages(self, folder: Path, manifest: Manifest, *, trust: bool = False) -> list[Stage]:  # noqa: ARG002 - a package holds no code
        """`mil`: the package in the interpreter, with every result rounded to its dtype. `device`: in Core ML, on a Mac."""
        from .session import CoreMLRunner, Interface, MilRunner, on_a_mac

        options = CoreMLOptions.model_validate(manifest.options.get(self.name, {}))
        packages = [folder / name for name in _packages(manifest.details)]

        def interpreted() -> Runner:
            return MilRunner(packages, Interface.of(manifest))

        def executed() -> Runner:
            return CoreMLRunner(packages, options.compute_units, Interface.of(manifest))

        mil = Stage("mil", interpreted) if _installed() else Stage("mil", None, reason="the coremltools package is not installed")
        return [mil, Stage("device", executed) if on_a_mac() else Stage("device", None, reason="Core ML runs on a Mac or an iPhone")]


def _packages(details: Mapping[str, Any]) -> list[str]:
    return list(details.get("packages", ())) or [MODEL]


def _installed() -> str:
    """The version of coremltools; empty when it is not there."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("coremltools")
    except PackageNotFoundError:
        return ""
