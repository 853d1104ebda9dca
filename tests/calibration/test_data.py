"""Calibration data from every source, and what is refused of it."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from isthmus.calibration import files, images
from isthmus.calibration.data import DEFAULT_SIZE, RANDOM, check_preprocess, check_size, given_data, trajectory_data
from isthmus.exporter.errors import IntegrityError, IsthmusError, UsageError
from isthmus.exporter.preprocess import Preprocess, parse_preprocess
from isthmus.models.flow import RectifiedFlowSampler

EXAMPLE = {"x": np.zeros((2, 1, 4, 4), np.float32), "y": np.zeros(2, np.int64)}


def read(text, **changes):
    arguments = {
        "example": EXAMPLE,
        "dynamic": {"x": (0,), "y": (0,)},
        "sampler": None,
        "draw": lambda rng: {"x": rng.standard_normal((2, 1, 4, 4), dtype=np.float32), "y": np.arange(2)},
        "seed": 3,
    }
    return given_data(text, **{**arguments, **changes})


def write(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def one(batch=3):
    return {"x": np.ones((batch, 1, 4, 4), np.float32), "y": np.ones(batch, np.int64)}


def test_random_is_reproducible_and_says_so():
    first, again = read(RANDOM, size=3), read(RANDOM, size=3)
    assert (first.source, len(first.sets)) == ("random", 3)
    assert first.sha256() == again.sha256() != read(RANDOM, size=3, seed=4).sha256()
    assert not np.array_equal(first.sets[0]["x"], first.sets[1]["x"])
    assert len(read(RANDOM).sets) == DEFAULT_SIZE


def test_one_set_in_a_file_several_and_a_folder(tmp_path):
    assert len(read(write(tmp_path / "one.npz", **one())).sets) == 1
    several = write(tmp_path / "two.npz", **{f"{i}/{n}": a for i in range(2) for n, a in one(i + 1).items()})
    data = read(several)
    assert data.source == "two.npz"
    assert [s["x"].shape[0] for s in data.sets] == [1, 2]
    assert len(read(str(tmp_path)).sets) == 3
    assert len(read(str(tmp_path), size=2).sets) == 2


def test_every_fault_of_a_file_is_listed(tmp_path):
    faulty = {
        "0/x": np.full((1, 1, 4, 4), np.nan, np.float32),
        "0/y": np.ones(1, np.int32),
        "1/x": np.ones((1, 1, 5, 4), np.float32),
        "1/z": np.ones(1),
    }
    with pytest.raises(UsageError) as caught:
        read(write(tmp_path / "bad.npz", **faulty))
    assert {(r.where, r.what) for r in caught.value.reasons} == {
        ("bad.npz, 0: x", "holds NaN or Inf"),
        ("bad.npz, 0: y", "has dtype int32, expected int64"),
        ("bad.npz, 1: x", "has shape (1, 1, 5, 4), expected (any, 1, 4, 4)"),
        ("bad.npz, 1: y", "is missing"),
        ("bad.npz, 1: z", "is no input; the inputs are x, y"),
    }


def test_every_fault_has_a_fix_and_none_is_cut_silently(tmp_path):
    faulty = {f"{i:02}/x": np.full((1, 1, 4, 4), np.inf if i == 0 else 0, np.float64) for i in range(13)}
    faulty |= {f"{i:02}/{'labels' if i % 2 else 'y_'}": np.array(1 if i == 2 else [1]) for i in range(13)}
    with pytest.raises(UsageError) as caught:
        read(write(tmp_path / "bad.npz", **faulty))
    assert caught.value.hint == "a set of inputs is x (any, 1, 4, 4) float32, y (any) int64"
    reasons = caught.value.reasons
    assert all(reason.fix for reason in reasons[:-1])
    # A set: y is missing, x is of another dtype, and a name is unknown; one is infinite too.
    assert (len(reasons), reasons[-1].what) == (files.SHOWN + 1, f"and {13 * 3 + 1 - files.SHOWN} more")
    found = {reason.where: reason for reason in reasons}
    assert found["bad.npz, 00: y"].fix == "add it, (any) int64"
    assert found["bad.npz, 00: y_"].fix == "call it y"
    assert found["bad.npz, 01: labels"].fix == "leave it out"
    assert {r.what: r.fix for r in reasons if r.where == "bad.npz, 00: x"} == {
        "has dtype float64, expected float32": "write it with .astype('float32')",
        "holds NaN or Inf": "leave the set out, or mend what made it",
    }
    with pytest.raises(UsageError) as caught:
        read(write(tmp_path / "row.npz", x=np.ones((1, 4, 4), np.float32), y=np.array(1)))
    assert {reason.fix for reason in caught.value.reasons} == {"write it with [None], as one row"}


def test_what_the_model_cannot_compute_is_found_before_any_work(tmp_path):
    """Of many sets those are run that tell: the smallest and largest labels, and shapes that are not the example's."""
    ran = []

    def run(inputs):
        ran.append(inputs["y"].tolist())
        if inputs["y"].max() > 10:
            raise IsthmusError("the PyTorch module failed: IndexError: index out of range in self\nmore")

    def sets(rows, *, large=()):
        return {f"{i}/{n}": a for i in range(5) for n, a in {**one(rows), "y": np.full(rows, 99 if i in large else i)}.items()}

    read(write(tmp_path / "good.npz", **sets(2)), run=run)
    assert ran == [[0, 0], [4, 4]]
    ran.clear()
    read(write(tmp_path / "rows.npz", **sets(3)), run=run)
    assert ran == [[0] * 3, [4] * 3]
    with pytest.raises(UsageError, match="the model fails on inputs of") as caught:
        read(write(tmp_path / "bad.npz", **sets(2, large=[3])), run=run)
    (reason,) = caught.value.reasons
    assert reason.where == "bad.npz, 3"
    assert reason.what == (
        "the PyTorch module failed: IndexError: index out of range in self; it was given x (2, 1, 4, 4), y (2,); y from 99 to 99"
    )
    assert "labels and indices have to be those that the model knows" in caught.value.hint


