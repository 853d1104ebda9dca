"""Products of matrices, and distances."""

# Operators of torch.ops have no types.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import string
from typing import Any

import torch
from torch import Tensor

from . import decomposition

aten = torch.ops.aten


@decomposition(aten.matmul.default)
def matmul(x: Tensor, y: Tensor) -> Any:
    """As coremltools fails for some products with a vector."""
    if x.dim() > 1 and y.dim() > 1:
        return NotImplemented
    x2, y2 = (x.unsqueeze(0) if x.dim() == 1 else x), (y.unsqueeze(-1) if y.dim() == 1 else y)
    product = aten.matmul.default(x2, y2)
    product = product.squeeze(-1) if y.dim() == 1 else product
    return product.squeeze(-1 if y.dim() == 1 else -2) if x.dim() == 1 else product


@decomposition(aten.addmm.default, aten.baddbmm.default)
def addmm(added: Tensor, x: Tensor, y: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """As coremltools fails for an integer `alpha` or `beta`, and multiplies what `beta` = 0 leaves out."""
    return NotImplemented if alpha == beta == 1 else _sum(added, torch.matmul(x, y), beta, alpha)


@decomposition(aten.addbmm.default)
def addbmm(added: Tensor, x: Tensor, y: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """A sum of products."""
    return _sum(added, torch.matmul(x, y).sum(0), beta, alpha)


@decomposition(aten.addmv.default)
def addmv(added: Tensor, x: Tensor, y: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """A product with a vector."""
    return _sum(added, matmul(x, y), beta, alpha)


@decomposition(aten.addr.default)
def addr(added: Tensor, x: Tensor, y: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """A product of two vectors."""
    return _sum(added, x.unsqueeze(1) * y.unsqueeze(0), beta, alpha)


def _sum(added: Tensor, product: Tensor, beta: Any, alpha: Any) -> Tensor:
    product = product if alpha == 1 else product * float(alpha)
    return product if beta == 0 else product + (added if beta == 1 else added * float(beta))


@decomposition(aten.bilinear.default)
def bilinear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`nn.Bilinear`: x W_o y for each output o."""
    products = torch.matmul(x.unsqueeze(-2).unsqueeze(-2), weight).squeeze(-2)
    result = (products * y.unsqueeze(-2)).sum(-1)
    return result if bias is None else result + bias


@decomposition(aten.einsum.default)
def einsum(equation: str, operands: list[Tensor], *, path: Any = None) -> Any:
    """As coremltools reads no ellipsis, and no equation without its arrow. One that moves axes and no more is a permutation."""
    explicit = _explicit(equation.replace(" ", ""), [x.dim() for x in operands])
    given, _, wanted = explicit.partition("->")
    if len(operands) == 1 and len(set(given)) == len(given) == len(wanted):
        return operands[0].permute([given.index(letter) for letter in wanted])
    return NotImplemented if explicit == equation.replace(" ", "") else aten.einsum.default(explicit, operands, path=path)


def _explicit(equation: str, ranks: list[int]) -> str:
    """The equation with letters for its ellipses, and with what follows its arrow."""
    given, arrow, wanted = equation.partition("->")
    terms = given.split(",")
    counts = [rank - len(term.replace("...", "")) if "..." in term else 0 for term, rank in zip(terms, ranks, strict=True)]
    free = [letter for letter in string.ascii_letters if letter not in equation][: max(counts)]
    # Ellipses are broadcast against one another from the last axis on.
    terms = [term.replace("...", "".join(free[len(free) - count :])) for term, count in zip(terms, counts, strict=True)]
    if not arrow:
        letters = "".join(terms)
        wanted = ("..." if free else "") + "".join(c for c in sorted(set(letters)) if letters.count(c) == 1 and c not in free)
    return f"{','.join(terms)}->{wanted.replace('...', ''.join(free))}"


@decomposition(aten.cdist.default, aten._cdist_forward.default)
def cdist(x: Tensor, y: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """Distances of the rows of x (..., P, M) and y (..., R, M): (..., P, R).

    By differences, which do not cancel, but for more than 25 rows, of which torch itself takes the norms and the product.
    """
    many = any(not isinstance(rows, int) or rows > 25 for rows in (x.shape[-2], y.shape[-2]))
    if p == 2.0 and (compute_mode == 1 or (compute_mode in (None, 0) and many)):
        squares = (x * x).sum(-1, keepdim=True) + (y * y).sum(-1, keepdim=True).mT
        return (squares - 2.0 * torch.matmul(x, y.mT)).clamp(min=0.0).sqrt()
    return torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, dim=[-1])


@decomposition(aten.linalg_matrix_norm.default, aten.linalg_matrix_norm.str_ord)
def matrix_norm(x: Tensor, ord: Any = "fro", dim: Any = (-2, -1), keepdim: bool = False, *, dtype: Any = None) -> Any:
    """As coremltools wants every argument."""
    x = x if dtype is None else x.to(dtype)
    if ord == "fro":
        return torch.linalg.vector_norm(x, 2, list(dim), keepdim)
    if ord in (1, -1, torch.inf, -torch.inf):
        summed, over = dim if abs(ord) == 1 else (dim[1], dim[0])
        summed, over = summed % x.dim(), over % x.dim()
        sums = x.abs().sum(summed, keepdim=True)
        norm = sums.amax(over, keepdim=True) if ord > 0 else sums.amin(over, keepdim=True)
        return norm if keepdim else norm.squeeze((summed, over))
    return NotImplemented


@decomposition(aten.cosine_similarity.default)
def cosine_similarity(x: Tensor, y: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """As coremltools wants every argument, and multiplies two sums of squares, which leaves float16."""
    large = [torch.linalg.vector_norm(v, 2, [dim], True).clamp(min=eps) for v in (x, y)]
    return (x / large[0] * (y / large[1])).sum(dim)


@decomposition(aten.cross.default)
def cross(x: Tensor, y: Tensor, dim: int | None = None) -> Any:
    """As coremltools wants an axis; torch takes the first of size 3."""
    return torch.linalg.cross(x, y, dim=next(i for i, size in enumerate(x.shape) if size == 3)) if dim is None else NotImplemented


@decomposition(aten.norm.Scalar)
def norm(x: Tensor, p: float = 2) -> Tensor:
    """As coremltools wants axes."""
    return torch.linalg.vector_norm(x, p)


@decomposition(aten.dist.default)
def dist(x: Tensor, y: Tensor, p: float = 2.0) -> Tensor:
    """The norm of the difference of all numbers."""
    return torch.linalg.vector_norm(x - y, p)
