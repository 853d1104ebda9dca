"""Our MambaVision against the authors' package on equal weights.

The package imports timm and mamba-ssm, of which the first needs torchvision and the second CUDA. What it uses of them is put in their place
while it is imported: registration, initialisation and dropping paths, which do nothing here, an MLP, and the scan, token by token.
"""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights

from .compare import assert_close, draw, fill_zeros


def scan(u, delta, A, B, C, D, z=None, delta_bias=None, delta_softplus=False, return_last_state=None):
    """selective_scan_fn's formula: u, delta (B, d, L), A (d, N), B and C (B, N, L)."""
    assert z is None
    assert delta_softplus
    assert not return_last_state
    delta = F.softplus(delta + delta_bias[:, None])
    h, ys = torch.zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
        ys.append((h * C[:, None, :, t]).sum(-1) + D * u[:, :, t])
    return torch.stack(ys, dim=2)


class Mlp(nn.Module):
    def __init__(self, in_features, hidden_features, act_layer, drop):
        super().__init__()
        assert drop == 0
        self.fc1, self.act, self.fc2 = nn.Linear(in_features, hidden_features), act_layer(), nn.Linear(hidden_features, in_features)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Identity):
    def __init__(self, probability):
        super().__init__()
        assert 0 <= probability < 1


STAND_INS = {
    "timm": {},
    "timm.models": {},
    "timm.models.registry": {"register_model": lambda f: f},
    "timm.models.layers": {"trunc_normal_": nn.init.trunc_normal_, "DropPath": DropPath, "LayerNorm2d": type("LayerNorm2d", (), {})},
    "timm.models._builder": {"resolve_pretrained_cfg": None, "_update_default_kwargs": None},
    "timm.models.vision_transformer": {"Mlp": Mlp, "PatchEmbed": None},
    "mamba_ssm": {},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": scan},
}


@pytest.fixture(scope="module")
def theirs():
    """The package's MambaVision."""
    before = dict(sys.modules)
    try:
        for name, contents in STAND_INS.items():
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(contents)
        from mambavision.models.mamba_vision import MambaVision
    finally:
        for name in [name for name in sys.modules if name not in before]:
            del sys.modules[name]
        sys.modules.update(before)
    return MambaVision


def build(theirs, config, seed):
    torch.manual_seed(seed)
    module = theirs(
        dim=config.hidden_size,
        in_dim=config.stem_size,
        depths=list(config.depths),
        window_size=list(config.windows),
        mlp_ratio=config.mlp_ratio,
        num_heads=list(config.num_heads),
        in_chans=config.in_channels,
        num_classes=config.num_classes,
        layer_scale=0.5 if config.layer_scale else None,
    )
    with torch.no_grad():
        for name, parameter in fill_zeros(module, seed).named_parameters():
            # Their 0.02 in the linear layers would leave the mixers silent.
            parameter.add_((0.3 if name.endswith(("gamma_1", "gamma_2")) else 0.1) * torch.randn_like(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return module


SETTINGS = [
    {"state_size": 8},
    {"state_size": 8, "layer_scale": True, "depths": (2, 1, 3, 3), "windows": (8, 8, 3, 1), "mlp_ratio": 3},  # padding, many windows
    {"state_size": 8, "image_size": 96, "hidden_size": 12, "windows": (8, 8, 2, 4), "num_heads": (1, 1, 3, 8)},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_their_weights_in_ours(theirs, settings, prefix, tmp_path):
    entry = MODELS["mambavision-tiny"]
    spec, config = entry.spec(settings), dataclasses.replace(entry.config, **settings)
    reference = build(theirs, config, seed=3)
    save_file({prefix + key: value for key, value in reference.state_dict().items()}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        ours = spec.build()
    info = load_weights(ours, tmp_path / "model.safetensors", spec.layouts)
    assert info.layout == ("nvidia/MambaVision" if prefix else "isthmus")
    for seed, batch in ((0, 2), (1, 3)):
        inputs = draw(spec, seed, batch=batch)
        with torch.no_grad():
            assert_close(ours(**inputs), reference(inputs["x"]))
