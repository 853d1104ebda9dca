"""`isthmus tune` in its parts: recipes, switched graphs, trials, the search, the journal, and where trials run."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from isthmus.calibrating import operands
from isthmus.calibration.data import CalibrationData
from isthmus.calibration.executors import InProcess, Processes, Ray, executor, run_shipped
from isthmus.calibration.journal import Journal
from isthmus.calibration.observe import Observer
from isthmus.calibration.recipe import REST, Recipe, patterns_of, read_recipe
from isthmus.calibration.sensitivity import Unit, all_flops, predicted, units_of
from isthmus.calibration.switches import switched
from isthmus.calibration.table import calibration_table
from isthmus.calibration.trials import FACTS, MODEL, WORST, Trials, fingerprint, sqnr_db, write_facts
from isthmus.calibration.tuning import Budget, Point, Trialing, dominates, front_of, point_value, search
from isthmus.exporter import onnx as onnx_files
from isthmus.exporter.errors import IsthmusError, MachineError, UsageError
from isthmus.exporter.passes import optimise
from isthmus.exporter.passes.fp8_layers import select
from isthmus.exporter.passes.quantize_int8 import QuantizeInt8
from isthmus.exporter.patterns import matches
from isthmus.exporter.spec import Samples
from isthmus.exporter.trace import trace


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.proj = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 2, 2)
        self.attn = Attention()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image).flatten(2).transpose(1, 2)
        x = x + self.attn(x)
        return x + self.down(torch.relu(self.up(x)))


class Tuned:
    """A small net as a graph, with its layers, its ranges, and folders of trials."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = Net().eval()
        rng = np.random.default_rng(0)
        self.sets = [{"image": rng.normal(size=(2, 3, 8, 8)).astype(np.float32)} for _ in range(3)]
        self.example = {"image": torch.from_numpy(self.sets[0]["image"])}
        program = trace(self.net, self.example, dynamic={}, ranges={})
        graph = onnx_files.to_onnx(program, opset=23, input_names=["image"], output_names=["y"], dimension_names={})
        self.graph = optimise(graph)
        self.observer = Observer(self.graph, operands(self.graph))
        data = CalibrationData("given", self.sets[:2])
        seen = self.observer.observe(data)
        self.table = calibration_table(seen, data, method="max", grids=("e4m3", "uint8", "int8"))

    def layers(self, precision):
        found = select(self.graph, include=["*"]).layers
        return [layer for layer in found if precision == "fp8" or (layer.kind == "weight" and layer.module != "stem")]

    def write(self, folder, precision, **options):
        units = units_of(self.graph, self.layers(precision), {})
        switches = [(layer, i) for i, unit in enumerate(units) for layer in unit.layers]
        folder.mkdir(parents=True, exist_ok=True)
        onnx_files.save(switched(self.graph, switches, self.table, precision, **options), folder / MODEL, bytes_of_weights=0)
        write_facts(folder, switches=len(units), outputs=["y"], sets=self.sets[2:])
        return units


@pytest.fixture(scope="module")
def tuned():
    return Tuned()


@pytest.fixture(scope="module")
def folder(tuned, tmp_path_factory):
    made = tmp_path_factory.mktemp("trials")
    tuned.write(made, "fp8")
    return made


# recipes


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


# switched graphs and trials


