"""The inputs that artifacts are verified at."""

from __future__ import annotations

import pytest
import torch

from isthmus.calibration.cases import cases_of_example, cases_of_spec
from isthmus.exporter.errors import IsthmusError
from isthmus.exporter.spec import MODELS, SizeRange


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name.endswith(("-tiny", "-digits")) else (pytest.mark.matrix, pytest.mark.full)) for name in MODELS],
)
def test_every_model_gives_two_inputs_that_differ_and_one_at_another_size(name: str) -> None:
    spec = MODELS[name].spec()
    cases = cases_of_spec(spec, spec.sizes, seed=0)
    again = cases_of_spec(spec, spec.sizes, seed=0)
    assert list(cases) == ["example", "second", "resized"]
    for case, tensors in cases.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, again[case][key], rtol=0, atol=0)
    floating = [key for key, t in cases["example"].items() if t.is_floating_point()]
    assert all(not torch.equal(cases["example"][key], cases["second"][key]) for key in floating)
    assert any(cases["resized"][key].shape != cases["example"][key].shape for key in cases["example"])


def test_a_second_input_stays_within_what_the_example_shows() -> None:
    example = {"x": torch.randn(4, 8), "ids": torch.tensor([3, 1, 9, 4]), "mask": torch.tensor([True, False]), "t": torch.full((4,), 7.0)}
    second = cases_of_example(example, {}, {}, seed=0)["second"]
    assert not torch.equal(second["x"], example["x"])
    assert second["x"].min() >= example["x"].min()
    assert second["x"].max() <= example["x"].max()
    assert sorted(second["ids"].tolist()) == [1, 3, 4, 9]
    assert torch.equal(second["mask"], example["mask"])
    assert not torch.equal(second["t"], example["t"])


def test_dynamic_axes_are_cut_to_their_smallest_size() -> None:
    example = {"x": torch.arange(24.0).reshape(4, 6)}
    resized = cases_of_example(example, {"x": {0: "batch"}}, {"batch": SizeRange(1, 4, 8)}, seed=0)["resized"]["x"]
    torch.testing.assert_close(resized, example["x"][:1])


def test_dynamic_axes_at_their_smallest_size_are_repeated_to_their_largest() -> None:
    example = {"x": torch.arange(12.0).reshape(2, 6)}
    resized = cases_of_example(example, {"x": {0: "batch"}}, {"batch": SizeRange(2, 2, 5)}, seed=0)["resized"]["x"]
    torch.testing.assert_close(resized, example["x"][[0, 1, 0, 1, 0]])


def test_an_empty_example_is_refused() -> None:
    with pytest.raises(IsthmusError, match=r"shape \(0, 3\)"):
        cases_of_example({"x": torch.zeros(0, 3)}, {}, {}, seed=0)


def test_height_and_width_of_one_range_become_different_sizes() -> None:
    ranges = {"h": SizeRange(4, 8, 16), "w": SizeRange(4, 8, 16)}
    resized = cases_of_example({"x": torch.randn(2, 8, 8)}, {"x": {1: "h", 2: "w"}}, ranges, seed=0)["resized"]["x"]
    assert resized.shape == (2, 4, 16)


def test_the_infinities_of_a_mask_stay_in_place() -> None:
    mask = torch.tensor([[0.5, float("-inf")], [0.1, 0.9]])
    second = cases_of_example({"mask": mask}, {}, {}, seed=0)["second"]["mask"]
    assert torch.equal(second.isinf(), mask.isinf())
    assert not second.isnan().any()
    assert not torch.equal(second[1], mask[1])
