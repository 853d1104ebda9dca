"""Our operators, the float64 reference and the torch operator, against independent implementations.

Linear attention and RWKV-7: the recurrent forms of fla-core (Yang and Zhang), which compute in float32. Selective scan and causal
convolution: the ones of transformers' Mamba. SANA's attention: diffusers' processor, with its projections of queries, keys and values.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from fla.ops.retention.naive import naive_retention
from fla.ops.simple_gla.naive import naive_recurrent_simple_gla
from torch.nn.functional import normalize
from transformers.models.mamba.modeling_mamba import causal_conv1d_update, mamba_selective_scan, mamba_selective_state_update

from isthmus.exporter.op import OPS

from .compare import assert_close

SIZES = [(2, 70, 2, 8, 6), (1, 33, 3, 16, 16)]
"""batch, length, heads, key, value; the lengths are past a chunk's."""


def draw(seed: int, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    rng = np.random.Generator(np.random.PCG64(seed))
    return {name: torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2)


def heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2)


def assert_ours(name: str, inputs: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], **attributes: object) -> None:
    op = OPS[name]
    reference = op.part("reference").reference({n: x.numpy() for n, x in inputs.items()}, op.resolve(attributes))
    op.part("torch")
    results = getattr(torch.ops.isthmus, name)(**inputs, **attributes)
    results = results if isinstance(results, tuple) else (results,)
    for argument, result in zip(op.outputs, results, strict=True):
        if argument.name in theirs:
            expected = theirs[argument.name]
            assert_close(torch.from_numpy(reference[argument.name]).float(), expected)
            assert_close(result, expected)


def attention(size, seed):
    batch, length, heads, key, value = size
    tokens = (batch, length, heads)
    x = draw(
        seed,
        q=(*tokens, key),
        k=(*tokens, key),
        v=(*tokens, value),
        g=tokens,
        gk=(*tokens, key),
        beta=tokens,
        state=(batch, heads, key, value),
    )
    x["g"], x["gk"], x["beta"] = -torch.exp(x["g"] - 2), -torch.exp(x["gk"] - 2), x["beta"].sigmoid()
    return x


def ours_of(x, *names):
    return {name: flat(x[name]) for name in ("q", "k", "v")} | {"initial_state": x["state"]} | dict(names)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rule", ["linear", "gated", "gated, a key channel", "delta", "gated_delta"])
def test_linear_attention(rule, size):
    x = attention(size, 1)
    if "delta" in rule:
        x["k"] = normalize(x["k"], dim=-1)
    q, k, v, state = (x[n] for n in ("q", "k", "v", "state"))
    first = [heads_first(t) for t in (q, k, v)]
    if rule == "linear":
        y, last = naive_recurrent_linear_attn(q, k, v, initial_state=state, output_final_state=True)
    elif rule == "gated":
        y, last = naive_recurrent_simple_gla(q, k, v, x["g"], initial_state=state)
    elif rule == "gated, a key channel":
        y, last = naive_recurrent_gla(q, k, v, x["gk"], initial_state=state, output_final_state=True)
    elif rule == "delta":
        y, last = delta_rule_recurrence(*first, heads_first(x["beta"]), initial_state=state)
        y = heads_first(y)
    else:
        y, last = naive_recurrent_gated_delta_rule(q, k, v, x["beta"], x["g"], initial_state=state, output_final_state=True)
    inputs = ours_of(x)
    if "gated" in rule:
        inputs["decay"] = flat(x["gk"]) if "key" in rule else x["g"]
    if "delta" in rule:
        inputs["beta"] = x["beta"]
    heads = {"q_num_heads": size[2], "kv_num_heads": size[2]}
    assert_ours("linear_attention", inputs, {"y": flat(y), "last_state": last}, update_rule=rule.partition(",")[0], **heads)


@pytest.mark.parametrize("size", SIZES)
def test_retention(size):
    x = attention(size, 2)
    y = naive_retention(*(heads_first(x[n]) for n in ("q", "k", "v")))
    decay = torch.log(1.0 - 2.0 ** (-5.0 - torch.arange(size[2], dtype=torch.float32))).expand(*size[:3])
    inputs = {n: flat(x[n]) for n in ("q", "k", "v")} | {"decay": decay.contiguous()}
    theirs = {"y": flat(heads_first(y))}
    assert_ours("linear_attention", inputs, theirs, update_rule="gated", q_num_heads=size[2], kv_num_heads=size[2])


