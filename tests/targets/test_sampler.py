"""Samplers in a graph: what the targets write beside the step's graph, what ONNX Runtime draws with it, and the plan of it."""

import dataclasses
import functools

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from isthmus.exporter import onnx as onnx_files
from isthmus.exporter.errors import UnsupportedError
from isthmus.exporter.manifest import Manifest, WeightsInfo
from isthmus.exporter.op import OPS
from isthmus.exporter.passes import optimise
from isthmus.exporter.ranges import CalibrationTable
from isthmus.exporter.sampling import FILE
from isthmus.exporter.spec import SizeRange
from isthmus.exporter.target import TARGETS, Job
from isthmus.exporter.trace import dimension_names, trace
from isthmus.models.flow import RectifiedFlowSampler
from isthmus.targets.tensorrt.lower import selection

RANGES = {"batch": SizeRange(1, 4, 8)}
SAMPLER = RectifiedFlowSampler(shape=(1, 4, 16), labels=(0, 1, 2), names=tuple("abc"), null_label=3, guidance=1.5, steps=3, method="heun")


class Step(nn.Module):
    """A velocity by attention over the rows of a picture; with `scan` by a selective scan."""

    def __init__(self, scan=False):
        super().__init__()
        OPS["selective_scan"].part("torch")
        self.classes = nn.Embedding(4, 16)
        self.qkv, self.leave = nn.Linear(16, 48), nn.Linear(16, 16)
        self.A = nn.Parameter(-torch.ones(16, 16)) if scan else None

    def forward(self, x, t, y):
        tokens = x.squeeze(1) + self.classes(y)[:, None] + (t / 1000)[:, None, None]
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        if self.A is not None:
            mixed = torch.ops.isthmus.selective_scan(q, k.tanh().abs(), self.A, v.tanh(), v.tanh())[0]
        else:
            mixed = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return self.leave(mixed)[:, None]


@functools.cache
def traced(scan):
    torch.manual_seed(0)
    dynamic = {name: {0: "batch"} for name in "xty"}
    example = {"x": torch.randn(4, 1, 4, 16), "t": torch.rand(4) * 1000, "y": torch.tensor([0, 1, 2, 3])}
    program = trace(Step(scan).eval(), example, dynamic=dynamic, ranges=RANGES)
    names = dimension_names(program, dynamic, example)
    return program, optimise(onnx_files.to_onnx(program, opset=23, input_names=list("xty"), output_names=["sample"], dimension_names=names))


def job(target, precision, *, scan=False, **options):
    program, model = traced(scan)
    chosen = TARGETS[target].Options.model_validate(options)
    asked = Job(program, model, precision, chosen, sizes=RANGES, loop=SAMPLER.loop())
    if precision == "fp8":
        asked = dataclasses.replace(asked, options=chosen.model_copy(update={"fp8_include": ("*",)}))
        asked = dataclasses.replace(asked, calibration=CalibrationTable.of_ranges(dict.fromkeys(selection(asked).observed(), 4.0)))
    return asked


def lowered(asked, target, folder):
    chosen = TARGETS[target]()
    assert chosen.unsupported(asked) == []
    made = chosen.lower(asked, folder)
    manifest = Manifest(
        model="module", target=target, precision=asked.precision, opset=23, options={target: asked.options.model_dump(mode="json")},
        inputs=(), outputs=(), weights=WeightsInfo(origin="module"), verdict="not run", stages=(), details=dict(made.details),
    )  # fmt: skip
    return chosen, made, manifest


def draw_with(stages):
    """The latents of the stage that runs the graph of the step, called by the sampler, and of the one that runs the sampler's."""
    step, sampling = stages
    assert (step.sampling, sampling.sampling, sampling.name) == (False, True, "sampler")
    rng = np.random.Generator(np.random.PCG64(0))
    with step.open() as runner:
        inputs, expected = SAMPLER.loop_case(runner.run, rng)
    with sampling.open() as runner:
        return runner.run(inputs)["latents"], expected["latents"]


