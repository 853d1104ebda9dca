"""A model of a later opset, when none of its operators means something else there.

torch.onnx.export writes at most opset 25 (see `exporter.onnx`), and the standard's LinearAttention and CausalConvWithState begin with 27.
onnx.version_converter works on a protobuf with all weights and loses what the passes know of a node; between these opsets nothing has to be
rewritten, only checked.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir
from onnx.defs import OpSchema

from ..errors import Reason, UnsupportedError
from ._rewrite import attribute_int
from .scope import module_of

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_WITHOUT_ZERO_SIGN = (ir.DataType.FLOAT8E4M3FNUZ, ir.DataType.FLOAT8E5M2FNUZ)


def _saturates_fnuz(node: ir.Node) -> bool:
    to = attribute_int(node, "to", 0)
    return attribute_int(node, "saturate", 1) != 0 and (to is None or ir.DataType(to) in _WITHOUT_ZERO_SIGN)


# Operators whose text in the standard changed in meaning (onnx 1.23.2, opsets 20 to 27): the opset of the change, what it was, and whether
# it concerns the node. All other new versions add types, optional inputs or attributes whose default is the old meaning.
_CHANGED: dict[str, tuple[int, str, Callable[[ir.Node], bool]]] = {
    "GroupNormalization": (21, "scale and bias are for each channel, and were for each group", lambda _: True),
    "AveragePool": (22, "ceil_mode leaves out windows that begin in the padding", lambda n: attribute_int(n, "ceil_mode", 0) != 0),
    "MaxPool": (22, "ceil_mode leaves out windows that begin in the padding", lambda n: attribute_int(n, "ceil_mode", 0) != 0),
    "Cast": (24, "infinities saturate in float8 of the FNUZ kinds, and became NaN", _saturates_fnuz),
    "Range": (27, "float16 sums are made in float32", lambda n: n.outputs[0].dtype in (None, *_HALF)),
}


class ConvertOpset(ir.passes.InPlacePass):
    """Declares a later opset, after a look at every operator's schemas in both.

    Given, of opset 23::

        f (float[2, 3] x) => (float[2, 3] y) {
            y = Softplus (x)
        }

    Result: the same nodes, of opset 27.

    Args:
        opset: The opset to convert to; a model of that opset or a later one is left as it is.

    Raises:
        UnsupportedError: Operators that the later opset lacks, or in which they mean something else, all of them.
    """

    def __init__(self, opset: int) -> None:
        super().__init__()
        self._opset = opset

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        before = model.opset_imports.get("", 0)
        if before >= self._opset:
            return ir.passes.PassResult(model, modified=False)
        if reasons := unconvertible(model, self._opset):
            raise UnsupportedError(f"this model of opset {before} cannot be declared to be of opset {self._opset}", reasons=reasons)
        model.opset_imports[""] = self._opset
        return ir.passes.PassResult(model, modified=True)


def unconvertible(model: ir.Model, opset: int) -> list[Reason]:
    """Every node of the default domain that keeps the model from being declared to be of a later opset."""
    before = model.opset_imports.get("", 0)
    nodes = [n for n in ir.traversal.RecursiveGraphIterator(model.graph) if n.domain == ""]
    return [reason for n in nodes if before < opset and (reason := _reason(n, before, opset)) is not None]


def _reason(node: ir.Node, before: int, after: int) -> Reason | None:
    where = module_of(node)
    if node.op_type in _CHANGED:
        opset, what, concerns = _CHANGED[node.op_type]
        if before < opset <= after and concerns(node):
            return Reason(f"{node.op_type}: since opset {opset} {what}", where)
    try:
        old, new = (onnx.defs.get_schema(node.op_type, opset, "") for opset in (before, after))
    except onnx.defs.SchemaError:
        return Reason(f"{node.op_type} is not an operator of both opsets", where)
    if new.deprecated and not old.deprecated:
        return Reason(f"{node.op_type} is deprecated in opset {after}", where)
    if new.since_version != old.since_version and not _extends(old, new):
        return Reason(f"{node.op_type} has another signature since opset {new.since_version}", where)
    return None


def _extends(old: OpSchema, new: OpSchema) -> bool:
    """Whether the new schema only adds to the old one."""
    optional = OpSchema.FormalParameterOption.Optional
    for before, after in ((old.inputs, new.inputs), (old.outputs, new.outputs)):
        if len(after) < len(before) or any(p.option != optional for p in list(after)[len(before) :]):
            return False
        if any(a.option != b.option or not set(a.types) <= set(b.types) for a, b in zip(before, after, strict=False)):
            return False
    for name, attribute in old.attributes.items():
        other = new.attributes.get(name)
        if other is None or other.type != attribute.type or str(other.default_value) != str(attribute.default_value):
            return False
        if other.required and not attribute.required:
            return False
    return not any(a.required for name, a in new.attributes.items() if name not in old.attributes)
