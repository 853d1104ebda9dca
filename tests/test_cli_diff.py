"""`isthmus diff` and `isthmus bisect`: what they print, what they refuse, and how they end."""

import json
import shutil

import onnx_ir as ir
import pytest
import torch

import isthmus
from isthmus import differences
from isthmus.calibration.bisect import Form
from isthmus.differences import errors_by_timestep
from isthmus.exporter.bundle import read_manifest, write_manifest
from isthmus.exporter.errors import UsageError


@pytest.fixture(autouse=True)
def one_thread():
    """These models are tiny: threads cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def edited(bundle, change):
    """Changes the graph of a bundle, and its hash in the manifest with it."""
    model = ir.load(bundle / "model.onnx")
    change({node.name: node for node in model.graph})
    (bundle / "model.onnx").unlink()
    ir.save(model, bundle / "model.onnx")
    write_manifest(bundle, read_manifest(bundle))


def wrong_gelu(nodes):
    nodes["blocks.0.mlp.act/gelu"].attributes["approximate"] = ir.AttrString("approximate", "none")


def changed(bundle, **fields):
    """Changes the manifest of a bundle."""
    write_manifest(bundle, read_manifest(bundle).model_copy(update=fields))


@pytest.fixture
def faulty(bundle):
    edited(bundle, wrong_gelu)
    return bundle


def test_bisect_of_a_faithful_bundle(run, made):
    result = run("bisect", made)
    assert result.exit_code == 0, result.stderr
    first, onnx = result.stdout.splitlines()
    assert first == "dit-tiny for onnxruntime in fp32: no module is over the threshold in any of the stages that were run"
    assert onnx.startswith("  onnx         42 of 42 modules visible, 0 over 1e-05; worst ")
    assert "comparing onnx" in result.stderr


def test_bisect_names_the_module_its_stage_and_its_nodes(run, faulty):
    result = run("bisect", faulty, "--case", "example")
    assert result.exit_code == 3, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "dit-tiny for onnxruntime in fp32: blocks.0.mlp.act (GELU) first went wrong, in stage onnx"
    assert lines[1].startswith("  injected   2.")
    assert lines[1].endswith("at its output; the threshold is 1e-05")
    assert "  case       example" in lines
    assert "  nodes      Gelu blocks.0.mlp.act/gelu" in lines
    assert "stage onnx: 1 module over 1e-05" in lines
    row = next(line for line in lines if line.startswith("blocks.0.mlp.act "))
    assert row.split()[-1] == "onnx"


def test_bisect_as_json(run, faulty):
    result = run("bisect", faulty, "--case", "example", "--format", "json")
    value = json.loads(result.stdout)
    assert result.exit_code == value["exit_code"] == 3
    assert value["culprit"]["module"] == "blocks.0.mlp.act"
    assert value["culprit"]["stage"] == "onnx"
    assert value["culprit"]["injected"]["relative_l2"] > 1e-4
    assert value["culprit"]["nodes"] == ["Gelu blocks.0.mlp.act/gelu"]
    (stage,) = value["stages"]
    assert stage["over"] == ["blocks.0.mlp.act"]
    assert stage["visible"] == len(stage["modules"]) == 42
    assert value["arisen"]["blocks.0.mlp.act"] == "onnx"


def test_a_threshold_and_a_memory_of_ones_own(run, faulty):
    result = run("bisect", faulty, "--case=example", "--threshold", "0.01", "--memory", "1")
    assert result.exit_code == 0, result.stderr


def test_diff_with_torch_lists_every_module(run, made):
    result = run("diff", "torch", made, "--case", "example")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{made} against torch: dit-tiny, stage onnx, 42 of 42 modules visible, 0 over 1e-05")
    assert lines[1].split() == ["module", "kind", "injected", "inherited", "total", "injected", "SQNR,", "dB"]
    assert [line.split()[0] for line in lines[2:5]] == ["t_embedder.mlp.0", "t_embedder.mlp.1", "t_embedder.mlp.2"]
    assert lines[-1].startswith("the model itself")
    assert len(lines) == 2 + 42
    assert run("diff", made, "torch", "--case", "example").stdout.splitlines()[1:] == lines[1:]


def test_diff_of_two_bundles(run, made, faulty):
    result = run("diff", made, faulty, "--case", "example", "--format", "json")
    value = json.loads(result.stdout)
    assert result.exit_code == 3
    assert value["stage"]["over"] == ["blocks.0.mlp.act"]
    assert value["other"]["over"] == []
    assert value["apart"]["blocks.0.mlp.fc1"]["relative_l2"] == 0
    assert value["apart"]["blocks.0.mlp.act"]["relative_l2"] > 1e-4
    # The other way round, the faithful one is judged.
    assert run("diff", faulty, made, "--case", "example").exit_code == 0


def test_bundles_of_other_models_are_not_compared(run, made, bundle):
    manifest = read_manifest(bundle)
    changed(
        bundle,
        model="dit-digits",
        config={**manifest.config, "depth": 3},
        weights=manifest.weights.model_copy(update={"sha256": "0" * 64}),
        inputs=tuple(info.model_copy(update={"name": "z"}) if info.name == "x" else info for info in manifest.inputs),
    )
    result = run("diff", made, bundle)
    assert result.exit_code == 2
    for reason in (
        "A is dit-tiny, B is dit-digits",
        "config depth: A has 2, B has 3",
        "weights: A has sha256",
        "input z: A has no such input",
    ):
        assert reason in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("diff", "torch", "torch"), "both sides are PyTorch"),
        (("diff", "torch", "nowhere"), "nowhere is not a bundle"),
        (("bisect", "nowhere"), "nowhere is not a bundle"),
        (("bisect", "{bundle}", "--case", "third"), "has no case third"),
        (("bisect", "{bundle}", "--memory", "0"), "expected a number from 1"),
        (("bisect", "{bundle}", "--threshold", "nan"), "expected a number of at least 0"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_wrong_calls(run, made, arguments, words):
    result = run(*(argument.format(bundle=made) for argument in arguments))
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""


def test_other_weights_are_refused(run, bundle):
    manifest = read_manifest(bundle)
    changed(bundle, weights=manifest.weights.model_copy(update={"seed": 1}))
    result = run("bisect", bundle)
    assert result.exit_code == 2
    assert "the weights are not those that dit-tiny was exported with" in result.stderr
    assert f"expected {manifest.weights.sha256}" in result.stderr


def test_weights_of_a_file_have_to_be_given(run, bundle):
    manifest = read_manifest(bundle)
    changed(bundle, weights=manifest.weights.model_copy(update={"origin": "file", "path": "dit.safetensors"}))
    result = run("bisect", bundle)
    assert result.exit_code == 2
    assert "exported with the weights of dit.safetensors" in result.stderr
    assert "hint: give --weights" in result.stderr


def test_a_changed_bundle_is_refused(run, bundle):
    with (bundle / "model.onnx").open("ab") as file:
        file.write(b"\0")
    result = run("bisect", bundle)
    assert result.exit_code == 1
    assert "is not what its manifest says" in result.stderr


CODE = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.norm(x))

def make():
    torch.manual_seed({seed})
    return Small(), (torch.randn(2, 4),)
"""


