"""Batch, height and width that vary, from `--dynamic` to a plan; and models that fix a size."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import isthmus
from isthmus.exporter.errors import UnsupportedError, UsageError
from isthmus.exporter.spec import MODELS, Dynamic, SizeRange
from isthmus.exporter.trace import trace

OPTIONS = {"compute_capability": ("8.9",)}


class Autoencoder(nn.Module):
    """Halves and doubles pictures of any even size."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.up = nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1)

    def forward(self, x):
        return self.up(nn.functional.silu(self.norm(self.down(x)))) + x


def varying(**axes):
    """Of the input x: `batch`, `height` and `width` as (min, opt, max)."""
    return [Dynamic("x", ("batch", "channels", "height", "width").index(name), SizeRange(*ends)) for name, ends in axes.items()]


def test_a_model_of_the_users(tmp_path):
    torch.manual_seed(0)
    module = Autoencoder().eval()
    dynamic = varying(batch=(1, 2, 4), height=(8, 16, 32), width=(8, 12, 24))
    example = [torch.randn(2, 3, 16, 12)]
    result = isthmus.export(module, "tensorrt-rtx", tmp_path / "out", precision="fp16", inputs=example, dynamic=dynamic, options=OPTIONS)
    assert {stage.name: stage.verdict for stage in result.manifest.stages} == {
        "torch": "verified", "torch-dtype": "verified", "onnx": "verified", "plan": "built", "device": "not run",
    }  # fmt: skip
    profile = {"min": [1, 3, 8, 8], "opt": [2, 3, 16, 12], "max": [4, 3, 32, 24]}
    assert result.manifest.details["build"]["profiles"] == {"x": profile}
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 3, 20, 24)
    with torch.no_grad():
        expected = module(x).numpy()
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, atol=1e-2 * np.ptp(expected))


def test_a_registered_model(tmp_path):
    """SANA has no position table, and with patches of one position no size that others have to divide."""
    dynamic = varying(batch=(1, 2, 4), height=(4, 8, 16), width=(4, 6, 12))
    result = isthmus.export("sana-tiny", "tensorrt-rtx", tmp_path / "out", precision="fp16", dynamic=dynamic, options=OPTIONS)
    assert result.manifest.verdict == "built"
    profiles = result.manifest.details["build"]["profiles"]
    assert profiles["x"] == {"min": [1, 4, 4, 4], "opt": [2, 4, 8, 6], "max": [4, 4, 16, 12]}
    # What has the same size varies with it.
    assert (profiles["t"]["max"], profiles["caption"]["max"]) == ([4], [4, 12, 24])
    onnx = next(stage for stage in result.manifest.stages if stage.name == "onnx")
    assert {(m.case, m.shape) for m in onnx.metrics} >= {("example", (2, 4, 8, 6)), ("resized", (1, 4, 4, 4))}
    assert "--maxShapes=x:4x4x16x12,t:4,caption:4x12x24,mask:4x12" in (tmp_path / "out" / "build.sh").read_text()


@pytest.mark.parametrize("axis", [2, 3])
def test_a_registered_model_that_fixes_a_size_says_what_does(tmp_path, axis):
    with pytest.raises(UsageError) as caught:
        isthmus.export("dit-tiny", "tensorrt-rtx", tmp_path / "out", dynamic=[Dynamic("x", axis, SizeRange(4, 8, 16))])
    assert caught.value.message == (
        f"axis {axis} of x cannot vary in dit-tiny: the position table pos_embed is computed for latents of 8x8; "
        "--set input_size=N computes it for another size"
    )
    assert caught.value.hint == "the axes that can: x:0, t:0, y:0"


def test_patches_fix_a_size():
    assert MODELS["sana-tiny"].spec({"patch_size": 2}).fixed["x"][2].startswith("a size has to stay a multiple of patch_size, 2")


def test_a_model_of_the_users_that_fixes_sizes(tmp_path):
    """4 x 16 has as many positions as 8 x 8, so that the module runs there too, and only the trace tells."""
    spec = MODELS["dit-tiny"].spec()
    example = spec.inputs(np.random.Generator(np.random.PCG64(0)), spec.sizes)
    dynamic = varying(height=(4, 8, 16), width=(4, 8, 16))
    with pytest.raises(UnsupportedError, match="sizes that are to vary are fixed in DiT") as caught:
        isthmus.export(spec.build(), "tensorrt-rtx", tmp_path / "out", inputs=example, dynamic=dynamic)
    first = caught.value.reasons[0]
    assert first.where == "x"
    assert first.what == "it computes only with ((x.shape[3] // 2)*(x.shape[2] // 2)) == 16, as in the example"
    assert "what has 16 entries" in first.fix


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(24))

    def forward(self, x, y):
        return x.flatten(1) + self.table + y[:, None]


def test_sizes_that_have_to_be_equal_or_even_may_vary():
    x, y = torch.randn(2, 4, 6), torch.randn(2)
    ranges = {name: SizeRange(1, 2, 8) for name in ("x_0", "y_0")} | {"x_1": SizeRange(2, 4, 8), "x_2": SizeRange(3, 6, 12)}
    batch = {"x": {0: "x_0"}, "y": {0: "y_0"}}
    program = trace(Table(), {"x": x, "y": y}, dynamic=batch, ranges={name: ranges[name] for name in ("x_0", "y_0")})
    assert program.module()(torch.ones(5, 4, 6), torch.zeros(5)).shape == (5, 24)
    with pytest.raises(UnsupportedError, match=r"it computes only with .*x.shape\[.\].* == 24"):
        trace(Table(), {"x": x, "y": y}, dynamic={"x": {1: "x_1", 2: "x_2"}}, ranges={name: ranges[name] for name in ("x_1", "x_2")})
    even = trace(Autoencoder().eval(), {"x": torch.randn(1, 3, 8, 8)}, dynamic={"x": {2: "h"}}, ranges={"h": SizeRange(4, 8, 15)})
    assert even.module()(torch.ones(1, 3, 10, 8)).shape == (1, 3, 10, 8)