def test_what_is_not_there_or_not_data_is_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read(str(tmp_path / "none.npz"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds no \.npz or \.safetensors file"):
        read(str(tmp_path / "empty"))
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(IntegrityError, match=r"text\.npz cannot be read"):
        read(str(tmp_path / "text.npz"))
    with pytest.raises(UsageError, match="needs calibration data") as caught:
        read(None)
    assert "`--calibration-data random`" in caught.value.hint
    for size in (0, 2**20):
        with pytest.raises(UsageError, match="calibration-size"):
            check_size(size)


def test_trajectories_are_what_the_model_sees_while_it_samples():
    sampler = RectifiedFlowSampler(shape=(1, 4, 4), labels=(0, 1), names=("a", "b"), null_label=2, steps=4)
    seen = []

    def run(inputs):
        seen.append(inputs["x"].copy())
        return {"sample": inputs["x"] * 0.5}

    example = {"x": EXAMPLE["x"], "t": np.zeros(2, np.float32), "y": EXAMPLE["y"]}
    assert read(None, sampler=sampler, example=example) is None
    data = trajectory_data(sampler, run, example=example, seed=3, size=4, timestep="t")
    assert (data.source, len(data.sets), data.rows) == ("trajectories", 4, 8)
    again = trajectory_data(sampler, run, example=example, seed=3, size=4, timestep="t")
    assert data.sha256() == again.sha256() != trajectory_data(sampler, run, example=example, seed=4, size=4).sha256()
    rows = np.concatenate(seen)
    for arrays in data.sets:
        assert arrays["x"].shape == (2, 1, 4, 4)
        assert all(any(np.array_equal(row, r) for r in rows) for row in arrays["x"])
    times = np.concatenate([data.times(i) for i in range(4)])
    assert sorted(times.tolist()) == [250, 250, 500, 500, 750, 750, 1000, 1000]  # as many of each


def test_safetensors_hold_the_same_sets(tmp_path):
    arrays = {f"{i}/{n}": a for i in range(2) for n, a in one(i + 1).items()}
    save_file(arrays, tmp_path / "two.safetensors")
    data = read(str(tmp_path / "two.safetensors"))
    assert [s["x"].shape[0] for s in data.sets] == [1, 2]
    assert data.sha256() == read(write(tmp_path / "two.npz", **arrays)).sha256()
    assert len(read(str(tmp_path)).sets) == 4
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(IntegrityError, match="cannot be read as safetensors"):
        read(str(tmp_path / "bad.safetensors"))


def test_inputs_of_one_set_have_the_same_rows(tmp_path):
    with pytest.raises(UsageError) as caught:
        read(write(tmp_path / "odd.npz", x=np.ones((3, 1, 4, 4), np.float32), y=np.ones(2, np.int64)))
    assert [(r.where, r.what) for r in caught.value.reasons] == [("odd.npz", "the inputs have different numbers of rows: x 3, y 2")]


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_more_than_fits_into_memory_is_refused_before_it_is_read(tmp_path, monkeypatch, ending):
    for name in "ab":
        if ending == ".npz":
            write(tmp_path / f"{name}.npz", **one())
        else:
            save_file(one(), tmp_path / f"{name}.safetensors")
    assert len(read(str(tmp_path)).sets) == 2
    size = {".npz": 472, ".safetensors": (tmp_path / "a.safetensors").stat().st_size if ending == ".safetensors" else 0}[ending]
    monkeypatch.setattr(files, "MAX_BYTES", size + 100)  # of the 216 bytes of the first set, 116 are in the way of the second file
    with pytest.raises(IntegrityError, match=rf"b{ending} .* expected at most"):
        read(str(tmp_path))


MODULE = """
import numpy as np
import torch

def rows(n):
    return {"x": torch.ones(n, 1, 4, 4), "y": np.ones(n, np.int64)}

def endless():
    n = 0
    while True:
        n += 1
        yield rows(n)

def wrong():
    return [rows(1), {"x": torch.ones(1, 1, 4, 4, dtype=torch.float64), "z": np.ones(1)}]

def failing():
    yield rows(1)
    raise RuntimeError("no more disk")

def number():
    return 3

def numbers():
    return [3]

def nothing():
    return []
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "calibration_samples_of_a_user.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield "calibration_samples_of_a_user"
    sys.modules.pop("calibration_samples_of_a_user", None)


def test_a_callable_gives_sets(module):
    data = read(f"{module}:endless", size=3)
    assert data.source == f"{module}:endless"
    assert [s["x"].shape[0] for s in data.sets] == [1, 2, 3]
    assert len(read(f"{module}:endless").sets) == DEFAULT_SIZE
    assert all(isinstance(a, np.ndarray) for s in data.sets for a in s.values())


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("wrong", UsageError, "does not fit the model"),
        ("failing", IsthmusError, "RuntimeError: no more disk"),
        ("number", UsageError, "gave a int, expected an iterable"),
        ("numbers", UsageError, "set 0 of .* is a int, expected a mapping"),
        ("nothing", UsageError, "gives no inputs"),
        ("missing", UsageError, "has no 'missing'"),
    ],
)
def test_a_callable_that_gives_something_else(module, name, error, message):
    with pytest.raises(error, match=message) as caught:
        read(f"{module}:{name}")
    if name == "wrong":
        assert {(r.where, r.what) for r in caught.value.reasons} == {
            (f"{module}:wrong, 1: x", "has dtype float64, expected float32"),
            (f"{module}:wrong, 1: y", "is missing"),
            (f"{module}:wrong, 1: z", "is no input; the inputs are x, y"),
        }


def test_a_callable_may_not_fill_the_memory(module, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 1000)
    with pytest.raises(UsageError, match="more than 0 GiB of inputs"):
        read(f"{module}:endless")


def pixels(height, width, channels=3, seed=0):
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (height, width, channels), dtype=np.uint8)


def picture(path, array, **options):
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(path, **options)


COLOUR = {"x": np.zeros((2, 3, 4, 6), np.float32)}


def test_pictures_become_inputs(tmp_path):
    """Cut, scaled and laid out as numpy does it."""
    for name, seed in (("b.png", 1), ("a.png", 0), ("c.webp", 2)):
        picture(tmp_path / name, pixels(6, 10, seed=seed), **({"lossless": True} if name.endswith("webp") else {}))
    (tmp_path / "notes.txt").write_text("no picture")
    steps = parse_preprocess("crop=4x6, mean=0.5/0.25/0.125, std=0.5")
    data = read(str(tmp_path), example=COLOUR, dynamic={"x": (0,)}, preprocess=steps)
    assert [s["x"].shape for s in data.sets] == [(1, 3, 4, 6)] * 3
    for arrays, seed in zip(data.sets, range(3), strict=True):
        expected = (pixels(6, 10, seed=seed)[1:5, 2:8] / 255.0 - [0.5, 0.25, 0.125]) / 0.5
        np.testing.assert_allclose(arrays["x"][0], expected.transpose(2, 0, 1), atol=1e-6)
    fixed = read(str(tmp_path), example=COLOUR, dynamic={}, preprocess=steps)
    assert [s["x"].shape for s in fixed.sets] == [(2, 3, 4, 6)]  # the third has no second beside it
    np.testing.assert_array_equal(fixed.sets[0]["x"][1], data.sets[1]["x"][0])


def test_pictures_are_resized_by_their_shorter_side(tmp_path):
    array = np.full((8, 12, 1), 100, np.uint8)
    picture(tmp_path / "grey.png", array)
    found = images.read_picture(tmp_path / "grey.png", Preprocess(resize=4, layout="hwc"), 1)
    assert found.shape == (4, 6, 1)
    np.testing.assert_allclose(found, 100 / 255, atol=1e-6)


def test_other_inputs_lie_beside_a_picture(tmp_path):
    for i in range(2):
        picture(tmp_path / f"{i}.png", pixels(4, 4, 1, seed=i))
        write(tmp_path / f"{i}.npz", y=np.array([i]))
    steps = parse_preprocess("input=x")
    assert [s["y"].tolist() for s in read(str(tmp_path), preprocess=steps).sets] == [[0], [1]]
    assert [s["y"].tolist() for s in read(str(tmp_path), preprocess=steps, dynamic={}).sets] == [[0, 1]]
    (tmp_path / "1.npz").unlink()
    with pytest.raises(UsageError) as caught:
        read(str(tmp_path), preprocess=steps)
    assert [(r.where, r.what) for r in caught.value.reasons] == [("1.png: y", "is missing")]


def test_every_fault_of_a_folder_of_pictures_is_listed(tmp_path):
    example = {**EXAMPLE, "w": np.zeros((2, 2), np.float32), "t": np.zeros((2, 1), np.float32)}
    row = {"w": np.ones((1, 2), np.float32), "t": np.ones((1, 1), np.float32)}
    beside = [
        {**row, "y": np.array(0)},
        {**row, "y": np.array(1)},  # no rows
        {**row, "y": np.array([2]), "x": np.ones((1, 1, 4, 4), np.float32)},  # what the picture is for
        {**row, "y": np.array([3]), "t": np.ones((1, 1)), "s/w": row["w"]},  # another dtype; a named set
        {"w": row["w"], "y": np.array([4])},
        {**row, "y": np.array([5])},  # t beside the second alone
    ]
    for i, arrays in enumerate(beside):
        picture(tmp_path / f"{i}.png", pixels(5 if i == 5 else 4, 4, 1))
        write(tmp_path / f"{i}.npz", **arrays)
    with pytest.raises(UsageError, match="does not fit the model") as caught:
        read(str(tmp_path), example=example, dynamic={}, preprocess=parse_preprocess("input=x"))
    assert [(r.where, r.what) for r in caught.value.reasons] == [
        ("0.png to 1.png: y", "got 0.png int64 (), 1.png int64 (), expected one row of one shape and dtype from each"),
        ("2.npz: x", "is given twice: 2.png becomes x too"),
        ("3.npz: s/w", "is an input of a named set, expected inputs by their names alone beside a picture"),
        ("2.png to 3.png: t", "got 2.png float32 (1, 1), 3.png float64 (1, 1), expected one row of one shape and dtype from each"),
        (
            "4.png to 5.png: x",
            "got 4.png float32 (1, 1, 4, 4), 5.png float32 (1, 1, 5, 4), expected one row of one shape and dtype from each",
        ),
        ("4.png to 5.png: t", "is given beside 5.png, and not beside 4.png"),
    ]
    assert all(reason.fix for reason in caught.value.reasons)


def test_an_input_without_rows_lies_beside_a_picture(tmp_path):
    picture(tmp_path / "a.png", pixels(4, 4, 1))
    write(tmp_path / "a.npz", y=np.array(3))
    example = {"x": EXAMPLE["x"][:1], "y": np.array(0)}
    data = read(str(tmp_path), example=example, dynamic={}, preprocess=parse_preprocess("input=x"))
    assert [(s["y"].shape, int(s["y"])) for s in data.sets] == [((), 3)]


def test_pictures_may_not_fill_the_memory(tmp_path, monkeypatch):
    for i in range(2):
        picture(tmp_path / f"{i}.png", pixels(4, 6))
    monkeypatch.setattr(files, "MAX_BYTES", 3 * 4 * 6 * 4 + 1)
    with pytest.raises(UsageError, match="gives more than 0 GiB of inputs"):
        read(str(tmp_path), example=COLOUR, dynamic={"x": (0,)}, preprocess=parse_preprocess("input=x"))


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_of_grey_are_scaled(tmp_path, channels):
    array = np.array([[0, 255, 256, 1000], [32768, 40000, 65534, 65535]], np.uint16)
    Image.fromarray(array).save(tmp_path / "deep.png")
    found = images.read_picture(tmp_path / "deep.png", Preprocess(), channels)
    np.testing.assert_allclose(found, np.repeat(array[None] / 65535, channels, axis=0), atol=1e-6)
    assert found.dtype == np.float32
    cut = images.read_picture(tmp_path / "deep.png", Preprocess(resize=1, crop=(1, 2), mean=(0.5,), std=(0.5,)), channels)
    assert cut.shape == (channels, 1, 2)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("input=z", "has no input z"),
        ("input=x,layout=hwc", "of 1 or 3 channels in hwc"),
        ("input=x,mean=1/2", "mean: has 2 numbers, expected 1 or 3"),
        ("input=x", "does not fit the model"),
        ("input=x,crop=99", "has 5 x 5 pixels, fewer than crop=99x99"),
        ("input=x,resize=8192", "after it is resized"),
    ],
)
def test_pictures_that_do_not_fit(tmp_path, monkeypatch, steps, message):
    picture(tmp_path / "a.png", pixels(5, 5))
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises((UsageError, IntegrityError), match=message):
        read(str(tmp_path), example=COLOUR, dynamic={"x": (0,)}, preprocess=parse_preprocess(steps))
    with pytest.raises(UsageError, match="holds 1 pictures, and a set has 2"):
        read(str(tmp_path), example=COLOUR, dynamic={}, preprocess=parse_preprocess("input=x"))


def test_a_picture_is_not_decoded_when_it_is_too_large_or_none(tmp_path, monkeypatch):
    picture(tmp_path / "a.png", pixels(5, 5))
    monkeypatch.setattr(images, "MAX_PIXELS", 24)
    with pytest.raises(IntegrityError, match="has 25 pixels, expected at most 24"):
        images.read_picture(tmp_path / "a.png", Preprocess(), 3)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "c.jpg").write_bytes(b"BM" + bytes(60))
    for name in ("b.png", "c.jpg"):
        with pytest.raises(IntegrityError, match="cannot be read as a picture"):
            images.read_picture(tmp_path / name, Preprocess(), 3)


def test_pictures_need_a_preprocessing_line_and_it_needs_pictures(tmp_path):
    check_preprocess(str(tmp_path), None)
    check_preprocess(None, None)
    with pytest.raises(UsageError, match="is for a folder of pictures"):
        check_preprocess(str(tmp_path), Preprocess())
    picture(tmp_path / "a.png", pixels(5, 5))
    check_preprocess(str(tmp_path), Preprocess())
    with pytest.raises(UsageError, match="how they become an input"):
        check_preprocess(str(tmp_path), None)


def test_the_preprocessing_line_is_read():
    assert parse_preprocess("input=x,resize=32,crop=30x28,mean=0.5/0.4/0.3,std=0.5,layout=hwc") == Preprocess(
        input="x", resize=32, crop=(30, 28), mean=(0.5, 0.4, 0.3), std=(0.5,), layout="hwc"
    )
    assert parse_preprocess("crop=7") == Preprocess(crop=(7, 7))


def test_every_fault_of_the_preprocessing_line_is_listed():
    with pytest.raises(UsageError) as caught:
        parse_preprocess("resize=0,crop=3xq,mean=nan,std=0,layout=nchw,size=3,resize=3,resize=4,wrong")
    assert [r.where for r in caught.value.reasons] == ["resize", "crop", "mean", "std", "layout", "size", "resize", ""]


def test_tensors_in_half_precision_are_not_taken_for_others(tmp_path):
    from safetensors.torch import save_file as save_tensors

    save_tensors({"x": torch.ones(1, 1, 4, 4, dtype=torch.float16), "y": torch.ones(1, dtype=torch.int64)}, tmp_path / "h.safetensors")
    with pytest.raises(UsageError, match="float16, expected float32"):
        read(str(tmp_path / "h.safetensors"))
