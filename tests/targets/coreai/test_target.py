"""The target: what an asset takes and gives, what is refused before it is written, and what happens when the library or the disk fails."""

import json
import os
import shutil
import signal
import stat
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.export import Dim

import isthmus
from isthmus.exporter.errors import IsthmusError, MachineError, UnsupportedError
from isthmus.targets.coreai import CoreAI, library
from isthmus.targets.coreai import convert as conversion
from isthmus.targets.coreai.options import CoreAIOptions
from isthmus.targets.coreai.session import CoreAIRunner
from isthmus.targets.coreai.support import unsupported


def _module(function):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    return Module()


def _normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """One export, the whole way."""
    folder = tmp_path_factory.mktemp("bundle") / "b"
    return isthmus.export("dit-tiny", "coreai", folder, precision="fp16")


class TestExport:
    pytestmark = pytest.mark.xdist_group("coreai export")

    def test_is_verified_by_execution_and_says_what_was_not_run(self, bundle):
        stages = {stage.name: stage for stage in bundle.manifest.stages}
        assert bundle.manifest.verdict == "verified"
        assert stages["coreai"].verdict == "verified"
        assert stages["device"].verdict == "not run"
        assert "iOS 27" in stages["device"].reason

    @pytest.mark.matrix
    def test_writes_the_same_bytes_again(self, bundle, tmp_path):
        again = isthmus.export("dit-tiny", "coreai", tmp_path / "b", precision="fp16")
        files = {name: digest for name, digest in bundle.manifest.files.items() if name.startswith("model.aimodel/")}
        assert len(files) == 3
        assert files.items() <= again.manifest.files.items()

    def test_stores_weights_as_float16(self, bundle):
        # 4 bytes a parameter in the module, 2 in the asset, and the graph.
        assert bundle.manifest.details["file_bytes"] < 0.8 * bundle.manifest.weights.bytes

    @pytest.mark.parametrize("name", ["main.mlirb", "main.hash", "metadata.json"])
    def test_a_missing_or_damaged_file_is_named(self, name, bundle, tmp_path):
        copy = tmp_path / "model.aimodel"
        for change in ("missing", "empty"):
            shutil.copytree(bundle.bundle / "model.aimodel", copy)
            (copy / name).unlink() if change == "missing" else (copy / name).write_bytes(b"")
            with pytest.raises(IsthmusError, match=rf"(?s)damaged.*{name}: the file is {change}"):
                CoreAIRunner(copy, {}, timeout=60)
            shutil.rmtree(copy)

    @pytest.mark.matrix
    def test_a_changed_program_is_told_by_its_hash(self, bundle, tmp_path):
        copy = shutil.copytree(bundle.bundle / "model.aimodel", tmp_path / "model.aimodel")
        data = bytearray((copy / "main.mlirb").read_bytes())
        data[len(data) // 2] ^= 1
        (copy / "main.mlirb").write_bytes(data)
        with pytest.raises(IsthmusError, match=r"main.mlirb: sha256 is \w+, expected \w+"):
            CoreAIRunner(copy, {}, timeout=60)

    def test_inputs_that_do_not_fit_are_named_at_once(self, bundle):
        dtypes = {output.name: output.dtype for output in bundle.manifest.outputs}
        with CoreAIRunner(bundle.bundle / "model.aimodel", dtypes, timeout=60) as runner:
            with pytest.raises(IsthmusError) as caught:
                runner.run({"x": np.zeros((2, 4, 8), np.float32), "t": np.zeros(2, np.float64)})
            assert [reason.where for reason in caught.value.reasons] == ["y", "x"]
            os.kill(runner._process.pid, signal.SIGABRT)
            fitting = {i.name: np.zeros([d if isinstance(d, int) else 2 for d in i.shape], i.dtype) for i in bundle.manifest.inputs}
            with pytest.raises(IsthmusError, match="ended its process with SIGABRT"):
                runner.run(fitting)
        with pytest.raises(IsthmusError, match="closed"):
            runner.run(fitting)

    def test_a_run_time_that_hangs_is_ended(self, bundle):
        with pytest.raises(IsthmusError, match="took longer than 0 s loading") as caught:
            CoreAIRunner(bundle.bundle / "model.aimodel", {}, timeout=0.01)
        assert "--timeout" in caught.value.hint


class Recurrent(torch.nn.Module):
    """A cell whose state goes in and comes out."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(8, 8)

    def forward(self, x, state):
        state = torch.tanh(self.mix(x) + state)
        return x + state, state


INTERFACES = {
    "integers, booleans and an input that is not read": (
        lambda x, i, b, _unused: (torch.where(b, x, -x) + i, i * 2, ~b),
        (_normal(2, 3), torch.tensor([[1, -2, 3]]), torch.tensor([[True], [False]]), _normal(2)),
    ),
    "outputs that are one value": (lambda x: (y := x + 1, y, y.view(-1)), (_normal(2, 3),)),
    "an output that is an input": (lambda x, y: (x, x + y, y), (_normal(2, 3), _normal(2, 3))),
    "a condition": (lambda x: (torch.cond(x.sum() > 0, lambda x: x * 0.3, lambda x: x.exp(), (x,)),), (_normal(2, 3),)),
    "a scalar": (lambda x, t: (x * t, t + 1), (_normal(2, 3), torch.tensor(0.7))),
}


@pytest.mark.xdist_group("coreai interfaces")
@pytest.mark.parametrize("case", list(INTERFACES))
def test_interfaces(case, coreai, is_close):
    function, inputs = INTERFACES[case]
    outputs = coreai.outputs(_module(function), inputs)
    wanted = function(*inputs)
    assert len(outputs) == len(wanted)
    assert all(is_close(got, want) for got, want in zip(outputs, wanted, strict=True))


@pytest.mark.xdist_group("coreai interfaces")
def test_a_loop_runs_as_often_as_its_condition_says(coreai, is_close):
    def halved(x):
        def unfinished(i, x):
            return x.abs().max() > 0.1

        def body(i, x):
            return i + 1, torch.sub(x, x, alpha=0.5)  # coreai-torch alone drops alpha, in loops as well

        return torch.ops.higher_order.while_loop(unfinished, body, (torch.tensor(0), x), ())

    x = _normal(2, 3)
    turns, result = coreai.outputs(_module(halved), (x,))
    want = int(np.ceil(np.log2(float(x.abs().max()) / 0.1)))
    assert int(turns) == want
    assert is_close(result, x * 0.5**want)


@pytest.mark.xdist_group("coreai interfaces")
def test_a_branch_of_attention_takes_a_range_of_sizes(coreai, is_close):
    """Two faults of the libraries: results of normalisations are not listed in branches, and layers of sequences end the process there."""
    query, key, out = (torch.nn.Linear(8, 8) for _ in range(3))
    norm = torch.nn.LayerNorm(8)

    def attend(x):
        q, k = (layer(norm(x)).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (query, key))
        return out(F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2))

    def branching(x):
        return (torch.cond(x.sum() > 0, lambda x: x.clone(), attend, (x,)),)

    sizes = {0: Dim("batch", max=16), 1: Dim("tokens", max=64)}
    path, names = coreai.asset(_module(branching), (_normal(2, 5, 8),), dynamic=((sizes,),))
    with CoreAIRunner(path, {}, timeout=60) as runner, torch.no_grad():
        for batch, tokens in ((2, 5), (1, 1), (3, 17)):
            x = _normal(batch, tokens, 8).abs()
            assert is_close(runner.run({names[0]: x.numpy()})["out0"], x)
            assert is_close(runner.run({names[0]: -x.numpy()})["out0"], attend(-x))


def test_a_loop_whose_condition_would_overwrite_what_is_carried_is_refused(coreai):
    def halved(x):
        def unfinished(i, x):
            return (i < 20) & (x.abs().max() > 0.1)

        return torch.ops.higher_order.while_loop(unfinished, lambda i, x: (i + 1, x * 0.5), (torch.tensor(0), x), ())

    (reason,) = unsupported(coreai.traced(_module(halved), (_normal(2, 3),)))
    assert "reads 2 of the tensors" in reason.what
    assert reason.fix


@pytest.mark.xdist_group("coreai interfaces")
@pytest.mark.parametrize("half", [False, True])
def test_one_asset_takes_a_range_of_sizes(half, coreai, is_close):
    layer = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(approximate="tanh"), torch.nn.Linear(16, 8)).eval()

    def attend(x):
        y = layer(x).reshape(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(y, y, y).transpose(1, 2).flatten(2) + x

    sizes = {0: Dim("batch", max=16), 1: Dim("tokens", max=64)}
    path, names = coreai.asset(_module(attend), (_normal(2, 5, 8),), dynamic=((sizes,),), half=half)
    with CoreAIRunner(path, {}, timeout=60) as runner:
        for batch, tokens in ((2, 5), (1, 1), (3, 17)):
            x = _normal(batch, tokens, 8)
            with torch.no_grad():
                assert is_close(runner.run({names[0]: x.numpy()})["out0"], attend(x), 3e-3 if half else 1e-5)


@pytest.mark.xdist_group("coreai interfaces")
def test_a_step_of_a_recurrent_model(coreai, is_close):
    cell = Recurrent()
    path, names = coreai.asset(cell, (_normal(2, 8), torch.zeros(2, 8)))
    with CoreAIRunner(path, {}, timeout=60) as runner, torch.no_grad():
        state = want = torch.zeros(2, 8)
        for seed in range(3):
            x = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
            outputs = runner.run(dict(zip(names, (x.numpy(), state.numpy()), strict=True)))
            y, want = cell(x, want)
            assert is_close(outputs["out0"], y)
            state = torch.from_numpy(outputs["out1"])
        assert is_close(outputs["out1"], want)


class Refused(torch.nn.Module):
    """Calls that are refused, in modules of their own."""

    def __init__(self):
        super().__init__()
        self.pool = torch.nn.MaxPool2d(2, return_indices=True)
        self.up = torch.nn.ConvTranspose3d(2, 2, 2)
        self.attention = Attention()

    def forward(self, x, volume, q):
        values, places = self.pool(x)
        return values + places, self.up(volume), self.attention(q), x.cummax(-1).values, F.pad(q[0], (-1, 1), mode="reflect")


class Attention(torch.nn.Module):
    """Values that are narrower than the queries."""

    def forward(self, q):
        return F.scaled_dot_product_attention(q, q, q[..., :2])


def test_every_call_that_nobody_lowers_is_refused_at_once(coreai):
    reasons = unsupported(coreai.traced(Refused(), (_normal(1, 2, 4, 4), _normal(1, 2, 3, 3, 3), _normal(1, 2, 3, 4))))
    found = {(reason.where, reason.what.split()[1]) for reason in reasons}
    assert found == {
        ("pool", "max_pool2d_with_indices.default"),
        ("up", "convolution.default"),
        ("attention", "scaled_dot_product_attention.default"),
        ("", "cummax.default"),
        ("", "reflection_pad1d.default"),
    }
    assert all(reason.fix for reason in reasons)


def test_dropout_complex_numbers_and_states_are_refused(coreai):
    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(2))

        def forward(self, x):
            self.count.add_(1)
            return x + self.count

    (state,) = unsupported(coreai.traced(Counter(), (_normal(2),)))
    assert (state.where, "states" in state.what) == ("count", True)
    dropped = _module(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5))
    (random,) = unsupported(coreai.traced(dropped, (_normal(1, 2, 3, 4),)))
    assert "dropout_p=0.5" in random.what
    (spectrum,) = unsupported(coreai.traced(_module(torch.view_as_complex), (_normal(3, 2),)))
    assert "complex64" in spectrum.what


def test_an_unsupported_model_is_exit_code_4(tmp_path):
    module = _module(lambda x: x.cummax(-1).values)
    with pytest.raises(UnsupportedError, match="cummax") as caught:
        isthmus.export((module, (_normal(2, 3),)), "coreai", tmp_path / "b", precision="fp32")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "b").exists()


def test_a_missing_package_is_exit_code_5(monkeypatch):
    monkeypatch.setattr(library, "installed", lambda: "")
    with pytest.raises(MachineError, match="coreai-torch is not installed") as caught:
        CoreAI().check_machine(CoreAIOptions())
    assert caught.value.exit_code == 5
    assert "pip install" in caught.value.hint


def _child(folder, text):
    """A stand-in for Python that does what a library may do."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("print('here', file=sys.stderr, flush=True); os.abort()", r"(?s)ended its process with SIGABRT.*here"),
        ("time.sleep(60)", "took longer than 1 s"),
        ("print(json.dumps({'error': 'it is odd'}))", "does not convert the program: it is odd"),
    ],
)
def test_a_converter_that_ends_hangs_or_refuses_is_an_error(text, message, coreai, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion.sys, "executable", _child(tmp_path, text))
    program = coreai.traced(_module(lambda x: x + 1), (_normal(2),))
    with pytest.raises(IsthmusError, match=message):
        conversion.convert(program, tmp_path / "a.aimodel", inputs=["x"], outputs=["y"], description="", timeout=1)
    assert [p.name for p in tmp_path.iterdir()] == ["python"]


def test_a_program_for_which_the_library_ends_its_process(coreai, tmp_path):
    # coreai-core 1.0.0b3 sums no tensor of rank 0; `unsupported` refuses it before.
    program = coreai.traced(_module(lambda x: torch.ops.aten.sum.dim_IntList(x, [])), (torch.tensor(1.0),))
    assert any("rank 0" in reason.what for reason in unsupported(program))
    with pytest.raises(IsthmusError, match="ended its process with SIG"):
        conversion.convert(program, tmp_path / "a.aimodel", inputs=["x"], outputs=["y"], description="", timeout=120)
    assert json.loads("[]") == list(tmp_path.iterdir())
