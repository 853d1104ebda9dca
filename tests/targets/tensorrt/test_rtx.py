"""Plans of TensorRT-RTX, built here: the code that touches the API, with the real library. Nothing is executed: that needs a GPU."""

import dataclasses

import onnx
import pytest
from onnx import helper

from isthmus.exporter import onnx as onnx_files
from isthmus.exporter.errors import IntegrityError, IsthmusError, MachineError, UnsupportedError
from isthmus.exporter.ops.plugin import build as plugin_build
from isthmus.exporter.ops.plugin import headers
from isthmus.exporter.ranges import CalibrationTable
from isthmus.exporter.target import TARGETS
from isthmus.targets.tensorrt import library, plugins, process
from isthmus.targets.tensorrt.base import expected_fp8
from isthmus.targets.tensorrt.inspector import _ORIGIN
from isthmus.targets.tensorrt.lower import selection
from isthmus.targets.tensorrt.support import UNKNOWN_OPERATORS

tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="not run: tensorrt-rtx is not installed (pip install 'isthmus[tensorrt-rtx]')")


@pytest.fixture
def without_kernels(monkeypatch):
    """The library of plugins without compiled kernels, which takes seconds to make and builds the same plans."""
    try:
        plugin_build.find_compiler()
        headers.find_or_fetch()
    except MachineError as error:
        pytest.skip(f"not run: {error}")
    monkeypatch.setattr(plugins, "architectures", lambda _: ())


@pytest.fixture
def scan(make, without_kernels):
    return make("tensorrt-rtx", "Scan", options={"compute_capability": ("8.9",)})


@pytest.fixture
def fp8(job):
    """A job in FP8 whose ranges are made up."""

    def calibrated(target, **options):
        asked = job(target, precision="fp8", options={"fp8_include": ("*",), **options})
        ranges = dict.fromkeys(selection(asked).observed(), 4.0)
        return dataclasses.replace(asked, calibration=CalibrationTable.of_ranges(ranges))

    return calibrated


class TestPlans:
    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    def test_a_plan_is_built(self, make, precision):
        made = make("tensorrt-rtx", precision=precision, options={"workspace": 128})
        built = made.build(required=True)
        assert (built.stage.name, built.stage.verdict, built.stage.reason) == ("plan", "built", "")
        version = tensorrt_rtx.__version__
        assert built.stage.device == f"tensorrt-rtx {version}"
        engine = built.details["engine"]
        assert engine["bytes"] == (made.folder / "engine.rtx.plan").stat().st_size > 1000
        assert (engine["library"], engine["version"], engine["compute_capabilities"]) == ("tensorrt-rtx", version, ["8.9", "12.0"])
        assert 50 * 2**20 < engine["peak_rss"] < 2**30
        assert engine["network_layers"] > 3
        assert made.lowered.device == "NVIDIA RTX GPUs of compute capability 8.9, 12.0 (TensorRT-RTX)"

    def test_it_is_never_an_engine_of_an_h100(self, make, h100):
        made = make("tensorrt-rtx")
        made.build()
        names = {p.name for p in made.folder.iterdir()}
        assert "engine.rtx.plan" in names
        assert "engine.plan" not in names
        assert "H100" not in made.lowered.device
        renamed = made.manifest.model_copy(update={"target": "tensorrt"})
        for manifest in (made.manifest, renamed):
            with pytest.raises(IntegrityError, match="expected tensorrt"):
                TARGETS["tensorrt"]().build(made.folder, manifest, required=False)
        assert not (h100.folder / "calls.json").exists()

    def test_fp8_is_built_for_8_9_and_refused_for_8_0(self, fp8, make):
        """Where 8.0 takes the graph, the FP8 in it was lost."""
        made = make("tensorrt-rtx", asked=fp8("tensorrt-rtx", compute_capability=("8.9",)))
        recipe = made.manifest.details["build"]
        assert [(layer["module"], layer["operands"]) for layer in recipe["fp8"]] == [("up", 1), ("down", 1)]
        assert made.build(required=True).stage.verdict == "built"
        (made.folder / "engine.rtx.plan").unlink()
        with pytest.raises(UnsupportedError, match="HW-specific datatypes: fp8_e4m3") as caught:
            made.with_details(build={**recipe, "compute_capabilities": ["8.0"]}).build(required=True)
        assert caught.value.exit_code == 4
        assert not (made.folder / "engine.rtx.plan").exists()

    def test_fp8_for_a_gpu_without_it_is_refused_before_it_is_lowered(self, fp8):
        target = TARGETS["tensorrt-rtx"]()
        (reason,) = target.unsupported(fp8("tensorrt-rtx", compute_capability=("7.5", "8.9", "8.6")))
        assert "compute capability 7.5, 8.6 have no FP8" in reason.what

    def test_the_parser_names_its_layers_after_the_nodes(self, fp8, tmp_path):
        """What the inspector's description of an engine is matched by."""
        lowered = TARGETS["tensorrt"]().lower(fp8("tensorrt"), tmp_path)
        log = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
        network = tensorrt_rtx.Builder(log).create_network(1)
        assert tensorrt_rtx.OnnxParser(network, log).parse_from_file(str(tmp_path / "model.onnx"))
        found = {n for i in range(network.num_layers) for n in _ORIGIN.findall(network.get_layer(i).metadata)}
        assert {layer["node"] for layer in lowered.details["build"]["fp8"]} <= found
        assert found <= {node.name for node in onnx.load(tmp_path / "model.onnx").graph.node}

    def test_weights_in_a_file_beside_the_model(self, make, monkeypatch):
        monkeypatch.setattr(onnx_files, "EXTERNAL_DATA_BYTES", 0)
        made = make("tensorrt-rtx")
        assert (made.folder / "model.onnx.data").is_file()
        assert made.build().stage.verdict == "built"

    def test_a_compute_capability_that_it_does_not_know(self, make):
        made = make("tensorrt-rtx")
        changed = made.with_details(build={**made.manifest.details["build"], "compute_capabilities": ["9.0"]})
        with pytest.raises(UnsupportedError, match=r"does not build for compute capability 9\.0"):
            changed.build()

    def test_a_profile_that_leaves_an_input_out(self, make):
        made = make("tensorrt-rtx")
        changed = made.with_details(build={**made.manifest.details["build"], "profiles": {}})
        with pytest.raises(UnsupportedError, match="no optimization profile has been defined"):
            changed.build()

    def test_operators_that_it_refuses_are_named_by_module(self, make):
        made = make("tensorrt-rtx")
        model = onnx.load(made.folder / "model.onnx")
        x = model.graph.input[0].name
        for op_type in ("NonZero", "Det"):
            node = helper.make_node(op_type, [x], [f"{op_type}_out"], name=f"the {op_type}")
            node.metadata_props.add(key="isthmus.module", value=f"blocks.{op_type.lower()}")
            model.graph.node.append(node)
            model.graph.output.append(helper.make_empty_tensor_value_info(f"{op_type}_out"))
        onnx.save(model, made.folder / "model.onnx")
        with pytest.raises(UnsupportedError) as caught:
            made.build()
        assert {r.where for r in caught.value.reasons} == {"blocks.nonzero", "blocks.det"}


