"""What the modules inside a PyTorch module read and return, call by call, as hooks see it."""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..exporter.errors import IsthmusError
from ..exporter.quiet import quiet
from .verify import to_array

Replace = Mapping[int, torch.Tensor]
"""Tensors to put in the place of others, by position among the tensors of a call's arguments or results."""

_ACTIVE: contextvars.ContextVar[Visitor | None] = contextvars.ContextVar("_ACTIVE", default=None)
"""Who sees calls now: a visitor may walk the same module again while it visits, and its own hooks are then silent."""

Output = tuple[str, int]
"""A result of a call: the call's key, and the position among its tensors."""


@dataclass(frozen=True)
class Seen:
    """A tensor that went by.

    Attributes:
        shape: Its shape.
        dtype: torch's name of its element type, without `torch.`.
        nbytes: Its size in bytes.
        fingerprint: A hash of shape, type and values: equal for equal tensors.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    fingerprint: str


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        path: The module's path, the first one where it has several; empty for the outermost.
        number: 0 for the first call of this module, 1 for the second, …
        kind: The name of its class.
        parent: The key of the call that it was made in; None for the outermost.
        inputs: The tensors among its arguments, in the order of torch's pytrees.
        outputs: The tensors among its results.
    """

    path: str
    number: int
    kind: str
    parent: str | None
    inputs: tuple[Seen, ...]
    outputs: tuple[Seen, ...]

    @property
    def key(self) -> str:
        """The path; from the second call on with its number, counted from 1, as in `blocks.0#2`."""
        return key_of(self.path, self.number)


def key_of(path: str, number: int) -> str:
    """See `Call.key`."""
    return f"{path}#{number + 1}" if number else path


class Run(Protocol):
    """Calls a module once more; see `Visitor.enter`."""

    def __call__(self, change: Callable[[int, torch.Tensor], torch.Tensor], seen_by: Visitor | None = None) -> Any:
        """Its result on what `change` makes of its tensors, by position. `seen_by` sees the calls, numbered anew."""
        ...


class Visitor:
    """Sees every call of a module. What it returns stands in the place of what went by."""

    def enter(self, key: str, module: nn.Module, tensors: Sequence[torch.Tensor], run: Run) -> Replace:  # noqa: ARG002 - for those that override it
        """Before a call.

        Args:
            key: See `Call.key`.
            module: The module.
            tensors: The tensors among its arguments.
            run: Calls the module once more, on its arguments or on others.
        """
        return {}

    def leave(self, key: str, module: nn.Module, tensors: Sequence[torch.Tensor]) -> Replace:  # noqa: ARG002 - for those that override it
        """After a call, with the tensors among its results."""
        return {}


def walk(module: nn.Module, inputs: Sequence[torch.Tensor], visitor: Visitor) -> Any:
    """Calls `module`, while `visitor` sees every call inside it. Returns the module's result.

    Args:
        module: In eval mode.
        inputs: Its arguments. Not copied: a module that changes its arguments changes these.
        visitor: Sees the calls.

    Raises:
        IsthmusError: The module fails.
    """
    with _hooks(module, visitor), torch.no_grad(), quiet():
        try:
            return module(*inputs)
        except IsthmusError:
            raise
        except Exception as error:  # the user's code raises what it likes
            raise IsthmusError(
                f"the PyTorch module failed: {type(error).__name__}: {error}", hint="run the module on the bundle's inputs by itself"
            ) from error


def record(module: nn.Module, inputs: Sequence[torch.Tensor]) -> list[Call]:
    """Every call inside one call of `module`, itself included, in the order in which they begin. No tensor is kept.

    Raises:
        IsthmusError: The module fails.
    """
    recorder = _Recorder({id(m): name for name, m in module.named_modules()})
    walk(module, inputs, recorder)
    return [recorder.calls[key] for key in recorder.order]


def read_outputs(module: nn.Module, inputs: Sequence[torch.Tensor], wanted: Collection[Output]) -> dict[Output, np.ndarray[Any, Any]]:
    """Calls `module` and returns the named results of the calls inside it.

    Raises:
        IsthmusError: The module fails.
    """
    reader = _Reader(frozenset(wanted))
    walk(module, inputs, reader)
    return reader.found


