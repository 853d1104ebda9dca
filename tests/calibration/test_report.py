"""The report: what it says, that it says nothing false, and that it fetches nothing."""

import base64
import hashlib
import html
import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from isthmus.calibration import perceptual
from isthmus.calibration.figures import SIDE, amplification, to_pixels, write_png
from isthmus.calibration.metrics import compare
from isthmus.calibration.perceptual import lpips_style
from isthmus.calibration.report import MAX_PICTURES, Pictures, Report, render
from isthmus.calibration.similarity import ssim
from isthmus.calibration.wording import (
    at_least_decibel,
    cell,
    change,
    cosine,
    flat,
    headline,
    number,
    ratio,
    share,
    similarity,
    size,
    sort_key,
)
from isthmus.exporter.bundle import write_manifest
from isthmus.exporter.errors import IntegrityError
from isthmus.exporter.manifest import Column, StageResult, Table, TensorInfo, WeightsInfo
from isthmus.exporter.spec import Samples, Tolerance


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


samples = _load("report_samples")
HOSTILE = samples.HOSTILE
digits = samples.digits
manifest = samples.manifest
parsed = samples.parsed
rows = samples.rows
stages = samples.stages
words = samples.words
written = samples.written


def test_report_json_holds_what_the_page_shows(tmp_path):
    written(
        tmp_path, manifest(stages=stages(1e-3, "failed"), verdict="failed"), pictures=digits(3), facts={"notes": ["Fused."], "cpu": "x"}
    )

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    value = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert value["verdict"] == "failed"
    assert value["model"] == "dit-digits"
    assert value["stages"][1]["metrics"][2]["shape"] == [5, 1, 8, 8]
    assert len(value["stages"][1]["metrics"][0]["histogram"]) == len(value["histogram_edges"]) + 1
    assert value["stages"][0]["metrics"][0]["psnr_db"] == "inf"
    assert [m["case"] for m in value["missed"]] == ["example", "second", "resized"]
    assert value["missed"][0]["metric"] == "max_relative"
    assert value["pictures"]["count"] == 3
    assert value["pictures"]["metrics"]["psnr_db"] > 70
    assert value["notes"] == ["Fused."]
    assert value["facts"] == {"cpu": "x"}
    assert value["file_sizes"] == {"model.onnx": 2_500_000}
    assert value["weights"]["parameters"] == 683_024
    assert "files" not in value, "hashes are the manifest's"
    Report.model_validate(value)


@pytest.mark.parametrize("pictures", [None, digits(3)], ids=["plain", "pictures"])
def test_render_makes_the_same_page_and_leaves_the_bundle_alone(tmp_path, pictures):
    page = written(tmp_path, pictures=pictures, facts={"warnings": ["Careful."], "when": (1, 2.5)})
    write_manifest(tmp_path, manifest())
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert render(tmp_path) == page
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_render_follows_the_manifest(tmp_path):
    written(tmp_path, pictures=digits(2))
    write_manifest(tmp_path, manifest(stages=stages(1e-3, "failed"), verdict="failed"))
    page = render(tmp_path)
    assert "not close enough to PyTorch" in words(page)
    assert page.count("<img") == 6


def test_same_report_same_bytes(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        written(tmp_path / name, pictures=digits(3))
    files = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()} for n in "ab"]
    assert files[0] == files[1]
    assert len(files[0]) == 3 + 9


def test_the_page_fetches_nothing(tmp_path):
    page = written(tmp_path, pictures=digits(3))
    (code,) = re.findall(r"(?s)<script>(.*?)</script>", page)
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    expected = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    assert html.unescape(policy) == expected, "the page's own script, and no other"
    assert re.findall(r"(?i)\bfetch\(|XMLHttpRequest|import\(|innerHTML|eval\(", code) == []
    page = page.replace(code, "")
    assert page.lower().count("<script") == 1
    assert re.findall(r"(?i)<(?:link|iframe|object|embed|base|form|a)\b", page) == []
    assert re.findall(r"(?i)\burl\(|@import|srcset|\bon[a-z]+=|javascript:", page) == []
    assert {source.split(",")[0] for source in re.findall(r'\bsrc="([^"]*)"', page)} == {"data:image/png;base64"}
    assert "http:" not in page
    assert "https:" not in page


