"""Metrics against formulas written out in float64, and against scipy and numpy."""

import json
import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.distance import cosine as cosine_distance

from isthmus.calibration import metrics
from isthmus.calibration.metrics import DEFAULT_TOLERANCES, check, compare, misses
from isthmus.exporter.manifest import HISTOGRAM_EDGES, OutputMetrics
from isthmus.exporter.spec import Tolerance

NUMBERS = ("max_abs", "mean_abs", "range", "max_relative", "relative_l2", "cosine", "sqnr_db", "psnr_db")


def measured(reference, candidate, tolerance=None):
    return compare(np.asarray(reference), np.asarray(candidate), case="example", output="noise", tolerance=tolerance)


def formulas(reference, candidate):
    """The definitions, with no regard for memory or overflow."""
    r, c = np.asarray(reference, np.float64).ravel(), np.asarray(candidate, np.float64).ravel()
    e = c - r
    extent = r.max() - r.min()
    return {
        "max_abs": np.abs(e).max(),
        "mean_abs": np.abs(e).mean(),
        "range": extent,
        "max_relative": np.abs(e).max() / extent,
        "relative_l2": np.linalg.norm(e) / np.linalg.norm(r),
        "cosine": 1 - cosine_distance(r, c),
        "sqnr_db": 10 * np.log10((r**2).sum() / (e**2).sum()),
        "psnr_db": 20 * np.log10(extent / np.sqrt((e**2).mean())),
    }


def noisy(seed, shape=(3, 5, 7), dtype=np.float32, error=1e-3):
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal(shape) * 3 + 1
    return reference.astype(dtype), (reference + error * rng.standard_normal(shape)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1, 64, 33), (11,)])
def test_follows_the_formulas(dtype, shape):
    reference, candidate = noisy(1, shape, dtype, error=0.2)
    got = measured(reference, candidate)
    for name, value in formulas(reference, candidate).items():
        assert getattr(got, name) == pytest.approx(value, rel=1e-12, abs=1e-12), name
    assert (got.case, got.output, got.shape, got.problem, got.excess) == ("example", "noise", shape, "", None)


def test_histogram_is_numpys():
    rng = np.random.default_rng(2)
    reference = rng.uniform(0, 1, 5000)
    reference[:2] = 0, 1  # so that the range is 1
    candidate = reference + 10.0 ** rng.uniform(-12, 2, 5000) * rng.choice([-1, 1], 5000)
    candidate[:2] = 0, 1
    edges = np.array([0, *(10.0**e for e in HISTOGRAM_EDGES), np.inf])
    expected, _ = np.histogram(np.abs(candidate - reference), edges)
    assert measured(reference, candidate).histogram == tuple(expected)
    assert (expected > 100).all()


def test_every_decade_has_its_bin():
    # One error of 3 * 10^k for k = -10 … 1, on a reference with range 1.
    errors = [3.0 * 10.0**k for k in range(-10, 2)]
    assert measured([0.0, 1.0, *[0.0] * 12], [0.0, 1.0, *errors]).histogram == (3, *[1] * 11)


@pytest.mark.parametrize("reference", [np.zeros(4), np.full(4, 7.5), np.arange(4.0), np.zeros(0), np.zeros((2, 0, 3)), np.array(2.5)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_])
def test_no_error(reference, dtype):
    reference = reference.astype(dtype)
    got = measured(reference, reference.copy())
    assert (got.max_abs, got.mean_abs, got.max_relative, got.relative_l2, got.cosine) == (0, 0, 0, 0, 1)
    assert (got.sqnr_db, got.psnr_db, got.problem) == (math.inf, math.inf, "")
    assert got.histogram == (reference.size, *[0] * 11)
    assert check([got], Tolerance(max_relative=0, min_psnr=200, atol=0, rtol=0)) == []


def test_zero_reference():
    got = measured(np.zeros(4), [0.0, 0.0, 0.5, 0.0])
    assert (got.range, got.max_relative, got.relative_l2, got.cosine) == (0, math.inf, math.inf, 0)
    assert (got.sqnr_db, got.psnr_db) == (-math.inf, -math.inf)
    assert got.histogram == (3, *[0] * 10, 1)
    assert measured([0.0, 1.0], np.zeros(2)).cosine == 0


