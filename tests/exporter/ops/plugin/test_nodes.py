"""What the plugins say of their nodes, against the schemas: types, shapes, attributes, refusals."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from isthmus.exporter.errors import IsthmusError
from isthmus.exporter.op import OPS
from isthmus.exporter.ops.gpu import plan as plans


def _nodes():
    spec = spec_from_file_location("plugin_nodes", Path(__file__).with_name("nodes.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NODES = _nodes()
ATTRIBUTES = NODES.ATTRIBUTES
FORMS = NODES.FORMS
FP8 = NODES.FP8
STANDARD = NODES.STANDARD
TYPES = NODES.TYPES
described = NODES.described
described_fp8 = NODES.described_fp8
fields = NODES.fields


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


class TestFP8:
    """Linear attention without removal takes FP8 queries, keys and values."""

    @pytest.mark.parametrize(
        ("op_type", "out"), [("PlainLinearAttention", "float16"), ("GatedLinearAttention", "float16"), ("GatedLinearAttention", "bfloat16")]
    )
    def test_y_has_the_dtype_of_the_decay_and_without_one_float16(self, host, op_type, out):
        inputs, outputs = described_fp8(op_type, out)
        plugin = host.create(op_type, fields(OPS["linear_attention"], op_type))
        assert plugin.infer(inputs) == outputs == [(out, outputs[0][1]), ("float32", outputs[1][1])]
        assert plugin.supports([*inputs, *outputs], 2)
        assert not plugin.supports([*inputs, (FP8, outputs[0][1]), outputs[1]], 2)
        plugin.configure([*inputs, *outputs], 2)

    def test_values_of_another_type_are_refused_by_name(self, host):
        inputs, _ = described_fp8("PlainLinearAttention", "float16")
        inputs[2] = ("float16", inputs[2][1])
        with pytest.raises(IsthmusError, match="v is float16, expected float8_e4m3fn"):
            host.create("PlainLinearAttention", fields(OPS["linear_attention"], "PlainLinearAttention")).infer(inputs)

    @pytest.mark.parametrize("op_type", ["DeltaLinearAttention", "GatedDeltaLinearAttention"])
    def test_the_delta_rules_refuse_it_and_say_what_to_do(self, host, op_type):
        inputs, outputs = described_fp8(op_type, "float16")
        plugin = host.create(op_type, fields(OPS["linear_attention"], op_type))
        assert not plugin.supports([*inputs, *outputs], 2)
        message = (
            f"q is float8_e4m3fn, which no kernel of {op_type} takes; dequantize the inputs before the node "
            r"\(DequantizeLinear\): it takes float32, float16, bfloat16"
        )
        with pytest.raises(IsthmusError, match=message):
            plugin.infer(inputs)


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
