"""One graph that draws whole pictures: a Loop of a fixed number of steps around the graph of one step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..errors import Reason, UnsupportedError
from ..sampling import LATENTS, NOISE, PICTURES, STEP_NOISE, LoopSampler
from ._rewrite import Array, dims, is_op, reads

_BODY = "sampling_step"
_MOVES = ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Expand", "Gather")


class SamplingLoop(ir.passes.FunctionalPass):
    """Turns the graph of one step, lowered as it is to run, into the graph of the sampler.

    Given, for Euler with two steps and guidance 1.5::

        f (float[batch, 1, 8, 8] x, float[batch] t, int64[batch] y) => (float[batch, 1, 8, 8] sample) <w> {
            e = Embed (y)
            sample = Model (x, t, e, w)
        }

    Result::

        f (float[pictures, 1, 8, 8] noise, int64[pictures] y) => (float[pictures, 1, 8, 8] latents)
        <w, trips = 2, true, times = {1000, 500}, change = {-0.5, -0.5}, guidance = 1.5, null.y = {10}, two = {2}> {
            count = Shape <start = 0, end = 1> (noise)
            rows = Mul (count, two)
            nulls = Expand (null.y, count)
            y.rows = Concat <axis = 0> (y, nulls)
            e = Embed (y.rows)
            latents = Loop <body = {
                (int64 step, bool go, float[pictures, 1, 8, 8] x) => (bool on, float[pictures, 1, 8, 8] next) {
                    on = Identity (go)
                    now = Gather (times, step)
                    t = Expand (now, rows)
                    x.rows = Concat <axis = 0> (x, x)
                    sample = Model (x.rows, t, e, w)
                    given, null = Split <axis = 0, num_outputs = 2> (sample)
                    difference = Sub (given, null)
                    scaled = Mul (guidance, difference)
                    guided = Add (null, scaled)
                    width = Gather (change, step)
                    delta = Mul (width, guided)
                    next = Add (x, delta)
                }
            }> (trips, true, noise)
        }

    The weights stay where they are, in the outer graph, and the body reads them from there. What depends on the conditions alone is
    computed once, before the loop, except where that would carry a dequantised value into it: a weight or a key that is dequantised
    outside is a half-precision one inside.

    The loop runs over calls of the model. Heun has two for most steps: a body with the model in it twice would be compiled twice, so a
    predictor and its corrector are two passes of the same body, which carries the latents of the base and the answer before as well.
    The noise that calls add is an input `step_noise` (calls that add some, N, C, H, W).

    The output is named `latents`: it is what the last step makes, in the model's range ([-1, 1] for pixels, any for the latents of an
    autoencoder), and not clipped, so that the decoder that a model may need can follow.

    Loop arithmetic is float32, as the step's inputs and outputs are. No carried value changes its shape, and the condition is a value and
    not left out, because TensorRT requires both.

    Args:
        sampler: What to write.
    """

    def __init__(self, sampler: LoopSampler) -> None:
        super().__init__()
        self._sampler = sampler

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Makes a model of its own, which shares the weights' tensors.

        Raises:
            UnsupportedError: The step graph does not fit the sampler; the reasons name its inputs and outputs.
        """
        if reasons := misfits(model.graph, self._sampler):
            raise UnsupportedError("the sampler cannot be written as one graph around this model", reasons=reasons)
        made = _Writer(model.clone(), self._sampler).write()
        return ir.passes.PassResult(made, modified=True)


def misfits(graph: ir.Graph, sampler: LoopSampler) -> list[Reason]:
    """Every reason why a step graph cannot be the body of the sampler's loop."""
    inputs = {value.name or "": value for value in graph.inputs}
    outputs = {value.name or "": value for value in graph.outputs}
    reasons = [Reason(f"there is no such input; they are {', '.join(inputs)}", name) for name in _own(sampler) if name not in inputs]
    if sampler.output not in outputs:
        reasons.append(Reason(f"there is no such output; they are {', '.join(outputs)}", sampler.output))
    if reasons:
        return reasons
    latent = dims(inputs[sampler.latent])
    if latent is None or len(latent) < 2:
        return [Reason(f"the latents have shape {latent}, expected (rows, …)", sampler.latent)]
    if isinstance(latent[0], int) and latent[0] % sampler.rows:
        fix = "export it with an even or a dynamic batch"
        reasons.append(Reason(f"guidance needs two rows a picture, and the model takes {latent[0]}", sampler.latent, fix))
    if (answer := dims(outputs[sampler.output])) != latent:
        fix = "export a module that returns the velocity, noise or picture alone"
        reasons.append(Reason(f"has shape {answer}, expected that of the latents, {latent}", sampler.output, fix))
    for name, value in inputs.items():
        shape = dims(value)
        if not shape or shape[0] != latent[0]:
            reasons.append(Reason(f"has shape {shape}, expected one row for each of the latents, {latent[0]}", name))
        elif name not in _own(sampler):
            reasons += _misfits_of_condition(name, value, shape, sampler)
    for name in _own(sampler):
        if (dtype := inputs[name].dtype) != ir.DataType.FLOAT:
            reasons.append(Reason(f"is {dtype.name.lower() if dtype is not None else 'of no type'}, expected float32", name))
    return reasons


