"""`isthmus.build`: what it refuses, and that a bundle is replaced as a whole or left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import isthmus
from isthmus.exporter.bundle import read_manifest, sha256_of
from isthmus.exporter.errors import AccuracyError, IntegrityError, MachineError, UsageError
from isthmus.exporter.manifest import StageResult
from isthmus.exporter.target import TARGETS, Built


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def export(target: str, folder: Path) -> Path:
    torch.manual_seed(0)
    isthmus.export((Net(), (torch.randn(4, 16, 32),)), target, folder, precision="fp16")
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bundle for each target."""
    folder = tmp_path_factory.mktemp("bundles")
    for target in ("onnxruntime", "tensorrt", "tensorrt-rtx"):
        export(target, folder / target)
    return folder


def state(bundle: Path) -> dict[str, str]:
    return {p.relative_to(bundle).as_posix(): sha256_of(p) for p in bundle.rglob("*") if p.is_file()}


def test_an_artifact_that_needs_no_build_says_so(bundles: Path) -> None:
    with pytest.raises(UsageError, match="onnxruntime needs no build"):
        isthmus.build(bundles / "onnxruntime")


def test_a_machine_without_the_gpu_is_told_what_is_missing_and_the_bundle_stays(bundles: Path) -> None:
    before = state(bundles / "tensorrt")
    with pytest.raises(MachineError, match="an NVIDIA GPU") as caught:
        isthmus.build(bundles / "tensorrt")
    assert "isthmus build" in caught.value.hint
    assert caught.value.exit_code == 5
    assert state(bundles / "tensorrt") == before


def test_what_is_built_is_built_again_only_by_force(bundles: Path) -> None:
    bundle = bundles / "tensorrt-rtx"
    with pytest.raises(UsageError, match="is built already") as caught:
        isthmus.build(bundle)
    assert "--force" in caught.value.hint
    result = isthmus.build(bundle, force=True)
    assert (result.exit_code, result.manifest.verdict) == (0, "built")
    assert [s.name for s in result.stages] == ["plan", "device"]
    assert result.summary()["verdict"] == "built"
    assert read_manifest(bundle) == result.manifest
    assert isthmus.verify(bundle).verdict == "verified"
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["onnxruntime", "tensorrt", "tensorrt-rtx"]


def test_a_changed_model_is_not_built(bundles: Path, tmp_path: Path) -> None:
    bundle = export("tensorrt-rtx", tmp_path / "changed")
    with (bundle / "model.onnx").open("ab") as file:
        file.write(b"\0")
    for trust in (False, True):  # what can be trusted is an engine or a library, and not the model
        with pytest.raises(IntegrityError, match="not what its manifest says"):
            isthmus.build(bundle, force=True, trust=trust)


def test_an_engine_that_is_not_what_was_asked_for_is_written_and_reported(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(self: object, folder: Path, manifest: object, *, required: bool, trust: bool) -> Built:
        assert (required, trust) == (True, False)
        (folder / "engine.plan").write_bytes(b"an engine")
        stage = StageResult(name="plan", verdict="blocked", reason="layers.2 computes in half precision")
        return Built(stage, device="a GPU", notes=("built",), details={"engine": {"file": "engine.plan"}})

    monkeypatch.setattr(TARGETS["tensorrt"], "build", build)
    with pytest.raises(AccuracyError, match=r"layers\.2 computes in half precision") as caught:
        isthmus.build(bundles / "tensorrt")
    result = caught.value.result
    assert (result.exit_code, caught.value.exit_code) == (3, 3)
    manifest = read_manifest(bundles / "tensorrt")
    assert manifest == result.manifest
    assert (manifest.verdict, manifest.device) == ("blocked", "a GPU")
    assert manifest.files["engine.plan"] == sha256_of(bundles / "tensorrt" / "engine.plan")
    assert "layers.2 computes in half precision" in (bundles / "tensorrt" / "report.html").read_text()
    assert "built" in (bundles / "tensorrt" / "report.json").read_text()