def test_constant_reference():
    got = measured(np.full(4, 2.0), [2.0, 2.0, 2.0, 3.0])
    assert (got.range, got.max_relative, got.psnr_db) == (0, math.inf, -math.inf)
    assert got.relative_l2 == pytest.approx(1 / 4)
    assert got.sqnr_db == pytest.approx(10 * math.log10(16))
    (reason,) = check([got], Tolerance(max_relative=1e-5))
    assert "--atol" in reason.fix


def test_scalar():
    got = measured(np.float32(2), np.float32(3))
    assert (got.shape, got.max_abs, got.relative_l2) == ((), 1, 0.5)


def test_integers_are_compared_exactly():
    # float64 cannot tell these apart, nor hold the difference of the extremes in an int64.
    assert measured(np.array([2**62, 0]), np.array([2**62 + 1, 0])).max_abs == 1
    assert measured(np.array([2**64 - 1, 0], np.uint64), np.array([2**64 - 2, 0], np.uint64)).max_abs == 1
    got = measured(np.array([2**63 - 1, -(2**63)]), np.array([-(2**63), -(2**63)]))
    assert got.max_abs == float(2**64 - 1)
    assert got.range == float(2**64 - 1)
    got = measured(np.array([3, 250], np.uint8), np.array([5, 249], np.uint8))
    assert (got.max_abs, got.mean_abs, got.range, got.max_relative) == (2, 1.5, 247, 2 / 247)


def test_booleans():
    got = measured([True, False, True, True], [True, True, True, True])
    assert (got.max_abs, got.mean_abs, got.range, got.max_relative) == (1, 0.25, 1, 1)


def test_float64_beyond_its_square_root():
    for scale in (1e300, 1e-300):
        reference, candidate = noisy(3, dtype=np.float64)
        got, expected = measured(reference * scale, candidate * scale), formulas(reference, candidate)
        for name in ("max_relative", "relative_l2", "cosine", "sqnr_db", "psnr_db"):
            assert getattr(got, name) == pytest.approx(expected[name], rel=1e-9), name
    huge = measured([-1.7e308, 1.7e308], [1.7e308, 1.7e308])
    assert (huge.max_abs, huge.max_relative) == (math.inf, 1)


def test_nan_and_inf_are_named():
    reference, candidate = noisy(4)
    candidate[0, 1, 2] = candidate[2, 0, 0] = np.nan
    candidate[1, 4, 6] = -np.inf
    got = measured(reference, candidate)
    assert got.problem == "artifact has 2 NaN of 105 values (the first at [0, 1, 2]) and 1 Inf of 105 values (the first at [1, 4, 6])"
    assert (got.max_abs, got.max_relative, got.psnr_db, got.histogram) == (math.inf, math.inf, -math.inf, ())
    assert got.range == formulas(reference, reference + 1)["range"]
    both = measured(candidate, candidate)
    assert both.problem.startswith("reference has 2 NaN")
    assert "artifact has 2 NaN" in both.problem
    assert math.isnan(both.range)
    assert math.isnan(both.cosine)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_nan_of_narrow_floats(dtype):
    assert "artifact has 1 NaN" in measured(np.array([1, 2], dtype), np.array([1, np.nan], dtype)).problem


def test_fp16_overflow_is_a_problem():
    assert "1 Inf" in measured(np.array([7e4, 1], np.float32), np.array([np.inf, 1], np.float16)).problem


@pytest.mark.parametrize(
    ("reference", "candidate", "words"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2)), "shape [3, 2], expected [2, 3]"),
        (np.zeros(()), np.zeros(1), "shape [1], expected []"),
        (np.zeros(2, np.float32), np.zeros(2, np.int64), "dtype int64, expected float32"),
        (np.zeros(2, np.int32), np.zeros(2, np.uint32), "dtype uint32, expected int32"),
        (np.zeros(2, bool), np.zeros(2, np.uint8), "dtype uint8, expected bool"),
        (np.zeros(2, complex), np.zeros(2, complex), "dtype complex128 cannot be compared"),
        (np.zeros(2, "U3"), np.zeros(2, "U3"), "cannot be compared"),
    ],
)
def test_mismatches_are_named(reference, candidate, words):
    got = measured(reference, candidate)
    assert words in got.problem
    assert (got.shape, got.psnr_db) == (reference.shape, -math.inf)
    assert check([got], Tolerance()), "a problem is a miss even where nothing is bounded"


