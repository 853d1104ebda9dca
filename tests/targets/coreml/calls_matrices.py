"""Products, reductions, normalisations and attention; see `calls.py`."""

# ruff: noqa: PLW0108 - the names of the parameters are those of the inputs

from functools import partial

import torch
import torch.nn.functional as F

INF = float("inf")
aten = torch.ops.aten


def families_of(calls):
    """The families, by name."""
    Family, normal = calls.Family, calls.normal
    families = {}
    families["matrices"] = Family(
        {
            "x": normal(2, 3),
            "y": normal(3, 4, seed=1),
            "added": normal(2, 4, seed=2),
            "row": normal(4, seed=3),
            "three": normal(3, seed=4),
            "two": normal(2, seed=5),
            "bx": normal(2, 2, 3, seed=6),
            "by": normal(2, 3, 4, seed=7),
            "badded": normal(2, 2, 4, seed=8),
            "square": normal(2, 4, 4, seed=9),
            "trilinear": normal(5, 3, 4, seed=10),
        },
        {
            "addmm": lambda added, x, y: torch.addmm(added, x, y, beta=0.5, alpha=2.0),
            "addmm, integers": lambda added, x, y: torch.addmm(added, x, y, beta=0, alpha=2),
            "addmm, a row": lambda row, x, y: torch.addmm(row, x, y, beta=0.5),
            "baddbmm": lambda badded, bx, by: torch.baddbmm(badded, bx, by, beta=0.5, alpha=2.0),
            "baddbmm, no sum": lambda badded, bx, by: torch.baddbmm(badded, bx, by, beta=0, alpha=0.3),
            "addbmm": lambda added, bx, by: torch.addbmm(added, bx, by, beta=0.5),
            "addmv": lambda two, x, three: torch.addmv(two, x, three, alpha=2.0),
            "addr": lambda y, three, row: torch.addr(y, three, row, alpha=2.0),
            "vector by matrix": lambda three, y: three @ y,
            "matrices by vector": lambda square, row: square @ row,
            "vector by vector": lambda three: three @ three,
            "linear": lambda by, y: F.linear(by, y),
            "bilinear": lambda x, added, trilinear: F.bilinear(x, added, trilinear),
            "tensordot": lambda x, y: torch.tensordot(x, y, dims=([1], [0])),
            "inner": lambda added, y: torch.inner(added, y),
            "kron": lambda x, y: torch.kron(x, y),
            "vecdot": lambda x: torch.linalg.vecdot(x, 2 * x),
            "einsum": lambda x, by, added: torch.einsum("bi,bij,bj->b", x, by, added),
            "einsum, ellipsis": lambda bx, by: torch.einsum("...ij,...jk->...ik", bx, by),
            "einsum, no arrow": lambda x, y: torch.einsum("ij,jk", x, y),
            "einsum, outer": lambda bx, by: torch.einsum("bik,bjv->bikjv", bx, by),
            "einsum, diagonal": lambda square: torch.einsum("bii->bi", square),
            "einsum, permutation": lambda by: torch.einsum("bij->jbi", by),
            "einsum, sum": lambda by: torch.einsum("bij->b", by),
            "cdist": lambda square: torch.cdist(square, 2 * square),
            "cdist, 1": lambda square: torch.cdist(square, 2 * square, p=1.0),
            "cdist, infinity": lambda square: torch.cdist(square, 2 * square, p=INF),
            "cdist, product": lambda square: torch.cdist(square, 2 * square, compute_mode="use_mm_for_euclid_dist"),
            "cdist, forward": lambda square: aten._cdist_forward.default(square, 3 * square, 2.0, None),
            "cosine_similarity": lambda by: F.cosine_similarity(by, by.flip(0), 1, 1e-3),
            "cosine_similarity, defaults": lambda by: aten.cosine_similarity.default(by, by.flip(0)),
            "cross": lambda by, bx: aten.cross.default(by[:, :, :2].reshape(2, 2, 3), bx),
            "cross, no axis": lambda by: aten.cross.default(by, by.flip(0)),
            "norm of all": lambda by: aten.norm.Scalar(by, 3),
            "pairwise_distance": lambda x: F.pairwise_distance(x, 2 * x, 2.0),
            "dist": lambda x: torch.dist(x, 2 * x, 3.0),
            "trace": lambda square: torch.trace(square[0]),
            "diagonal": lambda square: torch.diagonal(square, dim1=-2, dim2=-1),
            "diagonal, offset": lambda by: torch.diagonal(by, 1, 1, 2),
            "diagonal, below": lambda by: torch.diagonal(by, -1, 1, 2),
            "diag_embed": lambda x: torch.diag_embed(x),
            "diag_embed, offset": lambda x: torch.diag_embed(x, 1, 0, 2),
            "diag": lambda row: torch.diag(row),
            "matrix_norm": lambda by: torch.linalg.matrix_norm(by),
            "matrix_norm, 1": lambda by: torch.linalg.matrix_norm(by, 1),
            "mse_loss": lambda x: F.mse_loss(x, 2 * x),
            "kl_div": lambda x: F.kl_div(x.log_softmax(-1), x.flip(0).softmax(-1), reduction="batchmean"),
        },
    )

    families["reductions"] = Family(
        {"x": normal(2, 4, 5)},
        {
            **{
                f"{name}, {how}": partial(lambda x, *, f, options: f(x, **options), f=f, options=options)
                for name, f in (("var", torch.var), ("std", torch.std), ("var_mean", torch.var_mean), ("std_mean", torch.std_mean))
                for how, options in {
                    "0": {"dim": -1, "correction": 0},
                    "1": {"dim": 1},
                    "2": {"dim": (0, 2), "correction": 2, "keepdim": True},
                    "all, 3": {"correction": 3},
                    "biased": {"dim": -1, "unbiased": False},
                }.items()
            },
            "var, all": lambda x: x.var(),
            "std, all, biased": lambda x: x.std(unbiased=False),
            "sum": lambda x: x.sum((0, 2), keepdim=True),
            "sum of a mask": lambda x: (x > 0).sum(-1),
            "sum of a mask, dtype": lambda x: (x > 0).sum(-1, dtype=torch.float32),
            "sum, no axes": lambda x: x.sum(()),
            "mean": lambda x: x.mean((0, 1), keepdim=True),
            "mean, all": lambda x: x.mean(),
            "amax": lambda x: x.amax((0, 2), keepdim=True),
            "amax, all": lambda x: x.amax(),
            "aminmax": lambda x: torch.aminmax(x, dim=1),
            "max": lambda x: x.max(1, keepdim=True),
            "min": lambda x: x.min(-1),
            "argmax": lambda x: x.argmax(0, keepdim=True),
            "argmax, all": lambda x: x.argmax(),
            "argmax, all, kept": lambda x: torch.argmax(x, None, True),
            "argmin": lambda x: x.argmin(-1),
            "argmin, all": lambda x: x.argmin(),
            "any": lambda x: (x > 1).any(1),
            "any, numbers": lambda x: x.round().any(-1),
            "all": lambda x: (x > -1).all(1, keepdim=True),
            "prod": lambda x: x.prod(1, keepdim=True),
            "prod, all": lambda x: x.prod(),
            **{
                f"norm, {p}": partial(lambda x, *, p: torch.linalg.vector_norm(x.trunc() + x / 4, p, (0, -1), keepdim=True), p=p)
                for p in (0, 0.5, 1, 2, 3, INF, -INF)
            },
            "norm, older": lambda x: torch.norm(x, p=1, dim=1),
            "normalize": lambda x: F.normalize(x, dim=1, eps=1e-2),
            "logsumexp": lambda x: (30 * x).logsumexp((0, 1), keepdim=True),
            "cumsum": lambda x: x.cumsum(1, dtype=torch.float32),
            "cumprod": lambda x: x.cumprod(1),
            "cummax": lambda x: x.cummax(1),
            "cummin": lambda x: x.round().cummin(-1),
            "logcumsumexp": lambda x: x.logcumsumexp(-1),
            "topk": lambda x: x.topk(2),
            "topk, smallest": lambda x: x.topk(3, 1, largest=False),
            "sort": lambda x: x.sort(1, descending=True),
            "sort, stable": lambda x: torch.sort(x.round(), stable=True, dim=1, descending=True),
            "argsort": lambda x: x.argsort(1, descending=True),
            "argsort, stable": lambda x: torch.argsort(x.round(), dim=-1, stable=True),
            "median": lambda x: x.median(1),
            "median, all": lambda x: x.median(),
            "kthvalue": lambda x: x.kthvalue(2, 1, keepdim=True),
            "quantile": lambda x: torch.quantile(x, 0.3, dim=-1),
            "count_nonzero": lambda x: [torch.count_nonzero(x.trunc(), -1), aten.count_nonzero.dim_IntList(x.trunc(), [0, 1])],
            "moments, older": lambda x: [
                aten.var.default(x, False),
                aten.std.default(x, False),
                aten.var_mean.default(x, False),
                aten.std_mean.default(x, False),
            ],
            "nansum": lambda x: x.nansum(-1),
            "nanmean": lambda x: x.nanmean(1),
            "diff": lambda x: torch.diff(x, dim=1),
            "diff, twice": lambda x: torch.diff(x, n=2),
            "diff, more": lambda x: torch.diff(x, dim=1, prepend=torch.zeros(2, 1, 5), append=torch.ones(2, 1, 5)),
            "trapezoid": lambda x: torch.trapezoid(x, dim=-1),
        },
    )

    EIGHT = torch.arange(8.0)

    families["normalization"] = Family(
        {"x": normal(2, 8, 6, 6), "weight": normal(6, seed=1)},
        {
            "layer_norm": lambda x: F.layer_norm(x, (6,)),
            "layer_norm, two axes": lambda x: F.layer_norm(x, (6, 6), torch.arange(36.0).reshape(6, 6), torch.ones(6, 6), 1e-3),
            "layer_norm, weight": lambda x, weight: F.layer_norm(x, (6,), weight),
            "layer_norm, bias": lambda x, weight: F.layer_norm(x, (6,), None, weight),
            "layer_norm, both": lambda x, weight: F.layer_norm(x, (6,), weight, weight, 1e-6),
            "group_norm": lambda x: F.group_norm(x, 4, EIGHT, EIGHT),
            "group_norm, weight": lambda x: F.group_norm(x, 2, EIGHT, None, 1e-3),
            "group_norm, one": lambda x: F.group_norm(x, 1),
            "group_norm, rank 2": lambda x: F.group_norm(x[:, :, 0, 0], 4, EIGHT, EIGHT),
            "group_norm, rank 3": lambda x: F.group_norm(x.flatten(2), 4, EIGHT, EIGHT),
            "group_norm, rank 5": lambda x: F.group_norm(x.unflatten(2, (2, 3)), 4, EIGHT, EIGHT),
            "instance_norm": lambda x: F.instance_norm(x, weight=EIGHT, bias=torch.ones(8), eps=1e-3),
            "instance_norm, rank 3": lambda x: F.instance_norm(x.flatten(2)),
            "instance_norm, kept moments": lambda x: F.instance_norm(x, EIGHT, EIGHT + 1, use_input_stats=False),
            "batch_norm": lambda x: F.batch_norm(x, EIGHT, EIGHT + 1, EIGHT, torch.ones(8), eps=1e-2),
            "batch_norm, plain": lambda x: F.batch_norm(x, EIGHT, EIGHT + 1),
            "batch_norm, rank 2": lambda x: F.batch_norm(x[:, :, 0, 0], EIGHT, EIGHT + 1, EIGHT, torch.ones(8)),
            "batch_norm, rank 3": lambda x: F.batch_norm(x[:, :, 0], EIGHT, EIGHT + 1, EIGHT, torch.ones(8)),
            "rms_norm": lambda x, weight: F.rms_norm(x, (6,), weight, 1e-2),
            "rms_norm, no eps": lambda x: F.rms_norm(x, (6,)),
            "rms_norm, weight, no eps": lambda x, weight: F.rms_norm(x, (6,), weight),
            "rms_norm, two axes": lambda x: F.rms_norm(x, (6, 6), torch.arange(36.0).reshape(6, 6), 1e-5),
            "local_response_norm": lambda x: F.local_response_norm(x, 3, alpha=1e-2, beta=0.6, k=2.0),
        },
    )

    MASK = normal(2, 1, 6, 5, seed=9) > -0.5
    MASK[..., 0] = True  # every query has a key
    HEAD_BIAS = normal(6, 6, 4, seed=10).permute(2, 0, 1).unsqueeze(0)  # as a table of offsets is read
    attend = F.scaled_dot_product_attention

    families["attention"] = Family(
        {
            "q": normal(2, 4, 6, 8),
            "k": normal(2, 4, 5, 8, seed=1),
            "v": normal(2, 4, 5, 7, seed=2),
            "m": normal(6, 5, seed=3),
            "mask": MASK,
        },
        {
            "plain": lambda q, k, v: attend(q, k, v),
            "scale": lambda q, k, v: attend(q, k, v, scale=0.3),
            "causal": lambda q: attend(q, q, q, is_causal=True, scale=0.2),
            "causal, rectangular": lambda q, k, v: attend(q, k, v, is_causal=True),
            "bias": lambda q, k, v, m: attend(q, k, v, m),
            "bias and scale": lambda q, k, v, m: attend(q, k, v, m, scale=0.5),
            "mask": lambda q, k, v, mask: attend(q, k, v, mask),
            "mask and scale": lambda q, k, v, mask: attend(q, k, v, mask, scale=0.3),
            "infinite bias": lambda q: attend(q, q, q, attn_mask=torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1) > 0, -INF)),
            "bias for each head, heads split and joined": lambda q: (
                attend(*(q.transpose(1, 2).contiguous().transpose(1, 2),) * 3, HEAD_BIAS).transpose(1, 2).flatten(2)
            ),
            "no key": lambda q: attend(q, q, q, attn_mask=torch.ones(6, 6).triu(1) > 0),
            "no key, infinite bias": lambda q: attend(q, q, q, attn_mask=torch.zeros(6, 6).masked_fill(torch.ones(6, 6).tril() > 0, -INF)),
            "grouped": lambda q, k, v: attend(q, k[:, :2], v[:, :2], enable_gqa=True),
            "one head for all": lambda q, k: attend(q, k[:, :1], k[:, :1]),
            "rank 3": lambda q, k, v: attend(q[0], k[0], v[0]),
            "rank 2": lambda q, k, v: attend(q[0, 0], k[0, 0], v[0, 0]),
            "rank 5": lambda q: attend(q.unsqueeze(0), q.unsqueeze(0), q.unsqueeze(0)),
            "no dropout": lambda q, k, v: attend(q, k, v, dropout_p=0.0),
        },
    )
    return families
