"""The small models of the registry, laid out: the same numbers as in their plain form."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch.export import ExportedProgram

from isthmus.exporter.errors import UnsupportedError
from isthmus.exporter.quiet import quiet
from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.targets.coreml.convert import decomposed
from isthmus.targets.coreml.layout import left, split_einsum, to_ane, unsupported
from isthmus.targets.coreml.layout.graph import operator_of

from ....architectures import TINY, marks_of

TRANSPOSES = {
    # One for the keys of each attention, one behind the last layer (unpatchify), and one or two before the first.
    "dit-tiny": (10, 4),
    "dit-digits": (34, 10),
    # The linear attention of ours has its own layout, with heads; so has what the captions come in.
    "sana-tiny": (11, 5),
    "sana-digits": (21, 9),
    # The scans of ours take (B, L, D): five transposes each, of two for each block, and the folds between the resolutions.
    "diffussm-tiny": (28, 24),
    "diffussm-digits": (55, 47),
}
"""Transposes that are left with `--layout ane`, and when attention is split as well."""

OTHERS = [pytest.param(name, marks=marks_of(name, quick=False, first=False)) for name in TINY if name not in TRANSPOSES]


Inputs = list[tuple[torch.Tensor, ...]]


def _exported(name: str) -> tuple[ExportedProgram, Inputs]:
    """A model, and two sets of inputs."""
    spec = MODELS[name].spec()
    module = random_weights(spec, seed=0)
    inputs = [tuple(spec.inputs(np.random.Generator(np.random.PCG64(seed)), spec.sizes).values()) for seed in (0, 1)]
    with quiet("torch.export"):
        return decomposed(torch.export.export(module, inputs[0], strict=False)), inputs


def _laid_out(program: ExportedProgram, inputs: Inputs, *, both: bool) -> tuple[ExportedProgram, ExportedProgram]:
    """A model laid out, and with its attention split too: the same numbers, of `both` or of the second, which is made of the first."""
    expected = _results(program, inputs)
    laid_out = to_ane(program)
    split = split_einsum(laid_out)
    for result in (laid_out, split) if both else (split,):
        for a, b in zip(_results(result, inputs), expected, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            if not b.is_floating_point():
                assert torch.equal(a, b)
                continue
            assert b.abs().max() > 0.0
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    return laid_out, split


@pytest.mark.parametrize("name", OTHERS)
def test_every_tiny_model_is_the_same_laid_out_or_refused(name: str) -> None:
    program, inputs = _exported(name)
    if reasons := unsupported(program):
        for lay_out in (to_ane, split_einsum):
            with pytest.raises(UnsupportedError, match="takes fixed sizes") as error:
                lay_out(program)
            assert error.value.reasons == tuple(reasons)
        return
    laid_out, _ = _laid_out(program, inputs, both=True)
    assert _counts(laid_out) != _counts(program) or left(program), "a model that is taken is laid out, or it is said what stays"


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.matrix] * name.endswith("-digits")) for name in TRANSPOSES])
def test_a_network_of_blocks_keeps_the_layout(name: str) -> None:
    program, inputs = _exported(name)
    laid_out, split = _laid_out(program, inputs, both=name.endswith("-tiny"))
    assert left(split, split=True) == [], "every linear layer, norm, look-up, sum and attention has its form in the layout"
    plain, calls, parts = _counts(program), _counts(laid_out), _counts(split)
    assert calls["conv2d"] == plain["conv2d"] + plain["linear"] + plain["embedding"]
    assert not set(parts) & {"linear", "embedding", "layer_norm", "rms_norm", "cumsum", "scaled_dot_product_attention", "index"}
    moved = _transposes(calls), _transposes(parts)
    layers = plain["linear"] + plain["embedding"] + plain["layer_norm"] + plain["rms_norm"]
    assert moved[1] <= moved[0] <= (_transposes(plain) + 2 * layers) / 2, "layers keep the layout of those before them"
    assert moved == TRANSPOSES.get(name, moved)


def _results(program: ExportedProgram, inputs: Inputs) -> list[torch.Tensor]:
    module = program.module()
    with torch.no_grad():
        results = [module(*given) for given in inputs]
    return [tensor for result in results for tensor in (result if isinstance(result, tuple | list) else [result])]


def _counts(program: ExportedProgram) -> Counter[str]:
    return Counter(operator_of(node) for node in program.graph.nodes if node.op == "call_function")


def _transposes(counts: Counter[str]) -> int:
    return counts["permute"] + counts["transpose"]
