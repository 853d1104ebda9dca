"""The TensorRT plugin library: against the schemas, with a recording driver, and in TensorRT-RTX, which builds plans without a GPU."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from isthmus.exporter.errors import IsthmusError, MachineError
from isthmus.exporter.op import OPS
from isthmus.exporter.ops import onnx_forms
from isthmus.exporter.ops.gpu import compile as gpu_compile
from isthmus.exporter.ops.gpu import plan as plans
from isthmus.exporter.ops.plugin import build, headers, quick, tables
from isthmus.exporter.ops.plugin.host import Host, Recorder

STANDARD = ("LinearAttention", "CausalConvWithState")
FORMS = [(name, form.op_type) for name in OPS if OPS[name].has("tensorrt") for form in OPS[name].forms]
SIZES = {
    "batch": 2, "length": 40, "channels": 12, "groups": 3, "state": 16, "width": 4, "tokens": 24, "key": 16, "value": 24,
    "num_heads": 2, "q_num_heads": 4, "kv_num_heads": 2, "decays": 1, "betas": 2,
}  # fmt: skip
ATTRIBUTES = {
    "delta_softplus": 1, "reverse": 1, "num_heads": 2, "eps": 0.25, "q_num_heads": 4, "kv_num_heads": 2, "scale": 0.5, "silu": 1,
}  # fmt: skip
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def size(dim, sizes):
    return dim if isinstance(dim, int) else sizes[dim[:-2]] - 1 if dim.endswith("-1") else int(np.prod([sizes[f] for f in dim.split("*")]))


def described(op, op_type, dtype, sizes=SIZES):
    """Dtype and shape of the inputs and of the outputs of a node."""
    known = {a.name: a for a in op.inputs}
    arguments = [[known[n] for n in plans.form_of(op, op_type).inputs], list(op.outputs)]
    return [[("float32" if a.wide else dtype, tuple(size(d, sizes) for d in a.shape)) for a in some] for some in arguments]


def fields(op, op_type):
    form = plans.form_of(op, op_type)
    return {a.name: ATTRIBUTES[a.name] for a in op.attributes if a.name not in form.fixed}


@pytest.fixture(scope="module")
def implementation(request):
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("tensorrt_launch_helpers", Path(__file__).parent / "implementations" / "tensorrt_launch.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    if reason := module.not_run():
        pytest.skip(f"not run: {reason}")
    return module


@pytest.fixture(scope="module")
def host(implementation) -> Host:
    return implementation.host()


@pytest.fixture
def recorder(host):
    driver = Recorder()
    host.use(driver)
    yield driver
    host.use(None)


class TestSchema:
    """What the C++ files say again is what the schemas say."""

    def test_every_form_and_standard_operator_has_a_creator(self, host):
        assert sorted(host.names) == sorted({t for _, t in FORMS} | set(STANDARD))

    @pytest.mark.parametrize(("name", "op_type"), FORMS)
    def test_the_attributes(self, host, name, op_type):
        kinds = {bool: 5, int: 5, float: 1}
        op, form = OPS[name], plans.form_of(OPS[name], op_type)
        expected = {a.name: kinds[a.type] for a in op.attributes if a.name not in form.fixed}
        found = host.field_names(op_type)
        if op_type in STANDARD:
            found = {n: kind for n, kind in found.items() if n not in ("update_rule", "chunk_size")}
        assert found == expected

    @pytest.mark.parametrize(("name", "op_type"), FORMS)
    def test_defaults(self, host, name, op_type):
        op, form = OPS[name], plans.form_of(OPS[name], op_type)
        needed = {a.name: ATTRIBUTES[a.name] for a in op.attributes if a.name not in form.fixed and a.default is None}
        defaults = {a.name: a.type(a.default) * 1 for a in op.attributes if a.name not in form.fixed and a.default is not None}
        got = host.create(op_type, needed).fields()
        assert {n: got[n] for n in defaults} == {n: pytest.approx(v, rel=1e-7) for n, v in defaults.items()}

    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize(("name", "op_type"), FORMS)
    def test_shapes_and_types(self, host, name, op_type, dtype):
        inputs, outputs = described(OPS[name], op_type, dtype)
        plugin = host.create(op_type, fields(OPS[name], op_type))
        assert plugin.infer(inputs) == outputs
        assert plugin.supports([*inputs, *outputs], len(outputs))
        assert not plugin.supports([*inputs, *outputs], len(outputs), tensor_format=1)

    @pytest.mark.parametrize(("name", "op_type"), FORMS)
    def test_what_the_schema_refuses_is_refused(self, host, name, op_type):
        op = OPS[name]
        inputs, outputs = described(op, op_type, "float16")
        names = plans.form_of(op, op_type).inputs
        attributes = {**{a.name: a.default for a in op.attributes}, **fields(op, op_type), **plans.form_of(op, op_type).fixed}
        plugin = host.create(op_type, fields(op, op_type))
        plugin.configure([*inputs, *outputs], len(outputs))
        refused = 0
        for i, (dtype, shape) in enumerate(inputs):
            for axis in range(len(shape)):
                other = (*shape[:axis], shape[axis] + 1, *shape[axis + 1 :])
                changed = [*inputs[:i], (dtype, other), *inputs[i + 1 :]]
                try:
                    op.infer(dict(zip(names, (s for _, s in changed), strict=True)), attributes)
                except IsthmusError:
                    refused += 1
                    with pytest.raises(IsthmusError, match=f"{op_type} returned"):
                        plugin.configure([*changed, *outputs], len(outputs))
        assert refused >= len(inputs)

    @pytest.mark.parametrize(("name", "op_type"), FORMS)
    def test_a_state_of_another_type_is_refused_with_its_name(self, host, name, op_type):
        op = OPS[name]
        inputs, _ = described(op, op_type, "float16")
        names = plans.form_of(op, op_type).inputs
        for i, argument in enumerate(names):
            wrong = "float32" if inputs[i][0] == "float16" else "float16"
            if i == 0:
                wrong = "int32"
            changed = [*inputs[:i], (wrong, inputs[i][1]), *inputs[i + 1 :]]
            with pytest.raises(IsthmusError, match=f"{argument} is {wrong}"):
                host.create(op_type, fields(op, op_type)).infer(changed)


class TestAttributes:
    """Attributes go into an engine and come back; what makes no sense is refused with a message."""

    @pytest.mark.parametrize(("name", "op_type"), FORMS)
    def test_round_trip(self, host, name, op_type):
        given = fields(OPS[name], op_type)
        plugin = host.create(op_type, given)
        assert {n: v for n, v in plugin.fields().items() if n in given} == given
        assert plugin.restored().fields() == plugin.fields()

    def test_round_trip_of_the_standard_operators(self, host):
        heads = {"q_num_heads": 4, "kv_num_heads": 2}
        attention = {**heads, "update_rule": "gated", "scale": 0.125, "chunk_size": 64}
        assert host.create("LinearAttention", attention).restored().fields() == attention
        assert host.create("CausalConvWithState", {"activation": "silu", "ndim": 1}).restored().fields() == {
            "activation": "silu",
            "ndim": 1,
        }

    @pytest.mark.parametrize(
        ("op_type", "attributes", "message"),
        [
            ("RWKV7", {}, "has no attribute num_heads"),
            ("RWKV7", {"num_heads": 0}, "num_heads is 0, expected at least 1"),
            ("RWKV7", {"num_heads": 2, "colour": 3}, "has no attribute colour"),
            ("RWKV7", {"num_heads": 2.0}, "num_heads has the field type 1"),
            ("SelectiveScan", {"reverse": -1}, "reverse is -1"),
            ("GatedLinearAttention", {"q_num_heads": 2, "kv_num_heads": 2, "scale": float("inf")}, "scale is not finite"),
        ],
    )
    def test_refusals_when_created(self, host, op_type, attributes, message):
        with pytest.raises(IsthmusError, match=message):
            host.create(op_type, attributes, "layer")

    @pytest.mark.parametrize(
        ("op_type", "attributes", "inputs", "message"),
        [
            ("LinearAttention", {"update_rule": "cubic"}, 6, "update_rule is 'cubic', expected one of linear, gated, delta, gated_delta"),
            ("LinearAttention", {"update_rule": "gated"}, 4, "update_rule gated: has 4 inputs, expected 5 to 6"),
            ("LinearAttention", {"update_rule": "gated_delta"}, 4, "update_rule gated_delta: has 4 inputs, expected 6"),
            ("LinearAttention", {"update_rule": "gated_delta"}, 5, "update_rule gated_delta: has 5 inputs, expected 6"),
            ("CausalConvWithState", {"activation": "gelu"}, 4, "activation is 'gelu', expected silu, swish or none"),
            ("CausalConvWithState", {"ndim": 2}, 4, "ndim is 2, expected 1"),
            ("CausalConv1d", {}, 3, "has 3 inputs, expected 4"),
            ("NormalizedLinearAttention", {"num_heads": 2, "eps": -1.0}, 3, "eps is -1.0+, expected at least 0"),
        ],
    )
    def test_refusals_when_connected(self, host, op_type, attributes, inputs, message):
        heads = {"q_num_heads": 2, "kv_num_heads": 2} if op_type == "LinearAttention" else {}
        plugin = host.create(op_type, {**heads, **attributes}, "layer")
        with pytest.raises(IsthmusError, match=message):
            plugin.infer([("float16", (1, 4, 8))] * inputs)


def attention_inputs(rng, rule, *, extra=False):
    """Inputs of a standard LinearAttention node in order, and the reference's by name."""
    batch, length, heads, key, value = 2, 20, 2, 16, 8
    k = rng.standard_normal((batch, length, heads, key))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = {
        "q": rng.standard_normal((batch, length, 2 * heads * key)),
        "k": k.reshape(batch, length, -1),
        "v": rng.standard_normal((batch, length, heads * value)),
        "initial_state": rng.standard_normal((batch, heads, key, value)),
        "decay": -rng.uniform(0.0, 1.0, (batch, length, heads)),
        "beta": rng.uniform(0.0, 1.0, (batch, length, heads)),
    }
    arrays = {n: x.astype(np.float32) for n, x in arrays.items()}
    count = 6 if extra or "delta" in rule else 5 if rule == "gated" else 4
    used = {"q", "k", "v", "initial_state"} | ({"decay"} if "gated" in rule else set()) | ({"beta"} if "delta" in rule else set())
    return list(arrays.values())[:count], {n: x for n, x in arrays.items() if n in used}


