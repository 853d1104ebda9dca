"""Chains of reshapes and transposes, against PyTorch doing them one after the other."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from isthmus.targets.coreml.layout.enter import entering, leaving
from isthmus.targets.coreml.layout.movement import Movement

Step = tuple[str, tuple[int, ...]]

FAST = settings(max_examples=80, deadline=None)


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


def done(x: np.ndarray, steps: list[Step]) -> np.ndarray:
    for name, numbers in steps:
        x = x.reshape(numbers) if name == "view" else x.transpose(numbers)
    return x


def acted(movement: Movement, x: np.ndarray) -> np.ndarray:
    return x.reshape(movement.factors).transpose(movement.order).reshape(movement.target)


@st.composite
def shapes_of(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    """A shape of so many elements: its prime factors, joined at random, with axes of 1."""
    axes, rest = [], size
    while rest > 1:
        divisors = [d for d in range(2, rest + 1) if rest % d == 0]
        axes.append(draw(st.sampled_from(divisors)))
        rest //= axes[-1]
    for _ in range(draw(st.integers(0, 2))):
        axes.insert(draw(st.integers(0, len(axes))), 1)
    return tuple(axes)


@st.composite
def chains(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Step]]:
    size = draw(st.sampled_from([1, 2, 6, 8, 12, 24, 36, 64, 210]))
    shape = start = draw(shapes_of(size))
    steps: list[Step] = []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            shape = draw(shapes_of(size))
            steps.append(("view", shape))
        else:
            order = tuple(draw(st.permutations(range(len(shape)))))
            shape = tuple(shape[i] for i in order)
            steps.append(("permute", order))
    return start, steps


def composed(start: tuple[int, ...], steps: list[Step]) -> Movement | None:
    movement: Movement | None = Movement.identity(start)
    for name, numbers in steps:
        if movement is not None:
            step = Movement.view(movement.target, numbers) if name == "view" else Movement.permute(movement.target, numbers)
            movement = movement.then(step)
    return movement


@FAST
@given(chains())
def test_a_chain_is_one_movement(chain: tuple[tuple[int, ...], list[Step]]) -> None:
    start, steps = chain
    movement = composed(start, steps)
    assume(movement is not None)
    x = numbered(start)
    np.testing.assert_array_equal(acted(movement, x), done(x, steps))
    assert movement.is_identity == (movement.target == start and np.array_equal(done(x, steps), x))


@FAST
@given(chains())
def test_the_inverse_undoes_it(chain: tuple[tuple[int, ...], list[Step]]) -> None:
    movement = composed(*chain)
    assume(movement is not None)
    assert movement.then(movement.inverse()) == Movement.identity(movement.source)
    assert movement.inverse().then(movement) == Movement.identity(movement.target)


@FAST
@given(chains())
def test_its_steps_are_three_at_most_and_do_it(chain: tuple[tuple[int, ...], list[Step]]) -> None:
    movement = composed(*chain)
    assume(movement is not None)
    steps = list(movement.steps())
    assert len(steps) <= 3
    assert sum(name == "permute" for name, _ in steps) <= 1
    x = numbered(movement.source)
    np.testing.assert_array_equal(done(x, steps), acted(movement, x))
    assert composed(movement.source, steps) == movement, "equal movements are equal values"


@FAST
@given(chains(), st.data())
def test_what_broadcasts_with_the_target_broadcasts_with_the_source(chain: tuple[tuple[int, ...], list[Step]], data: st.DataObject) -> None:
    movement = composed(*chain)
    assume(movement is not None)
    full = tuple(data.draw(st.sampled_from([1, size])) for size in movement.target)
    shape = full[data.draw(st.integers(0, next((i for i, n in enumerate(full) if n != 1), len(full)))) :]
    pulled = movement.pulled(shape)
    assume(pulled is not None)
    x, y = numbered(movement.source), numbered(shape) * 1000
    assert pulled.source == shape
    np.testing.assert_array_equal(acted(movement, x + acted(pulled, y)), acted(movement, x) + y)


@FAST
@given(chains(), st.data())
def test_a_cut_of_the_target_is_a_cut_of_the_source(chain: tuple[tuple[int, ...], list[Step]], data: st.DataObject) -> None:
    movement = composed(*chain)
    assume(movement is not None and movement.target)
    axes = movement.axes()
    axis = data.draw(st.integers(0, len(movement.target) - 1))
    found = axes.leading(axis) if axes is not None else None
    assume(found is not None)
    place, inner = found
    start = data.draw(st.integers(0, movement.target[axis] - 1))
    stop = data.draw(st.integers(start + 1, movement.target[axis]))
    x = numbered(movement.source)
    part = np.take(x, range(start * inner, stop * inner), axis=place)
    resized = axes.resized(axis, stop - start)
    assert resized.source == part.shape
    np.testing.assert_array_equal(acted(resized, part), np.take(acted(movement, x), range(start, stop), axis=axis))


@FAST
@given(chains())
def test_whole_axes_are_found_again(chain: tuple[tuple[int, ...], list[Step]]) -> None:
    movement = composed(*chain)
    axes = movement.axes() if movement is not None else None
    assume(axes is not None)
    x = numbered(movement.source)
    for axis in range(len(movement.target)):
        place = axes.same(axis)
        if place is not None:
            summed, expected = acted(axes.resized(axis, 1), x.sum(place, keepdims=True)), acted(movement, x).sum(axis, keepdims=True)
            np.testing.assert_array_equal(summed, expected)


def test_no_common_factors() -> None:
    first, second = Movement.permute((2, 3), (1, 0)), Movement.permute((2, 3), (1, 0))
    assert first.then(Movement.view((3, 2), (2, 3))).then(second) is None
    assert Movement.view((2, 3), (3, 2)).axes() is None
    assert Movement.view((2, 3), (3, 2)).pulled((3, 1)) is None


def test_other_numbers_of_elements_are_refused() -> None:
    with pytest.raises(AssertionError, match="other numbers of elements"):
        Movement.view((2, 3), (7,))
    with pytest.raises(AssertionError, match="after"):
        Movement.identity((2, 3)).then(Movement.identity((3, 2)))


@pytest.mark.parametrize(
    ("shape", "last", "laid_out"),
    [
        ((5,), 1, (1, 5, 1, 1)),
        ((2, 5), 1, (2, 5, 1, 1)),
        ((2, 3, 5), 1, (2, 5, 1, 3)),
        ((2, 3, 4, 5), 1, (2, 5, 1, 12)),
        ((2, 3, 4, 5), 2, (2, 20, 1, 3)),
        ((2, 3, 4, 5), 4, (1, 120, 1, 1)),
        ((1, 1, 1), 1, (1, 1, 1, 1)),
    ],
)
def test_the_layout(shape: tuple[int, ...], last: int, laid_out: tuple[int, ...]) -> None:
    x = numbered(shape)
    entered = acted(entering(shape, last), x)
    assert entered.shape == laid_out
    np.testing.assert_array_equal(entered[:, :, 0].transpose(0, 2, 1).reshape(shape), x)
    np.testing.assert_array_equal(acted(entering(shape, last).inverse(), entered), x)
    if last == 1 and len(shape) > 1:
        assert leaving(shape, 7).target == (*shape[:-1], 7)


def test_a_transposition_keeps_the_axes_of_the_model() -> None:
    """Of the factorings that would do, the one whose axes are those that source and target tell apart."""
    to_pixels = [("view", (2, 4, 4, 2, 2, 8)), ("permute", (0, 5, 1, 3, 2, 4)), ("view", (2, 8, 8, 8))]  # of a DiT: six axes
    whole = composed((2, 32, 1, 16), [("permute", (0, 3, 2, 1)), ("view", (2, 16, 32)), *to_pixels])
    assert whole is not None
    assert list(whole.steps()) == [("view", (2, 2, 2, 32, 4)), ("permute", (0, 3, 1, 4, 2)), ("view", (2, 8, 8, 8))]
    assert list(Movement.permute((2, 3, 4), (0, 2, 1)).steps()) == [("permute", (0, 2, 1))]
    assert list(Movement.view((2, 3), (6,)).steps()) == [("view", (6,))]
    assert list(Movement.identity((2, 3)).steps()) == []