def _own(sampler: LoopSampler) -> tuple[str, str]:
    return sampler.latent, sampler.time


def _misfits_of_condition(name: str, value: ir.Value, shape: Sequence[int | str | None], sampler: LoopSampler) -> Iterator[Reason]:
    if name in (NOISE, STEP_NOISE, LATENTS):
        yield Reason("is a name that the sampling graph has for an input or output of its own", name, "rename the argument of forward")
    if sampler.rows == 1:
        return
    null = sampler.null.get(name)
    if null is None:
        yield Reason("guidance needs its null condition, and the sampler has none", name)
    elif value.dtype is not None and null.dtype != value.dtype.numpy():
        yield Reason(f"its null condition is {null.dtype}, expected {value.dtype.numpy()}", name)
    elif not _is_row(null.shape, shape):
        yield Reason(f"its null condition has shape {null.shape}, expected one row of {list(shape)}", name)


def _is_row(row: tuple[int, ...], shape: Sequence[int | str | None]) -> bool:
    """Whether a shape is that of one row of an input."""
    return len(row) == len(shape) and row[0] == 1 and all(not isinstance(d, int) or d == n for d, n in zip(shape[1:], row[1:], strict=True))


class _Writer:
    """Moves a model's nodes into a new model.

    Args:
        model: The step, which is taken apart.
        sampler: See `SamplingLoop`.
    """

    def __init__(self, model: ir.Model, sampler: LoopSampler) -> None:
        self._model, self._sampler = model, sampler
        graph = model.graph
        self._inputs = {value.name or "": value for value in graph.inputs}
        self._answer = next(value for value in graph.outputs if value.name == sampler.output)
        self._shape = list(dims(self._inputs[sampler.latent]) or ())
        pictures = self._shape[0] // sampler.rows if isinstance(self._shape[0], int) else PICTURES
        self._shape[0] = pictures
        self._weights = list(graph.initializers.values())
        self._constants: dict[str, ir.Value] = {}
        self._outer: list[ir.Node] = []
        self._body: list[ir.Node] = []
        self._into = self._outer
        self._used = {value.name for node in ir.traversal.RecursiveGraphIterator(graph) for value in node.outputs}
        self._used |= {value.name for value in (*graph.inputs, *graph.initializers.values())}
        self._used |= {node.name for node in ir.traversal.RecursiveGraphIterator(graph)}
        self._free_names()

    def _free_names(self) -> None:
        """Renames parameters and values that have a name which the sampling graph needs for itself."""
        graph = self._model.graph
        values = [value for node in ir.traversal.RecursiveGraphIterator(graph) for value in node.outputs]
        taken = [value for value in (*self._weights, *values) if value.name in (NOISE, STEP_NOISE, LATENTS)]
        ir.convenience.rename_values(taken, [self._unique(f"{_BODY}/{value.name}") for value in taken])

    def write(self) -> ir.Model:
        """The sampling graph."""
        sampler, old = self._sampler, self._model.graph
        noise = self._input(NOISE, ir.DataType.FLOAT, self._shape)
        conditions = {name: self._condition(name) for name in self._inputs if name not in _own(sampler)}
        inputs = [noise, *conditions.values()]
        extra = sum(call.noise != 0 for call in sampler.calls)
        step_noise = self._input(STEP_NOISE, ir.DataType.FLOAT, [extra, *self._shape]) if extra else None
        if step_noise is not None:
            inputs.append(step_noise)

        count = self._count(noise)
        rows = self._emit("Mul", [count, self._constant("rows", np.array([sampler.rows], np.int64))]) if sampler.rows > 1 else count
        latent, time = (self._inputs[name] for name in _own(sampler))
        fixed = _fixed_nodes(old, {latent, time}, self._inputs.values())
        for name, value in conditions.items():
            self._inputs[name].replace_all_uses_with(self._doubled(name, value, count))
        nodes = list(old)
        old.outputs.clear()
        for node in nodes:
            old.remove(node)
        self._outer += [node for node in nodes if node in fixed]
        start = self._emit("Mul", [noise, self._scalar("start", sampler.start)]) if sampler.start != 1 else noise

        carried = self._write_body([node for node in nodes if node not in fixed], rows, step_noise)
        loop = ir.node(
            "Loop",
            [self._constant("trips", np.array(len(sampler.calls), np.int64)), self._constant("go", np.array(True)), *[start] * carried],
            {"body": self._graph},
            num_outputs=carried,
            name=self._unique("sampling_loop"),
        )
        self._outer.append(loop)
        latents = loop.outputs[0]
        for value in loop.outputs:
            self._type(value, self._shape).name = self._unique("sampling_loop/last")
        latents.name = LATENTS
        graph = ir.Graph(
            inputs,
            [latents],
            nodes=self._outer,
            opset_imports=dict(self._model.opset_imports),
            name=old.name,
        )
        old.initializers.clear()
        for value in (*self._weights, *self._constants.values()):
            graph.register_initializer(value)
        made = ir.Model(
            graph,
            ir_version=self._model.ir_version,
            producer_name=self._model.producer_name,
            producer_version=self._model.producer_version,
            functions=list(self._model.functions.values()),
            metadata_props=dict(self._model.metadata_props),
        )
        RemoveUnusedNodesPass()(made)
        return made

    def _write_body(self, nodes: list[ir.Node], rows: ir.Value, step_noise: ir.Value | None) -> int:
        """Makes the body, and returns the number of values that it carries."""
        sampler, self._into = self._sampler, self._body
        step = self._value("step", ir.DataType.INT64, [])
        go = self._value("go_on", ir.DataType.BOOL, [])
        x, base, before = (self._value(name, ir.DataType.FLOAT, self._shape) for name in ("x", "base", "before"))
        on = self._emit("Identity", [go])
        self._inputs[sampler.time].replace_all_uses_with(self._emit("Expand", [self._at("times", "time", step), rows]))
        wide = self._emit("Concat", [x, x], {"axis": 0}) if sampler.rows > 1 else x
        self._inputs[sampler.latent].replace_all_uses_with(wide)
        self._body += nodes
        out = self._answer
        out.name = self._unique(f"{_BODY}/answer")
        if sampler.rows > 1:
            out = self._guided(out)
        corrects, predicts = (any(values) for values in zip(*((c.previous != 0, not c.advances) for c in sampler.calls), strict=True))
        change = self._emit("Add", [out, self._emit("Mul", [self._at("previous", "previous", step), before])]) if corrects else out
        kept = base if predicts else x
        if any(call.keep != 1 for call in sampler.calls):
            kept = self._emit("Mul", [self._at("keep", "keep", step), kept])
        after = self._emit("Add", [kept, self._emit("Mul", [self._at("change", "change", step), change])])
        if step_noise is not None:
            after = self._emit("Add", [after, self._noise(step_noise, step)])
        inputs, outputs = [x], [after]
        if predicts:
            inputs.append(base)
            advances = np.array([call.advances for call in sampler.calls])
            chosen = self._emit("Gather", [self._constant("advances", advances), step])
            outputs.append(self._emit("Where", [chosen, after, base]))
        if corrects:
            inputs.append(before)
            outputs.append(self._emit("Identity", [out]))
        for value in outputs:
            self._type(value, self._shape)
        on.type, on.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
        self._graph = ir.Graph([step, go, *inputs], [on, *outputs], nodes=self._body, name=_BODY)
        self._into = self._outer
        return len(outputs)

    def _guided(self, out: ir.Value) -> ir.Value:
        split = ir.node("Split", [out], {"axis": 0, "num_outputs": 2}, num_outputs=2, name=self._unique(f"{_BODY}/Split"))
        given, null = (self._type(value, self._shape) for value in split.outputs)
        given.name, null.name = self._unique(f"{_BODY}/given"), self._unique(f"{_BODY}/null")
        self._body.append(split)
        scaled = self._emit("Mul", [self._scalar("guidance", self._sampler.guidance), self._emit("Sub", [given, null])])
        return self._emit("Add", [null, scaled])

    def _noise(self, step_noise: ir.Value, step: ir.Value) -> ir.Value:
        amounts = [call.noise != 0 for call in self._sampler.calls]
        # A call that adds none reads any set, and multiplies it by 0.
        index = np.clip(np.cumsum(amounts) - 1, 0, None).astype(np.int64)
        drawn = self._emit("Gather", [step_noise, self._emit("Gather", [self._constant("noise_index", index), step])])
        return self._emit("Mul", [self._at("noise", "noise", step), drawn])

    def _condition(self, name: str) -> ir.Value:
        """The input of the sampling graph for a condition of the model; with guidance it is as long as the null condition."""
        old = self._inputs[name]
        shape = list(dims(old) or ())
        if self._sampler.rows > 1:
            shape[1:] = self._sampler.null[name].shape[1:]
        shape[0] = self._shape[0]
        assert old.dtype is not None
        # The step's own input goes, and its name with it.
        old.name = self._unique(f"{_BODY}/{name}")
        return self._input(name, old.dtype, shape)

    def _doubled(self, name: str, value: ir.Value, count: ir.Value) -> ir.Value:
        """The rows given, and under them as many of the null condition."""
        if self._sampler.rows == 1:
            return value
        null = self._sampler.null[name]
        shape = count
        if null.ndim > 1:
            shape = self._emit("Concat", [count, self._constant(f"ones.{null.ndim - 1}", np.ones(null.ndim - 1, np.int64))], {"axis": 0})
        rows = self._emit("Expand", [self._constant(f"null.{name}", null), shape])
        return self._emit("Concat", [value, rows], {"axis": 0})

    def _count(self, noise: ir.Value) -> ir.Value:
        """The number of pictures, int64 (1,)."""
        if isinstance(self._shape[0], int):
            return self._constant("count", np.array([self._shape[0]], np.int64))
        return self._emit("Shape", [noise], {"start": 0, "end": 1})

    def _at(self, name: str, attribute: str, step: ir.Value) -> ir.Value:
        """This step's number in a table of one for each call."""
        table = np.array([getattr(call, attribute) for call in self._sampler.calls], dtype=np.float32)
        return self._emit("Gather", [self._constant(name, table), step])

    def _scalar(self, name: str, number: float) -> ir.Value:
        return self._constant(name, np.array(number, np.float32))

    def _constant(self, name: str, array: Array) -> ir.Value:
        if name not in self._constants:
            tensor = ir.tensor(array, name=self._unique(f"sampling_loop/{name}"))
            value = ir.Value(name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
            self._constants[name] = value
        return self._constants[name]

    def _emit(self, op_type: str, inputs: Sequence[ir.Value], attributes: dict[str, Any] | None = None) -> ir.Value:
        where = _BODY if self._into is self._body else "sampling_loop"
        node = ir.node(op_type, inputs, attributes or {}, name=self._unique(f"{where}/{op_type}"))
        node.outputs[0].name = self._unique(f"{where}/{op_type}.0")
        self._into.append(node)
        return node.outputs[0]

    def _input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str | None]) -> ir.Value:
        self._used.add(name)
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))

    def _value(self, name: str, dtype: ir.DataType, shape: Sequence[int | str | None]) -> ir.Value:
        return ir.Value(name=self._unique(f"{_BODY}/{name}"), shape=ir.Shape(shape), type=ir.TensorType(dtype))

    def _type(self, value: ir.Value, shape: Sequence[int | str | None]) -> ir.Value:
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        return value

    def _unique(self, name: str) -> str:
        candidate, count = name, 0
        while candidate in self._used:
            count += 1
            candidate = f"{name}_{count}"
        self._used.add(candidate)
        return candidate


