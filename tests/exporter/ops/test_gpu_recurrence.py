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
        if (p.form, p.dtype) == ("GatedDeltaLinearAttention", "float32") and plans.evaluate(p.fits, sizes) and "aligned" not in p.name
    ]
    assert len(fitting) >= 4
    for plan in fitting:
        got = interpret.run(op, inputs, ATTRIBUTES, plan)
        _close(got["y"], expected["y"])
        _close(got["last_state"], expected["last_state"])


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
