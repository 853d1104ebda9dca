"""What the calls of the pipeline return, and how they tell of their progress."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from isthmus.exporter.errors import AccuracyError, Reason
from isthmus.exporter.manifest import Manifest, StageResult, Verdict, weakest


class Progress(Protocol):
    """Told of every step as it begins and ends."""

    def step(self, title: str) -> AbstractContextManager[None]:
        """A step that lasts as long as the block."""
        ...


class Silent:
    """Says nothing."""

    def step(self, title: str) -> AbstractContextManager[None]:  # noqa: ARG002 - the protocol's argument
        """A step that nobody is told of."""
        return contextlib.nullcontext()


@dataclass(frozen=True)
class ExportResult:
    """What an export made.

    Attributes:
        bundle: The bundle's folder, None after a dry run.
        manifest: Its manifest; after a dry run, what is known without lowering.
        warnings: What people have to know before they use it; the report has them too.
    """

    bundle: Path | None
    manifest: Manifest
    warnings: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0, or 3 when a stage that was run is not within tolerance."""
        return _exit_code(self.manifest.stages)

    def summary(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "bundle": str(self.bundle) if self.bundle else None,
            "report": str(self.bundle / "report.html") if self.bundle else None,
            "warnings": list(self.warnings),
            **_summary(self.manifest, self.manifest.stages),
        }


@dataclass(frozen=True)
class VerifyResult:
    """What a verification found.

    Attributes:
        bundle: The bundle's folder.
        manifest: Its manifest, as it was written by the export.
        stages: What was found now.
    """

    bundle: Path
    manifest: Manifest
    stages: tuple[StageResult, ...]

    @property
    def verdict(self) -> Verdict:
        """The weakest verdict of the stages that were run now."""
        return weakest(self.stages)

    @property
    def exit_code(self) -> int:
        """0, or 3 when a stage that was run is not within tolerance."""
        return _exit_code(self.stages)

    def summary(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {"bundle": str(self.bundle), "integrity": "verified", **_summary(self.manifest, self.stages)}


@dataclass(frozen=True)
class BuildResult:
    """What a build made.

    Attributes:
        bundle: The bundle's folder.
        manifest: Its manifest, with the build in it.
        stages: The stages that the build has changed.
    """

    bundle: Path
    manifest: Manifest
    stages: tuple[StageResult, ...]

    @property
    def exit_code(self) -> int:
        """0, or 3 when the engine is not what was asked for, or is not within tolerance."""
        return _exit_code(self.stages)

    def summary(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "bundle": str(self.bundle),
            "report": str(self.bundle / "report.html"),
            **_summary(self.manifest, self.manifest.stages),
            "exit_code": self.exit_code,
        }


def _exit_code(stages: tuple[StageResult, ...]) -> int:
    return AccuracyError.exit_code if any(s.verdict in ("failed", "blocked") for s in stages) else 0


def misses(stages: tuple[StageResult, ...]) -> list[Reason]:
    """Why stages are not within tolerance, one reason each."""
    return [Reason(s.reason, where=f"stage {s.name} {s.verdict}") for s in stages if s.verdict in ("failed", "blocked")]


def _summary(manifest: Manifest, stages: tuple[StageResult, ...]) -> dict[str, Any]:
    return {
        "model": manifest.model,
        "target": manifest.target,
        "precision": manifest.precision,
        "device": manifest.device,
        "verdict": weakest(stages),
        "stages": [s.model_dump(mode="json", exclude={"metrics": {"__all__": {"histogram"}}}) for s in stages],
        "exit_code": _exit_code(stages),
    }


def tool_versions() -> dict[str, str]:
    """The versions of Python and of the packages that have a say in an export."""
    versions = {"python": platform.python_version()}
    for name in ("isthmus", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def json_values(value: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping with lists in place of tuples, as JSON has them."""
    return {key: list(item) if isinstance(item, tuple) else item for key, item in value.items()}
