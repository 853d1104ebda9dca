"""Faults to inject into the ONNX graph of an exported bundle, and the module that each of them is in.

A fault is a function with a decorator; the files of this folder hold those of one model each::

    @fault("the sign of one weight is flipped", model="dit-tiny", module="blocks.1.mlp.fc1")
    def _(graph: Graph) -> None:
        graph.change("blocks.1.mlp.fc1.weight.T", flip_first)
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]


class Graph:
    """The graph of a bundle, by the names that the export gave its nodes and values."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self._nodes = {node.name: node for node in model.graph}
        self._values = {value.name: value for node in model.graph for value in node.outputs}
        self._values |= {value.name: value for value in (*model.graph.inputs, *model.graph.initializers.values())}

    def node(self, name: str) -> ir.Node:
        """A node by its name."""
        return self._nodes[name]

    def value(self, name: str) -> ir.Value:
        """A value by its name: an input, a weight or what a node makes."""
        return self._values[name]

    def rewire(self, node: str, index: int, value: str) -> None:
        """Lets an input of a node read another value."""
        self.node(node).replace_input_with(index, self.value(value))

    def bypass(self, node: str, index: int) -> None:
        """Takes a node out: what reads its result reads one of its inputs instead."""
        node_ = self.node(node)
        source = node_.inputs[index]
        assert source is not None
        node_.outputs[0].replace_all_uses_with(source)

    def swap(self, node: str) -> None:
        """Exchanges the first two results of a node."""
        a, b = self.node(node).outputs[:2]
        first, second = list(a.uses()), list(b.uses())
        for use in first:
            use.node.replace_input_with(use.idx, b)
        for use in second:
            use.node.replace_input_with(use.idx, a)

    def set(self, node: str, **attributes: Any) -> None:
        """Sets attributes of a node."""
        for name, attribute in ir.node("", [], attributes).attributes.items():
            self.node(node).attributes[name] = attribute

    def change(self, weight: str, edit: Callable[[Array], Array]) -> None:
        """Replaces the numbers of a weight, for every node that reads it."""
        value = self.value(weight)
        assert value.const_value is not None
        value.const_value = ir.tensor(np.array(edit(value.const_value.numpy().copy()), order="C"), name=weight)

    def change_at(self, node: str, index: int, edit: Callable[[Array], Array]) -> None:
        """Replaces the numbers of a constant, for one of the nodes that read it."""
        source = self.node(node).inputs[index]
        assert source is not None
        assert source.const_value is not None
        array = np.array(edit(source.const_value.numpy().copy()), order="C")
        self.node(node).replace_input_with(index, self.constant(array, f"{node}/fault"))

    def constant(self, array: Array, name: str) -> ir.Value:
        """A new constant."""
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.register_initializer(value)
        self._values[name] = value
        return value

    def before(self, node: str, index: int, operator: str, rest: Sequence[ir.Value] = (), **attributes: Any) -> None:
        """Puts a node of the same module in front of an input of a node."""
        after = self.node(node)
        new = ir.node(operator, [after.inputs[index], *rest], attributes)
        self._put(new, after, "before")
        self.graph.insert_before(after, new)
        after.replace_input_with(index, new.outputs[0])

    def after(self, node: str, operator: str, rest: Sequence[ir.Value] = (), **attributes: Any) -> None:
        """Puts a node of the same module behind the first result of a node."""
        made = self.node(node)
        new = ir.node(operator, [None, *rest], attributes)
        self._put(new, made, "after")
        self.graph.insert_after(made, new)
        made.outputs[0].replace_all_uses_with(new.outputs[0])
        new.replace_input_with(0, made.outputs[0])

    def _put(self, new: ir.Node, like: ir.Node, where: str) -> None:
        new.metadata_props.update(like.metadata_props)
        new.name = f"{like.name}/{where}/{new.op_type}"
        new.outputs[0].name = new.name
        self._nodes[new.name] = new
        self._values[new.name] = new.outputs[0]


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        name: What is wrong.
        model: The registered model.
        module: The path of the module that it is in, empty for the model itself.
        edit: Makes it, in place.
        precision: The precision of the bundle: `fp32`, or `fp8`, which is quantised.
    """

    name: str
    model: str
    module: str
    edit: Callable[[Graph], None]
    precision: str

    def inject(self, model: ir.Model) -> ir.Model:
        """A copy of the graph with the fault."""
        copy = model.clone()
        self.edit(Graph(copy))
        return copy


FAULTS: dict[str, Fault] = {}


def fault(name: str, *, model: str, module: str, precision: str = "fp32") -> Callable[[Callable[[Graph], None]], Callable[[Graph], None]]:
    """Registers a fault."""

    def decorate(edit: Callable[[Graph], None]) -> Callable[[Graph], None]:
        assert name not in FAULTS
        FAULTS[name] = Fault(name, model, module, edit, precision)
        return edit

    return decorate


def load() -> list[Fault]:
    """Every fault of this folder."""
    for found in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{found.name}")
    return list(FAULTS.values())


def flip_first(array: Array) -> Array:
    """One element with the other sign."""
    array.flat[0] = -array.flat[0]
    return array