def test_widths_of_one_kind_may_differ():
    reference, _ = noisy(5)
    got = measured(reference, reference.astype(np.float16))
    assert got.problem == ""
    assert 0 < got.max_relative < 2**-11


@pytest.mark.parametrize("candidate", [[0.0, 1.0], [0.0, np.nan], [np.inf, 0.0], [0.5, 1.5]], ids=["equal", "nan", "inf", "different"])
def test_json_is_valid_and_comes_back(candidate):
    got = measured([0.0, 1.0], candidate, Tolerance(atol=0.0))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = got.model_dump_json()
    json.loads(text, parse_constant=refuse)
    again = OutputMetrics.model_validate_json(text)
    assert again.model_dump_json() == text
    for name in NUMBERS:
        assert getattr(again, name) == pytest.approx(getattr(got, name), nan_ok=True)


floats = st.floats(-1e4, 1e4, width=32)
pairs = hnp.array_shapes(max_dims=3, max_side=9).flatmap(
    lambda shape: st.tuples(hnp.arrays(np.float32, shape, elements=floats), hnp.arrays(np.float32, shape, elements=floats))
)


@given(pairs, st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_chunks_change_nothing(pair, chunk):
    whole = measured(*pair)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "CHUNK", chunk)
        parts = measured(*pair)
    assert parts.histogram == whole.histogram
    for name in NUMBERS:
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-9, abs=1e-9), name


@given(pairs, st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_the_first_nan_is_found_in_any_chunk(pair, chunk):
    reference, candidate = pair
    position = candidate.size // 2
    candidate.reshape(-1)[position:] = np.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "CHUNK", chunk)
        problem = measured(reference, candidate).problem
    index = ", ".join(str(i) for i in np.unravel_index(position, candidate.shape))
    assert problem == f"artifact has {candidate.size - position} NaN of {candidate.size} values (the first at [{index}])"


@given(pairs, st.integers(-60, 60))
@settings(max_examples=60, deadline=None)
def test_scaling_both_sides_changes_nothing_relative(pair, power):
    # By powers of two, so that scaling itself does not round.
    reference, candidate = (x.astype(np.float64) for x in pair)
    got, scaled = measured(reference, candidate), measured(reference * 2.0**power, candidate * 2.0**power)
    for name in ("max_relative", "relative_l2", "cosine", "sqnr_db", "psnr_db", "histogram"):
        assert getattr(scaled, name) == getattr(got, name), name
    assert scaled.max_abs == got.max_abs * 2.0**power


@given(pairs)
@settings(max_examples=60, deadline=None)
def test_invariants(pair):
    got = measured(*pair)
    assert sum(got.histogram) == pair[0].size
    assert 0 <= got.mean_abs <= got.max_abs * (1 + 1e-12)
    assert -1 <= got.cosine <= 1
    assert (got.max_abs == 0) == (got.psnr_db == math.inf) == (got.sqnr_db == math.inf)


def test_layout_does_not_matter():
    reference, candidate = noisy(6, (4, 6, 8))
    whole = measured(reference, candidate)
    turned = measured(reference.transpose(2, 0, 1), candidate.transpose(2, 0, 1))
    assert turned.psnr_db == pytest.approx(whole.psnr_db, rel=1e-12)
    # Index and pairing follow C order of the view, not of the memory.
    candidate[1, 2, 3] = np.nan
    assert "[3, 1, 2]" in measured(reference.transpose(2, 0, 1), candidate.transpose(2, 0, 1)).problem
    assert measured(np.asfortranarray(reference), reference).max_abs == 0


def test_memory_is_bounded():
    reference = np.zeros((64, 2**18), np.float16)  # 32 MiB; float64 would be 128 MiB
    candidate = reference.copy()
    tracemalloc.start()
    try:
        measured(reference, candidate)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 * 2**20


def row(case="example", output="noise", **values):
    reference, candidate = noisy(7)
    return compare(reference, candidate, case=case, output=output).model_copy(update=values)


def test_check_reports_every_miss_worst_first():
    rows = [
        row("example", max_relative=2e-5, psnr_db=90.0),
        row("second", max_relative=1e-6, psnr_db=120.0),
        row("batch=3", max_relative=4e-3, psnr_db=50.0),
        row("second", "variance", problem="artifact has 1 NaN"),
    ]
    reasons = check(rows, Tolerance(max_relative=1e-5, min_psnr=60.0))
    assert [r.where for r in reasons] == [
        "case second, output variance",
        "case batch=3, output noise",
        "case batch=3, output noise",
        "case example, output noise",
    ]
    assert reasons[0].what == "artifact has 1 NaN"
    assert reasons[1].what == "max |error| / range is 0.004, expected at most 1e-05"
    assert reasons[2].what == "PSNR is 50 dB, expected at least 60 dB"
    assert check(rows[:3], Tolerance()) == []
    assert check([], Tolerance(max_relative=0.0)) == []


