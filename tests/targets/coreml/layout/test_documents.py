"""Each rewrite does to a graph what its text says: the graphs before and after that it shows are the test."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch.export import ExportedProgram

from isthmus.targets.coreml import layout
from isthmus.targets.coreml.layout.graph import text
from isthmus.targets.coreml.layout.settle import settle

FILES = [name for _, name, _ in pkgutil.iter_modules(layout.__path__)]


def documented(name: str) -> dict[str, str]:
    """The graphs of a file's text, under Before and After."""
    document = importlib.import_module(f"isthmus.targets.coreml.layout.{name}").__doc__ or ""
    blocks = re.findall(r"^(Before|After)\b(?:[^:]|:(?!:))*::\n\n((?:    .+\n)+)", document, re.MULTILINE)
    return {kind: "\n".join(line[4:] for line in block.splitlines()) for kind, block in blocks}


@dataclass(frozen=True)
class Example:
    """What a file's graph is the graph of.

    Attributes:
        function: Takes the module, for its tensors, and the inputs.
        inputs: Shapes, or tensors.
        stored: The shapes of the parameters, or buffers.
    """

    function: Callable[..., object]
    inputs: dict[str, tuple[int, ...] | torch.Tensor]
    stored: dict[str, tuple[int, ...] | torch.Tensor]


def gathered(m, x, y):
    return F.embedding(y, m.table), x[:, m.places]


def settled(m, x):
    hidden = F.conv2d(x, m.first).reshape(2, 8, 6).permute(0, 2, 1).relu()
    return F.conv2d(hidden.permute(0, 2, 1).reshape(2, 8, 1, 6), m.second)


def masked(m, scores, mask, q, k, v):
    weights = torch.where(mask, scores, torch.full_like(scores, -torch.inf)).softmax(-1)
    return weights, F.scaled_dot_product_attention(q, k, v, mask)


MASK = torch.arange(2 * 4 * 6 * 6).reshape(2, 4, 6, 6) % 5 != 0
QKV = {"q": (2, 4, 6, 8), "k": (2, 4, 6, 8), "v": (2, 4, 6, 8)}

EXAMPLES = {
    "linear": Example(lambda m, x: F.linear(x, m.weight, m.bias), {"x": (2, 6, 8)}, {"weight": (4, 8), "bias": (4,)}),
    "layer_norm": Example(lambda m, x: F.layer_norm(x, (8,), m.weight, m.bias), {"x": (2, 6, 8)}, {"weight": (8,), "bias": (8,)}),
    "rms_norm": Example(lambda m, x: F.rms_norm(x, (8,), m.weight, 1e-6), {"x": (2, 6, 8)}, {"weight": (8,)}),
    "cumulative_sum": Example(lambda _, x: x.cumsum(1), {"x": (2, 6, 8)}, {}),
    "gather": Example(gathered, {"x": (2, 6, 8), "y": torch.tensor([9, 4])}, {"table": (10, 8), "places": torch.tensor([4, -1, 0])}),
    "masks": Example(masked, {"scores": (2, 4, 6, 6), "mask": MASK, **QKV}, {}),
    "split_attention": Example(
        lambda _, q, k, v: F.scaled_dot_product_attention(q, k, v), {"q": (2, 2, 6, 4), "k": (2, 2, 5, 4), "v": (2, 2, 5, 4)}, {}
    ),
    "settle": Example(settled, {"x": (2, 8, 1, 6)}, {"first": (8, 8, 1, 1), "second": (8, 8, 1, 1)}),
}


def test_every_text_with_graphs_is_an_example() -> None:
    assert {name for name in FILES if documented(name)} == set(EXAMPLES)


def _rewrite(name: str) -> Callable[..., object]:
    """The public function of the file that takes an editor, or a program."""
    module = importlib.import_module(f"isthmus.targets.coreml.layout.{name}")
    (found,) = (f for f in vars(module).values() if getattr(f, "__module__", "") == module.__name__ and _rewrites(f))
    return found


def _rewrites(found: object) -> bool:
    if not inspect.isfunction(found) or found.__name__.startswith("_"):
        return False
    return list(inspect.signature(found).parameters) in (["editor"], ["program"])


def _tensor(given: tuple[int, ...] | torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return given if isinstance(given, torch.Tensor) else torch.randn(given, generator=generator)


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_graphs_of_the_text(name: str, function, exported, rewritten, same) -> None:
    example, generator = EXAMPLES[name], torch.Generator().manual_seed(0)
    module = function(example.function, **{key: _tensor(given, generator) for key, given in example.stored.items()})
    inputs = tuple(_tensor(given, generator) for given in example.inputs.values())
    program, given = exported(module, *inputs), documented(name)
    rewrite = _rewrite(name)
    result = _once(rewrite, program, rewritten)
    assert _text(result, example) == given["After"]
    assert _text(_once(rewrite, result, rewritten), example) == given["After"], "a second run changes the graph again"
    assert _text(program, example) == given["Before"], "the program given is to stay as it is"
    same(result, program, *inputs)


def _once(rewrite: Callable[..., object], program: ExportedProgram, rewritten: Callable[..., ExportedProgram]) -> ExportedProgram:
    return settle(program) if rewrite is settle else rewritten(program, rewrite)


def _text(program: ExportedProgram, example: Example) -> str:
    """With the inputs' names: torch.export calls those of a function of any inputs `inputs_0` and so on."""
    names = list(example.inputs)
    return re.sub(r"\binputs_(\d+)\b", lambda match: names[int(match[1])], text(program))