def test_hostile_names_stay_text(tmp_path):
    tensor = TensorInfo(name=HOSTILE, dtype=HOSTILE, shape=(HOSTILE, 2))
    metrics = tuple(m.model_copy(update={"case": HOSTILE, "output": HOSTILE}) for m in rows(1e-3))
    broken = metrics[0].model_copy(update={"problem": HOSTILE})
    hostile = manifest(
        model=HOSTILE,
        target=HOSTILE,
        precision=HOSTILE,
        device=HOSTILE,
        config={HOSTILE: HOSTILE},
        options={HOSTILE: {HOSTILE: [HOSTILE]}},
        inputs=(tensor,),
        outputs=(tensor,),
        sizes={HOSTILE: (1, 2, 3)},
        weights=WeightsInfo(origin="file", path=HOSTILE, layout=HOSTILE, sha256=HOSTILE, missing=(HOSTILE,), unexpected=(HOSTILE,)),
        stages=(StageResult(name=HOSTILE, verdict="failed", reason=HOSTILE, metrics=(*metrics, broken), device=HOSTILE),),
        verdict="failed",
        versions={HOSTILE: HOSTILE},
        details={HOSTILE: HOSTILE},
    )
    pictures = digits(1)
    captions = (HOSTILE,)
    pictures = Pictures(Samples(pictures.reference.images, captions), Samples(pictures.candidate.images, captions))
    page = written(tmp_path, hostile, pictures=pictures, facts={"warnings": [HOSTILE], "notes": [HOSTILE], HOSTILE: HOSTILE})
    assert page.lower().count("<script") == 1, "the page's own"
    assert page.count("<img") == 3
    assert "&lt;script&gt;" in page
    assert "{{ 7*7 }}" in page, "names are not templates"
    assert {name for _, names in parsed(page) for name in names if name.startswith("on")} == set()
    write_manifest(tmp_path, hostile)
    assert render(tmp_path) == page


@pytest.mark.parametrize(
    ("origin", "sentence"),
    [
        ("random", "Random weights (seed 7). The figures show whether the graph was carried across. They say little"),
        ("shipped", "Trained weights that ship with isthmus"),
        ("file", "Weights from a file , w.safetensors , in the diffusers layout"),
        ("module", "Whether they are trained is not known here"),
    ],
)
def test_weights_origin_in_plain_words(tmp_path, origin, sentence):
    weights = WeightsInfo(origin=origin, path="" if origin in ("random", "module") else "w.safetensors", layout="diffusers", seed=7)
    assert sentence in words(written(tmp_path, manifest(weights=weights)))


def test_headline_of_a_verified_bundle():
    made = manifest()
    worst = max(m.max_relative for m in made.stages[1].metrics)
    text = headline(made)
    match = re.fullmatch(
        r"Executed here on CPUExecutionProvider: at most (\S+) of the output's range away from PyTorch, over 3 inputs at 2 sizes\.", text
    )
    assert match, text
    assert worst <= float(match[1]) < worst * 1.1, "rounded upwards, and not by much"


def test_headline_never_claims_what_was_not_run():
    torch = stages()[:1]
    unrun = StageResult(name="device", verdict="not run", reason="no H100 here")
    assert "nothing is claimed" in headline(manifest(stages=(*torch, unrun)))
    assert "nothing is claimed" in headline(manifest(stages=(), verdict="not run"))
    plan = StageResult(name="plan", verdict="built", reason="not executed: no H100 here")
    text = headline(manifest(stages=(*torch, plan), verdict="built", device="NVIDIA H100"))
    assert text == "Not executed on NVIDIA H100: it was compiled here by the vendor's tools, and nothing more."
    text = headline(manifest(stages=(*stages(), plan.model_copy(update={"verdict": "lowered"})), verdict="lowered", device="NVIDIA H100"))
    assert text.startswith(
        "Not executed on NVIDIA H100: it was checked statically; its onnx form, executed on CPUExecutionProvider, is at most"
    )
    blocked = StageResult(name="onnx", verdict="blocked", reason="the session refused node 3.")
    assert headline(manifest(stages=(*torch, blocked), verdict="blocked")).endswith(
        "nothing is claimed about it: the session refused node 3."
    )


