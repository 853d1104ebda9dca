"""Values for the settings of a registered thing, checked against the annotations in its source.

`--set key=value` is checked before anything heavy is imported, so the types are known only as they are written in the source. They are
read as syntax, never evaluated: `int`, `float`, `bool`, `str`, `None`, `Literal[...]`, `X | Y`, `tuple[X, ...]` and `tuple[X, Y]`.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from .errors import Reason, UnknownNameError
from .registry import Entry

MAX_TEXT = 64 * 1024
"""Longest text of one value, in characters."""


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases and without repeated keys: an alias can unfold to any size, and a repeated key hides a value."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Composes one node; an alias is an error."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not read", self.peek_event().start_mark)  # type: ignore[no-untyped-call]  # untyped
        node: yaml.Node | None = super().compose_node(parent, index)
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if repeated := sorted({key for key in keys if keys.count(key) > 1}):
                raise yaml.constructor.ConstructorError(None, None, f"the key {repeated[0]!r} is there twice", node.start_mark)
        return node


def load_yaml(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        ValueError: It is not YAML, holds an alias or a repeated key, or is nested too deep.
    """
    try:
        return yaml.load(text, Loader=PlainLoader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{error.problem or 'not YAML'}{where}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"not YAML: {error}") from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def coerce(annotation: str, value: Any) -> Any:
    """Checks a value against an annotation, and gives it in the annotated type.

    A text is read as YAML where the annotation asks for something else than a text, so that `"1e-5"` is a float and `"8,8"` a tuple.

    Args:
        annotation: A type as written in the source.
        value: A plain value (from YAML or Python), or its text.

    Raises:
        ValueError: The value is not of that type; says what was got and expected.
    """
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise ValueError(f"got a text of {len(value)} characters, expected at most {MAX_TEXT}")
    try:
        return _coerce(ast.parse(annotation, mode="eval").body, value)
    except _MismatchError:
        raise ValueError(f"got {_shown(value)}, expected {annotation}") from None
    except SyntaxError as error:
        raise ValueError(f"its type {annotation!r} cannot be read") from error


def check_settings(entry: Entry, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[Reason]]:
    """Checks settings against an entry's options.

    Args:
        entry: What they are for.
        settings: Values or their texts, by option.

    Returns:
        The values in their types, and a reason for each setting that cannot be used.
    """
    values: dict[str, Any] = {}
    problems: list[Reason] = []
    for key, value in settings.items():
        option = entry.options.get(key)
        if option is None:
            unknown = UnknownNameError(f"setting of {entry.name}", key, list(entry.options))
            problems.append(Reason(unknown.message, where="--set", fix=unknown.hint))
            continue
        try:
            values[key] = coerce(option.annotation, value)
        except ValueError as error:
            problems.append(Reason(str(error), where=f"--set {key}", fix=f"the default is {key}={option.default!r}"))
    return values, problems


class _MismatchError(Exception):
    pass


def _coerce(node: ast.expr, value: Any) -> Any:
    match node:
        case ast.BinOp(op=ast.BitOr()):
            return _first([*_alternatives(node)], value)
        case ast.Constant(value=None) | ast.Name(id="None"):
            return _scalar(value, lambda v: v is None)
        case ast.Name(id="bool"):
            return _scalar(value, lambda v: isinstance(v, bool))
        case ast.Name(id="int"):
            return _scalar(value, lambda v: isinstance(v, int) and not isinstance(v, bool))
        case ast.Name(id="float"):
            return _float(value)
        case ast.Name(id="str"):
            if not isinstance(value, str):
                raise _MismatchError
            return value
        case ast.Subscript(value=ast.Name(id="Literal"), slice=arguments):
            return _literal(arguments, value)
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[element, ast.Constant(value=ellipsis)])) if ellipsis is ...:
            return tuple(_coerce(element, item) for item in _items(value))
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=elements)):
            items = _items(value)
            if len(items) != len(elements):
                raise _MismatchError
            return tuple(_coerce(element, item) for element, item in zip(elements, items, strict=True))
        case _:
            raise _MismatchError


def _alternatives(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp):
        return [*_alternatives(node.left), *_alternatives(node.right)]
    return [node]


def _first(nodes: list[ast.expr], value: Any) -> Any:
    # Every text is a str, so that str comes last: `int | str` reads "8" as 8.
    for node in sorted(nodes, key=lambda n: isinstance(n, ast.Name) and n.id == "str"):
        try:
            return _coerce(node, value)
        except _MismatchError:
            continue
    raise _MismatchError


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return load_yaml(value)
    except ValueError:
        return value


def _scalar(value: Any, is_right: Callable[[Any], bool]) -> Any:
    parsed = _parsed(value)
    if not is_right(parsed):
        raise _MismatchError
    return parsed


def _float(value: Any) -> float:
    parsed = _parsed(value)
    if isinstance(parsed, bool) or not isinstance(parsed, int | float | str):
        raise _MismatchError
    try:
        number = float(parsed)  # YAML 1.1 takes 1e-5, without a point, for a text
    except (ValueError, OverflowError):
        raise _MismatchError from None
    if not math.isfinite(number):
        raise _MismatchError
    return number


def _literal(arguments: ast.expr, value: Any) -> Any:
    allowed = [ast.literal_eval(a) for a in (arguments.elts if isinstance(arguments, ast.Tuple) else [arguments])]
    for candidate in (value, _parsed(value)):
        for constant in allowed:
            if type(candidate) is type(constant) and candidate == constant:
                return constant
    raise _MismatchError


def _items(value: Any) -> list[Any]:
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("(") and text.endswith(")"):  # as Python writes a tuple
            text = text[1:-1]
        parsed = _parsed(text)
        value = parsed if isinstance(parsed, list) else _parsed(f"[{text}]")
    if not isinstance(value, list | tuple):
        raise _MismatchError
    return list(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
