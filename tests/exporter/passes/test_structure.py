"""Splits, slices, no-ops, squeezes, duplicates and reductions."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from isthmus.exporter.passes.fold_constants import FoldConstants
from isthmus.exporter.passes.gather_slices import GatherSlices
from isthmus.exporter.passes.keep_reduced_axes import KeepReducedAxes
from isthmus.exporter.passes.merge_duplicates import MergeDuplicates
from isthmus.exporter.passes.merge_reshaped_transposes import MergeReshapedTransposes
from isthmus.exporter.passes.remove_noops import RemoveNoOps
from isthmus.exporter.passes.repair_squeeze import RepairSqueeze
from isthmus.exporter.passes.split_sequences import SplitSequences

DEAD = RemoveUnusedNodesPass()

# --- SplitToSequence ----------------------------------------------------------------------------------------------------------------


def chunks(
    split: str = "s = SplitToSequence<axis=1>(x, size)", shape: str = "[2, 10]", size: str = "int64 size = {4}", c: str = "[2, 2]"
) -> str:
    return f"""f (float{shape} x) => (float[2, 4] a, float{c} c) <{size}, int64 first = {{0}}, int64 last = {{-1}}> {{
        {split} a = SequenceAt(s, first) c = SequenceAt(s, last) }}"""


def test_uneven_split(rewrites) -> None:
    result = "f (float[2, 10] x) => (float[2, 4] a, float[2, 2] c) <int64[3] n = {4, 4, 2}> { a, b, c = Split<axis=1>(x, n) }"
    rewrites(SplitSequences(), chunks(), result)


def test_even_split_with_an_unused_part_on_a_negative_axis(rewrites) -> None:
    result = "f (float[2, 12] x) => (float[2, 4] a, float[2, 4] c) { a, b, c = Split<axis=1, num_outputs=3>(x) }"
    rewrites(SplitSequences(), chunks("s = SplitToSequence<axis=-1>(x, size)", "[2, 12]", c="[2, 4]"), result)


def test_split_with_sizes(rewrites) -> None:
    given = chunks(size="int64[3] size = {4, 5, 1}", c="[2, 1]")
    rewrites(
        SplitSequences(),
        given,
        "f (float[2, 10] x) => (float[2, 4] a, float[2, 1] c) <int64[3] n = {4, 5, 1}> { a, b, c = Split<axis=1>(x, n) }",
    )


def test_split_with_sizes_of_a_symbolic_axis(rewrites) -> None:
    given = chunks(shape="[2, n]", size="int64[2] size = {4, 4}", c="[2, 4]")
    rewrites(
        SplitSequences(),
        given,
        "f (float[2, n] x) => (float[2, 4] a, float[2, 4] c) <int64[2] n = {4, 4}> { a, c = Split<axis=1>(x, n) }",
        runs=False,
    )


def test_split_that_drops_the_axis(rewrites) -> None:
    rewrites(
        SplitSequences(),
        "f (float[2, 2] x) => (float[2] a, float[2] b) <int64 i = {0}, int64 j = {1}> { s = SplitToSequence<axis=1, keepdims=0>(x) a = SequenceAt(s, i) b = SequenceAt(s, j) }",
        "f (float[2, 2] x) => (float[2] a, float[2] b) <int64[1] d = {1}> { p, q = Split<axis=1, num_outputs=2>(x) a = Squeeze(p, d) b = Squeeze(q, d) }",
    )


def test_a_part_taken_twice_as_two_outputs(rewrites) -> None:
    rewrites(
        SplitSequences(),
        "f (float[4] x) => (float[2] a, float[2] b) <int64 n = {2}, int64 i = {0}> { s = SplitToSequence(x, n) a = SequenceAt(s, i) b = SequenceAt(s, i) }",
        "f (float[4] x) => (float[2] a, float[2] b) { a, r = Split<axis=0, num_outputs=2>(x) b = Identity(a) }",
    )


@pytest.mark.parametrize(
    "given",
    [
        chunks(shape="[2, n]"),  # how many parts is not known
        chunks().replace("int64 last = {-1}", "int64 last = {3}"),  # outside: an error at run time, and to stay one
        "f (float[4] x, int64 i) => (float[2] a) <int64 n = {2}> { s = SplitToSequence(x, n) a = SequenceAt(s, i) }",
        "f (float[4] x) => (float[4] a) <int64 n = {2}> { s = SplitToSequence(x, n) a = ConcatFromSequence<axis=0>(s) }",
    ],
    ids=["symbolic axis", "index outside", "index not constant", "another user"],
)
def test_split_near_misses(leaves, given: str) -> None:
    leaves(SplitSequences(), given)


def test_split_needs_opset_18(leaves) -> None:
    leaves(SplitSequences(), chunks(), opset=17)


# --- Slice + Squeeze ----------------------------------------------------------------------------------------------------------------


def one_slice(start: int, end: int, axis: int = 0, squeezed: int = 0, step: str = "", shape: str = "[3, 2, 5]", out: str = "[2, 5]") -> str:
    return f"""f (float{shape} x) => (float{out} y)
      <int64[1] start = {{{start}}}, int64[1] end = {{{end}}}, int64[1] axis = {{{axis}}}, int64[1] d = {{{squeezed}}}, int64[1] two = {{2}}> {{
        s = Slice(x, start, end, axis{step}) y = Squeeze(s, d) }}"""


@pytest.mark.parametrize(
    ("start", "end", "axis", "index"),
    [(0, 1, 0, 0), (1, 2, 0, 1), (2, 3, -3, 2), (-1, 2**63 - 1, 0, 2), (-2, -1, 0, 1), (2, 99, 0, 2)],
)
def test_one_element_is_gathered(rewrites, start: int, end: int, axis: int, index: int) -> None:
    result = f"f (float[3, 2, 5] x) => (float[2, 5] y) <int64 i = {{{index}}}> {{ y = Gather<axis=0>(x, i) }}"
    rewrites(GatherSlices(), one_slice(start, end, axis, axis), result)


def test_the_last_element_of_a_symbolic_axis_is_gathered(rewrites) -> None:
    rewrites(
        GatherSlices(),
        one_slice(-1, 2**63 - 1, shape="[n, 2, 5]"),
        "f (float[n, 2, 5] x) => (float[2, 5] y) <int64 i = {-1}> { y = Gather<axis=0>(x, i) }",
    )


@pytest.mark.parametrize(
    "given",
    [
        one_slice(0, 1, axis=0, squeezed=1, shape="[3, 1, 5]", out="[1, 5]"),  # another axis is squeezed
        one_slice(0, 2, step=", two"),  # one element by a step of 2
        one_slice(0, 1, shape="[n, 2, 5]"),  # a symbolic axis may be empty, where Slice clamps
        one_slice(0, 3, shape="[1, 2, 5]")
        .replace("y = Squeeze", "t = Squeeze")
        .replace("(s, d) }", "(s, d) y = Add(t, s) }")
        .replace("=> (float[2, 5] y", "=> (float[1, 2, 5] y")
        .replace("[3] ", "[3] ")
        .replace("t = Squeeze(s, d)", "t = Squeeze(x, d)"),  # no Slice below the Squeeze
    ],
    ids=["axis", "step", "symbolic", "no slice"],
)
def test_slices_that_stay(leaves, given: str) -> None:
    leaves(GatherSlices(), given)


# --- no-ops -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "node",
    [
        "b = Identity(a)",
        "b = Cast<to=1>(a)",
        "b = CastLike(a, x)",
        "b = Dropout(a)",
        "b = Reshape(a, same)",
        "b = Reshape(a, open)",
        "b = Expand(a, ones)",
        "b = Expand(a, last)",
        "b = Slice(a, zeros, ends)",
        "b = Transpose<perm=[0, 1]>(a)",
        "t = Transpose<perm=[1, 0]>(a) b = Transpose<perm=[1, 0]>(t)",
        "b = Concat<axis=1>(a)",
        "u = Unsqueeze(a, d) b = Squeeze(u, d)",
        "u = Unsqueeze(a, d) b = Squeeze(u, minus)",
        "b = Mul(a, one)",
        "b = Div(a, one)",
    ],
)
@pytest.mark.parametrize("place", ["inner", "output"])
def test_no_ops_go(rewrites, node: str, place: str) -> None:
    constants = """<int64[2] same = {2, 3}, int64[2] open = {-1, 3}, int64[2] ones = {1, 1}, int64[1] last = {3}, int64[2] zeros = {0, 0},
        int64[2] ends = {2, 9223372036854775807}, int64[1] d = {1}, int64[1] minus = {-2}, float one = {1}>"""
    head = "f (float[2, 3] x) => (float[2, 3] z)"
    if place == "inner":
        rewrites(RemoveNoOps(), f"{head} {constants} {{ a = Neg(x) {node} z = Neg(b) }}", f"{head} {{ a = Neg(x) z = Neg(a) }}", then=DEAD)
    else:
        rewrites(RemoveNoOps(), f"{head} {constants} {{ a = Neg(x) {node.replace('b =', 'z =')} }}", f"{head} {{ z = Neg(x) }}", then=DEAD)


def test_no_ops_with_symbolic_sizes(rewrites) -> None:
    head = "f (float[batch, 3] x) => (float[batch, 3] z)"
    given = (
        f"{head} <int64[1] zero = {{0}}, int64[1] three = {{3}}> {{ a = Neg(x) s = Shape(x) float[batch, 3] b = Reshape(a, s) z = Neg(b) }}"
    )
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 23]> {given.replace("float[batch, 3] b", "b")}')
    model.graph[2].outputs[0].shape = ir.Shape(["batch", 3])
    model.graph[0].outputs[0].shape = ir.Shape(["batch", 3])
    assert RemoveNoOps()(model).modified
    DEAD(model)
    assert [node.op_type for node in model.graph] == ["Neg", "Neg"]
    assert rewrites is not None


@pytest.mark.parametrize(
    "body",
    [
        "z = Identity(x)",  # an output must be a value of its own
        "a = Neg(x) z = Cast<to=1>(h) y = Neg(a)",
        "a = Neg(x) z = Reshape(a, turned) y = Neg(a)",
        "a = Neg(x) z = Transpose<perm=[1, 0]>(a) y = Neg(a)",
        "a = Neg(x) z = Slice(a, zeros, ends, axes, steps) y = Neg(a)",
        "a = Neg(x) z = Add(a, nought) y = Neg(a)",
        "a = Neg(x) z = Mul(a, deep) y = Neg(a)",
        "a = Neg(x) z = Div(one, a) y = Neg(a)",
        "a = Neg(x) z = Dropout(a, nought, yes) y = Neg(a)",
    ],
    ids=["input to output", "cast", "reshape", "transpose", "reversed", "plus zero", "one more axis", "one over", "training"],
)
def test_what_looks_like_a_no_op_stays(leaves, body: str) -> None:
    outputs = "float[p, q] z, float[2, 3] y" if "y =" in body else "float[2, 3] z"
    outputs = outputs.replace("float[p, q] z", "float[1, 2, 3] z") if "deep" in body else outputs
    leaves(
        RemoveNoOps(),
        f"""f (float[2, 3] x, float16[2, 3] h) => ({outputs}) <int64[2] turned = {{3, 2}}, int64[2] zeros = {{-1, -1}}, int64[2] ends = {{-99, -99}},
          int64[2] axes = {{0, 1}}, int64[2] steps = {{-1, -1}}, float nought = {{0}}, float one = {{1}}, float[1, 1, 1] deep = {{1}}, bool yes = {{1}}>
          {{ {body} }}""",
    )


def test_two_transposes_become_one_and_of_two_reshapes_the_second_stays(rewrites) -> None:
    rewrites(
        RemoveNoOps(),
        "f (float[2, 3, 4] x) => (float[4, 2, 3] z) { a = Transpose<perm=[1, 2, 0]>(x) z = Transpose<perm=[1, 2, 0]>(a) }",
        "f (float[2, 3, 4] x) => (float[4, 2, 3] z) { z = Transpose<perm=[2, 0, 1]>(x) }",
        then=DEAD,
    )
    rewrites(
        RemoveNoOps(),
        "f (float[2, 3, 4] x) => (float[8, 3] z) <int64[1] s = {-1}, int64[2] t = {8, -1}> { a = Reshape(x, s) z = Reshape(a, t) }",
        "f (float[2, 3, 4] x) => (float[8, 3] z) <int64[2] t = {8, -1}> { z = Reshape(x, t) }",
        then=DEAD,
    )


def test_a_second_reshape_that_copies_a_size_keeps_the_first(leaves) -> None:
    leaves(
        RemoveNoOps(),
        "f (float[2, 3, 4] x) => (float[6, 4] z) <int64[3] s = {6, 2, 2}, int64[2] t = {0, 4}> { a = Reshape(x, s) z = Reshape(a, t) }",
    )


def test_cast_like_a_known_type_becomes_cast(rewrites) -> None:
    rewrites(
        RemoveNoOps(),
        "f (float[2] x, float16[1] h) => (float16[2] z) { z = CastLike(x, h) }",
        "f (float[2] x, float16[1] h) => (float16[2] z) { z = Cast<to=10>(x) }",
    )


def test_bodies_of_control_flow_and_functions_are_cleaned() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 23, "here" : 1]>
        f (float[2] x, bool c) => (float[2] z) {
            y = If(c) <then_branch = g () => (float[2] t) { a = Neg(x) b = Identity(a) t = Neg(b) },
                       else_branch = h () => (float[2] e) { e = Identity(x) }>
            z = here.k(y)
        }
        <domain: "here", opset_import: ["" : 23]> k (a) => (b) { i = Identity(a) b = Neg(i) }""")
    assert RemoveNoOps()(model).modified
    branch = model.graph[0].attributes
    assert [n.op_type for n in branch["then_branch"].as_graph()] == ["Neg", "Neg"]
    assert [n.op_type for n in branch["else_branch"].as_graph()] == ["Identity"]  # the outer x cannot be the body's output
    (function,) = model.functions.values()
    assert [n.op_type for n in function] == ["Neg"]


