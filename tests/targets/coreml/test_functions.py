"""Sizes that vary: lists, ranges, and functions of fixed sizes with shared weights."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

import isthmus
from isthmus.exporter.errors import UsageError
from isthmus.exporter.quiet import quiet
from isthmus.exporter.spec import Dynamic, SizeRange
from isthmus.exporter.target import TARGETS
from isthmus.exporter.trace import trace
from isthmus.targets.coreml import functions, sizes
from isthmus.targets.coreml.convert import convert
from isthmus.targets.coreml.interpreter import Interpreter, load

BATCH = Dynamic("x", 0, SizeRange(1, 2, 6))
WIDTH = 64


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return self.leave(nn.functional.gelu(self.enter(x), approximate="tanh"))


def mlp():
    torch.manual_seed(0)
    return Mlp().eval()


def example(rows):
    return np.random.Generator(np.random.PCG64(rows)).standard_normal((rows, 3, WIDTH), dtype=np.float32)


@functools.cache
def model(rows):
    with quiet():
        program = trace(mlp(), {"x": torch.zeros(rows, 3, WIDTH)})
    return convert(program, "fp16", input_names=["x"], output_names=["y"])


def exported(folder, **options):
    return isthmus.export(
        (mlp(), (torch.from_numpy(example(2)),)), "coreml", folder, precision="fp16", dynamic=[BATCH], options=options
    ).manifest


def assert_right(runner, rows):
    with torch.no_grad():
        expected = mlp()(torch.from_numpy(example(rows))).numpy()
    (got,) = runner.run({"x": example(rows)}).values()
    assert 20 * np.log10(np.ptp(expected) / np.sqrt(np.mean((got - expected) ** 2))) >= 60


def opened(folder, manifest):
    stages = {stage.name: stage for stage in TARGETS["coreml"]().stages(folder, manifest)}
    return stages["mil"].open()


def test_functions_share_their_weights(tmp_path):
    functions.save({"one": model(1), "four": model(4)}, tmp_path / "m.mlpackage", default="four")
    program = load(tmp_path / "m.mlpackage")
    assert_right(Interpreter(program, "one"), 1)
    assert_right(Interpreter(program), 4)
    weights = sum(file.stat().st_size for file in (tmp_path / "m.mlpackage").rglob("weight*.bin"))
    assert weights < 2 * 1.1 * sum(p.numel() for p in mlp().parameters())
    with pytest.raises(UsageError, match="has shape"):
        Interpreter(program, "one").run({"x": example(4)})


def test_functions_that_cannot_be_put_together_are_refused(tmp_path):
    with pytest.raises(UsageError) as caught:
        functions.save({"1st": model(1)}, tmp_path / "m.mlpackage", default="main")
    assert "1st: is no name of a function" in str(caught.value)
    assert "main: is none of the functions 1st" in str(caught.value)
    with pytest.raises(UsageError, match="is none of the functions"):
        functions.save({}, tmp_path / "m.mlpackage")
    assert not list(tmp_path.iterdir())
    assert functions.unsupported("iOS17")
    assert not functions.unsupported("iOS18")


@pytest.mark.parametrize("how", ["enumerated", "range", "functions"])
def test_every_way_that_sizes_vary(tmp_path, how):
    manifest = exported(tmp_path / "out", shapes=how)
    assert manifest.verdict == "verified"
    assert {m.case for s in manifest.stages if s.name == "mil" for m in s.metrics} == {"example", "second", "resized"}
    assert manifest.sizes == {"x_0": (1, 2, 6)}
    with opened(tmp_path / "out", manifest) as runner:
        for rows in (1, 2, 6):
            assert_right(runner, rows)
        if how == "range":
            assert_right(runner, 5)
        else:
            with pytest.raises(UsageError, match=r"no function takes x \(5, 3, 64\)|expected one of"):
                runner.run({"x": example(5)})
        with pytest.raises(UsageError):
            runner.run({"x": example(7)})
    if how == "functions":
        assert manifest.details["functions"] == {"main": {"x": [2, 3, 64]}, "x_1x3x64": {"x": [1, 3, 64]}, "x_6x3x64": {"x": [6, 3, 64]}}


def program_of(shapes, dynamic, forward=lambda *x: sum(v.sum() for v in x)):
    class Sum(nn.Module):
        def forward(self, a, b):
            return forward(a, b)

    with quiet():
        ranges = {name: SizeRange(2, 4, 8) for axes in dynamic.values() for name in axes.values()}
        return trace(Sum(), dict(zip("ab", map(torch.zeros, shapes), strict=True)), dynamic=dynamic, ranges=ranges)


def test_the_list_has_every_combination_of_smallest_usual_and_largest():
    program = program_of([(4, 3), (4, 4)], {"a": {0: "n"}, "b": {0: "n", 1: "m"}})
    found = sizes.shapes(program, sizes.chosen(program))
    assert found[0][0] == (4, 3)
    assert found[1][0] == (4, 4)
    assert set(zip(*found, strict=True)) == {((n, 3), (n, m)) for n in (2, 4, 8) for m in (2, 4, 8)}


def test_sizes_that_cannot_vary_as_asked_are_refused():
    fixed = program_of([(4, 3), (4, 4)], {})
    assert "no size of the inputs varies" in str(sizes.unsupported(fixed, "range", "iOS18")[0])
    assert not sizes.unsupported(fixed, "fixed", "iOS16")
    two = program_of([(4, 3), (4, 4)], {"a": {0: "n"}, "b": {0: "n"}})
    assert "2 inputs have sizes that vary" in str(sizes.unsupported(two, "enumerated", "iOS17")[0])
    assert not sizes.unsupported(two, "range", "iOS17")
    many = program_of([(4, 4), (4, 4)], {"a": {0: "n", 1: "m"}, "b": {0: "o", 1: "p"}})
    assert "make 81 combinations, and --shapes functions takes 9" in str(sizes.unsupported(many, "functions", "iOS18")[0])
    assert not sizes.unsupported(many, "enumerated", "iOS18")