def e4m3(array, scale):
    """What E4M3 reads back: numpy's own cast, not ours."""
    return (np.clip(array / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale).astype(np.float32)


def test_a_switch_quantises_one_module_as_e4m3_does(tuned, folder):
    units = units_of(tuned.graph, tuned.layers("fp8"), {})
    names = [unit.module for unit in units]
    assert sorted(names) == sorted({"attn.qkv", "attn", "attn.proj", "up", "down"})
    trials = Trials(folder)
    image = tuned.sets[2]
    reference = trials.run(image, ())["y"]
    with torch.no_grad():
        np.testing.assert_allclose(reference, tuned.net(torch.from_numpy(image["image"])).numpy(), atol=2e-6)
    # The last layer, in numpy: the scales are float16 numbers, rounded upwards.
    with torch.no_grad():
        x = tuned.net.stem(torch.from_numpy(image["image"])).flatten(2).transpose(1, 2)
        x = x + tuned.net.attn(x)
        hidden = torch.relu(tuned.net.up(x)).numpy()
    seen = tuned.table.values[next(unit for unit in units if unit.module == "down").layers[0].observed[0]].amax

    def scale(largest):
        half = np.float16(largest / 448)
        return np.float32(half if half >= largest / 448 else np.nextafter(half, np.float16(np.inf)))

    weight = tuned.net.down.weight.detach().numpy()
    rows = np.array([scale(row) for row in np.abs(weight).max(1)], np.float32)
    down = e4m3(hidden, scale(seen)) @ e4m3(weight, rows[:, None]).T + tuned.net.down.bias.detach().numpy()
    expected = x.numpy() + down
    found = trials.run(image, {names.index("down")})["y"]
    # A value at the border between two codes may fall to either side.
    assert np.mean(np.abs(found - expected) > 1e-5) < 0.01
    np.testing.assert_allclose(found, expected, atol=0.02)
    (noise,) = trials.noise({names.index("down")})
    assert noise == pytest.approx(np.square(expected - reference).sum() / np.square(reference).sum(), rel=0.02)


def test_everything_switched_on_in_int8_is_the_graph_that_is_written(tuned, tmp_path):
    import onnx_ir as ir
    import onnxruntime as ort

    units = tuned.write(tmp_path / "int8", "int8")
    layers = tuned.layers("int8")
    written = tuned.graph.clone()
    QuantizeInt8(layers, {name: tuned.table.interval(name, "uint8") for x in layers for name in x.observed})(written)
    ir.save(written, tmp_path / "written.onnx")
    session = ort.InferenceSession(str(tmp_path / "written.onnx"), providers=["CPUExecutionProvider"])
    (expected,) = session.run(["y"], tuned.sets[2])
    trials = Trials(tmp_path / "int8")
    found = trials.run(tuned.sets[2], range(len(units)))["y"]
    # Sums in int32 there, in float32 here; a value on the border between two codes may fall to either side.
    assert np.mean(np.abs(found - expected) > 1e-4) < 0.02
    assert 20 < sqnr_db(trials.noise(range(len(units)))) < 60


def test_corrections_are_added_where_the_switch_is_on(tuned, tmp_path):
    layer = next(x for x in tuned.layers("int8") if x.module == "down")
    added = np.arange(32, dtype=np.float32)
    units = tuned.write(tmp_path / "plain", "int8")
    tuned.write(tmp_path / "corrected", "int8", corrections={layer.node: added})
    plain, corrected = Trials(tmp_path / "plain"), Trials(tmp_path / "corrected")
    on = {next(i for i, unit in enumerate(units) if unit.module == "down")}
    inputs = tuned.sets[2]
    np.testing.assert_array_equal(plain.run(inputs, ())["y"], corrected.run(inputs, ())["y"])
    np.testing.assert_allclose(corrected.run(inputs, on)["y"] - plain.run(inputs, on)["y"], np.broadcast_to(added, (2, 16, 32)), atol=1e-5)


def test_errors_of_single_modules_nearly_add_up(folder):
    trials = Trials(folder)
    count = json.loads((folder / FACTS).read_text())["switches"]
    alone = [trials.noise({i}) for i in range(count)]
    assert all(noise[0] > 0 for noise in alone)
    assert sqnr_db(predicted(alone, range(count))) == pytest.approx(sqnr_db(trials.noise(range(count))), abs=3)
    assert predicted(alone, ()) == ()


def test_sqnr():
    assert sqnr_db([0.01, 0.001]) == pytest.approx(20)
    assert (sqnr_db([0.0]), sqnr_db([WORST])) == (300, -300)


def test_a_folder_that_cannot_be_run(folder, tmp_path):
    with pytest.raises(IsthmusError, match="cannot be run"):
        Trials(tmp_path)
    with pytest.raises(IsthmusError, match="failed on a trial"):
        Trials(folder).run({"image": np.zeros((2, 3, 8, 8), np.float64)}, ())


def test_operations_are_those_that_torch_counts(tuned):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tuned.net(tuned.example["image"])
    # scaled_dot_product_attention on the CPU is not one of the operators that torch counts: 2 products of 16 x 16 x 16, 2 heads, 2 rows.
    attention = 2 * 2 * 2 * 2 * 16 * 16 * 16
    counted = counter.get_total_flops()
    assert all_flops(tuned.graph, {}) in (counted, counted + attention)
    assert sum(unit.flops for unit in units_of(tuned.graph, tuned.layers("fp8"), {})) < all_flops(tuned.graph, {})


# the search


def made_up(random, count, equal):
    units = [Unit(f"m{i}", (), 100 if equal else random.randint(1, 100)) for i in range(count)]
    return units, [(random.uniform(1e-6, 1e-3),) for _ in range(count)]


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 9), st.booleans())
def test_the_search_is_near_the_best_of_all_choices_where_errors_add_up(random, count, equal):
    units, noises = made_up(random, count, equal)
    bound = random.uniform(min(n[0] for n in noises), 1.2 * sum(n[0] for n in noises))
    total = sum(unit.flops for unit in units)
    asked = []

    def measure(choices):
        asked.extend(choices)
        return [(sum(noises[i][0] for i in on),) for on in choices]

    budget = Budget(min_sqnr=sqnr_db([bound * (1 + 1e-9)]))
    subsets = [set(s) for n in range(1, count + 1) for s in itertools.combinations(range(count), n)]
    allowed = [sum(units[i].flops for i in s) / total for s in subsets if sum(noises[i][0] for i in s) <= bound]
    found = search(units, total, budget, noises=measure)
    assert found.best.sqnr_db >= budget.min_sqnr
    # Of a relaxed knapsack that is rounded down, one module is missing at the most.
    assert found.best.share >= max(allowed) - max(unit.flops for unit in units) / total - 1e-12
    if equal:
        assert found.best.share == pytest.approx(max(allowed))
    assert len(asked) == len(set(asked))


