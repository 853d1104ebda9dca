"""`isthmus lint` and `isthmus build`: what they read and refuse, what they print, and what they end with."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from isthmus.exporter.bundle import write_cases, write_manifest
from isthmus.exporter.errors import AccuracyError, IntegrityError, MachineError, UsageError
from isthmus.exporter.manifest import Manifest, StageResult, TensorInfo, WeightsInfo
from isthmus.exporter.subject import Profile, profiles_of, read_subject


def linear(*, axis=1, weight_bytes=None):
    """A Linear in FP8 of 8 modules, whose weight has a scale for each channel of an axis."""
    scales = np.full(32 if axis == 0 else 64, 0.01, np.float16)
    weights = [
        helper.make_tensor("w", TensorProto.FLOAT8E4M3FN, (32, 64), weight_bytes or bytes(32 * 64), raw=True),
        helper.make_tensor("s", TensorProto.FLOAT16, (), np.float16(0.05).tobytes(), raw=True),
        helper.make_tensor("ws", TensorProto.FLOAT16, scales.shape, scales.tobytes(), raw=True),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=TensorProto.FLOAT8E4M3FN),
        helper.make_node("DequantizeLinear", ["q", "s"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["v"], axis=axis),
        helper.make_node("MatMul", ["d", "v"], ["y"], name="the product"),
        helper.make_node("MatMul", ["y", "half"], ["z"], name="another"),
    ]
    helper.set_metadata_props(nodes[3], {"isthmus.module": "blocks.0.fc"})
    helper.set_metadata_props(nodes[4], {"isthmus.module": "head"})
    weights.append(helper.make_tensor("half", TensorProto.FLOAT16, (64, 32), bytes(64 * 32 * 2), raw=True))
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, ("batch", 32)) for n in "xz"]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def file_of(folder, model=None, name="net.onnx"):
    path = folder / name
    onnx.save(model or linear(), path)
    return path


@pytest.fixture
def make_bundle(tmp_path):
    """Writes a bundle around a graph."""

    def make(model=None, *, cases=None, files=(), **changes):
        folder = tmp_path / "bundle"
        (folder / "reference").mkdir(parents=True)
        onnx.save(model or linear(), folder / "model.onnx")
        write_cases(folder / "reference/inputs.npz", cases or {"example": {"x": np.zeros((2, 32), np.float16)}})
        for name, content in dict(files).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        values = {
            "model": "net", "target": "tensorrt", "precision": "fp8", "weights": WeightsInfo(origin="random"), "verdict": "lowered",
            "inputs": (TensorInfo(name="x", dtype="float16", shape=("batch", 32)),), "sizes": {"batch": (1, 2, 8)},
            "outputs": (TensorInfo(name="z", dtype="float16", shape=("batch", 32)),),
            "stages": (StageResult(name="onnx", verdict="verified"),),
        }  # fmt: skip
        write_manifest(folder, Manifest(**{**values, **changes}))
        return folder

    return make


class TestLint:
    def test_a_file_in_order(self, run, tmp_path):
        result = run("lint", file_of(tmp_path))
        assert result.exit_code == 0, result.stderr
        lines = result.stdout.splitlines()
        assert lines[-1].endswith("net.onnx: 0 errors, 0 warnings, 0 info (35 rules)")
        assert lines[0] == "FP8: 0.0% of 0 GFLOP in matrix products"
        assert "blocks.0.fc: the MatMul is not counted: batch in the shape of d has no value" in result.stdout
        assert result.stderr == ""

    def test_of_many_products_whose_sizes_are_not_known_a_few_are_named(self, run, tmp_path):
        model = linear()
        model.graph.node.extend(helper.make_node("MatMul", ["y", "half"], [f"more{i}"], name=f"product {i}") for i in range(5))
        result = run("lint", file_of(tmp_path, model))
        assert result.exit_code == 0, result.stderr
        assert result.stdout.count(" is not counted: ") == 4
        assert "and 3 more products are not counted; give the bundle in place of the file: its manifest has the sizes" in result.stdout

    def test_a_file_with_a_warning(self, run, tmp_path):
        """What loses FP8 is an error in an fp8 bundle, a warning in a file of which nothing is known."""
        result = run("lint", file_of(tmp_path, linear(axis=0)), "--target", "tensorrt-rtx")
        assert result.exit_code == 0
        assert result.stdout.startswith("warning TRT-101 blocks.0.fc: the scale of the weight varies along axis 0")
        assert "1 warning, 0 info (35 rules of tensorrt-rtx)" in result.stdout

    def test_a_bundle(self, run, make_bundle):
        folder = make_bundle(linear(axis=0))
        result = run("lint", folder)
        assert result.exit_code == 1
        assert result.stdout.startswith("error TRT-101 blocks.0.fc: ")
        assert "FP8: 50.0% of 1.638e-05 GFLOP in matrix products" in result.stdout
        (row,) = [line.split() for line in result.stdout.splitlines() if line.startswith("head")]
        assert row == ["head", "8.192e-06", "0.0%", "50.0%"]
        assert result.stderr == "", "findings are results"

    def test_json_is_one_object(self, run, make_bundle):
        folder = make_bundle(linear(axis=0))
        result = run("lint", folder, "--format", "json")
        assert result.exit_code == 1
        value = json.loads(result.stdout)
        assert value["path"] == str(folder)
        assert (value["target"], value["exit_code"], value["rules"]) == ("tensorrt", 1, 34)
        assert value["counts"] == {"error": 1, "warning": 0, "info": 0}
        (finding,) = value["findings"]
        assert {k: finding[k] for k in ("rule", "severity", "where", "node", "count")} == {
            "rule": "TRT-101", "severity": "error", "where": "blocks.0.fc", "node": "the product", "count": 1,
        }  # fmt: skip
        assert value["coverage"]["share"] == 0.5
        assert [row["module"] for row in value["coverage"]["modules"]] == ["blocks.0.fc", "head"]

    def test_a_target_without_rules_says_so(self, run, tmp_path, bundle):
        for path in (bundle, file_of(tmp_path)):
            result = run("lint", path, "--target", "onnxruntime")
            assert result.exit_code == 0, result.stderr
            assert result.stdout.splitlines()[-1] == f"{path}: there are no rules of onnxruntime for it"

    def test_another_targets_rules_on_a_bundle(self, run, bundle):
        """Before an export to TensorRT, say: dit-tiny has float32 attention in its bundle for ONNX Runtime."""
        value = json.loads(run("lint", bundle, "--target", "tensorrt", "--format", "json").stdout)
        assert [f["rule"] for f in value["findings"]] == ["TRT-406"]
        assert value["coverage"] is None

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["lint", "{folder}/none.onnx"], "none.onnx does not exist"),
            (["lint", "{folder}"], "is not a bundle"),
            (["lint", "{folder}/text"], "text is not valid ONNX"),
            (["lint", "{folder}/empty"], "empty is not valid ONNX: it names no operator set"),
            (["lint", "{folder}/invalid"], "invalid is not valid ONNX: Node with schema"),
            (["lint", "{folder}/manifest.json"], "manifest.json is a manifest (fix"),
            (["lint", "{folder}/text", "--target", "tensort"], "unknown target 'tensort'"),
            (["lint"], "missing argument"),
        ],
    )
    def test_a_wrong_call_ends_with_2(self, run, tmp_path, arguments, message):
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "text").write_text("this is no graph")
        invalid = linear()
        del invalid.graph.node[0].input[1]
        file_of(folder, invalid, "invalid")
        (folder / "empty").touch()
        if "manifest" in str(arguments):
            (folder / "manifest.json").write_text("{}")
        result = run(*[a.format(folder=folder) for a in arguments])
        assert result.exit_code == 2
        assert message.partition(" (fix")[0] in result.stderr
        assert result.stdout == ""


@pytest.fixture(scope="module")
def core_ml_once(tmp_path_factory):
    """A bundle of Core ML with a convolution whose kernel is 15 wide, and a Linear, whose results are large."""
    import torch

    from isthmus.exporter.quiet import quiet
    from isthmus.targets.coreml.convert import converted
    from isthmus.targets.coreml.modules import KEY
    from isthmus.targets.coreml.package import save

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = torch.nn.Conv2d(32, 32, (1, 15), padding=(0, 7), bias=False)
            self.head = torch.nn.Linear(64, 64, bias=False)
            for weight in (self.wide.weight, self.head.weight):
                torch.nn.init.constant_(weight, 0.25)

        def forward(self, x):
            return self.head(self.wide(x))

    with quiet("torch"):
        made = converted(torch.export.export(Net().eval(), (torch.zeros(1, 32, 1, 64),)), "fp16", input_names=("x",), output_names=("y",))
    folder = tmp_path_factory.mktemp("coreml") / "bundle"
    folder.mkdir()
    save(made.model, folder / "model.mlpackage", facts={KEY: made.modules})
    (folder / "reference").mkdir()
    write_cases(folder / "reference/inputs.npz", {"example": {"x": np.full((1, 32, 1, 64), 100.0, np.float32)}})
    tensor = TensorInfo(name="x", dtype="float32", shape=(1, 32, 1, 64))
    manifest = Manifest(
        model="net", target="coreml", precision="fp16", weights=WeightsInfo(origin="random"), verdict="lowered",
        inputs=(tensor,), outputs=(tensor.model_copy(update={"name": "y"}),), stages=(StageResult(name="torch", verdict="verified"),),
    )  # fmt: skip
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def core_ml(core_ml_once, tmp_path):
    return shutil.copytree(core_ml_once, tmp_path / "coreml")


CONV, LINEAR = 2 * 32 * 64 * 32 * 15, 2 * 32 * 64 * 64


class TestCoreML:
    def test_a_bundle(self, run, core_ml):
        result = run("lint", core_ml)
        assert result.exit_code == 0, result.stderr
        lines = result.stdout.splitlines()
        assert lines[0].startswith("warning ANE-301 (likely) head: linear with channels on the last axis (fix: ")
        assert lines[1].startswith(
            "warning ANE-304 (likely) wide: conv with a kernel of width 15, the widest is 13 (on A13, M1, A14, M2, A15, M3)"
        )
        assert lines[2] == f"Neural Engine: likely {LINEAR / (CONV + LINEAR):.1%} of {(CONV + LINEAR) / 1e9:.4g} GFLOP"
        assert [line.split() for line in lines[3:5]] == [
            ["module", "GFLOP", "likely", "of", "all"],
            ["wide", f"{CONV / 1e9:.4g}", "0.0%", f"{CONV / (CONV + LINEAR):.1%}"],
        ]
        assert lines[5] == f"{core_ml}: 0 errors, 2 warnings, 0 info (25 rules of coreml)"
        assert result.stderr == "", "findings are results"

    def test_a_package_for_a_chip(self, run, core_ml):
        result = run("lint", core_ml / "model.mlpackage", "--chip", "A16")
        assert result.exit_code == 0, result.stderr
        assert "ANE-304" not in result.stdout
        assert "Neural Engine of A16: likely 100.0% of " in result.stdout

    def test_json_is_one_object(self, run, core_ml):
        value = json.loads(run("lint", core_ml, "--format", "json", "--chip", "M2").stdout)
        assert (value["target"], value["exit_code"], value["rules"], value["coverage"]) == ("coreml", 0, 25, None)
        assert value["counts"] == {"error": 0, "warning": 2, "info": 0}
        found = [{k: f[k] for k in ("rule", "severity", "verdict", "where")} for f in value["findings"]]
        assert found == [
            {"rule": "ANE-301", "severity": "warning", "verdict": "likely", "where": "head"},
            {"rule": "ANE-304", "severity": "warning", "verdict": "likely", "where": "wide"},
        ]
        engine = value["engine"]
        assert (engine["verdict"], engine["chip"], engine["flops"], engine["likely"]) == ("likely", "M2", CONV + LINEAR, LINEAR)
        assert [part["name"] for part in engine["modules"]] == ["wide", "head"]
        assert engine["rules"] == {"ANE-304": 1}

    def test_values_are_looked_at_when_that_is_asked_for(self, run, core_ml):
        """32 channels and 15 positions of 100, a quarter of each: 12000; 64 of these, a quarter of each: 192000, which is infinite."""
        assert "ANE-501" not in run("lint", core_ml).stdout
        result = run("lint", core_ml, "--observe")
        assert result.exit_code == 0, result.stderr
        assert "warning ANE-501 (likely) head: linear whose results reach inf, and the engine's sums end at 32752" in result.stdout

    def test_rules_of_another_target(self, run, core_ml, make_bundle):
        for folder, target in ((core_ml, "tensorrt"), (make_bundle(), "coreml")):
            result = run("lint", folder, "--target", target)
            assert result.exit_code == 0, result.stderr
            assert result.stdout.splitlines()[-1] == f"{folder}: there are no rules of {target} for it"
            assert "Neural Engine" not in result.stdout

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["{folder}", "--chip", "A61"], 2, "unknown chip 'A61'"),
            (["{folder}", "--chip", "A61"], 2, "did you mean A18 or A17 or A16?"),
            (["{onnx}", "--chip", "A16"], 2, "--chip is for Core ML"),
            (["{onnx}", "--observe"], 2, "--observe is for Core ML"),
            (["{folder}/model.mlpackage", "--observe"], 2, "holds no example inputs"),
            (["{folder}/none.mlpackage"], 2, "none.mlpackage does not exist"),
            (["{folder}/empty.mlpackage"], 1, "is no Core ML package: it has no Manifest.json"),
            (["{folder}/damaged.mlpackage"], 1, "damaged"),
        ],
    )
    def test_a_wrong_call(self, run, tmp_path, core_ml, arguments, code, message):
        (core_ml / "empty.mlpackage").mkdir()
        shutil.copytree(core_ml / "model.mlpackage", core_ml / "damaged.mlpackage")
        (core_ml / "damaged.mlpackage/Data/com.apple.CoreML/model.mlmodel").write_bytes(b"no model")
        result = run("lint", *[a.format(folder=core_ml, onnx=file_of(tmp_path)) for a in arguments])
        assert result.exit_code == code
        assert message in result.stderr
        assert result.stdout == ""


class TestSubject:
    def test_of_a_bundle(self, make_bundle):
        folder = make_bundle(files={"plugins/libisthmus_trt.so": b"\0SelectiveScan\0"})
        subject = read_subject(folder)
        assert (subject.target, subject.precision, subject.opset) == ("tensorrt", "fp8", 23)
        assert subject.profiles == {"x": Profile((1, 32), (2, 32), (8, 32))}
        assert subject.cases == {"example": {"x": (2, 32)}}
        assert subject.plugins == (folder / "plugins/libisthmus_trt.so",)
        assert [subject.sizes(which) for which in ("min", "opt", "max")] == [{"batch": 1}, {"batch": 2}, {"batch": 8}]
        assert [subject.size(d, "max") for d in (3, "batch", "2*batch", "other", "batch/3", "batch**2", "((", None)] == [
            3, 8, 16, None, None, None, None, None,
        ]  # fmt: skip
        assert read_subject(folder, "tensorrt-rtx").target == "tensorrt-rtx"

    def test_of_a_file(self, tmp_path):
        path = file_of(tmp_path)
        assert read_subject(path).plugins == ()
        (tmp_path / "plugins").mkdir()
        (tmp_path / "plugins" / "a.so").touch()
        subject = read_subject(path)
        assert (subject.target, subject.manifest, subject.profiles, subject.cases) == ("", None, None, {})
        assert subject.plugins == (tmp_path / "plugins" / "a.so",)

    def test_shapes_are_inferred(self, tmp_path):
        (product, _) = read_subject(file_of(tmp_path)).nodes("MatMul")
        assert product.outputs[0].dtype == ir.DataType.FLOAT16
        assert [str(d) for d in product.outputs[0].shape] == ["batch", "64"]

    def test_the_recipes_profiles_come_first(self):
        tensors = [TensorInfo(name=n, dtype="float16", shape=s) for n, s in (("x", ("batch", 3)), ("y", ("2*batch",)), ("z", ("m",)))]
        details = {"build": {"profiles": {"x": {"min": [1, 3], "opt": [2, 3], "max": [2, 3]}}}}
        manifest = Manifest(
            model="net", target="tensorrt", precision="fp8", inputs=tuple(tensors), outputs=(), weights=WeightsInfo(origin="random"),
            verdict="lowered", stages=(), sizes={"batch": (1, 4, 8)}, details=details,
        )  # fmt: skip
        assert profiles_of(manifest) == {"x": Profile((1, 3), (2, 3), (2, 3)), "y": Profile((2,), (8,), (16,))}
        assert profiles_of(manifest.model_copy(update={"details": {}}))["x"] == Profile((1, 3), (4, 3), (8, 3))

    @pytest.mark.parametrize("location", ["../secret", "/etc/hostname"])
    def test_weights_outside_the_folder_are_refused(self, tmp_path, location):
        folder = tmp_path / "folder"
        folder.mkdir()
        (tmp_path / "secret").write_bytes(bytes(4096))
        model = linear()
        external(model.graph.initializer[0], location)
        with pytest.raises(IntegrityError, match="the path leads out of the folder"):
            read_subject(file_of(folder, model))

    def test_weights_that_are_missing_are_refused(self, tmp_path):
        model = linear()
        external(model.graph.initializer[0], "net.onnx.data")
        with pytest.raises(IntegrityError, match=r"net\.onnx\.data: the file is missing"):
            read_subject(file_of(tmp_path, model))
        (tmp_path / "net.onnx.data").write_bytes(bytes(32 * 64))
        assert read_subject(tmp_path / "net.onnx").opset == 23

    def test_weights_of_a_node_are_looked_at_too(self, tmp_path):
        model = linear()
        tensor = helper.make_tensor("t", TensorProto.FLOAT16, (32,), bytes(64), raw=True)
        external(tensor, "../secret")
        model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
        with pytest.raises(IntegrityError, match="leads out"):
            read_subject(file_of(tmp_path, model))

    def test_a_bundle_without_a_graph(self, make_bundle, tmp_path):
        folder = make_bundle()
        (folder / "model.onnx").unlink()
        with pytest.raises(IntegrityError, match=r"model\.onnx of the bundle .* is missing"):
            read_subject(folder)
        (folder / "model.onnx").write_text("no graph")
        with pytest.raises(IntegrityError, match="is damaged"):
            read_subject(folder)
        (tmp_path / "elsewhere.onnx").write_bytes(b"")
        (folder / "model.onnx").unlink()
        (folder / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
        with pytest.raises(IntegrityError, match="leads out of it"):
            read_subject(folder)

    def test_a_bundle_of_another_kind(self, make_bundle):
        folder = make_bundle()
        (folder / "model.onnx").unlink()
        shutil.rmtree(folder / "reference")
        manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
        write_manifest(folder, manifest)
        with pytest.raises(UsageError, match=r"holds no model\.onnx"):
            read_subject(folder)

    def test_a_manifest_that_names_files_outside(self, make_bundle, tmp_path):
        folder = make_bundle()
        (tmp_path / "evil.so").write_bytes(b"\0SelectiveScan\0")
        text = (folder / "manifest.json").read_text().replace('"model.onnx":', '"plugins/../../evil.so": "00", "model.onnx":')
        (folder / "manifest.json").write_text(text)
        assert read_subject(folder).plugins == ()


def external(tensor, location):
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


class TestBuild:
    @pytest.fixture
    def built(self, monkeypatch):
        """Replaces `pipeline.build`, and collects what it is called with."""
        calls = []

        def build(bundle, **arguments):
            calls.append((bundle, arguments))
            stages = (StageResult(name="plan", verdict="built", device="NVIDIA H100"),)
            manifest = SimpleNamespace(model="net", target="tensorrt", device="NVIDIA H100 (sm_90)", verdict="built")
            return SimpleNamespace(
                bundle=bundle, manifest=manifest, stages=stages, exit_code=0, summary=lambda: {"verdict": "built", "exit_code": 0}
            )

        monkeypatch.setattr("isthmus.pipeline.build", build, raising=False)
        return calls

    def test_what_is_passed_on_and_printed(self, run, bundle, built):
        result = run("build", bundle)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.splitlines() == [f"{bundle}: net for NVIDIA H100 (sm_90): built", "  plan         built"]
        assert json.loads(run("build", bundle, "--force", "--trust", "--format", "json").stdout) == {"verdict": "built", "exit_code": 0}
        (path, plain), (_, asked) = built
        assert path == bundle
        assert (plain["force"], plain["trust"]) == (False, False)
        assert (asked["force"], asked["trust"]) == (True, True)
        assert plain["progress"] is not None

    def test_an_engine_that_is_not_what_was_asked_for(self, run, bundle, monkeypatch):
        stage = StageResult(name="plan", verdict="blocked", reason="blocks.0.attn runs in half precision")
        manifest = SimpleNamespace(model="net", target="tensorrt", device="", verdict="blocked")
        missed = SimpleNamespace(bundle=bundle, manifest=manifest, stages=(stage,), summary=lambda: {"verdict": "blocked"})

        def build(bundle, **arguments):
            raise AccuracyError("the engine is not what was asked for", result=missed)

        monkeypatch.setattr("isthmus.pipeline.build", build, raising=False)
        result = run("build", bundle)
        assert result.exit_code == 3
        assert "blocks.0.attn runs in half precision" in result.stdout
        assert "the engine is not what was asked for" in result.stderr
        value = json.loads(run("build", bundle, "--format", "json").stdout)
        assert (value["verdict"], value["exit_code"]) == ("blocked", 3)

    def test_a_machine_without_a_gpu(self, run, bundle, monkeypatch):
        def build(bundle, **arguments):
            raise MachineError("there is no GPU", hint="build it there")

        monkeypatch.setattr("isthmus.pipeline.build", build, raising=False)
        result = run("build", bundle)
        assert result.exit_code == 5
        assert "hint: build it there" in result.stderr

    def test_what_is_no_bundle(self, run, tmp_path, built):
        result = run("build", tmp_path)
        assert result.exit_code == 2
        assert built == []
