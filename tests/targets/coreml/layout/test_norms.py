"""Norms over channels, and those that stay: in float64 the program before and after gives the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isthmus.targets.coreml.layout import left, to_ane
from isthmus.targets.coreml.layout.layer_norm import layer_norm_over_channels
from isthmus.targets.coreml.layout.rms_norm import safe_rms_norm


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rewrites = _load("rewrites")
normal, operators = rewrites.normal, rewrites.operators


_SHAPES = [((2, 6, 8), (8,)), ((3, 8), (8,)), ((2, 3, 4, 8), (8,)), ((2, 3, 4, 8), (4, 8)), ((2, 4, 8), (2, 4, 8)), ((1, 1, 1), (1,))]


@pytest.mark.parametrize("affine", ["", "weight", "weight and bias", "computed"])
def test_layer_norms(affine: str, function, exported, rewritten, same) -> None:
    def call(m, *xs):
        for x, (_, axes) in zip(xs, _SHAPES, strict=True):
            size = torch.Size(axes).numel()
            weight, bias = m.weight[:size].reshape(axes) if affine else None, m.bias[:size].reshape(axes) if "bias" in affine else None
            if size == 8 and affine != "computed":
                weight, bias = m.eight if affine else None, m.eight if "bias" in affine else None
            yield F.layer_norm(x, axes, weight, bias, 1e-3)

    module = function(lambda *given: tuple(call(*given)), weight=normal(64), bias=normal(64, seed=1), eight=normal(8))
    inputs = [normal(*shape, seed=2) * 3 + 1 for shape, _ in _SHAPES]
    program = exported(module, *inputs)
    result = rewritten(program, layer_norm_over_channels)
    assert "layer_norm" not in operators(result)
    inputs[0][0] = 2.0  # of variance 0
    same(result, program, *inputs, bound=1e-12)


def test_rms_norms(function, exported, rewritten, same) -> None:
    def call(m, *xs):
        for x, (_, axes) in zip(xs, _SHAPES, strict=True):
            for weight in (None, m.eight if axes == (8,) else m.weight[: torch.Size(axes).numel()].reshape(axes)):
                yield F.rms_norm(x, axes, weight, 1e-6)
        for eps in (None, 1e-3, 1e-12, 1e-20):
            yield F.rms_norm(xs[0], (8,), m.eight, eps)

    module = function(lambda *given: tuple(call(*given)), weight=normal(64), eight=normal(8))
    program = exported(module, *(normal(*shape) for shape, _ in _SHAPES))
    result = rewritten(program, safe_rms_norm)
    assert "rms_norm" not in operators(result)
    for scale in (1.0, 60000.0, 1e-4, 1e-8):
        inputs = [normal(*shape, seed=2) * scale for shape, _ in _SHAPES]
        for x in inputs[:4]:
            x[0] = 0.0  # rows of zeros
        same(result, program, *inputs, bound=1e-12)


def test_norms_that_share_a_weight(function, exported, rewritten, same) -> None:
    def call(m, x):
        x = F.layer_norm(x, (8,), m.weight, m.weight)
        return F.layer_norm(F.rms_norm(F.rms_norm(x, (8,), m.weight, 1e-3), (8,), m.weight, 1e-3), (8,), m.weight)

    program = exported(function(call, weight=normal(8)), normal(2, 6, 8))
    result = rewritten(program, safe_rms_norm, layer_norm_over_channels)
    assert not operators(result) & {"layer_norm", "rms_norm"}
    same(result, program, normal(2, 6, 8))


def test_norms_that_stay(exported, same) -> None:
    size = 16385
    program = exported(nn.Sequential(nn.LayerNorm(size), nn.RMSNorm([2, size]), nn.Flatten(0), nn.LayerNorm(2 * size)), torch.ones(2, size))
    reasons = left(program)
    assert sorted(reason.what for reason in reasons) == [
        "layer_norm stays as it is: it is over 16385 numbers, and the Neural Engine takes 16384 channels",
        "layer_norm stays as it is: it is over 32770 numbers, and the Neural Engine takes 16384 channels",
        "rms_norm stays as it is: it is over 32770 numbers, and the Neural Engine takes 16384 channels",
    ]
    result = to_ane(program)
    assert left(result) == reasons
    same(result, program, torch.ones(2, size))
    short = exported(nn.LayerNorm(8), torch.ones(8))
    assert [reason.what for reason in left(to_ane(short))] == ["layer_norm stays as it is: its input has no batch"]