# --- Squeeze ------------------------------------------------------------------------------------------------------------------------


def squeeze(shape: str, axes: str, out: str = "[p]") -> str:
    return (
        f"f (float{shape} x) => (float{out} y) <int64[{axes.count(',') + 1}] d = {{{axes}}}> {{ a = Neg(x) s = Squeeze(a, d) y = Neg(s) }}"
    )


def _repaired(text: str, ranges: str = "", out: list[object] | None = None) -> list[str]:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 23]> {text}')
    model.graph[0].outputs[0].shape = ir.Shape(list(model.graph.inputs[0].shape))
    model.graph.metadata_props["pkg.torch.export.ExportedProgram.range_constraints"] = ranges
    if out is not None:
        model.graph[1].outputs[0].shape = ir.Shape(out)
    RepairSqueeze()(model)
    axes = [n.inputs[1].const_value.numpy().tolist() for n in model.graph if n.op_type == "Squeeze"]
    return [n.op_type for n in model.graph] + axes


def test_squeeze_of_a_size_that_is_not_one(rewrites) -> None:
    rewrites(
        RepairSqueeze(),
        squeeze("[2, 5, 8]", "1", "[2, 5, 8]"),
        "f (float[2, 5, 8] x) => (float[2, 5, 8] y) { a = Neg(x) y = Neg(a) }",
        runs=False,
    )