def test_layers_that_the_lowering_lost_are_an_error(fp8, tmp_path):
    lowered = TARGETS["tensorrt"]().lower(fp8("tensorrt"), tmp_path)
    layers = [*lowered.details["fp8"]["layers"], {"node": "no node", "module": "blocks.0"}]
    with pytest.raises(IsthmusError, match=r"blocks\.0: node no node is to compute in FP8, and does not read it"):
        expected_fp8(tmp_path / "model.onnx", {"layers": layers})


class TestPlugins:
    def test_the_plan_holds_the_plugins(self, scan):
        assert (scan.folder / "plugins" / "libisthmus_trt.so").is_file()
        built = scan.build(required=True)
        assert built.stage.verdict == "built"
        assert built.details["engine"]["plugins"] == ["SelectiveScan"]
        library_bytes = (scan.folder / "plugins" / "libisthmus_trt.so").stat().st_size
        assert built.details["engine"]["bytes"] > library_bytes
        recipe = built.details["build"]
        assert recipe["plugin_override"]
        assert recipe["plugins"][0]["operators"] == ["selective_scan"]

    @pytest.mark.parametrize("module", ["Recurrence", "Scan"])
    def test_decomposed_needs_none(self, make, module):
        options = {"compute_capability": ("8.9",), "ssm_op": "decomposed"}
        made = make("tensorrt-rtx", module, options=options)
        assert not (made.folder / "plugins").exists()
        built = made.build()
        assert (built.stage.verdict, built.details["engine"]["plugins"]) == ("built", [])

    @pytest.mark.parametrize(("what", "message"), [("missing", "is missing"), ("another", "it is another version")])
    def test_a_library_that_is_missing_or_another_is_refused(self, scan, what, message):
        path = scan.folder / "plugins" / "libisthmus_trt.so"
        path.unlink() if what == "missing" else path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(IntegrityError, match=message):
            scan.build()

    def test_a_plugin_of_another_version_is_refused(self, scan):
        model = onnx.load(scan.folder / "model.onnx")
        node = next(node for node in model.graph.node if node.domain == "isthmus")
        node.attribute.append(helper.make_attribute("plugin_version", "2"))
        onnx.save(model, scan.folder / "model.onnx")
        with pytest.raises(UnsupportedError, match=r"SelectiveScan needs a plugin of version 2 .* found version 1 in namespace ''"):
            scan.build()

    def test_a_library_that_cannot_be_loaded_is_refused(self, scan):
        path = scan.folder / "plugins" / "libisthmus_trt.so"
        path.write_bytes(b"no library")
        entry = {**scan.manifest.details["build"]["plugins"][0], "sha256": plugins.sha256_of(path)}
        changed = scan.with_details(build={**scan.manifest.details["build"], "plugins": [entry]})
        with pytest.raises(UnsupportedError, match="the library of plugins was not loaded"):
            changed.build()

    def test_an_abort_of_the_library_is_an_error_with_its_log(self, scan, monkeypatch):
        """TensorRT-RTX 1.7.1 ends its process for lack of a link. When this fails, drop `library.missing_links`."""
        monkeypatch.setattr(library, "missing_links", lambda: None)
        monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
        with pytest.raises(IsthmusError, match=r"ended its process with SIGABRT(.|\n)*terminate called without an active exception"):
            scan.build()

    def test_the_link_is_made_once_in_a_folder_of_ours(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ISTHMUS_CACHE_DIR", str(tmp_path))
        folder = library.missing_links()
        assert folder.is_relative_to(tmp_path)
        assert [p.name for p in folder.iterdir()] == ["libtensorrt_rtx.so"]
        before = (folder / "libtensorrt_rtx.so").lstat().st_ino
        assert library.missing_links() == folder
        assert (folder / "libtensorrt_rtx.so").lstat().st_ino == before
        complete = tmp_path / "wheel"
        complete.mkdir()
        assert library.missing_links(complete) is None  # nothing to link to
        (complete / "libtensorrt_rtx.so.1").touch()
        assert (library.missing_links(complete) / "libtensorrt_rtx.so").readlink() == complete / "libtensorrt_rtx.so.1"
        (complete / "libtensorrt_rtx.so").touch()
        assert library.missing_links(complete) is None

    def test_without_a_compiler_the_plan_is_refused_and_the_h100_makes_its_own(self, make, monkeypatch):
        def missing(*_):
            raise MachineError("there is no C++ compiler", hint="install g++")

        monkeypatch.setattr(plugin_build, "build", missing)
        with pytest.raises(MachineError, match="the plan needs our plugins, and they cannot be made here") as caught:
            make("tensorrt-rtx", "Scan")
        assert caught.value.hint == "install g++; or choose --ssm-op decomposed"
        made = make("tensorrt", "Scan")
        assert made.lowered.details["build"]["plugins"] == [
            {"path": "plugins/libisthmus_trt.so", "sha256": "", "operators": ["selective_scan"], "architectures": ["sm_90a"]}
        ]
        assert "--operator=selective_scan --arch=sm_90a" in made.lowered.notes[-1]
        assert "--arch=sm_90a" in (made.folder / "build.sh").read_text()

    @pytest.mark.usefixtures("without_kernels")
    def test_and_there_they_are_made(self, make, monkeypatch, h100):
        def missing(*_):
            raise MachineError("there is no C++ compiler", hint="install g++")

        h100.answer(creators=[["SelectiveScan", "1", ""]])
        with monkeypatch.context() as there:
            there.setattr(plugin_build, "build", missing)
            made = make("tensorrt", "Scan")
            built = made.build()
            assert built.stage.verdict == "lowered"
            assert "there is no C++ compiler (fix: install g++)" in built.stage.reason
        built = made.build(required=True)
        path = made.folder / "plugins" / "libisthmus_trt.so"
        assert built.details["build"]["plugins"][0]["sha256"] == plugins.sha256_of(path)
        loaded = [arguments for _, name, arguments in h100.calls() if name == "load_library"]
        assert loaded == [{"plugin_path": str(path)}]
        assert [a for _, name, a in h100.calls() if name == "set_flag"] == [{"flag": "ENABLE_PLUGIN_OVERRIDE"}]
        assert not [name for _, name, _ in h100.calls() if "plugins_to_serialize" in name]


def test_the_operators_that_the_parser_does_not_know():
    log = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    builder = tensorrt_rtx.Builder(log)
    network = builder.create_network(1)
    parser = tensorrt_rtx.OnnxParser(network, log)
    names = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    assert {name for name in names if not parser.supports_operator(name)} == UNKNOWN_OPERATORS


def test_the_child_needs_neither_torch_nor_onnx_to_start(tmp_path):
    """Its memory is what a build needs, and its start is part of every build."""
    import subprocess
    import sys

    code = "import sys, isthmus.targets.tensorrt.child; print([m for m in ('torch', 'onnx', 'onnx_ir', 'onnxscript') if m in sys.modules])"
    environment = process.child_environment("tensorrt-rtx")
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
