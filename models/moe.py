"""Sparse mixture of experts: a router sends each token through a few of many SwiGLU layers, and adds up what they return.

For a token x, E experts and a router matrix W_g (Shazeer et al., arXiv:1701.06538; Mixtral: Jiang et al., arXiv:2401.04088, section 2.1)::

    y = sum over the k experts e with the largest (x W_g)_e of  g_e SwiGLU_e(x)
    g = softmax over these k logits                       Mixtral (2 of 8) and DBRX (4 of 16, weights divided by their sum): `normalize`
    g = softmax over all E logits, as they are            Jamba (2 of 16)

A softmax over the chosen logits equals the softmax over all of them divided by the sum of the chosen, which is how it is computed here.
Every token keeps all of its k experts: there is no capacity, and nothing is dropped. Of equal logits the expert with the lower index is
chosen; the published code leaves that to `torch.topk`, which promises nothing. The survey's sketch applies a second softmax to the chosen
probabilities, which flattens the weights (0.9 and 0.1 become 0.69 and 0.31), and is not what any of these models computes.

**No shape depends on data.** The published code collects the tokens of each expert (`nonzero`, `where`), which no ahead-of-time compiler
takes. Instead there are two forms with equal weights and results:

- *dense*, for many tokens: with the experts' hidden channels side by side the whole mixture is one SwiGLU layer of E h channels, whose
  channels are scaled by the token's g_e, 0 where the expert was not chosen::

      y = sum_e g_e (silu(x W_e) * x V_e) W2_e = (g * silu(x [W_1 .. W_E]) * x [V_1 .. V_E]) [W2_1; ..; W2_E]

  These are two matrix products in all, whose inner sum adds up the experts too, for any number of tokens. They do E / k times the
  arithmetic that a token needs; with enough tokens to occupy all experts the weights read are the same.
- *gathered*, for decoding one token: the k experts' matrices are picked by index, and nothing of the others is read.

A static form without the dense form's surplus needs capacities, and these drop tokens.

ONNX Runtime on the CPU has an operator that does without the surplus and computes the same, which the target writes in place of either form
(`--experts`; docs/design/0008-mixture-of-experts.md, which says why no other target does).

Neither uses TopK: an expert's place is the number of experts before it (larger logit, or equal and lower index), E^2 comparisons a token,
exact and with the same ties on every target. Experts that were not chosen are masked and not multiplied by 0, so that an overflow in one of
them stays without effect.

`moe-mixtral-8x7b` and `moe-dbrx` are one layer of these models. Checked against transformers' MixtralSparseMoeBlock, DbrxFFN and
JambaSparseMoeBlock.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import Analysis, ModelSpec, SizeRange, StateDictLayout, register_model
from .layers import tokens_reversed


@dataclass(frozen=True)
class MoEConfig:
    """Settings of a mixture of experts.

    Attributes:
        dim: d, channels of a token.
        hidden_dim: h, hidden channels of an expert.
        num_experts: E.
        top_k: k, experts that a token goes through.
        normalize: Divide the chosen experts' weights by their sum.
    """

    dim: int = 4096
    hidden_dim: int = 14336
    num_experts: int = 8
    top_k: int = 2
    normalize: bool = True

    def __post_init__(self) -> None:
        for name in ("dim", "hidden_dim", "num_experts", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be at most num_experts, got {self.top_k} of {self.num_experts}")


class Router(nn.Linear):
    """Weighs the experts for each token; `weight` is W_g transposed, (E, d)."""

    earlier: Tensor

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config.dim, config.num_experts, bias=False)
        self.top_k, self.normalize = config.top_k, config.normalize
        # earlier[e, f] is True when f stands before e, which decides between equal logits. Kept on the CPU by a model on the meta device.
        every = torch.arange(config.num_experts, device="cpu")
        self.register_buffer("earlier", every[:, None] > every, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # more than a linear layer
        """Tokens (…, d) to their weights g (…, E), 0 for an expert that was not chosen, and the experts' places (…, E) int64 in [0, E)."""
        logits = super().forward(x).float()
        mine, others = logits.unsqueeze(-1), logits.unsqueeze(-2)
        places = ((others > mine) | ((others == mine) & self.earlier)).long().sum(-1)
        weights = torch.where(places < self.top_k, torch.softmax(logits, dim=-1), 0.0)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, places


