"""The whole way: model to verified bundle, and the Python API's promises."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import isthmus
from isthmus.exporter import bundle as bundles
from isthmus.exporter.bundle import read_cases, read_manifest, write_cases, write_manifest
from isthmus.exporter.errors import (
    AccuracyError,
    IntegrityError,
    IsthmusError,
    MachineError,
    UnknownNameError,
    UnsupportedError,
    UsageError,
)
from isthmus.exporter.spec import MODELS, Dynamic, SizeRange


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.norm(self.linear(x))
        return {"scaled": y * scale, "plain": y}


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x *= scale
        return x + 1, self.table


class KeywordOnly(nn.Module):
    def forward(self, *, x: torch.Tensor) -> torch.Tensor:
        return x


class Counting(nn.Module):
    """A constant that changes from call to call, which a trace bakes in."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


class Overflowing(nn.Module):
    """Computes values that float16 cannot hold, and brings them back."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16, bias=False)
        self.down = nn.Linear(16, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)) * 1e-6)


def two_inputs() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return TwoInputs(), (torch.randn(4, 8), torch.rand(4, 1))


def test_a_pair_of_module_and_inputs_is_exported_with_named_inputs_and_outputs(tmp_path: Path) -> None:
    module, inputs = two_inputs()
    module.train()
    result = isthmus.export(
        (module, inputs),
        "onnxruntime",
        tmp_path / "b",
        dynamic=[Dynamic("x", 0, SizeRange(1, 4, 8)), Dynamic("scale", 0, SizeRange(1, 4, 8))],
    )
    assert result.manifest.verdict == "verified"
    assert not module.training
    assert [i.name for i in result.manifest.inputs] == ["x", "scale"]
    assert [i.shape for i in result.manifest.inputs] == [("x_0", 8), ("x_0", 1)]
    assert [o.name for o in result.manifest.outputs] == ["output_0", "output_1"]
    session = ort.InferenceSession(tmp_path / "b" / "model.onnx", providers=["CPUExecutionProvider"])
    x, scale = torch.randn(7, 8), torch.rand(7, 1)
    expected = module(x, scale)
    got = session.run(None, {"x": x.numpy(), "scale": scale.numpy()})
    for array, tensor in zip(got, expected.values(), strict=True):
        np.testing.assert_allclose(array, tensor.detach().numpy(), atol=1e-6)


def test_a_fixed_batch_size_and_another_opset(tmp_path: Path) -> None:
    result = isthmus.export("dit-tiny", "onnxruntime", tmp_path / "b", batch_size=3, opset=20)
    assert result.manifest.opset == 20
    assert result.manifest.inputs[0].shape[0] == 3
    assert result.manifest.sizes == {}


def test_a_dynamic_range_replaces_the_models_own(tmp_path: Path) -> None:
    result = isthmus.export("dit-tiny", "onnxruntime", tmp_path / "b", dynamic=[Dynamic("x", 0, SizeRange(2, 3, 5))])
    assert result.manifest.sizes == {"batch": (2, 3, 5)}
    assert result.manifest.inputs[0].shape[0] == "batch"
    assert {m.shape[0] for s in result.manifest.stages for m in s.metrics} == {3, 2}


def test_a_batch_that_the_sampler_does_not_have_gives_no_pictures(tmp_path: Path) -> None:
    result = isthmus.export("dit-digits", "onnxruntime", tmp_path / "b", batch_size=7)
    assert result.manifest.verdict == "verified"
    assert "samples" not in {m.case for s in result.manifest.stages for m in s.metrics}
    assert "No pictures" in (tmp_path / "b" / "report.json").read_text()


def test_a_batch_that_divides_the_samplers_draws_its_pictures_in_several_calls(tmp_path: Path) -> None:
    result = isthmus.export("dit-digits", "onnxruntime", tmp_path / "b", batch_size=2)
    assert result.manifest.inputs[0].shape[0] == 2
    (pictures,) = (m for s in result.manifest.stages for m in s.metrics if m.case == "samples")
    assert pictures.psnr_db > 60
    assert pictures.shape[0] == MODELS["dit-digits"].spec().sampler.batch // 2  # with guidance, a picture has two rows


def test_a_module_that_changes_its_input_and_returns_its_state(tmp_path: Path) -> None:
    x, scale = torch.randn(3, 4), torch.tensor(2.0)
    kept = x.clone()
    result = isthmus.export((InPlace(), (x, scale)), "onnxruntime", tmp_path / "b")
    assert result.manifest.verdict == "verified"
    assert [i.shape for i in result.manifest.inputs] == [(3, 4), ()]
    torch.testing.assert_close(x, kept)
    np.testing.assert_array_equal(read_cases(tmp_path / "b" / bundles.INPUTS)["example"]["x"], kept.numpy())


def test_a_module_that_fails_is_named_with_its_inputs(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match="the PyTorch module failed: RuntimeError") as caught:
        isthmus.export((nn.Linear(8, 4), (torch.randn(2, 7),)), "onnxruntime", tmp_path / "b")
    assert "input (2, 7)" in str(caught.value)


def test_settings_reach_the_model(tmp_path: Path) -> None:
    result = isthmus.export("dit-tiny", "onnxruntime", tmp_path / "b", settings={"depth": 1})
    assert result.manifest.config["depth"] == 1
    assert result.manifest.details["operators"]["Attention"] == 1


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = isthmus.export("dit-tiny", "onnxruntime", tmp_path / "b", dry_run=True)
    assert result.bundle is None
    assert result.exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_a_miss_writes_the_bundle_and_raises_with_the_result(tmp_path: Path) -> None:
    with pytest.raises(AccuracyError) as caught:
        isthmus.export("dit-tiny", "onnxruntime", tmp_path / "b", atol=1e-30)
    assert caught.value.exit_code == 3
    assert caught.value.result.manifest.verdict == "failed"
    assert read_manifest(tmp_path / "b").verdict == "failed"
    assert "expected" in str(caught.value)
    with pytest.raises(AccuracyError):
        isthmus.verify(tmp_path / "b")


def test_a_constant_that_the_trace_baked_in_fails_the_torch_stage(tmp_path: Path) -> None:
    with pytest.raises(AccuracyError) as caught:
        isthmus.export((Counting(), (torch.randn(4),)), "onnxruntime", tmp_path / "b")
    stages = {s.name: s.verdict for s in caught.value.result.manifest.stages}
    assert stages["torch"] == "failed"


def test_values_beyond_float16_stay_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Overflowing().eval()
    nn.init.uniform_(module.up.weight, 2e4, 3e4)
    result = isthmus.export((module, (torch.rand(4, 16),)), "onnxruntime", tmp_path / "b", precision="fp16")
    assert result.manifest.verdict == "verified"


def test_a_module_that_torch_cannot_capture_is_unsupported(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="does not capture Branch"):
        isthmus.export((Branch(), (torch.randn(3),)), "onnxruntime", tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_nan_in_the_reference_is_a_named_failure(tmp_path: Path) -> None:
    class Root(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sqrt()

    with pytest.raises(AccuracyError, match="NaN"):
        isthmus.export((Root(), (torch.tensor([-1.0, 4.0]),)), "onnxruntime", tmp_path / "b")


class Optional(nn.Module):
    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None) -> torch.Tensor:
        x = x if scale is None else x * scale
        return x if shift is None else x + shift


def test_a_named_input_never_lands_in_another_parameter(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="skip scale"):
        isthmus.export(Optional(), "onnxruntime", tmp_path / "b", inputs={"x": torch.ones(3), "shift": torch.ones(3)})


class Turned(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        return x.reshape(b, c, w, h) * 2


def test_height_and_width_are_sizes_of_their_own(tmp_path: Path) -> None:
    sizes = [Dynamic("x", axis, SizeRange(4, 8, 16)) for axis in (2, 3)]
    with pytest.raises(UnsupportedError, match="holds for the example's sizes only"):
        isthmus.export((Turned(), (torch.randn(2, 3, 8, 8),)), "onnxruntime", tmp_path / "b", dynamic=sizes)
    result = isthmus.export((Turned(), (torch.randn(2, 3, 8, 12),)), "onnxruntime", tmp_path / "b", dynamic=sizes)
    assert result.manifest.inputs[0].shape == (2, 3, "x_2", "x_3")
    resized = {m.shape for s in result.manifest.stages for m in s.metrics if m.case == "resized"}
    assert resized == {(2, 3, 16, 4)}
    session = ort.InferenceSession(tmp_path / "b" / "model.onnx", providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 16), dtype=np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x.reshape(2, 3, 16, 4) * 2)


class Aliases(nn.Module):
    """Outputs that are an input, a weight, and one another; an input called like a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 3.0))

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * self.scale + scale
        return y, y, x, self.scale


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_outputs_that_are_something_else_as_well(precision: str, tmp_path: Path) -> None:
    module = Aliases().eval()
    x, scale = torch.randn(2, 4), torch.rand(4)
    result = isthmus.export((module, (x, scale)), "onnxruntime", tmp_path / "b", precision=precision)
    assert [i.name for i in result.manifest.inputs] == ["x", "scale"]
    assert [o.name for o in result.manifest.outputs] == [f"output_{i}" for i in range(4)]
    session = ort.InferenceSession(tmp_path / "b" / "model.onnx", providers=["CPUExecutionProvider"])
    for got, expected in zip(session.run(None, {"x": x.numpy(), "scale": scale.numpy()}), module(x, scale), strict=True):
        np.testing.assert_allclose(got, expected.detach().numpy(), atol=0.01)


