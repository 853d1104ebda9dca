"""States that Core ML keeps: the step of docs/streaming.md and steps of our own, in the interpreter, over a stream against PyTorch."""

import functools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import isthmus
from isthmus.exporter.errors import UnsupportedError
from isthmus.exporter.quiet import quiet
from isthmus.exporter.trace import trace
from isthmus.targets.coreml.convert import convert, decomposed
from isthmus.targets.coreml.interpreter import Interpreter, load
from isthmus.targets.coreml.states import State, unsupported, with_states

ROOT = Path(__file__).parents[3]
BLOCKS = dict(re.findall(r"<!-- tested: (\S+) -->\n```python\n(.*?)```\n", (ROOT / "docs" / "streaming.md").read_text(), re.DOTALL))
INPUTS, OUTPUTS = ("x", "window", "state"), ("y", "window_after", "state_after")


class Step(nn.Module):
    """A moving average and a leaky sum."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, window, state):
        window = torch.cat([window[:, 1:], x[:, None]], 1)
        state = 0.5 * state + self.layer(window.mean(1))
        return torch.tanh(state), window, state


@functools.cache
def step():
    torch.manual_seed(0)
    module = Step().eval()
    given = {"x": torch.randn(2, 8), "window": torch.randn(2, 3, 8), "state": torch.randn(2, 8)}
    with quiet():
        return module, decomposed(trace(module, given))


def reasons(states, target="iOS18", program=None, inputs=INPUTS, outputs=OUTPUTS):
    return "\n".join(map(str, unsupported(program or step()[1], inputs, outputs, states, target)))


def test_states_leave_the_interface_and_carry_what_pytorch_carries():
    module, program = step()
    kept, states = with_states(program, INPUTS, OUTPUTS, ["window", "state"])
    # `state` is a word of MIL's.
    assert states == [State("window", "window_after", (2, 3, 8)), State("state_", "state_after", (2, 8))]
    model = Interpreter(load(convert(kept, "fp16", input_names=["x"], output_names=["y"])))
    assert (list(model.inputs), model.outputs, list(model.states)) == (["x"], ("y",), ["window", "state_"])
    rng = np.random.Generator(np.random.PCG64(1))
    carried, window, state = {}, torch.zeros(2, 3, 8), torch.zeros(2, 8)
    for _ in range(12):
        x = rng.standard_normal((2, 8), dtype=np.float32)
        with torch.no_grad():
            y, window, state = module(torch.from_numpy(x), window, state)
        got = model.run({"x": x}, carried)["y"]
        # Half a step of float16 for each operation, and halved states forget theirs.
        np.testing.assert_allclose(got, y.numpy(), atol=4e-3)
        np.testing.assert_allclose(carried["window"], window.numpy(), atol=2e-3)
        np.testing.assert_allclose(carried["state_"], state.numpy(), atol=4e-3)
    assert {v.dtype for v in carried.values()} == {np.dtype(np.float16)}


def test_the_program_given_is_not_changed():
    _, program = step()
    before = str(program.graph), str(program.graph_signature), list(program.state_dict)
    kept, _ = with_states(program, INPUTS, OUTPUTS, ["window", "state"])
    assert (str(program.graph), str(program.graph_signature), list(program.state_dict)) == before
    assert all(kept.state_dict[name] is tensor for name, tensor in program.state_dict.items())


def test_one_state_of_two_stays_an_input():
    module, program = step()
    kept, _ = with_states(program, INPUTS, OUTPUTS, ["state"])
    model = Interpreter(load(convert(kept, "fp32", input_names=["x", "window"], output_names=["y", "window_after"])))
    given = {"x": torch.ones(2, 8), "window": torch.ones(2, 3, 8), "state": torch.full((2, 8), 0.25)}
    carried = {"state_": np.full((2, 8), 0.25, np.float16)}
    got = model.run({name: given[name].numpy() for name in ("x", "window")}, carried)
    with torch.no_grad():
        expected = module(*given.values())
    np.testing.assert_allclose(got["y"], expected[0].numpy(), atol=1e-3)
    np.testing.assert_allclose(carried["state_"], expected[2].numpy(), atol=1e-3)


class Counting(nn.Module):
    """Changes a buffer of a module inside."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.inner.register_buffer("total", torch.zeros(4))

    def forward(self, x):
        self.inner.total.mul_(0.5).add_(self.inner(x))
        return self.inner.total * 2


