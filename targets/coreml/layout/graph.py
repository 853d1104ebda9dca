"""Changes the graph of an exported program: every new node has its value, its scope and its place."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node

from ....exporter.quiet import quiet
from .movement import Movement, Shape

aten = torch.ops.aten

FINAL = "isthmus_final"
"""The key in a node's meta that says that its result stands in memory as it is: the movements up to it are done there, and not later."""

_SCOPE = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "custom")


class Editor:
    """A copy of a program that rewrites change. The tensors are shared with the program that it was made from.

    Attributes:
        graph: The copy's graph. Nodes that nothing reads any more are dropped by `finish`.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        with quiet():  # torch deprecates what its own copies use
            self._module = copy.deepcopy(program.graph_module)
            self._signature = copy.deepcopy(program.graph_signature)
        self._state = dict(program.state_dict)
        self._constants = dict(program.constants)
        self.graph = self._module.graph
        for node, given in zip(self.graph.nodes, program.graph.nodes, strict=True):
            if node.op == "placeholder" and node.name != given.name:
                node.name = given.name  # a copied graph names an input `input_1` that is called as a function of Python's, `input`
        self._fake = next((v.fake_mode for n in self.graph.nodes if isinstance(v := n.meta.get("val"), torch._subclasses.FakeTensor)), None)
        self._specs = {spec.arg.name: spec for spec in self._signature.input_specs}
        self._mutated = {*self._signature.buffers_to_mutate.values(), *self._signature.parameters_to_mutate.values()}
        self._names = Counter(spec.target for spec in self._signature.input_specs)
        self._made: dict[Any, Node] = {}
        self._known: dict[tuple[Node, int], torch.Tensor | None] = {}
        for node in self.calls(aten._assert_tensor_metadata.default):  # compares dtypes with those of the trace, and holds its operand
            self.graph.erase_node(node)

    def calls(self, *targets: Any) -> list[Node]:
        """The nodes that call one of these operators, in order; all calls when none is named."""
        return [node for node in self.graph.nodes if node.op == "call_function" and (not targets or node.target in targets)]

    def emit(self, like: Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A call, put before the node `like`, whose scope in the PyTorch model it takes."""
        return self._put(like, like, target, args, kwargs)

    def _put(self, place: Node, like: Node, target: Callable[..., Any], args: Any, kwargs: Any) -> Node:
        with self.graph.inserting_before(place):
            node = cast("Node", self.graph.create_node("call_function", target, args, kwargs, name=_name(target)))
        node.meta = {key: like.meta[key] for key in _SCOPE if key in like.meta}
        node.meta["val"] = self.computed(target, args, kwargs)
        return node

    def computed(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The value of a call, without data."""
        values = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        assert self._fake is not None, "a program with a call has a value"
        with self._fake, torch.no_grad():
            return target(*values[0], **values[1])

    def move(self, like: Node, node: Node, movement: Movement | None) -> Node:
        """The reshapes and the transpose that a movement needs."""
        assert movement is not None
        for step, numbers in movement.steps():
            node = self.emit(like, aten.reshape.default if step == "view" else aten.permute.default, node, list(numbers))
        return node

    def replace(self, old: Node, new: Node) -> None:
        """Puts `new` in the place of the call `old`."""
        for what in ("shape", "dtype"):
            before, after = getattr(old.meta["val"], what), getattr(new.meta["val"], what)
            assert before == after, f"the {what} of {old} is {before}, and that of {new} is {after}"
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def parameter(self, node: Any) -> torch.Tensor | None:
        """The tensor of a placeholder that is a parameter, a buffer that nothing changes, or a constant; None for anything else."""
        spec = self._specs.get(node.name) if isinstance(node, Node) and node.op == "placeholder" else None
        if spec is None or spec.kind == InputKind.USER_INPUT or spec.target is None or spec.target in self._mutated:
            return None
        found = self._state.get(spec.target, self._constants.get(spec.target))
        return found if isinstance(found, torch.Tensor) else None

    def reshaped(self, like: Node, node: Node, shape: Sequence[int]) -> Node:
        """A stored tensor in another shape: itself, under its name, when nothing else reads it, else a view of it."""
        if shape_of(node) == tuple(shape):
            return node
        if self._alone(node):
            return self._change(node, lambda tensor: tensor.reshape(list(shape)))
        # At the beginning: whatever reads it in this shape, in whatever order it is rewritten, comes later.
        first = next(n for n in self.graph.nodes if n.op != "placeholder")
        return self.once((node, tuple(shape)), lambda: self._put(first, like, aten.reshape.default, (node, list(shape)), {}))

    def transposed(self, node: Node) -> Node:
        """A stored matrix, transposed: itself, under its name, when nothing else reads it, else a copy."""
        if self._alone(node):
            return self._change(node, lambda tensor: tensor.T.contiguous())
        tensor = self.parameter(node)
        assert tensor is not None
        name = f"{self._specs[node.name].target}_transposed"
        return self.once((node, "transposed"), lambda: self.constant(name, tensor.detach().T.contiguous()))

    def channels(self, like: Node, node: Node) -> Node:
        """What is multiplied or added channel by channel, as it broadcasts with (B, C, 1, S)."""
        shape = (1, node.meta["val"].numel(), 1, 1)
        if self.parameter(node) is not None:
            return self.reshaped(like, node, shape)
        return self.emit(like, aten.reshape.default, node, list(shape))

    def once(self, key: Any, make: Callable[[], Node]) -> Node:
        """The node that was made for this key before, or a new one. It has to come before everything that reads it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _alone(self, node: Node) -> bool:
        """Whether a stored tensor is read by one call, under one name."""
        return len(node.users) == 1 and self._names[self._specs[node.name].target] == 1

    def _change(self, node: Node, change: Callable[[torch.Tensor], torch.Tensor]) -> Node:
        tensor, target = self.parameter(node), self._specs[node.name].target
        assert tensor is not None
        assert target is not None
        changed = change(tensor.detach())
        if isinstance(tensor, torch.nn.Parameter):
            changed = torch.nn.Parameter(changed, requires_grad=tensor.requires_grad)
        (self._state if target in self._state else self._constants)[target] = changed
        with self._fake, torch.no_grad():  # type: ignore[union-attr]  # there is one by now
            node.meta["val"] = change(node.meta["val"].detach())
        return node

    def along(self, like: Node, x: Node, axis: int, matrix: Node) -> Node:
        """The product of an axis with a matrix (size of the axis, new size)."""
        last = axis == len(shape_of(x)) - 1
        moved = x if last else self.emit(like, aten.transpose.int, x, axis, -1)
        product = self.emit(like, aten.matmul.default, moved, matrix)
        return product if last else self.emit(like, aten.transpose.int, product, axis, -1)

    def constant(self, name: str, tensor: torch.Tensor) -> Node:
        """A further constant of the program, under a name that no other has."""
        taken = set(self._state) | set(self._constants)
        name = name.replace(".", "_")  # a placeholder is an argument of the code that torch writes
        target = next(n for n in (name, *(f"{name}_{i}" for i in range(1, len(taken) + 2))) if n not in taken)
        specs = self._signature.input_specs
        place = next((i for i, spec in enumerate(specs) if spec.kind == InputKind.USER_INPUT), len(specs))
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        before = placeholders[place] if place < len(placeholders) else next(n for n in self.graph.nodes if n.op != "placeholder")
        with self.graph.inserting_before(before):
            node = cast("Node", self.graph.placeholder(f"c_{target}"))
        node.meta["val"] = self._fake.from_tensor(tensor, static_shapes=True) if self._fake is not None else tensor
        spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(name=node.name), target=target)
        specs.insert(place, spec)
        self._specs[node.name] = spec
        self._names[target] += 1
        self._constants[target] = tensor
        return node

    def value(self, node: Any, limit: int = 1 << 16) -> torch.Tensor | None:
        """The value of what depends on constants alone and has no more elements than `limit`; None for anything else."""
        if (tensor := self.parameter(node)) is not None:
            return tensor.detach() if tensor.numel() <= limit else None
        if not isinstance(node, Node) or node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            return None
        if node.meta["val"].numel() > limit or getattr(node.target, "namespace", "") != "aten" or not _pure(node):
            return None
        if (node, limit) not in self._known:
            known = {n: self.value(n, limit) for n in node.all_input_nodes}
            self._known[node, limit] = None
            if all(v is not None for v in known.values()):
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: known[n])
                with torch.no_grad():
                    self._known[node, limit] = node.target(*args, **kwargs)  # type: ignore[operator]  # fx's arguments are a union
        return self._known[node, limit]

    def finish(self, outputs: Iterable[Node] | None = None) -> ExportedProgram:
        """The changed program.

        Args:
            outputs: What the program returns, when that are other nodes than before.
        """
        (last,) = (node for node in self.graph.nodes if node.op == "output")
        if outputs is not None:
            last.args = (tuple(outputs),)
        for spec, node in zip(self._signature.output_specs, last.args[0], strict=True):
            if isinstance(node, Node):
                spec.arg.name = node.name
        for node in reversed(list(self.graph.nodes)):
            if node.op == "call_function" and not node.users and not _acts(node):
                self.graph.erase_node(node)
        self.graph.lint()
        self._module.recompile()
        given = self._program
        return ExportedProgram(
            root=self._module,
            graph=self.graph,
            graph_signature=self._signature,
            state_dict=self._state,
            range_constraints=given.range_constraints,
            module_call_graph=given.module_call_graph,
            example_inputs=given.example_inputs,
            constants=self._constants,
            verifiers=given.verifiers,
        )


