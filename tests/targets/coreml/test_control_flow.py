"""Branches and loops of PyTorch as blocks of MIL: the package in the interpreter against the module."""

import numpy as np
import pytest
import torch
from torch import nn
from torch._higher_order_ops.scan import scan

from isthmus.exporter.errors import UnsupportedError
from isthmus.exporter.quiet import quiet
from isthmus.exporter.spec import SizeRange
from isthmus.exporter.trace import trace
from isthmus.targets.coreml.control_flow import OPERATORS, is_control_flow, subgraphs
from isthmus.targets.coreml.convert import convert, decomposed
from isthmus.targets.coreml.interpreter import Interpreter, load
from isthmus.targets.coreml.interpreter.program import operations_in
from isthmus.targets.coreml.package import save


class Ode(nn.Module):
    """The heat equation of a rod, by steps as large as the error of two orders allows: a loop whose count depends on the values."""

    def forward(self, y):
        def slope(y):
            return nn.functional.pad(y[:, 1:] - y[:, :-1], (1, 1)).diff(dim=1)

        def going(n, t, h, y):
            return ((t < 1.0) & (n < 200)).squeeze()

        def step(n, t, h, y):
            first = slope(y)
            second = slope(y + h * first)
            error = (h * (second - first) / 2).abs().amax().reshape(1)
            good = error < 1e-2
            after = torch.where(good, y + h * (first + second) / 2, y)
            wanted = h * torch.clamp(0.9 * (1e-2 / (error + 1e-9)).sqrt(), 0.2, 5.0)
            t = torch.where(good, t + h, t)
            return n + 1, t, torch.minimum(wanted, 1.0 - t + 1e-6), after

        start = (torch.zeros((), dtype=torch.int64), torch.zeros(1), torch.full((1,), 1e-3), y)
        n, t, _, y = torch.while_loop(going, step, start)
        return y, n, t


class Nested(nn.Module):
    """A branch in a branch in a loop, with weights of the module and a buffer read inside."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("shift", torch.linspace(-1, 1, 8))

    def forward(self, x):
        def inner(x):
            return torch.cond(x.mean() > 0.1, lambda x: torch.tanh(self.layer(x)), lambda x: x + self.shift, (x,))

        def step(i, x):
            return i + 1, torch.cond(x.sum() > 0, inner, lambda x: nn.functional.relu(x) + 0.3, (x,))

        return torch.while_loop(lambda i, _: i < 4, step, (torch.zeros((), dtype=torch.int32), x))[1]


class Branch(nn.Module):
    """Two branches of several outputs, one an integer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: (self.layer(x), x.argmax(-1)), lambda x: (x.clone(), (-x).argmax(-1)), (x,))


class Scan(nn.Module):
    """A recurrence over the rows, with a layer in it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        def step(carry, row):
            carry = torch.tanh(self.layer(carry)) * 0.9 + row
            return carry, carry * 0.5

        return scan(step, torch.zeros(8), x)


MODULES = [Ode, Nested, Branch, Scan]
INPUTS = [
    np.random.Generator(np.random.PCG64(i)).standard_normal((6, 8), dtype=np.float32) * 0.7 + s for i, s in enumerate((-1, 0, 0.2, 1))
]


def made(module):
    torch.manual_seed(0)
    module = module().eval()
    with quiet():
        return module, decomposed(trace(module, {"x": torch.from_numpy(INPUTS[0])}))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("precision", "close"), [("fp32", 1e-5), ("fp16", 2e-2)])
def test_the_package_computes_what_the_module_does(module, precision, close):
    module, program = made(module)
    converted = load(convert(program, precision, input_names=["x"]))
    assert {"cond", "while_loop"} & {op.op_type for op in operations_in(converted.functions["main"])}
    model = Interpreter(converted)
    for x in INPUTS:
        with torch.no_grad():
            expected = module(torch.from_numpy(x))
        expected = [value.numpy() for value in (expected if isinstance(expected, tuple) else (expected,))]
        for value, wanted in zip(model.run({"x": x}).values(), expected, strict=True):
            if precision == "fp32" or wanted.dtype.kind == "f":  # in float16 a close decision may fall otherwise: counts, and indices
                assert np.abs(value - wanted).max() <= close * max(1, np.abs(wanted).max())


def test_the_inputs_take_every_path():
    module, _ = made(Ode)
    assert len({int(module(torch.from_numpy(x))[1]) for x in INPUTS}) > 1
    assert {bool(x.sum() > 0) for x in INPUTS} == {True, False}
    assert {bool(x.mean() > 0.1) for x in INPUTS if x.sum() > 0} == {True, False}


def test_a_saved_package_has_its_blocks(tmp_path):
    module, program = made(Nested)
    save(convert(program, "fp32", input_names=["x"], output_names=["y"]), tmp_path / "m.mlpackage")
    model = Interpreter(load(tmp_path / "m.mlpackage"))
    for x in INPUTS:
        with torch.no_grad():
            np.testing.assert_allclose(model.run({"x": x})["y"], module(torch.from_numpy(x)).numpy(), rtol=1e-5, atol=1e-5)


def test_subgraphs_are_found_inside_one_another():
    _, program = made(Nested)
    (loop,) = (node for node in program.graph.nodes if node.op == "call_function" and is_control_flow(node))
    assert loop.target.name() in OPERATORS
    _, body = subgraphs(loop)
    (outer,) = (node for node in body.graph.nodes if node.op == "call_function" and is_control_flow(node))
    inner = [node for branch in subgraphs(outer) for node in branch.graph.nodes if node.op == "call_function" and is_control_flow(node)]
    assert [node.target.name() for node in (loop, outer, *inner)] == ["while_loop", "cond", "cond"]


def test_a_scan_of_varying_length_is_refused():
    module = Scan().eval()
    with quiet():
        program = trace(module, {"x": torch.zeros(6, 8)}, dynamic={"x": {0: "rows"}}, ranges={"rows": SizeRange(2, 6, 9)})
    with pytest.raises(UnsupportedError, match="a length that varies"):
        convert(program, "fp32")


def test_what_torch_cannot_write_without_changes_in_place_is_one_message():
    class Same(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: torch.relu(x) - torch.tensor(1.5), lambda x: x * 2, (x,))

    with quiet():
        program = trace(Same(), {"x": torch.zeros(2)})
    with pytest.raises(UnsupportedError, match=r"make constants buffers of the module") as caught:
        decomposed(program)
    assert all("\n" not in str(reason) for reason in caught.value.reasons)
