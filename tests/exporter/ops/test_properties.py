"""Properties of the operators that hold whatever the inputs are, on the torch operators in float64."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.exporter.op import OPS

# Rounding in float64, through sums of some hundred terms of order one.
BOUND = 1e-10
EXAMPLES = settings(max_examples=12, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32 - 1)
LENGTHS = st.sampled_from([1, 2, 5, 15, 16, 17, 31, 64, 65, 80])  # about the sizes of chunks

for _name in OPS:
    OPS[_name].part("torch")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    # Tensors this small gain nothing from more, and lose much where other work runs beside.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclasses.dataclass(frozen=True)
class Variant:
    """An operator with attributes, and a way to draw its inputs: `make(rng, batch, length)`."""

    op: str
    make: Callable[[np.random.Generator, int, int], dict[str, Any]]
    attributes: dict[str, Any]
    linear: str | None = None

    @property
    def axis(self) -> int:
        return OPS[self.op].inputs[0].shape.index("length")

    @property
    def sequences(self) -> list[str]:
        return [a.name for a in OPS[self.op].inputs if {"length", "tokens"} & set(a.shape)]

    def draw(self, seed: int, batch: int, length: int) -> dict[str, torch.Tensor]:
        rng = np.random.Generator(np.random.PCG64(seed))
        return {name: torch.from_numpy(np.asarray(x)) for name, x in self.make(rng, batch, length).items()}

    def __call__(self, inputs: dict[str, torch.Tensor], **attributes: Any) -> tuple[torch.Tensor, ...]:
        return call(self.op, inputs, **(self.attributes | attributes))

    def cut(self, inputs: dict[str, torch.Tensor], start: int, end: int | None = None) -> dict[str, torch.Tensor]:
        at = (slice(None),) * self.axis + (slice(start, end),)
        return {name: x[at] if name in self.sequences else x for name, x in inputs.items()}


def call(op: str, inputs: dict[str, torch.Tensor], **attributes: Any) -> tuple[torch.Tensor, ...]:
    results = getattr(torch.ops.isthmus, op)(**inputs, **attributes)
    return results if isinstance(results, tuple) else (results,)


def assert_equal(got: Any, expected: Any) -> None:
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        assert (x - y).abs().max() <= BOUND * max(1.0, y.abs().max())


def _scan(groups: int, optional: str) -> Callable[..., dict[str, Any]]:
    def make(rng: np.random.Generator, batch: int, length: int) -> dict[str, Any]:
        tokens, channels, state = (batch, length), 6, 3
        shapes = {"D": (channels,), "z": (*tokens, channels), "delta_bias": (channels,), "initial_state": (batch, channels, state)}
        return {
            "u": rng.standard_normal((*tokens, channels)),
            "delta": rng.uniform(0.0, 2.0, (*tokens, channels)),
            "A": -np.exp(rng.uniform(-6.0, 3.0, (channels, state))),
            "B": rng.standard_normal((*tokens, groups * state)),
            "C": rng.standard_normal((*tokens, groups * state)),
            **{name: rng.standard_normal(shapes[name]) for name in optional.split()},
        }

    return make


def _attention(rule: str, q_heads: int, *, per_key: bool) -> Variant:
    heads, key, value = 2, 4, 3

    def make(rng: np.random.Generator, batch: int, length: int) -> dict[str, Any]:
        tokens = (batch, length)
        k = rng.standard_normal((*tokens, heads, key))
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        arrays = {
            "q": rng.standard_normal((*tokens, q_heads * key)),
            "k": k.reshape(*tokens, -1),
            "v": rng.standard_normal((*tokens, heads * value)),
            "initial_state": rng.standard_normal((batch, heads, key, value)),
        }
        if "gated" in rule:
            arrays["decay"] = -np.exp(rng.uniform(-8.0, 3.0, (*tokens, heads * (key if per_key else 1))))
        if "delta" in rule:
            arrays["beta"] = rng.uniform(0.0, 1.0, (*tokens, heads))
        return arrays

    return Variant("linear_attention", make, {"q_num_heads": q_heads, "kv_num_heads": heads, "update_rule": rule}, "v")


def _rwkv7(rng: np.random.Generator, batch: int, length: int) -> dict[str, Any]:
    shape = (batch, length, 2, 4)
    removal = rng.standard_normal(shape)
    removal /= np.linalg.norm(removal, axis=-1, keepdims=True)
    arrays = {
        "r": rng.standard_normal(shape),
        "decay": -np.exp(rng.uniform(-8.0, 3.0, shape)),
        "k": rng.standard_normal(shape),
        "v": rng.standard_normal((*shape[:3], 3)),
        "a": -removal,
        "b": removal * rng.uniform(0.0, 1.0, shape),
    }
    return {name: x.reshape(batch, length, -1) for name, x in arrays.items()} | {"initial_state": rng.standard_normal((batch, 2, 4, 3))}


def _conv(optional: str) -> Callable[..., dict[str, Any]]:
    def make(rng: np.random.Generator, batch: int, length: int) -> dict[str, Any]:
        shapes = {"bias": (5,), "initial_state": (batch, 5, 3)}
        arrays = {"x": rng.standard_normal((batch, 5, length)), "weight": rng.standard_normal((5, 1, 4))}
        return arrays | {name: rng.standard_normal(shapes[name]) for name in optional.split()}

    return make


def _normalized(rng: np.random.Generator, batch: int, length: int) -> dict[str, Any]:
    # Away from 0, where every key of a head may be silent and the quotient is rounding over rounding.
    return {name: np.abs(rng.standard_normal((batch, length, 2 * 4))) + 0.1 for name in "qkv"}


SCAN = Variant("selective_scan", _scan(2, "D delta_bias initial_state"), {"delta_softplus": True}, "u")
CAUSAL = {
    "selective_scan": SCAN,
    "selective_scan, gated": Variant("selective_scan", _scan(1, "z initial_state"), {}),
    "linear": _attention("linear", 4, per_key=False),
    "gated": _attention("gated", 2, per_key=False),
    "gated, a key channel": _attention("gated", 4, per_key=True),
    "delta": _attention("delta", 2, per_key=False),
    "gated_delta": _attention("gated_delta", 4, per_key=True),
    "rwkv7": Variant("rwkv7", _rwkv7, {"num_heads": 2}, "v"),
    "causal_conv1d": Variant("causal_conv1d", _conv("initial_state"), {}, "x"),
    "causal_conv1d, silu": Variant("causal_conv1d", _conv("bias initial_state"), {"silu": True}),
}
NORMALIZED = Variant("normalized_linear_attention", _normalized, {"num_heads": 2}, "v")
LINEAR = {name: v for name, v in (CAUSAL | {"normalized": NORMALIZED}).items() if v.linear}


@pytest.mark.parametrize("name", list(LINEAR))
@EXAMPLES
@given(seed=SEEDS, length=LENGTHS, factors=st.tuples(st.floats(-4.0, 4.0), st.floats(-4.0, 4.0)))
def test_linear_in_the_values_and_the_state(name, seed, length, factors):
    variant = LINEAR[name]
    first, second = variant.draw(seed, 2, length), variant.draw(seed ^ 1, 2, length)
    linear = [n for n in (variant.linear, "initial_state") if n in first]
    second = first | {n: second[n] for n in linear}
    mixed = first | {n: factors[0] * first[n] + factors[1] * second[n] for n in linear}
    assert_equal(variant(mixed), [factors[0] * x + factors[1] * y for x, y in zip(variant(first), variant(second), strict=True)])


@pytest.mark.parametrize("name", list(CAUSAL))
@EXAMPLES
@given(seed=SEEDS, length=LENGTHS, where=st.floats(0.0, 1.0))
def test_later_tokens_do_not_change_earlier_outputs(name, seed, length, where):
    variant, at = CAUSAL[name], round(where * (length - 1))
    inputs, other = variant.draw(seed, 2, length), variant.draw(seed ^ 1, 2, length)
    keep = {n: variant.cut({n: inputs[n]}, 0, at)[n] for n in variant.sequences if n in inputs}
    changed = inputs | {n: torch.cat([x, variant.cut({n: other[n]}, at)[n]], variant.axis) for n, x in keep.items()}
    before, after = (variant(x)[0].narrow(variant.axis, 0, at) for x in (inputs, changed))
    assert torch.equal(before, after)
    assert not torch.equal(variant(inputs)[0], variant(changed)[0])


def test_normalized_attention_is_not_causal():
    inputs = NORMALIZED.draw(0, 1, 8)
    changed = inputs | {"v": torch.cat([inputs["v"][:, :-1], inputs["v"][:, -1:] + 1.0], 1)}
    assert ((NORMALIZED(inputs)[0] - NORMALIZED(changed)[0]).abs() > 1e-3).all()


@pytest.mark.parametrize("name", list(CAUSAL))
@EXAMPLES
@given(seed=SEEDS, length=LENGTHS, where=st.floats(0.0, 1.0))
def test_a_split_that_carries_the_state_is_the_whole(name, seed, length, where):
    variant = CAUSAL[name]
    length += 1
    at = 1 + round(where * (length - 2))
    inputs = variant.draw(seed, 2, length)
    first, state = variant(variant.cut(inputs, 0, at))
    second, last = variant(variant.cut(inputs, at) | {"initial_state": state})
    assert_equal((torch.cat([first, second], variant.axis), last), variant(inputs))


@pytest.mark.parametrize("name", list(CAUSAL))
@EXAMPLES
@given(seed=SEEDS, length=st.integers(1, 20))
def test_steps_are_the_sequence(name, seed, length):
    variant = CAUSAL[name]
    inputs = variant.draw(seed, 2, length)
    whole = variant(inputs)
    step = getattr(OPS[variant.op].part("torch"), f"{variant.op}_step")
    attributes = {n: value for n, value in variant.attributes.items() if n != "update_rule"}
    constant = {n: x for n, x in inputs.items() if n not in variant.sequences and n != "initial_state"}
    state, outputs = inputs["initial_state"], []
    for t in range(length):
        token = {n: inputs[n].select(variant.axis, t) for n in variant.sequences if n in inputs}
        y, state = step(**token, **constant, state=state, **attributes)
        outputs.append(y)
    assert_equal((torch.stack(outputs, variant.axis), state), whole)


@EXAMPLES
@given(seed=SEEDS, length=LENGTHS)
def test_reverse_is_flip(seed, length):
    inputs = SCAN.draw(seed, 2, length)
    flipped = {n: x.flip(1) if n in SCAN.sequences else x for n, x in inputs.items()}
    y, last = SCAN(flipped)
    assert_equal(SCAN(inputs, reverse=True), (y.flip(1), last))


@EXAMPLES
@given(seed=SEEDS, length=LENGTHS)
def test_groups_are_repeated_matrices(seed, length):
    inputs = SCAN.draw(seed, 2, length)
    repeated = {n: inputs[n].unflatten(2, (2, 3)).repeat_interleave(3, 2).flatten(2) for n in ("B", "C")}
    assert_equal(SCAN(inputs | repeated), SCAN(inputs))


@EXAMPLES
@given(seed=SEEDS, length=LENGTHS)
def test_the_order_of_the_keys_does_not_matter(seed, length):
    inputs = NORMALIZED.draw(seed, 2, length)
    order = torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).permutation(length))
    shuffled = inputs | {n: inputs[n][:, order] for n in ("k", "v")}
    assert_equal(NORMALIZED(shuffled), NORMALIZED(inputs))


@pytest.mark.parametrize(("gated", "plain"), [("gated", "linear"), ("gated_delta", "delta")])
@pytest.mark.parametrize("width", [2, 8])
@EXAMPLES
@given(seed=SEEDS, length=LENGTHS)
def test_no_decay_is_the_rule_without(gated, plain, width, seed, length):
    inputs = _attention(plain, 4, per_key=False).draw(seed, 2, length)
    attributes = {"q_num_heads": 4, "kv_num_heads": 2}
    without = call("linear_attention", inputs, update_rule=plain, **attributes)
    decay = torch.zeros(2, length, width, dtype=torch.float64)
    assert_equal(call("linear_attention", inputs | {"decay": decay}, update_rule=gated, **attributes), without)


@EXAMPLES
@given(seed=SEEDS, length=LENGTHS)
def test_a_rate_of_zero_writes_nothing(seed, length):
    variant = _attention("gated_delta", 4, per_key=True)
    inputs = variant.draw(seed, 2, length)
    silent = variant(inputs | {"beta": torch.zeros_like(inputs["beta"])})
    gated = {n: x for n, x in inputs.items() if n != "beta"} | {"v": torch.zeros_like(inputs["v"])}
    assert_equal(silent, call("linear_attention", gated, **(variant.attributes | {"update_rule": "gated"})))


@EXAMPLES
@given(seed=SEEDS, length=st.integers(1, 4))
def test_the_delta_rule_with_orthogonal_keys_only_adds(seed, length):
    variant = _attention("delta", 2, per_key=False)
    inputs = variant.draw(seed, 2, length)
    del inputs["initial_state"]
    inputs["k"] = torch.eye(4, dtype=torch.float64)[:length].repeat(2, 1, 2)
    inputs["beta"] = torch.ones_like(inputs["beta"])
    plain = {n: inputs[n] for n in "qkv"}
    assert_equal(variant(inputs), call("linear_attention", plain, **(variant.attributes | {"update_rule": "linear"})))


@EXAMPLES
@given(seed=SEEDS, length=LENGTHS)
def test_rwkv7_without_removal_is_gated_attention(seed, length):
    inputs = CAUSAL["rwkv7"].draw(seed, 2, length)
    silent = CAUSAL["rwkv7"](inputs | {"a": torch.zeros_like(inputs["a"])})
    gated = {"q": inputs["r"]} | {n: inputs[n] for n in ("k", "v", "decay", "initial_state")}
    assert_equal(silent, call("linear_attention", gated, q_num_heads=2, kv_num_heads=2, update_rule="gated", scale=1.0))


@EXAMPLES
@given(seed=SEEDS, length=LENGTHS)
def test_rwkv7_holds_the_gated_delta_rule(seed, length):
    inputs = _attention("gated_delta", 2, per_key=True).draw(seed, 2, length)
    rate = inputs["beta"].repeat_interleave(4, 2)
    mixing = {"r": inputs["q"], "k": rate * inputs["k"], "a": inputs["decay"].exp() * inputs["k"], "b": -rate * inputs["k"]}
    mixing |= {n: inputs[n] for n in ("decay", "v", "initial_state")}
    delta = call("linear_attention", inputs, q_num_heads=2, kv_num_heads=2, update_rule="gated_delta", scale=1.0)
    assert_equal(call("rwkv7", mixing, num_heads=2), delta)


@EXAMPLES
@given(seed=SEEDS, length=LENGTHS)
def test_mamba2_is_gated_attention(seed, length):
    # Mamba-2 (arXiv:2405.21060): one decay a head, whose channels share step and matrices; heads of 3 channels, in 2 groups.
    rng = np.random.Generator(np.random.PCG64(seed))
    inputs = SCAN.draw(seed, 2, length)
    A = torch.from_numpy(-np.exp(rng.uniform(-6.0, 3.0, 2)))
    step = torch.from_numpy(rng.uniform(0.0, 2.0, (2, length, 2)))
    per_channel = step.repeat_interleave(3, 2)
    scan = {n: inputs[n] for n in ("u", "B", "C")} | {"delta": per_channel, "A": A.repeat_interleave(3)[:, None].expand(6, 3)}
    attention = {"q": inputs["C"], "k": inputs["B"], "v": per_channel * inputs["u"], "decay": step * A}
    y, state = call("selective_scan", scan)
    expected, last = call("linear_attention", attention, q_num_heads=2, kv_num_heads=2, update_rule="gated", scale=1.0)
    assert_equal((y, state), (expected, last.transpose(2, 3).flatten(1, 2)))


@EXAMPLES
@given(seed=SEEDS, length=LENGTHS)
def test_retnet_is_gated_attention(seed, length):
    # RetNet (arXiv:2307.08621), parallel form: (q k^T . gamma^(t - s)) v, one gamma a head.
    inputs = CAUSAL["gated"].draw(seed, 2, length)
    del inputs["initial_state"]
    gamma = 1.0 - 2.0 ** torch.tensor([-5.0, -6.0], dtype=torch.float64)
    t = torch.arange(length, dtype=torch.float64)
    weights = torch.where(t[:, None] >= t, gamma[:, None, None] ** (t[:, None] - t).clamp(min=0), 0.0)
    q, k, v = (inputs[n].unflatten(2, (2, -1)).transpose(1, 2) for n in "qkv")
    expected = ((q @ k.transpose(2, 3) * weights) @ v / 2.0).transpose(1, 2).flatten(2)
    got = CAUSAL["gated"](inputs | {"decay": gamma.log().expand(2, length, 2)})
    assert_equal(got[:1], [expected])
