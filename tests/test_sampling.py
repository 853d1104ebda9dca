"""`--sampler loop`, the whole way: a bundle whose sampler is a graph, verified again from what it holds, and the models that have none."""

import json

import pytest

from isthmus.exporter.bundle import read_cases


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A bundle with the graph of the sampler of dit-digits."""
    import isthmus

    folder = tmp_path_factory.mktemp("sampled") / "bundle"
    return isthmus.export("dit-digits", "onnxruntime", folder, sampler="loop")


def test_the_sampler_is_verified_as_a_stage(sampled):
    stages = {stage.name: stage for stage in sampled.manifest.stages}
    assert list(stages) == ["torch", "onnx", "sampler"]
    (row,) = stages["sampler"].metrics
    assert (row.case, row.output, row.shape) == ("samples", "latents", (20, 1, 8, 8))
    assert stages["sampler"].verdict == "verified"
    assert stages["sampler"].sample_tolerance == {"min_psnr": 60.0}
    # Other stages take the other cases, and pictures where the sampler calls them.
    assert {(m.case, m.output) for m in stages["onnx"].metrics} == {
        ("example", "sample"), ("second", "sample"), ("resized", "sample"), ("samples", "images"),
    }  # fmt: skip
    assert sampled.manifest.options["sampler"] == "loop"
    assert sampled.manifest.details["sampler"]["calls"] == 20


def test_the_bundle_holds_what_it_is_verified_with(sampled, run):
    assert set(read_cases(sampled.bundle / "reference/inputs.npz")["samples"]) == {"noise", "y"}
    result = run("verify", sampled.bundle, "--format", "json")
    assert result.exit_code == 0, result.stderr
    assert [stage["name"] for stage in json.loads(result.stdout)["stages"]] == ["onnx", "sampler"]


def test_a_model_without_a_sampler_is_refused(run, tmp_path):
    result = run("export", "dit-tiny", "--target", "onnxruntime", "--sampler", "loop", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "--sampler loop writes a model's sampler as a graph, and dit-tiny comes without one" in result.stderr
    assert not (tmp_path / "out").exists()