def test_a_choice_is_measured_when_errors_do_not_add_up():
    units = [Unit(f"m{i}", (), 10) for i in range(6)]
    single = [1e-4 * (i + 1) for i in range(6)]

    def measure(choices):
        # The first two together are far worse than they are alone.
        return [(sum(single[i] for i in on) + (0.1 if {0, 1} <= set(on) else 0.0),) for on in choices]

    found = search(units, 60, Budget(min_sqnr=26.0), noises=measure)
    assert found.best.sqnr_db >= 26
    assert found.best.share == pytest.approx(5 / 6)  # all but one of the two
    assert found.predicted_sqnr_db == pytest.approx(found.best.sqnr_db)


def test_pictures_are_drawn_for_what_keeps_the_other_bound_only():
    units = [Unit(f"m{i}", (), 10) for i in range(8)]
    drawn = []

    def psnr(on):
        drawn.append(on)
        return 50.0 - 2 * len(on)

    def measure(choices):
        return [(1e-4 * max(len(on), 1),) for on in choices]

    found = search(units, 80, Budget(min_sqnr=32.0, min_psnr=40.0), noises=measure, psnr=psnr)
    assert len(found.best.on) == 5
    assert found.best.psnr_db == 40
    assert all(len(on) <= 6 for on in drawn)
    assert len(drawn) == len(set(drawn))


