"""The rules of the Neural Engine: each on a program that it objects to and on one that is in order, for every chip."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from isthmus.exporter.errors import UnknownNameError
from isthmus.exporter.lint import EFFECTS, MODULES, RULES, lint, rules_for
from isthmus.targets.coreml.rules.chips import GENERATIONS, OLDEST, check_chip, chips_before
from isthmus.targets.coreml.rules.operators import LACKING, SINCE


def _load(name):
    spec = importlib.util.spec_from_file_location(f"coreml_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


programs = _load("lint_fixtures")
FIXTURES = programs.FIXTURES


def found(given, **more):
    return lint(given.open(**more))


class TestRegistry:
    def test_every_rule_has_a_fixture_and_every_fixture_a_rule(self):
        assert set(FIXTURES) == {rule.id for rule in rules_for(reads="mil")}

    @pytest.mark.parametrize("name", list(FIXTURES))
    def test_a_rule_is_likely_and_never_certain(self, name):
        rule = RULES[name]
        assert re.fullmatch(r"ANE-\d{3}", name)
        assert rule.verdict == "likely"
        assert rule.targets == ("coreml",)
        assert rule.effect in EFFECTS
        assert rule.effect not in ("refused", "loses fp8", "other result"), "which are errors"
        assert "coremltools 9.0" in rule.source or "https://" in rule.source

    def test_operations_have_the_names_that_coremltools_gives_them(self):
        from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

        assert set(SSAOpRegistry.core_ops) >= LACKING | set(SINCE)
        assert not LACKING & set(SINCE)


class TestRules:
    @pytest.mark.parametrize("name", list(FIXTURES))
    def test_what_is_wrong_is_found_by_its_rule_alone_and_named(self, name):
        fixture = FIXTURES[name]
        findings = found(fixture.wrong)
        assert {f.rule for f in findings} == {name}
        for finding in findings:
            assert finding.severity == ("info" if RULES[name].effect == "unproven" else "warning")
            assert finding.verdict == "likely"
            assert finding.fix
            assert finding.node, "the value's name in the program"
            assert fixture.names in (re.split(r"[ ,]", finding.what)[0], finding.where), "the operation is named"
            assert f"{name} (likely) " in str(finding)

    @pytest.mark.parametrize("name", list(FIXTURES))
    def test_what_is_right_is_found_by_no_rule(self, name):
        assert found(FIXTURES[name].right) == []

    @pytest.mark.parametrize("chip", ["", *GENERATIONS])
    @pytest.mark.parametrize("name", [name for name in FIXTURES if name != "ANE-602"])
    def test_a_chip_that_has_what_older_ones_lack(self, name, chip):
        ends = FIXTURES[name].ends
        generation = GENERATIONS[chip] if chip else OLDEST
        expected = {name} if not ends or generation < GENERATIONS[ends] else set()
        assert {f.rule for f in found(FIXTURES[name].wrong, chip=chip)} == expected
        assert found(FIXTURES[name].right, chip=chip) == []

    @pytest.mark.parametrize(("chip", "gib"), [("", 1), ("A16", 1), ("M1", 2), ("M4", 2)])
    def test_a_mac_takes_larger_files(self, chip, gib):
        for size, wrong in ((gib * programs.GIB, 0), (gib * programs.GIB + 1, 1)):
            assert len(found(programs.sized(size), chip=chip)) == wrong

    def test_more_forms(self):
        """What the fixtures leave out: other ways to the same fault, and limits of other chips."""
        given, shape = programs.Given, programs.SHAPE
        mb, built = programs.mb, programs.built
        weight, large = programs.random(64, 64), {"a": 5e3}
        expected = [
            ("ANE-205", given(lambda: programs.relu(1, 65537), {"chip": "A16"})),
            ("ANE-205", given(lambda: programs.relu(1, 65537, 1, 64))),
            ("ANE-301", given(lambda: built(lambda x: mb.matmul(x=x, y=weight, name="y"), (1, 64, 64)))),
            ("ANE-303", given(lambda: built(lambda x: mb.select(cond=mb.greater(x=x, y=np.float16(0)), a=x, b=np.float16(-6e4)), shape))),
            ("ANE-304", given(lambda: programs.convolution(17), {"chip": "M5"})),
            ("ANE-503", given(lambda: built(lambda x: mb.slice_by_index(x=x, begin=[0, 0, 0, 8], end=shape), shape), {"peaks": large})),
            ("ANE-504", given(lambda: programs.root_mean_square(divided=False), {"peaks": {"a": 256.0}})),
        ]
        for rule, wrong in expected:
            assert {f.rule for f in found(wrong)} == {rule}
        right = [
            given(lambda: programs.relu(1, 65536, 1, 64)),  # channels
            given(lambda: built(lambda x: mb.slice_by_index(x=x, begin=[0, 8, 0, 0], end=shape), shape), {"peaks": large}),
            given(lambda: programs.halves(1), {"peaks": large}),
            given(lambda: programs.root_mean_square(divided=False), {"peaks": {"a": 254.0}}),
        ]
        for given in right:
            assert found(given) == []

    @pytest.mark.parametrize("name", ["ANE-501", "ANE-503"])
    def test_nobody_looked_at_the_values(self, name):
        assert found(FIXTURES[name].wrong, peaks=None) == []

    def test_rules_look_into_branches(self):
        """cond itself, and the cumulative sum in one of its branches."""
        mb = programs.mb

        def choose(x):
            positive = mb.greater(x=mb.reduce_max(x=x, axes=[0, 1, 2, 3], keep_dims=False), y=np.float16(0))
            return mb.cond(pred=positive, _true_fn=lambda: mb.cumsum(x=x, axis=-1), _false_fn=lambda: mb.abs(x=x))

        findings = found(programs.Given(lambda: programs.built(choose, programs.SHAPE)))
        assert {f.rule for f in findings} == {"ANE-401", "ANE-402"}

    def test_weights_are_not_looked_at(self):
        """A table of 70000 rows that nothing computes is a matter of its use."""
        mb = programs.mb

        def look_up(x):
            return mb.gather(x=programs.random(70000, 4), indices=x, axis=0, name="y")

        findings = found(programs.Given(lambda: programs.built(look_up, (3,), dtype=programs.types.int32)))
        assert [(f.rule, f.what[:7]) for f in findings] == [("ANE-205", "gather "), ("ANE-401", "gather,")]


class TestFindings:
    def test_findings_name_modules(self):
        given = programs.Given(lambda: programs.built(_relus, (1, 64, 64, 1)))
        (finding,) = found(given, modules={f"r{i}": f"blocks.{i}.act" for i in range(5)})
        assert (finding.where, finding.count) == ("blocks.0.act", 5)
        assert finding.modules == (*(f"blocks.{i}.act" for i in range(MODULES)), "…")
        (finding,) = found(given)
        assert (finding.where, finding.node) == ("", "r0")
        assert "r0 (5 places): relu whose last axis of 1 is padded 32 times" in str(finding)


def _relus(x):
    for i in range(5):
        x = programs.mb.relu(x=x, name=f"r{i}")
    return x


class TestChips:
    def test_every_chip_is_known(self):
        check_chip("")
        for chip in GENERATIONS:
            check_chip(chip)
        with pytest.raises(UnknownNameError, match="unknown chip 'A61'"):
            check_chip("A61")

    def test_chips_in_words(self):
        assert chips_before(15) == "A13, M1, A14, M2"