def test_squeeze_keeps_the_axes_that_are_one() -> None:
    assert _repaired(squeeze("[1, 5, 8]", "0, 1")) == ["Neg", "Squeeze", "Neg", [0]]
    assert _repaired(squeeze("[1, 5, 8]", "0")) == ["Neg", "Squeeze", "Neg", [0]]
    assert _repaired(squeeze("[1, 5, 8]", "-1")) == ["Neg", "Neg"]


def test_squeeze_of_a_symbolic_size() -> None:
    assert _repaired(squeeze("[2, s7]", "1"), "{s7: VR[2, 8]}") == ["Neg", "Neg"]
    assert _repaired(squeeze("[2, s7]", "1"), "{s7: VR[1, 8]}") == ["Neg", "Squeeze", "Neg", [1]]
    assert _repaired(squeeze("[2, s7]", "1"), "{s77: VR[2, 8]}") == ["Neg", "Squeeze", "Neg", [1]]
    assert _repaired(squeeze("[2, s7]", "1"), out=[2, "s7"]) == ["Neg", "Neg"]  # PyTorch's own result keeps the dimension


def test_squeeze_from_input_to_output_becomes_identity() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 23]> f (float[2, 5] x) => (float[2, 5] y) <int64[1] d = {1}> { y = Squeeze(x, d) }'
    )
    assert RepairSqueeze()(model).modified
    assert [n.op_type for n in model.graph] == ["Identity"]
    assert len(model.graph[0].inputs) == 1


