"""Recurrent modules exported as single steps with their states, and streams through them; the code of docs/streaming.md among them."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import isthmus
from isthmus.calibration.metrics import DEFAULT_TOLERANCES
from isthmus.exporter.op import DOMAIN
from isthmus.exporter.ops.linear_attention.eager import linear_attention, linear_attention_step
from isthmus.exporter.ops.rwkv7.eager import rwkv7, rwkv7_step
from isthmus.exporter.spec import Dynamic, SizeRange

ROOT = Path(__file__).parent.parent
BLOCKS = dict(re.findall(r"<!-- tested: (\S+) -->\n```python\n(.*?)```\n", (ROOT / "docs" / "streaming.md").read_text(), re.DOTALL))
LENGTH = 20
HEADS, KEY, WIDTH = 2, 8, 16


class Rwkv7(nn.Module):
    """The time mixing of RWKV-7 over a sequence, or one token of it when the state is given."""

    def __init__(self):
        super().__init__()
        self.mixed = nn.Linear(WIDTH, 6 * WIDTH)
        self.leave = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, state=None):
        r, w, k, v, kappa, rate = self.mixed(x).chunk(6, dim=-1)
        kappa = nn.functional.normalize(kappa.unflatten(-1, (HEADS, KEY)), dim=-1).flatten(-2)
        given = (r, -0.6 * torch.sigmoid(w), k, v, -kappa, kappa * torch.sigmoid(rate))
        if state is None:
            return self.leave(rwkv7(*given, num_heads=HEADS)[0])
        y, state = rwkv7_step(*given, state, num_heads=HEADS)
        return self.leave(y), state


class GatedLinearAttention(nn.Module):
    """Gated linear attention over a sequence, or one token of it when the state is given."""

    def __init__(self):
        super().__init__()
        self.mixed = nn.Linear(WIDTH, 4 * WIDTH)
        self.leave = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, state=None):
        q, k, v, g = self.mixed(x).chunk(4, dim=-1)
        decay = nn.functional.logsigmoid(g) / 16
        if state is None:
            heads = {"q_num_heads": HEADS, "kv_num_heads": HEADS}
            return self.leave(linear_attention(q, k, v, decay=decay, update_rule="gated", **heads)[0])
        y, state = linear_attention_step(q, k, v, state, decay=decay, q_num_heads=HEADS, kv_num_heads=HEADS)
        return self.leave(y), state


def seeded(make):
    torch.manual_seed(0)
    return make().eval()


def matrix_step(make):
    """A step and its example: a token, and a matrix state for each head."""
    return lambda: (seeded(make), (torch.randn(2, WIDTH), torch.randn(2, HEADS, KEY, WIDTH // HEADS)))


rwkv7_of_a_stream = matrix_step(Rwkv7)
attention_of_a_stream = matrix_step(GatedLinearAttention)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A folder with the files of docs/streaming.md, as the current one."""
    for name, source in BLOCKS.items():
        (tmp_path / name).write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("mamba_block", None)


def stream(path, sequence):
    """The outputs of an artifact over a sequence (batch, length, width), from states of zero; one after another."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    first, *carried = session.get_inputs()
    states = {value.name: np.zeros([len(sequence), *value.shape[1:]], np.float32) for value in carried}
    assert [value.type for value in (*session.get_inputs(), *session.get_outputs())] == ["tensor(float)"] * 2 * (1 + len(states))
    outputs = []
    for token in sequence.swapaxes(0, 1):
        output, *after = session.run(None, {first.name: token, **states})
        assert [state.shape for state in after] == [state.shape for state in states.values()]
        states = dict(zip(states, after, strict=True))
        outputs.append(output)
    return np.stack(outputs, axis=1)


def assert_within(got, expected, precision):
    """The bounds that one call's outputs are held to: the states of these blocks decay, and forget what was rounded long ago."""
    bounds, span = DEFAULT_TOLERANCES[precision], np.ptp(expected)
    error = np.abs(got - expected)
    assert error.max() <= bounds.max_relative * span
    if bounds.min_psnr is not None:
        assert 20 * np.log10(span / np.sqrt(np.mean(error**2))) >= bounds.min_psnr


def noise(*shape):
    return np.random.Generator(np.random.PCG64(7)).standard_normal(shape, dtype=np.float32)


def test_the_page_works(page):
    assert list(BLOCKS) == ["mamba_block.py", "stream.py"]
    ran = runpy.run_path("stream.py")
    assert ran["streamed"].shape == (2, 20, 32)
    assert_within(ran["streamed"], ran["at_once"], "fp16")
    found = isthmus.inspect(page / "mamba-step")
    assert found["verdict"] == "verified"
    assert [(v["name"], v["dtype"]) for v in found["inputs"]] == [("x", "float32"), ("window", "float32"), ("state", "float32")]
    assert [v["name"] for v in found["outputs"]] == ["output_0", "output_1", "output_2"]


def test_the_page_keeps_the_style(page):
    # Imports are sorted as in a project that has isthmus installed.
    for command in (["check", "--ignore", "INP001,T201,D100,I001"], ["format", "--check"]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml"), *map(str, page.glob("*.py"))],
            check=False, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr


def test_mamba_with_as_many_streams_as_are_open(page):
    """In float32, with a batch that varies."""
    dynamic = [Dynamic(name, 0, SizeRange(1, 2, 8)) for name in ("x", "window", "state")]
    result = isthmus.export("mamba_block:step", "onnxruntime", page / "out", precision="fp32", dynamic=dynamic)
    assert result.manifest.verdict == "verified"
    import mamba_block

    for batch in (1, 5):
        sequence = noise(batch, LENGTH, mamba_block.WIDTH)
        with torch.no_grad():
            at_once = mamba_block.block()(torch.from_numpy(sequence)).numpy()
        assert_within(stream(page / "out" / "model.onnx", sequence), at_once, "fp32")


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["rwkv7_of_a_stream", "attention_of_a_stream"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_matrix_states(tmp_path, monkeypatch, name, precision):
    monkeypatch.setitem(sys.modules, "streams", sys.modules[__name__])
    result = isthmus.export(f"streams:{name}", "onnxruntime", tmp_path / "out", precision=precision)
    assert result.manifest.verdict == "verified"
    sequence = noise(2, LENGTH, WIDTH)
    module, _ = globals()[name]()
    with torch.no_grad():
        at_once = module(torch.from_numpy(sequence)).numpy()
    assert_within(stream(tmp_path / "out" / "model.onnx", sequence), at_once, precision)


def test_a_plan_of_a_step(page):
    """Steps are plain operators, so that the plan needs no plugin."""
    pytest.importorskip("tensorrt_rtx", reason="not run: tensorrt-rtx is not installed (pip install 'isthmus[tensorrt-rtx]')")
    options = {"compute_capability": ("8.9",)}
    result = isthmus.export("mamba_block:step", "tensorrt-rtx", page / "out", precision="fp16", options=options)
    assert result.manifest.verdict == "built"
    assert {stage.name: stage.verdict for stage in result.manifest.stages}["onnx"] == "verified"
    assert result.manifest.details["engine"]["plugins"] == []
    assert not any(DOMAIN in name for name in result.manifest.details["operators"])
    sequence = noise(2, LENGTH, 32)
    import mamba_block

    with torch.no_grad():
        at_once = mamba_block.block()(torch.from_numpy(sequence)).numpy()
    assert_within(stream(page / "out" / "model.onnx", sequence), at_once, "fp16")
