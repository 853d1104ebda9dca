"""Betti numbers of shapes whose Betti numbers are known."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from isthmus.calibration.topology import compare_topology, topology
from isthmus.exporter.errors import MachineError


def circle(rng, count=120, *, centre=(0.0, 0.0), noise=0.02):
    angle = rng.uniform(0, 2 * np.pi, count)
    return np.stack([np.cos(angle), np.sin(angle)], 1) + centre + noise * rng.standard_normal((count, 2))


def sphere(rng, count=500):
    points = rng.standard_normal((count, 3))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def torus(rng, count=1500):
    u, v = rng.uniform(0, 2 * np.pi, (2, count))
    return np.stack([(2 + np.cos(v)) * np.cos(u), (2 + np.cos(v)) * np.sin(u), np.sin(v)], 1)


@pytest.mark.parametrize("seed", range(4))
def test_a_circle_is_one_piece_with_one_loop(seed):
    assert topology(circle(np.random.default_rng(seed))).betti == (1, 1)


@pytest.mark.parametrize("seed", range(4))
def test_two_circles(seed):
    rng = np.random.default_rng(seed)
    assert topology(np.concatenate([circle(rng), circle(rng, centre=(4.0, 0.0))])).betti == (2, 2)


def test_a_sphere_has_a_cavity_and_a_torus_two_loops_as_well():
    assert topology(sphere(np.random.default_rng(2)), max_dimension=2).betti == (1, 0, 1)
    assert topology(torus(np.random.default_rng(3)), max_dimension=2).betti == (1, 2, 1)


@pytest.mark.parametrize("seed", range(3))
def test_a_blob_has_no_loop(seed):
    assert topology(np.random.default_rng(seed).uniform(size=(300, 2))).betti == (1, 0)


def test_a_circle_in_many_dimensions():
    rng = np.random.default_rng(4)
    frame, _ = np.linalg.qr(rng.standard_normal((9, 2)))
    found = topology(circle(rng, 400) @ frame.T, landmarks=60)
    assert found.betti == (1, 1)
    assert len(found.intervals[0]) == 60
    # A Rips complex of a unit circle: the loop dies at the side of an equilateral triangle in it.
    assert abs(found.intervals[1][0, 1] - np.sqrt(3)) < 0.2


def test_births_and_deaths_are_diameters():
    square = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    found = topology(square)
    np.testing.assert_allclose(found.intervals[1], [[1, np.sqrt(2)]])
    np.testing.assert_allclose(found.intervals[0], [[0, np.inf], [0, 1], [0, 1], [0, 1]])


def test_one_point_and_equal_points():
    assert topology(np.zeros((1, 2))).betti == (1, 0)
    assert topology(np.ones((5, 4))).betti == (1, 0)


def test_comparison():
    rng = np.random.default_rng(5)
    points = circle(rng)
    same = compare_topology(points, points + 1e-3 * rng.standard_normal(points.shape))
    assert same.agree
    assert max(same.distances) < 1e-2
    assert max(compare_topology(points, points).distances) < 1e-12
    filled = compare_topology(points, points * np.sqrt(rng.uniform(size=(120, 1))))
    assert not filled.agree
    assert filled.distances[1] > 0.1


@pytest.mark.parametrize("points", [np.zeros((0, 2)), np.array([[0.0, np.nan]])])
def test_what_is_no_cloud(points):
    with pytest.raises(ValueError, match="got"):
        topology(points)


def test_without_gudhi(monkeypatch):
    monkeypatch.setitem(sys.modules, "gudhi", None)
    with pytest.raises(MachineError, match="needs the package gudhi"):
        topology(np.zeros((1, 2)))


def test_clouds_that_are_compared_have_the_same_landmarks():
    """Rips complexes of 60 out of 400 points: with landmarks of its own, the second cloud's diagram would be another sample's."""
    rng = np.random.default_rng(5)
    reference = np.concatenate([circle(rng, 400), np.zeros((400, 2))], 1)
    found = compare_topology(reference, reference + 1e-3 * rng.standard_normal(reference.shape), landmarks=60)
    assert found.agree
    assert max(found.distances) < 4e-3
