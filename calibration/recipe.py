"""A recipe: which modules compute in a low precision, as a small YAML file that `isthmus tune` writes and `isthmus export --recipe` reads.

Given, as people write it or `tune` found it::

    schema: 1
    fp8: ['blocks.*']
    fp16: ['=blocks.0.attn', 'blocks.7.mlp']
    calibration_method: mse
    weight_rounding: gptq
    smooth: null

An export with it is one with `--precision fp8 --fp8-include 'blocks.*' --fp8-exclude '=blocks.0.attn,blocks.7.mlp'
--calibration-method mse --weight-rounding gptq`. Modules that no pattern matches are left to the target's default.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..exporter.errors import IsthmusError, Reason, UnknownNameError, UsageError
from ..exporter.options import load_yaml
from ..exporter.patterns import matches
from ..exporter.target import TARGETS
from .calibrator import CALIBRATORS

SCHEMA = 1
"""Version of the layout."""

REST: Mapping[str, str] = {"fp8": "fp16", "int8": "fp32"}
"""The low precisions of recipes, and what computes beside each."""

MAX_BYTES = 2**20
"""Of a recipe's file."""

MAX_PATTERNS = 10_000
"""In each list."""

_MAX_PATTERN = 1024
_OPTIONS = ("calibration_method", "weight_rounding", "smooth")
_ROUNDINGS = ("nearest", "gptq")


