"""The survey's systems are all registered, and the page about them is that of the sweep."""

import json
import re
from pathlib import Path

import pytest

from isthmus.exporter.spec import MODELS
from isthmus.exporter.target import TARGETS

from .architectures import CELLS, REFUSALS, STEMS, Cell, page, stem_of

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
TINY = {name for name in MODELS if name.endswith("-tiny")}


@pytest.mark.parametrize("stem", STEMS)
def test_every_system_has_a_tiny_and_a_published_size(stem):
    names = {name for name in MODELS if stem_of(name) == stem}
    assert f"{stem}-tiny" in names or any(re.fullmatch(rf"{stem}-\w+-tiny", name) for name in names)
    assert any(not name.endswith(("-tiny", "-digits")) for name in names)


def test_the_list_of_models_has_every_system(run):
    listed = {m["name"] for m in json.loads(run("list", "models", "--format", "json").stdout)["models"]}
    assert {stem_of(name) for name in listed} >= set(STEMS)


def test_refusals_are_of_models_and_targets_that_exist_and_rare():
    assert {name for name, _ in REFUSALS} <= TINY
    assert {target for _, target in REFUSALS} <= set(TARGETS)
    assert sum(refusal.kind == "other" for refusal in REFUSALS.values()) <= 3


def test_the_sweep_has_every_target():
    assert {target for target, _ in CELLS} == set(TARGETS)


def test_the_page_has_a_row_for_each_system_and_form_and_a_cell_for_each_target():
    text = PAGE.read_text()
    rows = dict(re.findall(r"^\| \*\*([\w-]+)\*\*.*?\) \| (.*) \|$", text, re.MULTILINE))
    assert set(rows) >= set(STEMS)
    forms = dict(re.findall(r"^\| `([\w.-]+)` \| (.*) \|$", text, re.MULTILINE))
    assert set(forms) == TINY, "run `make architectures`"
    for name, row in forms.items():
        cells = row.split(" | ")
        assert len(cells) == len(CELLS)
        for (target, _), cell in zip(CELLS, cells, strict=True):
            assert (cell == "refused") == ((name, target) in REFUSALS), (name, target)
            assert cell == "refused" or re.match(r"(verified|built|lowered), ([\d.]+ dB|[\d.e-]+|exact)", cell), (name, target, cell)
    for (name, target), refusal in REFUSALS.items():
        assert f"- `{name}` on {target} ({refusal.kind}): `{refusal.operator}`. {refusal.why}" in text


def test_the_page_of_some_cells():
    cells = [
        Cell("mamba-tiny", "onnxruntime", "fp32", "verified", "onnx", 2.5e-7, 131.0),
        Cell("mamba-step-tiny", "onnxruntime", "fp32", "verified", "onnx", 3.5e-7, 129.0),
        Cell("mamba2-tiny", "coreml", "fp16", "verified", "mil", 1e-3, 61.27),
        Cell("moe-tiny", "coreml", "fp16", "verified", "mil", 1e-3, 60.0),
        Cell("moe-step-tiny", "coreml", "fp16", "verified", "mil", 2e-3, 70.0),
        Cell("fsq-tiny", "tensorrt-rtx", "fp16", "built", "onnx", 0.0, float("inf")),
        Cell("mixer-tiny", "onnxruntime", "fp32", "verified", "onnx", 0.0, float("inf")),
        Cell("mamba-tiny", "coreai", "fp16", "refused", reason="no"),
    ]
    text = page(cells)
    assert "| **mamba** (`mamba-tiny`, `mamba-step-tiny`) | verified, 3.5e-07 | not swept | not swept | not swept | refused |" in text
    assert "| **mamba2** (`mamba2-tiny`) | not swept | not swept | not swept | verified, 61.3 dB | not swept |" in text
    assert "| **moe** (`moe-tiny`, `moe-step-tiny`) | not swept | not swept | not swept | verified, 60.0 dB | not swept |" in text
    assert "| **mixer** (`mixer-tiny`) | verified, exact |" in text, "a model that is none of the systems"
    assert "| `fsq-tiny` | not swept | not swept | built, exact (onnx) | not swept | not swept |" in text
