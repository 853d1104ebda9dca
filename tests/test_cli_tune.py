"""`isthmus tune` and `isthmus export --recipe`: what they write and refuse, and that a search goes on after `kill -9`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import isthmus
from isthmus.calibration import perceptual
from isthmus.calibration.data import CalibrationData
from isthmus.calibration.recipe import read_recipe
from isthmus.exporter.errors import UsageError
from isthmus.tuning import _split

ROOT = Path(__file__).parent.parent

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.fc2(torch.relu(self.fc1(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(16, 32), nn.Linear(32, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

def make():
    torch.manual_seed(0)
    return Net().eval()

def inputs():
    torch.manual_seed(1)
    return (torch.randn(2, 24, 16),)
"""
ASKED = ("tuned_small:make", "--inputs", "tuned_small:inputs", "--calibration-data", "random", "--calibration-size", "4")
TUNE = ("tune", *ASKED, "--precision", "int8", "--min-sqnr", "42")


@pytest.fixture(autouse=True)
def one_thread():
    """These models are tiny: threads cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the model's module, from which it is imported."""
    folder = tmp_path_factory.mktemp("tune")
    (folder / "tuned_small.py").write_text(MODEL)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("tuned_small", None)


def test_a_call_with_many_faults_lists_them(run, tmp_path):
    (tmp_path / "there.yaml").touch()
    wrong = ("--precision", "fp4", "--opset", "3", "--address", "auto", "--jobs", "0", "--target", "coreml")
    result = run("tune", "dit-tinny", *wrong, "-o", tmp_path / "there.yaml")
    assert result.exit_code == 2
    for part in ("'fp4'", "dit-tinny", "exists", "--address is for", "--jobs", "budget of accuracy is missing", "does not take opset 3"):
        assert part in result.stderr
    result = run("tune", "dit-tiny", "--min-sqnr", "20", "--precision", "fp8", "--target", "onnxruntime", "-o", tmp_path / "r.yaml")
    assert result.exit_code == 2
    assert "onnxruntime cannot be told which modules compute in fp8" in result.stderr
    assert not (tmp_path / "r.journal.jsonl").exists()


def test_ray_is_asked_for_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run("tune", "dit-tiny", "--min-sqnr", "20", "--precision", "fp8", "--executor", "ray", "-o", tmp_path / "r.yaml")
    assert result.exit_code == 5
    assert "pip install ray" in result.stderr
    assert "building" not in result.stderr


def test_pictures_need_a_sampler(tmp_path):
    with pytest.raises(UsageError, match="draw pictures with trained weights"):
        isthmus.tune("dit-tiny", tmp_path / "r.yaml", precision="fp8", min_psnr=30.0, calibration_data="random")


def test_the_network_of_the_distance_is_asked_for_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual, "PACKAGE", "isthmus-no-such-package")
    perceptual.network.cache_clear()
    try:
        result = run("tune", "dit-tiny", "--max-lpips", "0.1", "--precision", "fp8", "-o", tmp_path / "r.yaml")
    finally:
        perceptual.network.cache_clear()
    assert result.exit_code == 5
    assert "isthmus-no-such-package is not installed" in result.stderr
    assert "pip install 'isthmus[perceptual]'" in result.stderr
    assert "building" not in result.stderr


def test_of_the_sets_that_are_given_every_fourth_is_held_out_or_as_many_as_asked_for():
    def sets(count):
        return CalibrationData("given", [{"x": np.array([i])} for i in range(count)])

    def split(data, held_out=None):
        return [[int(arrays["x"][0]) for arrays in part.sets] for part in _split(None, None, data, seed=0, size=None, held_out=held_out)]

    assert split(sets(9)) == [[0, 1, 2, 4, 5, 6, 8], [3, 7]]
    assert split(sets(2)) == [[0], [1]]
    one = sets(1)
    assert _split(None, None, one, seed=0, size=None, held_out=None) == (one, one)
    assert split(sets(9), 1) == [[0, 1, 2, 3, 4, 5, 6, 7], [8]]
    assert split(sets(9), 3) == [[0, 1, 3, 4, 6, 7], [2, 5, 8]]
    for count in range(2, 12):
        for held_out in range(1, count):
            kept, held = split(sets(count), held_out)
            assert len(held) == held_out
            assert sorted(kept + held) == list(range(count))
    for count in (1, 4):
        with pytest.raises(UsageError, match=f"--held-out: got 4, and given gives {count} set") as caught:
            split(sets(count), 4)
        assert "give more sets" in caught.value.hint


class Chosen(torch.nn.Module):
    def forward(self, x):
        return x.argmax(-1), x > 0


def test_outputs_of_whole_numbers_have_no_sqnr(tmp_path):
    with pytest.raises(UsageError, match="are all of other types") as caught:
        isthmus.tune((Chosen(), (torch.ones(2, 3),)), tmp_path / "r.yaml", precision="int8", min_sqnr=30.0, calibration_data="random")
    assert {(r.where, r.what) for r in caught.value.reasons} == {
        ("output_0", "has dtype int64 and shape (2,)"),
        ("output_1", "has dtype bool and shape (2, 3)"),
    }
    assert "before argmax" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.matrix