def execute(implementation, host, recorder, op_type, attributes, inputs):
    """The outputs of a node, through the plugin and the interpreter."""
    given = [implementation.placed(x) for x in inputs]
    plugin = host.create(op_type, attributes)
    described = [(x.dtype.name, x.shape) for x in given]
    results = plugin.infer(described)
    outputs = [implementation.buffer(4 * int(np.prod(s))).view(np.float32).reshape(s) for _, s in results]
    workspace = implementation.buffer(plugin.configure([*described, *results], len(results)))
    plugin.enqueue([*given, *outputs], len(outputs), workspace)
    memory = {str(i): x for i, x in enumerate([*given, *outputs, workspace])}
    recorder.replay(memory)
    return outputs


class TestRecordedLaunches:
    """What the library launches is what the plan says, in the dtypes in which the sweep does not execute it."""

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize(("name", "case"), [(n, c.name) for n in OPS if OPS[n].has("cases") for c in OPS[n].part("cases").cases()])
    def test_the_launches_are_the_plans(self, implementation, sweep, name, case, dtype):
        op = OPS[name]
        inputs, attributes, _ = sweep.prepared(name, case, dtype)
        recorder, *_ = implementation.record(op, dict(inputs), attributes)
        sizes = op.infer({n: x.shape for n, x in inputs.items()}, attributes)
        plan = plans.choose(op.part("gpu").plans(), op.form(frozenset(inputs), attributes).op_type, dtype, sizes)
        known = plans.values(op, plan, sizes, attributes)
        expected = [(launch, g) for launch in plan.launches if (g := plans.grid(launch, known)) is not None]
        assert [(launched.kernel, launched.grid) for launched in recorder.launches] == [(launch.name, g) for launch, g in expected]
        for launched, (launch, _) in zip(recorder.launches, expected, strict=True):
            found, of, parameters = launched.plan()
            assert (found.name, found.dtype, of) == (plan.name, dtype, launch)
            assert launched.block == (32 * launch.warps, 1, 1)
            for parameter, value in zip(parameters, launched.arguments[:-2], strict=True):
                if parameter.kind == "int":
                    assert value == plans.integer(launch, parameter, known), parameter.name
                elif parameter.kind == "float":
                    assert value == np.float32(attributes[parameter.text]), parameter.name