def test_a_buffer_that_is_changed_becomes_a_state():
    torch.manual_seed(0)
    module = Counting().eval()
    with quiet():
        program = decomposed(trace(module, {"x": torch.randn(4)}))
    model = Interpreter(load(convert(program, "fp16", input_names=["x"], output_names=["y"])))
    assert list(model.states) == ["inner_total"]
    carried = {}
    for i in range(5):
        x = torch.linspace(-1, 1, 4) * i
        with torch.no_grad():
            expected = module(x).numpy()
        np.testing.assert_allclose(model.run({"x": x.numpy()}, carried)["y"], expected, atol=4e-3)
    assert "states are kept since iOS18, got iOS17" in reasons([], "iOS17", program, ("x",), ("y",))
    assert not reasons([], "iOS18", program, ("x",), ("y",))


def test_what_cannot_be_a_state_is_refused_with_every_reason():
    assert not reasons(["window", "state"])
    assert "window, state: states are kept since iOS18, got iOS17" in reasons(["window", "state"], "iOS17")
    text = reasons(["cache", "state", "state"])
    assert "--states cache: is no input" in text
    assert "--states state: is named twice" in text
    assert "need as many outputs behind at least one other, got 3 outputs" in text
    swapped = reasons(["state", "window"])
    assert "state: has the shape (2, 8), and window_after, which replaces it, (2, 3, 8)" in swapped
    assert "window: has the shape (2, 3, 8)" in swapped

    class Integers(nn.Module):
        def forward(self, x, n):
            return x * n, n + 1

    with quiet():
        program = decomposed(trace(Integers(), {"x": torch.ones(3), "n": torch.ones(3, dtype=torch.int64)}))
    assert "n: is torch.int64, and Core ML keeps float16" in reasons(["n"], program=program, inputs=("x", "n"), outputs=("y", "m"))


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A folder with the block of docs/streaming.md, as the current one."""
    (tmp_path / "mamba_block.py").write_text(BLOCKS["mamba_block.py"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("mamba_block", None)


def test_the_block_of_the_page_streams_with_states(page):
    options = {"states": ("window", "state")}
    manifest = isthmus.export("mamba_block:step", "coreml", page / "out", precision="fp16", options=options).manifest
    assert manifest.verdict == "verified"
    assert {m.output for s in manifest.stages if s.name == "mil" for m in s.metrics} == {"output_0", "output_1", "output_2"}
    assert [(s["name"], s["shape"]) for s in manifest.details["states"]] == [("window", [2, 32, 3]), ("state_", [2, 32, 8])]
    assert manifest.details["state_outputs"] == {"window": "output_1", "state_": "output_2"}
    import mamba_block

    sequence = np.random.Generator(np.random.PCG64(7)).standard_normal((2, 20, mamba_block.WIDTH), dtype=np.float32)
    model, carried = Interpreter(load(page / "out" / "model.mlpackage")), {}
    assert list(model.inputs) == ["x"]
    streamed = np.stack([model.run({"x": token}, carried)["output_0"] for token in sequence.swapaxes(0, 1)], axis=1)
    with torch.no_grad():
        at_once = mamba_block.block()(torch.from_numpy(sequence)).numpy()
    assert 20 * np.log10(np.ptp(at_once) / np.sqrt(np.mean((streamed - at_once) ** 2))) >= 60
    assert isthmus.verify(page / "out").verdict == "verified"


def test_options_that_contradict_states(page):
    for precision, extra, words in (
        ("fp32", {}, "Core ML keeps states in float16"),
        ("fp16", {"minimum_deployment_target": "iOS17"}, "states are kept since iOS18"),
        ("fp16", {"states": ("cache",)}, "--states cache: is no input"),
    ):
        with pytest.raises(UnsupportedError) as caught:
            isthmus.export(
                "mamba_block:step", "coreml", page / "out", precision=precision, options={"states": ("window", "state"), **extra}
            )
        assert caught.value.exit_code == 4
        assert words in str(caught.value)


def test_a_buffer_that_is_changed_is_to_be_an_input_and_an_output(tmp_path):
    with pytest.raises(UnsupportedError, match=r"inner\.total: is a buffer that every call changes.*name it with --states"):
        isthmus.export((Counting().eval(), (torch.randn(4),)), "coreml", tmp_path / "out")
