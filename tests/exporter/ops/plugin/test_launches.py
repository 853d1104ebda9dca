"""What the plugins launch: against the plans, executed by Triton's interpreter, and what the driver is told."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from isthmus.exporter.errors import IsthmusError
from isthmus.exporter.op import OPS
from isthmus.exporter.ops.gpu import plan as plans
from isthmus.exporter.ops.plugin import tables
from isthmus.exporter.ops.plugin.host import Recorder


def _nodes():
    spec = spec_from_file_location("plugin_nodes", Path(__file__).with_name("nodes.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NODES = _nodes()
FORMS = NODES.FORMS
SIZES = NODES.SIZES
described = NODES.described
fields = NODES.fields
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


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


class TestFP8:
    """FP8 tensors reach the kernels, and other numbers come out."""

    @pytest.mark.parametrize("length", [5, 70], ids=["token by token", "chunks"])
    @pytest.mark.parametrize(
        ("op_type", "out"), [("PlainLinearAttention", "float16"), ("GatedLinearAttention", "float16"), ("GatedLinearAttention", "bfloat16")]
    )
    def test_the_replay_agrees_with_the_reference(self, implementation, host, recorder, sweep, op_type, out, length):
        op = OPS["linear_attention"]
        dtype = implementation.NUMPY[out]
        rng = np.random.Generator(np.random.PCG64(7))
        inputs = {n: rng.standard_normal((1, length, width)).astype(FLOAT8) for n, width in (("q", 64), ("k", 32), ("v", 16))}
        inputs["initial_state"] = rng.standard_normal((1, 2, 16, 8)).astype(np.float32)
        if op_type.startswith("Gated"):
            inputs["decay"] = -rng.uniform(0.0, 1.0, (1, length, 2)).astype(dtype)
        attributes = {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.125}
        given = [implementation.placed(x) for x in inputs.values()]
        plugin = host.create(op_type, attributes).restored()
        described = [(x.dtype.name, x.shape) for x in given]
        results = plugin.infer(described)
        outputs = [
            implementation.buffer(int(np.prod(s)) * np.dtype(t).itemsize).view(t).reshape(s)
            for t, s in zip((dtype, "f4"), (r[1] for r in results), strict=True)
        ]
        workspace = implementation.buffer(plugin.configure([*described, *results], len(results)))
        plugin.enqueue([*given, *outputs], len(outputs), workspace)
        assert {launched.plan()[0].dtype for launched in recorder.launches} == {"float8_e4m3fn"}
        recorder.replay({str(i): x for i, x in enumerate([*given, *outputs, workspace])})
        rule = plans.form_of(op, op_type).fixed
        reference = op.part("reference").reference(inputs, {**attributes, **rule})
        sweep.check(op, dict(zip(("y", "last_state"), outputs, strict=True)), reference, out, "float32")


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
