"""CONTRIBUTING.md, followed to the letter: its files go into a copy of the package, and are exported with."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = dict(re.findall(r"<!-- tested: (\S+) -->\n```python\n(.*?)```\n", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL))

MIXER = BLOCKS["models/mixer.py"]


@pytest.fixture
def isthmus(tmp_path: Path):
    """The command line of a copy of the package that has the files of CONTRIBUTING.md."""
    shutil.copytree(ROOT / "src" / "isthmus", tmp_path / "isthmus", ignore=shutil.ignore_patterns("__pycache__"))
    for name, source in BLOCKS.items():
        path = tmp_path / "isthmus" / name
        assert not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)

    def run(*arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "isthmus.cli", *arguments],
            check=False, capture_output=True, text=True, timeout=300, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_all_examples_are_there():
    operator = [f"exporter/ops/leaky_integrator/{name}.py" for name in ("__init__", "reference", "cases", "eager", "onnx_function")]
    assert list(BLOCKS) == ["models/mixer.py", "targets/onnx_reference/__init__.py", *operator]


def test_the_model_is_listed_and_exported(isthmus):
    models = {m["name"]: m for m in json.loads(isthmus("list", "models", "--format", "json"))["models"]}
    assert models["mixer-s-16"]["options"]["channels"] == {"type": "int", "default": 512}
    value = json.loads(isthmus("export", "mixer-tiny", "--target", "onnxruntime", "--set", "depth=3", "--format", "json"))
    assert value["verdict"] == "verified"


def test_the_published_size_has_the_parameters_that_its_summary_says(isthmus, tmp_path):
    """17.6 M; stem, head and last norm add the 0.9 M that make the 18.5 M of the paper's table 1 (18 M there)."""
    code = "from isthmus.exporter.spec import MODELS; print(sum(p.numel() for p in MODELS['mixer-s-16'].spec().build().parameters()))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60, env=environment)
    stem, head, norm = 16 * 16 * 3 * 512 + 512, 512 * 1000 + 1000, 2 * 512
    blocks = int(result.stdout)
    assert f"{blocks / 1e6:.1f} M" in MIXER
    assert f"{(blocks + stem + head + norm) / 1e6:.1f}" == "18.5"


@pytest.mark.matrix
def test_the_target_is_listed_and_exported_to(isthmus):
    assert "onnx-reference" in isthmus("list", "targets")
    assert "--verbose-nodes" in isthmus("export", "--help").partition("Options of onnx-reference:")[2]
    value = json.loads(isthmus("export", "dit-tiny", "--target", "onnx-reference", "-o", "out", "--format", "json"))
    assert value["verdict"] == "verified"
    assert [s["name"] for s in value["stages"] if s["device"] == "onnx.reference"] == ["onnx"]
    assert "verified" in isthmus("verify", "out")


def test_the_operator_is_listed_and_swept(isthmus, tmp_path):
    operators = {o["name"]: o for o in json.loads(isthmus("list", "ops", "--format", "json"))["ops"]}
    assert operators["leaky_integrator"]["nodes"] == ["isthmus::LeakyIntegrator"]
    assert operators["leaky_integrator"]["parts"]["gpu"] == {"state": "none", "detail": "left out of this example", "fix": ""}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "pythonpath=", "-p", "no:cacheprovider", "-k", "leaky_integrator",
         str(ROOT / "tests/exporter/ops/test_sweep.py")],
        check=False, capture_output=True, text=True, timeout=300, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    # Three cases in three dtypes of torch, and at least two of each way through ONNX; parts and names besides.
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= 3 * 3 + 2 * 3 * 2


@pytest.mark.parametrize("name", BLOCKS)
def test_the_examples_keep_the_style(tmp_path, name):
    path = tmp_path / Path(name).name
    path.write_text(BLOCKS[name])
    # What pyproject.toml says for paths is said here, because the file lies elsewhere.
    ignored = "INP001,TID252" + (",ARG001,ARG002" if name.startswith("exporter/ops/") else "")
    for command in (["check", "--ignore", ignored], ["format", "--check"]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml"), str(path)],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stdout + result.stderr
