"""The Swift package compiled, and its tests run, by a Swift compiler for Linux around a stand-in for Core ML (swift_standin/).

What this proves: the code is well-typed, free of data races as far as the compiler sees, and does what its tests say around Core ML's
documented signatures. What Apple's own module accepts, and what a device computes, is not run.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from isthmus.embedding import embed
from isthmus.exporter.bundle import read_manifest
from isthmus.exporter.sampling import LoopCall, LoopSampler
from isthmus.targets.coreml.swift import write_package

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("swift") is None, reason="not run: there is no Swift compiler for Linux on this machine"
)
STANDIN = Path(__file__).parent / "swift_standin"


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


bundles = _load("swift_bundles")


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    """The folder of the compiled stand-in."""
    folder = tmp_path_factory.mktemp("standin")
    command = "swiftc -parse-as-library -emit-module -emit-library -static -module-name CoreML -o libCoreML.a".split()
    subprocess.run([*command, str(STANDIN / "CoreML.swift")], check=True, cwd=folder)
    return folder


def swift(package, standin, *arguments, **environment):
    """`swift test`, with warnings of the compiler as errors."""
    options = ["-warnings-as-errors", "-strict-concurrency=complete", f"-I{standin}", f"-L{standin}"]
    command = ["swift", "test", *(part for option in options for part in ("-Xswiftc", option)), "-Xlinker", "-lCoreML", *arguments]
    (golden,) = (package / "Tests").glob("*/Golden")
    variables = {**os.environ, "STANDIN_GOLDEN": str(golden), "HOME": str(package), **environment}
    return subprocess.run(command, cwd=package, env=variables, check=False, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("name", list(bundles.BUNDLES))
def test_a_package_compiles_and_passes_its_tests(name, standin, tmp_path):
    package = embed(bundles.BUNDLES[name](tmp_path / "bundle"), "swift", tmp_path / "package").path
    if name == "states":
        shutil.copyfile(STANDIN / "StateTests.swift", package / "Tests" / "RwkvTests" / "StateTests.swift")
    functions = {"STANDIN_FUNCTIONS": "2=main,8=x_8x3_pairs_16"} if name == "functions" else {}
    done = swift(package, standin, **functions)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    if name == "sampler":
        assert swift(package, standin, STANDIN_HALF="1").returncode == 0
        wrong = swift(package, standin, STANDIN_WRONG="1")
        assert wrong.returncode == 1
        assert "testOutputsAreWithinTolerance" in wrong.stdout


@pytest.mark.parametrize("name", ["sampler", "states"])
def test_the_library_and_the_program_compile_in_the_language_mode_of_swift_6(name, standin, tmp_path):
    """Where data races are errors. A package is of Swift 5 by itself: its tests are, on Linux, in a file that SwiftPM writes."""
    package = embed(bundles.BUNDLES[name](tmp_path / "bundle"), "swift", tmp_path / "package").path
    options = ["-swift-version", "6", f"-I{standin}", f"-L{standin}"]
    command = ["swift", "build", *(part for option in options for part in ("-Xswiftc", option)), "-Xlinker", "-lCoreML"]
    done = subprocess.run(
        command, cwd=package, env={**os.environ, "HOME": str(package)}, check=False, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize("guidance", [1.0, 3.7])
def test_calls_that_no_model_of_the_registry_makes(guidance, standin, tmp_path):
    calls = (
        LoopCall(time=1000.0, change=-0.1, advances=False),
        LoopCall(time=900.0, change=-0.05, previous=1.0),
        LoopCall(time=900.0, change=1.0, keep=0.0, noise=0.3),
        LoopCall(time=333.3, change=-0.7, keep=0.9, previous=0.25, noise=0.1),
    )
    sampler = LoopSampler(calls=calls, guidance=guidance, null={"y": np.array([10])} if guidance > 1 else {}, start=2.5)
    bundle, package = bundles.sampler(tmp_path / "bundle"), tmp_path / "package"
    package.mkdir()
    write_package(bundle, read_manifest(bundle), package, sampler=sampler)
    done = swift(package, standin, "--filter", "SamplerTests")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
