"""The values inside a package, by their PyTorch modules: Core ML's side of `isthmus bisect`."""

import pytest
import torch
from torch import nn

import isthmus
from isthmus.calibration.diff import Reference, diff
from isthmus.calibration.row import DEFAULT_THRESHOLDS
from isthmus.exporter.bundle import INPUTS, read_cases, read_manifest
from isthmus.targets.coreml.session import Interface
from isthmus.targets.coreml.values import MilValues, steps_of

pytest.importorskip("coremltools")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.act = nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()

    def forward(self, x):
        return x + self.act(self.linear(self.norm(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.blocks(x))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A bundle in float32, and the module that it was made from."""
    torch.manual_seed(0)
    module, x = Net().eval(), torch.randn(2, 5, 8)
    folder = tmp_path_factory.mktemp("package") / "net"
    isthmus.export((module, (x,)), "coreml", folder, precision="fp32")
    return folder, module, x


def opened(folder):
    manifest = read_manifest(folder)
    shapes = {info.name: info.shape for info in manifest.inputs}
    return MilValues(folder / "model.mlpackage", Interface.of(manifest), shapes)


def test_every_module_is_found_and_faithful(package):
    folder, module, x = package
    with opened(folder) as values:
        rows = diff(Reference(module, {"x": x}), values, read_cases(folder / INPUTS)["example"], threshold=1e-4)
    assert {row.module for row in rows if row.visible} == {name for name, m in module.named_modules()}
    for row in rows:
        assert row.error < 10 * DEFAULT_THRESHOLDS["fp32"], row  # Core ML's functions are a decimal less exact than PyTorch's


def test_a_fault_is_found_where_it_is(package):
    folder, module, x = package
    other = Net().eval()
    other.load_state_dict(module.state_dict())
    other.blocks[1].norm.eps = 0.1
    with opened(folder) as values:
        rows = diff(Reference(other, {"x": x}), values, {"x": x.numpy()}, threshold=1e-3)
    assert [row.module for row in rows if row.error > 1e-3] == ["blocks.1.norm"]
    (wrong,) = (row for row in rows if row.module == "blocks.1.norm")
    assert any("layer_norm" in node for node in wrong.nodes)


def test_only_what_is_asked_for_is_kept(package):
    folder, _, x = package
    with opened(folder) as values:
        step = values.flow.steps[-1]
        inputs = {"x": x.numpy()}
        shapes = values.shapes(inputs, [step.outputs[0], "nothing"])
        assert list(shapes) == [step.outputs[0]]
        assert values.read(inputs, [step.outputs[0]])[step.outputs[0]].shape == shapes[step.outputs[0]]
        assert values.flow.outputs[0] in step.outputs


def test_constants_are_no_steps(package):
    folder, _, _ = package
    from isthmus.targets.coreml.interpreter import load

    function = load(folder / "model.mlpackage").functions["main"]
    steps = steps_of(function, {})
    assert {step.operator for step in steps}.isdisjoint({"const"})
    assert {step.module for step in steps} == {""}
