"""Launches of the kernels in `recurrence_gpu`, for the operators that are such a recurrence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

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
        types: Dtypes of inputs and outputs that are not as the schema says.
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
    types: Mapping[str, str] = field(default_factory=dict)


# Keys and values that one program takes, and warps.
_RECURRENT = ((64, 16, 1), (256, 16, 4))
_BLOCK = 64
# Rows of 16-bit numbers start at multiples of 16 bytes.
_MULTIPLE, _DIVISIBLE = 8, frozenset({"key", "value"})
_ALIGNED = f"key % {_MULTIPLE} == 0 and value % {_MULTIPLE} == 0"
# A program that holds the state holds all keys, in tiles of 64: (tiles, block of values, warps).
_STATES = ((1, 16, 8), (2, 16, 8), (4, 16, 8))


def plans(recurrence: Recurrence, dtype: str) -> Iterator[Plan]:
    """The plans of a node type for one dtype of the activations, the preferred ones first.

    Chunks are for widths that are multiples of 8, as they are in models: others go token by token.
    """
    for key, block, warps in _RECURRENT:
        yield _recurrent(recurrence, dtype, key, block, warps, "one token after the other", "length <= 16")
    if recurrence.removal is None:
        yield _additive(recurrence, dtype)
    else:
        for tiles, block, warps in _STATES:
            yield _corrected(recurrence, dtype, tiles, block, warps)
    for key, block, warps in _RECURRENT:
        yield _recurrent(recurrence, dtype, key, block, warps, "one token after the other, long", "1")


def _workspace(r: Recurrence, *more: Workspace) -> tuple[Workspace, ...]:
    common: tuple[Workspace, ...] = (Workspace("states", "float32", ("batch", r.heads, "chunks", "key", "value")),)
    if r.decay or r.removal is not None:
        common += (Workspace("totals", "float32", ("batch", r.heads, "chunks", "key")),)
    return common + more


def _launch(r: Recurrence, kernel: object, grid: tuple[str, str, str], constants: Mapping[str, int | bool], **extra: object) -> Launch:
    parameters = kernel.fn.__code__.co_varnames[: kernel.fn.__code__.co_argcount]  # type: ignore[attr-defined]  # Triton's functions are untyped
    names = {"heads": r.heads, "repeats": r.repeats, "gated": str(int(r.decay > 0))} | dict(r.names)
    if not r.decay:  # what is never touched is some address
        names |= {"decay": "y"} | ({"totals": "states"} if r.removal is None else {})
    rename = {p: names[p] for p in parameters if p in names and p not in constants and names[p] != p}
    return Launch(kernel, grid, constants, rename, divisible=_DIVISIBLE.intersection(parameters), multiple=_MULTIPLE, **extra)  # type: ignore[arg-type]  # by keyword


def _plan(
    r: Recurrence, dtype: str, name: str, launches: tuple[Launch, ...], workspace: tuple[Workspace, ...], fits: str, prefer: str
) -> Plan:
    sizes = {"chunks": f"cdiv(length, {CHUNK})"}
    conditions = " and ".join(text for text in (r.fits, fits) if text != "1") or "1"
    return Plan(f"{r.label}{name}", r.form, dtype, launches, sizes, workspace, conditions, prefer, r.types)


def _recurrent(r: Recurrence, dtype: str, key: int, block: int, warps: int, name: str, prefer: str) -> Plan:
    launch = _launch(
        r,
        kernels.recurrent,
        (f"cdiv(value, {block})", f"batch*{r.heads}", "1"),
        {"SCALED": r.scaled, "KEY": key, "BV": block},
        warps=warps,
    )
    rule = {None: "0", False: "1", True: "2"}[r.removal]
    rename = {**launch.rename, "rule": rule, "decays": ("0", "1", "key")[r.decay]}
    launch = replace(launch, rename=rename, divisible=frozenset())
    return _plan(r, dtype, f"{name}, {key} keys", (launch,), (), f"key <= {key}", prefer)


def _states(r: Recurrence) -> Launch:
    constants = {"DECAY": r.decay, "C": CHUNK, "BK": _BLOCK, "BV": _BLOCK}
    grid = ("chunks", f"batch*{r.heads}", f"cdiv(key, {_BLOCK})*cdiv(value, {_BLOCK})")
    return _launch(r, kernels.chunk_states, grid, constants)


def _products(r: Recurrence, x: str, y: str, to: str, *, removal: bool) -> Launch:
    """Products of x and y for the tokens of a chunk; x has q's heads unless it is a removal key."""
    repeats = "1" if removal else r.repeats
    names = {"x": r.names.get(x, x), "y": r.names.get(y, y), "products": to, "repeats": repeats}
    constants = {"BEFORE": removal, "STRICT": removal, "C": CHUNK, "BK": 16}
    launch = _launch(r, kernels.chunk_products, ("chunks", f"batch*{r.heads}*({repeats})", "1"), constants, warps=8)
    return replace(launch, rename={**launch.rename, **names})