def test_distances_are_measured_for_what_keeps_the_other_bounds_only():
    units = [Unit(f"m{i}", (), 10) for i in range(8)]
    asked = []

    def lpips(on):
        asked.append(on)
        return 0.01 * len(on)

    def measure(choices):
        return [(1e-4 * max(len(on), 1),) for on in choices]

    found = search(units, 80, Budget(max_lpips=0.04), noises=measure, psnr=lambda _on: 40.0, lpips=lpips)
    assert (len(found.best.on), found.best.lpips_style, found.best.psnr_db) == (4, 0.04, None)
    assert len(asked) == len(set(asked))
    asked.clear()
    both = Budget(min_psnr=40.0, max_lpips=0.04)
    found = search(units, 80, both, noises=measure, psnr=lambda on: 46.0 - 2 * len(on), lpips=lpips)
    assert (len(found.best.on), found.best.lpips_style, found.best.psnr_db) == (3, 0.03, 40.0)
    assert all(len(on) <= 3 for on in asked)
    assert point_value(found.best, units)["lpips_style"] == 0.03
    with pytest.raises(IsthmusError, match="no module fits") as error:
        search(units, 80, Budget(max_lpips=0.001), noises=measure, lpips=lpips)
    assert "40.00 dB of SQNR and an LPIPS-style distance of 0.01" in str(error.value)
    assert "a larger --max-lpips" in str(error.value)


def test_two_measures_of_the_same_pictures_draw_once(tmp_path, monkeypatch):
    from isthmus import tuning

    drawn = []

    class Graph:
        def __init__(self, _folder):
            pass

        def run(self, inputs, on):
            drawn.append(on)
            return {"y": inputs["x"] + 0.1 * len(on)}

    def sampler(step, rng):
        return Samples(step({"x": rng.random((2, 8, 8)).astype(np.float32)})["y"], ("a", "b"))

    monkeypatch.setattr(tuning, "Trials", Graph)
    monkeypatch.setattr(tuning, "lpips_style", lambda x, y: list(np.abs(x - y).mean(axis=(1, 2))))
    pictures = tuning._Pictures(sampler, tmp_path, 0)
    one, two = frozenset([1]), frozenset([1, 2])
    assert pictures.lpips(one) == pytest.approx(0.1, abs=1e-6)
    assert pictures.psnr(one) == pytest.approx(20, abs=1)
    assert drawn == [frozenset(), one]
    assert pictures.lpips(two) == pytest.approx(0.2, abs=1e-6)
    assert drawn == [frozenset(), one, two]
    monkeypatch.setattr(tuning, "lpips_style", lambda _x, _y: [0.1, np.nan])
    assert pictures.lpips(two) == tuning.LARGEST


def test_no_module_fits():
    with pytest.raises(IsthmusError, match="no module fits") as error:
        search([Unit("a.b", (), 1)], 1, Budget(min_sqnr=50.0), noises=lambda choices: [(1e-3,) for _ in choices])
    assert "a.b, leaves 30.00 dB" in str(error.value)


def test_the_front_of_pareto():
    points = [Point(frozenset([i]), share, sqnr) for i, (share, sqnr) in enumerate([(0.1, 40), (0.5, 30), (0.4, 29), (0.5, 31), (1.0, 20)])]
    assert [(p.share, p.sqnr_db) for p in front_of(points)] == [(0.1, 40), (0.5, 31), (1.0, 20)]
    assert dominates(points, 0.5, 30)
    assert not dominates(points, 1.0, 20)
    assert not dominates(points, 0.6, 30)


# the journal, and searches that are killed


def test_a_journal_gives_back_the_same_numbers(tmp_path):
    journal = Journal(tmp_path / "j")
    numbers = (1 / 3, 5e-324, 1e30, 0.0)
    journal.add("k", numbers)
    journal.add("l", [2.0])
    again = Journal(tmp_path / "j")
    assert (again.get("k"), again.get("l"), again.get("m"), len(again)) == (numbers, (2.0,), None, 2)


