"""Residual vector quantisation: a vector as the sum of one codebook vector per stage, each stage quantising what the ones before left.

Zeghidour et al., "SoundStream", arXiv:2107.03312, algorithm 1; for images with one codebook for all stages, Lee et al., "Autoregressive
Image Generation using Residual Quantization", arXiv:2203.01941. With residual r_0 = x, codebooks e^s and Q stages

    index_s = argmin_k |r_s - e^s_k|^2          the lowest k of those that are equally near
    r_(s+1) = r_s - e^s_(index_s)
    quantised = sum_s e^s_(index_s)

The distance is computed as |e_k|^2 / 2 - r . e_k, which has the same argmin, in float32 on every target, whatever the precision of the
artifact (`exporter.decisions`), so that indices agree. It is the same number for equal codebook vectors, and argmin takes the first.

Beside this, the survey names three things:

- **Shared codebooks** (`shared`): one codebook for all stages, as in arXiv:2203.01941.
- **The rotation trick** (Fifty et al., arXiv:2410.06424) is about gradients: in training the output of a stage is R r with R = (|q| / |r|)
  (the rotation from r to q) held constant, so that the encoder gets rotated gradients in place of copied ones. R r is q. `rotate` is that
  transformation, for training; in evaluation the output is q itself and no artifact computes R.
- **Stochastic sampling of codes**, dropout of stages, commitment losses, moving averages and the revival of unused codes belong to
  training, and are not here.

Projections into and out of the codebook's dimension belong to the network around.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import Analysis, ModelSpec, SizeRange, StateDictLayout, register_model


@dataclass(frozen=True)
class RVQConfig:
    """Settings of a residual vector quantiser.

    Attributes:
        dim: Size of the vectors.
        codebook_size: Vectors of a codebook.
        num_quantizers: Stages.
        shared: One codebook for all stages.
        decode: Indices to vectors instead of vectors to indices.
    """

    dim: int = 128
    codebook_size: int = 1024
    num_quantizers: int = 8
    shared: bool = False
    decode: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "codebook_size", "num_quantizers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def rotate(r: Tensor, q: Tensor) -> Tensor:
    """The rotation trick: R r with R held constant, which has q's value and R's gradient with respect to r.

    R = (|q| / |r|) (I - 2 w w^T + 2 q_hat r_hat^T) with w = (r_hat + q_hat) / |r_hat + q_hat|, arXiv:2410.06424, section 4.2.

    Args:
        r: (..., D), what was quantised.
        q: (..., D), what it was quantised to.

    Returns:
        (..., D), q up to rounding.
    """
    eps = 1e-12
    from_, to = F.normalize(r, dim=-1, eps=eps).detach(), F.normalize(q, dim=-1, eps=eps).detach()
    w = F.normalize(from_ + to, dim=-1, eps=eps)
    scale = (q.norm(dim=-1, keepdim=True) / r.norm(dim=-1, keepdim=True).clamp_min(eps)).detach()
    reflected = r - 2 * (r * w).sum(-1, keepdim=True) * w
    out: Tensor = scale * (reflected + 2 * (r * from_).sum(-1, keepdim=True) * to)
    return out


class RVQ(nn.Module):
    """The codebooks, and both ways through them; see the module's text."""

    def __init__(self, config: RVQConfig) -> None:
        super().__init__()
        self.config = config
        # Stages quantise ever smaller residuals, which is what k-means finds in trained ones.
        books = 1 if config.shared else config.num_quantizers
        scales = 0.7 ** torch.arange(books, dtype=torch.float32)
        self.codebooks = nn.Parameter(torch.randn(books, config.codebook_size, config.dim) * scales[:, None, None])

    def codebook(self, stage: int) -> Tensor:
        """(K, D), the codebook of a stage."""
        books: Tensor = self.codebooks
        return books[0 if self.config.shared else stage]

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors (B, N, D) to the sum (B, N, D), indices (B, N, Q) int64 and each stage's vectors (B, N, Q, D)."""
        residual, quantized = x, torch.zeros_like(x)
        indices, stages = [], []
        for stage in range(self.config.num_quantizers):
            book = self.codebook(stage)
            distance = book.square().sum(-1) / 2 - torch.matmul(residual, book.t())
            index = distance.argmin(-1)
            chosen = F.embedding(index, book)
            # The rotation trick puts rotate(residual, chosen) here in training, which is `chosen` in value.
            residual, quantized = residual - chosen, quantized + chosen
            indices.append(index)
            stages.append(chosen)
        return quantized, torch.stack(indices, -1), torch.stack(stages, -2)

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, N, Q) int64 to vectors (B, N, D)."""
        quantized = F.embedding(indices[..., 0], self.codebook(0))
        for stage in range(1, self.config.num_quantizers):
            quantized = quantized + F.embedding(indices[..., stage], self.codebook(stage))
        return quantized


class RVQEncoder(RVQ):
    """Vectors to codes."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `encode`."""
        return self.encode(x)


