"""The GPU plans of the matrix recurrences beyond the sweep: each plan that fits, one sequence in two parts, decays that clear the state."""

import numpy as np
import pytest

from isthmus.exporter.op import OPS
from isthmus.exporter.ops.gpu import interpret
from isthmus.exporter.ops.gpu import plan as plans


def _inputs(per_key, length=70, heads=2, key=16, value=8):
    rng = np.random.Generator(np.random.PCG64(5))
    unit = rng.standard_normal((1, length, heads, key))
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    arrays = {
        "q": rng.standard_normal((1, length, heads * key)),
        "k": unit.reshape(1, length, -1),
        "v": rng.standard_normal((1, length, heads * value)),
        "decay": -rng.uniform(0.0, 1.0, (1, length, heads * (key if per_key else 1))),
        "beta": rng.uniform(0.0, 1.0, (1, length, heads)),
        "initial_state": rng.standard_normal((1, heads, key, value)),
    }
    return {name: x.astype(np.float32) for name, x in arrays.items()}


ATTRIBUTES = {"q_num_heads": 2, "kv_num_heads": 2, "update_rule": "gated_delta", "scale": 0.0}


def _close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["linear_attention", "normalized_linear_attention", "rwkv7"])
def test_the_plans_name_only_what_is_there(name):
    op = OPS[name]
    found = op.part("gpu").plans()
    plans.check(op, found)
    assert {(p.form, p.dtype) for p in found} >= {(f.op_type, d) for f in op.forms for d in ("float32", "float16", "bfloat16")}


@pytest.mark.parametrize("per_key", [False, True])
def test_every_plan_that_fits_gives_the_same(per_key):
    op, inputs = OPS["linear_attention"], _inputs(per_key)
    sizes = op.infer({n: x.shape for n, x in inputs.items()}, ATTRIBUTES)
    expected = op.part("reference").reference(inputs, ATTRIBUTES)
    fitting = [
        p
        for p in op.part("gpu").plans()
        if (p.form, p.dtype) == ("GatedDeltaLinearAttention", "float32") and plans.evaluate(p.fits, sizes) and "long" not in p.name
    ]
    assert {p.name.rpartition(", ")[2] for p in fitting if "chunks" in p.name} == {"64 keys", "128 keys", "256 keys"}
    assert {p.name.rpartition(", ")[2] for p in fitting if "chunks" not in p.name} == {"64 keys", "256 keys"}
    for plan in fitting:
        got = interpret.run(op, inputs, ATTRIBUTES, plan)
        _close(got["y"], expected["y"])
        _close(got["last_state"], expected["last_state"])


@pytest.mark.parametrize(("key", "chosen"), [(64, "64 keys"), (96, "128 keys"), (200, "256 keys")])
@pytest.mark.parametrize("rule", ["delta", "gated_delta", "rwkv7"])
def test_long_keys_are_parallel_over_chunks(rule, key, chosen):
    """A state of more than 64 keys is carried in tiles of 64, the last of which is not full."""
    heads = 1
    inputs = _inputs(per_key=True, heads=heads, key=key)
    if rule == "rwkv7":
        op, attributes = OPS["rwkv7"], {"num_heads": heads}
        inputs = {
            "r": inputs["q"],
            **{n: inputs[n] for n in ("decay", "k", "v", "initial_state")},
            "a": -inputs["k"],
            "b": 0.5 * inputs["k"],
        }
    else:
        op, attributes = OPS["linear_attention"], {**ATTRIBUTES, "q_num_heads": heads, "kv_num_heads": heads, "update_rule": rule}
        if rule == "delta":
            del inputs["decay"]
    sizes = op.infer({n: x.shape for n, x in inputs.items()}, attributes)
    plan = plans.choose(op.part("gpu").plans(), op.form(frozenset(inputs), attributes).op_type, "float32", sizes)
    assert plan.name.endswith(f"chunks, {chosen}")
    got = interpret.run(op, inputs, attributes)
    expected = op.part("reference").reference(inputs, attributes)
    _close(got["y"], expected["y"])
    _close(got["last_state"], expected["last_state"])


def test_widths_of_which_rows_are_not_aligned_go_token_by_token():
    sizes = {"batch": 1, "length": 100, "q_num_heads": 2, "kv_num_heads": 2, "key": 5, "value": 8, "decays": 1, "betas": 2}
    every = OPS["linear_attention"].part("gpu").plans()
    for form in ("PlainLinearAttention", "GatedLinearAttention", "DeltaLinearAttention", "GatedDeltaLinearAttention"):
        assert plans.choose(every, form, "float16", sizes).name.endswith("one token after the other, long, 64 keys")


def test_the_state_carries_over_a_split():
    op, inputs = OPS["linear_attention"], _inputs(per_key=True)
    whole = interpret.run(op, inputs, ATTRIBUTES)
    tokens = {n: x for n, x in inputs.items() if n != "initial_state"}
    first = interpret.run(op, {n: x[:, :65] for n, x in tokens.items()} | {"initial_state": inputs["initial_state"]}, ATTRIBUTES)
    second = interpret.run(op, {n: x[:, 65:] for n, x in tokens.items()} | {"initial_state": first["last_state"]}, ATTRIBUTES)
    _close(np.concatenate([first["y"], second["y"]], axis=1), whole["y"])
    _close(second["last_state"], whole["last_state"])


def test_an_infinite_decay_clears_the_state():
    op, inputs = OPS["linear_attention"], _inputs(per_key=True)
    inputs["decay"][:, [3, 20, 66]] = -np.inf
    expected = op.part("reference").reference(inputs, ATTRIBUTES)
    got = interpret.run(op, inputs, ATTRIBUTES)
    _close(got["y"], expected["y"])
    _close(got["last_state"], expected["last_state"])