class SparseMoE(nn.Module):
    """The layer, (…, d) to (…, d), in its dense form.

    Attributes:
        gate: The router.
        gate_up_proj: W_e and V_e of each expert, one above the other and transposed, (E, 2 h, d).
        down_proj: W2_e of each expert, (E, h, d).
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        experts, dim, hidden = config.num_experts, config.dim, config.hidden_dim
        self.num_experts, self.top_k = experts, config.top_k
        self.gate = Router(config)
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, dim))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, dim))
        nn.init.uniform_(self.gate_up_proj, -(dim**-0.5), dim**-0.5)  # as in torch's nn.Linear
        nn.init.uniform_(self.down_proj, -(hidden**-0.5), hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Every token through every expert, and the chosen ones added up."""
        weights, _ = self.gate(x)
        weights = weights.to(x.dtype).unsqueeze(-1)  # (…, E, 1)
        gate, up = F.linear(x, self.gate_up_proj.flatten(0, 1)).reshape(*x.shape[:-1], self.num_experts, -1).chunk(2, dim=-1)
        hidden = torch.where(weights > 0, weights * F.silu(gate) * up, 0.0)  # (…, E, h)
        out: Tensor = hidden.flatten(-2) @ self.down_proj.flatten(0, 1)
        return out


class GatheredMoE(SparseMoE):
    """The layer for a few tokens (…, d), each through its own k experts, whose matrices are gathered."""

    def forward(self, x: Tensor) -> Tensor:
        """Every token through its chosen experts."""
        weights, places = self.gate(x)
        # The expert on each of the first k places: (…, k, E), one True in each row.
        chosen = places.unsqueeze(-2) == torch.arange(self.top_k, device=x.device).unsqueeze(-1)
        experts = (chosen * torch.arange(self.num_experts, device=x.device)).sum(-1)  # (…, k)
        taken = torch.where(chosen, weights.unsqueeze(-2), 0.0).sum(-1).to(x.dtype)  # (…, k)
        gate, up = (self.gate_up_proj[experts] @ x[..., None, :, None]).squeeze(-1).chunk(2, dim=-1)
        hidden = (taken.unsqueeze(-1) * F.silu(gate) * up).unsqueeze(-2)  # (…, k, 1, h)
        out: Tensor = (hidden @ self.down_proj[experts]).squeeze(-2).sum(-2)
        return out


def stack_experts(state: Mapping[str, Tensor], prefix: str, names: tuple[str, str, str], out: dict[str, Tensor], target: str) -> None:
    """Puts experts that are stored one by one into `out[target + "gate_up_proj"]` and `out[target + "down_proj"]`.

    Args:
        state: The state dict.
        prefix: What stands before the expert's number, e.g. `block_sparse_moe.experts.`.
        names: Names of W, V and W2 after the number and a dot, e.g. `("w1", "w3", "w2")`.
        out: Receives the stacked weights; the experts are passed through when some are missing, so that they are reported.
        target: What stands before our names.
    """
    numbers = sorted({int(m[1]) for key in state if (m := re.match(rf"{re.escape(prefix)}(\d+)\.", key))})
    wanted = {(n, name): f"{prefix}{n}.{name}.weight" for n in numbers for name in names}
    if numbers != list(range(len(numbers))) or any(key not in state for key in wanted.values()):
        out.update({key: state[key] for key in state if key.startswith(prefix)})
        return
    first, second, last = names
    out[f"{target}gate_up_proj"] = torch.stack([torch.cat([state[wanted[n, first]], state[wanted[n, second]]]) for n in numbers])
    out[f"{target}down_proj"] = torch.stack([state[wanted[n, last]].T for n in numbers])


_MIXTRAL_FILE = re.compile(r"(?:.*\.)?(?=(?:gate\.weight|experts\.\d+\.w[123]\.weight)$)")
_MIXTRAL_MEMORY = re.compile(r"(?:.*\.)?(?=(?:gate\.weight|experts\.gate_up_proj|experts\.down_proj)$)")
_DBRX = re.compile(r"(?:.*\.)?(?=(?:router\.layer\.weight|experts\.mlp\.(?:w1|v1|w2))$)")


def _strip(state: Mapping[str, Tensor], pattern: re.Pattern[str]) -> dict[str, Tensor]:
    """The state without what stands before the layer's own names, when that is the same everywhere: one layer of a model's checkpoint."""
    prefixes = {m[0] if (m := pattern.match(key)) else None for key in state}
    prefix = prefixes.pop() if len(prefixes) == 1 else None
    return {key.removeprefix(prefix or ""): state[key] for key in state}


