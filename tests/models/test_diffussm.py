"""DiffuSSM against fp64 formulas written token by token, and its graph in ONNX Runtime."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from isthmus.exporter.onnx import to_onnx
from isthmus.exporter.passes import optimise
from isthmus.exporter.spec import MODELS
from isthmus.exporter.trace import trace
from isthmus.exporter.weights import random_weights
from isthmus.models.diffussm import DiffuSSMConfig
from isthmus.targets.onnxruntime.ssm_op import write_ssm_op

TINY = MODELS["diffussm-tiny"]


@pytest.fixture(autouse=True)
def _one_thread():
    # Tensors this small take many times longer on two threads of a busy machine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(spec, seed=0, **sizes):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})


def scan_fp64(u, delta, A, B, C, D):
    """The recurrence, one token after the other, for arrays (L, d), (L, d), (d, N), (L, N), (L, N), (d,) in float64."""
    h, y = np.zeros_like(A), np.empty_like(u)
    for i in range(len(u)):
        h = np.exp(delta[i][:, None] * A) * h + (delta[i] * u[i])[:, None] * B[i][None]
        y[i] = h @ C[i] + D * u[i]
    return y


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def silu(x):
    return x / (1 + np.exp(-x))


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def mamba_core_fp64(config, state, name, x):
    """Mamba-1 without its outer projections and gate, on tokens (L, d)."""
    kernel, taps = state[f"{name}.conv1d.weight"], config.conv_size
    convolved = np.zeros_like(x)
    for i in range(len(x)):
        for tap in range(taps):
            if i - tap >= 0:
                convolved[i] += kernel[:, 0, taps - 1 - tap] * x[i - tap]
    u = silu(convolved + state[f"{name}.conv1d.bias"])
    rank = state[f"{name}.dt_proj.weight"].shape[1]
    projected = linear(state, f"{name}.x_proj", u)
    dt, B, C = np.split(projected, [rank, rank + config.state_size], axis=1)
    delta = np.log1p(np.exp(linear(state, f"{name}.dt_proj", dt)))
    return scan_fp64(u, delta, -np.exp(state[f"{name}.A_log"]), B, C, state[f"{name}.D"])


def diffussm_fp64(config: DiffuSSMConfig, state, x, t, y):
    """The module's formulas for one picture, position by position, in float64."""
    m, inner = config.hourglass, config.expand * config.hidden_size
    angles = t * 10000.0 ** (-np.arange(128) / 128)
    c = linear(state, "t_embedder.mlp.0", np.concatenate([np.cos(angles), np.sin(angles)]))
    c = linear(state, "t_embedder.mlp.2", silu(c)) + state["y_embedder.embedding_table.weight"][y]
    length = config.input_size**2
    latents = [x[:, i // config.input_size, i % config.input_size] for i in range(length)]
    tokens = [linear(state, "x_embedder", latent) for latent in latents]
    h = np.stack([np.concatenate(tokens[j * m : j * m + m]) for j in range(length // m)])
    if config.position_embedding:
        h = h + state["pos_embed"][0]
    for i in range(config.depth):
        b = f"blocks.{i}"
        shift, scale, gate = np.split(linear(state, f"{b}.modulation.1", silu(c)), 3)
        stream = layer_norm(h) * (1 + scale) + shift
        up = gelu(linear(state, f"{b}.up", gelu(linear(state, f"{b}.w0", stream))))
        spread = np.stack([up[j, k * inner : (k + 1) * inner] for j in range(length // m) for k in range(m)])
        mixed = mamba_core_fp64(config, state, f"{b}.mixer.forwards", spread)
        mixed = mixed + mamba_core_fp64(config, state, f"{b}.mixer.backwards", spread[::-1])[::-1]
        gathered = np.stack(
            [np.concatenate([linear(state, f"{b}.down.{k}", mixed[j * m + k]) for k in range(m)]) for j in range(length // m)]
        )
        fused = gelu(linear(state, f"{b}.w2", gelu(gathered))) * gelu(linear(state, f"{b}.w1", stream))
        h = h + gate * linear(state, f"{b}.w3", fused)
    shift, scale = np.split(linear(state, "final_layer.modulation.1", silu(c)), 2)
    out = linear(state, "final_layer.linear", layer_norm(h) * (1 + scale) + shift).reshape(length, -1)
    return out.T.reshape(-1, config.input_size, config.input_size)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("diffussm-tiny", {}), ("diffussm-tiny", {"hourglass": 1, "expand": 1}), ("diffussm-tiny", {"hourglass": 4}), ("diffussm-digits", {})],
)
def test_forward_is_the_formula(name, settings):
    config = dataclasses.replace(MODELS[name].config, **settings)
    spec = MODELS[name].spec(settings)
    module = random_weights(spec, seed=1)
    state = {key: value.double().numpy() for key, value in module.state_dict().items()}
    inputs = draw(spec, batch=2)
    got = module(**inputs).detach().double().numpy()
    for i in range(2):
        expected = diffussm_fp64(config, state, inputs["x"][i].double().numpy(), inputs["t"][i].item(), inputs["y"][i].item())
        assert got[i].shape == expected.shape
        # The sine of an angle up to 1000 in float32 is off by up to 6e-5, which the condition passes on.
        assert np.abs(got[i] - expected).max() <= 3e-5 * np.ptp(expected)


def test_published_size():
    """The paper has 673 M parameters, with S4D mixers; this count is that with Mamba cores, of which it gives none."""
    with torch.device("meta"):
        module = MODELS["diffussm-xl"].spec().build()
    config = MODELS["diffussm-xl"].config
    assert sum(p.numel() for p in module.parameters()) == 648_258_640
    assert (config.input_size, config.in_channels, config.hidden_size, config.depth, config.hourglass) == (32, 4, 1152, 29, 2)
    block = module.blocks[0]
    dense = sum(layer.weight.numel() for layer in (block.w0, block.up, *block.down, block.w1, block.w2, block.w3))
    assert dense == (9 + 2 * config.hourglass) * config.hidden_size**2
    # By channel of each core: convolution 4 + 1, to delta (rank 72), B and C (16 each), from delta 72 + 1, A 16 and D 1.
    assert sum(p.numel() for p in block.mixer.parameters()) == 2 * 2304 * (5 + 104 + 73 + 17)


def test_digits_weights_are_small():
    with torch.device("meta"):
        module = MODELS["diffussm-digits"].spec().build()
    assert sum(p.numel() for p in module.parameters()) < 700_000


def test_starts_as_the_identity():
    torch.manual_seed(0)
    module = TINY.spec().build()
    stream, condition = torch.randn(2, 32, 32), torch.randn(2, 32)
    for block in module.blocks:
        assert torch.equal(block(stream, condition), stream)
    assert torch.count_nonzero(module(**draw(TINY.spec()))) == 0


def test_every_input_matters_everywhere():
    module = random_weights(TINY.spec(), seed=2)
    inputs = draw(TINY.spec(), batch=1) | {"y": torch.tensor([3])}
    base = module(**inputs)
    for other in ({"t": inputs["t"] / 2}, {"y": torch.tensor([10])}):
        assert (module(**inputs | other) - base).abs().max() > 1e-3


def test_the_mixer_looks_both_ways():
    """The first latent reaches the last and the last the first, in float64 because over 64 tokens little is left of it."""
    module = random_weights(TINY.spec(), seed=2).double()
    inputs = draw(TINY.spec(), batch=1)
    x = inputs["x"].double()
    base = module(**inputs | {"x": x})
    for here, there in ((0, 7), (7, 0)):
        other = x.clone()
        other[0, :, here, here] += 1
        assert (module(**inputs | {"x": other}) - base)[0, :, there, there].abs().max() > 1e-12


@pytest.mark.parametrize("settings", [{"hourglass": 3}, {"input_size": 9}, {"hidden_size": 33}, {"depth": 0}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must"):
        dataclasses.replace(TINY.config, **settings)


def exported(spec, seed):
    module = random_weights(spec, seed)
    program = trace(module, draw(spec), dynamic=spec.dynamic, ranges=spec.ranges)
    return module, to_onnx(program, opset=20, input_names=("x", "t", "y"), output_names=("sample",))


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "settings"), [("diffussm-tiny", {}), ("diffussm-digits", {"depth": 1})])
def test_onnx_runtime_gives_the_same_at_any_batch(name, settings):
    spec = MODELS[name].spec(settings)
    module, model = exported(spec, seed=3)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        inputs = draw(spec, 7, batch=batch)
        (got,) = session.run(["sample"], {key: value.numpy() for key, value in inputs.items()})
        expected = module(**inputs).detach().numpy()
        assert np.abs(got - expected).max() <= 1e-5 * np.ptp(expected)


@pytest.mark.matrix
@pytest.mark.parametrize("ssm_op", ["plugin", "decomposed", "onnx27"])
def test_the_graph_has_as_many_nodes_for_every_length(ssm_op):
    def nodes(input_size):
        _, model = exported(TINY.spec({"input_size": input_size, "depth": 1}), seed=0)
        optimise(model)
        write_ssm_op(model, ssm_op)
        return sum(1 for _ in model.graph.all_nodes())

    assert nodes(2) == nodes(8)


def test_a_sequence_shorter_than_the_convolution():
    """The last token of a block sees no further than the end: 4 tokens and a convolution of 7."""
    settings = {"input_size": 2, "conv_size": 7, "depth": 1}
    spec, config = TINY.spec(settings), dataclasses.replace(TINY.config, **settings)
    module = random_weights(spec, seed=1)
    state = {key: value.double().numpy() for key, value in module.state_dict().items()}
    inputs = draw(spec, batch=2)
    got = module(**inputs).detach().double().numpy()
    expected = diffussm_fp64(config, state, inputs["x"][0].double().numpy(), inputs["t"][0].item(), inputs["y"][0].item())
    assert np.abs(got[0] - expected).max() <= 3e-5 * np.ptp(expected)
