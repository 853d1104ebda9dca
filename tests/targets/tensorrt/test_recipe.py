"""Options, profiles, the recipe in the manifest, and the command line of NVIDIA's tools."""

import re
import shlex
import subprocess

import pytest
from pydantic import ValidationError

from isthmus.exporter.errors import IntegrityError
from isthmus.exporter.spec import SizeRange
from isthmus.targets.tensorrt.command import command, script
from isthmus.targets.tensorrt.options import DatacenterOptions, RTXOptions
from isthmus.targets.tensorrt.recipe import PluginLibrary, Profile, Recipe, profiles_of, recipe_of

SIZES = {"b": SizeRange(1, 2, 4), "h": SizeRange(8, 16, 32), "w": SizeRange(4, 8, 64)}


class TestOptions:
    def test_defaults(self):
        options = RTXOptions()
        assert options.compute_capability == ("8.9", "12.0")
        assert DatacenterOptions().timing_cache == ""

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"compute_capability": ("9.0",)}, "does not know 9.0, expected some of 7.5, .* an H100 .* --target tensorrt"),
            ({"compute_capability": ("8.9", "8.9")}, "given twice"),
            ({"compute_capability": ()}, "at least 1"),
            ({"workspace": -1}, "greater than or equal to 0"),
            ({"build_timeout": 0}, "greater than or equal to 1"),
            ({"fp8_exclude": ("",)}, "a pattern is empty"),
            ({"ssm_op": "onnx27"}, "plugin"),
            ({"timing_cache": "x"}, "Extra inputs"),
        ],
    )
    def test_what_is_refused(self, values, message):
        with pytest.raises(ValidationError, match=message):
            RTXOptions.model_validate(values)

    def test_texts_of_the_command_line(self):
        values = {"compute_capability": ["8.9", "12.1"], "workspace": "512", "fp8_include": ["blocks.*"], "build_timeout": "60"}
        options = RTXOptions.model_validate(values)
        assert (options.compute_capability, options.workspace, options.build_timeout) == (("8.9", "12.1"), 512, 60)


