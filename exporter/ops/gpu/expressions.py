"""Integer expressions as text, which Python, C++ and symbolic shapes evaluate alike.

A launch is described once, and several hosts compute its sizes: Python with ints, generated C++ with std::int64_t, and TensorRT's quick
plugins with symbolic integers. Grammar: names, integers, ``+ - * // %``, comparisons, ``and``, ``or``, and the functions ``cdiv(a, b)``
(rounds up), ``min(a, b)`` and ``max(a, b)``. Values are at least 0, so that ``//`` is C++'s ``/``.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ...errors import IsthmusError

FUNCTIONS: Mapping[str, Callable[[Any, Any], Any]] = {"cdiv": lambda a, b: (a + b - 1) // b, "min": min, "max": max}
"""The functions of the grammar, for ints. Symbolic integers need their own `min` and `max`."""

_ARITHMETIC: Mapping[type[ast.operator], tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.FloorDiv: ("/", operator.floordiv),
    ast.Mod: ("%", operator.mod),
}
_COMPARISON: Mapping[type[ast.cmpop], tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
    ast.Eq: ("==", operator.eq),
    ast.NotEq: ("!=", operator.ne),
}
_CPP_FUNCTIONS = {"cdiv": "cdiv", "min": "std::min<std::int64_t>", "max": "std::max<std::int64_t>"}


def evaluate(text: str, values: Mapping[str, Any], functions: Mapping[str, Callable[[Any, Any], Any]] = FUNCTIONS) -> Any:
    """The value of an expression.

    Args:
        text: The expression.
        values: The value of every name: ints, or whatever has the operators.
        functions: `cdiv`, `min` and `max` for such values.

    Raises:
        IsthmusError: The text is not of the grammar, or a name has no value.
    """

    def visit(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                if name not in values:
                    raise IsthmusError(f"{name!r} in {text!r} has no value; known are {', '.join(sorted(values))}")
                return values[name]
            case ast.BinOp(left=left, op=op, right=right):
                return _ARITHMETIC[type(op)][1](visit(left), visit(right))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return _COMPARISON[type(op)][1](visit(left), visit(right))
            case ast.BoolOp(op=op, values=parts):
                return (all if isinstance(op, ast.And) else any)(visit(part) for part in parts)
            case ast.Call(func=ast.Name(id=name), args=[a, b]):
                return functions[name](visit(a), visit(b))
        raise AssertionError(ast.dump(node))  # parse lets nothing else through

    return visit(parse(text))


def names(text: str) -> frozenset[str]:
    """The names whose values an expression needs."""
    tree = parse(text)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called)


def cpp(text: str, rename: Mapping[str, str] | None = None) -> str:
    """The expression in C++, over variables of type std::int64_t and a function `cdiv(std::int64_t, std::int64_t)`.

    Args:
        text: The expression.
        rename: The C++ expression that stands for a name; a name that is not there stands for itself.
    """

    def visit(node: ast.expr) -> str:
        match node:
            case ast.Constant(value=int(value)):
                return str(int(value))
            case ast.Name(id=name):
                return (rename or {}).get(name, name)
            case ast.BinOp(left=left, op=op, right=right):
                return f"({visit(left)} {_ARITHMETIC[type(op)][0]} {visit(right)})"
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return f"({visit(left)} {_COMPARISON[type(op)][0]} {visit(right)})"
            case ast.BoolOp(op=op, values=parts):
                return f"({(' && ' if isinstance(op, ast.And) else ' || ').join(map(visit, parts))})"
            case ast.Call(func=ast.Name(id=name), args=[a, b]):
                return f"{_CPP_FUNCTIONS[name]}({visit(a)}, {visit(b)})"
        raise AssertionError(ast.dump(node))  # parse lets nothing else through

    return visit(parse(text))


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> ast.expr:
    """The syntax tree of an expression, which holds nothing but the grammar's nodes.

    Raises:
        IsthmusError: The text is not of the grammar.
    """
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise IsthmusError(f"{text!r} is not an expression: {error.msg}") from error
    for what in _faults(tree):
        raise IsthmusError(f"{text!r} is not an expression of a launch: {what}", hint="see exporter/ops/gpu/expressions.py for the grammar")
    return tree


def _faults(node: ast.expr) -> Iterator[str]:
    match node:
        case ast.Constant(value=int()) | ast.Name():
            return
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            yield from (*_faults(left), *_faults(right))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISON:
            yield from (*_faults(left), *_faults(right))
        case ast.BoolOp(values=parts):
            for part in parts:
                yield from _faults(part)
        case ast.Call(func=ast.Name(id=name), args=[a, b], keywords=[]) if name in FUNCTIONS:
            yield from (*_faults(a), *_faults(b))
        case _:
            yield f"{ast.unparse(node)} is not allowed"
