"""Lowers a float32 program to float16, with islands of float32 where that is not enough."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Collection, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from ...exporter.decisions import exact_calls
from ...exporter.nodes import module_of, name_of
from ...exporter.op import DOMAIN, OPS, CustomOp

_LARGEST = torch.finfo(torch.float16).max
_SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal
_SMALL = 16
"""Elements up to which a constant is taken for an epsilon, and not for a weight."""

_HEAVY = frozenset("mm bmm addmm baddbmm convolution scaled_dot_product_attention".split())
_NORMS = frozenset("native_layer_norm native_group_norm instance_norm _native_batch_norm_legit_no_training".split())
"""Core AI's own compute their sums in float32 whatever they read."""
_MOVES = frozenset(
    """view _unsafe_view reshape permute transpose t unsqueeze squeeze expand slice select split_with_sizes cat stack clone alias copy
    constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d index index_select gather embedding flip repeat
    tile pixel_shuffle slice_scatter getitem where max_pool2d_with_indices upsample_nearest2d""".split()
)
_ELEMENTWISE = frozenset(
    "add sub mul neg abs relu minimum maximum clamp silu gelu sigmoid tanh leaky_relu hardtanh hardsigmoid hardswish".split()
)
_CURVES = frozenset("exp exp2 expm1 log log2 log10 log1p sin cos tan".split())
_DECISIONS = frozenset(
    """eq ne lt le gt ge floor ceil round trunc sign remainder fmod floor_divide argmax argmin topk sort nonzero
    isinf logical_not logical_and logical_or logical_xor any""".split()
)


