"""The registries: what exists, found by reading the source, and loaded only when asked for.

A model, target, operator or calibrator is registered by the decorator above it, and by nothing else. To *list* what exists, the
decorators are read from the syntax trees of the folder's files, so that `isthmus list`, `--help` and every usage error answer without
importing torch, onnx or a vendor SDK; to *use* an entry, its one file is imported. The decorators' arguments are therefore literals::

    @register_model("dit-s-2", DiTConfig(depth=12, hidden_size=384, num_heads=6), summary="DiT-S/2, 33 M parameters")
    def dit(config: DiTConfig) -> ModelSpec: ...
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from .errors import UnknownNameError

T = TypeVar("T")

_PACKAGE = __name__.rsplit(".", 2)[0]  # "isthmus"
_ROOT = Path(__file__).parent.parent  # not resolved: in a development install the folders are links below src/isthmus


@dataclass(frozen=True)
class Option:
    """One settable field of an entry's configuration.

    Attributes:
        name: The field's name, the key of `--set key=value`.
        annotation: Its type as written in the source, e.g. `int` or `tuple[int, ...]`.
        default: Its value in this entry.
    """

    name: str
    annotation: str
    default: Any


@dataclass(frozen=True)
class Entry:
    """What is known of a registered thing without importing it.

    Attributes:
        name: The registered name.
        module: The module to import, e.g. `isthmus.models.dit`.
        summary: One line for people.
        options: The configuration's fields, with this entry's defaults; empty where the decorator takes no configuration.
    """

    name: str
    module: str
    summary: str = ""
    options: Mapping[str, Option] = field(default_factory=dict)


class Registry(Generic[T]):
    """The things of one kind that live in one folder of the package."""

    def __init__(self, kind: str, folder: str, decorator: str) -> None:
        self.kind = kind
        self.folder = folder
        self.decorator = decorator
        self._loaded: dict[str, T] = {}

    @cached_property
    def index(self) -> Mapping[str, Entry]:
        """Every entry by name, read from the source without importing it.

        Raises:
            ValueError: A name is registered twice, or a decorator's arguments are not literals.
        """
        found: dict[str, Entry] = {}
        for path in sorted((_ROOT / self.folder).rglob("*.py")):
            for entry in _read_entries(path, self.decorator):
                if entry.name in found:
                    raise ValueError(f"{self.kind} {entry.name!r} is registered in {found[entry.name].module} and in {entry.module}")
                found[entry.name] = entry
        return found

    def entry(self, name: str) -> Entry:
        """The entry called `name`.

        Raises:
            UnknownNameError: There is none; the error lists the near names.
        """
        if name not in self.index:
            raise UnknownNameError(self.kind, name, list(self.index))
        return self.index[name]

    def register(self, name: str, value: T) -> None:
        """Called by the decorators. Registering a name again is allowed only to the module that registered it (a reload)."""
        self._loaded[name] = value

    def __getitem__(self, name: str) -> T:
        entry = self.entry(name)
        if name not in self._loaded:
            importlib.import_module(entry.module)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def __contains__(self, name: object) -> bool:
        return name in self.index


def _read_entries(path: Path, decorator: str) -> Iterator[Entry]:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    parts = path.relative_to(_ROOT).with_suffix("").parts
    module = ".".join((_PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)))
    configs = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == decorator:
                yield _read_entry(call, module, configs)


def _read_entry(call: ast.Call, module: str, configs: Mapping[str, ast.ClassDef]) -> Entry:
    name = ast.literal_eval(call.args[0])
    keywords = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg is not None}
    options: dict[str, Option] = {}
    if len(call.args) > 1:
        config = call.args[1]
        if not (isinstance(config, ast.Call) and isinstance(config.func, ast.Name) and config.func.id in configs):
            raise ValueError(f"{module}: the second argument of the registration of {name!r} must be a call of a class of that file")
        given = {k.arg: ast.literal_eval(k.value) for k in config.keywords if k.arg is not None}
        options = _read_options(config.func.id, configs, given)
    return Entry(name=name, module=module, summary=keywords.get("summary", ""), options=options)


def _read_options(name: str, configs: Mapping[str, ast.ClassDef], given: Mapping[str, Any]) -> dict[str, Option]:
    """The fields of a class, after those of the classes of the same file that it extends."""
    config = configs[name]
    options: dict[str, Option] = {}
    for base in reversed(config.bases):
        if isinstance(base, ast.Name) and base.id in configs:
            options |= _read_options(base.id, configs, given)
    for statement in config.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
            default = given[name] if name in given else ast.literal_eval(statement.value) if statement.value is not None else None
            options[name] = Option(name, ast.unparse(statement.annotation), default)
    return options


def registering(registry: Registry[T], name: str) -> Callable[[T], T]:
    """A decorator that puts its object into `registry` under `name` and returns it unchanged."""

    def decorate(value: T) -> T:
        registry.register(name, value)
        return value

    return decorate
