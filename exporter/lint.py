"""Static rules: what a target's compiler is known to refuse, to compute in another precision than the graph says, or to waste.

A rule is a function from a subject (an ONNX graph, see `subject`; an ML Program, see `targets.coreml.rules.program`) to its matches, and
its decorator is its registration, with arguments that are literals (see `registry`)::

    @register_rule("TRT-403", summary="TopK of more than 3840", effect="refused", targets=("tensorrt", "tensorrt-rtx"),
                   fix="take fewer", source="TensorRT-RTX 1.7.1: K exceeds the maximum value allowed (3840)")
    def top_k(subject: Subject) -> Iterator[Match]: ...

Ids are stable: they are looked for in logs and silenced in scripts. A rule that is no longer true is removed, and its id is not used again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypeVar

import onnx_ir as ir

from .passes.scope import module_of
from .registry import Registry

Severity = Literal["error", "warning", "info"]
Effect = Literal["refused", "loses fp8", "other result", "leaves the engine", "loses precision", "wasteful", "unproven"]
Reads = Literal["onnx", "mil"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""The worst first."""

EFFECTS: dict[Effect, str] = {
    "refused": "the compiler, or the engine when it runs, refuses it: an error",
    "loses fp8": "it is computed in half precision, and nothing says so: an error in an fp8 bundle, a warning elsewhere",
    "other result": "another operator may be computed than the graph names: an error",
    "leaves the engine": "it likely runs on the CPU or the GPU and not on the Neural Engine: a warning",
    "loses precision": "it likely leaves the range or the exact numbers of float16: a warning",
    "wasteful": "it costs time or memory for nothing: a warning",
    "unproven": "it may well work, and nobody has tried: for information",
}
"""What a rule's matches lead to, and how severe that is."""


class Looked(Protocol):
    """What rules look at, as far as this module needs it."""

    @property
    def reads(self) -> Reads:
        """Which rules can read it."""

    @property
    def target(self) -> str:
        """The target's registered name; empty when it is not known."""

    @property
    def precision(self) -> str:
        """The precision that was asked for; empty when it is not known."""


S = TypeVar("S")
Check = Callable[[S], Iterable["Match"]]

MODULES = 3
"""How many modules a finding names of those that it was found in."""


@dataclass(frozen=True)
class Match:
    """One place that a rule objects to.

    Attributes:
        what: What was found and expected, without the names of the place: matches that read the same are reported as one finding.
        node: The node; None when it is none.
        where: What it concerns instead of the node's module: an input, a file.
        fix: What to do, where it differs from the rule's.
        name: The operation's name, where it is no ONNX node.
    """

    what: str
    node: ir.Node | None = None
    where: str = ""
    fix: str = ""
    name: str = ""


@dataclass(frozen=True)
class Rule:
    """A rule.

    Attributes:
        id: Stable.
        summary: What it objects to, in a line.
        effect: What happens to such a graph.
        targets: The registered names of the targets that it is true of.
        fix: What to do about it.
        source: Where that is documented or reported, or how it was measured.
        check: Finds the matches.
        reads: What it reads: ONNX graphs or ML Programs.
        verdict: `likely` where it is inferred from what others saw, and nobody can know before the device decides; else empty.
    """

    id: str
    summary: str
    effect: Effect
    targets: tuple[str, ...]
    fix: str
    source: str
    check: Check[Any]
    reads: Reads = "onnx"
    verdict: Literal["", "likely"] = ""

    def severity(self, subject: Looked) -> Severity:
        """How severe a match is in this subject."""
        if self.effect == "loses fp8":
            return "error" if subject.precision == "fp8" else "warning"
        if self.effect == "unproven":
            return "info"
        return "error" if self.effect in ("refused", "other result") else "warning"


RULES: Registry[Rule] = Registry("rule", "targets", "register_rule")