def test_headline_of_failures():
    text = headline(manifest(stages=stages(1e-3, "failed"), verdict="failed"))
    assert text.startswith("Executed here on CPUExecutionProvider, and not close enough to PyTorch: max |error| / range is")
    assert text.endswith("expected at most 1e-05 (stage onnx, case example, output noise), and 2 more.") or "and 2 more." in text
    broken = StageResult(name="onnx", verdict="failed", metrics=rows(0, problem=True), device="CPU")
    text = headline(manifest(stages=(broken,), verdict="failed"))
    assert "artifact has 1 NaN of 128 values (the first at [0, 0, 1, 2]) (stage onnx, case second, output noise)." in text


def test_headline_of_equal_and_of_constant_outputs():
    assert "no difference from PyTorch, over 3 inputs at 2 sizes" in headline(manifest(stages=stages(0)))
    constant = compare(np.full(3, 2.0), np.full(3, 2.00123), case="example", output="y")
    stage = StageResult(name="onnx", verdict="verified", metrics=(constant,), device="CPU")
    assert (
        headline(manifest(stages=(stage,)))
        == "Executed here on CPU: at most 0.0013 away from PyTorch in absolute value, over 1 input at 1 size."
    )


def test_each_row_is_held_to_the_bounds_of_its_stage(tmp_path):
    """Pictures and PyTorch's own stages have bounds of their own; only what misses them is marked."""
    pictures = digits(4, error=1e-3)
    samples = compare(pictures.reference.images, pictures.candidate.images, case="samples", output="images")
    torch, onnx = stages()
    onnx = onnx.model_copy(update={"metrics": (*onnx.metrics, samples), "sample_tolerance": {"min_psnr": 40.0}})
    written(tmp_path, manifest(stages=(torch, onnx)), pictures=pictures)
    assert json.loads((tmp_path / "report.json").read_text())["missed"] == []
    written(tmp_path, manifest(stages=(torch, onnx.model_copy(update={"sample_tolerance": {"min_psnr": 90.0}}))), pictures=pictures)
    (missed,) = json.loads((tmp_path / "report.json").read_text())["missed"]
    assert (missed["case"], missed["metric"]) == ("samples", "psnr_db")
    strict = torch.model_copy(update={"metrics": rows(1e-4)})
    written(tmp_path, manifest(stages=(strict, onnx), tolerance={"min_psnr": 10.0}), pictures=pictures)
    assert {m["stage"] for m in json.loads((tmp_path / "report.json").read_text())["missed"]} == {"torch"}


def test_elementwise_bounds_are_shown(tmp_path):
    tolerance = Tolerance(atol=1e-5, rtol=1e-3)
    stage = StageResult(name="onnx", verdict="failed", metrics=rows(1e-2, tolerance=tolerance), device="CPU")
    page = written(tmp_path, manifest(stages=(stage,), verdict="failed", tolerance={"atol": 1e-5, "rtol": 1e-3}))
    assert page.count('class="n miss"') == 3
    assert "|error| ≤ 1e-5 + 0.001 · |reference|" in words(page)


def test_pictures_are_checked():
    reference, candidate = digits(3).reference, digits(2).reference
    with pytest.raises(ValueError, match="equal shapes"):
        Pictures(reference, candidate)
    with pytest.raises(ValueError, match="captions"):
        Pictures(reference, Samples(reference.images, ("a", "b", "c")))
    with pytest.raises(ValueError, match="captions"):
        Pictures(*[Samples(reference.images, ("a",))] * 2)


def test_many_pictures_are_cut_and_measured_all(tmp_path):
    page = written(tmp_path, pictures=digits(MAX_PICTURES + 9))
    assert page.count("<img") == 3 * MAX_PICTURES
    assert f"The first {MAX_PICTURES} of {MAX_PICTURES + 9} samples are shown" in words(page)