class TestStandardOperators:
    """The opset-27 operators, which share kernels with ours, and may leave inputs out at the end."""

    @pytest.mark.parametrize("extra", [False, True], ids=["as many inputs as needed", "all inputs"])
    @pytest.mark.parametrize("rule", ["linear", "gated", "delta", "gated_delta"])
    def test_linear_attention(self, implementation, host, recorder, sweep, rule, extra):
        inputs, named = attention_inputs(np.random.Generator(np.random.PCG64(3)), rule, extra=extra)
        attributes = {"q_num_heads": 4, "kv_num_heads": 2, "update_rule": rule, "scale": 0.0}
        outputs = execute(implementation, host, recorder, "LinearAttention", {**attributes, "chunk_size": 0}, inputs)
        op = OPS["linear_attention"]
        sweep.check(
            op,
            dict(zip(["y", "last_state"], outputs, strict=True)),
            op.part("reference").reference(named, attributes),
            "float32",
            "float32",
        )

    def test_a_state_that_is_left_out_is_zeros(self, implementation, host, recorder, sweep):
        inputs, named = attention_inputs(np.random.Generator(np.random.PCG64(3)), "linear")
        attributes = {"q_num_heads": 4, "kv_num_heads": 2, "update_rule": "linear", "scale": 0.0}
        outputs = execute(implementation, host, recorder, "LinearAttention", {**attributes, "chunk_size": 0}, inputs[:3])
        assert [bytes_ for _, value, bytes_ in recorder.fills if value == 0] == [named["initial_state"].nbytes]
        del named["initial_state"]
        op = OPS["linear_attention"]
        sweep.check(
            op,
            dict(zip(["y", "last_state"], outputs, strict=True)),
            op.part("reference").reference(named, attributes),
            "float32",
            "float32",
        )

    @pytest.mark.parametrize("count", [2, 3, 4])
    @pytest.mark.parametrize("activation", ["none", "silu", "swish"])
    def test_causal_convolution(self, implementation, host, recorder, sweep, activation, count):
        rng = np.random.Generator(np.random.PCG64(5))
        shapes = {"x": (2, 5, 33), "weight": (5, 1, 4), "bias": (5,), "initial_state": (2, 5, 3)}
        named = {n: rng.standard_normal(s).astype(np.float32) for n, s in list(shapes.items())[:count]}
        outputs = execute(
            implementation, host, recorder, "CausalConvWithState", {"activation": activation, "ndim": 1}, list(named.values())
        )
        op = OPS["causal_conv1d"]
        reference = op.part("reference").reference(named, {"silu": activation != "none"})
        sweep.check(op, dict(zip(["y", "last_state"], outputs, strict=True)), reference, "float32", "float32")