@pytest.mark.parametrize("size", SIZES)
def test_rwkv7(size):
    batch, length, heads, key, _ = size
    x = attention(size, 3)
    removal = normalize(draw(4, a=(batch, length, heads, key))["a"], dim=-1)
    x |= {"a": -removal, "b": removal * x["beta"][..., None]}
    # Their recurrence scales q by 1 / sqrt(key), RWKV-7 does not.
    y, last = dplr_recurrence(
        *(heads_first(t) for t in (x["q"] * key**0.5, x["k"], x["v"], x["a"], x["b"], x["gk"])), initial_state=x["state"]
    )
    inputs = {"r": flat(x["q"]), "decay": flat(x["gk"]), "initial_state": x["state"]} | {n: flat(x[n]) for n in ("k", "v", "a", "b")}
    assert_ours("rwkv7", inputs, {"y": flat(heads_first(y)), "last_state": last}, num_heads=heads)


@pytest.mark.parametrize(("batch", "length", "channels", "state"), [(2, 70, 6, 4), (1, 130, 5, 16)])
@pytest.mark.parametrize("everything", [True, False])
def test_selective_scan(batch, length, channels, state, everything):
    tokens = (batch, length, channels)
    matrix = (batch, length, state)
    x = draw(5, u=tokens, delta=tokens, A=(channels, state), B=matrix, C=matrix, D=(channels,), z=tokens, delta_bias=(channels,))
    x["A"] = -x["A"].exp()
    if not everything:
        x["delta"] = x["delta"].exp() * 0.1
        for name in ("D", "z", "delta_bias"):
            del x[name]
    channels_first = {n: heads_first(x[n]) for n in ("B", "C", "z") if n in x}
    rest = {n: x[n] for n in ("D", "delta_bias") if n in x}
    y, last = mamba_selective_scan(
        heads_first(x["u"]), heads_first(x["delta"]), x["A"], **channels_first, **rest, delta_softplus=everything, return_last_state=True
    )
    assert_ours("selective_scan", x, {"y": heads_first(y).contiguous(), "last_state": last}, delta_softplus=everything)


def test_selective_scan_step():
    batch, channels, state = 3, 6, 4
    shapes = {"u": (batch, channels), "delta": (batch, channels), "A": (channels, state), "B": (batch, state), "C": (batch, state)}
    x = draw(6, **shapes, D=(channels,), z=(batch, channels), delta_bias=(channels,), state=(batch, channels, state))
    x["A"] = -x["A"].exp()
    theirs = x["state"].clone()
    y = mamba_selective_state_update(
        theirs, x["u"], x["delta"], x["A"], x["B"], x["C"], D=x["D"], dt_bias=x["delta_bias"], dt_softplus=True, z=x["z"]
    )
    ours, last = OPS["selective_scan"].part("torch").selective_scan_step(**x, delta_softplus=True)
    assert_close(ours, y)
    assert_close(last, theirs)


@pytest.mark.parametrize("silu", [True, False])
def test_causal_conv1d(silu):
    x = draw(7, x=(2, 6, 41), weight=(6, 1, 4), bias=(6,), initial_state=(2, 6, 3))
    last = x["initial_state"].clone()
    y = causal_conv1d_update(x["x"], last, x["weight"][:, 0], x["bias"], "silu" if silu else None)
    assert_ours("causal_conv1d", x, {"y": y, "last_state": last}, silu=silu)


def test_normalized_linear_attention():
    heads, width = 3, 8
    attn = Attention(query_dim=heads * width, heads=heads, dim_head=width, bias=False, processor=SanaLinearAttnProcessor2_0()).eval()
    x = draw(8, q=(2, 50, heads * width))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for layer in (attn.to_q, attn.to_k, attn.to_v):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.weight.shape[1] ** 0.5)
        attn.to_out[0].weight.copy_(torch.eye(heads * width))
        attn.to_out[0].bias.zero_()
        theirs = attn(x["q"])
        inputs = {"q": attn.to_q(x["q"]), "k": attn.to_k(x["q"]), "v": attn.to_v(x["q"])}
    assert_ours("normalized_linear_attention", inputs, {"y": theirs}, num_heads=heads)
