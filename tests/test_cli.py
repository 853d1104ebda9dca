"""The command line: what it prints where, what it imports, and what it passes on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from isthmus import __version__
from isthmus.exporter.errors import AccuracyError, MachineError, Reason, UnsupportedError
from isthmus.exporter.spec import MODELS
from isthmus.exporter.target import TARGETS

HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "matplotlib", "tensorrt", "coremltools")
# Runs the command line as its script does, then names the heavy libraries that were imported.
WATCHED = f"""
import sys, isthmus.cli
try:
    isthmus.cli.main()
finally:
    print("HEAVY", *sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)
"""
LIGHT = {
    "help": (0, ["--help"]),
    "no command": (2, []),
    "version": (0, ["--version"]),
    "export help": (0, ["export", "--help"]),
    "list": (0, ["list"]),
    "list json": (0, ["list", "models", "--format", "json"]),
    "unknown command": (2, ["exprot"]),
    "unknown option": (2, ["export", "dit-tiny", "--trget", "onnxruntime"]),
    "unknown model": (2, ["export", "dit-tinny", "--target", "onnxruntime"]),
    "unknown target": (2, ["export", "dit-tiny", "--target", "onnxruntme"]),
    "bad values": (2, ["export", "dit-tiny", "--target", "onnxruntime", "--opset", "3", "--set", "depth=x", "--precision", "fp1"]),
    "bad target option": (2, ["export", "dit-tiny", "--target", "onnxruntime", "--threads", "many"]),
    "missing weights": (2, ["export", "dit-tiny", "--target", "onnxruntime", "--weights", "nowhere.safetensors"]),
    "existing output": (2, ["export", "dit-tiny", "--target", "onnxruntime", "-o", "/"]),
    "not a bundle": (2, ["verify", "/"]),
    "no bundle to build": (2, ["build", "/"]),
    "nothing to lint": (2, ["lint", "nowhere.onnx"]),
    "no bundle to lint": (2, ["lint", "/"]),
    "rules of an unknown target": (2, ["lint", "/", "--target", "tensort"]),
    "missing calibration data": (2, ["export", "dit-tiny", "--target", "onnxruntime", "--calibration-data", "nowhere"]),
}


@pytest.mark.parametrize(("code", "arguments"), LIGHT.values(), ids=LIGHT)
def test_help_and_usage_errors_import_nothing_heavy(child, code, arguments):
    result = child(*arguments, code=WATCHED)
    assert result.returncode == code
    assert result.stderr.splitlines()[-1].split() == ["HEAVY"]
    assert "Traceback" not in result.stderr
    if code == 2 and arguments:
        assert result.stderr.startswith("error: ")
        assert result.stdout == ""


def test_import_is_fast(child):
    code = "import time; a = time.process_time(); import isthmus.cli; print(time.process_time() - a)"
    assert min(float(child(code=code).stdout) for _ in range(3)) < 0.5


def test_version(run):
    assert run("--version").stdout.split()[-1] == __version__


def test_help_shows_the_targets_options_under_their_names(run):
    text = run("export", "--help").stdout
    for name in TARGETS:
        section = text.partition(f"Options of {name}:")[2]
        for option in TARGETS[name].Options.model_fields:
            assert f"--{option.replace('_', '-')}" in section


def test_target_options_do_not_take_the_commands_own_names():
    from isthmus.cli import main

    own = {o for p in main.commands["export"].params for o in p.opts}
    for name in TARGETS:
        assert not own & {f"--{option.replace('_', '-')}" for option in TARGETS[name].Options.model_fields}


def test_list_has_every_entry(run):
    value = json.loads(run("list", "--format", "json").stdout)
    assert sorted(value) == ["analyses", "calibrators", "models", "ops", "targets"]
    assert {m["name"] for m in value["models"]} == set(MODELS)
    assert {t["name"] for t in value["targets"]} == set(TARGETS)
    tiny = next(m for m in value["models"] if m["name"] == "dit-tiny")
    assert tiny["options"]["depth"] == {"type": "int", "default": MODELS.entry("dit-tiny").options["depth"].default}
    text = run("list").stdout
    assert all(name in text for name in (*MODELS, *TARGETS))
    assert "calibrators" in text
    assert "percentile" in text


def test_lists_are_plain_lines_without_a_terminal(child):
    result = child("list", "models")
    assert result.returncode == 0
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    for name in MODELS:
        assert any(line.split()[0] == name and MODELS.entry(name).summary in line for line in lines)


def test_list_ops_has_the_state_of_every_part(run):
    from isthmus.exporter.op import OPS, PARTS
    from isthmus.exporter.ops.state import MEANINGS

    operators = {o["name"]: o for o in json.loads(run("list", "ops", "--format", "json").stdout)["ops"]}
    assert set(operators) == set(OPS)
    for name, o in operators.items():
        assert o["nodes"] == [f"isthmus::{form.op_type}" for form in OPS[name].forms]
        assert list(o["parts"]) == list(PARTS)
        for part, state in o["parts"].items():
            assert state["state"] in MEANINGS
            assert (state["state"] == "none") == (part in OPS[name].lacks)
            assert state["detail"]
            assert (state["state"] == "missing") == bool(state["fix"])
    lines = run("list", "ops").stdout.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line and line.split()[0] in PARTS}
    assert set(rows) == set(PARTS)
    assert "onnx27 of rwkv7: no update rule of the standard LinearAttention has a removal key apart from the write key" in "\n".join(
        line.replace("normalized_linear_attention, ", "") for line in lines
    )


def test_doctor_names_versions_and_capabilities(run):
    result = run("doctor", "--format", "json")
    assert result.exit_code == 0
    value = json.loads(result.stdout)
    import torch

    assert value["facts"]["torch"] == torch.__version__
    assert {c["name"] for c in value["targets"]["onnxruntime"]} >= {"lower", "verify"}
    text = run("doctor").stdout
    assert "onnxruntime" in text
    assert "memory" in text


def test_doctor_ends_with_5_when_nothing_can_be_lowered(run, monkeypatch):
    from isthmus.exporter.target import Capability

    missing = [Capability("lower", available=False, detail="no SDK", fix="pip install sdk")]
    for name in TARGETS:
        monkeypatch.setattr(TARGETS[name], "capabilities", lambda _: missing)
    result = run("doctor")
    assert result.exit_code == 5
    assert "fix: pip install sdk" in result.stdout
    assert "no target can lower" in result.stderr
    assert json.loads(run("doctor", "--format", "json").stdout)["exit_code"] == 5


# export


@pytest.fixture
def exported(monkeypatch):
    """Replaces `pipeline.export`, and collects what it is called with."""
    calls = []

    def export(**arguments):
        calls.append(arguments)
        return SimpleNamespace(exit_code=0, summary=lambda: {"bundle": None, "exit_code": 0})

    monkeypatch.setattr("isthmus.pipeline.export", export)
    return calls


def test_every_option_reaches_the_pipeline(run, exported, tmp_path):
    weights, table = tmp_path / "w.safetensors", tmp_path / "table.json"
    weights.touch()
    table.touch()
    call = "export dit-tiny --target onnxruntime --precision fp16 --opset 23 --batch-size 4 --set depth=3 --set hidden_size=64"
    call += f" --weights {weights} --dynamic x:0=1,2,8 --dynamic t:0=1,2,8 --atol 1e-4 --rtol 1e-3 --min-psnr 60 --seed 7 --force"
    call += f" --calibration-data {tmp_path} --calibration-size 16 --calibration-method mse --calibration-preprocess input=x --sampler loop"
    call += f" --weight-rounding gptq --weight-scales mse --smooth 0.5 --calibration-table {table}"
    result = run(*call.split(), "-o", tmp_path / "out", "--threads", "2", "--format", "json")
    assert result.exit_code == 0, result.stderr
    (arguments,) = exported
    assert arguments.pop("progress") is not None
    dynamic = arguments.pop("dynamic")
    assert [(d.input, d.axis, d.range.min, d.range.opt, d.range.max) for d in dynamic] == [("x", 0, 1, 2, 8), ("t", 0, 1, 2, 8)]
    assert arguments == {
        "model": "dit-tiny", "target": "onnxruntime", "precision": "fp16", "opset": 23, "batch_size": 4, "inputs": None,
        "settings": {"depth": 3, "hidden_size": 64}, "weights": weights, "atol": 1e-4, "rtol": 1e-3, "min_psnr": 60.0, "seed": 7,
        "force": True, "dry_run": False, "output": tmp_path / "out", "options": {"threads": "2"},
        "calibration_data": str(tmp_path), "calibration_size": 16, "calibration_method": "mse", "calibration_preprocess": "input=x",
        "weight_rounding": "gptq", "weight_scales": "mse", "smooth": 0.5, "calibration_table": table,
        "sampler": "loop",
    }  # fmt: skip


def test_the_calibration_table_is_the_file_that_is_named(run, tmp_path):
    call = ("export", "dit-tiny", "--target", "onnxruntime", "--precision", "int8", "-o", tmp_path / "out", "--calibration-table")
    result = run(*call, tmp_path / "none.json")
    assert result.exit_code == 1
    assert f"{tmp_path / 'none.json'} cannot be read: No such file" in result.stderr
    (tmp_path / "empty.json").write_text("{}")
    result = run(*call, tmp_path / "empty.json")
    assert result.exit_code == 1
    assert f"{tmp_path / 'empty.json'} is no calibration table" in result.stderr
    assert not (tmp_path / "out").exists()


def test_calibration_on_random_data_is_asked_for_in_that_word(run, exported):
    call = ("export", "dit-tiny", "--target", "onnxruntime", "--dry-run", "--format", "json")
    assert run(*call, "--calibration-data", "random").exit_code == 0
    assert exported[0]["calibration_data"] == "random"
    result = run(*call, "--calibration-data", "Random")
    assert result.exit_code == 2
    assert "--calibration-data: Random does not exist" in result.stderr
    assert "or the word `random`" in result.stderr
    assert run(*call, "--calibration-size", "0").exit_code == 2


def test_config_gives_defaults_and_the_command_line_wins(run, exported, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("""
        model: dit-tiny
        target: onnxruntime
        output: here
        seed: 3
        atol: 1e-4
        force: true
        threads: 2
        set: {depth: 3, hidden_size: 64}
        dynamic: ["x:0=1,2,8"]
    """)
    result = run("export", "--config", config, "--seed", "5", "--set", "depth=4", "--dry-run", "--format", "json")
    assert result.exit_code == 0, result.stderr
    (arguments,) = exported
    assert arguments["model"] == "dit-tiny"
    assert arguments["output"] == Path("here")
    assert arguments["seed"] == 5
    assert arguments["atol"] == 1e-4
    assert arguments["force"] is True
    assert arguments["settings"] == {"depth": 4, "hidden_size": 64}
    assert arguments["options"] == {"threads": "2"}
    assert len(arguments["dynamic"]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sead: 1", "unknown key of the --config file 'sead' (fix: did you mean seed"),
        ("batch_size: 1", "did you mean batch-size"),
        ("config: other.yaml", "unknown key of the --config file 'config'"),
        ("opset: 20.5", "--opset in the --config file: got '20.5', expected a number"),
        ("opset: true", "--opset in the --config file: got 'True'"),
        ("force: maybe", "--force in the --config file: 'maybe' is not a valid boolean"),
        ("seed: [1, 2]", "seed in the --config file: got a list, expected one value"),
        ("set: depth=2", "set in the --config file: got a str, expected keys and values"),
        ("set: {depth: two}", "--set depth: got 'two', expected int"),
        ("set: {depth: true}", "--set depth: got True, expected int"),
        ("seed: 1\nseed: 2", "the key 'seed' is there twice"),
        ("set: &a {depth: 1}\nx: *a", "aliases are not read"),
        ("- a\n- b", "holds a list, expected keys and values"),
        ("a: [", "--config:"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor for the tag"),
        ("[" * 20000, "nested too deep"),
    ],
)
def test_bad_config(run, tmp_path, text, message):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    result = run("export", "dit-tiny", "--target", "onnxruntime", "--precision", "fp1", "--config", config)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_config_that_is_missing_or_too_large(run, tmp_path):
    result = run("export", "--config", tmp_path / "none.yaml")
    assert (result.exit_code, "cannot read" in result.stderr) == (2, True)
    large = tmp_path / "large.yaml"
    large.write_text("a: 1\n" * 2**18)
    result = run("export", "--config", large)
    assert (result.exit_code, "is larger than" in result.stderr) == (2, True)


def test_all_problems_are_reported_at_once(run):
    call = "export dit-tinny --target onnxruntme --batch-size 0 --seed -1 --atol nan --dynamic x=1 --dynamic x:0=3,2,1 --set depth"
    result = run(*call.split(), "--weights", "nowhere")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0] == "error: the call has 9 problems"
    for text in ("dit-tiny", "onnxruntime", "--batch-size", "--seed", "--atol", "x=1", "min <= opt <= max", "key=value", "nowhere"):
        assert text in result.stderr


def test_json_errors_are_one_object(run):
    result = run("export", "dit-tinny", "--target", "onnxruntime", "--format", "json")
    assert result.exit_code == 2
    value = json.loads(result.stdout)
    assert value["exit_code"] == 2
    assert value["error"]["type"] == "UnknownNameError"
    assert "did you mean dit-tiny" in value["error"]["hint"]
    value = json.loads(run("export", "--format=json", "--nope").stdout)
    assert "--nope" in value["error"]["message"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnsupportedError("no", reasons=[Reason("a", where="blocks.0"), Reason("b")], hint="do"), 4),
        (MachineError("no", hint="do"), 5),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 1),
        (OSError(5, "Input/output error", "file"), 1),
        (RuntimeError("surprise\nsecond line"), 1),
    ],
)
def test_errors_become_messages_and_exit_codes(run, monkeypatch, tmp_path, error, code):
    def export(**arguments):
        raise error

    monkeypatch.setattr("isthmus.pipeline.export", export)
    call = ("export", "dit-tiny", "--target", "onnxruntime", "-o", tmp_path / "o")
    result = run(*call)
    assert result.exit_code == code
    assert result.stderr.lstrip().startswith("error: ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for reason in getattr(error, "reasons", ()):
        assert str(reason) in result.stderr
    value = json.loads(run(*call, "--format", "json").stdout)
    assert value["exit_code"] == code
    assert "Traceback" in run(*call, "--log-level", "debug").stderr


def test_an_unexpected_error_is_called_a_bug(run, monkeypatch, tmp_path):
    def export(**arguments):
        raise RuntimeError("surprise")

    monkeypatch.setattr("isthmus.pipeline.export", export)
    result = run("export", "dit-tiny", "--target", "onnxruntime", "-o", tmp_path / "o")
    assert result.stderr.splitlines() == [
        "error: RuntimeError: surprise",
        "hint: this is a bug: re-run with --log-level debug, and report what it prints",
    ]


def test_export_prints_stages_and_paths(run, tmp_path):
    folder = tmp_path / "out"
    result = run("export", "dit-tiny", "--target", "onnxruntime", "-o", folder)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "dit-tiny for onnxruntime in fp32: verified"
    assert any(line.split()[:2] == ["onnx", "verified"] and "PSNR" in line for line in lines)
    assert lines[-2:] == [f"bundle: {folder}", f"report: {folder / 'report.html'}"]
    assert "tracing" in result.stderr
    assert "Traceback" not in result.stderr


def test_export_as_json_prints_one_object(child, tmp_path):
    result = child("export", "dit-tiny", "--target", "onnxruntime", "--format", "json")
    assert result.returncode == 0, result.stderr
    value = json.loads(result.stdout)
    assert value["verdict"] == "verified"
    assert value["bundle"] == "dit-tiny-onnxruntime-fp32"
    assert (tmp_path / "dit-tiny-onnxruntime-fp32" / "manifest.json").is_file()
    # Progress is all that stderr has: the libraries' warnings are kept off it.
    assert all(line.endswith(" s)") for line in result.stderr.splitlines()), result.stderr


def test_dry_run_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("export", "dit-tiny", "--target", "onnxruntime", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "nothing was written" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_log_level_error_hides_the_progress(run, tmp_path):
    result = run("export", "dit-tiny", "--target", "onnxruntime", "-o", tmp_path / "o", "--log-level", "error")
    assert result.exit_code == 0
    assert result.stderr == ""


def test_verify_inspect_and_report(run, bundle):
    result = run("verify", bundle)
    assert result.exit_code == 0, result.stderr
    assert "verified" in result.stdout
    assert json.loads(run("verify", bundle, "--format", "json").stdout)["exit_code"] == 0
    value = json.loads(run("inspect", bundle, "--format", "json").stdout)
    assert (value["model"], value["target"], value["precision"]) == ("dit-tiny", "onnxruntime", "fp32")
    assert "model: dit-tiny" in run("inspect", bundle).stdout
    result = run("report", bundle)
    assert Path(result.stdout.strip()) == bundle / "report.html"


def test_accuracy_error_of_verify_prints_the_stages(run, bundle, monkeypatch):
    from isthmus import pipeline

    missed = SimpleNamespace(
        bundle=bundle, verdict="failed", stages=pipeline.bundles.read_manifest(bundle).stages, summary=lambda: {"verdict": "failed"}
    )

    def verify(path, *, trust, progress):
        raise AccuracyError("not within its tolerance", result=missed)

    monkeypatch.setattr("isthmus.pipeline.verify", verify)
    result = run("verify", bundle)
    assert result.exit_code == 3
    assert "failed" in result.stdout
    value = json.loads(run("verify", bundle, "--format", "json").stdout)
    assert (value["verdict"], value["exit_code"], value["error"]["type"]) == ("failed", 3, "AccuracyError")


def test_a_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        result = subprocess.run(
            [sys.executable, "-m", "isthmus.cli", "list"], stdout=closed, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert result.stderr == ""
    assert result.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_a_full_stdout_is_an_error():
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [sys.executable, "-m", "isthmus.cli", "list"], stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert result.returncode == 1
    assert result.stderr.splitlines()[0].startswith("error: No space left")
    assert "Traceback" not in result.stderr
