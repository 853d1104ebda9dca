"""A job made of a small module, what the targets make of it, and the stand-in for `tensorrt`."""

import functools
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from isthmus.exporter import onnx as onnx_files
from isthmus.exporter.manifest import Manifest, WeightsInfo
from isthmus.exporter.op import OPS
from isthmus.exporter.passes import optimise
from isthmus.exporter.spec import SizeRange
from isthmus.exporter.target import TARGETS, Job
from isthmus.exporter.trace import dimension_names, trace
from isthmus.targets.tensorrt import base, library, session
from isthmus.targets.tensorrt.library import Gpu

H100 = Gpu("NVIDIA H100 80GB HBM3", "9.0")
RANGES = {"batch": SizeRange(1, 2, 8)}


class Mlp(nn.Module):
    """Two Linear layers with a GELU between."""

    EXAMPLE = (2, 4, 32)

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


class Scan(nn.Module):
    """A selective scan between two Linear layers."""

    EXAMPLE = (2, 6, 8)

    def __init__(self):
        super().__init__()
        OPS["selective_scan"].part("torch")
        self.inside = nn.Linear(8, 8)
        self.A = nn.Parameter(-torch.ones(8, 16))
        self.matrices = nn.Linear(8, 32)

    def forward(self, x):
        u = self.inside(x)
        b, c = self.matrices(u).chunk(2, dim=-1)
        return torch.ops.isthmus.selective_scan(u, u.abs(), self.A, b, c)[0]


class Recurrence(nn.Module):
    """Linear attention with itself."""

    EXAMPLE = (2, 6, 8)

    def forward(self, x):
        OPS["linear_attention"].part("torch")
        return torch.ops.isthmus.linear_attention(x, x, x, q_num_heads=2, kv_num_heads=2, update_rule="linear")[0]


MODULES = {"Mlp": Mlp, "Scan": Scan, "Recurrence": Recurrence}


@pytest.fixture
def modules():
    """The modules by name."""
    return MODULES


@dataclass
class Made:
    """A bundle's folder and manifest, without reference and report."""

    target: object
    folder: Path
    manifest: Manifest
    lowered: object

    def build(self, *, required=False):
        return self.target.build(self.folder, self.manifest, required=required)

    def with_details(self, **details):
        changed = self.manifest.model_copy(update={"details": {**self.manifest.details, **details}})
        return Made(self.target, self.folder, changed, self.lowered)


@functools.cache
def traced(name):
    """A program and its graph, with a dynamic batch; once for all tests, because a target does not change the model of its job."""
    module, dynamic = MODULES[name](), {"x": {0: "batch"}}
    example = {"x": torch.ones(module.EXAMPLE)}
    program = trace(module.eval(), example, dynamic=dynamic, ranges=RANGES)
    names = dimension_names(program, dynamic, example)
    model = onnx_files.to_onnx(program, opset=23, input_names=["x"], output_names=["y"], dimension_names=names)
    return program, optimise(model)


def job_of(target, module="Mlp", *, precision="fp16", options=None):
    program, model = traced(module)
    return Job(program, model, precision, TARGETS[target].Options.model_validate(options or {}), sizes=RANGES)


@pytest.fixture
def job():
    """A job: `job("tensorrt-rtx")` of the Mlp, or of another of `MODULES`."""
    return job_of


@pytest.fixture
def make(tmp_path):
    """A lowered bundle: `make("tensorrt-rtx")` of the Mlp, of another of `MODULES`, or of a job."""

    def lower(target, module="Mlp", asked=None, **arguments):
        folder = tmp_path / f"bundle-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        asked = asked or job_of(target, module, **arguments)
        chosen = TARGETS[target]()
        assert chosen.unsupported(asked) == []
        lowered = chosen.lower(asked, folder)
        return Made(chosen, folder, manifest_of(asked, target, lowered.details), lowered)

    return lower


def manifest_of(asked, target, details):
    return Manifest(
        model="module",
        target=target,
        precision=asked.precision,
        opset=23,
        options={target: asked.options.model_dump(mode="json")},
        inputs=(),
        outputs=(),
        weights=WeightsInfo(origin="module"),
        verdict="not run",
        stages=(),
        details=dict(details),
    )


@pytest.fixture
def rtx():
    """For tests that need TensorRT-RTX; the stand-in for `tensorrt` is checked against it."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("not run: tensorrt-rtx is not installed (pip install 'isthmus[tensorrt-rtx]')")


FOUND = library._found


@pytest.fixture(autouse=True)
def _bare(monkeypatch):
    """No GPU and no TensorRT, wherever the tests run; see `h100`."""
    for module in (base, session):
        monkeypatch.setattr(module, "find_gpu", lambda: None)
    monkeypatch.setattr(library, "_found", lambda name: name != "tensorrt" and FOUND(name))


@pytest.fixture
def tensorrt(rtx):
    """The stand-in for the module `tensorrt`, fresh."""
    spec = importlib.util.spec_from_file_location("tensorrt_double", Path(__file__).with_name("double.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["tensorrt_double"] = module  # its classes look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["tensorrt_double"]


@dataclass
class Machine:
    """A machine that seems to have TensorRT and an H100; its child processes too."""

    folder: Path

    def answer(self, **answers):
        (self.folder / "answers.json").write_text(json.dumps(answers))

    def calls(self):
        return json.loads((self.folder / "calls.json").read_text())


@pytest.fixture
def h100(rtx, tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "tensorrt.py").write_text(Path(__file__).with_name("double.py").read_text())
    (folder / "tensorrt-11.4.0.106.dist-info").mkdir()
    (folder / "tensorrt-11.4.0.106.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt\nVersion: 11.4.0.106\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("ISTHMUS_DOUBLE", str(folder / "answers.json"))
    monkeypatch.setattr(library, "_found", FOUND)
    monkeypatch.setattr(library, "cache_folder", lambda: tmp_path / "cache" / "gpu")
    monkeypatch.setattr(base, "find_gpu", lambda: H100)
    machine = Machine(folder)
    machine.answer()
    return machine
