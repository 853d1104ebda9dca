"""What `isthmus lint` reports: the findings of the rules, and how much of the products is in FP8, or likely on the Neural Engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from isthmus.exporter.bundle import read_manifest
from isthmus.exporter.errors import UsageError
from isthmus.exporter.lint import SEVERITIES, Finding, Reads, lint, rules_for
from isthmus.exporter.subject import Subject, read_subject
from isthmus.targets.coreml.rules.engine import Share, engine_share
from isthmus.targets.coreml.rules.program import PACKAGE, packages_of, read_program
from isthmus.targets.tensorrt.coverage import Coverage, coverage


@dataclass(frozen=True)
class LintReport:
    """What was found in a graph.

    Attributes:
        path: The bundle, package or file.
        target: Whose rules were applied; empty for all of them.
        rules: Number of rules that were applied.
        findings: The worst first.
        reads: What was looked at: an ONNX graph or ML Programs.
        coverage: The share of FP8; None where the graph holds no FP8.
        engine: The share that likely runs on the Neural Engine; None for what is no ML Program.
    """

    path: Path
    target: str
    rules: int
    findings: tuple[Finding, ...]
    reads: Reads = "onnx"
    coverage: Coverage | None = None
    engine: Share | None = None

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
            "engine": self.engine.value() if self.engine else None,
            "exit_code": self.exit_code,
        }


def examine(path: Path, target: str | None = None, *, chip: str = "", observe: bool = False) -> LintReport:
    """Applies a target's rules to a bundle, a Core ML package or an ONNX file.

    Args:
        path: A bundle's folder, a folder that ends in `.mlpackage`, or an ONNX file.
        target: Whose rules; by default the bundle's target, Core ML for a package, and all of them for a file.
        chip: The chip whose Neural Engine is asked about, for ML Programs; empty for all.
        observe: Run ML Programs on the bundle's example inputs, for the rules that need to know how large values become.

    Raises:
        UsageError: The path is none of these, or `chip` or `observe` is given for what is no ML Program.
        IntegrityError, IsthmusError: What is read is damaged; see `exporter.subject.read_subject` and
            `targets.coreml.rules.program.read_program`.
    """
    if path.suffix == PACKAGE or (path.is_dir() and packages_of(read_manifest(path))):
        programs = read_program(path, target, chip=chip, observe=observe)
        rules = len(rules_for([programs.target], programs.reads))
        return LintReport(
            path, programs.target, rules, tuple(lint(programs)), programs.reads, engine=engine_share(programs) if rules else None
        )
    for given, option in ((chip, "--chip"), (observe, "--observe")):
        if given:
            raise UsageError(f"{option} is for Core ML, and {path} holds no {PACKAGE}", hint="give a bundle of coreml, or a package")
    subject = read_subject(path, target)
    targets = [subject.target] if subject.target else None
    return LintReport(
        path, subject.target, len(rules_for(targets, subject.reads)), tuple(lint(subject, targets)), coverage=_coverage(subject)
    )


def _coverage(subject: Subject) -> Coverage | None:
    if not any(value.dtype == ir.DataType.FLOAT8E4M3FN for value, _ in subject.values()):
        return None
    return coverage(subject.model, subject.sizes("opt"))
