"""Made-up bundles for the tests of the report, with real metrics and pictures.

A test file loads this one by its path: tests are not packages.
"""

import html
import html.parser
import re

import numpy as np

from isthmus.calibration.metrics import compare
from isthmus.calibration.report import Pictures, write_report
from isthmus.exporter.manifest import Manifest, StageResult, TensorInfo, WeightsInfo
from isthmus.exporter.spec import Samples

HOSTILE = "</title><script>document.body.innerHTML='owned'</script><img src=x onerror=alert(1)>\"'{{ 7*7 }}"


def rows(error, *, seed=0, outputs=("noise",), problem=False, tolerance=None):
    """Real metrics of made-up outputs, at two inputs and two sizes."""
    rng = np.random.default_rng(seed)
    found = []
    for case, batch in (("example", 2), ("second", 2), ("resized", 5)):
        for output in outputs:
            reference = rng.standard_normal((batch, 1, 8, 8)).astype(np.float32)
            candidate = (reference + error * rng.standard_normal(reference.shape) ** 3).astype(np.float32)
            if problem and case == "second":
                candidate[0, 0, 1, 2] = np.nan
            found.append(compare(reference, candidate, case=case, output=output, tolerance=tolerance))
    return tuple(found)


def digits(count, *, error=1e-4, seed=1, colour=False):
    """Blurred random strokes: pictures with structure, and the same with a small error."""
    rng = np.random.default_rng(seed)
    images = np.clip(rng.random((count, 8, 8, 3) if colour else (count, 8, 8)) * 1.6 - 0.5, 0, 1).astype(np.float32)
    other = np.clip(images + error * rng.standard_normal(images.shape), 0, 1).astype(np.float32)
    captions = tuple(f"digit {i % 10}" for i in range(count))
    return Pictures(Samples(images, captions), Samples(other, captions))


def stages(error=1e-7, verdict="verified", **more):
    return (
        StageResult(
            name="torch", verdict="verified", metrics=rows(0), device="PyTorch 2.13.0 on the CPU", tolerance={"max_relative": 1e-5}
        ),
        StageResult(name="onnx", verdict=verdict, metrics=rows(error), device="CPUExecutionProvider", **more),
    )


def manifest(**changes):
    values = {
        "model": "dit-digits",
        "target": "onnxruntime",
        "precision": "fp32",
        "opset": 23,
        "config": {"hidden_size": 128, "depth": 6, "patch_size": [2, 2], "qkv_bias": True, "dropout": None},
        "options": {"seed": 0, "dynamic": {"x:0": "batch"}, "onnxruntime": {"intra_op_num_threads": 2}},
        "inputs": (
            TensorInfo(name="x", dtype="float32", shape=("batch", 1, 8, 8), range=(-3.91234, 4.0221)),
            TensorInfo(name="timestep", dtype="float32", shape=("batch",), range=(0.0121, 0.9731)),
            TensorInfo(name="label", dtype="int64", shape=("batch",), range=(0, 9)),
        ),
        "outputs": (TensorInfo(name="noise", dtype="float32", shape=("batch", 1, 8, 8), range=(-2.2, 2.9)),),
        "sizes": {"batch": (1, 2, 64)},
        "weights": WeightsInfo(origin="shipped", path="dit-digits.safetensors", sha256="5f" * 32, parameters=683_024, bytes=2_732_096),
        "tolerance": {"max_relative": 1e-5},
        "device": "any ONNX Runtime",
        "verdict": "verified",
        "stages": stages(),
        "versions": {"isthmus": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.32.0"},
        "details": {"nodes": 412, "operators": {"MatMul": 61, "LayerNormalization": 13}},
    }
    return Manifest(**{**values, **changes})


def written(folder, made=None, *, size=2_500_000, **arguments):
    (folder / "model.onnx").write_bytes(b"x" * size)
    write_report(folder, made or manifest(), **arguments)
    return (folder / "report.html").read_text(encoding="utf-8")


def words(page):
    """The page's text as it is read: no tags, entities resolved, white space single."""
    body = re.sub(r"(?s)<script>.*?</script>|<wbr>", "", re.split("<body[^>]*>", page)[1])
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def parsed(page):
    """Every element of the page: its tag and the names of its attributes."""
    found = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, [name for name, _ in attributes]))
    parser.feed(page)
    return found