@pytest.fixture
def foreign(tmp_path, monkeypatch, request):
    """A bundle of a model that is not registered, made by `module:callable`."""
    name = f"small_{abs(hash(request.node.name))}"  # imported modules stay
    (tmp_path / f"{name}.py").write_text(CODE.format(seed=0))
    (tmp_path / f"{name}_other.py").write_text(CODE.format(seed=1))
    monkeypatch.chdir(tmp_path)
    isthmus.export(f"{name}:make", "onnxruntime", tmp_path / "small")
    return tmp_path / "small", name


def test_a_model_that_is_not_registered_has_to_be_named(run, foreign):
    bundle, name = foreign
    result = run("bisect", bundle)
    assert result.exit_code == 2
    assert "the model make is not registered, and a bundle does not hold the code of its model" in result.stderr
    assert "--model module:callable" in result.stderr
    assert run("bisect", bundle, "--model", f"{name}:make").exit_code == 0
    other = run("bisect", bundle, "--model", f"{name}_other:make")
    assert other.exit_code == 2
    assert "the weights are not those that make was exported with" in other.stderr


def test_the_modules_of_a_model_that_is_not_registered_come_into_the_report(run, foreign):
    bundle, name = foreign
    result = run("report", bundle, "--modules", "--model", f"{name}:make")
    assert result.exit_code == 0, result.stderr
    reason = json.loads((bundle / "diff.json").read_text())["no_timesteps"]
    assert reason == "make draws no pictures with these weights and this batch size, so that there is no trajectory"