class TestLaunches:
    """What the driver is told."""

    def prepared(self, implementation, host):
        inputs, outputs = described(OPS["causal_conv1d"], "CausalConv1d", "float16")
        arrays = [implementation.buffer(2 * int(np.prod(s))).view(np.float16).reshape(s) for _, s in (*inputs, *outputs)]
        return host.create("CausalConv1d", {"silu": 1}, "a layer"), arrays

    def test_a_launch(self, implementation, host, recorder):
        plugin, arrays = self.prepared(implementation, host)
        plugin.enqueue(arrays, 2, implementation.buffer(0), stream=77)
        (launched,) = recorder.launches
        plan, launch, parameters = launched.plan()
        assert plan.name == "long"
        sizes = {**SIZES, "silu": 1}
        assert launched.grid == plans.grid(launch, sizes)
        assert (launched.block, launched.shared, launched.stream) == ((32 * launch.warps, 1, 1), tables.STUB_SHARED, 77)
        assert launched.kernel == launch.name
        named = dict(zip(["x", "weight", "bias", "initial_state", "y", "last_state"], arrays, strict=True))
        expected = [named[p.text].ctypes.data if p.kind == "pointer" else plans.integer(launch, p, sizes) for p in parameters]
        assert list(launched.arguments) == [*expected, 0, 0]
        # 50 000 bytes of shared memory are past what a function gets unasked.
        assert recorder.calls.index("function_attribute") < recorder.calls.index("launch")

    def test_layers_share_a_module_and_the_last_one_unloads_it(self, implementation, host, recorder):
        first, arrays = self.prepared(implementation, host)
        first.enqueue(arrays, 2, implementation.buffer(0))
        assert (recorder.calls.count("load"), recorder.calls.count("unload")) == (1, 1)

    @pytest.mark.parametrize("call", ["context", "device", "device_attribute", "load", "function", "function_attribute", "launch"])
    def test_an_error_of_the_driver_has_a_name(self, implementation, host, recorder, call):
        recorder.failing = (call, 719)
        plugin, arrays = self.prepared(implementation, host)
        with pytest.raises(IsthmusError, match=r'CausalConv1d "a layer": cu\w+ failed with 719: an error of the recorder'):
            plugin.enqueue(arrays, 2, implementation.buffer(0))

    def test_another_device_is_refused_by_name(self, implementation, host):
        host.use(Recorder(capability=(8, 0)))
        try:
            plugin, arrays = self.prepared(implementation, host)
            with pytest.raises(IsthmusError, match=r"no kernel causal_conv1d for compute capability 8\.0: this library holds sm_90a"):
                plugin.enqueue(arrays, 2, implementation.buffer(0))
        finally:
            host.use(None)

    @pytest.mark.parametrize(("name", "op_type"), FORMS)
    def test_the_workspace_of_a_range_is_enough_for_every_size_in_it(self, host, name, op_type):
        op = OPS[name]
        rng = np.random.Generator(np.random.PCG64(11))
        plugin = host.create(op_type, fields(op, op_type))
        for _ in range(20):
            most = {"batch": int(rng.integers(1, 20)), "length": int(rng.integers(1, 9000)), "tokens": int(rng.integers(1, 9000))}
            known = {**SIZES, "channels": 12 * int(rng.integers(1, 300))}
            inputs, outputs = described(op, op_type, "float16", {**known, **most})
            granted = plugin.configure([*inputs, *outputs], len(outputs))
            for _ in range(50):
                some = {n: int(rng.integers(1, limit + 1)) for n, limit in most.items()}
                inputs, outputs = described(op, op_type, "float16", {**known, **some})
                assert plugin.configure([*inputs, *outputs], len(outputs)) <= granted, f"{some} within {most}"


