"""TensorRT-RTX loads the plugin library, finds the plugins, and builds plans. It runs nothing: that needs a GPU."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from isthmus.exporter.op import OPS
from isthmus.exporter.ops import onnx_forms
from isthmus.exporter.ops.gpu import plan as plans
from isthmus.exporter.ops.plugin import build


def _nodes():
    spec = spec_from_file_location("plugin_nodes", Path(__file__).with_name("nodes.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NODES = _nodes()
FORMS = NODES.FORMS
FP8 = NODES.FP8
SIZES = NODES.SIZES
TYPES = NODES.TYPES
described = NODES.described
described_fp8 = NODES.described_fp8
fields = NODES.fields


# What runs in a process of its own, because TensorRT ends the process where it finds a fault in itself: builds every job of a list for an
# architecture, and writes a line of JSON for each.
RTX_CHILD = """
import json, sys
try:
    import tensorrt_rtx as trt
except ImportError:
    import tensorrt_rtx_bindings as trt

class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.lines = []
    def log(self, severity, message):
        if int(severity) <= int(trt.ILogger.Severity.ERROR):
            self.lines.append(message)

library, jobs = sys.argv[1], json.load(open(sys.argv[2]))
log = Log()
registry = trt.get_plugin_registry()
loaded = registry.load_library(library) is not None
print(json.dumps({"loaded": loaded, "creators": [c.name for c in registry.all_creators]}), flush=True)
for job in jobs:
    log.lines.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if job["override"]:
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    plan, layers = None, []
    if parser.parse(open(job["model"], "rb").read()):
        layers = [network.get_layer(i).type.name for i in range(network.num_layers)]
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, job["architecture"]), 0)
        if job["embed"]:
            config.plugins_to_serialize = [library]
        if job["profile"]:
            profile = builder.create_optimization_profile()
            for name, shapes in job["profile"].items():
                profile.set_shape(name, *shapes)
            config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
    size = None if plan is None else plan.nbytes
    print(json.dumps({"name": job["name"], "plan": size, "layers": layers, "errors": log.lines}), flush=True)