class TestOnnxRuntime:
    @pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("fp16", 5e-3)])
    def test_the_sampler_draws_what_the_loop_outside_draws(self, tmp_path, precision, bound):
        target, made, manifest = lowered(job("onnxruntime", precision), "onnxruntime", tmp_path)
        assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", FILE}
        assert made.details["sampler"]["calls"] == 5
        assert made.details["sampler"]["inputs"] == {"noise": ["pictures", 1, 4, 16], "y": ["pictures"]}
        assert f"{FILE} (0.0 MiB) draws whole pictures, in 5 calls of the model" in made.notes
        got, expected = draw_with(target.stages(tmp_path, manifest))
        assert np.abs(got - expected).max() <= bound * np.ptp(expected)

    def test_without_one(self, tmp_path):
        asked = dataclasses.replace(job("onnxruntime", "fp32"), loop=None)
        target, made, manifest = lowered(asked, "onnxruntime", tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
        assert "sampler" not in made.details
        assert [stage.sampling for stage in target.stages(tmp_path, manifest)] == [False]

    def test_nodes_of_our_own_in_the_loop(self, tmp_path):
        """ONNX Runtime runs their bodies there too."""
        target, _, manifest = lowered(job("onnxruntime", "fp32", scan=True), "onnxruntime", tmp_path)
        stages = [stage for stage in target.stages(tmp_path, manifest) if stage.name != "native"]
        got, expected = draw_with(stages)
        assert np.abs(got - expected).max() <= 1e-5 * np.ptp(expected)


@pytest.fixture
def _rtx():
    pytest.importorskip("tensorrt_rtx", reason="not run: tensorrt-rtx is not installed (pip install 'isthmus[tensorrt-rtx]')")


@pytest.mark.usefixtures("_rtx")
class TestTensorRT:
    @pytest.mark.parametrize(("precision", "bound"), [("fp16", 5e-3), ("bf16", 4e-2), ("fp8", 5e-3)])
    def test_the_plan_is_the_samplers(self, tmp_path, precision, bound):
        asked = job("tensorrt-rtx", precision, compute_capability=("8.9",))
        target, made, manifest = lowered(asked, "tensorrt-rtx", tmp_path)
        recipe = made.details["build"]
        assert recipe["model"] == FILE
        assert recipe["profiles"] == {
            "noise": {"min": [1, 1, 4, 16], "opt": [2, 1, 4, 16], "max": [4, 1, 4, 16]},
            "y": {"min": [1], "opt": [2], "max": [4]},
        }
        assert f"--onnx={FILE}" in (tmp_path / "build.sh").read_text()
        # Attention of its own is not compiled within a loop.
        assert "Attention" not in {node.op_type for node in nodes(onnx.load(tmp_path / FILE).graph)}
        *host, device = target.stages(tmp_path, manifest)
        assert device.sampling
        got, expected = draw_with(host)
        # In FP8 both run the same Q/DQ, and differ where a rounding falls the other way.
        assert np.abs(got - expected).max() <= bound * np.ptp(expected)
        built = target.build(tmp_path, manifest, required=True)
        assert built.stage.verdict == "built"
        assert (tmp_path / "engine.rtx.plan").is_file()

    def test_fp8_within_the_loop_is_fp8(self, tmp_path):
        """Where 8.0 takes the graph, the FP8 in it was lost."""
        target, made, manifest = lowered(job("tensorrt-rtx", "fp8", compute_capability=("8.9",)), "tensorrt-rtx", tmp_path)
        assert {layer["module"] for layer in made.details["build"]["fp8"]} >= {"qkv", "leave"}
        elsewhere = {**manifest.details, "build": {**manifest.details["build"], "compute_capabilities": ["8.0"]}}
        with pytest.raises(UnsupportedError, match="HW-specific datatypes: fp8_e4m3"):
            target.build(tmp_path, manifest.model_copy(update={"details": elsewhere}), required=True)

    def test_plugins_in_the_loop_are_refused(self):
        """TensorRT-RTX 1.7.1: "TYPE unspecified and not inferred"."""
        target = TARGETS["tensorrt-rtx"]()
        (reason,) = target.unsupported(job("tensorrt-rtx", "fp16", scan=True, compute_capability=("8.9",)))
        assert reason.what == "SelectiveScan runs as a plugin, and TensorRT-RTX infers no type for one within a loop"
        assert reason.fix == "choose --sampler step"
        assert TARGETS["tensorrt"]().unsupported(job("tensorrt", "fp16", scan=True)) == []


def nodes(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes(attribute.g)