class TestBuild:
    """How the library is built, and what it says when it cannot be."""

    def test_without_headers(self, tmp_path):
        with pytest.raises(MachineError, match=r"no NvInferRuntime\.h in") as caught:
            headers.find(tmp_path)
        assert "TENSORRT_ROOT" in caught.value.hint

    def test_headers_of_an_installation(self, tmp_path, monkeypatch):
        (tmp_path / "include").mkdir()
        (tmp_path / "include" / headers.REQUIRED).write_text("")
        assert headers.find(tmp_path) == tmp_path / "include"
        monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
        assert headers.find() == tmp_path / "include"

    def test_without_a_compiler(self):
        with pytest.raises(MachineError, match=r"no C\+\+ compiler 'no-such-compiler'"):
            build.find_compiler("no-such-compiler")

    def test_the_state_never_raises(self, implementation, tmp_path, monkeypatch):
        available, detail, fix = build.state()
        assert (available, fix) == (True, "")
        assert "not run" in detail
        monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
        available, detail, fix = build.state()
        assert not available
        assert "TENSORRT_ROOT" in fix

    def test_the_command_line(self, implementation, tmp_path, capsys):
        from isthmus.exporter.ops.plugin import __main__ as command

        assert command.main(["--no-kernels"]) == 0
        assert capsys.readouterr().out.strip() == str(build.build(architectures=()))
        assert command.main(["--no-kernels", "--tensorrt", str(tmp_path)]) == 5
        assert "NvInferRuntime.h" in capsys.readouterr().err

    def test_an_error_of_the_compiler_is_shown(self, implementation, tmp_path, monkeypatch):
        monkeypatch.setenv("ISTHMUS_CACHE_DIR", str(tmp_path / "cache"))
        (tmp_path / headers.REQUIRED).write_text("#error these are no headers\n")
        with pytest.raises(IsthmusError, match="these are no headers"):
            build.build_host(tmp_path)

    def test_nothing_is_linked_and_nothing_warned_of(self, implementation):
        library = build.build(architectures=())
        assert b"libcuda.so.1\0" in library.read_bytes()
        needed = subprocess.run(["readelf", "--dynamic", library], capture_output=True, text=True, check=True).stdout
        assert not [line for line in needed.splitlines() if "NEEDED" in line and ("cuda" in line or "nvinfer" in line)]
        assert (library.parent / "warnings.txt").read_text() == ""

    def test_the_kernels_are_in_the_library(self, implementation, monkeypatch):
        op = OPS["causal_conv1d"]
        plan = op.part("gpu").plans()[0]
        monkeypatch.setattr(op.part("gpu"), "plans", lambda: (plan,))
        compiled = gpu_compile.compile_plan(op, plan, "sm_90a")[0]
        library = build.build(architectures=("sm_90a",), operators=("causal_conv1d",))

        def identify(address):
            import ctypes

            assert ctypes.string_at(address, len(compiled.cubin)) == compiled.cubin
            return tables.stub(op, plan, 0)

        host = Host(build.build_host(), library)
        driver = Recorder(identify=identify)
        host.use(driver)
        try:
            inputs, outputs = described(op, "CausalConv1d", "float32", {**SIZES, "length": 9})
            arrays = [implementation.buffer(4 * int(np.prod(s))).view(np.float32).reshape(s) for _, s in (*inputs, *outputs)]
            host.create("CausalConv1d", {"silu": 0}).enqueue(arrays, 2, implementation.buffer(0))
        finally:
            host.use(None)
        (launched,) = driver.launches
        assert (launched.kernel, launched.shared) == (compiled.facts.name, compiled.facts.shared)
        # The code's own view of its parameters: pointers of 8 bytes and integers of 4, in this order.
        declared = compiled.ptx.partition(".entry")[2].partition(")")[0]
        widths = [8 if ".u64" in line or ".b64" in line else 4 for line in declared.splitlines() if ".param" in line]
        assert widths == [8 if p.kind == "pointer" else 4 for p in launched.plan()[2]] + [8, 8]


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
    model, _ = form_model("rwkv7", "RWKV7", "float16")
    jobs.add("embedded", model, embed=True)
    return jobs


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

    def test_the_library_goes_into_the_plan(self, rtx):
        alone, embedded = (rtx.results[name]["plan"] for name in ("RWKV7, float16, node, SM89", "embedded"))
        assert embedded - alone >= rtx.library.stat().st_size


