"""The layouts in which SANA's weights are published: diffusers' and the authors' (NVlabs/Sana)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..exporter.errors import Reason, WeightsError
from ..exporter.spec import StateDictLayout
from ..exporter.weights import fuse

if TYPE_CHECKING:
    from .sana import SanaConfig

_DIFFUSERS_NAMES = {
    "patch_embed.proj": "x_embedder.proj",
    "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.0",
    "caption_projection.linear_2": "y_embedder.2",
    "caption_norm": "attention_y_norm",
    "proj_out": "final_layer.linear",
}
_DIFFUSERS_BLOCK_NAMES = {
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.conv_inverted": "mlp.inverted_conv",
    "ff.conv_depth": "mlp.depth_conv",
    "ff.conv_point": "mlp.point_conv",
}


def _from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = {}
    for key in state:
        name, _, kind = key.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)(?:\.(.+))?", name)
        if key == "scale_shift_table":
            converted["final_layer.scale_shift_table"] = state[key]
        elif block is None:
            converted[f"{_DIFFUSERS_NAMES[name]}.{kind}" if name in _DIFFUSERS_NAMES else key] = state[key]
        else:
            source, target, part = f"transformer_blocks.{block[1]}", f"blocks.{block[1]}", block[2]
            if part is None and kind == "scale_shift_table":
                converted[f"{target}.scale_shift_table"] = state[key]
            elif part in _DIFFUSERS_BLOCK_NAMES:
                converted[f"{target}.{_DIFFUSERS_BLOCK_NAMES[part]}.{kind}"] = state[key]
            elif part in ("attn1.to_q", "attn1.to_k", "attn1.to_v"):
                fuse(state, [f"{source}.attn1.to_{x}.{kind}" for x in "qkv"], converted, f"{target}.attn.qkv.{kind}")
            elif part in ("attn2.to_k", "attn2.to_v"):
                fuse(state, [f"{source}.attn2.to_{x}.{kind}" for x in "kv"], converted, f"{target}.cross_attn.kv_linear.{kind}")
            else:
                converted[key] = state[key]
    return converted


def diffusers_layout(config: SanaConfig) -> StateDictLayout:
    """The names of diffusers' SanaTransformer2DModel, and the settings that its folders give."""
    return StateDictLayout(
        "diffusers",
        lambda keys: "patch_embed.proj.weight" in keys,
        _from_diffusers,
        config={
            "num_attention_heads": config.hidden_size // config.head_dim,
            "attention_head_dim": config.head_dim,
            "num_layers": config.depth,
            "num_cross_attention_heads": config.num_cross_heads,
            "cross_attention_head_dim": config.hidden_size // config.num_cross_heads,
            "cross_attention_dim": config.hidden_size,
            "caption_channels": config.caption_channels,
            "mlp_ratio": config.mlp_ratio,
            "in_channels": config.in_channels,
            "out_channels": config.in_channels,
            "patch_size": config.patch_size,
            "attention_bias": False,
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "interpolation_scale": config.position_scale or None,
            **({"sample_size": config.sample_size} if config.position_scale else {}),  # else it changes nothing
            "qk_norm": None,
            "guidance_embeds": False,
        },
    )


_AUTHORS_NAMES = re.compile(r"(?P<caption>y_embedder\.)y_proj\.fc(?P<layer>[12])\.|(?P<conv>\.mlp\.(?:inverted|depth|point)_conv\.)conv\.")
_AUTHORS_UNUSED = frozenset({"y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias"})
_NORMS_OR_GUIDANCE = re.compile(r"cfg_embedder\.|.*\.[qk]_norm\.")


def authors_layout(config: SanaConfig, positions: Callable[[], Tensor]) -> StateDictLayout:
    """The names of NVlabs/Sana; what they are in diffusers' layout is in its scripts/convert_sana_to_diffusers.py.

    Args:
        config: The model's settings.
        positions: Gives the model's own position embedding, (N, D); called where there is one.
    """

    def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        others = [key for key in state if _NORMS_OR_GUIDANCE.match(key)]
        if others:
            raise WeightsError(
                "these are the weights of SANA-1.5 or SANA-Sprint, which are other architectures",
                reasons=[Reason("normalises queries and keys, or embeds the guidance", where=key) for key in others],
                hint="give the weights of SANA 0.6B or 1.6B",
            )
        _check_positions(config, state.get("pos_embed"), positions)

        def ours(match: re.Match[str]) -> str:
            return f"{match['caption']}{2 * int(match['layer']) - 2}." if match["caption"] else match["conv"]

        return {_AUTHORS_NAMES.sub(ours, key): state[key] for key in state if key not in _AUTHORS_UNUSED and key != "pos_embed"}

    return StateDictLayout("NVlabs/Sana", lambda keys: "y_embedder.y_proj.fc1.weight" in keys, convert)


def _check_positions(config: SanaConfig, stored: Tensor | None, positions: Callable[[], Tensor]) -> None:
    """Refuses the position embedding of another model, (1, N, D); zeros stand for none.

    Raises:
        WeightsError: It is another one.
    """
    if stored is None or stored.is_meta:
        return
    own = positions() if config.position_scale else torch.zeros(())
    # Files in bfloat16 hold 8 bits of numbers up to 1.
    if bool(stored.any()) == bool(config.position_scale) and (
        not config.position_scale or (stored.shape[1:] == own.shape and bool(((stored[0].float() - own).abs() < 2**-7).all()))
    ):
        return
    raise WeightsError(
        "the file's position embedding is not the model's: SANA's 2K and 4K models have one, those for 512 and 1024 px have none",
        reasons=[Reason(f"does not fit position_scale {config.position_scale:g} and sample_size {config.sample_size}", where="pos_embed")],
        hint="choose sana-1.6b-2k for the 2K model, sana-1.6b-4k for the 4K model, and sana-600m or sana-1.6b for the others",
    )