class TestProfiles:
    def test_names_constants_and_expressions(self):
        profiles, reasons = profiles_of([("x", ["b", 4, "2*h", "(w + h)//4", "min(h, w)"]), ("t", ["b"]), ("c", [3, 4])], SIZES)
        assert not reasons
        assert profiles == {
            "x": Profile(min=(1, 4, 16, 3, 4), opt=(2, 4, 32, 6, 8), max=(4, 4, 64, 24, 32)),
            "t": Profile(min=(1,), opt=(2,), max=(4,)),
        }

    @pytest.mark.parametrize(
        ("size", "reason"),
        [
            ("s77", "s77 has no range"),
            (None, "the size has no name"),
            ("h - w", "does not grow with h, w"),
            ("40 - h", "does not grow with h"),
            ("h % 3", "does not grow with h"),
            ("(h - 20)*(h - 20)", "does not grow with h"),
            ("h - 8", "from at least 1"),
            ("h**2", r"h \*\* 2 is not allowed"),
        ],
    )
    def test_every_size_that_no_profile_expresses_is_named(self, size, reason):
        profiles, reasons = profiles_of([("x", ["b", size]), ("y", ["b"])], SIZES)
        assert set(profiles) == {"y"}
        assert [r.where for r in reasons] == ["x"]
        assert re.search(reason, str(reasons[0]))
        assert reasons[0].fix

    def test_an_expression_is_right_at_every_size_in_between(self):
        (profile,), _ = (list(p.values()) if isinstance(p, dict) else p for p in profiles_of([("x", ["h*w//2 + b"])], SIZES))
        values = [h * w // 2 + b for h in range(8, 33) for w in range(4, 65) for b in range(1, 5)]
        assert (profile.min[0], profile.max[0]) == (min(values), max(values))


RECIPE = Recipe(
    library="tensorrt",
    engine="engine.plan",
    profiles={"x": Profile(min=(1, 4), opt=(2, 4), max=(8, 4)), "t": Profile(min=(1,), opt=(2,), max=(8,))},
    workspace=512,
    plugins=(PluginLibrary(path="plugins/libisthmus_trt.so", sha256="ab", operators=("rwkv7",), architectures=("sm_90a",)),),
    plugin_override=True,
    compute_capabilities=("9.0",),
)


class TestCommand:
    def test_trtexec(self):
        assert command(RECIPE) == [
            "trtexec", "--onnx=model.onnx", "--saveEngine=engine.plan", "--skipInference", "--dynamicPlugins=plugins/libisthmus_trt.so",
            "--enablePluginOverride", "--minShapes=x:1x4,t:1", "--optShapes=x:2x4,t:2", "--maxShapes=x:8x4,t:8",
            "--memPoolSize=workspace:512M", "--profilingVerbosity=detailed", "--timingCacheFile=timing.cache",
            "--exportLayerInfo=layers.json",
        ]  # fmt: skip

    def test_tensorrt_rtx(self):
        changes = {"library": "tensorrt-rtx", "engine": "engine.rtx.plan", "compute_capabilities": ("8.9", "12.0"), "workspace": 0}
        tool, *arguments = command(RECIPE.model_copy(update=changes))
        assert tool == "tensorrt_rtx"
        assert arguments[-2:] == ["--setPluginsToSerialize=plugins/libisthmus_trt.so", "--computeCapabilities=89,120"]
        assert not [a for a in arguments if a.startswith(("--timingCacheFile", "--memPoolSize"))]

    def test_the_script_runs_in_the_bundle_with_names_that_a_shell_would_take_apart(self, tmp_path, monkeypatch):
        profile = RECIPE.profiles["x"]
        (tmp_path / "bin").mkdir()
        tool = tmp_path / "bin" / "trtexec"
        tool.write_text('#!/bin/sh\npwd; printf "%s\\n" "$@"\n')
        tool.chmod(0o755)
        folder = tmp_path / "a bundle"
        folder.mkdir()
        odd = RECIPE.model_copy(update={"profiles": {"x; $(exit 3) 'y": profile}})
        (folder / "build.sh").write_text(script(odd))
        monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
        done = subprocess.run(["/bin/sh", str(folder / "build.sh")], capture_output=True, text=True, check=True, timeout=30)
        where, *arguments = done.stdout.splitlines()
        assert where == str(folder)
        assert arguments == command(odd)[1:]

    def test_a_plugin_that_is_to_be_made_is_said(self):
        plugin = RECIPE.plugins[0].model_copy(update={"sha256": ""})
        text = script(RECIPE.model_copy(update={"plugins": (plugin,)}))
        line = next(line for line in text.splitlines() if "isthmus.exporter.ops.plugin" in line)
        assert shlex.split(line.lstrip("# "))[1:] == ["-m", "isthmus.exporter.ops.plugin", "--operator=rwkv7", "--arch=sm_90a"]


class TestManifest:
    def test_round_trip(self, make):
        made = make("tensorrt-rtx", options={"workspace": 64})
        recipe = recipe_of(made.manifest, "tensorrt-rtx")
        assert recipe.profiles == {"x": Profile(min=(1, 4, 32), opt=(2, 4, 32), max=(8, 4, 32))}
        assert (recipe.workspace, recipe.engine, recipe.plugins) == (64, "engine.rtx.plan", ())
        assert recipe.model_dump(mode="json") == made.manifest.details["build"]

    def test_a_recipe_for_the_other_library_is_refused(self, make):
        made = make("tensorrt-rtx")
        with pytest.raises(IntegrityError, match="for tensorrt-rtx and its recipe for tensorrt-rtx, expected tensorrt"):
            recipe_of(made.manifest, "tensorrt")
        renamed = made.manifest.model_copy(update={"target": "tensorrt"})
        with pytest.raises(IntegrityError, match="for tensorrt and its recipe for tensorrt-rtx, expected tensorrt"):
            recipe_of(renamed, "tensorrt")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"engine": "../engine.plan"}, "leads out of the bundle"),
            ({"model": "/etc/passwd"}, "leads out of the bundle"),
            ({"workspace": -1}, "holds no recipe for an engine: workspace"),
            ({"colour": "red"}, "colour"),
        ],
    )
    def test_a_changed_recipe_is_refused(self, make, change, message):
        made = make("tensorrt")
        changed = made.with_details(build={**made.manifest.details["build"], **change})
        with pytest.raises(IntegrityError, match=message):
            recipe_of(changed.manifest, "tensorrt")

    def test_a_manifest_without_one(self, make):
        with pytest.raises(IntegrityError, match="the bundle holds no recipe"):
            recipe_of(make("tensorrt").with_details(build=None).manifest, "tensorrt")