class FakeInt:
    """As TensorRT's symbolic integers: their operators, no more, and a symbolic integer on the left. Its value shows only at the end."""

    def __init__(self, value):
        self.hidden = value.hidden if isinstance(value, FakeInt) else value

    is_constant = False

    def _with(self, other, function):
        return FakeInt(int(function(self.hidden, other.hidden if isinstance(other, FakeInt) else other)))

    def __add__(self, other):
        return self._with(other, lambda a, b: a + b)

    def __sub__(self, other):
        return self._with(other, lambda a, b: a - b)

    def __mul__(self, other):
        return self._with(other, lambda a, b: a * b)

    def __floordiv__(self, other):
        return self._with(other, lambda a, b: a // b)

    def __lt__(self, other):
        return self._with(other, lambda a, b: a < b)

    def __bool__(self):
        raise RuntimeError("a symbolic expression is no boolean")


class FakeAPI:
    """The part of `tensorrt.plugin` that `quick.register` uses, with its checks of signatures."""

    SymInt32 = FakeInt

    class TensorDesc:
        def __init__(self, shape, dtype):
            self.shape_expr, self.dtype = (
                shape,
                type("DataType", (), {"name": {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}[dtype]}),
            )

    class KernelLaunchParams:
        grid_x = grid_y = grid_z = block_x = block_y = block_z = 1
        shared_mem = 0

    class SymIntExprs(list):
        def __init__(self, count):
            super().__init__([None] * count)

    class AutoTuneCombination:
        def __init__(self, types, layout):
            self.types, self.layout = types.split(", "), layout

    def __init__(self):
        self.functions = {}

    def from_shape_expr(self, shape, dtype):
        return shape, dtype.name

    def __getattr__(self, name):
        if name not in ("register", "autotune", "aot_impl"):
            raise AttributeError(name)
        return lambda plugin: lambda function: self.functions.setdefault((plugin, name), function)


class TestQuick:
    """The quick plugins of TensorRT 11. Its own module is not run: a stand-in has its operators and reads its signatures."""

    @pytest.mark.parametrize(("name", "op_type"), FORMS)
    def test_symbolic_sizes_give_the_launch_of_the_numbers(self, name, op_type):
        op = OPS[name]
        every = op.part("tensorrt-quick").plans()
        attributes = {**fields(op, op_type), **plans.form_of(op, op_type).fixed}
        inputs, _ = described(op, op_type, "float16")
        shapes = [shape for _, shape in inputs]
        known = {a.name: a for a in op.inputs}
        free = ("batch", "length", "tokens")
        symbols = [
            [FakeInt(s) if d in free else s for d, s in zip(known[n].shape, shape, strict=True)]
            for n, shape in zip(plans.form_of(op, op_type).inputs, shapes, strict=True)
        ]
        expected = quick.choose(op, every, op_type, "float16", shapes, attributes)
        got = quick.choose(op, every, op_type, "float16", symbols, attributes, FakeAPI())
        assert (got.plan, got.takes, got.baked, got.count) == (expected.plan, expected.takes, expected.baked, expected.count)
        assert tuple(FakeInt(g).hidden for g in got.grid) == expected.grid
        assert tuple(FakeInt(e).hidden for e in got.extra) == expected.extra

    def test_expressions_of_symbols(self):
        api = FakeAPI()
        functions = quick._functions(api)
        for a, b in ((7, 3), (3, 7), (8, 8)):
            x, y = quick.Symbol(FakeInt(a), api), quick.Symbol(FakeInt(b), api)
            assert [functions[n](x, y).value.hidden for n in ("cdiv", "min", "max")] == [-(-a // b), min(a, b), max(a, b)]
            assert [v.value.hidden for v in (9 - x, 9 * x, 99 // x, 9 + x, x % y)] == [9 - a, 9 * a, 99 // a, 9 + a, a % b]

    def test_what_does_not_fit_is_refused(self):
        op = OPS["selective_scan"]
        inputs, _ = described(op, "SelectiveScan", "float16", {**SIZES, "state": 300})
        with pytest.raises(IsthmusError, match="no quick plugin of SelectiveScan takes these inputs"):
            quick.choose(
                op,
                op.part("tensorrt-quick").plans(),
                "SelectiveScan",
                "float16",
                [s for _, s in inputs],
                {"reverse": 0, "delta_softplus": 0},
            )

    def test_the_parameters_are_rearranged(self):
        types = ["u64 .ptr .global .align 1", "u64", "u32", "u64", "u64", "u64"]
        declared = ",\n\t".join(f".param .{t} kernel_param_{i}" for i, t in enumerate(types))
        ptx = f"head\n.visible .entry kernel(\n\t{declared}\n)\n{{ ld 0 kernel_param_0; 1 kernel_param_1; 3 kernel_param_3; }}"
        arranged = quick.arrange(ptx, (0, 3, 2, 0), 4)
        head, _, body = arranged.partition(")")
        assert [line.split()[-1].rstrip(",") for line in head.splitlines()[2:]] == [
            "kernel_param_0",
            "unread_param_1",
            "kernel_param_2",
            "kernel_param_1",
        ]
        assert body == "\n{ ld 0 kernel_param_0; 1 kernel_param_1; 3 kernel_param_0; }"
        with pytest.raises(IsthmusError, match="the kernel uses scratch memory: kernel_param_5"):
            quick.arrange(ptx.replace("3 kernel_param_3", "5 kernel_param_5"), (0, 3, 2, 1), 4)
        with pytest.raises(IsthmusError, match="expected 9 parameters"):
            quick.arrange(ptx, tuple(range(9)), 9)

    @pytest.mark.parametrize(
        ("name", "op_type", "dtype"), [("causal_conv1d", "CausalConv1d", "float16"), ("selective_scan", "SelectiveScan", "bfloat16")]
    )
    def test_what_the_shell_returns(self, tmp_path, name, op_type, dtype):
        op = OPS[name]
        api = FakeAPI()
        every = op.part("tensorrt-quick").plans()
        quick.register(op, every, "sm_90a", api)
        inputs, outputs = described(op, op_type, dtype)
        given = [
            FakeAPI.TensorDesc([FakeInt(s) if i < 2 and len(shape) == 3 else s for i, s in enumerate(shape)], t) for t, shape in inputs
        ]
        for desc in given:  # constants know their value
            desc.shape_expr = [
                type("Constant", (FakeInt,), {"is_constant": True, "constant_value": lambda self: self.hidden})(s) for s in desc.shape_expr
            ]
        settings = list(fields(op, op_type).values())
        results = api.functions[f"isthmus::{op_type}", "register"](*given, *settings)
        assert [tuple(FakeInt(s).hidden for s in shape) for shape, _ in results] == [shape for _, shape in outputs]
        (combination,) = api.functions[f"isthmus::{op_type}", "autotune"](*given, *settings, ())
        wide = "FP32|FP32|FP32"
        assert combination.types == [wide if a == "float32" else "FP32|FP16|BF16" for a, _ in (*inputs, *outputs)]
        kernel, ptx, launch, extra = api.functions[f"isthmus::{op_type}", "aot_impl"](*given, *settings, (), 0)
        chosen = quick.choose(
            op, every, op_type, dtype, [s for _, s in inputs], {**{a.name: a.default for a in op.attributes}, **fields(op, op_type)}
        )
        assert (launch.grid_x, launch.grid_y, launch.grid_z, launch.block_x) == (*chosen.grid, chosen.threads)
        assert [e.hidden for e in extra] == list(chosen.extra)
        # The PTX declares what TensorRT passes, and the assembler takes it.
        declared = ptx.partition(".entry")[2].partition(")")[0].splitlines()[1:]
        widths = ["u32" if len(inputs) <= i < len(inputs) + len(extra) else "u64" for i in range(chosen.count)]
        assert [line.split()[1].lstrip(".") for line in declared] == widths
        (tmp_path / "kernel.ptx").write_text(ptx)
        assembler = gpu_compile._tool_path("ptxas")
        subprocess.run(
            [assembler, "-arch=sm_90a", "-o", tmp_path / "kernel.cubin", tmp_path / "kernel.ptx"], check=True, capture_output=True
        )
        assert kernel in ptx
        signature = api.functions[f"isthmus::{op_type}", "aot_impl"].__signature__
        assert list(signature.parameters)[-2:] == ["outputs", "tactic"]
