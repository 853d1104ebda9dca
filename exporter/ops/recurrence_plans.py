"""Launches of the kernels in `recurrence_gpu`, for the operators that are such a recurrence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from . import recurrence_gpu as kernels
from .gpu.plan import Launch, Plan, Workspace

CHUNK = 64
"""Tokens of a chunk."""


@dataclass(frozen=True)
class Recurrence:
    """An operator's node type as a recurrence.

    Attributes:
        form: The node type.
        decay: 0 for none, 1 for one a head, 2 for one a key channel.
        removal: None for the rules without; False for the delta rules; True for a removal key apart from the write key.
        heads: The size that counts the heads of the state.
        repeats: How many heads of q share a state, as an expression.
        names: The tensors that stand for the kernels' q, k, v, a, b, beta and decay; those that it has not, by some address or number.
        scaled: y is multiplied by the attribute scale.
        fits: What the plans ask for besides their sizes.
        label: The start of the plans' names.
    """

    form: str
    decay: int
    removal: bool | None
    heads: str
    repeats: str
    names: Mapping[str, str]
    scaled: bool = True
    fits: str = "1"
    label: str = ""


@dataclass(frozen=True)
class _Shape:
    """Sizes that some constants serve."""

    name: str
    block: int
    fits: str
    prefer: str = "1"
    divisible: frozenset[str] = frozenset()


_ALIGNED = frozenset({"key", "value"})
_SHAPES = (
    _Shape("aligned", 64, "key % 16 == 0 and value % 16 == 0", "key > 16 or value > 16", _ALIGNED),
    _Shape("any", 16, "1"),
)
# A program that holds the state holds all keys: (padded key, block of value, warps).
_STATES = ((64, 16, 8),)
_RECURRENT = ((64, 16, 1), (256, 16, 4))


def plans(recurrence: Recurrence, dtype: str) -> Iterator[Plan]:
    """The plans of a node type for one dtype of the activations, the preferred ones first."""
    for key, block, warps in _RECURRENT:
        yield _recurrent(recurrence, dtype, key, block, warps, "one token after the other", "length <= 16")
    for shape in _SHAPES:
        if recurrence.removal is None:
            yield _additive(recurrence, dtype, shape)
        else:
            # 128 keys do not fit the registers of a block in this form: they are left to the recurrent kernel.
            for key, block, warps in _STATES:
                yield _corrected(recurrence, dtype, shape, key, block, warps)
    if recurrence.removal is not None:
        yield _recurrent(recurrence, dtype, *_RECURRENT[-1], "one token after the other, long", "1")


def _workspace(r: Recurrence, *more: Workspace) -> tuple[Workspace, ...]:
    common: tuple[Workspace, ...] = (Workspace("states", "float32", ("batch", r.heads, "chunks", "key", "value")),)
    if r.decay:
        common += (Workspace("totals", "float32", ("batch", r.heads, "chunks", "key")),)
    return common + more


def _launch(
    r: Recurrence, shape: _Shape, kernel: object, grid: tuple[str, str, str], constants: Mapping[str, int | bool], **extra: object
) -> Launch:
    parameters = kernel.fn.__code__.co_varnames[: kernel.fn.__code__.co_argcount]  # type: ignore[attr-defined]
    names = {"heads": r.heads, "repeats": r.repeats} | dict(r.names)
    if not r.decay:  # what is never touched is some address
        names |= {"decay": r.names["k"], "totals": "states"}
    rename = {p: names[p] for p in parameters if p in names and p not in constants and names[p] != p}
    return Launch(kernel, grid, constants, rename, divisible=shape.divisible.intersection(parameters), **extra)  # type: ignore[arg-type]


def _plan(
    r: Recurrence, dtype: str, name: str, launches: tuple[Launch, ...], workspace: tuple[Workspace, ...], fits: str, prefer: str
) -> Plan:
    sizes = {"chunks": f"cdiv(length, {CHUNK})"}
    conditions = " and ".join(text for text in (r.fits, fits) if text != "1") or "1"
    return Plan(f"{r.label}{name}", r.form, dtype, launches, sizes, workspace, conditions, prefer)


def _states(r: Recurrence, shape: _Shape) -> Launch:
    constants = {"DECAY": r.decay, "C": CHUNK, "BK": shape.block, "BV": shape.block}
    grid = ("chunks", f"batch*{r.heads}", f"cdiv(key, {shape.block})*cdiv(value, {shape.block})")
    return _launch(r, shape, kernels.chunk_states, grid, constants)


def _outputs(r: Recurrence, shape: _Shape) -> Launch:
    constants = {
        "SCALED": r.scaled, "GIVEN": r.removal is not False, "SOLVED": r.removal is not None,
        "DECAY": r.decay, "C": CHUNK, "BK": 16 if r.decay == 2 else shape.block, "BV": shape.block,
    }  # fmt: skip
    grid = ("chunks", f"batch*{r.heads}*({r.repeats})", f"cdiv(value, {shape.block})")
    return _launch(r, shape, kernels.chunk_outputs, grid, constants, warps=8 if r.decay == 2 else 4)


def _recurrent(r: Recurrence, dtype: str, key: int, block: int, warps: int, name: str, prefer: str) -> Plan:
    rule = 0 if r.removal is None else 2 if r.removal else 1
    constants = {"SCALED": r.scaled, "RULE": rule, "DECAY": r.decay, "KEY": key, "BV": block}
    grid = (f"cdiv(value, {block})", f"batch*{r.heads}", "1")
    launch = _launch(r, _SHAPES[-1], kernels.recurrent, grid, constants, warps=warps)
    return _plan(r, dtype, f"{name}, {key} keys", (launch,), (), f"key <= {key}", prefer)


def _products(r: Recurrence, shape: _Shape, x: str, y: str, to: str, removal: bool) -> Launch:
    names = {"x": r.names.get(x, x), "y": r.names.get(y, y), "products": to}
    constants = {"BEFORE": removal, "STRICT": removal, "C": CHUNK, "BK": 16}
    launch = _launch(r, shape, kernels.chunk_products, ("chunks", f"batch*{r.heads}", "1"), constants, warps=8)
    return replace(launch, rename={**launch.rename, **names})


def _additive(r: Recurrence, dtype: str, shape: _Shape) -> Plan:
    carry = _launch(r, shape, kernels.carry_states, ("cdiv(key*value, 256)", f"batch*{r.heads}", "1"), {"DECAY": r.decay, "B": 256})
    launches = (_states(r, shape), carry, _outputs(r, shape))
    return _plan(r, dtype, shape.name, launches, _workspace(r), shape.fits, shape.prefer)


def _corrected(r: Recurrence, dtype: str, shape: _Shape, key: int, block: int, warps: int) -> Plan:
    heads = f"batch*{r.heads}"
    block_s = min(shape.block, 32)
    common = {"REMOVAL": bool(r.removal), "DECAY": r.decay, "C": CHUNK}
    launches: tuple[Launch, ...] = (
        _launch(
            r, shape, kernels.chunk_inverses, ("chunks", heads, "1"), common | {"BK": 16 if r.decay == 2 else min(shape.block, 32)}, warps=8
        ),
        _launch(
            r,
            shape,
            kernels.chunk_solutions,
            ("chunks", heads, f"cdiv(value, {block_s}) + cdiv(key, {block_s})"),
            common | {"B": block_s},
        ),
        _launch(
            r,
            shape,
            kernels.carry_corrected,
            (f"cdiv(value, {block})", heads, "1"),
            common | {"KEY": key, "BV": block},
            warps=warps,
        ),
        _outputs(r, shape),
    )
    rows = ("batch", r.heads, "length")
    square = ("batch", r.heads, "chunks", str(CHUNK), str(CHUNK))
    workspace = [Workspace("inverses", "float32", square), Workspace("solutions", "float32", (*rows, "value"))]
    workspace += [Workspace(name, "float32", (*rows, "key")) for name in ("reads", "writes")]
    if r.removal:
        launches = (_states(r, shape), *launches)
        products = (("a", "k", "mixed", True), ("q", "k", "given_products", False), ("q", "b", "solved_products", False))
        launches = (*(_products(r, shape, *names) for names in products), *launches)
        workspace += [Workspace(name, "float32", square) for _, _, name, _ in products]
    fits = " and ".join(text for text in (shape.fits, f"key <= {key}") if text != "1")
    return _plan(r, dtype, f"{shape.name}, {key} keys", launches, _workspace(r, *workspace), fits, shape.prefer)
