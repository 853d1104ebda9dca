"""Names and texts of a manifest as Swift has them. Whatever a text holds, what comes out of here is one name or one literal."""

from __future__ import annotations

import re
from collections.abc import Iterable

# The Swift Programming Language, "Keywords and Punctuation"; all of them, though some are only reserved in places.
_KEYWORDS = frozenset(
    """
    Any Protocol Self Type actor any as associatedtype associativity async await borrowing break case catch class consuming continue
    convenience default defer deinit didSet do dynamic else enum extension fallthrough false fileprivate final for func get guard if
    import in indirect infix init inout internal is isolated lazy left let macro mutating nil none nonisolated nonmutating open
    operator optional override package postfix precedence precedencegroup prefix private protocol public repeat required rethrows
    return right self sending set some static struct subscript super switch throw throws true try typealias unowned var weak where
    while willSet
    """.split()
)
_TAKEN = frozenset({"named", "values", "tensor", "description", "hash", "hashValue"})
"""What the generated types have of their own."""

_MODULES = frozenset(
    """
    Accuracy CompiledPackage Conditions CoreML Dispatch Description Feature Foundation Function Golden Inputs Loaded Model ModelError
    NullRow ObjectiveC Outputs PackageDescription Picture Sampler SamplerCall ScalarType SeededNoise Size State Swift Tensor Tolerance Tool
    Value XCTest
    """.split()
)
"""Modules of the system, and the types in the package: a module that is called as a type in it hides that type."""


def literal(text: str) -> str:
    """A Swift string literal of printable ASCII characters.

    Every other character, and what a literal gives a meaning to, is written as its number: the literal ends where this function ends it.
    """
    plain = "".join(c if " " <= c <= "~" and c not in '"\\' else f"\\u{{{_scalar(c):x}}}" for c in text)
    return f'"{plain}"'


def shown(text: str) -> str:
    """A text for a comment or a page: printable ASCII without what Markdown, HTML or Swift give a meaning to; the rest as `?`."""
    return "".join(c if " " <= c <= "~" and c not in "`|<>\\*/" else "?" for c in text)


def module_name(model: str) -> str:
    """The module of a model: `dit-digits` becomes `DitDigits`."""
    name = "".join(part[:1].upper() + part[1:] for part in _parts(model))[:48] or "ExportedModel"
    if not name[0].isalpha():
        name = f"Model{name}"
    return f"{name}Package" if name in _MODULES | _KEYWORDS else name


def tool_name(model: str) -> str:
    """The command line program of a model: `dit-digits-tool`."""
    return "-".join([*(part.lower() for part in _parts(model)), "tool"])[-48:].lstrip("-")


def identifiers(names: Iterable[str]) -> list[str]:
    """A property's name for each text, no two alike: `hidden_states` becomes `hiddenStates`."""
    found: list[str] = []
    for name in names:
        head, *tail = _parts(name) or ["value"]
        stem = head[:1].lower() + head[1:] + "".join(part[:1].upper() + part[1:] for part in tail)
        stem = stem[:48]
        if not stem[0].isalpha():
            stem = f"value{stem}"
        if stem in _KEYWORDS | _TAKEN:
            stem += "_"
        candidate, number = stem, 2
        while candidate in found:
            candidate, number = f"{stem}_{number}", number + 1
        found.append(candidate)
    return found


def _parts(text: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9]+", text)


def _scalar(character: str) -> int:
    # A lone surrogate is no Unicode scalar, and Swift refuses it in a literal.
    return 0xFFFD if 0xD800 <= ord(character) <= 0xDFFF else ord(character)
