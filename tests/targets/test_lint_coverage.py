"""The FP8 coverage table: its operations against torch's own counter, and what counts as FP8."""

import importlib.util
import sys
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from isthmus.exporter.onnx import to_onnx
from isthmus.exporter.passes import optimise
from isthmus.exporter.passes.infer_shapes import InferShapes
from isthmus.exporter.source import load_source
from isthmus.exporter.trace import dimension_names, trace
from isthmus.targets.tensorrt.coverage import coverage


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


models = _load("lint_fixtures")
B, L, D, N = models.B, models.L, models.D, models.N


def covered(model, sizes=None):
    model = ir.from_proto(model)
    InferShapes()(model)
    return coverage(model, sizes or {})


@pytest.mark.parametrize(("name", "named"), [("dit-tiny", True), ("sana-tiny", False)])
def test_the_operations_are_those_that_torch_counts(name, named):
    """At the example's sizes, which are names in one of the graphs, for the whole and for every module."""
    source = load_source(name, settings={"depth": 1}, weights=None, inputs=None, dynamic=(), batch_size=None, seed=0)
    # torch's counter does not know the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        source.module(**source.example)
    dynamic = source.dynamic if named else {}
    program = trace(source.module, source.example, dynamic=dynamic, ranges=source.ranges if named else {})
    names = dimension_names(program, dynamic, source.example)
    model = to_onnx(program, opset=23, input_names=list(source.example), output_names=source.spec.outputs, dimension_names=names)
    sizes = {size: source.example[x].shape[axis] for x, axes in dynamic.items() for axis, size in axes.items()}
    table = coverage(optimise(model), sizes)
    assert table.uncounted == ()
    assert table.flops == counter.get_total_flops()
    assert table.share == 0.0
    # torch's names begin with the root's class, and a module's operations are also those of the modules that contain it.
    modules = {key.partition(".")[2]: sum(counts.values()) for key, counts in counter.get_flop_counts().items() if "." in key}
    assert {row.module for row in table.rows} <= set(modules)
    for module, flops in modules.items():
        assert sum(row.flops for row in table.rows if f"{row.module}.".startswith(f"{module}.")) == flops, module


class TestFP8:
    @pytest.mark.parametrize(
        ("model", "flops", "share"),
        [
            (models.linear(), 2 * B * L * D * N, 1.0),
            (models.linear(axis=0, gemm=True), 2 * B * L * D * N, 1.0),
            (models.linear(stored=False), 2 * B * L * D * N, 1.0),
            (models.linear(activation=False), 2 * B * L * D * N, 0.0),
            (models.linear(weight=False), 2 * B * L * D * N, 0.0),
            (models.linear(kind=onnx.TensorProto.FLOAT8E5M2), 2 * B * L * D * N, 0.0),
            (models.convolution(), 2 * B * 64 * 16 * 16 * 64 * 9, 1.0),
            (models.convolution(group=64), 2 * B * 64 * 16 * 16 * 9, 1.0),
            (models.attention(), 2 * 2 * B * 4 * 128 * 128 * 64, 1.0),
            (models.attention(softmax=False), 2 * 2 * B * 4 * 128 * 128 * 64, 0.5),
            (models.attention_node(fp8=True), 2 * 2 * B * 4 * 128 * 128 * 64, 0.0),
            (models.concatenation(after=False), 2 * B * L * D * N, 0.0),
        ],
    )
    def test_both_operands_have_to_be_fp8(self, model, flops, share):
        table = covered(model)
        assert (table.flops, table.share) == (flops, share)
        assert table.uncounted == ()

    def test_rows_are_modules(self):
        g = models.Graph()
        x = g.qdq(g.input("x", B, L, D))
        for module, fp8 in (("blocks.0.fc", True), ("blocks.0.fc", True), ("head", False)):
            g.output(g.op("MatMul", x, g.weight(D, N, stored=fp8), module=module), B, L, N)
        table = covered(g.model())
        one = 2 * B * L * D * N
        assert [(r.module, r.products, r.flops, r.fp8) for r in table.rows] == [("blocks.0.fc", 2, 2 * one, 2 * one), ("head", 1, one, 0)]
        assert table.value() == {
            "share": 2 / 3, "flops": 3 * one, "fp8": 2 * one, "uncounted": [],
            "modules": [
                {"module": "blocks.0.fc", "products": 2, "flops": 2 * one, "fp8": 2 * one},
                {"module": "head", "products": 1, "flops": one, "fp8": 0},
            ],
        }  # fmt: skip

    def test_a_graph_without_products(self):
        table = covered(models.line("y = Relu (x)", "float16[2] x", "float16[2] y"))
        assert (table.flops, table.share, table.rows) == (0, 0.0, ())


