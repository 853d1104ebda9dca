"""Every lowering of ours computes in Core AI's run time what PyTorch computes, where coreai-torch alone does not."""

import pytest
import torch
import torch.nn.functional as F

from isthmus.targets.coreai.lowerings import LOWERINGS, table
from isthmus.targets.coreai.support import _RANK

aten = torch.ops.aten


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y = _normal(3, 4), _normal(3, 4, seed=1)
IMAGE = _normal(2, 3, 7, 9)
SMALL = torch.tensor([1e-7, -1e-7, 3e-6, -2e-5, 1e-4, 0.0, 0.5, -0.5, 7.0])
NAN = torch.tensor([1.0, float("nan"), -1.0, 2.0])
INTEGERS = torch.arange(-4, 8)
LARGE = torch.tensor([2**24 + 1, -(2**25) - 3, 5, 0])
HEADS = tuple(_normal(1, 2, 5, 16, seed=seed) for seed in range(3))
NO_KEY = torch.ones(1, 1, 5, 5).tril().bool()
NO_KEY[..., 2, :] = False

SILENT = {
    "add: alpha": (lambda x, y: torch.add(x, y, alpha=2.5), (X, Y)),
    "sub: alpha": (lambda x, y: torch.sub(x, y, alpha=-3.0), (X, Y)),
    "log1p of small numbers": (torch.log1p, (SMALL,)),
    "expm1 of small numbers": (torch.expm1, (SMALL,)),
    "ge with NaN": (lambda x: x >= 1.0, (NAN,)),
    "le with NaN": (lambda x, y: x <= y, (NAN, NAN.flip(0))),
    "bitwise_not of large integers": (torch.bitwise_not, (LARGE,)),
    "avg_pool2d: count_include_pad": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (IMAGE,)),
    "an integer times a fraction": (lambda i: i * 0.1, (INTEGERS,)),
    "an integer divided by a fraction": (lambda i: i / 3.7, (INTEGERS,)),
    "an integer plus a fraction": (lambda i: i + 0.1234567, (INTEGERS,)),
    "threshold": (lambda x: F.threshold(x, 0.1, -4.3228), (X,)),
    "where with a number": (lambda x: torch.where(x > 0, x, 0.1234567), (X,)),
    "arange by fractions": (lambda x: x[0] + torch.arange(0.0, 0.35, 0.1), (X,)),
    "attention, a query without keys": (F.scaled_dot_product_attention, (*HEADS, NO_KEY)),
    "attention, a query whose keys are infinitely far": (
        F.scaled_dot_product_attention,
        (*HEADS, torch.zeros(1, 1, 5, 5).masked_fill(~NO_KEY, -torch.inf)),
    ),
    "upsample_nearest2d by a fraction": (lambda x: F.interpolate(x, size=(10, 13), mode="nearest"), (IMAGE,)),
}
"""What coreai-torch 0.4.3 converts without a word to something else."""

