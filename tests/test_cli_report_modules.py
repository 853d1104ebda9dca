"""`isthmus report BUNDLE --modules`: the modules come into the bundle and its page, and the bundle stays whole."""

import json

import pytest

pytestmark = pytest.mark.xdist_group("tests/test_cli.py")  # which makes the same bundle


def test_the_modules_come_into_the_report(run, bundle):
    assert "--modules" in (bundle / "report.html").read_text(), "a report without modules says how to have them"
    result = run("report", bundle, "--modules", "--format", "json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"report": str(bundle / "report.html")}
    found = json.loads((bundle / "diff.json").read_text())
    (stage,) = found["stages"]
    assert stage["name"] == "onnx"
    modules = {row["module"]: row for row in stage["modules"]}
    assert modules[""]["total"]["relative_l2"] < 1e-5
    assert "blocks.0.attn.qkv" in modules
    assert "draws no pictures" in found["no_timesteps"], "dit-tiny has random weights"
    page = (bundle / "report.html").read_text()
    assert "Where accuracy was lost" in page
    assert "blocks.0.attn.qkv" in page
    assert run("verify", bundle).exit_code == 0, "the manifest has the new hashes"
    before = (bundle / "report.html").read_bytes()
    assert run("report", bundle).exit_code == 0
    assert (bundle / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--weights", "x"), "--weights is for --modules"),
        (("--model", "a:b"), "--model is for --modules"),
        (("--trust",), "--trust is for --modules"),
        (("--tune", "/nowhere/none.json"), "there is no file /nowhere/none.json\nhint: give the NAME.pareto.json"),
        (("BUNDLE", "--compare", "--modules"), "--compare reads two reports"),
    ],
)
def test_a_wrong_call_ends_with_2(run, made, arguments, words):
    result = run("report", made, *(made if a == "BUNDLE" else a for a in arguments))
    assert result.exit_code == 2
    assert words in result.stderr