def tensors_of(value: object) -> list[torch.Tensor]:
    """The tensors of a nest of tuples, lists and dicts, in the order of torch's pytrees."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def aliases(module: nn.Module) -> dict[str, str]:
    """For each path of a module that has several, the one that its calls are named after."""
    first = {id(m): name for name, m in module.named_modules()}
    every = dict(module.named_modules(remove_duplicate=False))
    return {name: first[id(m)] for name, m in every.items() if first[id(m)] != name}


def by_end(calls: Sequence[Call]) -> list[Call]:
    """The calls in the order in which they end."""
    inner: dict[str | None, list[Call]] = {}
    for call in calls:
        inner.setdefault(call.parent, []).append(call)
    ended: list[Call] = []

    def end(call: Call) -> None:
        for child in inner.get(call.key, ()):
            end(child)
        ended.append(call)

    end(calls[0])
    return ended


class _Recorder(Visitor):
    def __init__(self, paths: Mapping[int, str]) -> None:
        self._paths = paths
        self._stack: list[str] = []
        self._inputs: dict[str, tuple[Seen, ...]] = {}
        self.order: list[str] = []
        self.calls: dict[str, Call] = {}

    def enter(self, key: str, module: nn.Module, tensors: Sequence[torch.Tensor], run: Run) -> Replace:  # noqa: ARG002 - as its kin
        self._inputs[key] = tuple(map(_seen, tensors))
        self._stack.append(key)
        self.order.append(key)
        return {}

    def leave(self, key: str, module: nn.Module, tensors: Sequence[torch.Tensor]) -> Replace:
        self._stack.pop()
        path, _, number = key.partition("#")
        parent = self._stack[-1] if self._stack else None
        self.calls[key] = Call(path, int(number or 1) - 1, type(module).__name__, parent, self._inputs.pop(key), tuple(map(_seen, tensors)))
        return {}


class _Reader(Visitor):
    def __init__(self, wanted: frozenset[Output]) -> None:
        self._wanted = wanted
        self.found: dict[Output, np.ndarray[Any, Any]] = {}

    def leave(self, key: str, module: nn.Module, tensors: Sequence[torch.Tensor]) -> Replace:  # noqa: ARG002 - as its kin
        self.found.update({(key, i): to_array(t) for i, t in enumerate(tensors) if (key, i) in self._wanted})
        return {}


def _seen(tensor: torch.Tensor) -> Seen:
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{tuple(data.shape)} {data.dtype}".encode(), digest_size=16)
    if data.numel():
        raw: np.ndarray[Any, np.dtype[np.uint8]] = data.reshape(-1).view(torch.uint8).numpy()
        digest.update(raw.data)
    return Seen(tuple(data.shape), str(data.dtype).removeprefix("torch."), data.numel() * data.element_size(), digest.hexdigest())


@dataclass(frozen=True)
class _Argument:
    """A tensor among the arguments of a call. A module that changes it in place changes the caller's, whatever was put in its place.

    Attributes:
        own: The caller's.
        given: What the module got.
        version: Of `given`, before the call.
    """

    own: torch.Tensor
    given: torch.Tensor
    version: int

    @property
    def changed(self) -> bool:
        """Whether the call has changed it."""
        return self.given._version != self.version


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Nobody sees the calls made in the block."""
    with _seen_by(None):
        yield


@contextlib.contextmanager
def _seen_by(visitor: Visitor | None) -> Iterator[None]:
    token = _ACTIVE.set(visitor)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@contextlib.contextmanager
def _hooks(root: nn.Module, visitor: Visitor) -> Iterator[None]:
    counts: Counter[str] = Counter()
    stack: list[tuple[str, list[_Argument]]] = []

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if _ACTIVE.get() is not visitor:
                return None
            key = key_of(path, counts[path])
            counts[path] += 1
            leaves, spec = tree_flatten((args, kwargs))
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

            def run(change: Callable[[int, torch.Tensor], torch.Tensor], seen_by: Visitor | None = None) -> Any:
                # Copies: a module may change its arguments, and the call proper is still to come.
                changed = {i: change(i, leaves[place].clone()) for i, place in enumerate(places)}
                given, named = tree_unflatten(_with(leaves, places, changed), spec)
                with _hooks(root, seen_by) if seen_by is not None else unseen():
                    return module(*given, **named)

            tensors = [leaves[i] for i in places]
            replaced = visitor.enter(key, module, tensors, run)
            given_to = [replaced.get(i, tensor) for i, tensor in enumerate(tensors)]
            stack.append((key, [_Argument(a, b, b._version) for a, b in zip(tensors, given_to, strict=True)]))
            return tree_unflatten(_with(leaves, places, replaced), spec) if replaced else None

        return hook

    def after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:  # noqa: ARG001 - the hook's signature
        if _ACTIVE.get() is not visitor:
            return None
        leaves, spec = tree_flatten(result)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        key, arguments = stack.pop()
        tensors = [leaves[i] for i in places]
        replaced = visitor.leave(key, module, tensors)
        for argument in arguments:
            if argument.changed:
                returned = next(
                    (replaced[i] for i, tensor in enumerate(tensors) if tensor is argument.given and i in replaced), argument.given
                )
                argument.own.copy_(returned)
        return tree_unflatten(_with(leaves, places, replaced), spec) if replaced else None

    handles = []
    try:
        for path, module in root.named_modules():
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        with _seen_by(visitor):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _with(leaves: list[Any], places: Sequence[int], replaced: Replace) -> list[Any]:
    changed = list(leaves)
    for i, tensor in replaced.items():
        changed[places[i]] = tensor
    return changed