@dataclass(frozen=True)
class Recipe:
    """Module patterns to precisions, and how ranges and weights are chosen.

    Attributes:
        precision: The low precision, a key of `REST`.
        low: Patterns of the modules that compute in it; see `exporter.patterns`.
        rest: Patterns of those that do not; they win.
        calibration_method: A name of `isthmus list calibrators`; None to leave it to the export.
        weight_rounding: `nearest` or `gptq`; None to leave it to the export.
        smooth: SmoothQuant's alpha, 0 to 1; None to leave it to the export.
    """

    precision: str
    low: tuple[str, ...]
    rest: tuple[str, ...] = ()
    calibration_method: str | None = None
    weight_rounding: str | None = None
    smooth: float | None = None

    def text(self, *, notes: Sequence[str] = ()) -> str:
        """The file's text, a function of the recipe and of the sentences that go before it as comments."""
        value = {
            "schema": SCHEMA,
            self.precision: list(self.low),
            REST[self.precision]: list(self.rest),
            **{name: getattr(self, name) for name in _OPTIONS},
        }
        comments = "".join(f"# {note}\n" for note in notes)
        return comments + yaml.safe_dump(value, sort_keys=False, width=140)

    def sha256(self) -> str:
        """Of what the recipe says: comments and the order of keys have no say in it."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def arguments(self, given: Mapping[str, Any], *, takes: Collection[str]) -> tuple[dict[str, Any], list[Reason]]:
        """The arguments of an export with this recipe, and every contradiction between the recipe and what else was asked for.

        Args:
            given: `precision`, `calibration_method`, `weight_rounding`, `smooth`, and the target's options by their field names; None and a
                missing one are not asked for, and what the recipe says too is no contradiction.
            takes: The names of the target's options.

        Returns:
            The arguments that the recipe sets, patterns as tuples of texts; and the reasons.
        """
        include, exclude = f"{self.precision}_include", f"{self.precision}_exclude"
        if include not in takes:
            return {}, [Reason(f"the recipe is for {self.precision}, and the target cannot be told which modules compute in it")]
        wanted: dict[str, Any] = {"precision": self.precision, include: self.low, exclude: self.rest}
        wanted |= {name: value for name in _OPTIONS if (value := getattr(self, name)) is not None}
        reasons = []
        for name, value in wanted.items():
            asked = given.get(name)
            if name in (include, exclude) and asked is not None:
                asked = tuple(part.strip() for part in asked.split(",")) if isinstance(asked, str) else tuple(asked)
            if asked is not None and asked != value:
                option = f"--{name.replace('_', '-')}"
                reasons.append(Reason(f"{option} is {_shown(asked)}, and the recipe says {_shown(value)}", fix=f"leave {option} out"))
        return wanted, reasons


def with_recipe(given: Mapping[str, Any], problems: list[IsthmusError]) -> dict[str, Any]:
    """The values of a command line's options with what the file of its option `recipe` says, as texts where options are texts.

    Args:
        given: Values by option. Where `target` is not a known one, that is for others to say, and nothing is added.
        problems: Gets what is wrong with the recipe, and every contradiction.
    """
    if given.get("recipe") is None:
        return dict(given)
    try:
        recipe = read_recipe(given["recipe"])
    except UsageError as error:
        problems.append(error)
        return {**given, "recipe": None}
    if given["target"] not in TARGETS:
        return {**given, "recipe": recipe}
    said, reasons = recipe.arguments(given, takes=TARGETS[given["target"]].Options.model_fields)
    problems += [UsageError(f"--recipe: {reason.what}", hint=reason.fix) for reason in reasons]
    if reasons:
        return {**given, "recipe": recipe}
    texts = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in said.items()}
    return {**given, **{name: value for name, value in texts.items() if value != ""}, "recipe": recipe}


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe's file.

    Raises:
        UsageError: It cannot be read, or is no recipe of this schema; all faults are listed.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"the recipe {path} is larger than {MAX_BYTES} bytes and was not read")
        value = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the recipe {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"the recipe {path}: {error}") from error
    recipe, reasons = _checked(value)
    if reasons or recipe is None:
        raise UsageError(f"{path} is no recipe", reasons=reasons, hint="docs/tune.md says what is in one; `isthmus tune` writes them")
    return recipe


def _checked(value: Any) -> tuple[Recipe | None, list[Reason]]:
    if not isinstance(value, dict):
        return None, [Reason(f"got a {type(value).__name__}, expected keys and values such as `fp8: ['blocks.*']`")]
    reasons = []
    if value.get("schema") != SCHEMA or isinstance(value.get("schema"), bool):
        reasons.append(Reason(f"got {value.get('schema')!r}, expected {SCHEMA}", where="schema"))
    known = {"schema", *REST, *REST.values(), *_OPTIONS}
    for key in value:
        if key not in known:
            unknown = UnknownNameError("key", str(key), sorted(known))
            reasons.append(Reason(unknown.message, fix=unknown.hint))
    low = [name for name in REST if name in value]
    if len(low) != 1:
        reasons.append(Reason(f"got patterns for {' and '.join(low) or 'no low precision'}, expected one of {' or '.join(REST)}"))
    precision = low[0] if low else next(iter(REST))
    for other in (name for name in REST.values() if name in value and name != REST[precision]):
        reasons.append(Reason(f"beside {precision}, modules compute in {REST[precision]}", where=other, fix=f"write {REST[precision]}"))
    keys = (precision, REST[precision])
    given = [key for key in (*REST, *REST.values()) if key in value]
    lists = {key: _patterns(key, value.get(key), reasons) for key in dict.fromkeys((*keys, *given))}
    if precision in value and not lists[precision] and not reasons:
        reasons.append(Reason("got no pattern, expected at least one", where=precision))
    for pattern in sorted(set(lists[precision]) & set(lists[REST[precision]])):
        reasons.append(Reason(f"the pattern {pattern!r} is for {precision} and for {REST[precision]}", fix="name it once"))
    method, rounding, smooth = (value.get(name) for name in _OPTIONS)
    if method is not None and (not isinstance(method, str) or method not in CALIBRATORS):
        unknown = UnknownNameError("method", str(method), sorted(CALIBRATORS))
        what = f"got {method!r}, expected a name of `isthmus list calibrators`"
        reasons.append(Reason(what, where="calibration_method", fix=unknown.hint))
    if rounding is not None and rounding not in _ROUNDINGS:
        reasons.append(Reason(f"got {rounding!r}, expected {' or '.join(_ROUNDINGS)}", where="weight_rounding"))
    number = isinstance(smooth, int | float) and not isinstance(smooth, bool) and math.isfinite(smooth)
    if smooth is not None and not (number and 0 <= smooth <= 1):
        reasons.append(Reason(f"got {smooth!r}, expected a number from 0 to 1", where="smooth"))
    if reasons:
        return None, reasons
    alpha = float(smooth) if smooth is not None else None
    return Recipe(precision, lists[precision], lists[REST[precision]], method, rounding, alpha), []


def _patterns(key: str, value: Any, reasons: list[Reason]) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        reasons.append(Reason(f"got a {type(value).__name__}, expected a list of patterns", where=key, fix=f"{key}: ['blocks.*']"))
        return ()
    if len(value) > MAX_PATTERNS:
        reasons.append(Reason(f"got {len(value)} patterns, expected at most {MAX_PATTERNS}", where=key))
        return ()
    for item in value:
        # An option of the command line splits its value at commas, and strips what it gets.
        if not isinstance(item, str) or not item or len(item) > _MAX_PATTERN or "," in item or item != item.strip():
            expected = f"a pattern of module paths, 1 to {_MAX_PATTERN} characters without commas and spaces at its ends"
            reasons.append(Reason(f"got {_shown(item)}, expected {expected}", where=key))
    return tuple(item for item in value if isinstance(item, str))


def patterns_of(chosen: Sequence[str], others: Collection[str]) -> tuple[str, ...]:
    """Few patterns that match all modules of `chosen` and none of `others`, in the order of `chosen`.

    Tried are, for every module that none matches yet, from the widest to the module alone: paths above it with every number as `*`, as they
    are, and the module's own path as a whole.
    """
    found: list[str] = []
    for module in chosen:
        if matches(module, found):
            continue
        parts = module.split(".")
        paths = [".".join(parts[: i + 1]) for i in range(len(parts)) if module]
        wide = [re.sub(r"(?<![^.])\d+(?![^.])", "*", path) for path in paths]
        tried = ["*", *wide, *paths, *(f"={path}" for path in (*wide[-1:], module))]
        found.append(next(p for p in tried if not any(matches(other, [p]) for other in others) and matches(module, [p])))
    return tuple(found)


def _shown(value: Any) -> str:
    text = ",".join(value) if isinstance(value, tuple) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