def test_lines_that_are_not_whole_are_no_results(tmp_path):
    path = tmp_path / "j"
    for i in range(3):
        Journal(path).add(f"k{i}", [float(i)])
    data = path.read_bytes()
    first = data.index(b"\n") + 1
    for cut in range(first, len(data)):
        path.write_bytes(data[:cut])
        journal = Journal(path)
        whole = data[: cut + 1].count(b"\n") if data[cut : cut + 1] == b"\n" else data[:cut].count(b"\n")
        assert len(journal) == whole
    path.write_bytes(data[: len(data) - 5])
    Journal(path).add("k3", [3.0])  # after a line that was cut off
    assert [Journal(path).get(f"k{i}") for i in range(4)] == [(0.0,), (1.0,), None, (3.0,)]
    path.write_bytes(data.replace(b"[1.0]", b"[1.5]"))
    assert Journal(path).get("k1") is None
    for junk in (b"\xff\n", b"[]\n", b'{"key": 1}\n', b"[" * 100_000, b'{"key": "k", "values": [NaN], "sha256": ""}\n'):
        path.write_bytes(junk + data)
        assert len(Journal(path)) >= 2


CHILD = """
import os, signal, sys
from pathlib import Path
from isthmus.calibration import journal as journals
from isthmus.calibration.executors import InProcess
from isthmus.calibration.journal import Journal
from isthmus.calibration.recipe import Recipe, patterns_of
from isthmus.calibration.sensitivity import Unit
from isthmus.calibration.trials import fingerprint
from isthmus.calibration.tuning import Budget, Trialing, search

folder, output, left, torn = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "torn"
whole = Journal.add

def add(self, key, values):
    global left
    if left == 0:
        if torn:  # killed while it writes
            with self.path.open("ab") as file:
                file.write(b'{"key": "' + key.encode()[:20])
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    whole(self, key, values)

Journal.add = add
units = [Unit(f"blocks.{i}.fc", (), 100 + 7 * i) for i in range(5)]
with InProcess() as running:
    trialing = Trialing(running, Journal(output.with_suffix(".journal")))
    mark = fingerprint(folder)
    found = search(units, 1000, Budget(min_sqnr=float(sys.argv[5])), noises=lambda choices: trialing.noises(folder, mark, choices))
low = [unit.module for i, unit in enumerate(units) if i in found.best.on]
rest = [unit.module for i, unit in enumerate(units) if i not in found.best.on]
output.write_text(Recipe("fp8", patterns_of(low, rest), patterns_of(rest, low)).text(notes=[repr(found.best.sqnr_db)]))
print(trialing.done, trialing.known)
"""


