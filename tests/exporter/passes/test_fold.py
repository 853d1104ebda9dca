"""Folding: constants, shapes and the transposes of weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from isthmus.exporter.passes.fold_constants import FoldConstants
from isthmus.exporter.passes.fold_shapes import FoldShapes
from isthmus.exporter.passes.fold_transposes import FoldTransposes

DEAD = RemoveUnusedNodesPass()


def test_constants_are_folded(rewrites) -> None:
    rewrites(
        FoldConstants(),
        """f (float[2, 3] x) => (float[2, 3] z) {
            one = Constant<value_int=1>()
            one_f = Cast<to=1>(one)
            three = Constant<value_float=3.0>()
            root = Sqrt(three)
            third = Div(one_f, root)
            z = Add(x, third)
        }""",
        f"f (float[2, 3] x) => (float[2, 3] z) <float c = {{{np.float32(1) / np.sqrt(np.float32(3)):.9g}}}> {{ z = Add(x, c) }}",
    )


@pytest.mark.parametrize("eps", ["1e-15", "1e-8", "0.0"])
@pytest.mark.parametrize("opset", range(20, 26))
def test_adding_a_small_constant_is_no_identity(leaves, eps: str, opset: int) -> None:
    leaves(FoldConstants(), f"f (float[2] x) => (float[2] z) <float eps = {{{eps}}}> {{ y = Add(x, eps) z = Sqrt(y) }}", opset=opset)


def test_an_initializer_that_is_an_input_is_not_constant(parse) -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 23]> f (float[1] c) => (float[1] z) <float[1] c = {1}> { y = Neg(c) z = Neg(y) }'
    )
    assert not FoldConstants()(model).modified


def test_large_results_are_not_written_into_the_model(leaves, parse) -> None:
    given = """f (float[4096, 1024] x) => (float[4096, 1024] z) <int64[2] shape = {4096, 1024}, float one = {1}> {
        big = Expand(one, shape)
        z = Add(x, big)
    }"""
    leaves(FoldConstants(limit_bytes=(16 << 20) - 1), given)
    model = parse(given)
    assert FoldConstants(limit_bytes=16 << 20)(model).modified


@pytest.mark.parametrize("node", ["Range(zero, much, one)", "ConstantOfShape(shape)", "Tile(one_v, shape)", "Expand(one_v, shape)"])
def test_every_expanding_operator_is_bounded(leaves, node: str) -> None:
    leaves(
        FoldConstants(),
        f"""f (float[2] x) => (float[2] y) <int64 zero = {{0}}, int64 one = {{1}}, int64 much = {{100000000}}, int64[1] shape = {{100000000}},
            int64[1] one_v = {{1}}, int64[1] start = {{0}}, int64[1] end = {{2}}> {{
            big = {node}
            bigf = Cast<to=1>(big)
            cut = Slice(bigf, start, end)
            y = Add(x, cut)
        }}""",
    )


def test_random_and_foreign_operators_are_not_folded(leaves) -> None:
    leaves(FoldConstants(), "f (float[2] x) => (float[2] z) <float[2] c = {1, 2}> { y = RandomNormalLike(c) z = Add(x, y) }")
    leaves(FoldConstants(), "f (float[2] x) => (float[2] z) <float[2] c = {1, 2}> { y = Bernoulli(c) z = Add(x, y) }")


def test_constants_of_a_function_stay_constant_nodes() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 23, "here" : 1]>
        f (float[2] x) => (float[2] z) { z = here.g(x) }
        <domain: "here", opset_import: ["" : 23]> g (a) => (b) {
            one = Constant<value_int=1>() two = Add(one, one) c = CastLike(two, a) b = Add(a, c) }""")
    assert FoldConstants()(model).modified
    (function,) = model.functions.values()
    DEAD(model)
    assert [node.op_type for node in function] == ["Constant", "CastLike", "Add"]
    assert function[0].attributes["value"].as_tensor().numpy() == 2


def test_an_output_that_is_constant_keeps_its_node(leaves) -> None:
    leaves(FoldConstants(), "f (float[2] x) => (float[1] z, float[2] y) <float[1] c = {2}> { z = Neg(c) y = Neg(x) }")


def test_nothing_is_raised_for_an_invalid_node(parse) -> None:
    model = parse("f (float[2] x) => (float[6] z) <float[2, 3] c = {1,2,3,4,5,6}, int64[1] s = {5}> { r = Reshape(c, s) z = Add(x, r) }")
    assert not FoldConstants()(model).modified


# --- shapes -------------------------------------------------------------------------------------------------------------------------


