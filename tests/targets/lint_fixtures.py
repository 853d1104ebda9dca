"""Small ONNX models in which one pattern is wrong or right, for every rule of `isthmus lint`. The rules are tried on them, and
TensorRT-RTX.

A test file loads this one by its path: tests are not packages.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from isthmus.exporter.passes.infer_shapes import InferShapes
from isthmus.exporter.subject import Profile, Subject

FP16, FP32, FP8, INT64 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.FLOAT8E4M3FN, TensorProto.INT64
NUMPY = {
    FP16: np.dtype("float16"), FP32: np.dtype("float32"), INT64: np.dtype("int64"), TensorProto.BOOL: np.dtype("bool"),
    FP8: np.dtype(ml_dtypes.float8_e4m3fn), TensorProto.FLOAT8E5M2: np.dtype(ml_dtypes.float8_e5m2),
    TensorProto.FLOAT8E4M3FNUZ: np.dtype(ml_dtypes.float8_e4m3fnuz), TensorProto.FLOAT8E8M0: np.dtype(ml_dtypes.float8_e8m0fnu),
}  # fmt: skip
B, L, D, N = 1, 32, 64, 128  # batch, tokens, features in and out
DOMAIN = "isthmus"


class Graph:
    """A graph that grows by calls, each of which returns the name of what it made."""

    def __init__(self, dtype=FP16, opset=23, name=""):
        self.dtype, self.opset, self.name = dtype, opset, name
        self.nodes, self.inputs, self.outputs, self.weights, self.domains = [], [], [], [], {"": opset}
        self.rng = np.random.Generator(np.random.PCG64(0))

    def input(self, name, *shape, dtype=None):
        self.inputs.append(helper.make_tensor_value_info(name, dtype or self.dtype, shape))
        return name

    def output(self, name, *shape, dtype=None):
        self.nodes.append(helper.make_node("Identity", [name], [f"{name}.out"], name=f"{name}.out"))
        self.outputs.append(helper.make_tensor_value_info(f"{name}.out", dtype or self.dtype, shape))
        return self

    def op(self, kind, *inputs, outputs=1, domain="", module=None, **attributes):
        names = [f"{self.name}{kind}_{len(self.nodes)}.{i}" for i in range(outputs)]
        node = helper.make_node(kind, inputs, names, name=f"{self.name}{kind}_{len(self.nodes)}", domain=domain, **attributes)
        if module:
            helper.set_metadata_props(node, {"isthmus.module": module})
        if domain:
            self.domains[domain] = 1
        self.nodes.append(node)
        return names[0] if outputs == 1 else names

    def constant(self, values, dtype=None):
        dtype = dtype or self.dtype
        array = np.asarray(values).astype(NUMPY[dtype])
        name = f"{self.name}constant_{len(self.weights)}"
        self.weights.append(helper.make_tensor(name, dtype, array.shape, array.tobytes(), raw=True))
        return name

    def ints(self, *values):
        return self.constant(values, INT64)

    def random(self, *shape):
        return self.rng.standard_normal(shape) * 0.05

    def qdq(self, x, scale=0.05, *, kind=FP8, scale_dtype=None, **attributes):
        """Quantised and back, which is how an activation becomes FP8."""
        scale = self.constant(scale, scale_dtype)
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, scale, output_dtype=kind, **attributes), scale, **attributes)

    def weight(self, *shape, axis=None, block=0, kind=FP8, stored=True, module=None):
        """A weight with a scale a tensor, a channel of `axis`, or a block of rows."""
        if not stored:
            return self.constant(self.random(*shape))
        scale, attributes = 0.001, {}
        if block:
            scale, attributes = np.full((shape[0] // block, shape[1]), 0.001), {"axis": 0, "block_size": block}
        elif axis is not None:
            scale, attributes = np.full(shape[axis], 0.001), {"axis": axis}
        values = self.constant(np.clip(self.random(*shape) / 0.001, -448, 448), kind)
        return self.op("DequantizeLinear", values, self.constant(scale), module=module, **attributes)

    def body(self):
        return helper.make_graph(self.nodes, self.name or "graph", self.inputs, self.outputs, self.weights)

    def model(self, functions=()):
        imports = [helper.make_opsetid(domain, version) for domain, version in self.domains.items()]
        return helper.make_model(self.body(), opset_imports=imports, ir_version=11 if self.opset < 25 else 13, functions=functions)


def parsed(body, *, inputs, outputs, weights="", opset=23, imports="", functions=""):
    """A model in ONNX's text format."""
    head = f'<ir_version: {11 if opset < 25 else 13}, opset_import: ["" : {opset}{imports}]>'
    return onnx.parser.parse_model(f"{head}\ngraph ({inputs}) => ({outputs}) <{weights}> {{ {body} }} {functions}")


