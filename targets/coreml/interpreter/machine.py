"""The interpreter: walks the blocks of a program, and keeps its values, loops and states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ....exporter.errors import IsthmusError, Reason, UnsupportedError, UsageError
from . import convolution, elementwise, indexing, linear_algebra, normalization, reductions, resampling, shapes, weights  # noqa: F401 - each registers its operations
from .program import accepted_shapes, operations_in, used_by
from .registry import OPERATIONS, Array, rounded, widened

_DTYPES = {"fp16": "float16", "fp32": "float32", "bool": "bool"}

# What the interpreter does itself, because it runs blocks or touches the states.
_OWN = frozenset({"const", "while_loop", "cond", "read_state", "write_state", "coreml_update_state"})

# Weights that are decompressed where they are used first, and dropped where they are used last: all of them at once may not fit.
_WEIGHT = "constexpr_"

Watch = Callable[[str, Array], None]
"""Is called with the name and the value of every input, of every operation's output, weights excepted, and in loops of what is carried."""


class Interpreter:
    """Executes one function of a program.

    Attributes:
        function: The function's name.
        inputs: Name, shape (a size that varies is None) and dtype of each input, states excepted.
        states: The same of each state.
        outputs: The names of the outputs.
    """

    def __init__(self, program: Any, function: str | None = None) -> None:
        """Checks that every operation is known.

        Args:
            program: What `load` returns.
            function: Its function; the program's default one when None.

        Raises:
            UsageError: The program has no such function.
            UnsupportedError: It has operations that are not implemented; all of them are listed.
        """
        from coremltools.converters.mil.mil import types

        name: str = function or getattr(program, "default_function_name", None) or "main"
        if name not in program.functions:
            raise UsageError(f"the program has no function {name!r}", hint=f"it has {', '.join(program.functions)}")
        self.function = name
        self._function = program.functions[name]
        counts = Counter(op.op_type for op in operations_in(self._function))
        unknown = sorted(set(counts) - set(OPERATIONS) - _OWN)
        if unknown:
            reasons = [Reason(f"the operation {kind!r} ({counts[kind]} times) is not implemented") for kind in unknown]
            raise UnsupportedError("the interpreter cannot execute this program", reasons=reasons)
        self.inputs: dict[str, tuple[tuple[int | None, ...], np.dtype[Any]]] = {}
        self.states: dict[str, tuple[tuple[int | None, ...], np.dtype[Any]]] = {}
        for key, variable in self._function.inputs.items():
            state = types.is_state(variable.sym_type)
            kind = variable.sym_type.wrapped_type() if state else variable.sym_type
            shape = kind.get_shape() if types.is_tensor(kind) else ()
            dtype = kind.get_primitive() if types.is_tensor(kind) else kind
            (self.states if state else self.inputs)[key] = (tuple(_size(s) for s in shape), _dtype(types.builtin_to_string(dtype)))
        self.outputs = tuple(variable.name for variable in self._function.outputs)
        self._accepted = accepted_shapes(program, name)
        self._constants: dict[Any, Any] = {}
        self._last_uses: dict[int, list[list[Any]]] = {}
        self._watch: Watch | None = None

    def run(self, inputs: Mapping[str, Array], states: dict[str, Array] | None = None, watch: Watch | None = None) -> dict[str, Array]:
        """Executes the function once.

        Args:
            inputs: Every input, in its shape; values are rounded to its dtype.
            states: The states by name, zeros where one is missing; changed in place.
            watch: Sees every value; not to change them.

        Returns:
            The outputs by name, in the dtypes that the program declares.

        Raises:
            UsageError: An input is missing, unknown, or has a shape that the program does not take; all of these are listed.
            IsthmusError: An operation fails, or its result does not have the shape that the program declares.
        """
        self._check(inputs)
        states = {} if states is None else states
        for name, (shape, dtype) in self.states.items():
            states.setdefault(name, np.zeros([size or 1 for size in shape], dtype))
        values: dict[Any, Any] = {}
        self._watch = watch
        # What overflows becomes infinite, as on the device, and is for the caller to judge.
        with np.errstate(all="ignore"):
            for name, (_, dtype) in self.inputs.items():
                self._keep(self._function.inputs[name], rounded(np.asarray(inputs[name]), dtype), values)
            results = self._block(self._function, values, states)
        return dict(zip(self.outputs, results, strict=True))

    def _check(self, inputs: Mapping[str, Array]) -> None:
        reasons = [Reason("is missing", where=name) for name in self.inputs if name not in inputs]
        reasons += [
            Reason("is no input", where=name, fix=f"inputs are {', '.join(self.inputs)}") for name in inputs if name not in self.inputs
        ]
        for name, (shape, _) in self.inputs.items():
            got = np.shape(inputs[name]) if name in inputs else None
            if got is None:
                continue
            if name in self._accepted and got not in self._accepted[name]:
                reasons.append(Reason(f"has shape {got}, expected {self._accepted[name]}", where=name))
            elif len(got) != len(shape) or any(s is not None and s != g for s, g in zip(shape, got, strict=True)):
                reasons.append(Reason(f"has shape {got}, expected {shape}", where=name))
        if reasons:
            raise UsageError("the inputs do not fit the program", reasons=reasons)

    def _block(self, block: Any, values: dict[Any, Any], states: dict[str, Array]) -> list[Any]:
        for operation, dead in zip(block.operations, self._dead_after(block), strict=True):
            if operation.op_type != "const" and not operation.op_type.startswith(_WEIGHT):
                self._execute(operation, values, states)
            for variable in dead:
                values.pop(variable, None)
        return [self._value(v, values) for v in block.outputs]

    def _execute(self, operation: Any, values: dict[Any, Any], states: dict[str, Array]) -> None:
        results = self._step(operation, values, states)
        for variable, result in zip(operation.outputs, results, strict=True):
            self._keep(variable, _declared(variable, result), values)

    def _keep(self, variable: Any, value: Any, values: dict[Any, Any]) -> None:
        values[variable] = value
        if self._watch is not None and not (variable.op is not None and variable.op.op_type.startswith(_WEIGHT)):
            self._watch(variable.name, value)

    def _dead_after(self, block: Any) -> list[list[Any]]:
        """For each operation, the values of this block that nothing reads after it."""
        if id(block) not in self._last_uses:
            last = {v: i for i, op in enumerate(block.operations) for v in (*op.outputs, *used_by(op))}
            for op in reversed(block.operations):
                if op.op_type.startswith(_WEIGHT):  # is computed when its result is asked for, and reads its inputs then
                    end = max(last[v] for v in op.outputs)
                    last.update({v: max(last[v], end) for v in used_by(op)})
            own = {v for op in block.operations for v in op.outputs} - set(block.outputs)
            dead: list[list[Any]] = [[] for _ in block.operations]
            for variable, i in last.items():
                if variable in own:
                    dead[i].append(variable)
            self._last_uses[id(block)] = dead
        return self._last_uses[id(block)]

    def _value(self, variable: Any, values: dict[Any, Any]) -> Any:
        if isinstance(variable, list | tuple):
            return tuple(self._value(v, values) for v in variable)
        if variable in values:
            return values[variable]
        if variable not in self._constants:
            if variable.op is not None and variable.op.op_type.startswith(_WEIGHT):
                self._execute(variable.op, values, {})
                return values[variable]
            if variable.val is None:
                raise IsthmusError(f"the program reads {variable.name} before it is computed")
            self._constants[variable] = variable.val if isinstance(variable.val, str) else np.asarray(variable.val)
        return self._constants[variable]

    def _step(self, operation: Any, values: dict[Any, Any], states: dict[str, Array]) -> tuple[Any, ...]:
        kind = operation.op_type
        if kind == "while_loop":
            return self._loop(operation, values, states)
        if kind == "cond":
            branch = operation.blocks[0 if bool(self._value(operation.pred, values)) else 1]
            return tuple(self._block(branch, values, states))
        if kind == "read_state":
            return (states[operation.input.name].copy(),)
        if kind in ("write_state", "coreml_update_state"):
            target = operation.inputs["input" if kind == "write_state" else "state"]
            value = self._value(operation.inputs["data" if kind == "write_state" else "value"], values)
            states[target.name] = np.array(value)
            return (states[target.name].copy(),) if operation.outputs else ()
        given = {name: widened(self._value(v, values)) for name, v in operation.inputs.items() if v is not None}
        try:
            result = OPERATIONS[kind](**given)
        except IsthmusError:
            raise
        except Exception as error:  # numpy raises what it likes
            raise IsthmusError(f"{kind} {operation.name!r} failed: {error}") from error
        return result if isinstance(result, tuple) else (result,)

    def _loop(self, operation: Any, values: dict[Any, Any], states: dict[str, Array]) -> tuple[Any, ...]:
        condition, body = operation.blocks
        carried = [self._value(v, values) for v in operation.loop_vars]
        while True:
            values.update(zip(condition.inputs, carried, strict=True))
            if not bool(self._block(condition, values, states)[0]):
                return tuple(carried)
            for variable, value in zip(body.inputs, carried, strict=True):
                self._keep(variable, value, values)
            carried = self._block(body, values, states)


