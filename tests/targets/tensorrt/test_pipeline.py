"""From a module to a bundle with a plan, and from a bundle to an engine where the GPU is."""

import pytest
import torch

import isthmus
from isthmus.exporter.bundle import read_manifest
from isthmus.exporter.errors import AccuracyError, IntegrityError, UsageError


@pytest.fixture
def export(tmp_path, modules):
    def start(target, **arguments):
        torch.manual_seed(0)
        module = modules["Mlp"]()
        return isthmus.export((module, (torch.randn(module.EXAMPLE),)), target, tmp_path / target, **arguments).bundle

    return start


def verdicts(bundle):
    return {stage.name: stage.verdict for stage in read_manifest(bundle).stages}


@pytest.mark.usefixtures("rtx")
def test_a_plan_is_exported_and_verified(export):
    bundle = export("tensorrt-rtx", options={"compute_capability": ["8.9"], "workspace": "64"})
    manifest = read_manifest(bundle)
    assert verdicts(bundle) == {"torch": "verified", "torch-dtype": "verified", "onnx": "verified", "plan": "built", "device": "not run"}
    assert manifest.verdict == "built"
    assert manifest.device == "NVIDIA RTX GPUs of compute capability 8.9 (TensorRT-RTX)"
    assert {"model.onnx", "engine.rtx.plan", "build.sh"} <= set(manifest.files)
    assert manifest.details["engine"]["sha256"] == manifest.files["engine.rtx.plan"]
    assert manifest.details["engine"]["compute_capabilities"] == ["8.9"]
    assert isthmus.verify(bundle).verdict == "verified"  # of the ONNX file: the plan was built before
    (bundle / "engine.rtx.plan").write_bytes(b"another")
    with pytest.raises(IntegrityError, match=r"engine\.rtx\.plan: sha256 is"):
        isthmus.verify(bundle)


@pytest.mark.usefixtures("rtx")
def test_fp8_is_calibrated_quantised_and_built(export):
    options = {"compute_capability": ["8.9"], "fp8_include": ["up", "down"]}
    with pytest.raises(UsageError, match="calibration"):
        export("tensorrt-rtx", precision="fp8", options=options)
    bundle = export("tensorrt-rtx", precision="fp8", options=options, calibration_data="random")
    found = verdicts(bundle)
    assert (found["quantized"], found["plan"]) == ("verified", "built")
    assert [layer["module"] for layer in read_manifest(bundle).details["build"]["fp8"]] == ["up", "down"]


class TestOnTheGpu:
    def test_a_bundle_is_built_there(self, export, request):
        bundle = export("tensorrt")
        assert verdicts(bundle)["plan"] == "lowered"
        assert read_manifest(bundle).verdict == "lowered"
        h100 = request.getfixturevalue("h100")
        result = isthmus.build(bundle)
        assert verdicts(bundle)["plan"] == "built"
        assert result.manifest.device == "NVIDIA H100 80GB HBM3 (sm_90), tensorrt 11.4.0.106"
        assert {"engine.plan", "layers.json"} <= set(read_manifest(bundle).files)
        assert h100.calls()[-1][:2] == ["EngineInspector", "get_engine_information"]
        isthmus.verify(bundle)  # every file is in the manifest

    def test_layers_that_are_not_fp8_are_exit_code_3(self, export, request):
        bundle = export("tensorrt", precision="fp8", options={"fp8_include": ["up", "down"]}, calibration_data="random")
        h100 = request.getfixturevalue("h100")
        node = read_manifest(bundle).details["build"]["fp8"][0]["node"]
        layer = {"Name": "l", "LayerType": "gemm", "Inputs": [{"Format/Datatype": "FP8"}], "Metadata": f"[ONNX Layer: {node}]"}
        h100.answer(layers={"Layers": [layer]})
        with pytest.raises(AccuracyError, match="down: expected FP8: no layer of the engine names it") as caught:
            isthmus.build(bundle)
        assert caught.value.exit_code == 3
        assert "up: expected FP8" not in str(caught.value)
        assert verdicts(bundle)["plan"] == "blocked"
