"""A small net as a graph, with its layers, its ranges, and folders of trials: made once for the files that tune it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from isthmus.calibrating import operands
from isthmus.calibration.data import CalibrationData
from isthmus.calibration.observe import Observer
from isthmus.calibration.sensitivity import units_of
from isthmus.calibration.switches import switched
from isthmus.calibration.table import calibration_table
from isthmus.calibration.trials import MODEL, write_facts
from isthmus.exporter import onnx as onnx_files
from isthmus.exporter.passes import optimise
from isthmus.exporter.passes.fp8_layers import select
from isthmus.exporter.trace import trace


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.proj = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 2, 2)
        self.attn = Attention()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image).flatten(2).transpose(1, 2)
        x = x + self.attn(x)
        return x + self.down(torch.relu(self.up(x)))


class Tuned:
    """A small net as a graph, with its layers, its ranges, and folders of trials."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = Net().eval()
        rng = np.random.default_rng(0)
        self.sets = [{"image": rng.normal(size=(2, 3, 8, 8)).astype(np.float32)} for _ in range(3)]
        self.example = {"image": torch.from_numpy(self.sets[0]["image"])}
        program = trace(self.net, self.example, dynamic={}, ranges={})
        graph = onnx_files.to_onnx(program, opset=23, input_names=["image"], output_names=["y"], dimension_names={})
        self.graph = optimise(graph)
        self.observer = Observer(self.graph, operands(self.graph))
        data = CalibrationData("given", self.sets[:2])
        seen = self.observer.observe(data)
        self.table = calibration_table(seen, data, method="max", grids=("e4m3", "uint8", "int8"))

    def layers(self, precision):
        found = select(self.graph, include=["*"]).layers
        return [layer for layer in found if precision == "fp8" or (layer.kind == "weight" and layer.module != "stem")]

    def write(self, folder, precision, **options):
        units = units_of(self.graph, self.layers(precision), {})
        switches = [(layer, i) for i, unit in enumerate(units) for layer in unit.layers]
        folder.mkdir(parents=True, exist_ok=True)
        onnx_files.save(switched(self.graph, switches, self.table, precision, **options), folder / MODEL, bytes_of_weights=0)
        write_facts(folder, switches=len(units), outputs=["y"], sets=self.sets[2:])
        return units


@pytest.fixture(scope="session")
def tuned():
    return Tuned()


@pytest.fixture(scope="session")
def folder(tuned, tmp_path_factory):
    made = tmp_path_factory.mktemp("trials")
    tuned.write(made, "fp8")
    return made
