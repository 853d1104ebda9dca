"""Core AI: `model.aimodel` for iOS 27, macOS 27 and later, executed on any machine by the run time of coreai-core."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel

from ...exporter.errors import Reason
from ...exporter.manifest import Manifest
from ...exporter.runner import Runner
from ...exporter.target import Capability, Job, Lowered, Stage, Target, register_target
from .library import INSTALL, check_installed, installed
from .options import CoreAIOptions

MODEL = "model.aimodel"


@register_target("coreai", summary="Core AI on Apple silicon from iOS 27 and macOS 27: an asset, executed on any machine's CPU")
class CoreAI(Target[CoreAIOptions]):
    """Lowers the PyTorch program to an asset, and executes it in Core AI's own run time on the CPU."""

    precisions: ClassVar[tuple[str, ...]] = ("fp16", "fp32")
    computes: ClassVar[Mapping[str, str]] = {"fp16": "fp16"}
    opsets: ClassVar[tuple[int, ...]] = ()
    Options: ClassVar[type[BaseModel]] = CoreAIOptions

    def capabilities(self) -> list[Capability]:
        """Everything but Apple's hardware is there wherever the two packages are installed."""
        found = installed()
        detail, fix = found or "the coreai-torch package is not installed", "" if found else INSTALL
        return [
            Capability("lower", available=bool(found), detail=detail, fix=fix),
            Capability("build", available=True, detail="an asset is specialised on the device that loads it"),
            Capability("verify", available=bool(found), detail="Core AI's run time on the CPU" if found else detail, fix=fix),
            Capability("device", available=False, detail=NO_DEVICE, fix="run the asset in an application on such a device"),
        ]

    def check_machine(self, options: CoreAIOptions) -> None:  # noqa: ARG002 - every option works wherever the packages are
        """Refuses a machine without coreai-torch."""
        check_installed("nothing can be lowered to Core AI")

    def fixes_sizes(self, options: CoreAIOptions) -> str:
        """Core AI takes sizes that vary; the option is for devices that prefer fixed ones."""
        return "--shapes fixed" if options.shapes == "fixed" else ""

    def unsupported(self, job: Job[CoreAIOptions]) -> list[Reason]:
        """Calls that nobody lowers rightly, and dtypes and ranks that Core AI lacks."""
        from .support import unsupported

        return unsupported(job.program)

    def lower(self, job: Job[CoreAIOptions], folder: Path) -> Lowered:
        """Writes `model.aimodel`."""
        from .lower import lower

        return lower(job, folder / MODEL)

    def stages(self, folder: Path, manifest: Manifest, *, trust: bool = False) -> list[Stage]:  # noqa: ARG002 - an asset holds no code
        """`coreai`: the asset in the run time of coreai-core, on the CPU. `device`: not run by isthmus."""
        options = CoreAIOptions.model_validate(manifest.options.get(self.name, {}))

        def executed() -> Runner:
            from .session import CoreAIRunner

            return CoreAIRunner(folder / MODEL, {o.name: o.dtype for o in manifest.outputs}, timeout=options.timeout)

        here = Stage("coreai", executed) if installed() else Stage("coreai", None, reason="the coreai-torch package is not installed")
        return [here, Stage("device", None, reason=NO_DEVICE)]


NO_DEVICE = "Core AI's accelerated run time is part of iOS 27 and macOS 27"
