"""Wherever the Python API takes a path, a string will do."""

from __future__ import annotations

import pytest
from safetensors.torch import save_file

import isthmus
from isthmus.exporter.errors import IsthmusError
from isthmus.exporter.paths import StrPath
from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights


def test_strings_are_paths(tmp_path):
    def at(name: str) -> StrPath:
        return str(tmp_path / name)

    save_file(random_weights(MODELS["dit-tiny"].spec({}), 3).state_dict(), at("weights.safetensors"))
    weights = {"weights": at("weights.safetensors")}
    quick = {"calibration_method": "max", "weight_rounding": "nearest"}
    data = {"calibration_data": "random", "calibration_size": 2}
    assert isthmus.calibrate("dit-tiny", at("table.json"), **weights, **data).path == tmp_path / "table.json"
    tuned = isthmus.tune("dit-tiny", at("recipe.yaml"), precision="int8", min_sqnr=5, held_out=2, **quick, **weights, **data)
    assert tuned.path == tmp_path / "recipe.yaml"

    plain = isthmus.export("dit-tiny", "onnxruntime", at("plain"), **weights)
    assert plain.bundle == tmp_path / "plain"
    table = isthmus.export("dit-tiny", "onnxruntime", precision="int8", calibration_table=at("table.json"), dry_run=True, **weights)
    assert table.manifest.precision == "int8"
    recipe = isthmus.export("dit-tiny", "onnxruntime", at("quantised"), recipe=at("recipe.yaml"), **weights, **data)
    assert recipe.manifest.precision == "int8"

    assert isthmus.verify(at("plain")).verdict == "verified"
    assert isthmus.inspect(at("plain"))["model"] == "dit-tiny"
    assert isthmus.report(at("quantised"), tune=at("recipe.pareto.json")) == tmp_path / "quantised" / "report.html"
    assert isthmus.analyse(at("plain"), ["all"], rows=4, **weights).bundle == tmp_path / "plain"
    assert isthmus.bisect(at("plain"), **weights).bundle == tmp_path / "plain"
    assert isthmus.diff(at("plain"), at("quantised"), **weights).a == tmp_path / "plain"
    compared = isthmus.compare_reports(at("plain"), at("quantised"), output=at("page.html"))
    assert compared.b.folder == tmp_path / "quantised"
    assert (tmp_path / "page.html").is_file()
    for refused in (isthmus.build, lambda bundle: isthmus.embed(bundle, "swift", at("swift"))):
        with pytest.raises(IsthmusError, match="onnxruntime"):
            refused(at("plain"))
