"""An engine is executed through the stand-in, in this machine's memory; one from elsewhere is refused before it is loaded."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from isthmus.exporter.errors import IntegrityError, IsthmusError, MachineError
from isthmus.targets.tensorrt import base
from isthmus.targets.tensorrt.library import Gpu
from isthmus.targets.tensorrt.session import EngineRunner, Memory

H100 = Gpu("NVIDIA H100 80GB HBM3", "9.0")


@pytest.fixture
def memory(monkeypatch):
    """This machine's memory in the place of the GPU's, and a stream whose waits are counted."""
    waits = []
    stream = SimpleNamespace(cuda_stream=1234, synchronize=lambda: waits.append(1))
    with monkeypatch.context() as there:  # not for longer: torch.export asks it too
        there.setattr(torch.cuda, "is_available", lambda: True)
        made = Memory("cpu")
    made._torch = SimpleNamespace(**{**vars(torch), "cuda": SimpleNamespace(current_stream=lambda: stream)})
    made.waits = waits
    return made


@pytest.fixture
def engine(make):
    """A bundle with an engine that is in its manifest."""
    made = make("tensorrt")
    (made.folder / "engine.plan").write_bytes(b"double")
    sha = hashlib.sha256(b"double").hexdigest()
    return made.with_details(engine={"library": "tensorrt", "sha256": sha, "version": "11.4.0.106"})


@pytest.fixture
def open_(tensorrt, memory):
    def start(made, *, gpu=H100, **options):
        return EngineRunner(made.folder, made.manifest, "tensorrt", module=tensorrt, memory=memory, gpu=gpu, **options)

    return start


def test_it_executes(engine, open_, tensorrt, memory):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    with open_(engine) as runner:
        assert runner.device == "NVIDIA H100 80GB HBM3, tensorrt 11.4.0.106"
        y = runner.run({"x": x})["y"]
        assert memory.waits == [1]
    assert y.dtype == np.float32  # numpy has no bfloat16
    np.testing.assert_array_equal(y, 2 * x)
    calls = [(owner, name) for owner, name, _ in tensorrt.CALLS if owner == "IExecutionContext"]
    assert calls == [
        ("IExecutionContext", name)
        for name in ("set_input_shape", "infer_shapes", "get_tensor_shape", "set_tensor_address", "set_tensor_address", "execute_async_v3")
    ]
    assert tensorrt.CALLS[-1][2] == {"stream_handle": 1234}


def test_inputs_that_do_not_fit_are_named(engine, open_):
    with open_(engine) as runner:
        with pytest.raises(IsthmusError, match=r"x: the engine has this input(.|\n)*w: was given"):
            runner.run({"w": np.zeros((1, 4), np.float32)})
        with pytest.raises(IsthmusError, match=r"x: has shape \(9, 4\), and the engine takes \(1, 4\) to \(8, 4\)"):
            runner.run({"x": np.zeros((9, 4), np.float32)})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"runs": False}, "the engine failed: it gives no reason"),
        ({"missing": ["x"]}, "shapes do not follow from its inputs: x"),
        ({"shape": (-1, 4)}, r"the shape of output y depends on values, and is known after the run only: \(-1, 4\)"),
        ({"takes": False}, "the engine does not take the memory of x"),
    ],
)
def test_a_failure_of_the_engine_is_an_error(engine, open_, tensorrt, answer, message):
    tensorrt.ANSWERS.update(answer)
    with open_(engine) as runner, pytest.raises(IsthmusError, match=message):
        runner.run({"x": np.zeros((1, 4), np.float32)})


def test_a_gpu_without_room(engine, open_, tensorrt):
    tensorrt.ANSWERS["limit"] = 0
    with pytest.raises(IsthmusError, match=r"cannot execute engine\.plan") as caught:
        open_(engine)
    assert "memory full" in caught.value.hint


def test_pytorch_without_cuda(engine, tensorrt, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="has no CUDA"):
        EngineRunner(engine.folder, engine.manifest, "tensorrt", module=tensorrt, gpu=H100)


def test_an_engine_that_tensorrt_does_not_load(engine, open_, tensorrt):
    tensorrt.ANSWERS["loads"] = False
    with pytest.raises(IsthmusError, match=r"does not load engine\.plan: the version tag does not match"):
        open_(engine)


class TestOrigin:
    def test_a_file_from_elsewhere_is_refused_and_not_loaded(self, engine, open_, tensorrt):
        (engine.folder / "engine.plan").write_bytes(b"another")
        with pytest.raises(IntegrityError, match=r"engine\.plan: isthmus did not build this file") as caught:
            open_(engine)
        assert "--trust" in caught.value.hint
        assert not [call for call in tensorrt.CALLS if call[1] == "deserialize_cuda_engine"]

    def test_unless_it_is_trusted(self, engine, open_):
        (engine.folder / "engine.plan").write_bytes(b"another")
        with open_(engine, trust=True) as runner:
            assert runner.run({"x": np.ones((1, 4), np.float32)})["y"].tolist() == [[2.0] * 4]

    def test_another_version_is_refused(self, engine, open_, tensorrt):
        tensorrt.__version__ = "10.9.0"
        with pytest.raises(MachineError, match=r"was built with tensorrt 11\.4\.0\.106, and 10\.9\.0 is installed"):
            open_(engine)

    def test_another_gpu_is_refused_although_it_is_trusted(self, engine, open_):
        with pytest.raises(MachineError, match=r"for compute capability 9\.0, and this is NVIDIA L4 \(8\.9\)"):
            open_(engine, gpu=Gpu("NVIDIA L4", "8.9"), trust=True)

    def test_no_engine(self, make, open_):
        with pytest.raises(IntegrityError, match=r"engine\.plan is missing"):
            open_(make("tensorrt"))

    def test_a_plan_of_tensorrt_rtx_is_not_taken_for_an_engine(self, make, open_):
        made = make("tensorrt-rtx")
        (made.folder / "engine.plan").write_bytes(b"double")
        with pytest.raises(IntegrityError, match="for tensorrt-rtx and its recipe for tensorrt-rtx, expected tensorrt"):
            open_(made, trust=True)

    def test_nor_when_its_bundle_is_renamed(self, make, open_):
        made = make("tensorrt-rtx")
        sha = hashlib.sha256(b"double").hexdigest()
        (made.folder / "engine.rtx.plan").write_bytes(b"double")
        details = {**made.manifest.details, "build": {**made.manifest.details["build"], "library": "tensorrt"}}
        details["engine"] = {"library": "tensorrt-rtx", "sha256": sha, "version": "11.4.0.106"}
        made.manifest = made.manifest.model_copy(update={"target": "tensorrt", "details": details})
        with pytest.raises(IntegrityError, match="isthmus did not build this file for this bundle"):
            open_(made)
        with pytest.raises(MachineError, match=r"for compute capability 8\.9, 12\.0"):
            open_(made, trust=True)

    @pytest.mark.parametrize("what", ["missing", "changed"])
    def test_a_plugin_library_that_is_missing_or_another(self, engine, open_, what):
        path = engine.folder / "plugins" / "libisthmus_trt.so"
        entry = {"path": "plugins/libisthmus_trt.so", "sha256": "ab", "operators": ["rwkv7"], "architectures": ["sm_90a"]}
        made = engine.with_details(build={**engine.manifest.details["build"], "plugins": [entry], "plugin_override": True})
        if what == "changed":
            path.parent.mkdir()
            path.write_bytes(b"another")
        with pytest.raises(IntegrityError, match="is missing" if what == "missing" else "not the one that was built"):
            open_(made)

    def test_a_plugin_library_that_does_not_load(self, engine, open_, tensorrt, monkeypatch):
        path = engine.folder / "plugins" / "libisthmus_trt.so"
        path.parent.mkdir()
        path.write_bytes(b"library")
        sha = hashlib.sha256(b"library").hexdigest()
        entry = {"path": "plugins/libisthmus_trt.so", "sha256": sha, "operators": ["rwkv7"], "architectures": ["sm_90a"]}
        made = engine.with_details(build={**engine.manifest.details["build"], "plugins": [entry], "plugin_override": True})
        monkeypatch.setattr(tensorrt.IPluginRegistry, "load_library", lambda *_: None)
        with pytest.raises(IsthmusError, match=r"tensorrt does not load plugins/libisthmus_trt\.so"):
            open_(made)

    def test_the_plugin_library_is_loaded_once(self, engine, open_, tensorrt):
        path = engine.folder / "plugins" / "libisthmus_trt.so"
        path.parent.mkdir()
        path.write_bytes(b"library")
        sha = hashlib.sha256(b"library").hexdigest()
        entry = {"path": "plugins/libisthmus_trt.so", "sha256": sha, "operators": ["rwkv7"], "architectures": ["sm_90a"]}
        made = engine.with_details(build={**engine.manifest.details["build"], "plugins": [entry], "plugin_override": True})
        tensorrt.ANSWERS["creators"] = [["RWKV7", "1", ""]]
        for _ in range(2):
            open_(made).close()
        assert [call[2]["plugin_path"] for call in tensorrt.CALLS if call[1] == "load_library"] == [str(path)]


def test_without_a_gpu(engine):
    with pytest.raises(MachineError, match="there is no NVIDIA GPU"):
        EngineRunner(engine.folder, engine.manifest, "tensorrt")


class TestStages:
    def test_the_onnx_file_runs_on_the_cpu_and_the_device_is_not_run(self, make):
        made = make("tensorrt")
        onnx, device = made.target.stages(made.folder, made.manifest)
        with onnx.open() as runner:
            assert runner.run({"x": np.ones((3, 4, 32), np.float32)})["y"].shape == (3, 4, 32)
        assert (onnx.name, device.name, device.open) == ("onnx", "device", None)
        assert "engine.plan is not built and there is no NVIDIA GPU here" in device.reason

    def test_in_bfloat16_the_onnx_file_runs_in_wider_arithmetic(self, make):
        made = make("tensorrt", precision="bf16")
        stage, _ = made.target.stages(made.folder, made.manifest)
        with stage.open() as runner:
            assert runner.run({"x": np.ones((3, 4, 32), np.float32)})["y"].shape == (3, 4, 32)
        assert stage.name == "onnx"

    def test_in_fp8_the_stage_is_called_quantized(self, make):
        made = make("tensorrt")
        fp8 = made.manifest.model_copy(update={"precision": "fp8"})
        assert [stage.name for stage in made.target.stages(made.folder, fp8)] == ["quantized", "device"]

    def test_on_the_gpu_the_engine_is_opened_and_trust_does_not_come_from_the_bundle(self, engine, h100, monkeypatch):
        assert h100.folder.is_dir()
        opened = []
        monkeypatch.setattr(base, "_engine_runner", lambda *given, trust: opened.append((given[-1], trust)))
        manifest = engine.manifest.model_copy(update={"options": {"tensorrt": {"trust": True}}})
        for trust in (False, True):
            engine.target.stages(engine.folder, manifest, trust=trust)[1].open()
        engine.target.stages(engine.folder, manifest)[1].open()
        assert opened == [("tensorrt", False), ("tensorrt", True), ("tensorrt", False)]


def test_the_double_is_no_looser_than_the_bindings(tensorrt):
    config = tensorrt.IBuilderConfig()
    for wrong in (
        lambda: config.set_timing_cache(tensorrt.ITimingCache()),
        lambda: config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, "1"),
        lambda: config.add_optimization_profile(object()),
        lambda: tensorrt.Builder(object()),
        lambda: tensorrt.IOptimizationProfile().set_shape("x", (1,), (1,), maximum=(1,)),
    ):
        with pytest.raises(TypeError, match="does not take"):
            wrong()
    with pytest.raises(AssertionError, match="has no property int8_calibrator"):
        config.int8_calibrator = None
    assert json.dumps(tensorrt.CALLS) == "[]"
