"""Searches on models with trained weights: an export keeps the budget that its recipe was found for, and `kill -9` costs no result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

pytestmark = [pytest.mark.matrix, pytest.mark.full]

# One way to find ranges and weights, and few inputs: what is looked at here is not how good a recipe is.
QUICK = ("--calibration-method", "max", "--weight-rounding", "nearest", "--held-out", "4")


@pytest.mark.parametrize(
    ("model", "precision", "target", "budget"),
    [
        ("dit-digits", "int8", "onnxruntime", 39.0),
        ("sana-digits", "fp8", "tensorrt", 30.0),
        ("diffussm-digits", "int8", "onnxruntime", 35.0),
    ],
)
def test_the_export_of_a_recipe_keeps_its_budget(run, tmp_path, model, precision, target, budget):
    recipe, bundle = tmp_path / "r.yaml", tmp_path / "bundle"
    result = run("tune", model, "--precision", precision, "--min-sqnr", budget, *QUICK, "-o", recipe, "--format", "json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["chosen"]["sqnr_db"] >= budget
    made = run("export", model, "--target", target, "--recipe", recipe, "-o", bundle)
    assert made.exit_code == 0, made.stderr
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["options"]["recipe"] == json.loads((tmp_path / "r.pareto.json").read_text())["recipe"]
    stages = {stage["name"]: stage for stage in manifest["stages"]}
    executed = [stage for stage in stages.values() if stage["metrics"]]
    assert {stage["verdict"] for stage in executed} == {"verified"}
    quantised = stages["quantized"] if "quantized" in stages else executed[-1]
    measured = {m["case"]: m["sqnr_db"] for m in quantised["metrics"]}
    print(f"{model}: budget {budget} dB, search {found['chosen']['sqnr_db']:.2f} dB, artifact {measured}")
    assert min(measured.values()) >= budget - 0.5


KILLED = """
import os, signal
from pathlib import Path
import isthmus.tuning
from isthmus.cli import main
write = isthmus.tuning.write_whole
def written(path, *arguments, **options):
    if Path(path).suffix == ".yaml":
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, *arguments, **options)
isthmus.tuning.write_whole = written
main()
"""
"""The command line, in a process that is killed when the points are written and the recipe is not."""


def test_a_search_for_pictures_that_is_killed_three_times_ends_with_the_same_bytes(run, tmp_path):
    asked = ("tune", "dit-digits", "--precision", "fp8", "--min-psnr", "44", *QUICK)
    once, output = tmp_path / "once", tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    journal = output / "r.journal.jsonl"

    def killed(until, *python):
        command = [sys.executable, *python, *asked, "-o", str(output / "r.yaml")]
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline:
            if until and journal.exists() and journal.read_bytes().count(b"\n") >= until:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, errors
        assert not (output / "r.yaml").exists()
        return journal.read_bytes().count(b"\n")

    result = run(*asked, "-o", once / "r.yaml", "--format", "json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    modules = json.loads((once / "r.pareto.json").read_text())["modules"]
    assert all(m["psnr_db"] is not None for m in modules)
    count = len(modules)
    # While modules are measured alone, while pictures are drawn with each, and with the points written and the recipe not.
    assert 10 <= killed(10, "-m", "isthmus.cli") < 1 + count
    assert count + 20 <= killed(count + 20, "-m", "isthmus.cli") < 2 * count
    assert not (output / "r.pareto.json").exists()
    assert killed(None, "-c", KILLED) == found["trials"]
    assert (output / "r.pareto.json").exists()
    again = run(*asked, "-o", output / "r.yaml", "--format", "json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["known"] == json.loads(again.stdout)["trials"] == found["trials"]
    for name in ("r.yaml", "r.pareto.json"):
        assert (output / name).read_bytes() == (once / name).read_bytes()