def register_rule(
    id_: str,
    *,
    summary: str,
    effect: Effect,
    targets: tuple[str, ...],
    fix: str,
    source: str,
    reads: Reads = "onnx",
    verdict: Literal["", "likely"] = "",
) -> Callable[[Check[S]], Check[S]]:
    """Registers a rule. Every argument must be a literal (see `registry`)."""

    def decorate(check: Check[S]) -> Check[S]:
        RULES.register(id_, Rule(id_, summary, effect, targets, fix, source, check, reads, verdict))
        return check

    return decorate


@dataclass(frozen=True)
class Finding:
    """What a rule found. Findings sort with the worst first, then by rule.

    Attributes:
        rule: The rule's id.
        severity: `error`, `warning` or `info`.
        what: What was found and expected.
        where: The PyTorch module path, an input or a file; of the first place when there are several. Empty for the whole graph.
        node: The node's or the operation's name, of the first place.
        fix: What to do about it.
        count: Number of places.
        modules: The first few different places, when there are several.
        verdict: The rule's: `likely`, or empty.
    """

    rule: str
    severity: Severity
    what: str
    where: str = ""
    node: str = ""
    fix: str = ""
    count: int = 1
    modules: tuple[str, ...] = ()
    verdict: str = ""

    def __lt__(self, other: Finding) -> bool:
        return self._key() < other._key()

    def _key(self) -> tuple[int, str, str, str, str]:
        return SEVERITIES.index(self.severity), self.rule, self.where, self.node, self.what

    def __str__(self) -> str:
        place = ", ".join(self.modules) or self.where or self.node
        more = f" ({self.count} places)" if self.count > 1 else ""
        rule = f"{self.rule} ({self.verdict})" if self.verdict else self.rule
        return f"{self.severity} {rule} {place + more + ': ' if place or more else ''}{self.what} (fix: {self.fix})"

    def value(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "modules": list(self.modules)}


def rules_for(targets: Sequence[str] | None = None, reads: Reads | None = None) -> list[Rule]:
    """The rules that are true of one of the targets, or of all, by id; of those that read this kind of graph, or of all."""
    found = [RULES[name] for name in sorted(RULES)]
    return [rule for rule in found if (targets is None or set(rule.targets) & set(targets)) and (reads is None or rule.reads == reads)]


def lint(subject: Looked, targets: Sequence[str] | None = None) -> list[Finding]:
    """Applies the rules of some targets.

    Args:
        subject: What to look at.
        targets: Registered names; None for the subject's own target, or for every rule that can read it when that is not known.

    Returns:
        The findings, the worst first. Places of one rule that differ in nothing but where they are make one finding.
    """
    if targets is None and subject.target:
        targets = [subject.target]
    return sorted(f for rule in rules_for(targets, subject.reads) for f in _findings(rule, subject))


def _findings(rule: Rule, subject: Looked) -> Iterable[Finding]:
    alike: dict[tuple[str, str], list[Match]] = {}
    for match in rule.check(subject):
        alike.setdefault((match.what, match.fix), []).append(match)
    for (what, fix), matches in alike.items():
        places = list(dict.fromkeys(place for m in matches if (place := _place(m))))
        first = matches[0]
        yield Finding(
            rule=rule.id,
            severity=rule.severity(subject),
            what=what,
            where=_place(first),
            node=(first.node.name or "") if first.node is not None else first.name,
            fix=fix or rule.fix,
            count=len(matches),
            modules=(*places[:MODULES], *(["…"] if len(places) > MODULES else [])) if len(places) > 1 else (),
            verdict=rule.verdict,
        )


def _place(match: Match) -> str:
    return match.where or (module_of(match.node) if match.node is not None else "")


def rules_table() -> str:
    """The rules as a Markdown table, by id: what `docs/lint.md` holds."""
    lines = ["| id | what | effect | targets | fix | source |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r.id} | {r.summary} | {r.effect} | {', '.join(r.targets)} | {r.fix} | {r.source} |".replace("\n", " ") for r in rules_for()
    ]
    return "\n".join(lines) + "\n"
