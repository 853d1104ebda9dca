"""The ONNX nodes of our operators: translation from torch, one session for every size, carried states, and refusals."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from isthmus.exporter.errors import UnsupportedError
from isthmus.exporter.onnx import OPSETS, to_onnx
from isthmus.exporter.op import DOMAIN, OPS
from isthmus.exporter.ops.onnx_forms import custom_nodes, forms, function, inputs_of, node_attributes, register, values_of
from isthmus.exporter.ops.onnx_models import node_of, one_node
from isthmus.exporter.passes import optimise
from isthmus.exporter.spec import SizeRange
from isthmus.exporter.trace import trace


def session(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


@functools.cache
def body(name: str) -> ort.InferenceSession:
    inputs, attributes = CALLS[name]
    form, settled, _ = node_of(OPS[name], inputs(1, 2), attributes)
    return session(one_node(OPS[name], form, settled, ir.DataType.FLOAT))


def draw(batch: int, length: int, **shapes: tuple[object, ...]) -> dict[str, np.ndarray]:
    rng = np.random.Generator(np.random.PCG64(batch * 1000 + length))
    sizes = {"B": batch, "L": length}
    return {name: rng.standard_normal([sizes.get(d, d) for d in shape]).astype(np.float32) for name, shape in shapes.items()}


def scan_inputs(batch: int, length: int) -> dict[str, np.ndarray]:
    x = draw(batch, length, u=("B", "L", 6), delta=("B", "L", 6), A=(6, 4), B=("B", "L", 8), C=("B", "L", 8), initial_state=("B", 6, 4))
    return x | {"A": -np.abs(x["A"]), "delta": np.abs(x["delta"])}


def attention_inputs(batch: int, length: int) -> dict[str, np.ndarray]:
    x = draw(batch, length, q=("B", "L", 8), k=("B", "L", 8), v=("B", "L", 6), decay=("B", "L", 2), initial_state=("B", 2, 4, 3))
    return x | {"decay": -np.abs(x["decay"])}


def rwkv_inputs(batch: int, length: int) -> dict[str, np.ndarray]:
    x = draw(batch, length, **dict.fromkeys(("r", "decay", "k", "v", "a", "b"), ("B", "L", 8)), initial_state=("B", 2, 4, 4))
    return x | {"decay": -np.abs(x["decay"]), "a": x["a"] / 8, "b": x["b"] / 8}


def conv_inputs(batch: int, length: int) -> dict[str, np.ndarray]:
    return draw(batch, length, x=("B", 5, "L"), weight=(5, 1, 4), initial_state=("B", 5, 3))


def normalized_inputs(batch: int, length: int) -> dict[str, np.ndarray]:
    return draw(batch, length, q=("B", "L", 8), k=("B", "L", 8), v=("B", "L", 6))


CALLS = {
    "selective_scan": (scan_inputs, {}),
    "linear_attention": (attention_inputs, {"q_num_heads": 2, "kv_num_heads": 2, "update_rule": "gated"}),
    "rwkv7": (rwkv_inputs, {"num_heads": 2}),
    "causal_conv1d": (conv_inputs, {"silu": True}),
    "normalized_linear_attention": (normalized_inputs, {"num_heads": 2}),
}
CARRIED = [name for name in CALLS if name != "normalized_linear_attention"]


def run(name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    _, attributes = CALLS[name]
    _, _, operands = node_of(OPS[name], inputs, attributes)
    names = [a.name for a in OPS[name].outputs]
    return dict(zip(names, body(name).run(names, operands), strict=True))


def test_every_operator_is_called() -> None:
    assert set(CALLS) == set(OPS)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 2), (2, 37)])
def test_one_session_serves_every_batch_and_length(name, batch, length, sweep) -> None:
    inputs, attributes = CALLS[name][0](batch, length), CALLS[name][1]
    reference = OPS[name].part("reference").reference(inputs, OPS[name].resolve(attributes))
    sweep.check(OPS[name], run(name, inputs), reference, "float32", "float32")


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("at", [1, 2, 7, 11])
def test_a_sequence_may_be_split_anywhere(name, at) -> None:
    op, inputs = OPS[name], CALLS[name][0](2, 12)
    whole = run(name, inputs)
    axes = {a.name: a.shape.index("length") for a in (*op.inputs, *op.outputs) if "length" in a.shape}

    def part(tokens: slice) -> dict[str, np.ndarray]:
        return {n: x[(slice(None),) * axes[n] + (tokens,)] if n in axes else x for n, x in inputs.items()}

    first = run(name, part(slice(0, at)))
    second = run(name, part(slice(at, None)) | {"initial_state": first["last_state"]})
    np.testing.assert_allclose(second["last_state"], whole["last_state"], rtol=1e-5, atol=1e-5)
    joined = np.concatenate([first["y"], second["y"]], axis=axes["y"])
    np.testing.assert_allclose(joined, whole["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op_type", sorted(forms()))
def test_a_body_is_of_standard_operators_in_every_opset(op_type) -> None:
    op, form = forms()[op_type]
    for opset in (20, 25):
        made = function(op_type, opset)
        assert made.identifier() == (DOMAIN, op_type, "")
        assert [v.name for v in made.inputs] == list(form.inputs)
        assert [v.name for v in made.outputs] == [a.name for a in op.outputs]
        assert sorted(made.attributes) == sorted(node_attributes(op, form))
        inner = list(ir.traversal.RecursiveGraphIterator(made.graph))
        assert {node.domain for node in inner} == {""}
        for node in inner:
            onnx.defs.get_schema(node.op_type, opset, "")


def test_schemas_are_registered_once_and_have_no_optional_inputs() -> None:
    assert register() is register()
    for op_type, (_, form) in forms().items():
        found = onnx.defs.get_schema(op_type, 1, DOMAIN)
        assert [i.name for i in found.inputs] == list(form.inputs)
        assert {i.option for i in found.inputs} == {onnx.defs.OpSchema.FormalParameterOption.Single}


class Everything(nn.Module):
    """Every operator, with as little given as possible."""

    def __init__(self) -> None:
        super().__init__()
        for op in OPS:
            OPS[op].part("torch")
        self.A = nn.Parameter(-torch.rand(6, 4))
        self.weight = nn.Parameter(torch.randn(6, 1, 4))

    def forward(self, x: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ops = torch.ops.isthmus
        u = ops.causal_conv1d(x.transpose(1, 2), self.weight, silu=True)[0].transpose(1, 2)
        y, state = ops.selective_scan(u, x.abs(), self.A, b, b, z=x, reverse=True)
        a, _ = ops.linear_attention(x, x, x, q_num_heads=2, kv_num_heads=2, update_rule="linear")
        r, _ = ops.rwkv7(y, -x.abs(), x, x, x * 0.1, x * 0.1, num_heads=3)
        return ops.normalized_linear_attention(x, u, y, num_heads=2), a, r, state


SIZES = {"batch": SizeRange(1, 2, 9), "length": SizeRange(1, 8, 512)}


@pytest.fixture(scope="module")
def translated() -> tuple[nn.Module, ir.Model]:
    torch.manual_seed(0)
    module = Everything().eval()
    inputs = {"x": torch.randn(2, 8, 6), "b": torch.randn(2, 8, 4)}
    program = trace(module, inputs, dynamic={name: {0: "batch", 1: "length"} for name in inputs}, ranges=SIZES)
    return module, to_onnx(program, opset=23, input_names=list(inputs), output_names=("n", "a", "r", "state"))


def test_a_call_becomes_one_node_with_all_inputs(translated) -> None:
    _, model = translated
    found = {node.op_type: node for node in custom_nodes(model)}
    assert sorted(found) == ["CausalConv1d", "GatedSelectiveScan", "NormalizedLinearAttention", "PlainLinearAttention", "RWKV7"]
    assert sorted(name for _, name, _ in model.functions) == sorted(found)
    for op_type, node in found.items():
        op, form = forms()[op_type]
        assert list(inputs_of(node)) == list(form.inputs)
        assert len(node.outputs) == len(op.outputs)
    assert values_of(found["GatedSelectiveScan"]) == {"delta_softplus": False, "reverse": True}
    attributes = {name: a.value for name, a in found["GatedSelectiveScan"].attributes.items()}
    assert attributes == {"delta_softplus": 0, "reverse": 1}
    # 0 stands for 1 / sqrt(key), which a body cannot compute from an attribute.
    assert values_of(found["PlainLinearAttention"])["scale"] == pytest.approx(3**-0.5)


def test_the_translation_computes_the_same_at_every_size(translated) -> None:
    module, model = translated
    optimised = optimise(model.clone())
    onnx.checker.check_model(ir.to_proto(optimised), full_check=True)
    for each in (model, optimised):
        running = session(each)
        for batch, length in ((1, 1), (2, 8), (3, 30)):
            g = torch.Generator().manual_seed(batch)
            x, b = torch.randn(batch, length, 6, generator=g), torch.randn(batch, length, 4, generator=g)
            with torch.no_grad():
                expected = module(x, b)
            for got, want in zip(running.run(None, {"x": x.numpy(), "b": b.numpy()}), expected, strict=True):
                np.testing.assert_allclose(got, want.numpy(), rtol=2e-4, atol=2e-4)


def test_a_static_state_of_zeros_is_one_constant() -> None:
    module = Everything().eval()
    inputs = {"x": torch.randn(2, 8, 6), "b": torch.randn(2, 8, 4)}
    model = optimise(to_onnx(trace(module, inputs), opset=23, input_names=list(inputs), output_names=("n", "a", "r", "state")))
    for node in custom_nodes(model):
        state = inputs_of(node).get("initial_state")
        assert state is None or not state.const_value.numpy().any()
    assert not [n for n in model.graph if n.op_type == "ConstantOfShape"]


class DynamicChannels(nn.Module):
    """A state whose size no input has on an axis of its own."""

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        OPS["linear_attention"].part("torch")
        y: torch.Tensor = torch.ops.isthmus.linear_attention(q, q, q, q_num_heads=2, kv_num_heads=2, update_rule="linear", scale=1.0)[0]
        return y


def test_a_state_of_unknown_size_is_refused() -> None:
    q = {"q": torch.randn(1, 3, 8)}
    program = trace(DynamicChannels(), q, dynamic={"q": {2: "width"}}, ranges={"width": SizeRange(2, 8, 64)})
    with pytest.raises(UnsupportedError, match="the size key of initial_state is dynamic"):
        to_onnx(program, opset=23, input_names=["q"], output_names=["y"])


@pytest.mark.parametrize("opset", sorted(OPSETS))
def test_a_file_of_every_opset_is_valid(opset) -> None:
    for name, (inputs, attributes) in CALLS.items():
        form, settled, _ = node_of(OPS[name], inputs(1, 2), attributes)
        onnx.checker.check_model(ir.to_proto(one_node(OPS[name], form, settled, ir.DataType.FLOAT, opset=opset)), full_check=True)
