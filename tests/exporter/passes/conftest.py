"""Graphs in ONNX text, compared node by node and by what they compute."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from isthmus.exporter.passes._rewrite import constant_tensor
from isthmus.exporter.passes.infer_shapes import InferShapes


def _parse(text: str, opset: int = 23) -> ir.Model:
    """A model from the text of its graph, with the types and shapes of all values."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}')
    InferShapes()(model)
    return model


def _outputs(model: ir.Model, seed: int) -> list[np.ndarray]:
    """What the model computes on random inputs; symbolic sizes are 3."""
    generator = np.random.Generator(np.random.PCG64(seed))
    feeds = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else 3 for d in value.shape]
        dtype = value.dtype.numpy()
        floats = np.issubdtype(dtype, np.floating)
        feeds[value.name] = (generator.standard_normal(shape) if floats else generator.integers(0, 2, shape)).astype(dtype)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def _assert_same_graph(got: ir.Graph, expected: ir.Graph) -> None:
    """The same nodes in the same order, up to names and to whether a constant is an initializer or a Constant node."""
    left, right = ([node for node in graph if node.op_type != "Constant"] for graph in (got, expected))
    assert [node.op_type for node in left] == [node.op_type for node in right]
    assert [value.name for value in got.inputs] == [value.name for value in expected.inputs]
    assert [value.name for value in got.outputs] == [value.name for value in expected.outputs]
    pairs: dict[ir.Value, ir.Value] = dict(zip(got.inputs, expected.inputs, strict=True))

    def assert_same_value(a: ir.Value | None, b: ir.Value | None) -> None:
        tensors = [None if value is None else constant_tensor(value) for value in (a, b)]
        if tensors[0] is not None or tensors[1] is not None:
            arrays = [tensor.numpy() for tensor in tensors]
            assert arrays[0].dtype == arrays[1].dtype
            assert arrays[0].shape == arrays[1].shape
            assert arrays[0].tobytes() == arrays[1].tobytes()
        else:
            assert (a is None and b is None) or pairs.get(a, a if a is b else None) is b

    for a, b in zip(left, right, strict=True):
        assert len(a.inputs) == len(b.inputs), a
        for i, j in zip(a.inputs, b.inputs, strict=True):
            assert_same_value(i, j)
        assert set(a.attributes) == set(b.attributes), a
        for name, attribute in a.attributes.items():
            other = b.attributes[name]
            if attribute.type == ir.AttributeType.GRAPH:
                _assert_same_graph(attribute.as_graph(), other.as_graph())
            else:
                assert attribute.value == other.value, a
        assert len(a.outputs) == len(b.outputs)
        pairs.update(zip(a.outputs, b.outputs, strict=True))
    for a, b in zip(got.outputs, expected.outputs, strict=True):
        assert_same_value(a, b)


def _check_ir(model: ir.Model) -> None:
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.fixture
def parse() -> Callable[..., ir.Model]:
    return _parse


@pytest.fixture
def outputs() -> Callable[..., list[np.ndarray]]:
    return _outputs


@pytest.fixture
def check_ir() -> Callable[[ir.Model], None]:
    return _check_ir


@pytest.fixture
def rewrites() -> Callable[..., ir.Model]:
    """Given / Result: the pass turns the first graph into the second, and both compute the same."""

    def check(
        rewrite: ir.passes.PassBase,
        given: str,
        result: str,
        *,
        opset: int = 23,
        runs: bool = True,
        atol: float = 0.0,
        then: ir.passes.PassBase | None = None,
    ) -> ir.Model:
        before, model, expected = (_parse(text, opset) for text in (given, given, result))
        assert rewrite(model).modified
        if then is not None:
            then(model)
        _check_ir(model)
        _assert_same_graph(model.graph, expected.graph)
        if runs:
            for seed in (0, 1):
                for got, want in zip(_outputs(model, seed), _outputs(before, seed), strict=True):
                    np.testing.assert_allclose(got, want, rtol=0, atol=atol)
        assert not rewrite(model).modified, "a second run changes the graph again"
        return model

    return check


@pytest.fixture
def leaves() -> Callable[..., None]:
    """The pass leaves the graph as it is."""

    def check(rewrite: ir.passes.PassBase, given: str, *, opset: int = 23) -> None:
        model, expected = _parse(given, opset), _parse(given, opset)
        assert not rewrite(model).modified
        _assert_same_graph(model.graph, expected.graph)

    return check
