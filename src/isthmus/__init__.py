"""isthmus carries PyTorch image-generation models to the hardware that serves them, and measures every artifact against PyTorch.

The functions and results of `isthmus.pipeline` are available here; they are imported, with torch, when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.analysing import AnalysisResult
    from isthmus.calibrating import CalibrateResult
    from isthmus.differences import BisectResult, DiffResult
    from isthmus.embedding import EmbedResult
    from isthmus.pipeline import analyse, bisect, build, calibrate, compare_reports, diff, embed, export, inspect, report, tune, verify
    from isthmus.results import BuildResult, ExportResult, VerifyResult
    from isthmus.tuning import TuneResult

__version__ = "0.1.0"
__all__ = [
    "AnalysisResult",
    "BisectResult",
    "BuildResult",
    "CalibrateResult",
    "DiffResult",
    "EmbedResult",
    "ExportResult",
    "TuneResult",
    "VerifyResult",
    "__version__",
    "analyse",
    "bisect",
    "build",
    "calibrate",
    "compare_reports",
    "diff",
    "embed",
    "export",
    "inspect",
    "report",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from isthmus import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'isthmus' has no attribute {name!r}")