def test_psnr_of_pictures_is_the_formula(tmp_path):
    pictures = digits(5, error=0.01)
    page = written(tmp_path, pictures=pictures)
    r, c = pictures.reference.images.astype(np.float64), pictures.candidate.images.astype(np.float64)
    psnr = 20 * math.log10((r.max() - r.min()) / math.sqrt(((r - c) ** 2).mean()))
    assert f"PSNR of {math.floor(psnr * 10) / 10:.1f} dB" in words(page)


def test_each_picture_has_its_psnr_and_ssim(tmp_path):
    pictures = digits(5, error=0.01)
    page = written(tmp_path, pictures=pictures)
    grid = json.loads((tmp_path / "report.json").read_text())["pictures"]
    r, c = pictures.reference.images.astype(np.float64), pictures.candidate.images.astype(np.float64)
    for i, row in enumerate(grid["rows"]):
        assert row["psnr_db"] == pytest.approx(-10 * math.log10(((r[i] - c[i]) ** 2).mean()))
        assert row["ssim"] == ssim(r[i], c[i])
    found = [ssim(x, y) for x, y in zip(r, c, strict=True)]
    assert (grid["ssim"], grid["worst_ssim"]) == (pytest.approx(np.mean(found)), min(found))
    assert f"a mean SSIM of {np.mean(found):.4f} ( {min(found):.4f} at the least)".replace("( ", "(") in words(page).replace("( ", "(")


def test_each_picture_has_its_lpips_style_distance(tmp_path):
    pictures = digits(5, error=0.05)
    page = written(tmp_path, pictures=pictures)
    grid = json.loads((tmp_path / "report.json").read_text())["pictures"]
    found = lpips_style(pictures.reference.images, pictures.candidate.images)
    assert [row["lpips_style"] for row in grid["rows"]] == found
    assert (grid["lpips_style"], grid["worst_lpips_style"]) == (pytest.approx(np.mean(found)), max(found))
    text = words(page)
    assert f"mean LPIPS-style distance is {number(np.mean(found))} ({number(max(found))} at the most)" in text
    assert "EfficientNet-Lite0 features, no learned heads" in text
    assert "not comparable with published figures of LPIPS. The difference" in text
    assert all(f"<td>{number(distance)}</td>" in page for distance in found)
    # Broken pictures have none, and say so.
    pictures.candidate.images[1, 2, 3] = np.nan
    assert "<td>–</td>" in written(tmp_path, pictures=pictures)
    assert json.loads((tmp_path / "report.json").read_text())["pictures"]["rows"][1]["lpips_style"] == "nan"


def test_without_the_weights_the_page_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual, "PACKAGE", "isthmus-no-such-package")
    perceptual.network.cache_clear()
    try:
        page = written(tmp_path, pictures=digits(MAX_PICTURES + 1))
    finally:
        perceptual.network.cache_clear()
    grid = json.loads((tmp_path / "report.json").read_text())["pictures"]
    assert (grid["lpips_style"], grid["worst_lpips_style"], grid["rows"][0]["lpips_style"]) == (None, None, None)
    assert "all are in the PSNR. No LPIPS-style distance: the package isthmus-no-such-package is not installed" in words(page)
    assert "pip install" in words(page)
    assert "isthmus[perceptual]" in words(page)
    assert "SSIM" in words(page)


def test_a_report_of_before_similarity_is_read(tmp_path):
    written(tmp_path, pictures=digits(1))
    write_manifest(tmp_path, manifest())
    value = json.loads((tmp_path / "report.json").read_text())
    for part in (value["pictures"], *value["pictures"]["rows"]):
        for name in ("ssim", "worst_ssim", "psnr_db", "lpips_style", "worst_lpips_style", "lpips_style_missing"):
            part.pop(name, None)
    (tmp_path / "report.json").write_text(json.dumps(value))
    assert "SSIM" not in words(render(tmp_path))
    assert "LPIPS" not in words(render(tmp_path))