def test_reshape_with_one_symbolic_size(rewrites) -> None:
    rewrites(
        FoldShapes(),
        """f (float[batch, 16, 64] x) => (float[batch, 16, 4, 16] z) <int64[3] tail = {16, 4, 16}> {
            batch_ = Shape<start=0, end=1>(x)
            target = Concat<axis=0>(batch_, tail)
            z = Reshape<allowzero=1>(x, target)
        }""",
        """f (float[batch, 16, 64] x) => (float[batch, 16, 4, 16] z) <int64[4] target = {-1, 16, 4, 16}> {
            z = Reshape(x, target)
        }""",
        then=DEAD,
    )


def test_reshape_with_two_symbolic_sizes_copies_the_one_in_place(rewrites) -> None:
    rewrites(
        FoldShapes(),
        """f (float[batch, n, 64] x) => (float[batch, n, 4, 16] z) <int64[2] tail = {4, 16}> {
            both = Shape<start=0, end=2>(x)
            target = Concat<axis=0>(both, tail)
            z = Reshape<allowzero=1>(x, target)
        }""",
        """f (float[batch, n, 64] x) => (float[batch, n, 4, 16] z) <int64[4] target = {0, -1, 4, 16}> {
            z = Reshape(x, target)
        }""",
        then=DEAD,
    )


@pytest.mark.parametrize(
    "target",
    [
        "s = Shape(x) r = Gather(s, order) target = Concat<axis=0>(r, tail)",  # two open sizes, neither in its place
        "s = Shape<start=0, end=1>(x) t = Shape<start=1, end=2>(x) target = Concat<axis=0>(t, s, tail)",
    ],
)
def test_reshape_with_two_symbolic_sizes_out_of_place_stays(leaves, target: str) -> None:
    leaves(
        FoldShapes(),
        f"""f (float[batch, n, 4] x) => (float[n, batch, 4] z) <int64[2] order = {{1, 0}}, int64[1] tail = {{4}}> {{
            {target}
            z = Reshape(x, target)
        }}""",
    )


def test_reshape_to_a_size_of_zero_stays(leaves) -> None:
    leaves(
        FoldShapes(),
        """f (float[batch, 0, 4] x) => (float[batch, 0, 2, 2] z) <int64[3] tail = {0, 2, 2}> {
            s = Shape<start=0, end=1>(x) target = Concat<axis=0>(s, tail)
            z = Reshape<allowzero=1>(x, target)
        }""",
    )


def test_static_sizes_of_a_dynamic_shape_become_constants(rewrites) -> None:
    # How torch.onnx.export computes the scale of scaled_dot_product_attention below opset 23.
    rewrites(
        FoldShapes(),
        """f (float[batch, 4, n, 16] q) => (float[batch, 4, n, 16] y) <int64 minus_one = {-1}> {
            shape = Shape(q)
            size = Gather(shape, minus_one)
            size_f = Cast<to=1>(size)
            y = Div(q, size_f)
        }""",
        """f (float[batch, 4, n, 16] q) => (float[batch, 4, n, 16] y) <int64 size = {16}> {
            size_f = Cast<to=1>(size)
            y = Div(q, size_f)
        }""",
        then=DEAD,
    )


def test_arithmetic_slices_and_squeezes_of_sizes(rewrites) -> None:
    rewrites(
        FoldShapes(),
        """f (float[batch, 6, 7] x, float[p, q, r] t) => (float[p, q, r] y)
          <int64[1] one = {1}, int64[1] three = {3}, int64[1] two = {2}, int64[1] zero = {0}, int64[1] minus = {-1}> {
            s = Shape(x)
            tail = Slice(s, one, three)          # 6 7
            six = Slice(tail, zero, one)
            seven = Slice(tail, one, two)
            product = Mul(six, seven)            # 42
            sum = Add(product, two)              # 44
            part = Div(sum, three)               # 14
            negative = Sub(zero, part)           # -14
            truncated = Div(negative, three)     # -4: towards zero
            flat = Squeeze(truncated, zero)
            back = Unsqueeze(flat, zero)
            f = Cast<to=1>(back)
            y = Add(t, f)
        }""",
        """f (float[batch, 6, 7] x, float[p, q, r] t) => (float[p, q, r] y) <int64[1] c = {-4}> {
            f = Cast<to=1>(c)
            y = Add(t, f)
        }""",
        then=DEAD,
    )


def test_a_symbolic_size_stays_computed(leaves) -> None:
    leaves(
        FoldShapes(),
        "f (float[batch, 4] x) => (float[batch, 4] y) { s = Shape<start=0, end=1>(x) f = Cast<to=1>(s) y = Div(x, f) }",
    )


