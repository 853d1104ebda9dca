"""Hand-written GELU, exact and by tanh, as Gelu (opset 20)."""

from __future__ import annotations

import math

import onnx_ir as ir

from ._match import call_it, is_float32, is_scalar, operands
from ._rewrite import new_node, producer, replace_node, scalar, scopes

_ULP = 2.0**-22


class FuseGelu(ir.passes.InPlacePass):
    """Replaces `0.5 x (1 + erf(x / sqrt(2)))` and `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))` by Gelu.

    Given::

        f (float[2, 8] x) => (float[2, 8] y) {
            half = Mul (x, c_half)             # 0.5
            scaled = Div (x, c_root)           # sqrt(2)
            erf = Erf (scaled)
            shifted = Add (erf, c_one)         # 1
            y = Mul (half, shifted)
        }

    Result::

        f (float[2, 8] x) => (float[2, 8] y) {
            y = Gelu <approximate: string = "none"> (x)
        }

    The factors may come in any order, and x^3 as a power or as products. The constants must be those of the formula to the last place of
    float32 (two for a product of several); x must be float32. `x sigmoid(1.702 x)` is another function and stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        modified = False
        for scope in scopes(model):
            if scope.opset >= 20:
                for node in scope.graph:
                    modified |= node.domain == "" and node.op_type in ("Mul", "Div") and _fuse(node)
        return ir.passes.PassResult(model, modified)


def _fuse(node: ir.Node) -> bool:
    number, factors = _factors(node.outputs[0])
    if len(factors) != 2 or number != 0.5:
        return False
    for x, shifted in (factors, factors[::-1]):
        inner = _one_plus(shifted)
        erf, tanh = producer(inner, "Erf"), producer(inner, "Tanh")
        if erf is not None and _close(_factors(erf.inputs[0]), math.sqrt(0.5), [x]):
            approximate = "none"
        elif tanh is not None and _is_tanh_argument(tanh.inputs[0], x):
            approximate = "tanh"
        else:
            continue
        if not is_float32(x):
            return False
        replace_node(node, call_it(new_node(node, "Gelu", [x], {"approximate": approximate}), "gelu"))
        return True
    return False


def _factors(value: ir.Value | None, depth: int = 4) -> tuple[float, list[ir.Value]]:
    """A product as its constant part and its other factors, through Mul, division by a constant and x^3."""
    if value is None:
        return 1.0, []
    number = scalar(value)
    if number is not None:
        return number, []
    node = producer(value, "Mul", "Div", "Pow") if depth else None
    if node is not None and node.inputs[0] is not None:
        first = node.inputs[0]
        if node.op_type == "Mul":
            (a, left), (b, right) = _factors(first, depth - 1), _factors(node.inputs[1], depth - 1)
            return a * b, left + right
        number = scalar(node.inputs[1])
        if node.op_type == "Div" and number:
            a, left = _factors(first, depth - 1)
            return a / number, left
        if node.op_type == "Pow" and number in (2.0, 3.0):
            return 1.0, [first] * int(number)
    return 1.0, [value]


def _close(product: tuple[float, list[ir.Value]], number: float, factors: list[ir.Value]) -> bool:
    found, rest = product
    return abs(found - number) <= _ULP * number and len(rest) == len(factors) and all(a is b for a, b in zip(rest, factors, strict=True))


def _one_plus(value: ir.Value | None) -> ir.Value | None:
    """The v of `v + 1`."""
    node = producer(value, "Add")
    return next((v for v, one in operands(node) if is_scalar(one, 1.0)), None) if node is not None else None


def _is_tanh_argument(value: ir.Value | None, x: ir.Value) -> bool:
    number, factors = _factors(value)
    if abs(number - math.sqrt(2 / math.pi)) > _ULP:
        return False
    if len(factors) == 1:  # x + 0.044715 x^3
        node = producer(factors[0], "Add")
        return node is not None and any(a is x and _close(_factors(b), 0.044715, [x] * 3) for a, b in operands(node))
    if len(factors) == 2:  # x (1 + 0.044715 x^2)
        return any(a is x and _close(_factors(_one_plus(b)), 0.044715, [x] * 2) for a, b in (factors, factors[::-1]))
    return False