"""


class RTXJobs:
    """Models for TensorRT-RTX, which are built by one process when the first result is asked for."""

    def __init__(self, folder: Path, library: Path) -> None:
        self.folder, self.library, self.jobs = folder, library, []

    def add(self, name, model, *, architecture="SM89", override=False, profile=None, embed=False):
        path = self.folder / f"{len(self.jobs)}.onnx"
        path.write_bytes(model.SerializeToString())
        job = {"name": name, "model": str(path), "architecture": architecture, "override": override, "profile": profile, "embed": embed}
        self.jobs.append(job)

    @functools.cached_property
    def results(self):
        (self.folder / "jobs.json").write_text(json.dumps(self.jobs))
        libraries = Path(importlib.util.find_spec("tensorrt_rtx_libs").origin).parent
        # The parser opens a name that the wheel (1.7.1) does not have, and the process ends. Drop the link when the wheel ships it.
        (self.folder / "libtensorrt_rtx.so").symlink_to(libraries / "libtensorrt_rtx.so.1")
        environment = {**os.environ, "LD_LIBRARY_PATH": f"{self.folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
        command = [sys.executable, "-c", RTX_CHILD, str(self.library), str(self.folder / "jobs.json")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert done.returncode == 0, f"the process ended with {done.returncode} after {lines[-1:]}\n{done.stderr[-2000:]}"
        return {line.get("name", "library"): line for line in lines} | {"log": done.stderr}


def dims(shape, axes):
    return [axes.get(i, d) for i, d in enumerate(shape)]


def node_model(domain, opset, op_type, names, inputs, outputs, attributes, *, body=False):
    """A model of one node between others."""
    nodes = [
        helper.make_node("Identity", [names[0]], ["first"]),
        helper.make_node(
            op_type, ["first", *names[1:]], [f"out{i}" for i in range(len(outputs))], domain=domain, name="the node", **attributes
        ),
        *(helper.make_node("Identity", [f"out{i}"], [f"result{i}"]) for i in range(len(outputs))),
    ]
    values = [helper.make_tensor_value_info(n, TYPES[t], s) for n, (t, s) in zip(names, inputs, strict=True)]
    results = [helper.make_tensor_value_info(f"result{i}", TYPES[t], s) for i, (t, s) in enumerate(outputs)]
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    graph = helper.make_graph(nodes, "graph", values, results)
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    if body:
        import onnx_ir as ir

        model.functions.append(ir.serde.serialize_function(onnx_forms.function(op_type, opset)))
    return model


def form_model(name, op_type, dtype, *, dynamic=False, body=False):
    """A model of one of our nodes, and the profile of its inputs where batch and length are dynamic."""
    op = OPS[name]
    form = plans.form_of(op, op_type)
    inputs, outputs = described(op, op_type, dtype)
    profile = None
    if dynamic:
        free = dict.fromkeys(("batch", "length", "tokens"), None)
        ends = [
            described(op, op_type, dtype, {**SIZES, **change})[0]
            for change in (dict.fromkeys(free, 1), {}, {"batch": 8, "length": 4096, "tokens": 512})
        ]
        profile = {n: [shape for _, shape in shapes] for n, *shapes in zip(form.inputs, *ends, strict=True)}
        known = {a.name: a for a in (*op.inputs, *op.outputs)}

        def open_(argument, row):
            return row[0], [d if d in free else s for d, s in zip(known[argument].shape, row[1], strict=True)]

        inputs = [open_(n, row) for n, row in zip(form.inputs, inputs, strict=True)]
        outputs = [open_(a.name, row) for a, row in zip(op.outputs, outputs, strict=True)]
    return node_model("isthmus", 21, op_type, form.inputs, inputs, outputs, fields(op, op_type), body=body), profile


WAYS = {
    "node, SM89": {},
    "node, SM120": {"architecture": "SM120"},
    "node, dynamic": {"dynamic": True},
    "body": {"body": True, "override": True},
    "body, dynamic, SM120": {"body": True, "override": True, "dynamic": True, "architecture": "SM120"},
}
STANDARD_NODES = {
    "LinearAttention, linear": ("LinearAttention", 3, {"update_rule": "linear"}),
    "LinearAttention, linear, state": ("LinearAttention", 4, {"update_rule": "linear"}),
    "LinearAttention, gated": ("LinearAttention", 5, {"update_rule": "gated", "scale": 0.25}),
    "LinearAttention, delta": ("LinearAttention", 6, {"update_rule": "delta"}),
    "LinearAttention, default": ("LinearAttention", 6, {}),
    "CausalConvWithState": ("CausalConvWithState", 2, {}),
    "CausalConvWithState, bias": ("CausalConvWithState", 3, {"activation": "silu"}),
    "CausalConvWithState, state": ("CausalConvWithState", 4, {"activation": "swish"}),
}
REFUSED = {
    "update rule": ("LinearAttention", 6, {"update_rule": "cubic"}, "update_rule is 'cubic', expected one of"),
    "decay": ("LinearAttention", 4, {"update_rule": "gated"}, "update_rule gated: has 4 inputs"),
    "activation": ("CausalConvWithState", 4, {"activation": "gelu"}, "activation is 'gelu', expected silu, swish or none"),
    "half state": ("LinearAttention", 4, {"update_rule": "linear"}, "initial_state is float16, expected float32"),
}


def standard_model(op_type, count, attributes, dtype, *, state="float32"):
    if op_type == "CausalConvWithState":
        inputs, outputs = described(OPS["causal_conv1d"], "CausalConv1d", dtype)
    else:
        op = OPS["linear_attention"]
        inputs, outputs = described(op, "GatedDeltaLinearAttention", dtype)
        attributes = {"q_num_heads": SIZES["q_num_heads"], "kv_num_heads": SIZES["kv_num_heads"], **attributes}
        inputs[3], outputs[1] = (state, inputs[3][1]), (state, outputs[1][1])
    names = [f"in{i}" for i in range(count)]
    return node_model("", 27, op_type, names, inputs[:count], outputs, attributes)


def fp8_model(op_type, out):
    """A model of linear attention whose queries, keys and values are quantized before the node."""
    op = OPS["linear_attention"]
    inputs, outputs = described_fp8(op_type, out)
    names = plans.form_of(op, op_type).inputs
    quantized = [n for n, (t, _) in zip(names, inputs, strict=True) if t == FP8]
    scale = helper.make_tensor("scale", TYPES[out], [], [0.01])
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    passed = [f"{n}_fp8" if n in quantized else n for n in names]
    nodes = [
        *(helper.make_node("QuantizeLinear", [n, "scale", "zero"], [f"{n}_fp8"]) for n in quantized),
        helper.make_node(op_type, passed, ["y", "last_state"], domain="isthmus", name="the node", **fields(op, op_type)),
    ]
    values = [helper.make_tensor_value_info(n, TYPES[out if t == FP8 else t], s) for n, (t, s) in zip(names, inputs, strict=True)]
    results = [helper.make_tensor_value_info(n, TYPES[t], s) for n, (t, s) in zip(("y", "last_state"), outputs, strict=True)]
    graph = helper.make_graph(nodes, "graph", values, results, initializer=[scale, zero])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("isthmus", 1)], ir_version=10)


FP8_NODES = [("PlainLinearAttention", "float16"), ("GatedLinearAttention", "float16"), ("GatedLinearAttention", "bfloat16")]


@pytest.fixture(scope="module")
def rtx(implementation, tmp_path_factory):
    if importlib.util.find_spec("tensorrt_rtx_libs") is None:
        pytest.skip("not run: tensorrt-rtx is not installed (pip install tensorrt-rtx==1.7.1.116)")
    jobs = RTXJobs(tmp_path_factory.mktemp("rtx"), build.build(architectures=()))
    for name, op_type in FORMS:
        for dtype in TYPES:
            for way, options in WAYS.items():
                model, profile = form_model(name, op_type, dtype, dynamic=options.get("dynamic", False), body=options.get("body", False))
                rest = {k: v for k, v in options.items() if k in ("architecture", "override")}
                jobs.add(f"{op_type}, {dtype}, {way}", model, profile=profile, **rest)
    for label, (op_type, count, attributes) in STANDARD_NODES.items():
        for dtype in TYPES:
            jobs.add(f"{label}, {dtype}", standard_model(op_type, count, attributes, dtype))
    for label, (op_type, count, attributes, _) in REFUSED.items():
        state = "float16" if label == "half state" else "float32"
        jobs.add(f"refused, {label}", standard_model(op_type, count, attributes, "float16", state=state))
    for op_type, out in [*FP8_NODES, ("GatedDeltaLinearAttention", "float16")]:
        for architecture in ("SM89", "SM120"):
            jobs.add(f"{op_type}, FP8 to {out}, {architecture}", fp8_model(op_type, out), architecture=architecture)
    model, _ = form_model("rwkv7", "RWKV7", "float16")
    jobs.add("embedded", model, embed=True)
    return jobs


@pytest.mark.xdist_group("tensorrt-rtx")  # one process builds each plan once
class TestRTX:
    """TensorRT-RTX loads the library, finds the plugins, and builds plans. It runs nothing: that needs a GPU."""

    def test_the_library_loads(self, rtx, host):
        assert rtx.results["library"]["loaded"]
        assert set(host.names) <= set(rtx.results["library"]["creators"])

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize(("name", "op_type"), FORMS)
    def test_a_plan_builds(self, rtx, name, op_type, dtype, way):
        result = rtx.results[f"{op_type}, {dtype}, {way}"]
        assert result["plan"], result["errors"]
        assert result["layers"].count("PLUGIN_V3") == 1

    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize("label", STANDARD_NODES)
    def test_a_plan_of_a_standard_operator_builds(self, rtx, label, dtype):
        result = rtx.results[f"{label}, {dtype}"]
        assert result["plan"], result["errors"]
        assert result["layers"].count("PLUGIN_V3") == 1

    @pytest.mark.parametrize("label", REFUSED)
    def test_a_refusal_says_why(self, rtx, label):
        result = rtx.results[f"refused, {label}"]
        assert result["plan"] is None
        assert result["errors"]
        # While a network is built TensorRT names no logger to plugins, and they write to the standard error stream.
        assert any(REFUSED[label][3] in line and '"the node"' in line for line in rtx.results["log"].splitlines())

    @pytest.mark.parametrize("architecture", ["SM89", "SM120"])
    @pytest.mark.parametrize(("op_type", "out"), FP8_NODES)
    def test_a_plan_of_fp8_inputs_builds(self, rtx, op_type, out, architecture):
        result = rtx.results[f"{op_type}, FP8 to {out}, {architecture}"]
        assert result["plan"], result["errors"]
        assert result["layers"].count("PLUGIN_V3") == 1
        assert result["layers"].count("QUANTIZE") == 3

    def test_fp8_keys_of_a_delta_rule_are_refused(self, rtx):
        result = rtx.results["GatedDeltaLinearAttention, FP8 to float16, SM89"]
        assert result["plan"] is None
        assert "q is float8_e4m3fn, which no kernel of GatedDeltaLinearAttention takes; dequantize the inputs" in rtx.results["log"]

    def test_the_library_goes_into_the_plan(self, rtx):
        alone, embedded = (rtx.results[name]["plan"] for name in ("RWKV7, float16, node, SM89", "embedded"))
        assert embedded - alone >= rtx.library.stat().st_size
