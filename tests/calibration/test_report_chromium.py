"""The report in Chromium: what it shows, how it looks, on a phone too, and that hostile names do nothing."""

import functools
import html
import http.server
import importlib.util
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from isthmus.calibration.metrics import compare
from isthmus.exporter.manifest import StageResult, TensorInfo, WeightsInfo


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


samples = _load("report_samples")
HOSTILE = samples.HOSTILE
digits = samples.digits
manifest = samples.manifest
rows = samples.rows
stages = samples.stages
written = samples.written

PROBE = """<!DOCTYPE html><meta charset="utf-8"><style>html,body{margin:0}iframe{border:0;display:block}</style>
<pre id="probe" hidden></pre><iframe id="page" width="%(width)d" height="%(height)d"></iframe>
<script>
const frame = document.getElementById("page");
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow,
    box = e => { const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; };
  const all = (selector, f) => [...page.querySelectorAll(selector)].map(f);
  document.getElementById("probe").textContent = JSON.stringify({
    title: page.title, verdict: page.querySelector(".word").innerText, headline: page.querySelector(".headline").innerText,
    colour: view.getComputedStyle(page.querySelector(".verdict")).backgroundColor,
    images: all("img", i => [i.complete, i.naturalWidth, i.naturalHeight, i.getBoundingClientRect().width, i.alt]),
    metrics: all("table.metrics tbody tr", r => [r.closest("table").dataset.stage, r.dataset.case, r.dataset.output, r.cells.length]),
    missed: all("td.miss", e => e.innerText), pills: all("#stages .pill", e => e.innerText),
    headers: all("main table", t => t.querySelectorAll("th[scope]").length), bars: all(".histogram .bar", e => box(e)[3]),
    resources: view.performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
    grid: page.querySelector("#pictures") && box(page.querySelector("#pictures")), overflow: page.documentElement.scrollWidth - %(width)d,
    height: page.documentElement.scrollHeight, order: all("h2", e => e.innerText),
    wide: all("body *", e => e).filter(e => !e.closest(".scroll") && box(e)[0] + box(e)[2] > %(width)d + 1)
      .map(e => e.outerHTML.slice(0, 80)),
  });
};
frame.src = "report.html";
</script>"""


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):  # noqa: ARG002 - nothing is logged
        self.server.asked.append(self.path)


