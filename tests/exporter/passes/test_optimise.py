"""The whole sequence of passes on real models: what it leaves, and that the graph is whole after every pass."""

from __future__ import annotations

import collections
import functools
import json
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from isthmus.calibration.verify import flatten
from isthmus.exporter.onnx import OPSETS, to_onnx
from isthmus.exporter.passes import optimise, passes
from isthmus.exporter.quiet import quiet
from isthmus.exporter.spec import MODELS
from isthmus.exporter.trace import trace
from isthmus.exporter.weights import random_weights

from ...architectures import marks_of

GOLDEN = Path(__file__).parents[2] / "goldens" / "operators.json"
KINDS = ("dit-tiny", "sana-tiny", "diffussm-tiny")
TINY = [pytest.param(name, marks=marks_of(name, quick=name in KINDS)) for name in MODELS if name.endswith("-tiny")]
STEPPED = [pytest.param(name, marks=marks_of(name, quick=name in KINDS, first=False)) for name in MODELS if name.endswith("-tiny")]
"""Graphs that are checked and run after every pass. What a pass spoils, the exports that .ci/run makes would show as well, less closely."""


@functools.cache
def traced(name: str) -> tuple[torch.export.ExportedProgram, dict[str, torch.Tensor], tuple[str, ...]]:
    spec = MODELS[name].spec()
    inputs = spec.inputs(np.random.Generator(np.random.PCG64(0)), spec.sizes)
    return trace(random_weights(spec, 0), inputs), inputs, spec.outputs


def translated(name: str, opset: int) -> ir.Model:
    program, inputs, outputs = traced(name)
    return to_onnx(program, opset=opset, input_names=list(inputs), output_names=outputs)


@pytest.mark.parametrize("name", TINY)
def test_operator_counts_are_those_of_the_golden_file(name: str) -> None:
    """A change of a pass shows here. When it is meant, `make goldens` writes the file anew."""
    model = optimise(translated(name, OPSETS[0]))
    counts = dict(sorted(collections.Counter(n.op_type for n in model.graph.all_nodes()).items()))
    golden = json.loads(GOLDEN.read_text())
    if os.environ.get("ISTHMUS_GOLDENS"):
        GOLDEN.write_text(json.dumps(dict(sorted({**golden, name: counts}.items())), indent=2) + "\n")
        return
    assert golden[name] == counts


@pytest.mark.parametrize("opset", [20, 23])
def test_a_dit_has_no_more_nodes_than_the_exporters_optimiser_leaves(opset: int) -> None:
    program, inputs, _ = traced("dit-tiny")
    with quiet("torch.onnx"):
        plain = torch.onnx.export(program, tuple(inputs.values()), dynamo=True, opset_version=opset, optimize=True, verbose=False)
    ours = optimise(translated("dit-tiny", opset))
    assert plain is not None
    assert sum(1 for _ in ours.graph.all_nodes()) <= sum(1 for _ in plain.model.graph.all_nodes())


@pytest.mark.parametrize("name", STEPPED)
def test_the_graph_is_valid_and_computes_the_same_after_every_pass(name: str) -> None:
    program, inputs, _ = traced(name)
    model = translated(name, 23 if name == "dit-tiny" else 20)
    with torch.no_grad():
        expected = [tensor.numpy() for tensor in flatten(program.module()(*inputs.values()))]
    feeds = {key: tensor.numpy() for key, tensor in inputs.items()}
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for each in passes():
        each(model)
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        taken = {i.name for i in session.get_inputs()}
        for got, wanted in zip(session.run(None, {n: a for n, a in feeds.items() if n in taken}), expected, strict=True):
            assert got.dtype == wanted.dtype
            if np.issubdtype(wanted.dtype, np.floating):
                assert np.abs(got - wanted).max() <= 1e-5 * (wanted.max() - wanted.min()), type(each).__name__
            else:
                assert np.array_equal(got, wanted), type(each).__name__


def test_without_fusion_hand_written_patterns_stay() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 23]>
        f (float[2, 4] x) => (float[2, 4] y) <float two = {2}, int64[1] axis = {-1}, float eps = {1e-15}, float[4] w = {1, 2, 3, 4}> {
            squared = Pow (x, two)
            mean = ReduceMean (squared, axis)
            shifted = Add (mean, eps)
            root = Sqrt (shifted)
            scale = Reciprocal (root)
            normal = Mul (x, scale)
            y = Mul (normal, w)
        }"""
    )
    assert [n.op_type for n in optimise(model.clone()).graph] == ["RMSNormalization"]
    assert "RMSNormalization" not in [n.op_type for n in optimise(model, fuse=False).graph]
