"""The command that makes a bundle again: it resolves to the same export, and hostile names stay words."""

import importlib.util
import json
import shlex
import typing
from pathlib import Path

import pytest
from pydantic import ValidationError

from isthmus.calibration.command import command_of
from isthmus.calibration.metrics import DEFAULT_TOLERANCES
from isthmus.exporter.manifest import WeightsInfo
from isthmus.exporter.target import TARGETS


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


samples = _load("report_samples")

PLAIN = {
    "model": "dit-tiny", "target": "onnxruntime", "precision": "fp32", "opset": 23, "sizes": {}, "options": {"seed": 0},
    "tolerance": {"max_relative": DEFAULT_TOLERANCES["fp32"].max_relative},
}  # fmt: skip


def words(**changes):
    return list(command_of(samples.manifest(**{**PLAIN, **changes})).words[2:])


def test_defaults_are_left_out():
    assert words() == ["dit-tiny", "--target", "onnxruntime", "--precision", "fp32", "--opset", "23"]


@pytest.mark.parametrize(
    ("changes", "added"),
    [
        ({"options": {"seed": 7}}, ["--seed", "7"]),
        ({"options": {"batch_size": 3}}, ["--batch-size", "3"]),
        ({"options": {"sampler": "loop"}}, ["--sampler", "loop"]),
        ({"options": {"weight_rounding": "gptq", "smooth": 0.5}}, ["--weight-rounding", "gptq", "--smooth", "0.5"]),
        ({"options": {"settings": {"depth": 3}}}, ["--set", "depth=3"]),
        ({"tolerance": {"atol": 1e-5, "rtol": 0.0}}, ["--atol", "1e-05", "--rtol", "0.0"]),
        ({"tolerance": {"max_relative": 1e-5, "min_psnr": 44.0}}, ["--min-psnr", "44.0"]),
        ({"options": {"dynamic": {"x:0": "batch", "t:0": "batch"}}, "sizes": {"batch": (1, 3, 5)}}, ["--dynamic", "x:0=1,3,5"]),
        ({"details": {"calibration": {"source": "trajectories", "size": 32, "method": "max"}}}, []),
        ({"details": {"calibration": {"source": "random", "size": 4, "method": "mse"}}},
         ["--calibration-method", "mse", "--calibration-data", "random", "--calibration-size", "4"]),
        ({"details": {"calibration": {"source": "photos", "size": 40}}}, ["--calibration-data", "photos"]),  # all that there are
        ({"details": {"calibration": {"source": "photos", "size": 32}},
          "options": {"calibration_size": 32, "calibration_preprocess": "input=x,crop=4"}},
         ["--calibration-data", "photos", "--calibration-size", "32", "--calibration-preprocess", "input=x,crop=4"]),
    ],
    ids=lambda value: next(iter(value), None) and str(next(iter(value))) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_not_a_default_is_given(changes, added):
    assert words(**changes)[7:] == added


def other_values(field):
    """Values of an option that are not its default, of the types that can be told from the annotation."""
    choices = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is typing.Literal else ()
    known = {bool: (True, False), int: (3, 64), str: ("a b",), tuple[str, ...]: (("blocks.*", "head"),)}
    return [v for v in (*choices, *known.get(field.annotation, ())) if v != field.get_default(call_default_factory=True)]


@pytest.mark.parametrize("target", list(TARGETS))
def test_every_option_of_every_target_is_read_back(target):
    """What the command gives, the target's schema reads as the value that the manifest holds; defaults are not given."""
    schema = TARGETS[target].Options
    defaults = schema().model_dump(mode="json")

    def flags(options):
        found = command_of(samples.manifest(**{**PLAIN, "target": target, "options": {target: options}, "tolerance": {}})).words[9:]
        return dict(zip(found[::2], found[1::2], strict=True))

    assert flags(defaults) == {}
    tried = 0
    for name, field in schema.model_fields.items():
        for value in other_values(field):
            try:
                made = schema.model_validate({name: value})
            except ValidationError:  # the schema allows not every value of the type
                continue
            ((flag, text),) = flags(made.model_dump(mode="json")).items()
            assert flag == f"--{name.replace('_', '-')}"
            assert schema.model_validate({name: text.split(",") if isinstance(value, tuple) else text}) == made
            tried += 1
    assert tried >= 2


def test_what_a_bundle_does_not_hold_is_said():
    file = command_of(samples.manifest(**PLAIN, weights=WeightsInfo(origin="file", path="my weights.safetensors", sha256="ab" * 32)))
    assert file.text.endswith("--weights 'my weights.safetensors'")
    assert "ab" * 32 in file.missing[0]
    mine = command_of(samples.manifest(**{**PLAIN, "model": "make_unet"}))
    assert mine.words[2] == "MODULE:make_unet"
    assert len(mine.missing) == 1
    data = command_of(samples.manifest(**PLAIN, details={"calibration": {"source": "photos", "size": 8, "sha256": "cd" * 32}}))
    assert "cd" * 32 in data.missing[0]
    assert command_of(samples.manifest(**PLAIN)).missing == ()


def test_words_are_quoted_for_a_shell():
    hostile = "x; rm -rf ~ $(id) `id` 'q' \"d\"\n"
    command = command_of(samples.manifest(**{**PLAIN, "model": hostile, "options": {"settings": {"name": hostile}}}))
    assert tuple(shlex.split(command.text)) == command.words
    assert f"MODULE:{hostile}" in command.words


@pytest.mark.parametrize(
    "arguments",
    [
        ("--target", "onnxruntime", "--set", "depth=1", "--dynamic", "x:0=1,2,9", "--seed", 5, "--atol", 0.01, "--min-psnr", 41),
        ("--target", "tensorrt", "--precision", "fp16", "--opset", 23, "--batch-size", 3, "--workspace", 64, "--set", "patch_size=4"),
    ],
    ids=["onnxruntime", "tensorrt"],
)
def test_the_command_resolves_to_the_same_export(run, arguments, monkeypatch):
    """Through the command line and a dry run, with and without the detour over the manifest."""
    from isthmus import pipeline

    found = []
    export = pipeline.export

    def seen(*args, **keywords):
        found.append(export(*args, **keywords))
        return found[-1]

    monkeypatch.setattr(pipeline, "export", seen)
    assert run("export", "dit-tiny", *arguments, "--dry-run").exit_code == 0
    words = command_of(found[0].manifest).words
    assert words[0] == "isthmus"
    result = run(*words[1:], "--dry-run", "--format", "json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["model"] == "dit-tiny"
    first, second = (json.loads(each.manifest.model_dump_json(exclude={"stages"})) for each in found)
    assert first == second
