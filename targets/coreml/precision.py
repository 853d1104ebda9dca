"""Which operations of an ML Program compute in float16, and which stay in float32 off the Neural Engine because float16 would turn them.

In float32 stay, at the precision float16,

- sines and cosines, and what becomes their angle element by element;
- decisions on floats (a rounding, a comparison, an argmin), and what becomes their operand element by element;
- the product that an argmin, argmax or top-k chooses from, such as the distances to a codebook, and what becomes its operand;
- floats computed element by element from integers and booleans alone, such as what codes stand for.

The lowerings of our own operators are written for float16, comparisons and all, and are left out of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...exporter.op import DOMAIN
from .modules import module_of


def compute_precision(precision: str, wide: frozenset[str], modules: tuple[str, ...]) -> Any:
    """The compute precision for coremltools: which operations are float16."""
    import coremltools as ct

    from ...exporter.ops.mil import float16_around

    if precision == "fp32":
        return ct.precision.FLOAT32
    scans = float16_around().op_selector if precision == "fp16-wide-scans" else lambda operation: True  # noqa: ARG005 - coremltools gives the operation
    angles, choices, decisions = _Leads(_turns, _ELEMENTWISE), _Leads(_picks, _EXACT), _Leads(_decides, _EXACT)
    products = _Leads(lambda operation: operation.op_type in _PRODUCTS and choices(operation, beyond=True), _EXACT)

    def half(operation: Any) -> bool:
        if any(leads(operation) for leads in (angles, decisions, products)) or _is_of_decisions(operation):
            return False
        return scans(operation) and not (wide and module_of(operation, modules) in wide)

    return ct.transform.FP16ComputePrecision(op_selector=half)


_ELEMENTWISE = frozenset(
    "add cast concat exp expand_dims identity mul pow real_div reshape slice_by_index split sqrt squeeze stack sub transpose".split()
)
_EXACT = _ELEMENTWISE | frozenset(
    """abs clip gather gather_along_axis maximum minimum reduce_mean reduce_sum relu
     select sigmoid sign square tanh tile""".split()
)
_PRODUCTS = frozenset({"matmul", "linear"})
_PICKS = frozenset({"reduce_argmin", "reduce_argmax", "topk", "argsort"})
_DECISIONS = _PICKS | frozenset("ceil equal floor floor_div greater greater_equal less less_equal mod not_equal round".split())
_OF_DECISIONS = frozenset(
    """add cast concat expand_dims floor floor_div mod mul real_div reduce_sum
    reshape slice_by_index split squeeze stack sub tile transpose""".split()
)


def _is_ours(operation: Any) -> bool:
    """Whether the lowering of an operator of ours made an operation; see `exporter.ops.mil.register_lowering`."""
    return bool(operation.name.startswith(f"{DOMAIN}_"))


def _turns(operation: Any) -> bool:
    """The angle of a timestep goes up to 1000, and float16's steps are half a radian there. These few numbers stay in float32, off the
    Neural Engine.
    """
    return operation.op_type in ("sin", "cos")


def _picks(operation: Any) -> bool:
    return operation.op_type in _PICKS


def _decides(operation: Any) -> bool:
    """A rounding, comparison or choice of floats: float16's steps would turn it where two numbers are near each other."""
    from coremltools.converters.mil.mil import types

    if _is_ours(operation):
        return False
    if operation.op_type == "cast":
        return types.is_float(operation.x.dtype) and not types.is_float(operation.outputs[0].dtype)
    return operation.op_type in _DECISIONS and any(types.is_float(v.dtype) for v in _operands(operation))


def _operands(operation: Any) -> list[Any]:
    values = [
        v for given in operation.inputs.values() if given is not None for v in (given if isinstance(given, list | tuple) else [given])
    ]
    return [v for v in values if hasattr(v, "dtype")]


def _is_of_decisions(operation: Any) -> bool:
    """Whether an operation computes floats from integers and booleans alone, element by element, such as the numbers that codes stand for:
    they stay exact, where the float16 nearest to 1/3 is 8e-5 off.
    """
    from coremltools.converters.mil.mil import types

    if _is_ours(operation):
        return False
    waiting, seen = [operation], {operation}
    while waiting:
        at = waiting.pop()
        if at.op_type == "cast" and not types.is_float(at.x.dtype):
            continue
        varying = [v for v in _operands(at) if (v.val is None and v.op is None) or (v.op is not None and v.op.op_type != "const")]
        if at.op_type not in _OF_DECISIONS or not varying or any(v.op is None for v in varying):
            return False
        for value in varying:
            if value.op not in seen:
                seen.add(value.op)
                waiting.append(value.op)
    return True


class _Leads:
    """Whether an operation is one that `ends` names, or what becomes its operand through operations in `through`."""

    def __init__(self, ends: Callable[[Any], bool], through: frozenset[str]) -> None:
        self._ends = ends
        self._through = through
        self._known: dict[Any, bool] = {}

    def __call__(self, operation: Any, *, beyond: bool = False) -> bool:
        """The answer for an operation; with `beyond`, whether it is one of those that read its results."""
        if beyond:
            return any(self(child) for child in _readers(operation))
        waiting = [operation]
        while waiting:
            at = waiting[-1]
            if at in self._known:
                waiting.pop()
                continue
            children = _readers(at) if at.op_type in self._through else []
            later = [child for child in children if child not in self._known]
            if later:
                waiting += later
            else:
                self._known[at] = self._ends(at) or any(self._known[child] for child in children)
                waiting.pop()
        return self._known[operation]


def _readers(operation: Any) -> list[Any]:
    return [child for variable in operation.outputs for child in variable.child_ops]
