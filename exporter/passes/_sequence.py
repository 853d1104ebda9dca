"""The order of the passes, as a contract, and the entry that runs them."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .fold_constants import FoldConstants
from .fold_shapes import FoldShapes
from .fold_transposes import FoldTransposes
from .fuse_attention import FuseAttention
from .fuse_gelu import FuseGelu
from .fuse_layer_normalization import FuseLayerNormalization
from .fuse_rms_normalization import FuseRMSNormalization
from .gather_slices import GatherSlices
from .infer_shapes import InferShapes
from .keep_reduced_axes import KeepReducedAxes
from .merge_duplicates import MergeDuplicates
from .merge_reshaped_transposes import MergeReshapedTransposes
from .name_values import NameValues
from .remove_noops import RemoveNoOps
from .repair_squeeze import RepairSqueeze
from .scope import RecordScopes
from .split_sequences import SplitSequences

_ROUNDS = 8  # the deepest chain seen needs four; the bound is against two passes that undo each other


def passes(fuse: bool = True) -> tuple[ir.passes.PassBase, ...]:
    """The passes in the order in which `optimise` runs them. The third runs to a fixed point of at most eight rounds."""
    simplify = ir.passes.PassManager(
        [
            InferShapes(),
            RemoveNoOps(),
            FoldTransposes(),
            FoldConstants(),
            FoldShapes(),
            SplitSequences(),
            GatherSlices(),
            MergeReshapedTransposes(),
            KeepReducedAxes(),
            RemoveUnusedNodesPass(),
            MergeDuplicates(),
        ],
        steps=_ROUNDS,
    )
    fusions = [FuseLayerNormalization(), FuseRMSNormalization(), FuseGelu(), FuseAttention()] if fuse else []
    return (RepairSqueeze(), RecordScopes(), simplify, *fusions, simplify, NameValues())


def optimise(model: ir.Model, *, fuse: bool = True) -> ir.Model:
    """Simplifies a model that torch.onnx.export(optimize=False) made. The model is changed in place, and returned.

    Args:
        model: The model; its weights are neither read nor copied.
        fuse: Whether to replace hand-written normalisations, GELUs and attention by the opset's own operators.

    Returns:
        The same model.
    """
    for each in passes(fuse):
        each(model)
    return model
