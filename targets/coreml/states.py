"""States: the values that a recurrent model carries from call to call, kept by Core ML instead of by the caller.

A step has its states as inputs and as outputs (docs/streaming.md), and is exported and measured as such; what Core ML is to keep is named
with `--states`. Buffers that a module changes in place become states as well when it is converted (`convert`); they cannot be measured
call by call, and `isthmus export` asks for inputs and outputs instead.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...exporter.errors import Reason
from ...exporter.quiet import quiet
from .convert import identifiers, user_inputs

if TYPE_CHECKING:
    from torch.export import ExportedProgram

SINCE = "iOS18"
"""The oldest system that has states."""


@dataclass(frozen=True)
class State:
    """A value that Core ML keeps.

    Attributes:
        name: Its name in the package, and among the inputs of the program.
        output: The name of the output that is its value after the call.
        shape: Its sizes. It is kept in float16, and zero at first.
    """

    name: str
    output: str
    shape: tuple[int, ...]


def unsupported(
    program: ExportedProgram, input_names: Sequence[str], output_names: Sequence[str], states: Sequence[str], deployment_target: str
) -> list[Reason]:
    """Why these inputs cannot be states, or the buffers that the program changes, for that system; empty when they can.

    Args:
        program: The program, states among its inputs and outputs.
        input_names: The names of its inputs.
        output_names: The names of its outputs.
        states: The inputs to keep, in the order of the outputs that replace them, which are the last ones.
        deployment_target: `iOS16`, `iOS17`, …
    """
    changed = sorted(program.graph_signature.buffers_to_mutate.values())
    reasons = []
    if (states or changed) and int(deployment_target.removeprefix("iOS")) < int(SINCE.removeprefix("iOS")):
        what = f"states are kept since {SINCE}, got {deployment_target}"
        reasons.append(Reason(what, where=", ".join([*states, *changed]), fix=f"--minimum-deployment-target {SINCE}"))
    known = f"the inputs are {', '.join(input_names)}"
    reasons += [Reason("is no input", where=f"--states {name}", fix=known) for name in dict.fromkeys(states) if name not in input_names]
    reasons += [Reason("is named twice", where=f"--states {name}") for name in dict.fromkeys(states) if list(states).count(name) > 1]
    if len(states) >= len(output_names):
        what = f"{len(states)} states need as many outputs behind at least one other, got {len(output_names)} outputs"
        reasons.append(Reason(what, where="--states", fix="return the outputs, and then each state after the call"))
    if reasons or not states:
        return reasons
    values = dict(zip(input_names, (value for _, value in user_inputs(program)), strict=True))
    after = dict(zip(output_names, _returned(program), strict=True))
    for name, output in zip(states, output_names[-len(states) :], strict=True):
        before, behind = values[name], after[output]
        if not all(isinstance(size, int) for size in before.shape):
            reasons.append(
                Reason(f"has the shape {tuple(map(str, before.shape))}, and a state has one size", where=name, fix="--shapes fixed")
            )
        elif before.shape != behind.shape:
            what = f"has the shape {tuple(before.shape)}, and {output}, which replaces it, {tuple(behind.shape)}"
            reasons.append(Reason(what, where=name, fix="name the states in the order of the last outputs"))
        if not before.dtype.is_floating_point:
            reasons.append(Reason(f"is {before.dtype}, and Core ML keeps float16", where=name, fix="leave it an input"))
    return reasons


def with_states(
    program: ExportedProgram, input_names: Sequence[str], output_names: Sequence[str], states: Sequence[str]
) -> tuple[ExportedProgram, list[State]]:
    """Turns inputs into buffers that the program changes, which become Core ML's states when it is converted.

    Args:
        program: From torch.export, after `decomposed`, to which `unsupported` has no reason.
        input_names: The names of its inputs.
        output_names: The names of its outputs.
        states: See `unsupported`.

    Returns:
        A program that takes the other inputs and returns the other outputs, and shares its tensors with the one given, which is not
        changed; and the states, in the order of their outputs.
    """
    import torch
    from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument

    kept = {
        name: State(plain, output, tuple(int(n) for n in value.shape))
        for name, plain, (_, value) in zip(input_names, identifiers(input_names), user_inputs(program), strict=True)
        for output in ([output_names[len(output_names) - len(states) + list(states).index(name)]] if name in states else [])
    }
    found = [kept[name] for name in states]
    with quiet():  # torch deprecates what its own copies use
        signature = copy.deepcopy(program.graph_signature)
        module = copy.deepcopy(program.graph_module)
    given = iter(input_names)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for i, (spec, node) in enumerate(zip(list(signature.input_specs), placeholders, strict=True)):
        if spec.kind != InputKind.USER_INPUT or (name := next(given)) not in kept:
            continue
        # coremltools keeps states and the placeholders that read them under one roof: as torch does, these get names of their own.
        with module.graph.inserting_before(node):
            buffer = module.graph.placeholder(f"b_{kept[name].name}")
        buffer.meta = node.meta
        node.replace_all_uses_with(buffer)
        module.graph.erase_node(node)
        signature.input_specs[i] = InputSpec(InputKind.BUFFER, TensorArgument(name=buffer.name), kept[name].name, persistent=True)
    (last,) = (node for node in module.graph.nodes if node.op == "output")
    results: list[Any] = list(last.args[0])
    # torch.export lists what is changed before what is returned.
    specs, own = list(signature.output_specs), len(results) - len(output_names)
    moved = len(results) - len(found)
    for place, state in enumerate(found):
        spec = specs[moved + place]
        specs[moved + place] = OutputSpec(OutputKind.BUFFER_MUTATION, spec.arg, state.name)
    last.args = ((*results[:own], *results[moved:], *results[own:moved]),)
    signature.output_specs[:] = [*specs[:own], *specs[moved:], *specs[own:moved]]
    module.recompile()
    example: tuple[Any, Any] | None = None
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        example = (tuple(value for name, value in zip(input_names, args, strict=True) if name not in kept), kwargs)
    return torch.export.ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict={**program.state_dict, **{state.name: torch.zeros(state.shape) for state in found}},
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=example,
        constants=program.constants,
        verifiers=program.verifiers,
    ), found


def _returned(program: ExportedProgram) -> list[Any]:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    return [values[str(name)] for name in program.graph_signature.user_outputs]