def test_an_input_called_output(tmp_path: Path) -> None:
    class Echo(nn.Module):
        def forward(self, output: torch.Tensor) -> torch.Tensor:
            return output * 2

    result = isthmus.export((Echo(), (torch.randn(3),)), "onnxruntime", tmp_path / "b")
    assert [o.name for o in result.manifest.outputs] == ["output_"]


def test_a_python_value_among_the_outputs_is_refused_by_place(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, object]:
            return {"a": x * 2, "b": 3}

    with pytest.raises(UnsupportedError, match="output 1 is the Python value 3"):
        isthmus.export((Mixed(), (torch.randn(3),)), "onnxruntime", tmp_path / "b")


def test_a_graph_input_beyond_float16_is_read_in_float32(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x * 0.001)

    torch.manual_seed(0)
    module = Scaled().eval()
    x = torch.rand(4, 8) * 2e5
    isthmus.export((module, (x,)), "onnxruntime", tmp_path / "b", precision="fp16")
    # Not ONNX Runtime, which drops casts around nodes that its CPU computes in float32.
    got = ReferenceEvaluator(str(tmp_path / "b" / "model.onnx")).run(None, {"x": x.numpy()})[0]
    expected = module(x).detach().numpy()
    assert np.abs(got - expected).max() < 0.01 * (expected.max() - expected.min())