def _fixed_nodes(graph: ir.Graph, varying: Collection[ir.Value], inputs: Collection[ir.Value]) -> set[ir.Node]:
    """The nodes that depend on the conditions and not on what varies from step to step, and those of weights alone that they read.

    No value that is quantised, or dequantised and then only moved, passes from them into the loop: what the loop multiplies in FP8 is
    quantised within it. (QDQPropagationTransformer of ONNX Runtime 1.32 ends the process on a DequantizeLinear that a loop reads.)
    """
    changes = set(varying)
    given = set(inputs) - changes
    fixed: set[ir.Node] = set()
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        read = set(reads(node))
        for value in read:
            readers.setdefault(value, []).append(node)
        if read & changes:
            changes.update(node.outputs)
        elif read & given:
            given.update(node.outputs)
            fixed.add(node)
    pending = list(fixed)
    while pending:
        for node in _producers(pending.pop(), graph):
            if node not in fixed:
                fixed.add(node)
                pending.append(node)
    moved = True
    while moved:
        within = {
            node
            for node in fixed
            if any(before not in fixed for before in _producers(node, graph))
            or (_is_quantised(node) and any(reader not in fixed for value in node.outputs for reader in readers.get(value, ())))
        }
        fixed -= within
        moved = bool(within)
    return fixed


def _is_quantised(node: ir.Node) -> bool:
    """Whether a node quantises, dequantises, or only moves what a DequantizeLinear made."""
    while is_op(node, *_MOVES) and node.inputs and (value := node.inputs[0]) is not None and (before := value.producer()) is not None:
        node = before
    return is_op(node, "QuantizeLinear", "DequantizeLinear")


def _producers(node: ir.Node, graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes of a graph that make what a node reads."""
    for value in reads(node):
        producer = value.producer()
        if producer is not None and producer.graph is graph:
            yield producer