class ToHalf:
    """Lowers float32 to float16, keeping islands of float32: the rules of `exporter.passes.half_precision.ToHalf`, for ATen.

    Inputs, outputs and buffers that the program changes keep their types. A call stays in float32 when it

    1. sums, takes an exponential, logarithm, power, root, sine or softmax, divides by an activation, makes a decision of a number, or is
       not known to bear less; normalisations and attention of Core AI's own are known to;
    2. has a number, or a small constant, that float16 cannot hold (an epsilon of 1e-6), or a weight beyond 65504;
    3. belongs to a module in which a value beyond 65504 was seen;
    4. feeds a sine, cosine, exponential, logarithm or a decision through elementwise operators, or continues an exponential through them,
       or is one of the exact calls that `exporter.decisions` names;
    5. is one of the products that a division normalises afterwards (linear attention sums over all tokens before it divides);
    6. stands between such calls only, so that nothing is gained by two casts.

    Operators of ours take what their schemas let them: activations in half precision, parameters and states in float32; loops and
    conditions stay in float32 as a whole.

    Given::

        mm = aten.mm(x, p_weight)
        softmax = aten._softmax(mm, -1, False)

    Result::

        x_half = aten._to_copy(x, dtype=float16)
        mm = aten.mm(x_half, p_weight)               # stored as float16
        mm_single = aten._to_copy(mm, dtype=float32)
        softmax = aten._softmax(mm_single, -1, False)

    Args:
        program: In the operators that `prepare` gives.
        keep_modules: PyTorch module paths whose calls stay in float32 (rule 3).
    """

    def __init__(self, program: ExportedProgram, keep_modules: Collection[str] = ()) -> None:
        self._program = program
        self._keep = frozenset(keep_modules)
        self._module = copy.deepcopy(program.graph_module)
        self._graph = self._module.graph
        self._signature = copy.deepcopy(program.graph_signature)
        self._state: dict[str, Any] = dict(program.state_dict)
        self._constants: dict[str, Any] = dict(program.constants)
        self._casts: dict[tuple[Node, torch.dtype], Node] = {}
        self._stored = self._weights()
        self.counts = collections.Counter[str]()
        """Calls that compute in `fp16` and in `fp32`."""

    def __call__(self) -> ExportedProgram:
        """The lowered program; the given one is not changed. To be called once."""
        for node in list(self._graph.nodes):
            if node.target is torch.ops.aten._assert_tensor_metadata.default:  # it compares dtypes with those of the trace
                self._graph.erase_node(node)
        calls = [node for node in self._graph.nodes if node.op == "call_function" and _touches_float(node)]
        single = self._islands(calls)
        self.counts["fp32"], self.counts["fp16"] = len(single), len(calls) - len(single)
        half = set(calls) - single
        for placeholder in self._stored:
            if placeholder.users and all(user in half and placeholder in _half_operands(user) for user in placeholder.users):
                self._store_half(placeholder)
        for node in calls:
            self._rewrite(node, half=node in half)
        self._restore_outputs()
        self._graph.lint()
        self._module.recompile()
        given = self._program
        return ExportedProgram(
            root=self._module,
            graph=self._graph,
            graph_signature=self._signature,
            state_dict=self._state,
            range_constraints=given.range_constraints,
            module_call_graph=given.module_call_graph,
            example_inputs=given.example_inputs,
            constants=self._constants,
            verifiers=given.verifiers,
        )

    def summary(self) -> str:
        """One sentence on what the call did."""
        return (
            f"{self.counts['fp16']} floating point operations compute in fp16, {self.counts['fp32']} stay in fp32 "
            "(softmax, accumulations, overflow)"
        )

    def _weights(self) -> dict[Node, Tensor]:
        """The stored tensors of float32 that nothing changes, by their placeholders."""
        changed = {*self._signature.buffers_to_mutate.values(), *self._signature.parameters_to_mutate.values()}
        specs = {spec.arg.name: spec for spec in self._signature.input_specs}
        found = {}
        for node in self._graph.nodes:
            spec = specs.get(node.name) if node.op == "placeholder" else None
            if spec is None or spec.kind == InputKind.USER_INPUT or spec.target is None or spec.target in changed:
                continue
            tensor = self._state.get(spec.target, self._constants.get(spec.target))
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                found[node] = tensor
        return found

    def _islands(self, calls: list[Node]) -> set[Node]:
        known = set(calls)
        single = {node for node in calls if self._stays(node)} | (exact_calls(self._graph) & known)
        for node in list(single):
            name = name_of(node)
            if name in _CURVES or _decides(node):
                _spread(node, single, known, _producers, lambda n: name_of(n) in _ELEMENTWISE | _MOVES | _CURVES | {"div"})
            if name in ("exp", "exp2", "expm1"):
                _spread(node, single, known, _consumers, lambda n: name_of(n) in _ELEMENTWISE | _MOVES | {"div"})
            if name in ("div", "reciprocal"):
                _spread(node, single, known, _producers, self._is_unnormalised_product)
        grown = True
        while grown:
            between = {
                node
                for node in calls
                if node not in single
                and name_of(node) in _ELEMENTWISE | _MOVES
                and _all_in(_producers(node), single)
                and _all_in(_consumers(node), single)
            }
            grown = bool(between)
            single |= between
        return single

    def _stays(self, node: Node) -> bool:
        if isinstance(node.target, torch._ops.HigherOrderOperator) or module_of(node) in self._keep:
            return True
        if custom_of(node) is not None:
            return False
        name = name_of(node)
        if name == "getitem":
            source = cast("Node", node.args[0])
            return custom_of(source) is None and self._stays(source)
        if name == "div":
            divisor = node.args[1]
            if not isinstance(divisor, Node) or divisor in self._stored:
                return self._beyond_half(node)
            return True
        if name == "_to_copy":
            return _decides(node) or not any(_is_float(a) for a in node.all_input_nodes)
        if name not in _HEAVY | _NORMS | _MOVES | _ELEMENTWISE or not any(_is_float(a) for a in node.all_input_nodes):
            return True
        # The epsilon of a normalisation is used in float32.
        return name not in _NORMS and self._beyond_half(node)

    def _beyond_half(self, node: Node) -> bool:
        numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, float)]
        return any(_number_beyond_half(abs(n)) for n in numbers) or any(
            _tensor_beyond_half(self._stored.get(a)) for a in node.all_input_nodes
        )

    def _is_unnormalised_product(self, node: Node) -> bool:
        if name_of(node) in _MOVES | {"add", "mul"}:
            return True
        # A product of two activations; a product with a weight is an ordinary layer and stays in float16.
        return name_of(node) in ("mm", "bmm") and not any(self._is_weight(a) for a in node.all_input_nodes)

    def _is_weight(self, node: Node) -> bool:
        while name_of(node) in _MOVES and len(node.all_input_nodes) == 1:
            (node,) = node.all_input_nodes
        return node in self._stored

    def _store_half(self, placeholder: Node) -> None:
        tensor = self._stored[placeholder]
        (spec,) = (spec for spec in self._signature.input_specs if spec.arg.name == placeholder.name)
        assert spec.target is not None
        lowered = tensor.detach().to(torch.float16)
        where = self._state if spec.target in self._state else self._constants
        where[spec.target] = torch.nn.Parameter(lowered, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else lowered
        placeholder.meta["val"] = placeholder.meta["val"].to(torch.float16)

    def _rewrite(self, node: Node, *, half: bool) -> None:
        lowered = _half_operands(node) if half else frozenset()

        def operand(given: Node) -> Node:
            return self._cast(given, torch.float16 if given in lowered else torch.float32)

        if name_of(node) != "getitem":
            node.args = torch.fx.map_arg(node.args, operand)
            node.kwargs = torch.fx.map_arg(node.kwargs, operand)
        if name_of(node) == "_to_copy" and half:
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "dtype"}
        if name_of(node) == "getitem":
            node.meta["val"] = cast("Node", node.args[0]).meta["val"][node.args[1]]
        elif half:
            # Computing it anew on values without data would fix the sizes that vary: torch notes what its own checks of shapes need.
            op = custom_of(node)
            node.meta["val"] = _lowered(node.meta["val"], [a.wide for a in op.outputs] if op else None)

    def _cast(self, node: Node, dtype: torch.dtype) -> Node:
        value = node.meta.get("val")
        if not (isinstance(value, Tensor) and value.dtype in (torch.float16, torch.float32)) or value.dtype == dtype:
            return node
        if (node, dtype) not in self._casts:
            after = node
            if node.op == "placeholder":
                after = [n for n in self._graph.nodes if n.op == "placeholder"][-1]
            with self._graph.inserting_after(after):
                cast_ = self._graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": dtype})
            cast_.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
            cast_.meta["val"] = value.to(dtype)
            self._casts[node, dtype] = cast_
        return self._casts[node, dtype]

    def _restore_outputs(self) -> None:
        (last,) = (node for node in self._graph.nodes if node.op == "output")
        originals = [n.meta["val"] if isinstance(n, Node) else None for n in cast("Any", _output_of(self._program).args[0])]
        restored = []
        for node, before in zip(last.args[0], originals, strict=True):
            is_float = isinstance(before, Tensor) and before.dtype == torch.float32
            restored.append(self._cast(node, torch.float32) if is_float else node)
        last.args = (tuple(restored),)
        for spec, node in zip(self._signature.output_specs, restored, strict=True):
            if isinstance(node, Node):
                spec.arg.name = node.name