class RVQDecoder(RVQ):
    """Codes to vectors."""

    def forward(self, indices: Tensor) -> Tensor:
        """See `decode`."""
        return self.decode(indices)


def _layout(config: RVQConfig) -> StateDictLayout:
    """A `ResidualVQ` of vector-quantize-pytorch: a codebook a stage, and the moving averages of its training."""

    def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = [f"layers.{stage}._codebook.embed" for stage in range(config.num_quantizers)]
        known = {f"layers.{s}._codebook.{kind}" for s in range(config.num_quantizers) for kind in ("initted", "cluster_size", "embed_avg")}
        converted = {key: value for key, value in state.items() if key not in known}
        if all(name in state for name in names):
            books = [converted.pop(name) for name in names]  # (1, K, D) each; with a shared codebook all are the same
            converted["codebooks"] = torch.cat(books[: 1 if config.shared else None])
        return converted

    return StateDictLayout("vector-quantize-pytorch", lambda keys: "layers.0._codebook.embed" in keys, convert)


@register_model("rvq-tiny", RVQConfig(dim=8, codebook_size=32, num_quantizers=3), summary="Residual VQ, 3 stages of 32 codes, for trying")
@register_model(
    "rvq-decode-tiny",
    RVQConfig(dim=8, codebook_size=32, num_quantizers=3, decode=True),
    summary="The vectors of rvq-tiny from their indices",
)
@register_model(
    "rvq-shared-tiny",
    RVQConfig(dim=8, codebook_size=32, num_quantizers=3, shared=True),
    summary="Residual VQ with one codebook for its 3 stages, for trying",
)
@register_model("rvq-encodec-24khz", RVQConfig(num_quantizers=32), summary="EnCodec's residual VQ at 24 kbit/s, 32 stages of 1024 codes")
@register_model("rvq-soundstream", RVQConfig(dim=256), summary="SoundStream's residual VQ at 6 kbit/s, 8 stages of 1024 codes")
@register_model(
    "rvq-image-8x8x4",
    RVQConfig(dim=256, codebook_size=16384, num_quantizers=4, shared=True),
    summary="RQ-VAE's 8x8x4 codes of an image, one codebook of 16384",
)
@register_model(
    "rvq-decode-image-8x8x4",
    RVQConfig(dim=256, codebook_size=16384, num_quantizers=4, shared=True, decode=True),
    summary="The vectors of rvq-image-8x8x4 from their indices",
)
def rvq(config: RVQConfig) -> ModelSpec:
    """A residual vector quantiser, of vectors or of indices."""

    def vectors(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return {"x": torch.from_numpy(rng.standard_normal((sizes["batch"], sizes["length"], config.dim), dtype=np.float32))}

    def indices(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        shape = (sizes["batch"], sizes["length"], config.num_quantizers)
        return {"indices": torch.from_numpy(rng.integers(0, config.codebook_size, shape))}

    name = "indices" if config.decode else "x"
    return ModelSpec(
        build=lambda: (RVQDecoder if config.decode else RVQEncoder)(config).eval(),
        inputs=indices if config.decode else vectors,
        sizes={"batch": 2, "length": 16},
        dynamic={name: {0: "batch", 1: "length"}},
        ranges={"batch": SizeRange(1, 2, 16), "length": SizeRange(1, 16, 4096)},
        outputs=("quantized",) if config.decode else ("quantized", "indices", "stages"),
        source="Zeghidour et al., SoundStream, arXiv:2107.03312; Fifty et al., Restructuring Vector Quantization with the Rotation Trick, "
        "arXiv:2410.06424; checked against vector-quantize-pytorch",
        layouts=(_layout(config),),
        analyses=()
        if config.decode
        else (
            Analysis("entropy", outputs=("indices",), settings={"size": config.codebook_size, "axis": -1}),
            Analysis("mutual-information", inputs=("x",), outputs=("quantized",), settings={"vectors": True}),
        ),
    )