def test_a_value_beyond_float16_that_another_module_brings_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    up, down = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
    nn.init.uniform_(up.weight, 2e4, 3e4)
    nn.init.uniform_(down.weight, 0.5e-4, 1e-4)
    result = isthmus.export((nn.Sequential(up, down).eval(), (torch.rand(4, 16),)), "onnxruntime", tmp_path / "b", precision="fp16")
    assert result.manifest.verdict == "verified"


def test_a_decision_is_made_in_float32(tmp_path: Path) -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(1001, 4)

        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return self.table((t * 1000).long())

    torch.manual_seed(0)
    module, t = Lookup().eval(), torch.rand(200)
    isthmus.export((module, (t,)), "onnxruntime", tmp_path / "b", precision="fp16")
    got = ReferenceEvaluator(str(tmp_path / "b" / "model.onnx")).run(None, {"t": t.numpy()})[0]
    np.testing.assert_allclose(got, module(t).detach().numpy(), atol=5e-3)


def test_a_branch_reads_float32_in_a_float16_graph(tmp_path: Path) -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return torch.cond(flag, self.second, lambda a: a + 1, (y,))

    torch.manual_seed(0)
    module = Conditional().eval().requires_grad_(False)
    result = isthmus.export((module, (torch.randn(2, 8), torch.tensor(True))), "onnxruntime", tmp_path / "b", precision="fp16")
    assert result.manifest.verdict == "verified"


def test_a_module_in_float64_is_not_called_fp16(tmp_path: Path) -> None:
    pair = (nn.Linear(4, 4).double(), (torch.randn(2, 4, dtype=torch.float64),))
    with pytest.raises(UnsupportedError, match="computes in double, expected float32"):
        isthmus.export(pair, "onnxruntime", tmp_path / "b", precision="fp16")


def test_a_causal_mask_of_infinities(tmp_path: Path) -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((8, 8), float("-inf")).triu(1), persistent=False)

        def forward(self, scores: torch.Tensor) -> torch.Tensor:
            return torch.softmax(scores + self.mask, -1)

    for precision in ("fp32", "fp16"):
        result = isthmus.export((Causal(), (torch.randn(2, 8, 8),)), "onnxruntime", tmp_path / precision, precision=precision)
        assert result.manifest.verdict == "verified"


def test_a_manifest_that_could_not_fail_is_refused(tmp_path: Path) -> None:
    isthmus.export(two_inputs(), "onnxruntime", tmp_path / "b")
    manifest = read_manifest(tmp_path / "b")
    for tolerance in ({}, {"min_ssim": 1.0}):
        write_manifest(tmp_path / "b", manifest.model_copy(update={"tolerance": tolerance}))
        with pytest.raises(IntegrityError):
            isthmus.verify(tmp_path / "b")


