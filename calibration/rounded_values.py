"""The values inside a traced PyTorch program whose arithmetic is rounded to a dtype; see `half`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from ..exporter.errors import IsthmusError
from ..exporter.flow import Flow, Step, Values
from ..exporter.spec import Arrays
from .half import module_path, run_rounded
from .verify import to_array, to_tensors


class RoundedValues(Values):
    """A traced program in PyTorch, rounded as `torch.autocast` would hold its values.

    Args:
        program: The traced program, in float32.
        example: Example inputs, for the inputs' types and order.
        dtype: `torch.float16` or `torch.bfloat16`.
        keep: Module paths that stay in float32.
    """

    def __init__(
        self, program: torch.export.ExportedProgram, example: Mapping[str, torch.Tensor], dtype: torch.dtype, keep: Collection[str] = ()
    ) -> None:
        self._program, self._example, self._dtype, self._keep = program, example, dtype, frozenset(keep)
        self.flow = flow_of(program.module().graph, list(example))
        self._placeholders = dict(zip(_placeholders(program.module().graph), example, strict=True))
        self.device = f"PyTorch {torch.__version__}, rounded to {str(dtype).removeprefix('torch.')}"

    def shapes(self, inputs: Arrays, names: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
        """See `Values.shapes`."""
        wanted, found = frozenset(names), {name: np.shape(inputs[name]) for name in names if name in inputs}

        def watch(name: str, value: Any) -> None:
            if name in wanted and isinstance(value, torch.Tensor):
                found[name] = tuple(value.shape)

        self._run(inputs, watch)
        return found

    def read(self, inputs: Arrays, names: Sequence[str]) -> Mapping[str, np.ndarray[Any, Any]]:
        """See `Values.read`."""
        wanted, found = frozenset(names), {name: np.asarray(inputs[name]) for name in names if name in inputs}

        def watch(name: str, value: Any) -> None:
            if name in wanted and isinstance(value, torch.Tensor):
                found[name] = to_array(value)

        self._run(inputs, watch)
        return found

    def _run(self, inputs: Arrays, watch: Any) -> None:
        tensors = to_tensors({name: inputs[name] for name in self._example}, self._example)
        try:
            run_rounded(self._program, tensors, self._dtype, self._keep, watch)
        except (AssertionError, RuntimeError) as error:
            raise IsthmusError(
                f"the traced program does not take these inputs: {error}", hint="give a case whose sizes the program was traced for"
            ) from error


def flow_of(graph: fx.Graph, names: Sequence[str]) -> Flow:
    """The graph of a traced module as a list of steps.

    Args:
        graph: Of `ExportedProgram.module()`.
        names: The names of the inputs, in order; they replace those of the placeholders.
    """
    renamed = dict(zip(_placeholders(graph), names, strict=True))
    steps = tuple(
        Step(n.name, _operator(n), module_path(n), tuple(renamed.get(a.name, a.name) for a in n.all_input_nodes), (n.name,))
        for n in graph.nodes
        if n.op == "call_function"
    )
    (output,) = (n for n in graph.nodes if n.op == "output")
    returned = tuple(renamed.get(a.name, a.name) for a in torch.utils._pytree.tree_leaves(output.args) if isinstance(a, fx.Node))
    return Flow(steps, tuple(names), returned)


def _placeholders(graph: fx.Graph) -> Iterator[str]:
    yield from (n.name for n in graph.nodes if n.op == "placeholder")


def _operator(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]