@pytest.mark.parametrize("colour", [False, True], ids=["grey", "rgb"])
def test_stored_pictures_are_the_samples(tmp_path, colour):
    pictures = digits(1, error=0.01, colour=colour)
    written(tmp_path, pictures=pictures)
    factor = json.loads((tmp_path / "report.json").read_text())["pictures"]["amplification"]
    reference, candidate = pictures.reference.images[0], pictures.candidate.images[0]
    for name, image in (
        ("pytorch", reference),
        ("artifact", candidate),
        ("difference", np.abs(candidate.astype(float) - reference) * factor),
    ):
        stored = imread(tmp_path / f"report/00-{name}.png")[..., :3]
        assert stored.shape == (96, 96, 3)
        expected = image if colour else image[..., None].repeat(3, axis=-1)
        assert np.abs(stored[6::12, 6::12] - expected).max() <= 0.5 / 255 + 1e-6
        assert (stored == stored[6::12, 6::12].repeat(12, 0).repeat(12, 1)).all(), "enlarged by whole pixels"


@pytest.mark.parametrize("largest", [1e-9, 3.3e-5, 0.0021, 0.1, 0.2, 0.5, 0.7])
def test_amplification_makes_the_largest_difference_just_visible(largest):
    factor = amplification(np.array([0, -largest, largest / 3]))
    assert 0.39 < factor * largest <= 1.0000001
    assert f"{factor:.0e}"[0] in "125"


def test_amplification_of_nothing_and_of_too_much():
    assert amplification(np.zeros(3)) == amplification(np.array([1.0])) == amplification(np.array([3.0])) == amplification(np.zeros(0)) == 1
    assert amplification(np.array([np.nan, np.inf, 0.01])) == amplification(np.array([0.01]))


