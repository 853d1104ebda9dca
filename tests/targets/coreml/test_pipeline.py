"""The whole way to Core ML through the public API: what is written, reported and measured, and how bad input and damage end."""

import gc
import json
import shutil
import weakref

import numpy as np
import pytest
import torch

import isthmus
from isthmus.exporter.bundle import read_manifest
from isthmus.exporter.errors import AccuracyError, IntegrityError, IsthmusError, UnsupportedError, UsageError
from isthmus.exporter.target import TARGETS, Job
from isthmus.exporter.trace import trace
from isthmus.targets.coreml.interpreter import load
from isthmus.targets.coreml.interpreter.registry import OPERATIONS
from isthmus.targets.coreml.lower import operations


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bundle of dit-tiny with 8-bit weights and activations. Not to be changed."""
    folder = tmp_path_factory.mktemp("coreml") / "dit-tiny"
    keep = {"keep": ("blocks.0.attn.*",)}
    isthmus.export("dit-tiny", "coreml", folder, precision="w8a8", calibration_data="random", calibration_size=2, options=keep)
    return folder


def tables(folder):
    return {table["name"]: table for table in json.loads((folder / "report.json").read_text())["tables"]}


def test_what_is_written(made):
    manifest = read_manifest(made)
    details = manifest.details
    assert {s.name: s.verdict for s in manifest.stages} == {
        "torch": "verified", "torch-dtype": "verified", "mil": "verified", "device": "not run",
    }  # fmt: skip
    assert manifest.device == "Core ML, iOS18 and later"
    found = [op for op in operations(load(made / "model.mlpackage")) if op.op_type != "const"]
    assert details["operations"] == len(found) == sum(details["operators"].values())
    assert details["operators"]["quantize"] == details["operators"]["dequantize"] > 0
    assert 0 < details["float32_operations"] < 8  # the timestep's angles
    assert details["weight_bytes"] < details["file_bytes"]
    share = details["engine"]
    assert share["verdict"] == "likely"
    assert 0 <= share["likely"] <= share["flops"]
    assert {part["name"] for part in share["modules"]} >= {"blocks.0.mlp.fc1", "x_embedder.proj"}
    assert "packages" not in details
    assert "functions" not in details


def test_nothing_that_was_lowered_holds_the_models_weights(tmp_path):
    """What is read back from the package does not come on top of them."""
    target = TARGETS["coreml"]()
    module = torch.nn.Linear(64, 64).eval()
    program = trace(module, {"x": torch.ones(2, 64)})
    freed = [weakref.ref(module), weakref.ref(program), weakref.ref(module.weight)]
    job = Job(program, None, "fp16", target.Options(), input_names=("x",), output_names=("y",))
    lowered = target.lower(job, tmp_path)
    del module, program, job
    gc.collect()
    assert [held() for held in freed] == [None, None, None]
    assert "operators" not in lowered.details


def test_what_is_reported(made):
    found = tables(made)
    assert set(found) >= {"compression", "head-room"}
    rows = {row[0]: row for row in found["compression"]["rows"]}
    assert any("blocks_0_attn" in name and row[4] == "kept as asked" and row[3] == 16 for name, row in rows.items())
    assert any("blocks_1_attn" in name and row[4] == "a scale for each output channel" and row[3] == 8 for name, row in rows.items())
    assert any(row[4] == "one scale" and row[2] is None for row in rows.values())
    assert read_manifest(made).details["compression"]
    room = found["head-room"]["rows"]
    assert [row[3] for row in room] == sorted((row[3] for row in room), reverse=True)
    for _, _, _, peak, times in room:
        assert times == pytest.approx(65504 / peak)
    assert any(row[2].startswith("blocks.") for row in room)


@pytest.fixture
def bundle(made, tmp_path):
    return shutil.copytree(made, tmp_path / "bundle")


def test_a_package_without_its_weights_is_refused(bundle, run):
    (weights,) = (bundle / "model.mlpackage").rglob("weight*.bin")
    weights.unlink()
    with pytest.raises(IntegrityError, match=r"weight\w*\.bin") as caught:
        isthmus.verify(bundle)
    assert caught.value.exit_code == 1
    assert run("verify", bundle).exit_code == 1
    with pytest.raises(IsthmusError, match="a weight file is missing or damaged") as damaged:
        load(bundle / "model.mlpackage")
    assert damaged.value.exit_code == 1
    (stage,) = (s for s in TARGETS["coreml"]().stages(bundle, read_manifest(bundle)) if s.name == "mil")
    with pytest.raises(IsthmusError, match="a weight file is missing or damaged"):
        stage.open()


def test_an_operation_that_the_interpreter_does_not_know_blocks_its_stage_by_name(bundle, monkeypatch):
    monkeypatch.delitem(OPERATIONS, "layer_norm")
    with pytest.raises(AccuracyError) as caught:
        isthmus.verify(bundle)
    (stage,) = (s for s in caught.value.result.stages if s.name == "mil")
    assert stage.verdict == "blocked"
    assert "the operation 'layer_norm' (" in stage.reason


@pytest.mark.parametrize(
    ("precision", "options", "words"),
    [
        ("int4", {"minimum_deployment_target": "iOS17"}, "int4 is read since iOS18, got iOS17"),
        ("w8a8", {"minimum_deployment_target": "iOS16"}, "w8a8 is read since iOS17, got iOS16"),
        ("fp16", {"shapes": "functions", "minimum_deployment_target": "iOS17"}, "several functions are read since iOS18, got iOS17"),
        ("fp16", {"shapes": "enumerated", "minimum_deployment_target": "iOS17"}, "3 inputs have sizes that vary"),
        ("fp16", {"shapes": "range", "layout": "ane"}, "takes fixed sizes"),
    ],
)
def test_what_a_system_or_another_option_excludes_exits_with_4(precision, options, words, tmp_path):
    data = {"calibration_data": "random", "calibration_size": 1} if precision == "w8a8" else {}
    with pytest.raises(UnsupportedError) as caught:
        isthmus.export("dit-tiny", "coreml", tmp_path / "out", precision=precision, options=options, **data)
    assert caught.value.exit_code == 4
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_fits_no_weight_is_an_error_of_the_call(tmp_path):
    with pytest.raises(UsageError, match=r"blocks\.9\.\*: fits no weight"):
        isthmus.export("dit-tiny", "coreml", tmp_path / "out", precision="int8", options={"keep": ("blocks.9.*",)})
    assert not (tmp_path / "out").exists()


def test_options_of_the_command_line(run, tmp_path):
    result = run(
        "export", "dit-tiny", "--target", "coreml", "-o", tmp_path / "out", "--layout", "ane", "--attention", "split-einsum",
        "--minimum-deployment-target", "iOS16", "--compute-units", "cpu-and-ne", "--batch-size", "1", "--format", "json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    manifest = read_manifest(tmp_path / "out")
    assert manifest.verdict == "verified"
    assert manifest.details["operators"].get("linear", 0) == 0
    assert manifest.details["engine"]["likely"] > 0.9 * manifest.details["engine"]["flops"]
    assert manifest.options["coreml"]["compute_units"] == "cpu-and-ne"


def test_equal_exports_are_equal_files(tmp_path, program):
    from coremltools.converters.mil import Builder

    one = isthmus.export("dit-tiny", "coreml", tmp_path / "a", precision="int8").manifest
    # coremltools goes on numbering constants
    program(lambda a: Builder.sub(x=a, y=Builder.const(val=np.float32(1))), np.zeros(2, np.float32))
    assert Builder.name_count["const"] > 0
    other = isthmus.export("dit-tiny", "coreml", tmp_path / "b", precision="int8").manifest
    assert {n: h for n, h in one.files.items() if ".mlpackage" in n} == {n: h for n, h in other.files.items() if ".mlpackage" in n}
    assert np.isfinite(one.details["engine"]["share"])


@pytest.mark.parametrize(
    ("precision", "asked", "words"),
    [
        ("w8a8", ("--smooth", "0.5"), "smoothing rewrites the ONNX graph, and coreml is lowered from the PyTorch program"),
        ("int8", ("--weight-rounding", "gptq"), "coreml in int8 is not calibrated"),
        ("int4", ("--calibration-method", "mse"), "coreml in int4 is not calibrated"),
    ],
)
def test_what_does_not_fit_is_refused_and_not_ignored(run, tmp_path, precision, asked, words):
    result = run("export", "dit-tiny", "--target", "coreml", "--precision", precision, *asked, "-o", tmp_path / "b")
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert not (tmp_path / "b").exists()
