"""What TensorRT cannot take is refused with every reason, before anything is written."""

import dataclasses

import onnx
import onnx_ir as ir
import pytest

from isthmus.exporter.spec import SizeRange
from isthmus.exporter.target import TARGETS
from isthmus.targets.tensorrt.support import LOOP_LIMIT


def model(body, inputs="float[4,8] x", outputs="float[4,8] y", opset=23, domains="", functions=""):
    text = f'<ir_version: 10, opset_import: ["" : {opset}{domains}]> g ({inputs}) => ({outputs}) {{ {body} }}\n{functions}'
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def reasons(job, graph, target="tensorrt", sizes=None, **arguments):
    for i, node in enumerate(graph.graph):
        node.metadata_props["isthmus.module"] = f"blocks.{i}"
    asked = dataclasses.replace(job(target, **arguments), model=graph, sizes=sizes or {})
    return TARGETS[target]().unsupported(asked)


K = "k = Constant <value_ints: ints = [{}]> () {}"
LOOP = """n = Constant <value: tensor = int64 {{{}}}> () {}
y = Loop <body: graph = step (int64 i, bool c, float[4,8] h) => (bool d, float[4,8] z) {{ d = Identity(c) z = Relu(h) }}> (n, {}, x)"""
SCAN = """y, ys = Scan <num_scan_inputs: int = 1, body: graph = step (float[8] h, float[8] t) => (float[8] z, float[8] o)
{ z = Add(h, t) o = Relu(z) }> (h0, x)"""


@pytest.mark.parametrize(
    ("graph", "what", "where"),
    [
        (model("a = Constant <value_int: int = 0> () y = CumProd(x, a)", opset=26), "CumProd is not supported", "blocks.1"),
        (model("y = NonZero(x)", outputs="int64[2,N] y"), "NonZero is not supported", "blocks.0"),
        (
            model("y = ScatterND <reduction = 'add'> (x, i, u)".replace("'", '"'), "float[4,8] x, int64[2,1] i, float[2,8] u"),
            "ScatterND with reduction add is not supported",
            "blocks.0",
        ),
        (
            model(K.format(3841, "v, y = TopK(x, k)"), "float[1,8192] x", "int64[1,3841] y"),
            "TopK of 3841 elements is not supported, expected at most 3840",
            "blocks.1",
        ),
        (model("y = Attention <softcap: float = 30.0> (x, x, x)", *[f"float[1,2,4,8] {n}" for n in "xy"]), "softcap", "blocks.0"),
        (
            model("y, k, v = Attention (x, x, x, m, p, p)", "float[1,2,4,8] x, float[4,6] m, float[1,2,2,8] p",
                  "float[1,2,4,8] y, float[1,2,6,8] k, float[1,2,6,8] v"),
            "Attention with key and value outputs is not supported", "blocks.0",
        ),
        (model(LOOP.format(10, "", "")), "Loop without a condition is not supported", "blocks.1"),
        (model(LOOP.format(LOOP_LIMIT + 1, "c = Constant <value: tensor = bool {1}> ()", "c")), "Loop of 1025 steps", "blocks.2"),
        (model(SCAN, "float[8] h0, float[4096,8] x", "float[8] y, float[4096,8] ys"), "Scan of 4096 steps launches", "blocks.0"),
        (model("y = Add(x, x)", *[f"double[4] {n}" for n in "xy"]), "the input has type double, which TensorRT lacks", "x"),
        (model("c = Cast <to: int = 11> (x) d = Add(c, c) y = Cast <to: int = 1> (d)"), "Add computes in double", "blocks.1"),
        (model("y = acme.Frobnicate(x)", domains=', "acme" : 1'), "operator acme::Frobnicate has neither a plugin nor", "blocks.0"),
        (model("y = Relu(x)", "float[N,8] x", "float[N,8] y"), "its size is N, and N has no range", "x"),
    ],
    ids=lambda x: x if isinstance(x, str) and len(x) > 12 else "",
)  # fmt: skip
def test_what_is_refused(job, graph, what, where):
    found = reasons(job, graph)
    assert any(what in r.what and r.where == where for r in found), found
    assert all(r.fix for r in found)


@pytest.mark.parametrize(
    "graph",
    [
        model("y = Relu(x)", "float[N,8] x", "float[N,8] y"),
        model(K.format(3840, "v, y = TopK(x, k)"), "float[1,8192] x", "int64[1,3840] y"),
        model("y = ScatterND (x, i, u)", "float[4,8] x, int64[2,1] i, float[2,8] u"),
        model(LOOP.format(LOOP_LIMIT, "c = Constant <value: tensor = bool {1}> ()", "c")),
        model("y = Attention <softcap: float = 0.0> (x, x, x)", *[f"float[1,2,4,8] {n}" for n in "xy"]),
        model("y = acme.Twice(x)", domains=', "acme" : 1',
              functions='<domain: "acme", opset_import: ["" : 23]> Twice (x) => (y) { y = Add(x, x) }'),
    ],
)  # fmt: skip
def test_what_is_not(job, graph):
    assert reasons(job, graph, sizes={"N": SizeRange(1, 2, 4)}) == []


def test_all_reasons_come_at_once_and_once(job):
    body = "c = Cast <to: int = 11> (x) d = Det(x) e = Det(x) y = NonZero(x)"
    found = reasons(job, model(body, "float[N,4,4] x", "int64[2,M] y"))
    assert [(r.where, r.what.split(" is ")[0].split(",")[0]) for r in found] == [
        ("x", "axis 0 of the input has no range: its size"),
        ("blocks.0", "Cast computes in double"),
        ("blocks.1", "Det"),
        ("blocks.2", "Det"),
        ("blocks.3", "NonZero"),
    ]


def test_a_node_in_a_function_is_looked_at_too(job):
    functions = '<domain: "acme", opset_import: ["" : 23]> Odd (x) => (y) { y = Det(x) }'
    found = reasons(job, model("y = acme.Odd(x)", domains=', "acme" : 1', functions=functions))
    assert [r.what for r in found] == ["Det is not supported"]


class TestPluginsOfOurs:
    @pytest.mark.parametrize(
        ("target", "capabilities", "without"),
        [("tensorrt", None, None), ("tensorrt-rtx", ("8.9", "12.0"), None), ("tensorrt-rtx", ("8.6", "8.9", "12.1"), "8.6, 12.1")],
    )
    def test_gpus_that_our_kernels_are_not_compiled_for(self, job, target, capabilities, without):
        options = {"compute_capability": capabilities} if capabilities else {}
        found = TARGETS[target]().unsupported(job(target, "Scan", options=options))
        assert [r.what for r in found] == (
            [f"the kernels of SelectiveScan are compiled for compute capability 8.9, 9.0, 12.0, and not for {without}"] if without else []
        )
        assert TARGETS[target]().unsupported(job(target, "Scan", options={**options, "ssm_op": "decomposed"})) == []

    def test_every_kernel_has_an_architecture(self):
        from isthmus.exporter.ops.gpu.compile import ARCHITECTURES
        from isthmus.targets.tensorrt.support import KERNELS

        assert sorted(KERNELS.values()) == sorted(ARCHITECTURES)