def _size(size: Any) -> int | None:
    """A size; None when it is symbolic."""
    return int(size) if isinstance(size, int | np.integer) else None


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(_DTYPES.get(name, name))


def _declared(variable: Any, result: Any) -> Array:
    """The result in the dtype and shape that the program declares.

    Raises:
        IsthmusError: It has another shape.
    """
    from coremltools.converters.mil.mil import types

    value = np.asarray(result)
    shape = tuple(_size(s) for s in (variable.shape or ()))
    if value.shape != shape and any(s is not None for s in shape) and value.size == 1 and all(s in (1, None) for s in shape):
        value = value.reshape([1] * len(shape))  # a scalar that MIL holds as a vector of one, and the other way round
    if len(value.shape) != len(shape) or any(s is not None and s != g for s, g in zip(shape, value.shape, strict=True)):
        where = f"{variable.op.op_type} {variable.name!r}"
        raise IsthmusError(f"{where} has shape {value.shape}, the program declares {tuple(variable.shape)}")
    # Integers below a byte are kept in whole bytes.
    name = types.builtin_to_string(variable.dtype)
    narrow = {"int4": "int8"}.get(name, "uint8" if name.startswith("uint") and name not in ("uint16", "uint32") else name)
    return rounded(value, _dtype(narrow))
