"""An engine of TensorRT is built in a child process, through the stand-in; and what ends such a process becomes an error with its log."""

import json
import os
import tempfile
import time

import psutil
import pytest

from isthmus.exporter.errors import IsthmusError, MachineError, UnsupportedError
from isthmus.exporter.passes.scope import MODULE
from isthmus.targets.tensorrt import base, process
from isthmus.targets.tensorrt.compiler import Request, compile_engine, read_nodes
from isthmus.targets.tensorrt.library import Gpu
from isthmus.targets.tensorrt.process import compile_in_child
from isthmus.targets.tensorrt.recipe import recipe_of


def layers_of(recipe, datatype, tactic=""):
    return {
        "Layers": [
            {"Name": f"layer {i}", "LayerType": "gemm", "Inputs": [{"Format/Datatype": datatype}], "TacticName": tactic,
             "Metadata": f"[ONNX Layer: {layer['node']}]"}
            for i, layer in enumerate(recipe["fp8"])
        ]
    }  # fmt: skip


class TestOnTheGpu:
    def test_an_engine_is_built_and_read_back(self, make, h100, tmp_path):
        made = make("tensorrt", options={"workspace": 256})
        built = made.build(required=True)
        assert (built.stage.name, built.stage.verdict, built.stage.reason) == ("plan", "built", "")
        assert built.device == "NVIDIA H100 80GB HBM3 (sm_90), tensorrt 11.4.0.106"
        assert (made.folder / "engine.plan").read_bytes() == b"double"
        assert json.loads((made.folder / "layers.json").read_text()) == {"Layers": []}
        engine = built.details["engine"]
        assert (engine["library"], engine["version"], engine["bytes"], engine["network_layers"]) == ("tensorrt", "11.4.0.106", 6, 3)
        assert engine["fp8"] == {"expected": 0, "found": 0}
        assert engine["warnings"] == ["a warning"]
        assert engine["peak_rss"] > 10 * 2**20
        assert not [p.name for p in made.folder.iterdir() if p.name.startswith(".")]
        names = [f"{owner}.{name}" for owner, name, _ in h100.calls()]
        assert names == [
            "Builder.__init__", "Builder.create_network", "OnnxParser.__init__", "OnnxParser.parse_from_file",
            "Builder.create_builder_config", "IBuilderConfig.profiling_verbosity =", "IBuilderConfig.set_memory_pool_limit",
            "Builder.create_optimization_profile", "IOptimizationProfile.set_shape", "IBuilderConfig.add_optimization_profile",
            "IBuilderConfig.create_timing_cache", "IBuilderConfig.set_timing_cache", "Builder.build_serialized_network_to_stream",
            "IBuilderConfig.get_timing_cache", "ITimingCache.serialize", "Runtime.__init__", "Runtime.deserialize_cuda_engine",
            "ICudaEngine.create_execution_context", "IExecutionContext.set_input_shape", "ICudaEngine.create_engine_inspector",
            "EngineInspector.execution_context =", "EngineInspector.get_engine_information",
        ]  # fmt: skip
        given = {f"{owner}.{name}": arguments for owner, name, arguments in h100.calls()}
        assert given["IBuilderConfig.set_memory_pool_limit"] == {"pool": "WORKSPACE", "pool_size": 256 * 2**20}
        assert given["IBuilderConfig.profiling_verbosity ="] == {"value": "DETAILED"}
        assert given["IOptimizationProfile.set_shape"] == {"input": "x", "min": [1, 4, 32], "opt": [2, 4, 32], "max": [8, 4, 32]}
        assert given["Builder.create_network"] == {"flags": 1}
        # The engine that was built is one that is executed: `test_session`.
        saved = list((tmp_path / "cache" / "tensorrt").glob("timing-11.4.0.106-NVIDIA_H100_80GB_HBM3.cache"))
        assert [p.read_bytes() for p in saved] == [b"+measured"]

    def test_the_timing_cache_is_kept_from_build_to_build(self, make, h100, tmp_path):
        path = tmp_path / "measured" / "timing.cache"
        made = make("tensorrt", options={"timing_cache": str(path)})
        made.build()
        made.build()
        assert path.read_bytes() == b"+measured+measured"
        h100.answer(cache_fits=False)
        made.build()
        assert path.read_bytes() == b"+measured"  # that of another version is not added to

    def test_layers_that_are_not_fp8_are_named_and_block(self, make, h100):
        made = make("tensorrt")
        nodes = [{"node": "node_up", "module": "blocks.0.up"}, {"node": "node_down", "module": "blocks.0.down"}]
        recipe = {**made.manifest.details["build"], "fp8": nodes}
        half = layers_of(recipe, "Half", "sm80_xmma_gemm_f16f16_f16f16_f16_nn")
        half["Layers"][0]["Inputs"] = [{"Format/Datatype": "FP8"}]
        h100.answer(layers=half)
        built = made.with_details(build=recipe).build()
        assert built.stage.verdict == "blocked"
        assert built.stage.reason.startswith("blocks.0.down: expected FP8: layer 1 (gemm) reads Half, kernel sm80_xmma_gemm_f16f16")
        assert "blocks.0.up" not in built.stage.reason
        assert built.details["engine"]["fp8"] == {"expected": 2, "found": 1}
        h100.answer(layers=layers_of(recipe, "FP8"))
        assert made.with_details(build=recipe).build().stage.verdict == "built"

    def test_what_the_builder_logs_is_the_reason_with_its_modules(self, make, h100):
        made = make("tensorrt")
        recipe = recipe_of(made.manifest, "tensorrt")
        node = next(name for name, n in _nodes(made).items() if n.module == "down")
        h100.answer(engine=False, errors=[f"Could not find any implementation for node {node} + other.", "In build"])
        with pytest.raises(UnsupportedError, match=r"tensorrt 11\.4\.0\.106 does not build model\.onnx") as caught:
            made.build()
        assert [r.where for r in caught.value.reasons] == ["down", ""]
        assert not (made.folder / recipe.engine).exists()

    def test_the_parsers_errors_name_the_module(self, make, h100):
        made = make("tensorrt")
        node = next(name for name, n in _nodes(made).items() if n.module == "up")
        h100.answer(parser=[[node, "MatMul", "Assertion\n failed"], ["", "", "no graph"]])
        with pytest.raises(UnsupportedError) as caught:
            made.build()
        first, second = caught.value.reasons
        assert (first.where, first.what) == ("up", f"MatMul: Assertion failed (node {node})")
        assert second.what == "the file: no graph"

    def test_an_engine_that_cannot_be_read_back(self, make, h100):
        h100.answer(loads=False)
        with pytest.raises(UnsupportedError, match="the version tag does not match"):
            make("tensorrt").build()

    def test_an_engine_that_does_not_take_its_own_shapes(self, make, h100):
        h100.answer(limit=1)
        with pytest.raises(UnsupportedError, match=r"x: the engine does not take the shape \(2, 4, 32\) of its own profile"):
            make("tensorrt").build()

    def test_an_older_version_does_not_build(self, make, h100, monkeypatch):
        assert h100.folder.is_dir()
        monkeypatch.setattr(base, "installed_version", lambda _: "10.9.0.34")
        built = make("tensorrt").build()
        assert built.stage.verdict == "lowered"
        assert "tensorrt 11.0 or newer (this is 10.9.0.34) is missing" in built.stage.reason

    def test_another_gpu_does_not_build(self, make, h100, monkeypatch):
        assert h100.folder.is_dir()
        monkeypatch.setattr(base, "find_gpu", lambda: Gpu("NVIDIA L4", "8.9"))
        made = make("tensorrt")
        built = made.build()
        assert built.stage.verdict == "lowered"
        assert r"a GPU of compute capability 9.0 (this is NVIDIA L4, 8.9) is missing" in built.stage.reason
        with pytest.raises(MachineError) as caught:
            made.build(required=True)
        assert caught.value.exit_code == 5


