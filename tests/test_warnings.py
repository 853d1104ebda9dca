"""What an export warns of, in its result, its report and on the command line."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import isthmus
from isthmus.calibrating import RANDOM_WARNING
from isthmus.exporter.target import TARGETS

PRECISIONS = [
    (name, precision) for name in TARGETS for precision in (*TARGETS[name].calibrated, *TARGETS[name].rounded) if TARGETS[name].opsets
]
"""Of targets that are lowered from an ONNX graph, those that quantise."""


def small():
    """Two layers, the first and the last, which every precision leaves, and their input."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)), (torch.randn(2, 64),)


@pytest.mark.parametrize(("target", "precision"), PRECISIONS)
def test_a_model_of_which_nothing_is_quantised(target, precision, tmp_path):
    calibrated = precision in TARGETS[target].calibrated
    data = {"calibration_data": "random", "calibration_size": 2} if calibrated else {}
    result = isthmus.export(small(), target, tmp_path / "none", precision=precision, dry_run=True, **data)
    assert len(result.warnings) == 1 + calibrated
    assert f"No layer is in {precision}" in result.warnings[-1]
    assert f"--{precision}-include '*'" in result.warnings[-1]

    everything = {f"{precision}_include": ("*",)}
    result = isthmus.export(small(), target, tmp_path / "all", precision=precision, dry_run=True, options=everything, **data)
    assert result.warnings == (RANDOM_WARNING,) * calibrated


def test_warnings_are_printed_and_reported(tmp_path, run, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "nets.py").write_text(
        "import torch\n\n\ndef small():\n    first, last = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)\n"
        "    return torch.nn.Sequential(first, last), (torch.ones(2, 64),)\n"
    )
    arguments = ("export", "nets:small", "--target", "onnxruntime", "--precision", "int4", "-o", tmp_path / "bundle")
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr
    assert "warning: No layer is in int4" in done.stdout
    found = json.loads(run(*arguments, "--force", "--format", "json").stdout)["warnings"]
    report = json.loads((tmp_path / "bundle" / "report.json").read_text())
    assert found == report["warnings"]
    assert len(found) == 1
    excluded = next(table["rows"] for table in report["tables"] if table["name"] == "int4-excluded")
    assert [row[-1] for row in excluded] == ["first layer", "last layer"]
