"""Loop and Scan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from ....exporter.lint import Match, register_rule
from ....exporter.passes._rewrite import attribute_ints, constant, dims, input_at, is_op, producer
from ....exporter.subject import Subject, evaluate

LONG = 64
"""Steps above which a loop of launches is no way to compute a sequence. Samplers take some ten to fifty."""


@register_rule(
    "TRT-408",
    summary="Loop without a condition",
    effect="refused",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="give the Loop a constant true condition",
    source="measured with TensorRT-RTX 1.7.1: no tensor of the empty name, where the body hands its condition on",
)
def loop_condition(subject: Subject) -> Iterator[Match]:
    """The condition is left out, and the body returns the one that it is given."""
    for node in subject.nodes("Loop"):
        body = node.attributes["body"].as_graph()
        if input_at(node, 1) is None and _handed_on(body):
            yield Match("a Loop without a condition whose body returns the condition that it is given", node)


def _handed_on(body: ir.Graph) -> bool:
    value = body.outputs[0]
    while (node := producer(value, "Identity")) is not None and node.inputs[0] is not None:
        value = node.inputs[0]
    return len(body.inputs) > 1 and value is body.inputs[1]


@register_rule(
    "TRT-409",
    summary="Loop or Scan of more than 64 steps",
    effect="wasteful",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="write the recurrence as an operator of ours (`isthmus list ops`), which has a plugin, or in chunks",
    source="measured with TensorRT-RTX 1.7.1: each step is a series of launches; "
    "https://github.com/microsoft/onnxruntime/issues/27796 is the same elsewhere",
)
def long_loop(subject: Subject) -> Iterator[Match]:
    """The number of steps at the largest sizes is known and above the bound."""
    for node in subject.nodes("Loop", "Scan"):
        steps = loop_steps(node, subject.sizes("max"))
        if steps is not None and steps > LONG:
            yield Match(f"{node.op_type} of {steps} steps, expected at most {LONG}", node)


def loop_steps(node: ir.Node, sizes: Mapping[str, int]) -> int | None:
    """The number of steps of a Loop or Scan, where it is known."""
    if is_op(node, "Loop"):
        trips = constant(input_at(node, 0))
        return int(trips.reshape(())) if trips is not None and trips.size == 1 else None
    count = node.attributes["num_scan_inputs"].as_int()
    axes = attribute_ints(node, "scan_input_axes") or [0] * count
    shape = dims(node.inputs[len(node.inputs) - count])
    return evaluate(shape[axes[0]], sizes) if shape is not None else None