# --- duplicates, reductions, transposes between reshapes ---------------------------------------------------------------------------


def test_equal_constants_and_nodes_are_merged_and_parameters_are_not(parse) -> None:
    model = parse("""f (float[2] x) => (float[2] z) <float[2] p = {1, 2}, float[2] q = {1, 2}> {
        c = Constant<value_ints=[1]>() d = Constant<value_ints=[1]>() e = Constant<value_floats=[1.0]>()
        a = Unsqueeze(x, c) b = Unsqueeze(x, d) s = Add(a, b) t = Squeeze(s, d) u = Mul(t, p) v = Mul(u, q) z = Mul(v, e) }""")
    FoldConstants()(model)
    assert MergeDuplicates()(model).modified
    DEAD(model)
    assert [n.op_type for n in model.graph] == ["Unsqueeze", "Add", "Squeeze", "Mul", "Mul", "Mul"]
    assert model.graph[1].inputs[0] is model.graph[1].inputs[1]
    assert {"p", "q"} <= set(model.graph.initializers)
    assert len(model.graph.initializers) == 4  # p, q, [1] as int64, [1.0] as float
    assert not MergeDuplicates()(model).modified


def test_zero_and_minus_zero_are_two_constants(parse) -> None:
    model = parse(
        "f (float[2] x) => (float[2] z) { a = Constant<value_float=0.0>() b = Constant<value_float=-0.0>() y = Div(x, a) w = Div(x, b) z = Max(y, w) }"
    )
    FoldConstants()(model)
    assert not MergeDuplicates()(model).modified


