"""Faults of DiffuSSM."""

import numpy as np

from . import Graph, fault

M = "diffussm-tiny"


def scan(block: int, direction: str) -> str:
    return f"blocks.{block}.mixer.{direction}/selective_scan"


@fault("the scan's output is one step late", model=M, module="blocks.0.mixer.forwards")
def _(graph: Graph) -> None:
    pads = graph.constant(np.array([0, 1, 0, 0, -1, 0], np.int64), "late")
    graph.after(scan(0, "forwards"), "Pad", [pads])


@fault("the backward scan runs forwards", model=M, module="blocks.1.mixer.backwards")
def _(graph: Graph) -> None:
    graph.set(scan(1, "backwards"), reverse=0)


@fault("the state decays twice as fast", model=M, module="blocks.0.mixer.forwards")
def _(graph: Graph) -> None:
    graph.change_at(scan(0, "forwards"), 2, lambda A: 2 * A)


@fault("the step has no softplus", model=M, module="blocks.1.mixer.forwards")
def _(graph: Graph) -> None:
    graph.set(scan(1, "forwards"), delta_softplus=0)


@fault("B and C are exchanged", model=M, module="blocks.0.mixer.backwards")
def _(graph: Graph) -> None:
    node = graph.node(scan(0, "backwards"))
    b, c = node.inputs[3], node.inputs[4]
    node.replace_input_with(3, c)
    node.replace_input_with(4, b)


@fault("the scan's skip is dropped", model=M, module="blocks.1.mixer.backwards")
def _(graph: Graph) -> None:
    graph.change_at(scan(1, "backwards"), 5, np.zeros_like)


@fault("the taps of the backward convolution are not turned round", model=M, module="blocks.0.mixer.backwards")
def _(graph: Graph) -> None:
    graph.change_at("blocks.0.mixer.backwards/causal_conv1d", 1, lambda taps: taps[..., ::-1])


@fault("the two directions are subtracted", model=M, module="blocks.0.mixer")
def _(graph: Graph) -> None:
    graph.node("blocks.0.mixer/add").op_type = "Sub"


@fault("the tokens of a position are exchanged", model=M, module="blocks.1")
def _(graph: Graph) -> None:
    graph.change_at("blocks.1/select", 1, np.ones_like)
    graph.change_at("blocks.1/select_1", 1, np.zeros_like)


@fault("the hourglass's skip is dropped", model=M, module="blocks.0")
def _(graph: Graph) -> None:
    graph.bypass("blocks.0/mul_1", 0)


@fault("GELU in a block is the tanh form, not the erf form", model=M, module="blocks.0")
def _(graph: Graph) -> None:
    graph.set("blocks.0/gelu_1", approximate="tanh")


@fault("the norm at the end has another epsilon", model=M, module="final_layer.norm")
def _(graph: Graph) -> None:
    graph.set("final_layer.norm/layer_norm", epsilon=1e-2)