def test_what_could_not_be_run_is_not_called_good(run, made, monkeypatch):
    none = Form("plan", "fp32", None, "no GPU here")
    monkeypatch.setattr(differences, "forms", lambda *_, **__: [none])
    monkeypatch.setattr(differences, "artifact", lambda *_, **__: none)
    result = run("bisect", made)
    assert result.exit_code == 5
    first, plan = result.stdout.splitlines()
    assert first.startswith("dit-tiny for onnxruntime in fp32: no stage could be run on this machine")
    assert plan.split() == ["plan", "not", "run:", "no", "GPU", "here"]
    value = json.loads(run("bisect", made, "--format", "json").stdout)
    assert (value["exit_code"], value["culprit"]) == (5, None)
    result = run("diff", "torch", made)
    assert result.exit_code == 5
    first, second = result.stdout.splitlines()
    assert first.endswith("stage plan, not run: no GPU here")
    assert second == "nothing is known of its modules: see `isthmus doctor`"


def test_the_python_api(foreign):
    bundle, name = foreign
    result = isthmus.bisect(bundle, model=f"{name}:make")
    assert result.culprit is None
    assert [row.module for row in result.stages[0].rows] == ["norm", "out", ""]
    with pytest.raises(UsageError, match="both sides are PyTorch"):
        isthmus.diff("torch", "torch")
    copy = shutil.copytree(bundle, bundle.with_name("copy"))

    def change(nodes):
        nodes["norm/layer_norm"].attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)

    edited(copy, change)
    found = isthmus.diff(bundle, copy, model=f"{name}:make")
    assert [row.module for row in found.stage.over] == ["norm"]
    assert found.apart["norm"].relative_l2 == pytest.approx(found.stage.over[0].error, rel=1e-3)


@pytest.mark.matrix
def test_errors_along_a_samplers_trajectory(tmp_path, made):
    isthmus.export("dit-digits", "onnxruntime", tmp_path / "digits", options={"threads": 1})
    rows = errors_by_timestep(tmp_path / "digits", count=2)
    times = list(dict.fromkeys(row["timestep"] for row in rows))
    assert times == [1000.0, 50.0]  # the sampler's first and last call
    assert len(rows) == 2 * 120
    whole = [row for row in rows if row["module"] == ""]
    assert all(0 <= row["injected"] <= row["total"] < 1e-5 for row in whole)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    with pytest.raises(UsageError, match="dit-tiny draws no pictures"):
        errors_by_timestep(made)


def test_rescaled_modules_are_not_taken_for_culprits(run, tmp_path):
    export = ["export", "dit-tiny", "--target", "onnxruntime", "--precision", "int8", "--calibration-data", "random"]
    assert run(*export, "--smooth", 0.5, "-o", tmp_path / "smoothed").exit_code == 0
    result = run("bisect", tmp_path / "smoothed", "--format", "json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    (stage,) = value["stages"]
    assert value["culprit"] is None
    assert (stage["name"], stage["visible"]) == ("quantized", 1)
    assert "--smooth moved scales" in result.stdout
