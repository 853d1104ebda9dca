"""`CustomOp`: attributes, sizes, and errors that give every reason at once."""

import pytest

from isthmus.exporter.errors import IsthmusError, UsageError
from isthmus.exporter.op import OPS, PARTS, evaluate

SCAN = {
    "u": (2, 7, 6),
    "delta": (2, 7, 6),
    "A": (6, 4),
    "B": (2, 7, 8),
    "C": (2, 7, 8),
}
ATTENTION = {"q": (2, 7, 24), "k": (2, 7, 12), "v": (2, 7, 9)}
HEADS = {"q_num_heads": 6, "kv_num_heads": 3}
MIXING = dict.fromkeys(("r", "decay", "k", "v", "a", "b"), (2, 7, 8))
CONV = {"x": (2, 5, 7), "weight": (5, 1, 4)}
NORMALIZED = {"q": (2, 7, 8), "k": (2, 9, 8), "v": (2, 9, 6)}


def infer(name, shapes, **attributes):
    return OPS[name].infer(shapes, OPS[name].resolve(attributes))


def reasons(name, shapes, **attributes):
    with pytest.raises(UsageError) as caught:
        infer(name, shapes, **attributes)
    return {f"{reason.where}: {reason.what}" for reason in caught.value.reasons}


@pytest.mark.parametrize(
    ("name", "shapes", "attributes", "expected"),
    [
        ("selective_scan", SCAN, {}, {"batch": 2, "length": 7, "channels": 6, "state": 4, "groups": 2}),
        (
            "linear_attention",
            ATTENTION | {"decay": (2, 7, 12), "beta": (2, 7, 1)},
            HEADS | {"update_rule": "gated_delta"},
            HEADS | {"batch": 2, "length": 7, "key": 4, "value": 3, "decays": 4, "betas": 1},
        ),
        ("rwkv7", MIXING, {"num_heads": 2}, {"batch": 2, "length": 7, "num_heads": 2, "key": 4, "value": 4}),
        ("causal_conv1d", CONV, {}, {"batch": 2, "channels": 5, "length": 7, "width": 4}),
        (
            "normalized_linear_attention",
            NORMALIZED,
            {"num_heads": 2},
            {"batch": 2, "length": 7, "tokens": 9, "num_heads": 2, "key": 4, "value": 3},
        ),
    ],
)
def test_sizes(name, shapes, attributes, expected):
    sizes = infer(name, shapes, **attributes)
    assert sizes == expected
    assert all(len(shape) == len(a.shape) for a, shape in zip(OPS[name].outputs, OPS[name].output_shapes(sizes).values(), strict=True))


def test_shapes_of_outputs():
    op = OPS["linear_attention"]
    sizes = infer("linear_attention", ATTENTION, **HEADS, update_rule="linear")
    assert op.output_shapes(sizes) == {"y": (2, 7, 18), "last_state": (2, 3, 4, 3)}
    op = OPS["causal_conv1d"]
    assert op.output_shapes(infer("causal_conv1d", CONV)) == {"y": (2, 5, 7), "last_state": (2, 5, 3)}


@pytest.mark.parametrize(("dim", "value"), [(3, 3), ("width", 4), ("width-1", 3), ("heads*key", 10), ("width*heads*key", 40)])
def test_sizes_are_evaluated(dim, value):
    assert evaluate(dim, {"width": 4, "heads": 2, "key": 5}) == value


def test_everything_that_is_missing_and_every_rank_is_said_at_once():
    found = reasons("selective_scan", {"u": (2, 7), "delta": (2, 7, 6), "B": (2, 7, 8, 1)})
    assert found == {
        "A: is missing",
        "C: is missing",
        "u: has shape (2, 7), expected (batch, length, channels)",
        "B: has shape (2, 7, 8, 1), expected (batch, length, groups*state)",
    }


def test_every_size_that_does_not_fit_is_said_at_once():
    found = reasons("selective_scan", SCAN | {"delta": (3, 7, 6), "C": (2, 8, 8), "D": (5,), "initial_state": (2, 6, 3)})
    assert found == {
        "delta: has 3 on axis 0, expected 2 (batch)",
        "C: has 8 on axis 1, expected 7 (length)",
        "D: has 5 on axis 0, expected 6 (channels)",
        "initial_state: has 3 on axis 2, expected 4 (state)",
    }