def _from_mixtral_file(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = _strip(state, _MIXTRAL_FILE)
    out = {key: value for key, value in state.items() if not re.match(r"experts\.\d+\.", key)}
    stack_experts(state, "experts.", ("w1", "w3", "w2"), out, "")
    return out


def _from_mixtral_memory(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {key.removeprefix("experts."): value for key, value in _strip(state, _MIXTRAL_MEMORY).items()}
    if "down_proj" in out and out["down_proj"].dim() == 3:
        out["down_proj"] = out["down_proj"].mT
    return out


def _from_dbrx(config: MoEConfig) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = {"gate.weight" if key == "router.layer.weight" else key: value for key, value in _strip(state, _DBRX).items()}
        shape = (config.num_experts * config.hidden_dim, config.dim)
        w, v, w2 = (out.get(f"experts.mlp.{name}") for name in ("w1", "v1", "w2"))
        if w is None or v is None or w2 is None or not shape == tuple(w.shape) == tuple(v.shape) == tuple(w2.shape):
            return out
        for name in ("w1", "v1", "w2"):
            del out[f"experts.mlp.{name}"]
        w, v, w2 = (t.reshape(config.num_experts, config.hidden_dim, config.dim) for t in (w, v, w2))
        return out | {"gate_up_proj": torch.cat([w, v], dim=1), "down_proj": w2}

    return convert


def _layouts(config: MoEConfig) -> tuple[StateDictLayout, ...]:
    return (
        StateDictLayout(
            "mistralai/Mixtral", lambda keys: any(re.search(r"experts\.0\.w1\.weight$", key) for key in keys), _from_mixtral_file
        ),
        StateDictLayout("transformers", lambda keys: any(key.endswith("experts.gate_up_proj") for key in keys), _from_mixtral_memory),
        StateDictLayout("databricks/dbrx", lambda keys: any(key.endswith("experts.mlp.w1") for key in keys), _from_dbrx(config)),
    )


_SOURCE = (
    "Shazeer et al., Outrageously Large Neural Networks, arXiv:1701.06538; Jiang et al., Mixtral of Experts, arXiv:2401.04088; "
    "checked against transformers' MixtralSparseMoeBlock and DbrxFFN"
)


@register_model("moe-tiny", MoEConfig(dim=16, hidden_dim=24), summary="Mixture of 8 experts, 2 a token, width 16, for trying")
@register_model(
    "moe-dbrx-tiny",
    MoEConfig(dim=16, hidden_dim=12, num_experts=16, top_k=4),
    summary="Mixture of 16 experts, 4 a token, width 16, for trying",
)
@register_model("moe-mixtral-8x7b", MoEConfig(), summary="The mixture of one layer of Mixtral 8x7B: 8 experts, 2 a token, 1.4 G parameters")
@register_model(
    "moe-dbrx",
    MoEConfig(dim=6144, hidden_dim=10752, num_experts=16, top_k=4),
    summary="The mixture of one layer of DBRX: 16 experts, 4 a token, 3.2 G parameters",
)
def moe(config: MoEConfig) -> ModelSpec:
    """A mixture of experts over tokens (B, L, d), dense form."""

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return {"x": torch.from_numpy(rng.standard_normal((sizes["batch"], sizes["length"], config.dim), dtype=np.float32))}

    return ModelSpec(
        build=lambda: SparseMoE(config).eval(),
        inputs=inputs,
        sizes={"batch": 2, "length": 6},
        dynamic={"x": {0: "batch", 1: "length"}},
        ranges={"batch": SizeRange(1, 2, 16), "length": SizeRange(1, 6, 512)},
        outputs=("y",),
        source=_SOURCE,
        layouts=_layouts(config),
        analyses=(Analysis("coherence", settings={"transform": tokens_reversed, "back": tokens_reversed}),),
    )


@register_model(
    "moe-step-tiny", MoEConfig(dim=16, hidden_dim=24), summary="Mixture of 8 experts, one token, the chosen experts gathered, for trying"
)
@register_model(
    "moe-step-mixtral-8x7b",
    MoEConfig(),
    summary="The mixture of one layer of Mixtral 8x7B for one token, the chosen experts gathered",
)
def moe_step(config: MoEConfig) -> ModelSpec:
    """A mixture of experts for one token a sequence, (B, d), gathered form."""

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return {"x": torch.from_numpy(rng.standard_normal((sizes["batch"], config.dim), dtype=np.float32))}

    return ModelSpec(
        build=lambda: GatheredMoE(config).eval(),
        inputs=inputs,
        sizes={"batch": 2},
        dynamic={"x": {0: "batch"}},
        ranges={"batch": SizeRange(1, 2, 16)},
        outputs=("y",),
        source=_SOURCE,
        layouts=_layouts(config),
    )
