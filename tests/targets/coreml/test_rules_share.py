"""The share that is likely on the Neural Engine: operations counted by hand and by torch, and what takes them off it."""

import functools
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from isthmus.exporter.lint import lint
from isthmus.exporter.quiet import quiet
from isthmus.exporter.source import load_source
from isthmus.exporter.trace import trace
from isthmus.targets.coreml import layout
from isthmus.targets.coreml.convert import converted
from isthmus.targets.coreml.interpreter import load
from isthmus.targets.coreml.modules import KEY, read_modules
from isthmus.targets.coreml.rules.engine import Share, engine_share, share_table
from isthmus.targets.coreml.rules.program import Package, ProgramSubject


def _load(name):
    spec = importlib.util.spec_from_file_location(f"coreml_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


programs = _load("lint_fixtures")
mb, built = programs.mb, programs.built


def subject(*made, **more):
    return ProgramSubject(tuple(Package(program) for program in made), target="coreml", **more)


def weight(*shape):
    return programs.random(*shape)


class TestOperations:
    @pytest.mark.parametrize(
        ("function", "shapes", "flops"),
        [
            (lambda x: mb.linear(x=x, weight=weight(96, 64)), [(2, 5, 64)], 2 * 2 * 5 * 64 * 96),
            (lambda a, b: mb.matmul(x=a, y=b), [(3, 1, 5, 7), (4, 7, 6)], 2 * 3 * 4 * 5 * 7 * 6),
            (lambda a, b: mb.matmul(x=a, y=b, transpose_x=True), [(3, 7, 5), (3, 7, 6)], 2 * 3 * 5 * 7 * 6),
            (lambda a, b: mb.matmul(x=a, y=b, transpose_y=True), [(3, 5, 7), (3, 6, 7)], 2 * 3 * 5 * 7 * 6),
            (lambda x: mb.conv(x=x, weight=weight(8, 6, 3, 3)), [(2, 6, 9, 9)], 2 * 2 * 8 * 7 * 7 * 6 * 9),
            (lambda x: mb.conv(x=x, weight=weight(6, 2, 3, 3), groups=3, strides=[2, 2]), [(1, 6, 9, 9)], 2 * 6 * 4 * 4 * 2 * 9),
            (lambda x: mb.conv_transpose(x=x, weight=weight(6, 8, 2, 2), strides=[2, 2]), [(1, 6, 4, 4)], 2 * 6 * 16 * 8 * 4),
            (
                lambda a, b: mb.einsum(values=(a, b), equation="bkhc,bchq->bkhq"),
                [(2, 6, 3, 5), (2, 5, 3, 7)],
                2 * 2 * 5 * 3 * 7 * 6,
            ),
            (
                lambda a, b, c: mb.scaled_dot_product_attention(query=a, key=b, value=c),
                [(2, 4, 6, 8), (2, 4, 10, 8), (2, 4, 10, 12)],
                2 * 2 * 4 * 6 * 10 * (8 + 12),
            ),
            (lambda x: mb.relu(x=x), [(1, 64, 1, 64)], 0),
        ],
        ids=["linear", "matmul", "transposed-x", "transposed-y", "conv", "grouped", "conv-transpose", "einsum", "attention", "none"],
    )
    def test_operations_counted_by_hand(self, function, shapes, flops):
        share = engine_share(subject(built(function, *shapes)))
        assert share.flops == flops
        assert sum(part.products for part in share.operators) == (flops > 0)
        assert share.modules == ()

    @pytest.mark.parametrize(("likely", "function"), [
        (True, lambda x: mb.conv(x=x, weight=weight(64, 64, 1, 1))),
        (True, lambda x: mb.conv(x=mb.cumsum(x=x, axis=-1), weight=weight(64, 64, 1, 1))),  # its neighbour is not
        (False, lambda x: mb.conv(x=x, weight=weight(64, 64, 1, 17))),
    ])  # fmt: skip
    def test_a_rule_that_names_a_product_takes_it_off_the_engine(self, likely, function):
        share = engine_share(subject(built(function, (1, 64, 1, 64))))
        assert share.flops > 0
        assert share.share == float(likely)

    @pytest.mark.parametrize(("name", "rules"), [
        ("ANE-201", {"ANE-201": 1}),
        ("ANE-202", {}),  # a few shapes may do
        ("ANE-602", {"ANE-602": 1}),
    ])  # fmt: skip
    def test_what_concerns_the_whole_program_takes_all_of_it_along(self, name, rules):
        share = engine_share(programs.FIXTURES[name].wrong.open())
        assert share.flops > 0
        assert share.rules == rules
        assert share.share == float(not rules)

    def test_a_state_takes_all_of_it_along(self):
        def step(x, state):
            return mb.conv(x=mb.add(x=mb.read_state(input=state), y=x), weight=weight(64, 64, 1, 1))

        for last, expected in ((48, 0.0), (64, 1.0)):
            assert engine_share(subject(built(step, (1, 64, 1, last), state=(1, 64, 1, last)))).share == expected

    def test_what_is_in_a_branch_is_not_on_the_engine(self):
        def choose(x):
            positive = mb.greater(x=mb.reduce_max(x=x, axes=[0, 1, 2, 3], keep_dims=False), y=np.float16(0))
            inside = mb.cond(pred=positive, _true_fn=lambda: mb.conv(x=x, weight=weight(64, 64, 1, 1)), _false_fn=lambda: mb.abs(x=x))
            return mb.conv(x=inside, weight=weight(64, 64, 1, 1))

        share = engine_share(subject(built(choose, (1, 64, 1, 64))))
        assert share.flops == 2 * (2 * 64 * 64 * 64)
        assert share.share == 0.5

    def test_a_chip_has_a_share_of_its_own(self):
        wide = built(lambda x: mb.conv(x=x, weight=weight(64, 64, 1, 15), pad_type="same"), (1, 64, 1, 64))
        assert [engine_share(subject(wide, chip=chip)).share for chip in ("", "M2", "A16")] == [0.0, 0.0, 1.0]

    def test_packages_are_added_up_and_have_nothing_to_do_with_each_other(self):
        """Values of the same name in both, one of which leaves the engine."""
        one = built(lambda x: mb.conv(x=x, weight=weight(64, 64, 1, 1), name="y"), (1, 64, 1, 64))
        wide = built(lambda x: mb.conv(x=x, weight=weight(64, 64, 1, 15), pad_type="same", name="y"), (1, 64, 1, 64))
        share = engine_share(subject(one, wide))
        assert (share.flops, share.likely) == (16 * 2 * 64**3, 2 * 64**3)
        assert share.rules == {"ANE-304": 1}

    def test_a_program_without_products(self):
        share = engine_share(subject(built(lambda x: mb.relu(x=x), (1, 64, 1, 64))))
        assert (share.flops, share.share, share.operators) == (0, 0.0, ())
        assert share_table(share).rows == ()


@functools.cache
def exported(ane):
    """dit-tiny of one block as its package has it, as it is or in the layout of the Neural Engine, and the operations that torch counts."""
    source = load_source("dit-tiny", settings={"depth": 1}, weights=None, inputs=None, dynamic=(), batch_size=None, seed=0)
    # torch's counter does not know the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        source.module(**source.example)
    with quiet("torch"):
        program = trace(source.module, source.example, dynamic={}, ranges={}).run_decompositions({})
        if ane:
            program = layout.split_einsum(layout.to_ane(program))
    result = converted(program, "fp16")
    package = Package(load(result.model), modules=read_modules({KEY: result.modules}))
    return ProgramSubject((package,), target="coreml"), counter


class TestDit:
    @pytest.mark.parametrize("ane", [False, True])
    def test_the_operations_are_those_that_torch_counts(self, ane):
        """For the whole and for every module; in the other layout the table of labels is a product as well."""
        examined, counter = exported(ane)
        share = engine_share(examined)
        added = sum(part.flops for part in share.modules if part.name == "y_embedder.embedding_table")
        assert (added > 0) == ane
        assert share.flops - added == counter.get_total_flops()
        # torch's names begin with the root's class, and a module's operations are also those of the modules that contain it.
        modules = {key.partition(".")[2]: sum(counts.values()) for key, counts in counter.get_flop_counts().items() if "." in key}
        for module, flops in modules.items():
            inside = sum(part.flops for part in share.modules if f"{part.name}.".startswith(f"{module}."))
            assert inside - (added if module == "y_embedder" else 0) == flops, module

    def test_every_finding_names_its_module(self):
        findings = lint(exported(False)[0])
        by_rule = {f.rule: f for f in findings}
        assert by_rule["ANE-302"].where == "blocks.0.attn"
        assert by_rule["ANE-401"].where == "y_embedder.embedding_table"
        assert by_rule["ANE-404"].where == "t_embedder"
        root = {"add", "cast"}  # what the model itself does beside its modules
        assert all(f.where or f.what.split()[0] in root for f in findings), [str(f) for f in findings if not f.where]

    def test_the_engines_layout_leaves_more_on_the_engine_and_less_to_object_to(self):
        (plain, _), (ane, _) = exported(False), exported(True)
        before, after = engine_share(plain), engine_share(ane)
        assert 0 < before.share < after.share
        assert after.share == 1.0
        assert {"ANE-302", "ANE-401"} <= set(before.rules)
        assert not {"ANE-302", "ANE-401"} & set(after.rules)
        places = [{f.rule: f.count for f in lint(subject)} for subject in (plain, ane)]
        assert places[0]["ANE-301"] == 9  # every linear layer
        assert not {"ANE-301", "ANE-302", "ANE-401"} & set(places[1])
        assert sum(after.rules.values()) < sum(before.rules.values())

    def test_as_json_and_as_a_table_of_the_report(self):
        share = engine_share(exported(False)[0])
        value = share.value()
        assert (value["verdict"], value["chip"], value["share"], value["flops"]) == ("likely", None, share.share, share.flops)
        assert sum(part["likely"] for part in value["operators"]) == sum(part["likely"] for part in value["modules"]) == share.likely
        table = share_table(share)
        assert "Likely, and never certain" in table.lead
        assert f"{100 * share.share:.1f} %" in table.lead
        assert all(rule in table.lead for rule in share.rules)
        assert table.columns[0].name == "PyTorch module"
        assert sum(row[2] for row in table.rows) == share.flops
        assert sum(row[3] for row in table.rows) == share.likely
        unknown = share_table(Share("A16", share.operators, (), {}))
        assert unknown.columns[0].name == "Operation"
        assert "the A16's Neural Engine" in unknown.lead
        assert [row[0] for row in unknown.rows] == [part.name for part in share.operators]
