"""What the rules of ML Programs read: packages and bundles on disk, the modules noted in them, and values observed in the interpreter."""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from isthmus.exporter.bundle import INPUTS, write_cases, write_manifest
from isthmus.exporter.errors import IntegrityError, IsthmusError, MachineError, UnknownNameError, UsageError
from isthmus.exporter.lint import lint
from isthmus.exporter.manifest import Manifest, StageResult, WeightsInfo
from isthmus.exporter.quiet import quiet
from isthmus.targets.coreml import chunks
from isthmus.targets.coreml.convert import converted
from isthmus.targets.coreml.modules import KEY, read_modules
from isthmus.targets.coreml.package import save
from isthmus.targets.coreml.rules.program import Package, ProgramSubject, observed_peaks, packages_of, read_program
from isthmus.targets.coreml.session import Interface


def _load(name):
    spec = importlib.util.spec_from_file_location(f"coreml_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


programs = _load("lint_fixtures")
SRC = str(Path(__file__).parents[3] / "src")
SHAPE = (1, 32, 1, 64)
AS_IT_IS = Interface(inputs={}, outputs={})
"""A package whose names are PyTorch's."""


class Net(nn.Module):
    """Two convolutions that only change a sign, and between them a factor."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.first = nn.Conv2d(32, 32, 1, bias=False)
        self.blocks = nn.ModuleList([nn.Conv2d(32, 32, 1, bias=False)])
        self.factor = factor
        for layer, sign in ((self.first, 1), (self.blocks[0], -1)):
            nn.init.dirac_(layer.weight)
            layer.weight.data *= sign

    def forward(self, x):
        return self.blocks[0](self.first(x).relu() * self.factor)


@functools.cache
def model(factor=1.0):
    with quiet("torch"):
        program = torch.export.export(Net(factor).eval(), (torch.zeros(SHAPE),)).run_decompositions({})
    return converted(program, "fp16", input_names=("x",), output_names=("y",))


def write_bundle(folder, packages, *, cases=None, **changes):
    """A bundle around packages: name to model, with its modules."""
    folder.mkdir()
    for name, (made, modules) in packages.items():
        save(made, folder / name, facts={KEY: modules})
    if cases is not None:
        (folder / INPUTS).parent.mkdir()
        write_cases(folder / INPUTS, cases)
    values = {
        "model": "net", "target": "coreml", "precision": "fp16", "inputs": (), "outputs": (), "weights": WeightsInfo(origin="random"),
        "verdict": "lowered", "stages": (StageResult(name="torch", verdict="verified"),),
    }  # fmt: skip
    write_manifest(folder, Manifest(**{**values, **changes}))
    return folder


def cases(value):
    return {"example": {"x": np.full(SHAPE, value, np.float32)}}


@pytest.fixture
def bundle(tmp_path):
    made = model()
    return write_bundle(tmp_path / "bundle", {"model.mlpackage": (made.model, made.modules)}, cases=cases(2.0))


class TestReading:
    def test_of_a_bundle(self, bundle):
        subject = read_program(bundle)
        assert (subject.target, subject.precision, subject.chip, subject.peaks) == ("coreml", "fp16", "", None)
        assert [op.op_type for op in subject.operations("conv")] == ["conv", "conv"]
        (package,) = subject.packages
        weights = bundle / "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
        assert package.files == {weights.relative_to(bundle).as_posix(): weights.stat().st_size}
        assert read_program(bundle, "tensorrt").target == "tensorrt"

    def test_of_a_package(self, bundle):
        """A package says from which modules its values are, wherever it is."""
        subject = read_program(bundle / "model.mlpackage", chip="M2")
        assert (subject.target, subject.manifest, subject.chip, subject.generation) == ("coreml", None, "M2", 14)
        assert [subject.modules[op.outputs[0].name] for op in subject.operations("conv", "relu")] == ["first", "", "blocks.0"]

    def test_of_a_package_of_somebody_else(self, tmp_path):
        save(model().model, tmp_path / "other.mlpackage")
        subject = read_program(tmp_path / "other.mlpackage")
        assert dict(subject.modules) == {}
        assert lint(subject) == []

    def test_of_chunks(self, tmp_path):
        """Every package of a model that was cut, in the order in which they run."""
        made = model()
        parts = chunks.cut(made.model, 4096)
        assert len(parts) == 2
        names = {f"model-{i}.mlpackage": (part.model, made.modules) for i, part in enumerate(parts)}
        folder = write_bundle(tmp_path / "cut", names, cases=cases(2.0), details={"packages": list(names)})
        subject = read_program(folder, observe=True)
        assert len(subject.packages) == 2
        assert [subject.modules[op.outputs[0].name] for op in subject.operations("conv")] == ["first", "blocks.0"]
        assert [subject.peak(op.outputs[0]) for op in subject.operations("conv")] == [2.0, 2.0]

    def test_packages_are_found_without_details(self, bundle):
        manifest = Manifest.model_validate_json((bundle / "manifest.json").read_bytes())
        assert packages_of(manifest) == ("model.mlpackage",)
        assert packages_of(manifest.model_copy(update={"files": {"model.onnx": ""}})) == ()

    def test_an_unknown_chip_is_refused(self, bundle):
        with pytest.raises(UnknownNameError, match="unknown chip 'M22'"):
            read_program(bundle, chip="M22")

    def test_a_bundle_without_a_package(self, tmp_path):
        with pytest.raises(UsageError, match=r"holds no \.mlpackage"):
            read_program(write_bundle(tmp_path / "bundle", {}))

    def test_what_is_missing_or_elsewhere_is_refused(self, bundle, tmp_path):
        shutil.move(bundle / "model.mlpackage", tmp_path / "elsewhere.mlpackage")
        with pytest.raises(IntegrityError, match="is missing or leads out of it"):
            read_program(bundle)
        (bundle / "model.mlpackage").symlink_to(tmp_path / "elsewhere.mlpackage")
        with pytest.raises(IntegrityError, match="is missing or leads out of it"):
            read_program(bundle)
        text = (bundle / "manifest.json").read_text().replace('"details": {}', '"details": {"packages": ["../elsewhere.mlpackage"]}')
        (bundle / "manifest.json").write_text(text)
        with pytest.raises(IntegrityError, match="is missing or leads out of it"):
            read_program(bundle)

    def test_missing_weights_are_refused(self, bundle):
        (bundle / "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin").unlink()
        with pytest.raises(IsthmusError, match="a weight file is missing or damaged"):
            read_program(bundle)

    def test_who_has_the_layout_is_not_told_to_ask_for_it(self, bundle):
        """The same program, exported as it is and in the layout of the Neural Engine."""
        transposed = programs.transposed(before_einsum=False)
        manifest = Manifest.model_validate_json((bundle / "manifest.json").read_bytes())
        for layout, told in ((None, True), ("plain", True), ("ane", False)):
            options = {"coreml": {"layout": layout}} if layout else {}
            subject = ProgramSubject((Package(transposed),), target="coreml", manifest=manifest.model_copy(update={"options": options}))
            (finding,) = lint(subject)
            assert ("--layout ane" in finding.fix) == told

    def test_a_machine_without_coremltools(self, bundle, monkeypatch):
        monkeypatch.setattr("isthmus.targets.coreml.rules.program.find_spec", lambda _: None)
        with pytest.raises(MachineError, match="coremltools is not installed"):
            read_program(bundle)

    def test_rules_are_listed_without_torch_or_coremltools(self):
        """A graph for TensorRT waits for neither."""
        code = (
            "import sys; import isthmus.findings; from isthmus.exporter.lint import rules_for; "
            "assert rules_for(['coreml']); print([name for name in ('torch', 'coremltools') if name in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": SRC}
        )
        assert done.stdout.strip() == "[]", done.stderr


class TestModules:
    @pytest.mark.parametrize("text", ["{", "[]", '{"blocks": "abc"}', '{"blocks": [1]}', "1"])
    def test_damaged_metadata_is_refused(self, text):
        with pytest.raises(IntegrityError, match=r"isthmus\.modules is damaged"):
            read_modules({KEY: text})

    def test_names_are_read_back(self):
        assert read_modules({}) == {}
        assert read_modules({KEY: json.dumps({"a.b": ["x", "y"], "": ["z"]})}) == {"x": "a.b", "y": "a.b", "z": ""}


class TestObserving:
    def test_large_values_are_found_when_they_are_looked_for(self, tmp_path):
        """A convolution whose results reach 40000: 2 times 20000."""
        made = model(20000.0)
        folder = write_bundle(tmp_path / "large", {"model.mlpackage": (made.model, made.modules)}, cases=cases(2.0))
        assert lint(read_program(folder)) == []
        (finding,) = lint(read_program(folder, observe=True))
        assert (finding.rule, finding.where) == ("ANE-501", "blocks.0")
        assert finding.what.startswith("conv whose results reach 4e+04")

    def test_values_that_are_no_numbers_count_as_infinite(self, bundle):
        program = read_program(bundle).packages[0].program
        observed = observed_peaks([program], cases(np.nan), AS_IT_IS)
        assert np.isinf(max(observed.values()))

    def test_cases_that_do_not_fit_are_left_out(self, bundle):
        program = read_program(bundle).packages[0].program
        others = {"samples": {"noise": np.zeros(3)}, "wide": {"x": np.full((1, 32, 1, 65), 9.0)}}
        observed = observed_peaks([program], {**others, **cases(3.0)}, AS_IT_IS)
        assert max(observed.values()) == 3.0
        with pytest.raises(UsageError, match=r"no case .* fits the program .*\(1, 32, 1, 65\)"):
            observed_peaks([program], others, AS_IT_IS)
        with pytest.raises(UsageError, match="there is none"):
            observed_peaks([program], {}, AS_IT_IS)

    def test_a_package_has_no_example_inputs(self, bundle):
        with pytest.raises(UsageError, match="holds no example inputs"):
            read_program(bundle / "model.mlpackage", observe=True)