def _square(name: str, heads: str) -> Workspace:
    return Workspace(name, "float32", ("batch", heads, "chunks", str(CHUNK), str(CHUNK)))


def _outputs(r: Recurrence, dtype: str) -> tuple[tuple[Launch, ...], tuple[Workspace, ...]]:
    """The launches from the states before each chunk to y, and the workspace between them."""
    given, solved = r.removal is not False, r.removal is not None
    decay = max(r.decay, int(solved))  # the delta rule without decay is the one with, where none is
    constants = {
        "SCALED": r.scaled, "GIVEN": given, "SOLVED": solved, "DECAY": decay, "C": CHUNK, "BK": 16 if decay == 2 else _BLOCK, "BV": _BLOCK,
    }  # fmt: skip
    grid = ("chunks", f"batch*{r.heads}*({r.repeats})", f"cdiv(value, {_BLOCK})")
    launch = _launch(r, kernels.chunk_outputs, grid, constants, warps=8 if decay == 2 or dtype == "float32" else 4)
    wanted: dict[str, str] = {}
    if decay == 2:
        wanted = ({"given_products": "k"} if given else {}) | ({"solved_products": "b" if given else "k"} if solved else {})
    unread = [p for p in ("given_products", "solved_products", *(() if solved else ("solutions",))) if p not in wanted]
    launch = replace(launch, rename={**launch.rename, **dict.fromkeys(unread, "states")})
    products = tuple(_products(r, "q", key, to, removal=False) for to, key in wanted.items())
    return (*products, launch), tuple(_square(to, f"{r.heads}*({r.repeats})") for to in wanted)


def _additive(r: Recurrence, dtype: str) -> Plan:
    carry = _launch(r, kernels.carry_states, ("cdiv(key*value, 256)", f"batch*{r.heads}", "1"), {"B": 256})
    outputs, workspace = _outputs(r, dtype)
    return _plan(r, dtype, "chunks", (_states(r), carry, *outputs), _workspace(r, *workspace), _ALIGNED, "1")


def _corrected(r: Recurrence, dtype: str, tiles: int, block: int, warps: int) -> Plan:
    heads = f"batch*{r.heads}"
    decay = max(r.decay, 1)
    common = {"REMOVAL": bool(r.removal), "C": CHUNK}
    launches: tuple[Launch, ...] = (
        _launch(
            r,
            kernels.chunk_inverses,
            ("chunks", heads, "1"),
            common | {"DECAY": decay, "BK": 16 if decay == 2 else 32},
            warps=8,
        ),
        _launch(
            r,
            kernels.chunk_solutions,
            ("chunks", heads, "cdiv(value, 32) + cdiv(key, 32)"),
            common | {"DECAY": decay, "B": 32},
        ),
        _launch(
            r,
            kernels.carry_corrected,
            (f"cdiv(value, {block})", heads, "1"),
            common | {"TILES": tiles, "BK": _BLOCK, "BV": block},
            warps=warps,
        ),
    )
    rows = ("batch", r.heads, "length")
    workspace = [_square("inverses", r.heads), Workspace("solutions", "float32", (*rows, "value"))]
    workspace += [Workspace(name, "float32", (*rows, "key")) for name in ("reads", "writes")]
    if r.removal:
        launches = (_products(r, "a", "k", "mixed", removal=True), _states(r), *launches)
        workspace.append(_square("mixed", r.heads))
    outputs, more = _outputs(r, dtype)
    keys = tiles * _BLOCK
    fits = f"{_ALIGNED} and key <= {keys}"
    return _plan(r, dtype, f"chunks, {keys} keys", (*launches, *outputs), _workspace(r, *workspace, *more), fits, "1")
