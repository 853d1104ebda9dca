"""The rules of `isthmus lint` on ONNX graphs: each on one that it objects to and on one in order, and the refused ones in TensorRT-RTX.

The rules on ML Programs are tested in `coreml/test_rules.py`; what is true of every rule is tested here.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from isthmus.exporter.errors import IsthmusError
from isthmus.exporter.lint import EFFECTS, MODULES, RULES, SEVERITIES, Finding, Match, lint, rules_for, rules_table
from isthmus.exporter.manifest import Manifest, StageResult, WeightsInfo
from isthmus.exporter.subject import Profile, Subject, read_subject
from isthmus.exporter.target import TARGETS
from isthmus.targets.tensorrt.coverage import coverage
from isthmus.targets.tensorrt.rules import operators

ROOT = Path(__file__).parent.parent.parent


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


models = _load("lint_fixtures")
FIXTURES = models.FIXTURES


def manifest(**changes):
    values = {
        "model": "net", "target": "tensorrt", "precision": "fp8", "inputs": (), "outputs": (), "weights": WeightsInfo(origin="random"),
        "verdict": "lowered", "stages": (StageResult(name="torch", verdict="verified"),),
    }  # fmt: skip
    return Manifest(**{**values, **changes})


class TestRegistry:
    def test_every_rule_has_a_fixture_and_every_fixture_a_rule(self):
        assert set(FIXTURES) == {rule.id for rule in rules_for(reads="onnx")}

    @pytest.mark.parametrize("name", list(RULES))
    def test_a_rule_says_what_it_is(self, name):
        rule, entry = RULES[name], RULES.entry(name)
        family = {"onnx": ("TRT", {"tensorrt", "tensorrt-rtx"}), "mil": ("ANE", {"coreml"})}[rule.reads]
        assert re.fullmatch(rf"{family[0]}-\d{{3}}", name)
        assert (rule.id, rule.summary) == (name, entry.summary)
        assert rule.check.__module__ == entry.module
        assert rule.effect in EFFECTS
        assert set(rule.targets) <= family[1]
        assert rule.targets
        assert (rule.verdict == "likely") == (rule.reads == "mil")
        for text in (rule.summary, rule.fix, rule.source):
            assert text == text.strip()
            assert text
            assert "|" not in text, "it would end a cell of the table"

    def test_the_page_has_the_rules(self):
        page = (ROOT / "docs" / "lint.md").read_text(encoding="utf-8")
        assert rules_table() in page, "docs/lint.md is out of date: it holds what isthmus.exporter.lint.rules_table() returns"
        assert all(f"| {effect} | {meaning} |" in page for effect, meaning in EFFECTS.items())


class TestRules:
    @pytest.mark.parametrize("name", list(FIXTURES))
    def test_what_is_wrong_is_found_by_its_rule_alone(self, name, tmp_path):
        found = lint(FIXTURES[name].wrong.open(tmp_path))
        assert {f.rule for f in found} == {name}
        assert all(f.what and f.fix for f in found)

    @pytest.mark.parametrize("name", list(FIXTURES))
    def test_what_is_right_is_found_by_no_rule(self, name, tmp_path):
        assert lint(FIXTURES[name].right.open(tmp_path)) == []

    @pytest.mark.parametrize("name", list(FIXTURES))
    def test_the_fixtures_are_valid_onnx(self, name):
        for given in (FIXTURES[name].wrong, FIXTURES[name].right):
            onnx.checker.check_model(given.model(), full_check=True)

    @pytest.mark.parametrize("name", list(FIXTURES))
    def test_a_rule_reads_a_graph_without_types(self, name):
        """Nothing is noted on values between inputs and outputs: rules find less, and do not fail."""
        for given in (FIXTURES[name].wrong, FIXTURES[name].right):
            model = ir.from_proto(given.model())
            for node in model.graph.all_nodes():
                for value in node.outputs:
                    value.type = value.shape = None
            list(RULES[name].check(Subject(model, **given.subject)))

    def test_more_places_and_forms(self, tmp_path):
        """What the fixtures leave out: other ways to the same fault."""
        expected = {
            "TRT-101": [models.linear(axis=1, gemm=True)],
            "TRT-103": [models.linear(weight=False)],
            "TRT-202": [models.attention(q=False), models.attention(k=False, softmax=False), models.attention(q=False, k=False, v=False)],
            "TRT-301": [models.linear(kind=onnx.TensorProto.FLOAT8E4M3FNUZ)],
            "TRT-405": [models.attention_node(softmax_precision=1), models.attention_node(outputs=3)],
            "TRT-407": [models.attention_node(head=8)],
        }
        for rule, wrong in expected.items():
            for model in wrong:
                assert {f.rule for f in lint(models.Given(lambda m=model: m).open(tmp_path))} == {rule}

    def test_a_transposed_weight_is_seen_through(self, tmp_path):
        g = models.Graph()
        x = g.qdq(g.input("x", 1, 32, 64))
        for axis in (0, 1):  # of (out, in), which the transpose turns around
            g.output(g.op("MatMul", x, g.op("Transpose", g.weight(128, 64, axis=axis), perm=[1, 0])), 1, 32, 128)
        (found,) = lint(models.Given(g.model).open(tmp_path))
        assert (found.rule, found.count) == ("TRT-101", 1)

    def test_rules_look_into_loops(self, tmp_path):
        inner = models.Graph(name="inner.")
        inner.input("i", dtype=models.INT64)
        inner.input("c", dtype=onnx.TensorProto.BOOL)
        x = inner.input("h", 1, 32, 64)
        inner.output("c", dtype=onnx.TensorProto.BOOL)
        inner.output(inner.op("MatMul", inner.qdq(x), inner.weight(64, 64, axis=0)), 1, 32, 64)
        g = models.Graph()
        x = g.input("x", 1, 32, 64)
        steps, yes = g.constant(4, models.INT64), g.constant(True, onnx.TensorProto.BOOL)
        g.output(g.op("Loop", steps, yes, x, body=inner.body()), 1, 32, 64)
        assert [f.rule for f in lint(models.Given(g.model).open(tmp_path))] == ["TRT-101"]

    def test_the_body_of_our_own_operator_is_not_looked_at(self, tmp_path):
        body = models.SCAN_BODY.replace("y = Identity (u)", "y = CumProd (u, d)")
        model = models.scan_plugin()
        model.functions[0].CopyFrom(onnx.parser.parse_function(body))
        assert lint(models.Given(lambda: model, library=models.SCAN).open(tmp_path)) == []

    @pytest.mark.parametrize(
        ("profile", "shape", "what"),
        [
            (None, (2, 8), "the input has dynamic sizes and no profile"),
            (Profile((1, 8), (2, 8), (1, 8)), (1, 8), "is not of the form 1 <= min <= opt <= max"),
            (Profile((0, 8), (2, 8), (4, 8)), (1, 8), "is not of the form 1 <= min <= opt <= max"),
            (Profile((1, 4), (2, 8), (4, 8)), (2, 8), "axis 1 is 8, and the profile goes from 4 to 8"),
            (Profile((1,), (2,), (4,)), (2,), "different numbers of axes"),
            (Profile((1, 8), (2, 8), (4, 8)), (5, 8), "the case example has shape (5, 8), the profile goes from (1, 8) to (4, 8)"),
            (Profile((1, 8), (2, 8), (4, 8)), (5,), "the case example has shape (5,)"),
        ],
    )
    def test_profiles(self, tmp_path, profile, shape, what):
        subject = {"profiles": {"x": profile} if profile else {}, "cases": {"example": {"x": shape}}}
        given = models.Given(lambda: models.line(models.RELU, "float16[batch,8] x", "float16[batch,8] y"), subject)
        (found,) = lint(given.open(tmp_path))
        assert (found.rule, found.where) == ("TRT-504", "x")
        assert what in found.what

    def test_a_library_that_the_build_will_make_is_not_missing(self, tmp_path):
        given = FIXTURES["TRT-503"].wrong
        plugin = {"path": "plugins/libisthmus_trt.so", "sha256": "", "operators": ["selective_scan"], "architectures": ["sm_90a"]}
        for change, findings in (({}, 0), ({"operators": ["rwkv7"]}, 1), ({"sha256": "ab"}, 1)):
            details = {"build": {"plugins": [{**plugin, **change}]}}
            assert len(lint(given.open(tmp_path, manifest=manifest(details=details)))) == findings

    def test_a_library_without_the_operator(self, tmp_path):
        for library in (("GatedLinearAttention",), ("SelectiveScanBackward",)):
            given = models.Given(lambda: models.scan_plugin(body=False), library=library)
            (found,) = lint(given.open(tmp_path))
            assert found.what.endswith("the libraries in plugins/ do not hold it")
        (tmp_path / "empty.so").touch()
        assert lint(FIXTURES["TRT-503"].wrong.open(tmp_path, plugins=(tmp_path / "empty.so",)))

    @pytest.mark.parametrize(("steps", "found"), [(64, 0), (65, 1), ("length", 1), ("other", 0)])
    def test_the_length_of_a_scan(self, tmp_path, steps, found):
        """A named length counts with its largest value."""
        scan = "y, ys = Scan <num_scan_inputs = 1, body = step (float16[8] h, float16[8] v) => (float16[8] a, float16[8] b) {"
        body = f"{scan} a = Add (h, v) b = Identity (a) }}> (s, x)"
        inputs, outputs = f"float16[8] s, float16[{steps},8] x", f"float16[8] y, float16[{steps},8] ys"
        profiles = {"s": Profile((8,), (8,), (8,)), "x": Profile((4, 8), (16, 8), (128, 8))} if steps == "length" else None
        given = models.Given(lambda: models.line(body, inputs, outputs), {"profiles": profiles})
        assert len(lint(given.open(tmp_path))) == found

    def test_a_damaged_file_is_refused_or_read(self, tmp_path):
        """Files with random bytes in them: what is not refused as invalid goes through every rule, and the coverage table."""
        rng = np.random.Generator(np.random.PCG64(0))
        originals = [fixture.wrong.model().SerializeToString() for fixture in FIXTURES.values()]
        path, refused, count = tmp_path / "damaged.onnx", 0, 300
        for _ in range(count):
            data = np.frombuffer(originals[rng.integers(len(originals))], np.uint8).copy()
            places = rng.integers(len(data), size=rng.integers(1, 6))
            data[places] = rng.integers(256, size=len(places))
            path.write_bytes(data.tobytes()[: rng.integers(1, len(data)) if rng.random() < 0.1 else None])
            try:
                subject = read_subject(path)
            except IsthmusError:
                refused += 1
                continue
            lint(subject)
            coverage(subject.model, {})
        assert 0 < refused < count


class TestFindings:
    def test_places_are_merged(self, tmp_path):
        g = models.Graph()
        x = g.qdq(g.input("x", 1, 32, 64))
        for i in range(5):
            g.output(g.op("MatMul", x, g.weight(64, 128, axis=0), module=f"blocks.{i}.fc"), 1, 32, 128)
        g.output(g.op("MatMul", x, g.weight(64, 128, stored=False), module="head"), 1, 32, 128)
        merged, single = lint(models.Given(g.model).open(tmp_path))
        assert (merged.rule, merged.count, merged.where) == ("TRT-101", 5, "blocks.0.fc")
        assert merged.modules == (*(f"blocks.{i}.fc" for i in range(MODULES)), "…")
        assert merged.node.startswith("MatMul_")
        assert "blocks.0.fc, blocks.1.fc, blocks.2.fc, … (5 places): " in str(merged)
        assert (single.rule, single.count, single.where, single.modules) == ("TRT-103", 1, "head", ())

    @pytest.mark.parametrize("name", list(FIXTURES))
    def test_severity_follows_from_the_effect(self, name, tmp_path):
        given, effect = FIXTURES[name].wrong, RULES[name].effect
        expected = {"wasteful": "warning", "unproven": "info"}.get(effect, "error")
        (plain,), (fp8,) = ({f.severity for f in lint(given.open(tmp_path, manifest=m), ["tensorrt-rtx"])} for m in (None, manifest()))
        assert fp8 == expected
        assert plain == ("warning" if effect == "loses fp8" else expected)

    def test_findings_sort_and_serialise(self):
        findings = [
            Finding("TRT-101", "warning", "b", where="a"),
            Finding("TRT-304", "info", "a"),
            Finding("TRT-402", "error", "a", where="b"),
            Finding("TRT-402", "error", "a", where="a", count=2, modules=("a", "c")),
        ]
        ordered = sorted(findings)
        assert [SEVERITIES.index(f.severity) for f in ordered] == [0, 0, 1, 2]
        assert [f.where for f in ordered[:2]] == ["a", "b"]
        value = json.loads(json.dumps(ordered[0].value()))
        assert value == {
            "rule": "TRT-402", "severity": "error", "what": "a", "where": "a", "node": "", "fix": "", "count": 2, "modules": ["a", "c"],
            "verdict": "",
        }  # fmt: skip
        assert Finding(**{**value, "modules": tuple(value["modules"])}) == ordered[0]

    def test_the_targets_choose_the_rules(self, tmp_path):
        non_zero = FIXTURES["TRT-402"].wrong
        assert lint(non_zero.open(tmp_path), ["tensorrt"]) == []
        assert lint(non_zero.open(tmp_path, target="tensorrt")) == []
        assert [f.rule for f in lint(non_zero.open(tmp_path, target="tensorrt-rtx"))] == ["TRT-402"]
        assert [f.rule for f in lint(non_zero.open(tmp_path, target="tensorrt"), ["tensorrt-rtx"])] == ["TRT-402"]
        assert rules_for(["onnxruntime"]) == []
        assert len(rules_for()) == len(rules_for(reads="onnx")) + len(rules_for(reads="mil")) == len(RULES)
        assert rules_for(["coreml"], "onnx") == []
        assert {t for rule in rules_for() for t in rule.targets} <= set(TARGETS)

    def test_a_match_can_name_its_own_fix(self, tmp_path, monkeypatch):
        rule = RULES["TRT-402"]
        matches = [Match("a", where="x", fix="do this"), Match("a", where="y")]
        monkeypatch.setitem(RULES._loaded, "TRT-402", type(rule)(**{**vars(rule), "check": lambda _: matches}))
        found = [f for f in lint(FIXTURES["TRT-402"].right.open(tmp_path)) if f.rule == "TRT-402"]
        assert [(f.where, f.fix) for f in found] == [("x", "do this"), ("y", rule.fix)]


# What runs in a process of its own, because TensorRT can end the process: builds every model, and writes a line of JSON for each.
CHILD = """
import json, sys
try:
    import tensorrt_rtx as trt