def test_wrong_options_of_a_target_are_all_listed(tmp_path):
    with pytest.raises(UsageError, match="options of onnxruntime cannot be used") as caught:
        isthmus.export("dit-tiny", "onnxruntime", tmp_path / "out", options={"ssm_op": "none", "depth": 3})
    assert [reason.where for reason in caught.value.reasons] == ["ssm_op", "depth"]
    assert "got 'none'" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_arguments_are_checked(tmp_path: Path) -> None:
    pair = two_inputs()
    with pytest.raises(UnknownNameError, match="dit-tinny"):
        isthmus.export("dit-tinny", "onnxruntime", tmp_path / "b")
    with pytest.raises(UnknownNameError, match="precision"):
        isthmus.export("dit-tiny", "onnxruntime", tmp_path / "b", precision="fp4")
    with pytest.raises(UnknownNameError, match="opset"):
        isthmus.export("dit-tiny", "onnxruntime", tmp_path / "b", opset=27)
    with pytest.raises(MachineError, match="CUDAExecutionProvider"):
        isthmus.export("dit-tiny", "onnxruntime", tmp_path / "b", options={"execution_provider": "cuda"})
    with pytest.raises(UsageError, match="without example inputs"):
        isthmus.export(pair[0], "onnxruntime", tmp_path / "b")
    with pytest.raises(UsageError, match="--dynamic names the input z"):
        isthmus.export(pair, "onnxruntime", tmp_path / "b", dynamic=[Dynamic("z", 0, SizeRange(1, 2, 3))])
    with pytest.raises(UnsupportedError, match="not all tensors"):
        isthmus.export((pair[0], (pair[1][0], 3.0)), "onnxruntime", tmp_path / "b")  # type: ignore[arg-type]  # refused
    with pytest.raises(UnsupportedError, match="by keyword only"):
        isthmus.export(KeywordOnly(), "onnxruntime", tmp_path / "b", inputs={"x": torch.ones(2)})
    with pytest.raises(UsageError, match="settings of dit-tiny contradict"):
        isthmus.export("dit-tiny", "onnxruntime", tmp_path / "b", settings={"hidden_size": 33})
    assert list(tmp_path.iterdir()) == []


def test_verify_finds_a_changed_byte(tmp_path: Path) -> None:
    isthmus.export(two_inputs(), "onnxruntime", tmp_path / "b")
    path = tmp_path / "b" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"model\.onnx: sha256 is") as caught:
        isthmus.verify(tmp_path / "b")
    assert caught.value.exit_code == 1


def test_verify_measures_again(tmp_path: Path) -> None:
    """A bundle whose files are whole, and whose artifact computes something else than its reference."""
    isthmus.export(two_inputs(), "onnxruntime", tmp_path / "b")
    manifest = read_manifest(tmp_path / "b")
    outputs = read_cases(tmp_path / "b" / bundles.OUTPUTS)
    outputs["second"]["output_1"][0, 0] += 0.01
    write_cases(tmp_path / "b" / bundles.OUTPUTS, outputs)
    write_manifest(tmp_path / "b", manifest)
    with pytest.raises(AccuracyError) as caught:
        isthmus.verify(tmp_path / "b")
    assert "second" in str(caught.value)
    assert "output_1" in str(caught.value)


def test_report_is_rendered_again(tmp_path: Path) -> None:
    isthmus.export(two_inputs(), "onnxruntime", tmp_path / "b")
    page = tmp_path / "b" / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert isthmus.report(tmp_path / "b") == page
    assert page.read_bytes() == before
    assert isthmus.verify(tmp_path / "b").verdict == "verified"


def test_inspect_gives_json_values(tmp_path: Path) -> None:
    isthmus.export(two_inputs(), "onnxruntime", tmp_path / "b")
    value = json.loads(json.dumps(isthmus.inspect(tmp_path / "b")))
    assert value["target"] == "onnxruntime"
    assert value["files"]["model.onnx"] == (tmp_path / "b" / "model.onnx").stat().st_size


def test_the_manifest_has_what_the_contract_names(tmp_path: Path) -> None:
    isthmus.export(two_inputs(), "onnxruntime", tmp_path / "b")
    value = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert {"schema", "model", "target", "precision", "inputs", "outputs", "verdict", "stages", "files"} <= set(value)
    assert all({"name", "verdict", "reason", "metrics"} <= set(stage) for stage in value["stages"])
    assert dataclasses.is_dataclass(isthmus.ExportResult)