def custom_of(node: Node) -> CustomOp | None:
    """The operator of ours that the node calls."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != DOMAIN:
        return None
    return OPS[str(target._schema.name).split("::")[1]]


def _half_operands(node: Node) -> frozenset[Node]:
    """What a call in half precision reads in float16: all of it, but for what operators of ours want wide."""
    op = custom_of(node)
    if op is None:
        return frozenset(node.all_input_nodes)
    given = dict(zip((a.name for a in op.inputs), node.args, strict=False)) | dict(node.kwargs)
    wide = {given.get(a.name) for a in op.inputs if a.wide}
    return frozenset(a for a in node.all_input_nodes if a not in wide)


def _lowered(value: Any, wide: list[bool] | None) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_lowered(v, None) if not (wide and wide[i]) else v for i, v in enumerate(value))
    return value.to(torch.float16) if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def _output_of(program: ExportedProgram) -> Node:
    last: Node = program.graph.output_node()
    return last


def _decides(node: Node) -> bool:
    if name_of(node) == "_to_copy":
        dtype = node.kwargs.get("dtype")
        return isinstance(dtype, torch.dtype) and dtype != torch.float32
    return name_of(node) in _DECISIONS


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(v, Tensor) and v.dtype == torch.float32 for v in values)


def _touches_float(node: Node) -> bool:
    return any(_is_float(n) for n in (node, *node.all_input_nodes))


def _producers(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if n.op == "call_function" and _is_float(n)]


def _consumers(node: Node) -> list[Node]:
    return [user for user in node.users if user.op == "call_function"]


def _all_in(nodes: list[Node], single: set[Node]) -> bool:
    return bool(nodes) and all(node in single for node in nodes)


def _spread(
    start: Node, single: set[Node], known: set[Node], step: Callable[[Node], Iterable[Node]], through: Callable[[Node], bool]
) -> None:
    queue, seen = collections.deque([start]), {start}
    while queue:
        for node in step(queue.popleft()):
            if node in known and node not in seen and through(node):
                seen.add(node)
                single.add(node)
                queue.append(node)


def _number_beyond_half(magnitude: float) -> bool:
    # Infinity is a mask; it is infinite in float16 as well.
    return 0 < magnitude < _SMALLEST_NORMAL or _LARGEST < magnitude < torch.inf


def _tensor_beyond_half(tensor: Tensor | None) -> bool:
    if tensor is None or not tensor.numel():
        return False
    if tensor.numel() <= _SMALL:
        return any(_number_beyond_half(abs(n)) for n in tensor.detach().flatten().tolist())
    low, high = (float(v) for v in tensor.detach().aminmax())
    peak = max(high, -low)
    if peak == torch.inf:
        finite = tensor.detach()[torch.isfinite(tensor.detach())]
        peak = float(finite.abs().max()) if finite.numel() else 0.0
    return peak > _LARGEST