class TestSizes:
    """Sizes that are not numbers are given; what is not known is said, not counted as nothing."""

    def test_expressions_of_named_sizes(self):
        model = models.line("y = MatMul (x, w)", "float16[batch, n, 8] x, float16[8, 4] w", "float16[batch, n, 4] y")
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "height*width"
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "height*width"
        assert covered(model, {"batch": 3, "height": 5, "width": 7}).flops == 2 * 3 * 35 * 8 * 4

    @pytest.mark.parametrize(
        ("model", "reason"),
        [
            (models.line("y = MatMul (x, w)", "float16[batch, 8] x, float16[8, 4] w", "float16[batch, 4] y"), "batch in the shape of x"),
            (models.line("y = MatMul (x, w)", 'float16[M, 8] x, float16[8, 4] w', "float16[M, 4] y"), "M in the shape of x has no value"),
            (models.line("a = Reshape (x, s) y = MatMul (a, w)", "float16[16] x, int64[2] s, float16[8, 4] w", "float16[m, 4] y"), "of a"),
            (models.line('y = Einsum <equation = "...i,ij->...j"> (x, w)', "float16[2,8] x, float16[8,4] w", "float16[2,4] y"), "ellipsis"),
        ],
    )  # fmt: skip
    def test_unknown_sizes_are_named(self, model, reason):
        table = covered(model)
        assert table.rows == ()
        (uncounted,) = table.uncounted
        assert reason in uncounted.what
        assert "is not counted" in uncounted.what

    def test_a_power_is_not_computed(self):
        model = models.line("y = MatMul (x, w)", "float16[k, 8] x, float16[8, 4] w", "float16[k, 4] y")
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "9**9**9**9"
        (uncounted,) = covered(model, {"k": 1}).uncounted
        assert "9**9**9**9 in the shape of x has no value" in uncounted.what

    @pytest.mark.parametrize(
        ("body", "inputs", "outputs", "flops"),
        [
            ("y = MatMul (x, w)", "float16[8] x, float16[8, 4] w", "float16[4] y", 2 * 8 * 4),
            ("y = MatMul (x, w)", "float16[3, 8] x, float16[8] w", "float16[3] y", 2 * 3 * 8),
            ("y = MatMul (x, w)", "float16[5, 1, 3, 8] x, float16[2, 8, 4] w", "float16[5, 2, 3, 4] y", 2 * 10 * 3 * 8 * 4),
            ("y = Gemm <transA = 1> (x, w)", "float16[8, 3] x, float16[8, 4] w", "float16[3, 4] y", 2 * 3 * 8 * 4),
            (
                "y = ConvTranspose <strides = [2, 2]> (x, w)",
                "float16[1, 8, 4, 4] x, float16[8, 6, 2, 2] w",
                "float16[1, 6, 8, 8] y",
                2 * 8 * 16 * 6 * 4,
            ),
            ('y = Einsum <equation = "bld,bmd->blm"> (x, w)', "float16[3,5,7] x, float16[3,6,7] w", "float16[3,5,6] y", 2 * 3 * 30 * 7),
            ('y = Einsum <equation = "ij->ji"> (x)', "float16[2,3] x", "float16[3,2] y", 0),
            (
                "y = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v)",
                "float16[2,6,32] q, float16[2,10,16] k, float16[2,10,8] v",
                "float16[2,6,16] y",
                2 * 2 * 4 * 6 * 10 * (8 + 4),
            ),
            (
                "y, a, b = Attention (q, k, v, , p, r)",
                "float16[2,4,6,8] q, float16[2,4,10,8] k, float16[2,4,10,8] v, float16[2,4,5,8] p, float16[2,4,5,8] r",
                "float16[2,4,6,8] y, float16[2,4,15,8] a, float16[2,4,15,8] b",
                2 * 2 * 4 * 6 * 15 * 16,
            ),
        ],
    )  # fmt: skip
    def test_operations_of_each_operator(self, body, inputs, outputs, flops):
        table = covered(models.line(body, inputs, outputs))
        assert (table.flops, table.uncounted) == (flops, ())

    @pytest.mark.parametrize(("weights", "times", "reasons"), [("int64 steps = {7}, bool yes = {1}", 7, 0), ("bool yes = {1}", 1, 1)])
    def test_a_loop_counts_for_every_step(self, weights, times, reasons):
        inner = "body = step (int64 i, bool c, float16[2,8] h) => (bool co, float16[2,8] ho) { co = Identity (c) ho = MatMul (h, w) }"
        inputs = "float16[2,8] x, float16[8,8] w" + ("" if "steps" in weights else ", int64 steps")
        table = covered(models.line(f"y = Loop <{inner}> (steps, yes, x)", inputs, "float16[2,8] y", weights))
        assert table.flops == times * 2 * 2 * 8 * 8
        assert [("number of steps is not known" in r.what) for r in table.uncounted] == [True] * reasons

    def test_products_in_a_function_are_named(self):
        function = '<domain: "acme", opset_import: ["" : 23]> Frobnicate (x) => (y) { y = MatMul (x, x) }'
        model = models.parsed(
            "y = acme.Frobnicate (x)", inputs="float16[8,8] x", outputs="float16[8,8] y", imports=', "acme" : 1', functions=function
        )
        (reason,) = covered(model).uncounted
        assert "products in the function Frobnicate are not counted" in reason.what
