"""The pages in Chromium, from `file://`, with a pointer and keys: sorting, filtering, what marks say, phones, dark mode."""

import importlib.util
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from isthmus.calibration.compare import compare_bundles, comparison_page
from isthmus.calibration.module_report import FILE
from isthmus.calibration.report import render
from isthmus.exporter.bundle import write_manifest
from isthmus.exporter.manifest import StageResult
from isthmus.exporter.ranges import FILE as CALIBRATION
from isthmus.exporter.ranges import Bins, Bounds, CalibrationTable, DataInfo, Observed

MODULES = '.scroll[aria-label="Modules of stage quantized"] table'


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


samples = _load("report_samples")
Browser = _load("browser").Browser
ERRORS = [0.03, 0.2, 1e-4, 0.0, None, 0.5, 0.007, 0.02, 0.06, 0.001, 3e-5, 0.09]


def comparison():
    """What `isthmus report BUNDLE --modules` writes, of as many modules as there are errors; one is not visible in its own."""

    def figures(error):
        return None if error is None else {"relative_l2": error, "sqnr_db": -20 * np.log10(error) if error else "inf", "max_abs": error}

    rows = [
        {
            "module": f"blocks.{i // 4}.{('attn', 'norm', 'mlp', 'proj')[i % 4]}",
            "kind": ("Attention", "LayerNorm", "Mlp", "Linear")[i % 4],
            "order": i, "total": figures(0.01), "inherited": figures(0.005), "injected": figures(error), "at": "output",
            "nodes": [f"MatMul node {i}"], "reason": "", "case": "example", "sensitivity": 0.0,
        }
        for i, error in enumerate(ERRORS)
    ]  # fmt: skip
    stage = {"name": "quantized", "precision": "fp8", "threshold": 0.1, "device": "CPU", "reason": "", "visible": 11, "modules": rows}
    return {
        "culprit": {"stage": "quantized", "module": "blocks.0.norm"},
        "stages": [{**stage, "over": ["blocks.0.norm", "blocks.1.norm"]}],
        "timesteps": [{"timestep": t, "module": "", "total": 0.01, "inherited": 0.0, "injected": 0.01} for t in (10.0, 900.0)],
    }


def ranges():
    """A calibration table of ten values, of which one saturates."""
    counts = tuple(int(1e5 * np.exp(-(((i - 31.5) / 9) ** 2))) + 1 for i in range(64))
    seen = {
        f"value {i}": Observed(
            module=f"blocks.{i}", count=sum(counts), min=-4, max=4, percentiles={"99.9": 3.0}, drift=1.0 + i,
            histogram=Bins(exponent=-3, first=-32, counts=counts), ranges={"e4m3": Bounds(low=-high, high=high)},
        )
        for i, high in enumerate((4.0,) * 9 + (1.5,))
    }  # fmt: skip
    return CalibrationTable(method="mse", data=DataInfo(source="trajectories", sets=32), timestep="t", values=seen)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report with everything in it, and a comparison of two bundles."""
    folders = [tmp_path_factory.mktemp(name) for name in ("bundle-with-a-rather-long-name-of-its-own", "other")]
    idle = StageResult(name="device", verdict="not run", reason="there is no CUDA device here")
    plan = StageResult(name="plan", verdict="built", reason="not executed")
    torch, onnx = samples.stages()
    quantized = onnx.model_copy(update={"name": "quantized", "metrics": samples.rows(1e-2)})
    options = {"seed": 0, "precision": "int8", "calibration_method": "mse", "weight_rounding": "nearest", "recipe": None}
    for folder, error in zip(folders, (1e-4, 0.05), strict=True):
        stages = (torch, torch.model_copy(update={"name": "torch-dtype"}), onnx, quantized, plan, idle)
        made = samples.manifest(stages=stages, options=options)
        if error > 1e-2:
            other = {"precision": "fp16", "calibration_method": None, "weight_rounding": "gptq", "recipe": "ab" * 32}
            changes = {
                "stages": (torch, onnx, quantized.model_copy(update={"metrics": samples.rows(0.1)})),
                "options": {**options, **other},
                "versions": {"isthmus": "0.1.0", "torch": "2.12.1+cpu", "tensorrt-cu12-bindings": "10.13.3.9"},
            }
            made = made.model_copy(update=changes)
        samples.written(folder, made, pictures=samples.digits(10, error=error))
        (folder / FILE).write_text(json.dumps(comparison()))
        (folder / CALIBRATION).write_text(ranges().json_text())
        write_manifest(folder, made)
        (folder / "report.html").write_text(render(folder))
    compared = folders[0] / "compare.html"
    compared.write_text(comparison_page(compare_bundles(*folders)))
    return {"report": folders[0] / "report.html", "compare": compared}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium, started once."""
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def column(browser, table, index):
    """The texts of a column's cells, of the rows that are shown."""
    cells = f"[...document.querySelector({json.dumps(table)}).tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[{index}])"
    return browser.run(f"{cells}.map(c => c.dataset.value ?? c.innerText)")