except ImportError:
    import tensorrt_rtx_bindings as trt

class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.lines = []
    def log(self, severity, message):
        if int(severity) <= int(trt.ILogger.Severity.ERROR):
            self.lines.append(message)

log = Log()
for job in json.load(open(sys.argv[1])):
    log.lines.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if job["operators"]:
        print(json.dumps({"name": job["name"], "without": [n for n in job["operators"] if not parser.supports_operator(n)]}), flush=True)
        continue
    plan = None
    if parser.parse(open(job["model"], "rb").read()):
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        if job["profiles"]:
            profile = builder.create_optimization_profile()
            for name, shapes in job["profiles"].items():
                profile.set_shape(name, *shapes)
            config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
    print(json.dumps({"name": job["name"], "built": plan is not None, "errors": log.lines}), flush=True)
"""
REFUSED = [name for name in FIXTURES if RULES[name].effect == "refused"]


@pytest.fixture(scope="module")
def rtx(tmp_path_factory):
    """What TensorRT-RTX makes of the fixtures: of every wrong one, and of the right ones of what it should refuse."""
    if importlib.util.find_spec("tensorrt_rtx_libs") is None:
        pytest.skip("not run: tensorrt-rtx is not installed (pip install tensorrt-rtx==1.7.1.116)")
    folder = tmp_path_factory.mktemp("rtx")
    standard = sorted({schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""})
    jobs = [{"name": "operators", "operators": standard}]
    for name, fixture in FIXTURES.items():
        for side in ("wrong", "right") if name in REFUSED else ("wrong",):
            given = getattr(fixture, side)
            path = folder / f"{name}-{side}.onnx"
            path.write_bytes(given.model().SerializeToString())
            profiles = {n: [p.min, p.opt, p.max] for n, p in (given.subject.get("profiles") or {}).items()}
            jobs.append({"name": f"{name} {side}", "model": str(path), "profiles": profiles, "operators": []})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    libraries = Path(importlib.util.find_spec("tensorrt_rtx_libs").origin).parent
    # The parser opens a name that the wheel (1.7.1) does not have, and the process ends. Drop the link when the wheel ships it.
    (folder / "libtensorrt_rtx.so").symlink_to(libraries / "libtensorrt_rtx.so.1")
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    command = [sys.executable, "-c", CHILD, str(folder / "jobs.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    lines = [json.loads(text) for text in done.stdout.splitlines()]
    assert done.returncode == 0, f"the process ended with {done.returncode} after {lines[-1:]}\n{done.stderr[-2000:]}"
    return {result["name"]: result for result in lines}


class TestRTX:
    """TensorRT-RTX builds plans for an SM89 GPU on this machine. What it computes is not run: that needs a GPU."""

    @pytest.mark.parametrize("name", REFUSED)
    def test_what_is_refused_is_refused(self, rtx, name):
        result = rtx[f"{name} wrong"]
        assert not result["built"]
        assert result["errors"]

    # Building with the plugin itself is tests/exporter/ops/plugin/test_rtx.py's.
    @pytest.mark.parametrize("name", [name for name in REFUSED if name != "TRT-503"])
    def test_the_like_of_it_that_is_in_order_builds(self, rtx, name):
        assert rtx[f"{name} right"]["built"], rtx[f"{name} right"]["errors"]

    @pytest.mark.parametrize("name", [name for name in FIXTURES if name not in REFUSED])
    def test_what_is_not_refused_builds_without_a_word(self, rtx, name):
        """Which is why there are rules."""
        result = rtx[f"{name} wrong"]
        assert result["built"], result["errors"]
        assert result["errors"] == []

    def test_the_operators_that_it_does_not_have(self, rtx):
        assert set(rtx["operators"]["without"]) == operators.WITHOUT_LAYER
