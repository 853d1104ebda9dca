"""The search over choices of modules, against all choices; what it measures, and the front of Pareto."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.calibration.sensitivity import Unit
from isthmus.calibration.trials import sqnr_db
from isthmus.calibration.tuning import Budget, Point, dominates, front_of, point_value, search
from isthmus.exporter.errors import IsthmusError
from isthmus.exporter.spec import Samples


def made_up(random, count, equal):
    units = [Unit(f"m{i}", (), 100 if equal else random.randint(1, 100)) for i in range(count)]
    return units, [(random.uniform(1e-6, 1e-3),) for _ in range(count)]


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 9), st.booleans())
def test_the_search_is_near_the_best_of_all_choices_where_errors_add_up(random, count, equal):
    units, noises = made_up(random, count, equal)
    bound = random.uniform(min(n[0] for n in noises), 1.2 * sum(n[0] for n in noises))
    total = sum(unit.flops for unit in units)
    asked = []

    def measure(choices):
        asked.extend(choices)
        return [(sum(noises[i][0] for i in on),) for on in choices]

    budget = Budget(min_sqnr=sqnr_db([bound * (1 + 1e-9)]))
    subsets = [set(s) for n in range(1, count + 1) for s in itertools.combinations(range(count), n)]
    allowed = [sum(units[i].flops for i in s) / total for s in subsets if sum(noises[i][0] for i in s) <= bound]
    found = search(units, total, budget, noises=measure)
    assert found.best.sqnr_db >= budget.min_sqnr
    # Of a relaxed knapsack that is rounded down, one module is missing at the most.
    assert found.best.share >= max(allowed) - max(unit.flops for unit in units) / total - 1e-12
    if equal:
        assert found.best.share == pytest.approx(max(allowed))
    assert len(asked) == len(set(asked))


def test_a_choice_is_measured_when_errors_do_not_add_up():
    units = [Unit(f"m{i}", (), 10) for i in range(6)]
    single = [1e-4 * (i + 1) for i in range(6)]

    def measure(choices):
        # The first two together are far worse than they are alone.
        return [(sum(single[i] for i in on) + (0.1 if {0, 1} <= set(on) else 0.0),) for on in choices]

    found = search(units, 60, Budget(min_sqnr=26.0), noises=measure)
    assert found.best.sqnr_db >= 26
    assert found.best.share == pytest.approx(5 / 6)  # all but one of the two
    assert found.predicted_sqnr_db == pytest.approx(found.best.sqnr_db)


def test_pictures_are_drawn_for_what_keeps_the_other_bound_only():
    units = [Unit(f"m{i}", (), 10) for i in range(8)]
    drawn = []

    def psnr(on):
        drawn.append(on)
        return 50.0 - 2 * len(on)

    def measure(choices):
        return [(1e-4 * max(len(on), 1),) for on in choices]

    found = search(units, 80, Budget(min_sqnr=32.0, min_psnr=40.0), noises=measure, psnr=psnr)
    assert len(found.best.on) == 5
    assert found.best.psnr_db == 40
    assert all(len(on) <= 6 for on in drawn)
    assert len(drawn) == len(set(drawn))


def test_distances_are_measured_for_what_keeps_the_other_bounds_only():
    units = [Unit(f"m{i}", (), 10) for i in range(8)]
    asked = []

    def lpips(on):
        asked.append(on)
        return 0.01 * len(on)

    def measure(choices):
        return [(1e-4 * max(len(on), 1),) for on in choices]

    found = search(units, 80, Budget(max_lpips=0.04), noises=measure, psnr=lambda _on: 40.0, lpips=lpips)
    assert (len(found.best.on), found.best.lpips_style, found.best.psnr_db) == (4, 0.04, None)
    assert len(asked) == len(set(asked))
    asked.clear()
    both = Budget(min_psnr=40.0, max_lpips=0.04)
    found = search(units, 80, both, noises=measure, psnr=lambda on: 46.0 - 2 * len(on), lpips=lpips)
    assert (len(found.best.on), found.best.lpips_style, found.best.psnr_db) == (3, 0.03, 40.0)
    assert all(len(on) <= 3 for on in asked)
    assert point_value(found.best, units)["lpips_style"] == 0.03
    with pytest.raises(IsthmusError, match="no module fits") as error:
        search(units, 80, Budget(max_lpips=0.001), noises=measure, lpips=lpips)
    assert "40.00 dB of SQNR and an LPIPS-style distance of 0.01" in str(error.value)
    assert "a larger --max-lpips" in str(error.value)


def test_modules_that_spoil_the_pictures_come_last_where_the_budget_is_about_pictures():
    """The output hardly tells the modules apart, the pictures do, and the other way round."""
    units = [Unit(f"m{i}", (), 10) for i in range(8)]
    of_output = [1e-5 * (8 - i) for i in range(8)]
    of_pictures = [1e-6 * 4**i for i in range(8)]
    drawn = []

    def measure(choices):
        return [(sum(of_output[i] for i in on),) for on in choices]

    def psnr(on):
        drawn.append(on)
        return sqnr_db([sum(of_pictures[i] for i in on)])

    bound = sqnr_db([1.01 * sum(of_pictures[:5])])
    found = search(units, 80, Budget(min_psnr=bound), noises=measure, psnr=psnr)
    assert found.order == tuple(range(8))
    assert found.best.on == frozenset(range(5))
    assert [point.psnr_db for point in found.alone] == pytest.approx([sqnr_db([noise]) for noise in of_pictures])
    assert [point.sqnr_db for point in found.alone] == pytest.approx([sqnr_db([noise]) for noise in of_output])
    assert len(drawn) == len(set(drawn)), "what is drawn for the order is not drawn again"

    found = search(units, 80, Budget(min_sqnr=40.0), noises=measure, psnr=psnr)
    assert found.order == tuple(range(7, -1, -1))
    assert {point.psnr_db for point in found.alone} == {None}

    # Of two bounds, the one that a module spends the largest part of says what it costs.
    both = Budget(min_sqnr=sqnr_db([1e-4]), min_psnr=sqnr_db([1e-2]))
    found = search(units, 80, both, noises=measure, psnr=psnr)
    parts = [max(a / 1e-4, b / 1e-2) for a, b in zip(of_output, of_pictures, strict=True)]
    assert found.order == tuple(sorted(range(8), key=lambda i: parts[i]))

    distances = [0.08, 0.01, 0.02, 0.01, 0.04, 0.03, 0.02, 0.01]
    found = search(units, 80, Budget(max_lpips=0.1), noises=measure, psnr=psnr, lpips=lambda on: sum(distances[i] for i in sorted(on)))
    assert found.order == (1, 3, 7, 2, 6, 5, 4, 0)
    assert found.best.on == {1, 3, 7, 2, 6, 5}
    assert [point.lpips_style for point in found.alone] == distances
    assert None not in [point.psnr_db for point in found.alone], "the pictures are there anyway"


def test_two_measures_of_the_same_pictures_draw_once(tmp_path, monkeypatch):
    from isthmus import tuning

    drawn = []

    class Graph:
        def __init__(self, _folder):
            pass

        def run(self, inputs, on):
            drawn.append(on)
            return {"y": inputs["x"] + 0.1 * len(on)}

    def sampler(step, rng):
        return Samples(step({"x": rng.random((2, 8, 8)).astype(np.float32)})["y"], ("a", "b"))

    monkeypatch.setattr(tuning, "Trials", Graph)
    read = []
    monkeypatch.setattr(tuning, "normalised_features", lambda images: read.append(images) or [[]])
    monkeypatch.setattr(tuning, "lpips_style", lambda x, y, **_: list(np.abs(x - y).mean(axis=(1, 2))))
    pictures = tuning._Pictures(sampler, tmp_path, 0)
    one, two = frozenset([1]), frozenset([1, 2])
    assert pictures.lpips(one) == pytest.approx(0.1, abs=1e-6)
    assert pictures.psnr(one) == pytest.approx(20, abs=1)
    assert drawn == [frozenset(), one]
    assert pictures.lpips(two) == pytest.approx(0.2, abs=1e-6)
    assert drawn == [frozenset(), one, two]
    assert len(read) == 1, "the network sees the pictures without quantisation once"
    monkeypatch.setattr(tuning, "lpips_style", lambda _x, _y, **_: [0.1, np.nan])
    assert pictures.lpips(two) == tuning.LARGEST


def test_no_module_fits():
    with pytest.raises(IsthmusError, match="no module fits") as error:
        search([Unit("a.b", (), 1)], 1, Budget(min_sqnr=50.0), noises=lambda choices: [(1e-3,) for _ in choices])
    assert "a.b, leaves 30.00 dB" in str(error.value)


def test_the_front_of_pareto():
    points = [Point(frozenset([i]), share, sqnr) for i, (share, sqnr) in enumerate([(0.1, 40), (0.5, 30), (0.4, 29), (0.5, 31), (1.0, 20)])]
    assert [(p.share, p.sqnr_db) for p in front_of(points)] == [(0.1, 40), (0.5, 31), (1.0, 20)]
    assert dominates(points, 0.5, 30)
    assert not dominates(points, 1.0, 20)
    assert not dominates(points, 0.6, 30)