def test_a_click_sorts_by_numbers_and_back(browser, pages):
    browser.open(pages["report"])
    before = column(browser, MODULES, 2)
    assert [None if v == "" else float(v) for v in before] == ERRORS
    known = [e for e in ERRORS if e is not None]
    for expected, state in ((sorted(known, reverse=True), "descending"), (sorted(known), "ascending")):
        browser.click(f"{MODULES} th:nth-child(3) button")
        found = column(browser, MODULES, 2)
        assert [float(v) for v in found[:-1]] == expected
        assert found[-1] == "", "what has no figure comes last in every order"
        assert browser.run(f"document.querySelector('{MODULES} th:nth-child(3)').ariaSort") == state
    browser.click(f"{MODULES} th:nth-child(3) button")
    assert column(browser, MODULES, 2) == before
    browser.click(f"{MODULES} th:nth-child(2) button")
    assert column(browser, MODULES, 1) == sorted(column(browser, MODULES, 1))


def test_keys_sort_too(browser, pages):
    browser.open(pages["report"])
    browser.run(f"document.querySelector('{MODULES} th:nth-child(2) button').focus()")
    browser.press("Tab")
    assert browser.run("document.activeElement.innerText").strip() == "Injected", "headers are in the order of the keyboard"
    browser.press("Enter", "\r")
    assert float(column(browser, MODULES, 2)[0]) == 0.5
    outline = browser.run("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus is seen"


def test_a_filter_leaves_the_rows_with_all_its_words(browser, pages):
    browser.open(pages["report"])
    field = '[aria-label="Filter Modules of stage quantized"]'
    count = f"document.querySelector('{field}').parentElement.querySelector('[role=status]').innerText"
    assert browser.run(count) == "12 rows"
    browser.click(field)
    browser.type("LINEAR blocks.1")
    assert column(browser, MODULES, 0) == ["blocks.1.proj"]
    assert browser.run(count) == "1 of 12 rows"
    browser.run(f"document.querySelector('{field}').select()")
    browser.type("mlp")
    browser.click(f"{MODULES} th:nth-child(3) button")
    assert [float(v) for v in column(browser, MODULES, 2)] == sorted((ERRORS[i] for i in (2, 6, 10)), reverse=True)
    browser.run(f"document.querySelector('{field}').select()")
    browser.type("nothing of that name")
    assert column(browser, MODULES, 0) == []
    assert browser.run("document.querySelectorAll('.metrics tbody tr[hidden]').length") == 0, "other tables stay whole"


def test_a_mark_says_what_it_stands_for(browser, pages):
    browser.open(pages["report"])
    tip = "(t => t.hidden ? '' : t.innerText)(document.querySelector('.tip'))"
    assert browser.run(tip) == ""
    browser.hover("#chain circle:not(.open)")
    assert browser.run(tip) == "torch: verified\nworst SQNR ∞ dB"
    x, y, width, height = browser.box("#chain circle:not(.open)")
    left, top, across, down = browser.run("(r => [r.x, r.y, r.width, r.height])(document.querySelector('.tip').getBoundingClientRect())")
    assert top + down <= y or top >= y + height, "it does not lie over the mark"
    assert abs(left + across / 2 - (x + width / 2)) < 120
    browser.press("Escape")
    assert browser.run(tip) == ""
    browser.hover("#modules-1 circle.mark-injected")
    assert browser.run(tip).startswith("blocks.0.attn (Attention)\ninjected 0.03")
    browser.hover("h1")
    assert browser.run(tip) == ""
    browser.run("document.querySelector('#chain circle.open').focus()")
    assert browser.run(tip) == "plan: built, no figure"
    browser.hover(".spread")
    assert browser.run(tip).startswith("value 0: -4 to 4\nrepresented: -4 to 4; saturates: 0")


def test_the_row_under_the_pointer_is_seen(browser, pages):
    browser.open(pages["report"])
    cell = f"{MODULES} tbody tr:nth-child(3) td"
    colour = f"getComputedStyle(document.querySelector('{cell}')).backgroundColor"
    before = browser.run(colour)
    browser.hover(cell)
    assert browser.run(colour) != before


def test_what_saturates_is_marked(browser, pages):
    browser.open(pages["report"])
    red = browser.run("[...document.querySelectorAll('#ranges .beyond')].map(p => p.closest('tr').cells[1].innerText)")
    assert red == ["value 9"]
    assert browser.run("[...document.querySelectorAll('#ranges .clipped')].map(c => c.innerText)") == red_share()
    browser.click("#ranges th:nth-child(7) button")
    assert column(browser, "#ranges", 1)[0] == "value 9"


def test_a_case_without_figures_comes_last_in_every_order(browser, tmp_path):
    """Its row has one cell across the columns of figures: there is nothing to sort by, whatever column is clicked."""
    torch, onnx = samples.stages(verdict="failed")
    made = samples.manifest(stages=(torch, onnx.model_copy(update={"metrics": samples.rows(1e-2, problem=True)})), verdict="failed")
    samples.written(tmp_path, made)
    browser.open(tmp_path / "report.html")
    table = '.metrics[data-stage="onnx"]'
    rows = f"[...document.querySelector({json.dumps(table)}).tBodies[0].rows]"
    assert browser.run(f"{rows}.map(r => r.cells.length)") == [10, 4, 10]
    for number in range(4, 11):
        for state in ("descending", "ascending"):
            browser.click(f"{table} th:nth-child({number}) button")
            assert browser.run(f"document.querySelector({json.dumps(table)}).tHead.rows[0].cells[{number - 1}].ariaSort") == state
            assert browser.run(f"{rows}.map(r => r.dataset.case)")[-1] == "second"
            found = [float(v) for v in browser.run(f"{rows}.slice(0, 2).map(r => r.cells[{number - 1}].dataset.value)")]
            assert found == sorted(found, reverse=state == "descending")
        browser.click(f"{table} th:nth-child({number}) button")
        assert browser.run(f"{rows}.map(r => r.dataset.case)") == ["example", "second", "resized"]
    browser.click(f"{table} th:nth-child(1) button")
    assert browser.run(f"{rows}.map(r => r.dataset.case)") == ["example", "resized", "second"]
    assert browser.complaints == []


def red_share():
    """The share of the counts outside 1.5, as it is written."""
    counts = np.array(ranges().values["value 9"].histogram.counts)
    edges = np.arange(-32, 33) / 8
    return [f"{float(f'{100 * counts[(edges[:-1] >= 1.5) | (edges[1:] <= -1.5)].sum() / counts.sum():.2g}'):g} %"]


@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_page_fetches_nothing_and_complains_of_nothing(browser, pages, name):
    browser.open(pages[name])
    assert browser.run("location.protocol") == "file:"
    assert browser.requests == []
    assert browser.complaints == []
    assert browser.run("document.querySelectorAll('th button').length") > 5, "the script has run"


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_scrolls_downwards_only(browser, pages, name, width):
    browser.open(pages[name], width=width, height=800)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.run("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    wide = "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg') && !e.closest('.tip'))"
    assert browser.run(f"{wide}.filter(e => e.getBoundingClientRect().right > {width} + 1).map(e => e.outerHTML.slice(0, 80))") == []
    labels = "[...document.querySelectorAll('#chain .below')].map(t => t.getBoundingClientRect()).map(r => [r.left, r.right, r.top])"
    boxes = browser.run(labels)
    for row in {top for _, _, top in boxes}:
        across = sorted(box[:2] for box in boxes if box[2] == row)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(across)), "labels of a chart do not overlap"
        assert across[0][0] >= 0
        assert across[-1][1] <= width


@pytest.mark.parametrize("width", [390, 1280])
def test_rows_of_modules_are_one_line_high(browser, pages, width):
    """What a module became is behind a click: the column is in sight, and off screen it does not stretch the rows that are."""
    browser.open(pages["report"], width=width)
    heights = browser.run(f"[...document.querySelector('{MODULES}').tBodies[0].rows].map(r => r.offsetHeight)")
    assert max(heights) <= 52
    if width == 1280:
        inside, whole = browser.run(f"(e => [e.clientWidth, e.scrollWidth])(document.querySelector('{MODULES}').closest('.scroll'))")
        assert whole <= inside, "no column is cut"
        nodes = f"document.querySelector('{MODULES} td.nodes details')"
        assert browser.run(f"{nodes}.innerText") == "1 node"
        browser.click(f"{MODULES} td.nodes summary")
        assert browser.run(f"{nodes}.innerText").split() == ["1", "node", "MatMul", "node", "0"]


BROKEN = """(() => {
  const found = [], range = document.createRange();
  for (const cell of document.querySelectorAll('.settings th, .settings td:not(.long)')) {
    const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) for (const word of walker.currentNode.data.matchAll(/[^\\s-]+/g)) {
      range.setStart(walker.currentNode, word.index);
      range.setEnd(walker.currentNode, word.index + word[0].length);
      if (new Set([...range.getClientRects()].map(r => r.top)).size > 1) found.push(word[0]);
    }
  }
  return found;
})()"""


@pytest.mark.parametrize("width", [320, 390])
def test_words_of_settings_stay_whole(browser, pages, width):
    browser.open(pages["compare"], width=width)
    rows = browser.run("[...document.querySelectorAll('.pair tbody th')].map(e => e.innerText)")
    assert {"precision", "calibration_method", "weight_rounding", "tensorrt-cu12-bindings"} <= set(rows)
    assert browser.run("document.querySelectorAll('.pair td.long').length") == 1, "a hash breaks where it has to"
    assert browser.run(BROKEN) == []
    browser.open(pages["report"], width=width)
    assert browser.run(BROKEN) == []


def luminance(colour):
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


CONTRAST = """(() => {
  const opaque = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$/.test(c) && c !== 'transparent') return c; } return 'rgb(255, 255, 255)'; };
  const pairs = {};
  const texts = 'p, h1, h2, h3, td, th, dt, dd, li, small, summary, figcaption, .pill, th button, .chart text';
  for (const e of document.querySelectorAll(texts)) {
    if (!e.textContent.trim() || e.closest('.hidden')) continue;
    const style = getComputedStyle(e), text = e instanceof SVGElement ? style.fill : style.color;
    pairs[[text, opaque(e)].join('|')] = e.outerHTML.slice(0, 90);
  }
  return pairs;
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["report", "compare"])
def test_every_text_stands_out(browser, pages, name, dark):
    """By WCAG 2.2's formula of contrast, 4.5 to 1 (success criterion 1.4.3)."""
    browser.open(pages[name], dark=dark)
    pairs = browser.run(CONTRAST)
    assert len(pairs) > 4
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (luminance(ground) < 0.05) == dark
    for pair, where in pairs.items():
        text, behind = (luminance(colour) for colour in pair.split("|"))
        ratio = (max(text, behind) + 0.05) / (min(text, behind) + 0.05)
        assert ratio >= 4.5, (pair, where)


def test_another_script_is_not_run(browser, pages, tmp_path):
    """A page that somebody changed: the policy lets only the script run that the page was written with. The figures stay."""
    changed = tmp_path / "changed.html"
    changed.write_text(pages["report"].read_text().replace('"use strict";', '"use strict"; document.title = "owned";'))
    browser.open(changed)
    assert browser.run("document.title") != "owned"
    assert browser.run("document.querySelectorAll('th button').length") == 0
    assert len(browser.complaints) == 1
    assert "Content Security Policy" in browser.complaints[0]
    assert len(column(browser, MODULES, 0)) == 12


def test_a_window_shows_colours_of_its_charts(browser, pages, tmp_path):
    browser.open(pages["report"])
    browser.box("#timesteps")
    pixels = browser.picture(tmp_path / "shot.png")
    assert pixels.shape == (900, 1200, 3)
    accent, warm = [59, 110, 168], [194, 87, 12]
    for colour in (accent, warm):
        assert (np.abs(pixels - colour).max(axis=-1) <= 2).sum() > 30