@pytest.mark.parametrize("tolerance", [Tolerance(max_relative=1.0), Tolerance(min_psnr=1.0), Tolerance(atol=1.0)])
def test_nan_keeps_no_bound(tolerance):
    nan = row(max_relative=math.nan, psnr_db=math.nan, max_abs=math.nan)
    assert len(check([nan], tolerance)) == 1


@given(pairs, st.floats(0, 1e3), st.floats(0, 2))
@settings(max_examples=60, deadline=None)
def test_atol_and_rtol_are_allclose(pair, atol, rtol):
    reference, candidate = (x.astype(np.float64) for x in pair)
    tolerance = Tolerance(atol=atol, rtol=rtol)
    got = measured(reference, candidate, tolerance)
    if abs(got.excess - 1) < 1e-9:
        return  # rounding decides
    assert (check([got], tolerance) == []) == np.allclose(candidate, reference, rtol=rtol, atol=atol)


def test_excess_is_the_worst_quotient():
    got = measured([1.0, 100.0, 0.0], [1.5, 103.0, 0.0], Tolerance(atol=0.1, rtol=0.01))
    assert got.excess == pytest.approx(0.5 / 0.11)
    (miss,) = misses(got, Tolerance(atol=0.1, rtol=0.01))
    assert miss.metric == "excess"
    assert "4.55 times" in miss.text
    assert measured([0.0, 1.0], [1e-30, 1.0], Tolerance(rtol=0.5)).excess == math.inf
    assert measured(np.array([0, 10]), np.array([0, 14]), Tolerance(atol=2.0)).excess == 2


def test_metrics_without_the_tolerance_are_held_to_atol_alone():
    got = measured([1.0, 100.0], [1.0, 103.0])
    assert check([got], Tolerance(atol=3.0, rtol=0.0)) == []
    assert check([got], Tolerance(atol=1.0, rtol=0.5)), "nothing is claimed of what was not measured"
    assert check([measured([1.0, 2.0], [1.0, 2.0])], Tolerance(rtol=1e-3)) == []


def test_default_tolerances_tell_rounding_from_mistakes():
    """Values rounded once to the format pass; values off by 0.3 standard deviations (int4: by one) do not."""
    rng = np.random.default_rng(8)
    reference = rng.standard_normal((4, 4, 32, 32)).astype(np.float32)
    formats = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp8": ml_dtypes.float8_e4m3fn}
    assert set(DEFAULT_TOLERANCES) == {*formats, "int8", "int4"}
    rounded = {name: reference.astype(dtype).astype(np.float32) for name, dtype in formats.items()}
    for name, levels, limit in (("int8", 255, 4.5), ("int4", 15, 2.7)):
        step = 2 * limit / levels
        rounded[name] = np.clip(np.round(reference / step), -(levels // 2), levels // 2).astype(np.float32) * np.float32(step)
    for name, tolerance in DEFAULT_TOLERANCES.items():
        assert check([measured(reference, rounded[name])], tolerance) == [], name
        wrong = reference + (1.0 if name == "int4" else 0.3) * rng.standard_normal(reference.shape).astype(np.float32)
        assert check([measured(reference, wrong)], tolerance), name


@pytest.mark.parametrize("dtype", [np.int64, np.bool_])
def test_integers_have_to_be_equal_unless_a_bound_is_given(dtype: type) -> None:
    reference = np.arange(1000).astype(dtype)
    wrong = reference.copy()
    wrong[500] = 0 if dtype is np.bool_ else 501
    loose = Tolerance(max_relative=0.5, min_psnr=1.0)
    assert check([compare(reference, reference.copy(), case="example", output="y")], loose) == []
    (reason,) = check([compare(reference, wrong, case="example", output="y")], loose)
    assert "expected equal values" in reason.what
    given = Tolerance(atol=1.0)
    assert check([compare(reference, wrong, case="example", output="y", tolerance=given)], given) == []
