"""Recipes: read, written, and held against the options that they stand for; and patterns of modules."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.calibration.recipe import REST, Recipe, patterns_of, read_recipe
from isthmus.exporter.errors import UsageError
from isthmus.exporter.passes.fp8_layers import select
from isthmus.exporter.patterns import matches

# Beside the other files that read the graph of `conftest.py`, which is made once a process.
pytestmark = pytest.mark.xdist_group("tuning")


RECIPE = Recipe("fp8", ("blocks.*",), ("=blocks.0.attn", "blocks.7.mlp"), "mse", "gptq", 0.5)


@pytest.mark.parametrize("recipe", [RECIPE, Recipe("int8", ("*",))])
def test_a_recipe_is_read_as_it_was_written(tmp_path, recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.text(notes=["a: note", "- another"]))
    assert read_recipe(path) == recipe
    assert read_recipe(path).sha256() == recipe.sha256() != Recipe("fp8", ("blocks.*",)).sha256()


def test_all_faults_of_a_recipe_are_listed(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "schema: 2\nfp8: [a, 'b,c', '', 3]\nfp16: [a]\nfp32: [x]\nsmoth: 1\nsmooth: .nan\nweight_rounding: up\ncalibration_method: [max]\n"
    )
    with pytest.raises(UsageError, match="is no recipe") as error:
        read_recipe(path)
    text = str(error.value)
    for part in (
        "schema: got 2, expected 1",
        "unknown key 'smoth'",
        "fp32: beside fp8, modules compute in fp16",
        "fp8: got 'b,c'",
        "fp8: got ''",
        "fp8: got 3",
        "the pattern 'a' is for fp8 and for fp16",
        "smooth: got nan",
        "weight_rounding: got 'up'",
        "calibration_method: got ['max']",
    ):
        assert part in text
    assert len(error.value.reasons) == 10


def test_faults_beside_a_second_precision_are_listed_too(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("schema: 1\nfp8: [a]\nint8: ['b,c']\nfp16: x\nfp32: [' y']\ncalibration_method: entropie\nsmooth: 2\n")
    with pytest.raises(UsageError) as error:
        read_recipe(path)
    found = {(reason.where, reason.what.split(",")[0]): reason.fix for reason in error.value.reasons}
    assert found.keys() == {
        ("", "got patterns for fp8 and int8"),
        ("fp32", "beside fp8"),
        ("int8", "got 'b"),
        ("fp16", "got a str"),
        ("fp32", "got ' y'"),
        ("calibration_method", "got 'entropie'"),
        ("smooth", "got 2"),
    }
    assert "entropy" in found["calibration_method", "got 'entropie'"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "got a NoneType"),
        ("[1]", "got a list"),
        ("schema: 1", "no low precision"),
        ("schema: 1\nfp8: []", "got no pattern"),
        ("schema: 1\nfp8: [a]\nint8: [b]", "fp8 and int8"),
        ("schema: 1\nfp8: a", "got a str, expected a list"),
        ("schema: 1\nfp8: &a [x]\nfp16: *a", "aliases are not read"),
        ("schema: 1\nschema: 1", "is there twice"),
        ("schema: true\nfp8: [a]", "got True"),
        ("schema: 1\nfp8: !!python/object:os.system [a]", "could not determine a constructor"),
        ("schema: 1\nfp8: [a]\nsmooth: 1.5", "expected a number from 0 to 1"),
    ],
)
def test_what_is_no_recipe(tmp_path, text, reason):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_recipe(path)
    assert reason in str(error.value)


def test_files_that_are_not_read(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(2**20 + 1)
    with pytest.raises(UsageError, match="larger than"):
        read_recipe(tmp_path / "large.yaml")


def test_contradictions_of_a_recipe():
    takes = ("fp8_include", "fp8_exclude")
    said, reasons = RECIPE.arguments({}, takes=takes)
    assert not reasons
    assert said == {
        "precision": "fp8",
        "fp8_include": ("blocks.*",),
        "fp8_exclude": ("=blocks.0.attn", "blocks.7.mlp"),
        "calibration_method": "mse",
        "weight_rounding": "gptq",
        "smooth": 0.5,
    }
    same = {**said, "fp8_include": "blocks.*", "fp8_exclude": ["=blocks.0.attn", "blocks.7.mlp"]}
    assert RECIPE.arguments(same, takes=takes) == (said, [])
    _, reasons = RECIPE.arguments({"precision": "fp16", "fp8_include": "x", "smooth": 0.25, "weight_rounding": "gptq"}, takes=takes)
    assert [re.match(r"--[a-z0-9-]+", reason.what).group() for reason in reasons] == ["--precision", "--fp8-include", "--smooth"]
    assert "cannot be told" in RECIPE.arguments({}, takes=("int8_include",))[1][0].what
    # What a recipe leaves open can be asked for.
    assert Recipe("int8", ("*",)).arguments({"smooth": 0.5}, takes=("int8_include",))[1] == []


MODULES = st.lists(st.sampled_from(["a", "b", "0", "1", "10", "attn"]), min_size=1, max_size=4).map(".".join) | st.just("")


@settings(max_examples=300, deadline=None)
@given(st.lists(MODULES, unique=True, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_patterns_match_what_they_are_for_and_no_more(modules, random):
    chosen = [module for module in modules if random.random() < 0.5]
    others = [module for module in modules if module not in chosen]
    patterns = patterns_of(chosen, others)
    assert {module for module in modules if matches(module, patterns)} == set(chosen)
    assert len(patterns) <= len(chosen)


def test_patterns_are_few():
    modules = [f"blocks.{i}.{name}" for i in range(3) for name in ("attn", "attn.qkv", "mlp.fc1", "mlp.fc2")]
    assert patterns_of(modules, ["head"]) == ("blocks",)
    assert patterns_of(modules, []) == ("*",)
    mlp = [module for module in modules if "mlp" in module]
    assert patterns_of(mlp, [module for module in modules if module not in mlp]) == ("blocks.*.mlp",)
    own = [module for module in modules if module.endswith("attn")]
    assert patterns_of(own, [module for module in modules if module not in own]) == ("=blocks.*.attn",)


def test_a_path_of_its_own_leaves_out_attention_and_not_its_projections(tuned):
    def modules(**patterns):
        return {layer.module for layer in select(tuned.graph, **patterns).layers}

    everything = modules(include=["*"])
    assert everything - modules(include=["*"], exclude=["=attn"]) == {"attn"}
    assert everything - modules(include=["*"], exclude=["attn"]) == {"attn", "attn.qkv", "attn.proj"}
    assert select(tuned.graph, exclude=["=att", "=attn.*"]).unmatched == ("=att",)


def test_what_recipes_are_for_is_an_option_of_a_target():
    from isthmus.exporter.target import TARGETS

    for precision, rest in REST.items():
        targets = [t for t in map(TARGETS.__getitem__, TARGETS) if f"{precision}_include" in t.Options.model_fields]
        assert targets
        assert all({f"{precision}_exclude"} <= set(t.Options.model_fields) and {precision, rest} <= set(t.precisions) for t in targets)