def test_products_that_do_not_divide():
    assert reasons("selective_scan", SCAN | {"B": (2, 7, 7), "C": (2, 7, 7)}) >= {
        "B: has 7 on axis 2, expected a multiple of 4 (groups*state)"
    }
    assert reasons("rwkv7", dict.fromkeys(MIXING, (2, 7, 9)), num_heads=2) >= {
        "r: has 9 on axis 2, expected a multiple of 2 (num_heads*key)"
    }


def test_fixed_and_derived_sizes():
    assert reasons("causal_conv1d", CONV | {"weight": (5, 2, 4), "initial_state": (2, 5, 4)}) == {
        "weight: has 2 on axis 1, expected 1",
        "initial_state: has 4 on axis 2, expected 3 (width-1)",
    }


@pytest.mark.parametrize(
    ("name", "shapes", "attributes", "expected"),
    [
        ("selective_scan", SCAN | {"B": (2, 7, 16), "C": (2, 7, 16)}, {}, {"B: has 4 groups of 4, which do not divide 6 channels"}),
        ("causal_conv1d", CONV | {"weight": (5, 1, 1)}, {}, {"weight: has width 1, expected at least 2"}),
        ("normalized_linear_attention", NORMALIZED, {"num_heads": 2, "eps": -1.0}, {"eps: got -1.0, expected a number of at least 0"}),
        (
            "linear_attention",
            ATTENTION,
            HEADS | {"update_rule": "gate"},
            {"update_rule: got 'gate', expected one of linear, gated, delta, gated_delta"},
        ),
        (
            "linear_attention",
            {"q": (2, 7, 16), "k": (2, 7, 12), "v": (2, 7, 9), "decay": (2, 7, 6), "beta": (2, 7, 2)},
            {"q_num_heads": 4, "kv_num_heads": 3, "update_rule": "gated"},
            {
                "beta: the rule 'gated' has none",
                "q_num_heads: 4 is not a multiple of kv_num_heads = 3",
                "decay: has 2 numbers a head, expected 1 or 4",
                "beta: has 2 on axis 2, expected 1 or 3",
            },
        ),
        ("linear_attention", ATTENTION, HEADS | {"update_rule": "delta"}, {"beta: the rule 'delta' needs it"}),
    ],
)
def test_what_shapes_alone_do_not_say(name, shapes, attributes, expected):
    assert reasons(name, shapes, **attributes) == expected


def test_attributes_unknown_and_missing_are_said_at_once():
    with pytest.raises(UsageError) as caught:
        OPS["linear_attention"].resolve({"q_num_heads": 2, "gate": 1, "rule": "linear"})
    assert [reason.what for reason in caught.value.reasons] == [
        "linear_attention has no attribute 'gate'",
        "linear_attention has no attribute 'rule'",
        "linear_attention needs the attribute 'kv_num_heads'",
        "linear_attention needs the attribute 'update_rule'",
    ]


def test_defaults_are_filled_in():
    assert OPS["selective_scan"].resolve({"reverse": True}) == {"delta_softplus": False, "reverse": True}


@pytest.mark.parametrize("name", list(OPS))
def test_forms_name_arguments_of_the_operator(name):
    op = OPS[name]
    inputs, attributes = {a.name: a for a in op.inputs}, {a.name for a in op.attributes}
    for form in op.forms:
        assert set(form.inputs) <= set(inputs)
        assert {a.name for a in op.inputs if not a.optional} <= set(form.inputs)
        assert set(form.fixed) <= attributes
    assert len({form.op_type for form in op.forms}) == len(op.forms)
    assert set(op.lacks) <= set(PARTS)


def test_forms_are_chosen_by_what_is_there():
    scan, attention = OPS["selective_scan"], OPS["linear_attention"]
    assert scan.form(frozenset(SCAN), {}).op_type == "SelectiveScan"
    assert scan.form(frozenset({*SCAN, "z"}), {}).op_type == "GatedSelectiveScan"
    for form in attention.forms:
        assert attention.form(frozenset(form.inputs), form.fixed) is form


def test_a_part_that_cannot_be_says_why():
    with pytest.raises(IsthmusError, match="no part 'onnx27': no update rule of the standard LinearAttention has a removal key"):
        OPS["rwkv7"].part("onnx27")