def look(folder, *, width=1200, height=3000, dark=False, shot=None):
    """Opens a report in a frame of the given size, in headless Chromium.

    Returns what a script beside the frame (the page itself allows none) finds in it, and the screenshot, (H, W, 3) in 0 to 255.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "this test needs Chromium: install Debian's package `chromium` (apt-get install chromium)"
    (folder / "probe.html").write_text(PROBE % {"width": width, "height": height}, encoding="utf-8")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    picture = shot or folder / "shot.png"
    try:
        done = subprocess.run(
            [
                chromium,
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
                *([] if not dark else ["--blink-settings=preferredColorScheme=0"]),
                f"--user-data-dir={folder / 'profile'}",
                f"--window-size={max(width, 500)},{height}",
                f"--screenshot={picture}",
                "--virtual-time-budget=10000",
                "--dump-dom",
                f"http://127.0.0.1:{server.server_port}/probe.html",
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert {path for path in server.asked if path != "/favicon.ico"} == {"/probe.html", "/report.html"}, server.asked
    found = re.search(r'(?s)<pre id="probe"[^>]*>(.+?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    pixels = np.round(imread(picture)[:height, :width, :3] * 255).astype(int)
    return json.loads(html.unescape(found[1])), pixels


def colour_of(text):
    return [int(n) for n in re.findall(r"\d+", text)[:3]]


def colours(pixels):
    return len(np.unique(pixels.reshape(-1, 3), axis=0))


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verified")
    pictures = digits(10)
    torch, onnx = stages()
    samples = compare(pictures.reference.images, pictures.candidate.images, case="samples", output="images")
    onnx = onnx.model_copy(update={"metrics": (*onnx.metrics, samples), "sample_tolerance": {"min_psnr": 60.0}})
    idle = StageResult(name="device", verdict="not run", reason="there is no CUDA device here")
    written(folder, manifest(stages=(torch, onnx, idle)), pictures=pictures, facts={"notes": ["13 LayerNormalization nodes were fused."]})
    return folder


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_chromium_shows_a_verified_report(verified, dark):
    seen, pixels = look(verified, dark=dark)
    assert seen["verdict"] == "VERIFIED"
    assert seen["headline"].startswith("Executed here on CPUExecutionProvider: at most ")
    assert seen["title"] == "verified: dit-digits for onnxruntime, fp32"
    assert seen["pills"] == ["verified", "verified", "not run"]
    assert seen["metrics"] == [
        *(["torch", case, "noise", 10] for case in ("example", "second", "resized")),
        *(["onnx", case, "noise", 10] for case in ("example", "second", "resized")),
        ["onnx", "samples", "images", 10],
    ]
    assert seen["missed"] == []
    assert len(seen["images"]) == 30
    for complete, natural_width, natural_height, width, alt in seen["images"]:
        assert complete
        assert natural_width == natural_height == 96
        assert width >= 64
        assert alt.startswith("digit")
    assert seen["resources"] == []
    assert seen["overflow"] <= 0
    assert min(seen["headers"]) >= 1, "every table has headers with a scope"
    assert max(seen["bars"]) > 80
    assert min(seen["bars"]) >= 3
    assert [heading.split()[0] for heading in seen["order"]] == ["Stages", "Accuracy", "How", "Pictures", "Inputs", "How"]
    # The picture of it: the verdict's colour fills the head, the grid has structure, the ground is light or dark.
    green = colour_of(seen["colour"])
    assert green[1] > green[0] + 40
    assert (pixels[:120] == green).all(axis=-1).mean() > 0.5
    assert colours(pixels) > 200
    x, y, w, h = (round(v) for v in seen["grid"])
    grid = pixels[y : y + h, x : x + w]
    assert colours(grid) > 50
    assert grid.std() > 20
    assert (pixels[-1, 0].mean() < 60) == dark


def test_chromium_shows_it_on_a_phone(verified):
    seen, pixels = look(verified, width=390, height=5000)
    assert seen["overflow"] <= 0
    assert seen["wide"] == [], "only tables scroll sideways"
    assert pixels.shape[1] == 390
    assert all(complete and width >= 64 for complete, _, _, width, _ in seen["images"])


def test_chromium_shows_a_failure(tmp_path):
    failing = StageResult(name="onnx", verdict="failed", reason="2 bounds", metrics=rows(1e-3, problem=True), device="CPUExecutionProvider")
    written(tmp_path, manifest(stages=(failing,), verdict="failed"), facts={"warnings": ["Calibrated on random data."]})
    seen, pixels = look(tmp_path)
    assert seen["verdict"] == "FAILED"
    assert len(seen["missed"]) == 3
    assert any("1 NaN" in text for text in seen["missed"])
    assert all(text.startswith("✗") for text in seen["missed"])
    red = colour_of(seen["colour"])
    assert red[0] > red[1] + 80
    assert (pixels[:120] == red).all(axis=-1).mean() > 0.5


@pytest.mark.parametrize(("verdict", "leading"), [("built", 0), ("blocked", 0), ("not run", 2)])
def test_chromium_shows_the_other_verdicts(tmp_path, verdict, leading):
    stage = StageResult(name="plan", verdict=verdict, reason="no H100 here")
    written(
        tmp_path, manifest(stages=(stage,), verdict=verdict, device="NVIDIA H100", weights=WeightsInfo(origin="random", seed=0), sizes={})
    )
    seen, _ = look(tmp_path)
    assert seen["verdict"] == verdict.upper()
    assert "nothing" in seen["headline"]
    colour = colour_of(seen["colour"])
    assert colour.index(max(colour)) == leading


def test_hostile_names_do_nothing_in_chromium(tmp_path):
    written(tmp_path, manifest(model=HOSTILE, inputs=(TensorInfo(name=HOSTILE, dtype="f", shape=()),)), facts={HOSTILE: HOSTILE})
    seen, _ = look(tmp_path)
    assert seen["verdict"] == "VERIFIED"
    assert seen["images"] == []
    assert HOSTILE in seen["title"]