FAILING = {
    "atan2 of integers": (torch.atan2, (INTEGERS, INTEGERS.flip(0))),
    "clamp of integers by fractions": (lambda i: torch.clamp(i, -1.5, 2.5), (INTEGERS,)),
    "avg_pool2d: ceil_mode": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False), (IMAGE,)),
    "avg_pool2d: divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), (IMAGE,)),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 3), (IMAGE[0],)),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2, 2, 1, count_include_pad=False), (_normal(1, 2, 4, 6, 5),)),
    "max_pool2d without a batch": (lambda x: F.max_pool2d(x, 3, 2, 1), (IMAGE[0],)),
    "max_pool2d: ceil_mode": (lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), (IMAGE,)),
    "product of booleans": (lambda x, y: (x > 0) * (y > 0), (X, Y)),
    "remainder by a number": (lambda x: torch.remainder(x, -0.7), (X,)),
    "remainder of integers": (lambda i: torch.remainder(i, 3), (INTEGERS,)),
    "shift to the left": (lambda i: i << 2, (INTEGERS,)),
    "shift to the right": (lambda i: i >> 1, (INTEGERS,)),
    "isnan": (torch.isnan, (NAN,)),
    "isfinite": (torch.isfinite, (torch.tensor([1.0, float("inf"), float("nan")]),)),
    "gather by fewer rows": (lambda x, i: torch.gather(x, 1, i), (X, torch.tensor([[0, 3], [2, 1]]))),
    "scatter_add": (lambda x, i, y: torch.scatter_add(x, 1, i, y), (X, torch.tensor([[0, 0, 1, 3]] * 3), Y)),
    "scatter_reduce": (lambda x, i, y: x.scatter_reduce(1, i, y, "prod"), (X, torch.tensor([[0, 0, 1, 3]] * 3), Y)),
    "index_put of a mask without a place": (lambda x: x.masked_fill(x > 99, 1.0) + x.index_put((x > 99,), torch.tensor(1.0)), (X,)),
    "bucketize": (lambda x: torch.bucketize(x, torch.tensor([-1.0, 0.0, 0.5])), (X,)),
    "searchsorted": (lambda x: torch.searchsorted(torch.tensor([-1.0, 0.0, 0.5]), x, right=True), (X,)),
    "sort": (lambda x: torch.sort(x, 1, descending=True).values, (X,)),
    "softplus": (lambda x: F.softplus(x, 2.0, 5.0), (4 * X,)),
    "rrelu": (lambda x: F.rrelu(x, 0.1, 0.5), (X,)),
    "var": (lambda x: torch.var(x, 1, correction=2), (X,)),
    "std of everything": (lambda x: torch.std(x + 1000.0), (X,)),
    "amax of everything": (torch.amax, (X,)),
    "amin of everything": (torch.amin, (X,)),
    "argmin": (lambda x: torch.argmin(x, 1, keepdim=True), (X,)),
    "argmin of everything": (torch.argmin, (X,)),
    "mean in another dtype": (lambda i: torch.mean(i, 0, dtype=torch.float32), (INTEGERS,)),
    "a norm of order 3": (lambda x: torch.linalg.vector_norm(x, 3.0, 1), (X,)),
    "a norm in another dtype": (lambda x: torch.linalg.vector_norm(x, 2, 0, dtype=torch.float32), (X.half(),)),
    "batch norm without weights": (lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3)), (IMAGE,)),
    "cdist": (torch.cdist, (X, Y)),
    "adaptive_avg_pool2d that enlarges": (lambda x: F.adaptive_avg_pool2d(x, (9, 5)), (IMAGE,)),
    "bilinear with antialiasing": (lambda x: F.interpolate(x, size=(4, 5), mode="bilinear", antialias=True), (IMAGE,)),
    "bicubic with antialiasing": (lambda x: F.interpolate(x, size=(4, 12), mode="bicubic", antialias=True), (IMAGE,)),
    "unfold": (lambda x: x.unfold(1, 2, 1), (X,)),
    "diagonal": (lambda x: torch.diagonal(x, 1), (X,)),
    "ldexp": (torch.ldexp, (X[0], torch.tensor([1, -2, 3, 0]))),
    "bilinear layer": (F.bilinear, (X, Y, _normal(2, 4, 4, seed=3))),
}
"""What coreai-torch 0.4.3 refuses, or its run time."""

DIGITS = {"log1p of small numbers", "expm1 of small numbers", "softplus"}
"""Where every number counts by its own size: held against float64."""


def test_every_lowering_is_applied():
    assert set(LOWERINGS) <= set(table())


@pytest.fixture(scope="module")
def results(coreai):
    cases = {**SILENT, **FAILING}
    return dict(zip(cases, coreai.cases(list(cases.values())), strict=True))


@pytest.mark.xdist_group("coreai lowerings")
@pytest.mark.parametrize("case", [*SILENT, *FAILING])
def test_the_run_time_computes_what_torch_computes(case, results, is_close):
    function, inputs = {**SILENT, **FAILING}[case]
    assert is_close(results[case], function(*inputs))
    if case in DIGITS:
        exact = function(*(x.double() for x in inputs)).numpy()
        assert (abs(results[case] - exact) <= 4e-7 * abs(exact)).all()


@pytest.fixture(scope="module")
def plain_results(coreai):
    return dict(zip(SILENT, coreai.cases(list(SILENT.values()), plain=True), strict=True))


@pytest.mark.xdist_group("coreai lowerings")
@pytest.mark.parametrize("case", list(SILENT))
def test_coreai_torch_alone_is_silently_wrong(case, plain_results, is_close):
    # The day that this fails, the lowering can go.
    function, inputs = SILENT[case]
    exact = function(*(x.double() for x in inputs)).float() if case in DIGITS else function(*inputs)
    good = is_close(plain_results[case], exact)
    if case in DIGITS:
        good = (abs(plain_results[case] - exact.numpy()) <= 4e-7 * abs(exact.numpy())).all()
    assert not good


@pytest.mark.xdist_group("coreai lowerings")
def test_tensors_of_the_largest_rank_that_is_let_through(coreai, is_close):
    def turned(x):
        return x.reshape(1, 2, 1, 2, 3, 1, 2, 1).permute(6, 3, 4, 1, 0, 2, 7, 5).sin().sum(3)

    assert _RANK == 8
    (got,) = coreai.cases([(turned, (_normal(4, 6),))])
    assert is_close(got, turned(_normal(4, 6)))


@pytest.mark.xdist_group("coreai lowerings")
def test_softplus_does_not_overflow_float16(coreai):
    # coreai-torch issue 103: exp(x) overflows float16 past x = 11.
    x = torch.linspace(-8.0, 60.0, 200).half()
    (got,) = coreai.cases([(F.softplus, (x,))])
    exact = F.softplus(x.double()).numpy()
    assert (abs(got - exact) <= 4e-3 * exact).all()
