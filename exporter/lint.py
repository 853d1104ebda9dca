"""Static rules: what a target's compiler is known to refuse, to compute in another precision than the graph says, or to waste.

A rule is a function from a `Subject` to its matches, and its decorator is its registration, with arguments that are literals (see
`registry`)::

    @register_rule("TRT-403", summary="TopK of more than 3840", effect="refused", targets=("tensorrt", "tensorrt-rtx"),
                   fix="take fewer", source="TensorRT-RTX 1.7.1: K exceeds the maximum value allowed (3840)")
    def top_k(subject: Subject) -> Iterator[Match]: ...

Ids are stable: they are looked for in logs and silenced in scripts. A rule that is no longer true is removed, and its id is not used again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import onnx_ir as ir

from .passes.scope import module_of
from .registry import Registry
from .subject import Subject

Severity = Literal["error", "warning", "info"]
Effect = Literal["refused", "loses fp8", "other result", "wasteful", "unproven"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""The worst first."""

EFFECTS: dict[Effect, str] = {
    "refused": "the compiler, or the engine when it runs, refuses it: an error",
    "loses fp8": "it is computed in half precision, and nothing says so: an error in an fp8 bundle, a warning elsewhere",
    "other result": "another operator may be computed than the graph names: an error",
    "wasteful": "it costs time or memory for nothing: a warning",
    "unproven": "it may well work, and nobody has tried: for information",
}
"""What a rule's matches lead to, and how severe that is."""

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
    """

    what: str
    node: ir.Node | None = None
    where: str = ""
    fix: str = ""


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
    """

    id: str
    summary: str
    effect: Effect
    targets: tuple[str, ...]
    fix: str
    source: str
    check: Callable[[Subject], Iterable[Match]]

    def severity(self, subject: Subject) -> Severity:
        """How severe a match is in this subject."""
        if self.effect == "loses fp8":
            return "error" if subject.precision == "fp8" else "warning"
        return {"refused": "error", "other result": "error", "wasteful": "warning", "unproven": "info"}[self.effect]  # type: ignore[return-value]


RULES: Registry[Rule] = Registry("rule", "targets", "register_rule")


def register_rule(
    id_: str, *, summary: str, effect: Effect, targets: tuple[str, ...], fix: str, source: str
) -> Callable[[Callable[[Subject], Iterable[Match]]], Callable[[Subject], Iterable[Match]]]:
    """Registers a rule. Every argument must be a literal (see `registry`)."""

    def decorate(check: Callable[[Subject], Iterable[Match]]) -> Callable[[Subject], Iterable[Match]]:
        RULES.register(id_, Rule(id_, summary, effect, targets, fix, source, check))
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
        node: The node's name, of the first place.
        fix: What to do about it.
        count: Number of places.
        modules: The first few different places, when there are several.
    """

    rule: str
    severity: Severity
    what: str
    where: str = ""
    node: str = ""
    fix: str = ""
    count: int = 1
    modules: tuple[str, ...] = ()

    def __lt__(self, other: Finding) -> bool:
        return self._key() < other._key()

    def _key(self) -> tuple[int, str, str, str, str]:
        return SEVERITIES.index(self.severity), self.rule, self.where, self.node, self.what

    def __str__(self) -> str:
        place = ", ".join(self.modules) or self.where or self.node
        more = f" ({self.count} places)" if self.count > 1 else ""
        return f"{self.severity} {self.rule} {place + more + ': ' if place or more else ''}{self.what} (fix: {self.fix})"

    def value(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "modules": list(self.modules)}


def rules_for(targets: Sequence[str] | None = None) -> list[Rule]:
    """The rules that are true of one of the targets, or all, by id."""
    found = [RULES[name] for name in sorted(RULES)]
    return found if targets is None else [rule for rule in found if set(rule.targets) & set(targets)]


def lint(subject: Subject, targets: Sequence[str] | None = None) -> list[Finding]:
    """Applies the rules of some targets.

    Args:
        subject: What to look at.
        targets: Registered names; None for the subject's own target, or for every rule when that is not known.

    Returns:
        The findings, the worst first. Places of one rule that differ in nothing but where they are make one finding.
    """
    if targets is None and subject.target:
        targets = [subject.target]
    return sorted(f for rule in rules_for(targets) for f in _findings(rule, subject))


def _findings(rule: Rule, subject: Subject) -> Iterable[Finding]:
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
            node=(first.node.name or "") if first.node is not None else "",
            fix=fix or rule.fix,
            count=len(matches),
            modules=(*places[:MODULES], *(["…"] if len(places) > MODULES else [])) if len(places) > 1 else (),
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
