"""Permutations of six axes and more whose sizes vary: what the rewritten program computes, and its ranks."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from isthmus.exporter.quiet import quiet
from isthmus.exporter.spec import SizeRange
from isthmus.exporter.trace import trace
from isthmus.targets.coreml.convert import convert, decomposed
from isthmus.targets.coreml.high_rank import HIGHEST, low_rank
from isthmus.targets.coreml.interpreter import Interpreter, load

UNPATCHED = (0, 5, 1, 3, 2, 4)
ORDERS = [UNPATCHED, (5, 4, 3, 2, 1, 0), (1, 0, 2, 3, 4, 5), (0, 2, 4, 1, 3, 5), (3, 4, 5, 0, 1, 2), (0, 1, 2, 3, 5, 4)]


class Permuted(nn.Module):
    """Six axes out of three, in another order, as three again."""

    def __init__(self, order, patch):
        super().__init__()
        self.order, self.patch = order, patch

    def forward(self, x):
        n, hw, _ = x.shape
        x = x.view(n, hw, 2, *self.patch, 3).permute(self.order).contiguous()
        return x.reshape(x.shape[0] * x.shape[1], x.shape[2], -1) * 2


def traced(module, sizes, dynamic):
    ranges = {name: SizeRange(2, sizes[axis], 9) for axes in dynamic.values() for axis, name in axes.items()}
    with quiet():
        return trace(module, {"x": torch.zeros(sizes)}, dynamic=dynamic, ranges=ranges)


def highest(program):
    return max(node.meta["val"].dim() for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor))


@pytest.mark.parametrize("patch", [(2, 4), (1, 4)], ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_same_numbers_in_four_axes(order, patch):
    module = Permuted(order, patch)
    program = decomposed(traced(module, (4, 5, patch[0] * patch[1] * 6), {"x": {0: "n", 1: "m"}}))
    assert highest(program) <= HIGHEST
    run = program.module()
    for n, m in itertools.product((2, 4, 7), (2, 5)):
        x = torch.arange(n * m * patch[0] * patch[1] * 6.0).reshape(n, m, -1)
        torch.testing.assert_close(run(x), module(x), rtol=0, atol=0)


def test_what_is_emitted():
    """The text of the module: two blocks change places at a time."""
    module = Permuted(UNPATCHED, (2, 4))
    program = decomposed(traced(module, (4, 5, 48), {"x": {0: "n"}}))
    calls = [node for node in program.graph.nodes if node.op == "call_function" and node.target is not torch.ops.aten.sym_size.int]
    shapes = [list(node.args[1]) for node in calls if node.target is torch.ops.aten.reshape.default and -1 in node.args[1]]
    assert shapes[:-1] == [[-1, 80, 3, 1], [-1, 2, 2, 4]]  # and the last view
    assert [list(node.args[1]) for node in calls if node.target is torch.ops.aten.permute.default] == [[0, 2, 1, 3]] * 2


def test_known_sizes_are_left_to_coremltools():
    with quiet():
        program = decomposed(trace(Permuted(UNPATCHED, (2, 4)), {"x": torch.zeros(4, 5, 48)}))
    assert highest(program) == 6
    assert low_rank(program) is program


def test_the_package_takes_every_size():
    module = Permuted(UNPATCHED, (2, 4))
    program = traced(module, (4, 5, 48), {"x": {0: "n", 1: "m"}})
    runner = Interpreter(load(convert(program, "fp32", input_names=["x"])))
    for n, m in ((2, 9), (4, 5), (9, 2)):
        x = np.random.Generator(np.random.PCG64(n)).standard_normal((n, m, 48), dtype=np.float32)
        (got,) = runner.run({"x": x}).values()
        np.testing.assert_array_equal(got, module(torch.from_numpy(x)).numpy())
