"""What goes wrong gives one clear message with a fix and the right exit code, and leaves nothing that looks finished."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

EXPORT = ("export", "dit-tiny", "--target", "onnxruntime", "-o")


def _check(result: Result, code: int, *texts: str) -> None:
    """One error with these texts, on stderr alone, and no traceback."""
    assert result.exit_code == code, (result.stderr, result.exception)
    for text in texts:
        assert text in result.stderr
    assert "error: " in result.stderr
    assert "Traceback" not in result.stderr
    assert "this is a bug" not in result.stderr


# The call


def test_an_unknown_model_lists_near_names(run, tmp_path):
    result = run("export", "dit-s2", "--target", "onnxruntime", "-o", tmp_path / "o")
    _check(result, 2, "error: unknown model 'dit-s2'", "hint: did you mean dit-s-2")


def test_an_unknown_target_lists_near_names(run, tmp_path):
    _check(run("export", "dit-tiny", "--target", "onnx", "-o", tmp_path / "o"), 2, "unknown target 'onnx'", "did you mean onnxruntime?")


def test_a_wrong_setting(run, tmp_path):
    _check(run(*EXPORT, tmp_path / "o", "--set", "dept=2"), 2, "unknown setting of dit-tiny 'dept'", "did you mean depth?")
    _check(run(*EXPORT, tmp_path / "o", "--set", "depth=two"), 2, "--set depth: got 'two', expected int", "the default is depth=")


def test_settings_that_contradict_each_other(run, tmp_path):
    _check(run(*EXPORT, tmp_path / "o", "--set", "hidden_size=30", "--set", "num_heads=7"), 2, "contradict each other", "hint: ")


@pytest.mark.parametrize("model", ["a b:make", "module:", ":make", "1:2"])
def test_a_callable_that_is_no_name(run, tmp_path, model):
    _check(run("export", model, "--target", "onnxruntime", "-o", tmp_path / "o"), 2, "expected module:callable", "hint: ")


def test_a_callable_that_is_not_there(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "present_module.py").write_text("def make_unet(): ...\n")
    _check(run("export", "absent_module:make", "--target", "onnxruntime"), 2, "there is no Python module 'absent_module'", "hint: ")
    _check(run("export", "present_module:make_unnet", "--target", "onnxruntime"), 2, "has no 'make_unnet'", "did you mean make_unet?")


def test_inputs_without_a_callable_model(run, tmp_path):
    _check(run(*EXPORT, tmp_path / "o", "--inputs", "a:b"), 2, "--inputs is for a MODEL of the form module:callable")


def test_options_that_do_not_go_with_a_callable(run, tmp_path):
    result = run("export", "m:f", "--target", "onnxruntime", "-o", tmp_path / "o", "--set", "depth=2", "--batch-size", "2")
    _check(result, 2, "--set is for registered models", "--batch-size is for registered models")


def test_an_axis_that_cannot_vary(run, tmp_path):
    _check(run(*EXPORT, tmp_path / "o", "--dynamic", "x:1=1,2,4"), 2, "axis 1 of x cannot vary", "hint: the axes that can")


def test_a_provider_that_this_machine_lacks(run, tmp_path, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    _check(run(*EXPORT, tmp_path / "o", "--execution-provider", "cuda"), 5, "CUDA", "hint: ")
    assert not (tmp_path / "o").exists()


# The output


def test_an_existing_output_needs_force(run, bundle):
    before = (bundle / "manifest.json").read_bytes()
    _check(run(*EXPORT, bundle), 2, f"the output {bundle} exists", "hint: give --force")
    assert (bundle / "manifest.json").read_bytes() == before
    result = run(*EXPORT, bundle, "--force")
    assert result.exit_code == 0, result.stderr


def test_force_does_not_remove_what_is_not_a_bundle(run, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.tex").touch()
    _check(run(*EXPORT, tmp_path / "o", "--force"), 2, "is not a bundle, so --force does not replace it", "hint: ")
    assert (tmp_path / "o" / "thesis.tex").is_file()


@pytest.mark.parametrize("parent", ["/proc", "file"])
def test_an_output_that_cannot_be_written(run, tmp_path, parent):
    (tmp_path / "file").touch()
    _check(run(*EXPORT, tmp_path / parent / "o"), 1, "cannot write into", "hint: give a folder that you can write")


def test_a_disk_without_room_is_refused_before_writing(run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=2**20))
    _check(run(*EXPORT, tmp_path / "o"), 1, "has 1 MiB free", "hint: free some space")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up(run, tmp_path, monkeypatch):
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("isthmus.exporter.bundle.write_cases", write)
    _check(run(*EXPORT, tmp_path / "o"), 1, "cannot write the bundle into", "No space left on device", "hint: free some space")
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_grow(child, tmp_path):
    """A limit on the size of files makes the real writes fail, inside whatever library makes them."""
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); from isthmus.cli import main; main()"
    result = child(*EXPORT, tmp_path / "o", code=code)
    assert result.returncode == 1, result.stderr
    assert "error: cannot write the bundle into" in result.stderr
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


# Interruption

# The export stops where everything but the manifest is written, tells, and waits to be ended.
PAUSED = """
import sys, time
from isthmus.exporter import bundle
def pause(folder, manifest):
    print("PAUSED", flush=True)
    time.sleep(120)