def linear(*, axis=1, block=0, activation=None, weight=True, stored=True, kind=FP8, scale_dtype=None, opset=23, gemm=False):
    """A Linear in FP8: Q/DQ on the activation, an FP8 weight, and a bias."""
    g = Graph(opset=opset)
    x = g.input("x", *((B * L, D) if gemm else (B, L, D)))
    if activation is not False:
        x = g.qdq(x, **(activation or {}), kind=kind, scale_dtype=scale_dtype)
    module = "blocks.0.mlp.fc1"
    if not weight:
        w = g.weight(*((N, D) if gemm else (D, N)), stored=False)
    elif not stored:
        w = g.qdq(g.weight(*((N, D) if gemm else (D, N)), stored=False), 0.001)
    else:
        w = g.weight(*((N, D) if gemm else (D, N)), axis=axis, block=block, kind=kind, module=module)
    bias = g.constant(g.random(N))
    if gemm:
        return g.output(g.op("Gemm", x, w, bias, transB=1, module=module), B * L, N).model()
    return g.output(g.op("Add", g.op("MatMul", x, w, module=module), bias), B, L, N).model()


def convolution(*, axis=0, group=1):
    g = Graph()
    x = g.qdq(g.input("x", B, 64, 16, 16))
    y = g.op("Conv", x, g.weight(64, 64 // group, 3, 3, axis=axis), pads=[1, 1, 1, 1], group=group, module="conv_in")
    return g.output(y, B, 64, 16, 16).model()


def attention(*, q=True, k=True, v=True, softmax=True, scale="before", head=64, tokens=128):
    """Two products and a softmax in FP8."""
    g = Graph()
    names = {name: g.input(name, B, 4, tokens, head) for name in "qkv"}
    factor = g.constant(1 / math.sqrt(head))
    if scale == "before":
        names["q"] = g.op("Mul", names["q"], factor)
    names = {name: g.qdq(x) if on else x for (name, x), on in zip(names.items(), (q, k, v), strict=True)}
    module = "blocks.0.attn"
    scores = g.op("MatMul", names["q"], g.op("Transpose", names["k"], perm=[0, 1, 3, 2]), module=module)
    if scale == "after":
        scores = g.op("Mul", scores, factor, module=module)
    weights = g.op("Softmax", scores, axis=-1, module=module)
    if softmax:
        weights = g.qdq(weights, 1 / 448)
    return g.output(g.op("MatMul", weights, names["v"], module=module), B, 4, tokens, head).model()


def concatenation(*, after):
    """Q/DQ after a Concat, or before it."""
    g = Graph()
    a, b = g.input("a", B, L, D // 2), g.input("b", B, L, D // 2)
    x = g.qdq(g.op("Concat", a, b, axis=2)) if after else g.op("Concat", g.qdq(a), g.qdq(b), axis=2)
    return g.output(g.op("MatMul", x, g.weight(D, N, axis=1)), B, L, N).model()


def attention_node(*, fp8=False, dtype=FP16, head=64, outputs=1, **attributes):
    """The operator Attention."""
    g = Graph(dtype)
    names = [g.input(name, B, 4, 128, head) for name in "qkv"]
    results = g.op("Attention", *[g.qdq(x) if fp8 else x for x in names], outputs=outputs, module="blocks.0.attn", **attributes)
    for result in [results] if outputs == 1 else results:
        g.output(result, B, 4, 128, head)
    return g.model()


SCAN_BODY = """<domain: "isthmus", opset_import: ["" : 23]>
SelectiveScan <delta_softplus, reverse> (u, delta, a, b, c, d, delta_bias, initial_state) => (y, last_state) {
  y = Identity (u) last_state = Identity (initial_state)
}"""


def scan_plugin(*, body=True, qdq=False):
    """A node of ours: a selective scan of 4 channels in one group."""
    g = Graph()
    u = g.input("u", 1, 16, 4)
    rest = [g.input(n, *shape) for n, shape in (("delta", (1, 16, 4)),)]
    wide = {"a": (4, 8), "b": (1, 16, 1, 8), "c": (1, 16, 1, 8), "d": (4,), "bias": (4,), "state": (1, 4, 8)}
    rest += [g.input(n, *shape, dtype=FP16 if n in "bc" else FP32) for n, shape in wide.items()]
    y, state = g.op(
        "SelectiveScan", g.qdq(u) if qdq else u, *rest, outputs=2, domain=DOMAIN, module="blocks.0.ssm", delta_softplus=0, reverse=0
    )
    g.output(y, 1, 16, 4).output(state, 1, 4, 8, dtype=FP32)
    return g.model(functions=[onnx.parser.parse_function(SCAN_BODY)] if body else ())


def fp32_scale():
    """An activation in half precision whose scale is float32, and which comes back in half precision."""
    g = Graph()
    x, scale = g.input("x", B, L, D), g.constant(0.05, FP32)
    x = g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, output_dtype=FP8), scale, output_dtype=FP16)
    return g.output(g.op("MatMul", x, g.weight(D, N, axis=1)), B, L, N).model()


def e8m0_scale():
    """A weight with a power of two as its scale."""
    g = Graph(opset=24)
    weight, scale = g.constant(np.ones((D, N)), FP8), g.constant(0.5, TensorProto.FLOAT8E8M0)
    w = g.op("DequantizeLinear", weight, scale, output_dtype=FP16)
    return g.output(g.op("MatMul", g.qdq(g.input("x", B, L, D)), w), B, L, N).model()


def loop(*, condition, steps):
    """A Loop that hands its condition on."""
    body = "body = step (int64 i, bool c, float16[2,8] h) => (bool co, float16[2,8] ho) { co = Identity (c) ho = Relu (h) }"
    weights = f"int64 steps = {{{steps}}}, bool yes = {{1}}"
    return parsed(
        f"y = Loop <{body}> (steps, {'yes' if condition else ''}, x)", inputs="float16[2,8] x", outputs="float16[2,8] y", weights=weights
    )


def line(body, inputs, outputs, weights="", opset=23):
    """A model of a few nodes in half precision, in ONNX's text format."""
    return parsed(body, inputs=inputs, outputs=outputs, weights=weights, opset=opset)


def scatter(reduction):
    return line(
        f'y = ScatterND <reduction = "{reduction}"> (x, i, u)', "float16[64,8] x, int64[16,1] i, float16[16,8] u", "float16[64,8] y"
    )


def top(k):
    return line("v, i = TopK (x, k)", "float16[2,8192] x", f"float16[2,{k}] v, int64[2,{k}] i", f"int64[1] k = {{{k}}}")


def foreign(op_type, function=""):
    return parsed(f"y = acme.{op_type} (x)", inputs="float16[2,8] x", outputs="float16[2,8] y", imports=', "acme" : 1', functions=function)


FUNCTION = '<domain: "acme", opset_import: ["" : 23]> Frobnicate (x) => (y) { y = Relu (x) }'


@dataclass(frozen=True)
class Given:
    """A model, and what else a subject has.

    Attributes:
        model: Makes it.
        subject: Arguments of `Subject`.
        library: The names of the plugins in the library beside it; empty for no library.
    """

    model: Callable[[], onnx.ModelProto]
    subject: Mapping[str, Any] = field(default_factory=dict)
    library: tuple[str, ...] = ()

    def open(self, folder, **more) -> Subject:
        """The subject, whose files go into a folder."""
        model = ir.from_proto(self.model())
        InferShapes()(model)
        plugins = ()
        if self.library:
            plugins = (folder / "plugins.so",)
            plugins[0].write_bytes(b"\0".join([b"", *(name.encode() for name in self.library), b""]))
        return Subject(model, **{"plugins": plugins, **self.subject, **more})


@dataclass(frozen=True)
class Fixture:
    """What a rule objects to, and the like of it that is in order."""

    wrong: Given
    right: Given


def pair(wrong, right):
    return Fixture(Given(wrong), Given(right))


def vector(n):
    return {"scale": np.full(n, 0.05), "axis": 2}


RELU = "y = Relu (x)"
SCAN = ("SelectiveScan",)
DYNAMIC = {"profiles": {"x": Profile((1, 8), (2, 8), (4, 8))}, "cases": {"example": {"x": (2, 8)}}}

FIXTURES = {
    "TRT-101": pair(lambda: linear(axis=0), linear),
    "TRT-102": pair(lambda: linear(activation=vector(D)), linear),
    "TRT-103": pair(lambda: linear(activation=False), lambda: linear(activation=False, weight=False)),
    "TRT-104": pair(lambda: linear(block=32), lambda: linear(axis=None)),
    "TRT-105": pair(lambda: convolution(axis=1), convolution),
    "TRT-106": pair(lambda: linear(stored=False), linear),
    "TRT-107": pair(lambda: concatenation(after=False), lambda: concatenation(after=True)),
    "TRT-108": Fixture(Given(lambda: scan_plugin(qdq=True), library=SCAN), Given(scan_plugin, library=SCAN)),
    "TRT-109": pair(lambda: convolution(group=64), convolution),
    "TRT-201": pair(lambda: attention_node(fp8=True), attention_node),
    "TRT-202": pair(lambda: attention(v=False), attention),
    "TRT-203": pair(lambda: attention(softmax=False), attention),
    "TRT-204": pair(lambda: attention(scale="after"), lambda: attention(q=False, k=False, v=False, softmax=False, scale="after")),
    "TRT-205": pair(lambda: attention(head=72), lambda: attention(head=80)),
    "TRT-206": pair(lambda: attention(head=512), lambda: attention(head=256)),
    "TRT-301": pair(lambda: linear(kind=TensorProto.FLOAT8E5M2), linear),
    "TRT-302": pair(fp32_scale, linear),
    "TRT-303": pair(e8m0_scale, lambda: linear(axis=None, opset=24)),
    "TRT-304": pair(lambda: linear(opset=25), lambda: linear(opset=24)),
    "TRT-305": pair(
        lambda: line("a = Add (x, x) b = Cast <to = 10> (a) y = Mul (b, z)", "int64[2,4096] x, float16[2,4096] z", "float16[2,4096] y"),
        lambda: line("a = Cast <to = 10> (x) b = Add (a, a) y = Mul (b, z)", "int64[2,4096] x, float16[2,4096] z", "float16[2,4096] y"),
    ),
    "TRT-306": pair(
        lambda: line("y = MatMul (x, x)", "int32[8,8] x", "int32[8,8] y"),
        lambda: line("a = Cast <to = 1> (x) b = MatMul (a, a) y = Cast <to = 6> (b)", "int32[8,8] x", "int32[8,8] y"),
    ),
    "TRT-307": pair(
        lambda: line("y = Cast <to = 10> (x)", "uint32[8] x", "float16[8] y"),
        lambda: line("y = Cast <to = 10> (x)", "int32[8] x", "float16[8] y"),
    ),
    "TRT-401": pair(
        lambda: line("y = CumProd (x, axis)", "float16[64,8] x", "float16[64,8] y", "int64 axis = {1}", opset=26),
        lambda: line("y = CumSum (x, axis)", "float16[64,8] x", "float16[64,8] y", "int64 axis = {1}", opset=26),
    ),
    "TRT-402": pair(
        lambda: line("y = NonZero (x)", "float16[64,8] x", "int64[2,n] y"), lambda: line(RELU, "float16[2,8] x", "float16[2,8] y")
    ),
    "TRT-403": pair(lambda: scatter("add"), lambda: scatter("none")),
    "TRT-404": pair(lambda: top(3841), lambda: top(3840)),
    "TRT-405": pair(lambda: attention_node(softcap=30.0), lambda: attention_node(softcap=0.0)),
    "TRT-406": pair(lambda: attention_node(dtype=FP32), attention_node),
    "TRT-407": pair(lambda: attention_node(head=264), lambda: attention_node(head=256)),
    "TRT-408": pair(lambda: loop(condition=False, steps=16), lambda: loop(condition=True, steps=16)),
    "TRT-409": pair(lambda: loop(condition=True, steps=65), lambda: loop(condition=True, steps=64)),
    "TRT-501": pair(lambda: foreign("Frobnicate"), lambda: foreign("Frobnicate", FUNCTION)),
    "TRT-502": pair(lambda: foreign("Relu"), lambda: line(RELU, "float16[2,8] x", "float16[2,8] y")),
    "TRT-503": Fixture(Given(lambda: scan_plugin(body=False)), Given(lambda: scan_plugin(body=False), library=SCAN)),
    "TRT-504": Fixture(
        Given(lambda: line(RELU, "float16[batch,8] x", "float16[batch,8] y"), {"profiles": {}, "cases": DYNAMIC["cases"]}),
        Given(lambda: line(RELU, "float16[batch,8] x", "float16[batch,8] y"), DYNAMIC),
    ),
}
"""By the rule's id. Nothing in a fixture is wrong but what its rule is about."""