def test_a_search_that_is_killed_goes_on_to_the_same_recipe(folder, tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    count = json.loads((folder / FACTS).read_text())["switches"]
    trials = Trials(folder)
    bound = str(sqnr_db(trials.noise(range(count))) + 1.5)

    def start(name, left, torn=""):
        output = tmp_path / name / "recipe.yaml"
        output.parent.mkdir(exist_ok=True)
        command = [sys.executable, tmp_path / "child.py", folder, output, str(left), torn, bound]
        return output, subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    output, done = start("whole", -1)
    assert done.returncode == 0, done.stderr
    expected, trials_run = output.read_bytes(), int(done.stdout.split()[0])
    assert trials_run > 8
    killed = 0
    for left, torn in ((0, "torn"), (3, ""), (2, "torn"), (trials_run - 6, "torn")):  # each goes on where the one before was killed
        output, ended = start("killed", left, torn)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert not output.exists()
        killed += left
    output, done = start("killed", -1)
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == expected
    assert [int(n) for n in done.stdout.split()] == [trials_run, killed]


def test_what_is_known_is_not_run_again(folder, tmp_path):
    class Counting(InProcess):
        ran = 0

        def run(self, folder, trials):
            for result in super().run(folder, trials):
                Counting.ran += 1
                yield result

    told = []
    mark = fingerprint(folder)
    choices = [frozenset([0]), frozenset([1]), frozenset([0, 1])]
    for expected in (3, 3):
        with Counting() as running:
            trialing = Trialing(running, Journal(tmp_path / "j"), lambda *told_: told.append(told_), expected=3)
            noises = trialing.noises(folder, mark, choices)
            assert trialing.value("psnr", mark, choices[0], lambda: 40.0) == 40.0
        assert Counting.ran == expected
    assert noises == [Trials(folder).noise(on) for on in choices]
    assert (trialing.done, trialing.known) == (4, 4)
    assert [t[0] for t in told] == [1, 2, 3, 4]
    assert all(left >= 0 for _, _, left in told)
    assert fingerprint(folder, "other") != mark  # then nothing of it is known


# where trials run


def test_processes_find_what_one_process_finds(folder):
    asked = {f"{i}": [i] for i in range(4)}
    with Processes(2) as several, InProcess() as one:
        assert dict(several.run(folder, asked)) == dict(one.run(folder, asked))
        workers = [worker.pid for worker in several._workers]
        assert len(set(workers)) == 2
        with pytest.raises(IsthmusError, match="cannot be run"):
            dict(several.run(folder / "none", {"x": [0]}))
        for worker in several._workers:
            worker.kill()
        with pytest.raises(IsthmusError, match="ended with exit code -9"):
            dict(several.run(folder, {"x": [0]}))
    assert not several._workers


class FakeRay(types.SimpleNamespace):
    """The calls of Ray that are used, in this process: what `ray.put` gives is a reference, which a task gets the value of."""

    def __init__(self) -> None:
        super().__init__(objects={}, calls=[], closed=False)

    def init(self, **options):
        if options["address"] == "ray://nowhere:1":
            raise ConnectionError("could not connect\nmore")
        self.calls.append(options)

    def put(self, value):
        self.objects[f"ref{len(self.objects)}"] = value
        return f"ref{len(self.objects) - 1}"

    def remote(self, **options):
        self.calls.append(options)

        def decorate(function):
            def submit(*arguments):
                values = [self.objects.get(a, a) if isinstance(a, str) else a for a in arguments]
                try:
                    return self.put((True, function(*values)))
                except Exception as error:
                    return self.put((False, error))

            return types.SimpleNamespace(remote=submit)

        return decorate

    def wait(self, references, num_returns):
        return references[-num_returns:], references[:-num_returns]

    def get(self, reference):
        good, value = self.objects[reference]
        if not good:
            raise value
        return value

    def shutdown(self):
        self.closed = True


def test_trials_on_ray_find_what_one_process_finds(folder):
    ray = FakeRay()
    asked = {f"{i}": [i] for i in range(3)}
    with Ray("auto", module=ray) as cluster, InProcess() as one:
        expected = dict(one.run(folder, asked))
        assert dict(cluster.run(folder, asked)) == expected
        assert dict(cluster.run(folder, {"0": [0]})) == {"0": expected["0"]}
        assert sum(isinstance(value, dict) for value in ray.objects.values()) == 1  # the weights are sent once
        assert ray.calls[:2] == [{"address": "auto", "log_to_driver": False, "ignore_reinit_error": True}, {"num_cpus": 1}]
    assert ray.closed
    with Ray("", module=FakeRay()) as cluster, pytest.raises(IsthmusError, match="a trial failed on the Ray cluster"):
        dict(cluster.run(folder.parent, {"0": [0]}))
    with pytest.raises(MachineError, match="cannot be reached at ray") as error:
        Ray("ray://nowhere:1", module=FakeRay())
    assert error.value.message == "Ray cannot be reached at ray://nowhere:1: could not connect"


def test_files_of_another_machine_stay_in_their_folder(tmp_path, folder):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run_shipped("a", {**files, "../outside": b""}, [0]) == list(Trials(folder).noise([0]))
    assert not list(Path(tmp_path).parent.glob("outside"))


def test_ray_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MachineError, match="which is not installed") as error:
        executor("ray", jobs=1, address="auto")
    assert "pip install ray" in error.value.hint
    assert isinstance(executor("local", jobs=1, address=""), InProcess)
    assert isinstance(executor("local", jobs=2, address=""), Processes)
