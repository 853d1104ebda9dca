"""How much of an artifact likely runs on the Neural Engine: the share of the floating-point operations of its products.

Counted are convolutions, linear layers, matrix products, einsums of two operands and attention, two operations for each multiplication and
addition, at the sizes that the program declares (those that vary count as 1); those in a loop once. A product is likely on the engine when
no rule of the effect `leaves the engine` names it, and none names an input, a state or a file of weights of its program, which takes all
of it along; and when it is in no loop or branch. What Core ML decides on a device may differ: there, MLComputePlan says it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ....exporter.lint import rules_for
from ....exporter.manifest import Column, Table
from .program import Operation, ProgramSubject, shape

LEAVES = "leaves the engine"


@dataclass(frozen=True)
class Part:
    """The products of one kind, or of one PyTorch module.

    Attributes:
        name: The type of operation, or the module's path.
        products: Number of operations.
        flops: Their floating-point operations.
        likely: Those of them that likely run on the engine.
    """

    name: str
    products: int
    flops: int
    likely: int


@dataclass(frozen=True)
class Share:
    """See the module's text.

    Attributes:
        chip: The chip that was asked about; empty for all.
        operators: By type of operation.
        modules: By PyTorch module, in the order of the program; empty where modules are not known.
        rules: Rule to the number of places, of products and others, that it says leave the engine.
    """

    chip: str
    operators: tuple[Part, ...]
    modules: tuple[Part, ...]
    rules: Mapping[str, int]

    @property
    def flops(self) -> int:
        """Floating-point operations of all products."""
        return sum(part.flops for part in self.operators)

    @property
    def likely(self) -> int:
        """Those of them that likely run on the engine."""
        return sum(part.likely for part in self.operators)

    @property
    def share(self) -> float:
        """From 0 to 1; 0 when there is no product."""
        return self.likely / self.flops if self.flops else 0.0

    def value(self) -> dict[str, Any]:
        """As JSON values, for the manifest."""
        return {
            "verdict": "likely",
            "chip": self.chip or None,
            "share": self.share,
            "flops": self.flops,
            "likely": self.likely,
            "operators": [asdict(part) for part in self.operators],
            "modules": [asdict(part) for part in self.modules],
            "rules": dict(self.rules),
        }


def engine_share(subject: ProgramSubject) -> Share:
    """Counts the products of an artifact, of every function of every package, and those of them that likely run on the engine."""
    operators: dict[str, list[int]] = {}
    modules: dict[str, list[int]] = {}
    rules: Counter[str] = Counter()
    for part in subject.parts():
        away, whole = _away(part, rules)
        for operation in part.operations(*_FLOPS):
            name, flops = operation.outputs[0].name, _FLOPS[operation.op_type](operation)
            groups = [operators.setdefault(operation.op_type, [0, 0, 0])]
            if part.modules:
                groups.append(modules.setdefault(part.modules.get(name, ""), [0, 0, 0]))
            for counts in groups:
                counts[0] += 1
                counts[1] += flops
                counts[2] += 0 if whole or name in away or _inside(operation) else flops
    return Share(
        subject.chip,
        tuple(Part(name, *counts) for name, counts in sorted(operators.items())),
        tuple(Part(name, *counts) for name, counts in modules.items()),
        dict(sorted(rules.items())),
    )


def share_table(share: Share) -> Table:
    """As a table of the report: a row for each PyTorch module, or for each type of operation where modules are not known."""
    chip = f"the {share.chip}'s Neural Engine" if share.chip else "the Neural Engine of every chip since the M1 and the A13"
    lead = (
        f"{100 * share.share:.1f} % of the floating-point operations of products are in operations that likely run on {chip}: no rule of "
        "`isthmus lint` speaks against it. Likely, and never certain: Core ML decides on the device."
    )
    rules = ", ".join(f"{rule} ({places})" for rule, places in share.rules.items())
    parts = share.modules or share.operators
    return Table(
        name="neural-engine",
        title="Likely on the Neural Engine",
        lead=f"{lead} Rules that speak against it, with the number of places: {rules}." if rules else lead,
        columns=(
            Column(name="PyTorch module" if share.modules else "Operation", kind="code"),
            Column(name="Products", kind="count"),
            Column(name="FLOPs", kind="count"),
            Column(name="Of them likely on the engine", kind="count"),
            Column(name="Share", kind="share"),
        ),
        rows=tuple((p.name, p.products, p.flops, p.likely, p.likely / p.flops if p.flops else None) for p in parts),
    )


def _away(part: ProgramSubject, rules: Counter[str]) -> tuple[set[str], bool]:
    """The names of the results that leave the engine, and whether the whole function does; counts the places of each rule."""
    names = {variable.name for operation in part.operations() for variable in operation.outputs}
    away: set[str] = set()
    whole = False
    for rule in rules_for(["coreml"], "mil"):
        if rule.effect != LEAVES:
            continue
        found = [match.name for match in rule.check(part)]
        rules.update({rule.id: len(found)} if found else {})
        away.update(found)
        whole = whole or not names.issuperset(found)
    return away, whole


def _inside(operation: Operation) -> bool:
    """Whether an operation is in a loop or branch, which does not run on the engine."""
    return getattr(operation.enclosing_block, "outer_op", None) is not None


def _conv(operation: Operation) -> int:
    per_output = math.prod(shape(operation.weight)[1:])  # channels of a group, and the kernel
    return 2 * math.prod(shape(operation.outputs[0])) * per_output


def _conv_transpose(operation: Operation) -> int:
    return 2 * math.prod(shape(operation.x)) * math.prod(shape(operation.weight)[1:])


def _linear(operation: Operation) -> int:
    return 2 * math.prod(shape(operation.outputs[0])) * shape(operation.x)[-1]


def _matmul(operation: Operation) -> int:
    transposed = operation.transpose_x is not None and bool(operation.transpose_x.val)
    sizes = shape(operation.x)
    return 2 * math.prod(shape(operation.outputs[0])) * sizes[-2 if transposed and len(sizes) > 1 else -1]


def _einsum(operation: Operation) -> int:
    letters: dict[str, int] = {}
    given = str(operation.equation.val).replace(" ", "").partition("->")[0].split(",")
    for part, value in zip(given, operation.values, strict=True):
        for letter, size in zip(part, shape(value), strict=True):
            letters[letter] = max(size, letters.get(letter, 1))
    return 2 * math.prod(letters.values())


def _attention(operation: Operation) -> int:
    query, key, value = (shape(v) for v in (operation.query, operation.key, operation.value))
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


_FLOPS = {
    "conv": _conv, "conv_transpose": _conv_transpose, "linear": _linear, "matmul": _matmul, "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
}  # fmt: skip