def test_pixels_that_are_not_numbers_are_magenta(tmp_path):
    image = np.array([[0.0, np.nan], [2.0, -np.inf]], np.float32)
    pixels = to_pixels(image)[:: SIDE // 2, :: SIDE // 2]
    assert pixels.tolist() == [[[0, 0, 0], [255, 0, 255]], [[255, 255, 255], [255, 0, 255]]]
    pictures = Pictures(Samples(np.zeros((1, 2, 2), np.float32), ("a",)), Samples(image[None], ("a",)))
    assert "artifact has 1 NaN of 4 values" in words(written(tmp_path, pictures=pictures))


def test_large_pictures_keep_their_size(tmp_path):
    write_png(tmp_path / "deep/a.png", np.zeros((128, 200)))
    assert imread(tmp_path / "deep/a.png").shape[:2] == (128, 200)


def damaged(name, change):
    def damage(folder):
        path = folder / name
        change(path)

    return damage


@pytest.mark.parametrize(
    ("damage", "words_"),
    [
        (damaged("report.json", lambda p: p.unlink()), "holds no report.json"),
        (damaged("report.json", lambda p: p.write_text("{")), "is not a report"),
        (damaged("report.json", lambda p: p.write_text(p.read_text().replace("report/00-pytorch.png", "../secret.png"))), "pattern"),
        (
            damaged("report.json", lambda p: p.write_text(p.read_text().replace("report/00-pytorch.png", "report/00-pytorch.png\\n"))),
            "pattern",
        ),
        (damaged("report/00-pytorch.png", lambda p: p.unlink()), "00-pytorch.png is missing"),
        (damaged("report/00-pytorch.png", lambda p: p.write_text("GIF89a")), "not a PNG"),
        (damaged("report/00-pytorch.png", lambda p: (p.unlink(), p.symlink_to("/etc/hostname"))), "00-pytorch.png is missing"),
    ],
    ids=["no json", "bad json", "path", "newline", "no picture", "no png", "link"],
)
def test_a_damaged_bundle_is_named(tmp_path, damage, words_):
    written(tmp_path, pictures=digits(1))
    write_manifest(tmp_path, manifest())
    damage(tmp_path)
    with pytest.raises(IntegrityError, match=re.escape(words_)):
        render(tmp_path)


def test_facts_of_any_type_are_shown(tmp_path):
    page = written(
        tmp_path, facts={"path": tmp_path, "peak": np.float32(1.5), "count": np.int64(3), "empty": (), "nested": {"a": {"b": True}}}
    )
    assert "nested.a.b yes" in words(page)
    assert str(tmp_path) in page


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (1, "1"), (10, "10"), (0.5, "0.5"), (0.021349, "0.0213"), (1234.5, "1234"), (3.14159, "3.14"), (1e-5, "1e-5"),
        (1.2345e-7, "1.23e-7"), (9.999e-4, "1e-3"), (0.0009996, "1e-3"), (123456, "1.23e5"), (-2.5, "-2.5"),
        (math.inf, "∞"), (-math.inf, "−∞"), (math.nan, "–"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_other_figures():
    assert cosine(1.0) == "1"
    assert cosine(1 - 3.1e-9) == "1 − 3.1e-9"
    assert cosine(0.5) == "0.5"
    assert [similarity(v) for v in (1.0, 1 - 6e-15, 1 - 8.07e-5, 1 - 4e-5, 0.98765, math.nan)] == [
        "1", "1", "0.9999", "1 − 4e-5", "0.9877", "–",
    ]  # fmt: skip
    assert [ratio(v) for v in (0.0, 4.6e-5, 0.1234, 1.0)] == ["0", "0.0046 %", "12 %", "100 %"]
    assert [change(v) for v in (None, 1.26, -89.4, 0.0, -math.inf, math.nan)] == ["–", "+1.3", "−89.4", "+0.0", "−∞", "–"]
    assert [sort_key(v) for v in (None, math.nan, math.inf, -math.inf, 0.5, 3)] == ["", "", "Infinity", "-Infinity", "0.5", "3"]
    assert at_least_decibel(59.96) == "59.9 dB"
    assert [size(n) for n in (0, 1023, 1536, 2_732_096, 3 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "2.61 MiB", "3 GiB"]
    assert [share(n, 1000) for n in (0, 1, 500, 999, 1000)] == ["0", "<1 %", "50 %", ">99 %", "100 %"]
    assert flat({"a": {"b": [1, 2.5], "c": {}}, "d": None}) == [("a.b", "1, 2.5"), ("a.c", "none"), ("d", "none")]


COVERAGE = Table(
    name="fp8-coverage",
    title="FP8 coverage",
    lead="Nearly all.",
    columns=(
        Column(name="Module", kind="code"),
        Column(name="FLOPs", kind="count"),
        Column(name="Share", kind="share"),
        Column(name="Why"),
    ),
    rows=(("blocks.0.attn", 1_500_000, 0.5, HOSTILE), ("head", 0, None, "a first layer")),
)


def test_tables_of_the_target_are_shown_and_survive_a_second_rendering(tmp_path):
    page = written(tmp_path, manifest(), facts={"tables": (COVERAGE,)})
    assert HOSTILE not in page
    text = words(page)
    assert "FP8 coverage Nearly all. Module FLOPs Share Why blocks.0.attn 1 500 000 50 %" in text
    assert text[text.index("head 0") :].startswith("head 0 – a first layer")
    assert Report.model_validate_json((tmp_path / "report.json").read_bytes()).tables == (COVERAGE,)
    write_manifest(tmp_path, manifest())
    assert render(tmp_path) == page


def test_a_table_has_rows_as_long_as_its_columns():
    with pytest.raises(ValueError, match="another length"):
        Table(name="t", title="T", columns=(Column(name="a"),), rows=(("x", 1),))
    with pytest.raises(ValueError, match="pattern"):
        Table(name="a b", title="T", columns=(), rows=())


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (None, "count", "–"), ("x", "code", "x"), (0.0213, "number", "0.0213"), (2048, "size", "2 KiB"),
        (41.26, "decibel", "41.3"), (0.9999, "share", ">99 %"),
    ],
)  # fmt: skip
def test_cells_are_written_by_the_kind_of_their_column(value, kind, text):
    assert cell(value, kind) == text