def _nodes(made):
    return read_nodes(made.folder / "model.onnx", MODULE)


class TestWithoutAGpu:
    def test_a_build_that_is_not_required_leaves_it_lowered(self, make):
        made = make("tensorrt")
        built = made.build()
        assert (built.stage.name, built.stage.verdict, built.details) == ("plan", "lowered", {})
        assert "the package tensorrt and an NVIDIA GPU with its driver are missing" in built.stage.reason
        assert "`isthmus build` on the H100" in built.stage.reason
        assert not (made.folder / "engine.plan").exists()

    def test_one_that_is_required_is_an_error(self, make):
        with pytest.raises(MachineError, match="not built here") as caught:
            make("tensorrt").build(required=True)
        assert "pip install tensorrt" in caught.value.hint


@pytest.fixture
def library(make, tmp_path, monkeypatch):
    """Builds with a module of some lines of Python in the place of `tensorrt_rtx`."""

    def build(text, *, timeout=60):
        folder = tmp_path / "fake"
        folder.mkdir()
        (folder / "tensorrt_rtx.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(folder))
        made = make("tensorrt-rtx")
        recipe = recipe_of(made.manifest, "tensorrt-rtx").model_copy(update={"timeout": timeout})
        try:
            return compile_in_child(Request(modules=("tensorrt_rtx",), folder=made.folder, recipe=recipe, module_key=MODULE))
        finally:
            assert not [p for p in made.folder.iterdir() if "plan" in p.name]

    return build


class TestProcess:
    def test_an_abort(self, library):
        with pytest.raises(IsthmusError, match=r"ended its process with SIGABRT(.|\n)*about to call the driver") as caught:
            library("import os, sys\nprint('about to call the driver', file=sys.stderr, flush=True)\nos.abort()")
        assert caught.value.exit_code == 1

    def test_a_hang_is_ended_with_what_it_started(self, library, tmp_path):
        pids = tmp_path / "pids"
        code = f"""
import os, subprocess, sys, time
inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{inner.pid}}')
print('step 7 of 12', flush=True)
time.sleep(600)
"""
        with pytest.raises(IsthmusError, match=r"did not build the engine within 6 s(.|\n)*step 7 of 12") as caught:
            library(code, timeout=6)
        assert "--build-timeout" in caught.value.hint
        alive = [int(pid) for pid in pids.read_text().split()]
        end = time.monotonic() + 10
        while any(_runs(pid) for pid in alive) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(_runs(pid) for pid in alive)

    def test_an_interruption_ends_it(self, library, tmp_path, monkeypatch):
        pid, sleep = tmp_path / "pid", time.sleep
        lines = ["import os, time", f"open({str(pid)!r} + '.new', 'w').write(str(os.getpid()))"]
        lines += [f"os.rename({str(pid)!r} + '.new', {str(pid)!r})", "time.sleep(600)"]

        def interrupted(seconds):
            if pid.exists():
                raise KeyboardInterrupt
            sleep(seconds)

        monkeypatch.setattr(process.time, "sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            library("\n".join(lines))
        assert not _runs(int(pid.read_text()))

    def test_the_system_ends_it(self, library):
        with pytest.raises(IsthmusError, match="the system ended tensorrt-rtx") as caught:
            library("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
        assert "out of memory" in caught.value.hint

    def test_an_exception(self, library):
        with pytest.raises(IsthmusError, match=r"failed with exit status 1(.|\n)*ImportError: libcudart\.so\.13"):
            library("raise ImportError('libcudart.so.13: cannot open shared object file')")

    def test_an_end_without_a_result(self, library):
        with pytest.raises(IsthmusError, match="failed with exit status 0"):
            library("import os\nos._exit(0)")

    def test_a_long_log_is_cut_at_its_beginning(self, library):
        with pytest.raises(IsthmusError) as caught:
            library("import os\nfor i in range(20000): print('line', i)\nimport sys; sys.stdout.flush(); os.abort()")
        assert len(caught.value.message) < 5000
        assert caught.value.message.endswith("line 19999")


def _runs(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("size", [6, 2**20], ids=["noticed at the end", "noticed by the library"])
def test_a_full_disk_is_an_error_and_leaves_no_engine(make, tensorrt, monkeypatch, size):
    tensorrt.ANSWERS["engine"] = size
    made = make("tensorrt")
    request = Request(modules=("tensorrt",), folder=made.folder, recipe=recipe_of(made.manifest, "tensorrt"), module_key=MODULE)
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(tempfile, "mkstemp", lambda **_: (full, str(made.folder / ".engine.plan.partial")))
    with pytest.raises(OSError, match="No space left"):
        compile_engine(tensorrt, request)
    assert not [p.name for p in made.folder.iterdir() if "plan" in p.name]
