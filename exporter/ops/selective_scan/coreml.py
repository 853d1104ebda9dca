"""The Core ML lowering of the selective scan: a two-level scan in logarithms of the decay, which holds in float16.

Within chunks of 16 tokens, and then over the ends of the chunks, steps of stride 1, 2, 4, ... (Hillis and Steele, 1986) on the state and
the *logarithm* of its decay: h += exp(la) shift(h), la += shift(la). A decay near 1 is no float16 number, its logarithm is; exp is at
most 1, and nothing is divided. The number of operations grows with the logarithm of the length only. Layout (batch * groups, channels,
state, token in the chunk, chunk).

In float16 y reaches 59 to 84 dB and the last state 58 to 74 dB; with float32 around the scan (`mil.float16_around`) 85 to 89 dB and 74 to
76 dB in the cases of many tokens. The sequential form reaches 58 to 80 dB and 52 to 74 dB: 13 dB less than the chunks where the decay is
long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...op import OPS
from ..mil import LOWEST_STEP, Var, bounded, cut, is_sequential, mb, over_tokens, pad, register_lowering, shift, sizes

_CHUNK = 16


def _lower(inputs: dict[str, Var], attributes: dict[str, Any]) -> tuple[Var, Var]:
    inputs = dict(inputs, delta=_delta(inputs, attributes))
    scan = _sequential if is_sequential() else _chunked
    y, last = scan(inputs, reverse=attributes["reverse"])
    if "D" in inputs:
        y = mb.add(x=y, y=mb.mul(x=inputs["u"], y=inputs["D"]))
    if "z" in inputs:
        y = mb.mul(x=y, y=mb.silu(x=inputs["z"]))
    return y, last


def _delta(inputs: dict[str, Var], attributes: dict[str, Any]) -> Var:
    delta = inputs["delta"]
    if "delta_bias" in inputs:
        delta = mb.add(x=delta, y=inputs["delta_bias"])
    return softplus(delta) if attributes["delta_softplus"] else delta


def softplus(x: Var) -> Var:
    """log(1 + exp(x)) as max(x, 0) + 2 atanh(e / (2 + e)) with e = exp(-|x|), the second term as its series.

    Devices compute `softplus` in float16 by its formula: beyond x about 11 exp overflows (coreai-torch issue 103), and below about -7,
    where Mamba's steps are, 1 + exp(x) is rounded to 1. Here exp is at most 1 and the small is added to nothing large. The argument s of
    atanh is at most 1/3: the first term of the series that is left out, 2 s^17 / 17, is 3e-9 there, and less elsewhere.
    """
    e = mb.exp(x=mb.mul(x=mb.abs(x=x), y=-1.0))
    s = mb.real_div(x=e, y=mb.add(x=e, y=2.0))
    square = mb.mul(x=s, y=s)
    series: Var = 2.0 / 15
    for power in (13, 11, 9, 7, 5, 3, 1):
        series = mb.add(x=mb.mul(x=square, y=series), y=2.0 / power)
    return mb.add(x=mb.relu(x=x), y=mb.mul(x=s, y=series))


def _chunked(inputs: dict[str, Var], *, reverse: bool) -> tuple[Var, Var]:
    batch, length, channels = sizes(inputs["u"])
    state = sizes(inputs["A"])[1]
    groups = sizes(inputs["B"])[2] // state
    tokens = min(_CHUNK, length)
    chunks = -(-length // tokens)
    full = (batch * groups, channels // groups, state, tokens, chunks)

    def laid_out(x: Var) -> Var:
        # Tokens that are added have delta = u = 0: they leave the state as it is, from whichever end they are visited.
        x = pad(x, 1, after=tokens * chunks - length)
        return mb.transpose(x=mb.reshape(x=x, shape=[batch, chunks, tokens, sizes(x)[2]]), perm=[0, 3, 2, 1])

    delta = laid_out(inputs["delta"])
    weighted = laid_out(mb.mul(x=inputs["delta"], y=inputs["u"]))
    B, C = (mb.reshape(x=laid_out(inputs[name]), shape=[full[0], 1, *full[2:]]) for name in ("B", "C"))
    log = mb.mul(x=mb.expand_dims(x=delta, axes=[2]), y=mb.reshape(x=inputs["A"], shape=[1, channels, state, 1, 1]))
    log = bounded(mb.reshape(x=log, shape=full) if groups > 1 else log, LOWEST_STEP)
    h = mb.mul(x=mb.reshape(x=weighted, shape=[*full[:2], 1, *full[3:]]), y=B)

    log, h = _scanned(log, h, count=tokens, reverse=reverse, sums=lambda log: log)
    end = 0 if reverse else tokens - 1
    ends, log_ends = (mb.squeeze(x=cut(x, 3, end, end + 1), axes=[3]) for x in (h, log))
    if "initial_state" in inputs or chunks > 1:
        # The state before the first token stands before the first chunk, as the end of one more.
        front = (0, 1) if reverse else (1, 0)
        log_ends = pad(log_ends, 3, *front)
        if "initial_state" in inputs:
            first = mb.reshape(x=inputs["initial_state"], shape=[*full[:3], 1])
            ends = mb.concat(values=[ends, first] if reverse else [first, ends], axis=3)
        else:
            ends = pad(ends, 3, *front)
        _, ends = _scanned(log_ends, ends, count=chunks + 1, reverse=reverse, sums=bounded)
        before = cut(ends, 3, 1, chunks + 1) if reverse else cut(ends, 3, 0, chunks)
        h = mb.add(x=h, y=mb.mul(x=mb.exp(x=log), y=mb.expand_dims(x=before, axes=[3])))
        last = cut(ends, 3, 0, 1) if reverse else cut(ends, 3, chunks, chunks + 1)
    else:
        last = ends
    y = mb.reshape(x=mb.reduce_sum(x=mb.mul(x=h, y=C), axes=[2]), shape=[batch, channels, tokens, chunks])
    y = mb.reshape(x=mb.transpose(x=y, perm=[0, 3, 2, 1]), shape=[batch, chunks * tokens, channels])
    return cut(y, 1, 0, length), mb.reshape(x=last, shape=[batch, channels, state])


def _scanned(log: Var, h: Var, *, count: int, reverse: bool, sums: Callable[[Var], Var]) -> tuple[Var, Var]:
    """The logarithms of the decays and the inputs of single steps, to those of all steps up to each, along axis 3."""
    stride = 1
    while stride < count:
        towards = -stride if reverse else stride
        h = mb.add(x=h, y=mb.mul(x=mb.exp(x=log), y=shift(h, 3, towards)))
        log = sums(mb.add(x=log, y=shift(log, 3, towards)))
        stride *= 2
    return log, h


def _sequential(inputs: dict[str, Var], *, reverse: bool) -> tuple[Var, Var]:
    batch, length, channels = sizes(inputs["u"])
    state = sizes(inputs["A"])[1]
    groups = sizes(inputs["B"])[2] // state
    full = [batch, groups, channels // groups, state]
    A = mb.reshape(x=inputs["A"], shape=[1, *full[1:]])

    def step(slices: list[Var], h: Var) -> tuple[Var, Var]:
        u, delta = (mb.reshape(x=x, shape=[*full[:3], 1]) for x in slices[:2])
        B, C = (mb.reshape(x=x, shape=[batch, groups, 1, state]) for x in slices[2:])
        kept = mb.mul(x=mb.exp(x=mb.mul(x=delta, y=A)), y=h)
        h = mb.add(x=kept, y=mb.mul(x=mb.mul(x=delta, y=u), y=B))
        return mb.reshape(x=mb.reduce_sum(x=mb.mul(x=h, y=C), axes=[3]), shape=[batch, 1, channels]), h

    first = inputs.get("initial_state")
    h = mb.reshape(x=first, shape=full) if first is not None else mb.fill(shape=full, value=0.0)
    sequences = [inputs[name] for name in ("u", "delta", "B", "C")]
    y, last = over_tokens(length, sequences, h, (batch, length, channels), step, reverse=reverse)
    return y, mb.reshape(x=last, shape=[batch, channels, state])


register_lowering(OPS["selective_scan"], _lower)
