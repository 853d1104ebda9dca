"""Rewrites a PyTorch program for Apple's Neural Engine: what it computes stays, how it is written changes.

The engine works on tensors (B, C, 1, S), multiplies by convolutions and einsums, and has neither gathers nor cumulative sums. Each rewrite
is one file, whose text shows the graph before and after; `settle` then takes away the transposes between them, so that long chains of
layers stay in that layout. Which operations run on the engine is for Core ML to decide: `targets/coreml/rules` says what is likely.
The bodies of branches and loops (`torch.cond`, `while_loop`) stay as they are: the engine runs neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....exporter.errors import Reason, UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram


def to_ane(program: ExportedProgram) -> ExportedProgram:
    """The program in the layout of the Neural Engine.

    Args:
        program: From `lowerings.decomposed`, of fixed sizes; see `unsupported`.

    Returns:
        A program with the same inputs and outputs, whose linear layers are convolutions over (B, C, 1, S), but for what `left` names. It
        shares its tensors with the one given, which is not changed.

    Raises:
        UnsupportedError: Its sizes vary; the reasons are those of `unsupported`.
    """
    from .cumulative_sum import cumulative_sum_as_product
    from .gather import gather_as_product
    from .graph import Editor
    from .layer_norm import layer_norm_over_channels
    from .linear import linear_as_convolution
    from .masks import finite_masks
    from .rms_norm import safe_rms_norm
    from .settle import settle

    _check(program)
    editor = Editor(program)
    for rewrite in (
        gather_as_product,  # look-ups become linear layers, which become convolutions
        cumulative_sum_as_product,
        finite_masks,
        safe_rms_norm,
        layer_norm_over_channels,
        linear_as_convolution,
    ):
        rewrite(editor)
    return settle(editor.finish())


def split_einsum(program: ExportedProgram) -> ExportedProgram:
    """The program with its attention computed head by head, in the layout of the Neural Engine; see `to_ane`."""
    from .graph import Editor
    from .masks import finite_masks
    from .settle import settle
    from .split_attention import attention_by_heads

    _check(program)
    editor = Editor(program)
    finite_masks(editor)
    attention_by_heads(editor)
    return settle(editor.finish())


def left(program: ExportedProgram, *, split: bool = False) -> list[Reason]:
    """What `to_ane` left as it was, and why: the linear layers, norms, look-ups and cumulative sums that have no form in the layout.

    Args:
        program: What `to_ane` returned, or what it will be given.
        split: Whether attention is to be split as well.
    """
    from . import cumulative_sum, gather, layer_norm, linear, rms_norm, split_attention
    from .graph import Editor, operator_of, scope_of

    editor = Editor(program)
    rewrites = (gather, cumulative_sum, rms_norm, layer_norm, linear, *((split_attention,) if split else ()))
    obstacles = {target: rewrite.obstacle for rewrite in rewrites for target in rewrite.TARGETS}
    found = ((node, obstacles[node.target](editor, node)) for node in editor.calls(*obstacles))
    return [Reason(f"{operator_of(node)} stays as it is: {why}", where=scope_of(node)) for node, why in found if why]


def unsupported(program: ExportedProgram) -> list[Reason]:
    """Every reason why a program cannot be laid out: sizes that vary. What has no form in the layout stays as it is, and is no reason."""
    import torch

    from .graph import scope_of

    reasons: list[Reason] = []
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node in inputs:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or _fixed(value):
            if isinstance(value, torch.SymInt):
                what = "the input is a number that varies, and the layout of the Neural Engine takes fixed sizes"
                reasons.append(Reason(what, where=node.name, fix="export with --shapes fixed, or with --layout plain"))
            continue
        shape = ", ".join(map(str, value.shape))
        what = f"the input has the shape ({shape}), and the layout of the Neural Engine takes fixed sizes"
        reasons.append(Reason(what, where=node.name, fix="export with --shapes fixed, or with --layout plain"))
    for node in () if reasons else program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and not _fixed(value):
            what = f"the size of {node.name} depends on data, and the layout of the Neural Engine takes fixed sizes"
            return [Reason(what, where=scope_of(node), fix="export with --layout plain")]  # and with it all that is computed from it
    return reasons


def _check(program: ExportedProgram) -> None:
    if reasons := unsupported(program):
        raise UnsupportedError("the layout of the Neural Engine takes fixed sizes", reasons=reasons)


def _fixed(value: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in value.shape)