def shape_of(node: Any) -> Shape:
    """The sizes of a node's tensor."""
    return tuple(int(size) for size in node.meta["val"].shape)


def argument(node: Node, name: str, default: Any = None) -> Any:
    """An argument of a call by the name that the operator's schema gives it."""
    schema = node.target._schema  # type: ignore[union-attr]  # fx's arguments are a union
    for place, parameter in enumerate(schema.arguments):
        if parameter.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            if place < len(node.args):
                return node.args[place]
            return default if parameter.default_value is None else parameter.default_value
    return default


def scope_of(node: Node) -> str:
    """The path of the PyTorch module that a call is from, such as `blocks.0.mlp.fc1`; the call's own name when that is not known."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.removeprefix("L['self'].") or node.name


def operator_of(node: Node) -> str:
    """The operator that a node calls, without its overload, such as `linear`."""
    return _name(node.target)


def text(program: ExportedProgram) -> str:
    """The calls of a program, one a line, with the shape of each result: what the rewrites' docstrings show.

    Calls are named after their operators and numbered in order, whatever names they have in the graph.
    """
    lines: list[str] = []
    names: dict[Node, str] = {}
    counts: Counter[str] = Counter()
    for node in program.graph.nodes:
        if node.op != "call_function":
            names[node] = node.name
            continue
        name = _name(node.target)
        names[node] = f"{name}_{counts[name]}" if counts[name] else name
        counts[name] += 1
        value = node.meta.get("val")
        shape = f" {'x'.join(map(str, value.shape)) or 'scalar'}" if isinstance(value, torch.Tensor) else ""
        given = [_shown(a, names) for a in node.args] + [f"{k}={_shown(v, names)}" for k, v in node.kwargs.items()]
        lines.append(f"{names[node]}{shape} = {name}({', '.join(given)})")
    return "\n".join(lines)


def _shown(value: Any, names: dict[Node, str]) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_shown(v, names) for v in value)}]"
    if isinstance(value, Node):
        return names[value]
    return value if isinstance(value, str) else repr(value).removeprefix("torch.")


def _name(target: Any) -> str:
    return "getitem" if target is operator.getitem else str(target.__name__).partition(".")[0]


def _acts(node: Node) -> bool:
    """Whether a call does something beside its result."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and (schema.is_mutable or not schema.returns)


def _pure(node: Node) -> bool:
    """Whether a call gives the same each time, and changes nothing."""
    tags = node.target.tags  # type: ignore[union-attr]  # fx's arguments are a union
    return not _acts(node) and torch.Tag.nondeterministic_seeded not in tags and not _name(node.target).startswith("empty")
