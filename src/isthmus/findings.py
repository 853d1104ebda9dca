"""What `isthmus lint` reports: the findings of the rules, and how much of the graph's matrix products is in FP8."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from isthmus.exporter.lint import SEVERITIES, Finding, lint, rules_for
from isthmus.exporter.subject import Subject, read_subject
from isthmus.targets.tensorrt.coverage import Coverage, coverage


@dataclass(frozen=True)
class LintReport:
    """What was found in a graph.

    Attributes:
        path: The bundle or file.
        target: Whose rules were applied; empty for all of them.
        rules: Number of rules that were applied.
        findings: The worst first.
        coverage: The share of FP8; None where the graph holds no FP8.
    """

    path: Path
    target: str
    rules: int
    findings: tuple[Finding, ...]
    coverage: Coverage | None = None

    @property
    def exit_code(self) -> int:
        """1 when there are errors, else 0."""
        return 1 if any(f.severity == "error" for f in self.findings) else 0

    @property
    def counts(self) -> dict[str, int]:
        """Number of findings of each severity."""
        return {s: sum(f.severity == s for f in self.findings) for s in SEVERITIES}

    def value(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "path": str(self.path),
            "target": self.target or None,
            "rules": self.rules,
            "counts": self.counts,
            "findings": [finding.value() for finding in self.findings],
            "coverage": self.coverage.value() if self.coverage else None,
            "exit_code": self.exit_code,
        }


def examine(path: Path, target: str | None = None) -> LintReport:
    """Applies a target's rules to a bundle or an ONNX file; see `exporter.subject.read_subject` for the errors."""
    subject = read_subject(path, target)
    targets = [subject.target] if subject.target else None
    return LintReport(path, subject.target, len(rules_for(targets)), tuple(lint(subject, targets)), _coverage(subject))


def _coverage(subject: Subject) -> Coverage | None:
    if not any(value.dtype == ir.DataType.FLOAT8E4M3FN for value, _ in subject.values()):
        return None
    return coverage(subject.model, subject.sizes("opt"))