bundle.write_manifest = pause
from isthmus.cli import main
main()
"""


def _paused(tmp_path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PAUSED, *EXPORT, str(tmp_path / "o")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == "PAUSED\n", process.communicate()
    assert [p.name for p in tmp_path.iterdir()] == [f".o.{process.pid}.partial"]
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_export_leaves_nothing(tmp_path, number, code):
    process = _paused(tmp_path)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in stderr
    if number == signal.SIGINT:
        assert "error: interrupted" in stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_torch_works_ends_with_130(tmp_path):
    """At no chosen moment: while the libraries are imported, or while torch traces."""
    for seconds in (0.7, 3.0):
        process = subprocess.Popen(
            [sys.executable, "-m", "isthmus.cli", *EXPORT, str(tmp_path / "o")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 130, (seconds, stderr)
        assert "Traceback" not in stderr
        assert list(tmp_path.iterdir()) == []


def test_an_interrupt_that_passed_through_exec_ends_with_130(child, tmp_path):
    """Python by itself would end with the signal: see `_end_interrupted`."""
    code = "from isthmus import cli, pipeline; pipeline.export = lambda **_: exec('raise KeyboardInterrupt'); cli.main()"
    result = child(*EXPORT, tmp_path / "o", code=code)
    assert (result.returncode, result.stderr) == (130, "error: interrupted; nothing that looks finished is left\n")


def test_a_killed_export_leaves_nothing_that_looks_finished(run, tmp_path):
    process = _paused(tmp_path)
    process.kill()
    process.communicate()
    assert [p.name for p in tmp_path.iterdir()] == [f".o.{process.pid}.partial"]
    assert not list(tmp_path.rglob("manifest.json"))
    result = run(*EXPORT, tmp_path / "o")
    assert result.exit_code == 0, result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["o"]
    assert run("verify", tmp_path / "o").exit_code == 0


# Weights


@pytest.fixture
def state():
    """The weights of dit-tiny, and a way to write them."""
    import torch

    from isthmus.exporter.spec import MODELS

    torch.manual_seed(0)
    return {key: value.clone() for key, value in MODELS["dit-tiny"].spec().build().state_dict().items()}


def _save(state, path: Path) -> Path:
    from safetensors.torch import save_file

    save_file(state, path)
    return path


def test_weights_of_the_model_are_taken(run, tmp_path, state):
    result = run(*EXPORT, tmp_path / "o", "--weights", _save(state, tmp_path / "w.safetensors"))
    assert result.exit_code == 0, result.stderr
    weights = json.loads((tmp_path / "o" / "manifest.json").read_text())["weights"]
    assert (weights["origin"], weights["path"]) == ("file", "w.safetensors")


def test_keys_that_do_not_fit_are_all_listed_with_their_shapes(run, tmp_path, state):
    import torch

    first, second, *_ = [key for key, value in state.items() if value.ndim == 2]
    missing = state.pop(first)
    shape = tuple(state[second].shape)
    state[second] = torch.zeros(3, 5)
    state["surplus.weight"] = torch.zeros(7)
    result = run(*EXPORT, tmp_path / "o", "--weights", _save(state, tmp_path / "w.safetensors"))
    _check(result, 1, first, second, "surplus.weight", "(3, 5)", "(7,)", "hint: ")
    for size in (tuple(missing.shape), shape):
        assert str(size) in result.stderr
    assert not (tmp_path / "o").exists()


def test_missing_weights_file(run, tmp_path):
    _check(run(*EXPORT, tmp_path / "o", "--weights", tmp_path / "w.safetensors"), 2, "w.safetensors does not exist")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors(run, tmp_path, state, keep):
    path = _save(state, tmp_path / "w.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    _check(run(*EXPORT, tmp_path / "o", "--weights", path), 1, str(path), "hint: ")


def test_a_header_that_promises_too_much(run, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    _check(run(*EXPORT, tmp_path / "o", "--weights", path), 1, str(path), "hint: ")


class _Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth", ".ckpt", ".PT"])
def test_a_pickle_is_refused_by_its_name(run, tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(pickle.dumps(_Bomb()))
    _check(run(*EXPORT, tmp_path / "o", "--weights", path), 1, "is a pickle", "can run any code", "hint: convert it")


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_with_another_name_is_refused_by_its_bytes(run, tmp_path, monkeypatch, form, state):
    import torch

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.safetensors"
    if form == "pickle":
        path.write_bytes(pickle.dumps(_Bomb()))
    else:
        torch.save(state, path)
    _check(run(*EXPORT, tmp_path / "o", "--weights", path), 1, "pickle", "hint: ")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(run, tmp_path, state, value):
    key = next(key for key, tensor in state.items() if tensor.ndim == 2)
    state[key][1, 2] = value
    result = run(*EXPORT, tmp_path / "o", "--weights", _save(state, tmp_path / "w.safetensors"))
    _check(result, 1, "finite", key, "hint: ")
    assert re.search("nan" if value != value else "inf", result.stderr, re.IGNORECASE)
    assert not (tmp_path / "o").exists()


# The model and its accuracy


def _module_file(folder: Path, name: str, forward: str) -> str:
    (folder / f"{name}.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = torch.nn.Linear(4, 4)\n"
        f"    def forward(self, x):\n{forward}\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return Net(), (torch.ones(2, 4),)\n"
    )
    return f"{name}:make"


def test_a_module_of_the_user_is_exported(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = _module_file(tmp_path, "fine_module", "        return self.inner(x).relu()")
    result = run("export", model, "--target", "onnxruntime", "--dynamic", "x:0=1,2,8")
    assert result.exit_code == 0, result.stderr
    manifest = json.loads((tmp_path / "make-onnxruntime-fp32" / "manifest.json").read_text())
    assert manifest["verdict"] == "verified"
    assert list(manifest["sizes"].values()) == [[1, 2, 8]]


def test_a_module_that_cannot_be_captured_is_unsupported(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forward = "        if self.inner(x).sum().item() > 0:\n            return x * 2\n        return x - x.numpy().sum()"
    result = run("export", _module_file(tmp_path, "wild_module", forward), "--target", "onnxruntime", "-o", "o")
    _check(result, 4, "torch.export does not capture Net", "wild_module.py", "hint: ")
    assert not (tmp_path / "o").exists()


def test_a_module_that_returns_no_tensor_is_unsupported(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("export", _module_file(tmp_path, "number_module", "        return float(x.sum())"), "--target", "onnxruntime", "-o", "o")
    _check(result, 4, "gives no tensor, got float", "hint: wrap")
    assert not (tmp_path / "o").exists()


def test_a_module_that_fails_by_itself(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_module.py").write_text("import does_not_exist_anywhere\n")
    result = run("export", "broken_module:make", "--target", "onnxruntime", "-o", "o")
    _check(result, 1, "importing broken_module failed", "does_not_exist_anywhere", "hint: install")


def test_weights_of_a_users_module_that_are_not_finite(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = _module_file(tmp_path, "nan_module", "        return self.inner(x)")
    path = tmp_path / "nan_module.py"
    gain = "        self.gain = torch.nn.Parameter(torch.tensor([float('nan')]))\n"
    path.write_text(path.read_text().replace("        self.inner =", f"{gain}        self.inner ="))
    _check(run("export", model, "--target", "onnxruntime", "-o", "o"), 1, "not finite", "gain", "hint: ")


def test_an_accuracy_miss_writes_the_bundle_and_ends_with_3(run, tmp_path):
    result = run(*EXPORT, tmp_path / "o", "--atol", "1e-30", "--rtol", "0")
    _check(result, 3, "accuracy check failed", "stage onnx failed", "hint: see ")
    assert "failed" in result.stdout
    assert (tmp_path / "o" / "report.html").is_file()
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text())
    assert manifest["verdict"] == "failed"
    again = run("verify", tmp_path / "o")
    _check(again, 3, "not within its tolerance")
    value = json.loads(run(*EXPORT, tmp_path / "p", "--min-psnr", "1000", "--format", "json").stdout)
    assert (value["exit_code"], value["verdict"], value["bundle"]) == (3, "failed", str(tmp_path / "p"))


# Bundles


def test_one_changed_byte_is_found_in_every_file(run, bundle):
    for path in sorted(p for p in bundle.rglob("*") if p.is_file() and p.name != "manifest.json" and p.stat().st_size):
        good = path.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 1
        path.write_bytes(bad)
        _check(run("verify", bundle), 1, "is not what its manifest says", path.relative_to(bundle).as_posix(), "hint: ")
        path.write_bytes(good)
    result = run("verify", bundle)
    assert result.exit_code == 0, result.stderr


def test_a_manifest_with_a_path_out_of_the_bundle(run, bundle):
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../../outside"] = "0" * 64
    path.write_text(json.dumps(manifest))
    _check(run("verify", bundle), 1, "../../outside", "the path leads out of the bundle")


def test_a_manifest_of_another_version(run, bundle):
    path = bundle / "manifest.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 7', 1))
    for command in ("verify", "inspect", "report"):
        _check(run(command, bundle), 1, "schema 7, expected 1", "hint: export again")


@pytest.mark.parametrize("command", ["verify", "inspect", "report"])
def test_a_folder_that_is_no_bundle(run, tmp_path, command):
    _check(run(command, tmp_path), 2, "is not a bundle", "hint: ")
    _check(run(command, tmp_path / "nowhere"), 2, "is not a bundle", "hint: ")


def test_reference_tensors_that_are_pickles(run, bundle, monkeypatch):
    """Even with a manifest that vouches for them."""
    import hashlib

    monkeypatch.chdir(bundle.parent)
    path = bundle / "reference" / "inputs.npz"
    np.savez(path, **{"example/x": np.array([_Bomb()], dtype=object)})
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["reference/inputs.npz"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    _check(run("verify", bundle), 1, "inputs.npz cannot be read as tensors", "hint: ")
    assert not (bundle.parent / "exploded").exists()


def test_an_interrupt_while_torch_is_imported_ends_at_once(child):
    """torch 2.13 aborts the process when an exception passes through the C++ of its import."""
    code = """
import signal, sys, types
from isthmus.process import _interrupt
torch = types.ModuleType("torch")
torch.__spec__ = types.SimpleNamespace(_initializing=True)
sys.modules["torch"] = torch
_interrupt(signal.SIGINT, None, as_json=False)
"""
    result = child(code=code)
    assert (result.returncode, result.stderr) == (130, "error: interrupted; nothing that looks finished is left\n")