def test_sizes_that_a_reshape_is_given_are_written_on_its_output(parse) -> None:
    model = parse("""f (float[batch, 2, n, 16] x) => (float[p, q] z) <int64[1] minus = {-1}, int64[1] sixteen = {16}> {
        n_ = Shape<start=2, end=3>(x) target = Concat<axis=0>(minus, n_, sixteen)
        y = Reshape(x, target) z = Flatten(y) }""")
    FoldShapes()(model)
    (reshape,) = [node for node in model.graph if node.op_type == "Reshape"]
    assert reshape.outputs[0].shape == ir.Shape([None, "n", 16])


def test_an_expand_to_names_that_may_differ_is_not_annotated(parse) -> None:
    model = parse("""f (float[a, 4] x, float[b] t) => (float[p, q] z) <int64[1] four = {4}> {
        b_ = Shape(t) target = Concat<axis=0>(b_, four) y = Expand(x, target) z = Neg(y) }""")
    FoldShapes()(model)
    (expand,) = [node for node in model.graph if node.op_type == "Expand"]
    assert expand.outputs[0].shape == ir.Shape([None, 4])


# --- transposes ---------------------------------------------------------------------------------------------------------------------

LINEAR = "f (float[2, 3] x) => (float[2, 2] y) <float[2, 3] weight = {1, 2, 3, 4, 5, 6}>"


def test_transpose_of_a_weight(rewrites) -> None:
    model = rewrites(
        FoldTransposes(),
        LINEAR + " { t = Transpose<perm=[1, 0]>(weight) y = MatMul(x, t) }",
        "f (float[2, 3] x) => (float[2, 2] y) <float[3, 2] w = {1, 4, 2, 5, 3, 6}> { y = MatMul(x, w) }",
        then=DEAD,
    )
    assert list(model.graph.initializers) == ["weight.T"]
    assert isinstance(model.graph.initializers["weight.T"].const_value, ir.LazyTensor)


def test_transpose_used_twice_is_made_once_and_the_weight_stays_where_it_is_used(rewrites) -> None:
    model = rewrites(
        FoldTransposes(),
        LINEAR
        + """ { t = Transpose<perm=[1, 0]>(weight) a = MatMul(x, t) u = Transpose(weight) b = MatMul(x, u) c = Add(a, b)
            d = ReduceSum<keepdims=0>(weight) y = Add(c, d) }""",
        """f (float[2, 3] x) => (float[2, 2] y) <float[3, 2] w = {1, 4, 2, 5, 3, 6}, float[2, 3] weight = {1, 2, 3, 4, 5, 6}> {
            a = MatMul(x, w) b = MatMul(x, w) c = Add(a, b) d = ReduceSum<keepdims=0>(weight) y = Add(c, d) }""",
        then=DEAD,
    )
    assert set(model.graph.initializers) == {"weight", "weight.T"}


def test_transpose_of_more_axes_says_so_in_its_name(parse) -> None:
    model = parse("f (float[1] x) => (float[1, 2, 1] y) <float[1, 1, 2] w = {1, 2}> { t = Transpose<perm=[1, 2, 0]>(w) y = Add(x, t) }")
    FoldTransposes()(model)
    value = model.graph.initializers["w.transpose_1_2_0"]
    np.testing.assert_array_equal(value.const_value.numpy(), np.array([1, 2], np.float32).reshape(1, 2, 1))


def test_transpose_of_an_input_or_to_an_output_stays(leaves) -> None:
    leaves(
        FoldTransposes(), "f (float[2, 3] x) => (float[2, 3] y) { t = Transpose<perm=[1, 0]>(x) n = Neg(t) y = Transpose<perm=[1, 0]>(n) }"
    )
    leaves(
        FoldTransposes(),
        "f (float[2] x) => (float[3, 2] t, float[2] y) <float[2, 3] w = {1,2,3,4,5,6}> { t = Transpose<perm=[1, 0]>(w) y = Neg(x) }",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_transposed_torch_weights_share_memory_until_they_are_written(dtype: torch.dtype) -> None:
    weight = torch.arange(6).reshape(2, 3).to(dtype)
    tensor = ir.tensor_adapters.TorchTensor(weight, name="w")
    value = ir.Value(name="w", const_value=tensor, shape=ir.Shape([2, 3]), type=ir.TensorType(tensor.dtype))
    node = ir.node("Transpose", [value], {"perm": [1, 0]})
    out = ir.node("Identity", [node.outputs[0]])
    model = ir.Model(ir.Graph([], out.outputs, nodes=[node, out], initializers=[value], opset_imports={"": 23}, name="g"), ir_version=10)
    FoldTransposes()(model)
    made = model.graph.initializers["w.T"].const_value
    weight[0, 1] = 9  # seen by a tensor that is computed only when it is read
    assert made.tobytes() == weight.t().contiguous().view(torch.uint8).numpy().tobytes()
    assert made.dtype == tensor.dtype
    assert list(made.shape) == [3, 2]