def test_a_recipe_that_is_found_exports(run, place, tmp_path):
    output = tmp_path / "recipe.yaml"
    result = run(*TUNE, "-o", output, "--format", "json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["chosen"]["sqnr_db"] >= 42
    assert 0 < found["chosen"]["flop_share"] < found["uniform"]["flop_share"] == 1
    assert found["warnings"]
    assert "trial " in result.stderr
    recipe = read_recipe(output)
    assert recipe.precision == "int8"
    assert recipe.low
    assert recipe.rest
    pareto = json.loads((tmp_path / "recipe.pareto.json").read_text())
    sqnrs = [point["sqnr_db"] for point in pareto["front"]]
    assert sqnrs == sorted(sqnrs, reverse=True)
    assert len(pareto["modules"]) == 8

    # The same again, from the journal; a lower bound runs few trials more.
    again = run(*TUNE, "-o", tmp_path / "recipe.yaml", "--force", "--format", "json")
    assert json.loads(again.stdout)["known"] == json.loads(again.stdout)["trials"] == found["trials"]

    bundle = tmp_path / "bundle"
    made = run("export", *ASKED, "--target", "onnxruntime", "--recipe", output, "-o", bundle)
    assert made.exit_code == 0, made.stderr
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["precision"] == "int8"
    assert manifest["options"]["recipe"] == recipe.sha256()
    assert manifest["options"]["weight_rounding"] == recipe.weight_rounding
    assert manifest["details"]["calibration"]["method"] == recipe.calibration_method
    assert {layer["module"] for layer in manifest["details"]["int8"]["layers"]} == set(pareto["chosen"]["modules"])
    assert {stage["verdict"] for stage in manifest["stages"]} == {"verified"}
    measured = [m["sqnr_db"] for s in manifest["stages"] for m in s["metrics"] if m["case"] == "example" and m["sqnr_db"] != "inf"]
    # The artifact on other inputs than the search's.
    assert min(measured) == pytest.approx(found["chosen"]["sqnr_db"], abs=1.5)

    refused = run("export", *ASKED, "--target", "onnxruntime", "--recipe", output, "--int8-exclude", "head", "--precision", "fp16", "-o",
                  tmp_path / "no")  # fmt: skip
    assert refused.exit_code == 2
    assert "--precision is 'fp16', and the recipe says 'int8'" in refused.stderr
    assert "--int8-exclude is head" in refused.stderr
    with pytest.raises(UsageError, match="contradict"):
        isthmus.export("tuned_small:make", "onnxruntime", tmp_path / "no", recipe=output, precision="fp16")
    other = run("export", *ASKED, "--target", "coreml", "--recipe", output, "-o", tmp_path / "no")
    assert other.exit_code == 2
    assert "cannot be told which modules" in other.stderr
    missing = run("export", "dit-tiny", "--target", "onnxruntime", "--recipe", tmp_path / "none.yaml")
    assert missing.exit_code == 2
    assert "cannot be read" in missing.stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.matrix
def test_a_killed_search_resumes_to_the_same_recipe(run, place, tmp_path):
    command = [sys.executable, "-m", "isthmus.cli", *TUNE, "--jobs", "2", "-o", tmp_path / "killed.yaml"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(place)])}
    journal = tmp_path / "killed.journal.jsonl"
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while (not journal.exists() or journal.read_bytes().count(b"\n") < 4) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL, errors
    assert not (tmp_path / "killed.yaml").exists()
    assert (tmp_path / f".killed.yaml.{process.pid}.trials").is_dir(), "the graph and its weights, for the next search to remove"
    whole = journal.read_bytes().count(b"\n")
    with journal.open("ab") as file:
        file.write(b'{"key": "torn')

    resumed = run(*TUNE, "-o", tmp_path / "killed.yaml", "--format", "json")
    assert resumed.exit_code == 0, resumed.stderr
    once = run(*TUNE, "-o", tmp_path / "once.yaml", "--format", "json")
    assert once.exit_code == 0, once.stderr
    assert json.loads(resumed.stdout)["known"] == whole >= 4
    assert json.loads(once.stdout)["known"] == 0
    assert not list(tmp_path.glob(".*"))
    assert (tmp_path / "killed.yaml").read_bytes() == (tmp_path / "once.yaml").read_bytes()
    assert (tmp_path / "killed.pareto.json").read_bytes() == (tmp_path / "once.pareto.json").read_bytes()


def test_a_budget_that_nothing_keeps(run, place, tmp_path):
    result = run(*TUNE[:-1], "300", "-o", tmp_path / "r.yaml")
    assert result.exit_code == 1
    assert "no module fits into the budget" in result.stderr
    assert not (tmp_path / "r.yaml").exists()