def test_a_reduction_keeps_its_axes(rewrites) -> None:
    result = "f (float[b, 5, 8] x) => (float[b, 5, 1] y) <int64[1] last = {2}> { y = ReduceMean<keepdims=1>(x, last) }"
    given = "f (float[b, 5, 8] x) => (float[b, 5, 1] y) <int64[1] last = {2}, int64[3] t = {-1, 5, 1}> { m = ReduceMean<keepdims=0>(x, last) y = Reshape(m, t) }"
    rewrites(KeepReducedAxes(), given, result)
    rewrites(KeepReducedAxes(), given.replace("Reshape(m, t)", "Unsqueeze(m, last)"), result)


def test_a_reduction_whose_reshape_does_something_else_stays(leaves) -> None:
    leaves(
        KeepReducedAxes(),
        "f (float[4, 5, 8] x) => (float[4, 1, 5] y) <int64[1] l = {2}, int64[3] t = {4, 1, 5}> { m = ReduceMean<keepdims=0>(x, l) y = Reshape(m, t) }",
    )
    leaves(
        KeepReducedAxes(),
        "f (float[4, 8] x) => (float[4, 1] y, float[4] m) <int64[1] l = {1}> { m = ReduceMean<keepdims=0>(x, l) y = Unsqueeze(m, l) }",
    )


def flattened(shape: str, flat: str, turned: str) -> str:
    return f"""f (float{shape} x) => (float{turned} y) <int64[3] s = {{{flat}}}, int64[4] t = {{{turned.replace("[b", "-1").strip("[]")}}}> {{
        a = Reshape(x, s) c = Transpose<perm=[0, 2, 1]>(a) y = Reshape(c, t) }}"""


def test_a_transposition_between_reshapes_is_done_in_place(rewrites) -> None:
    rewrites(
        MergeReshapedTransposes(),
        flattened("[b, 4, 5, 6]", "-1, 5, 6", "[b, 4, 6, 5]"),
        "f (float[b, 4, 5, 6] x) => (float[b, 4, 6, 5] y) { y = Transpose<perm=[0, 1, 3, 2]>(x) }",
        then=DEAD,
    )


def test_other_transpositions_between_reshapes_stay(leaves) -> None:
    leaves(MergeReshapedTransposes(), flattened("[2, 4, 5, 6]", "2, 20, 6", "[2, 4, 6, 5]"))
    leaves(MergeReshapedTransposes(), flattened("[2, 4, 6, 6]", "8, 6, 6", "[4, 2, 6, 6]"))
