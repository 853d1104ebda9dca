"""AiM against its formulas in float64, its two forms against each other, and drawing codes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import isthmus
from isthmus.exporter.errors import WeightsError
from isthmus.exporter.spec import MODELS
from isthmus.exporter.target import TARGETS
from isthmus.exporter.weights import load_weights, random_weights
from isthmus.models.aim import AiMConfig, TokenSampler

from . import mamba2_formulas, mamba_formulas

TINY, STEP = MODELS["aim-tiny"], MODELS["aim-step-tiny"]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(spec, seed=0, **sizes):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})


def close(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


def aim_fp64(config, state, y, tokens, positions, conv, S):
    """One picture: codes and positions (L,), conv (depth, channels, W - 1), S (depth, H, N, P) to logits and the states."""
    b, width = "backbone", config.hidden_size
    label = state[f"{b}.cls_embed.embedding_table.weight"][y]
    table = state[f"{b}.embeddings.word_embeddings.weight"]
    x = np.stack(
        [
            label if position == -1 else table[token] + state[f"{b}.embeddings.position_embeddings.weight"][position]
            for token, position in zip(tokens, positions, strict=True)
        ]
    )
    convs, after = [], []
    for i in range(config.depth):
        name = f"{b}.layers.{i}"
        if config.groups:
            rows = mamba_formulas.linear(state, f"{b}.adaln_group.1", mamba_formulas.silu(label)).reshape(config.groups, 3, width)
            shift, scale, gate = rows[i % config.groups] + state[f"{name}.scale_shift_table"][0]
        else:
            shift, scale, gate = mamba_formulas.linear(state, f"{name}.adaLN_modulation.1", mamba_formulas.silu(label)).reshape(3, width)
        normed = mamba_formulas.rms_norm(state, f"{name}.norm", x) * (1 + scale) + shift
        mixed, conv_after, S_after = mamba2_formulas.block(state, f"{name}.mixer", normed, conv[i], S[i], groups=1)
        convs.append(conv_after)
        after.append(S_after)
        x = x + gate * mixed
    shift, scale = mamba_formulas.linear(state, f"{b}.final_layer.adaLN_modulation.1", mamba_formulas.silu(label)).reshape(2, width)
    x = mamba_formulas.rms_norm(state, f"{b}.final_layer.norm_final", mamba_formulas.rms_norm(state, f"{b}.norm_f", x))
    return (x * (1 + scale) + shift) @ table.T, np.stack(convs), np.stack(after)


@pytest.mark.parametrize(("settings", "length"), [({}, 16), ({"groups": 0, "depth": 3}, 9), ({"groups": 2, "depth": 3}, 3)])
def test_the_prefill_is_the_formula(settings, length):
    spec = TINY.spec(settings)
    config = dataclasses.replace(TINY.config, **settings)
    module = random_weights(spec, seed=1)
    state = {key: value.double().numpy() for key, value in module.state_dict().items()}
    inputs = draw(spec, batch=2, length=length)
    results = [x.double().numpy() for x in module(**inputs)]
    for i in range(2):
        states = (inputs[name][i].double().numpy() for name in ("conv_states", "ssm_states"))
        given = (inputs[name][i].numpy() for name in ("tokens", "positions"))
        expected = aim_fp64(config, state, inputs["y"][i].item(), *given, *states)
        for got, reference in zip(results, expected, strict=True):
            assert np.ptp(reference) > 0.1
            assert np.abs(got[i] - reference).max() <= 1e-5 * np.ptp(reference)


@pytest.mark.parametrize("settings", [{}, {"groups": 0}])
def test_step_by_step_is_the_prefill(settings):
    module, step = random_weights(TINY.spec(settings), seed=2), STEP.spec(settings).build()
    step.load_state_dict(module.state_dict(), strict=True)
    inputs = draw(TINY.spec(), seed=1, length=9)
    logits, conv, ssm = module(**inputs)
    states, streamed = (inputs["conv_states"], inputs["ssm_states"]), []
    for token, position in zip(inputs["tokens"].unbind(1), inputs["positions"].unbind(1), strict=True):
        out, *states = step(inputs["y"], token, position, *states)
        streamed.append(out)
    close(torch.stack(streamed, dim=1), logits)
    close(states[0], conv)
    close(states[1], ssm)


def test_a_prompt_in_two_pieces_is_the_prompt():
    module = random_weights(TINY.spec(), seed=2)
    inputs = draw(TINY.spec(), seed=3, length=12)
    y, tokens, positions = (inputs[name] for name in ("y", "tokens", "positions"))
    logits, conv, ssm = module(**inputs)
    first, *states = module(y, tokens[:, :5], positions[:, :5], inputs["conv_states"], inputs["ssm_states"])
    second, *states = module(y, tokens[:, 5:], positions[:, 5:], *states)
    close(torch.cat([first, second], dim=1), logits)
    close(states[0], conv)
    close(states[1], ssm)


def test_every_input_matters():
    module = random_weights(TINY.spec(), seed=2)
    inputs = draw(TINY.spec(), batch=1) | {"y": torch.tensor([3])}
    base = module(**inputs)[0]
    for name, other in (
        ("y", torch.tensor([10])),
        ("tokens", (inputs["tokens"] + 1) % 64),
        ("positions", inputs["positions"] + 1),
        ("conv_states", inputs["conv_states"] + 1),
        ("ssm_states", inputs["ssm_states"] + 1),
    ):
        assert (module(**inputs | {name: other})[0] - base).abs().max() > 1e-3, name


def run(module):
    def step(arrays):
        given = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
        with torch.no_grad():
            return dict(zip(("logits", "last_conv_states", "last_ssm_states"), (x.numpy() for x in module(**given)), strict=True))

    return step


def sampler(**settings):
    defaults = {"labels": (3, 7), "num_tokens": 12, "states": TINY.config.states, "null_label": 10}
    return TokenSampler(**{**defaults, **settings})


def livelier(spec, seed):
    """Random weights whose blocks outweigh the embeddings, or the tied head would have each code follow itself."""
    module = random_weights(spec, seed)
    for layer in module.backbone.layers:
        layer.mixer.out_proj.weight.mul_(30)
    return module


@pytest.mark.parametrize(("guidance", "first_position"), [(1.0, 0), (2.5, 0), (2.5, 1)])
def test_the_likeliest_codes_are_those_of_the_prefill(guidance, first_position):
    """Greedy codes are drawn with states, and each is the likeliest by one pass over all codes before it."""
    step = livelier(STEP.spec(), seed=4)
    module = TINY.spec().build()
    module.load_state_dict(step.state_dict())
    draws = sampler(guidance=guidance, top_k=1, first_position=first_position)
    tokens = draws(run(step), np.random.default_rng(0))
    assert tokens.shape == (2, 12)
    assert tokens.dtype == np.int64
    assert len(np.unique(tokens)) > 3
    sequence = torch.cat([torch.zeros(2, 1, dtype=torch.int64), torch.from_numpy(tokens)[:, :-1]], dim=1)
    positions = torch.cat([torch.tensor([-1]), torch.arange(11) + first_position]).repeat(2, 1)
    states = [torch.zeros(2, *shape) for shape in TINY.config.states.values()]
    with torch.no_grad():
        with_class, without = (module(torch.tensor(labels), sequence, positions, *states)[0] for labels in ([3, 7], [10, 10]))
    logits = without + guidance * (with_class - without)
    assert np.array_equal(logits.argmax(-1).numpy(), tokens)
    assert not np.array_equal(tokens[0], tokens[1])


@pytest.mark.matrix
def test_an_artifact_draws_the_codes_of_pytorch(tmp_path):
    """Greedily with guidance, by steps from the class, and by steps after a prompt that the prefill takes in one piece."""
    step = livelier(STEP.spec(), seed=4)
    save_file(step.state_dict(), tmp_path / "weights.safetensors")
    runners = {}
    for name in ("aim-tiny", "aim-step-tiny"):
        result = isthmus.export(name, "onnxruntime", tmp_path / name, precision="fp32", weights=tmp_path / "weights.safetensors")
        assert result.manifest.verdict == "verified"
        stage = next(s for s in TARGETS["onnxruntime"]().stages(tmp_path / name, result.manifest) if s.name == "onnx")
        runners[name] = stage.open()
    draws = sampler(guidance=2.5, top_k=1, num_tokens=TINY.config.num_tokens)
    with runners["aim-tiny"] as prefill, runners["aim-step-tiny"] as artifact:
        expected = draws(run(step), np.random.default_rng(0))
        assert len(np.unique(expected)) > 8
        assert np.array_equal(draws(artifact.run, np.random.default_rng(0)), expected)

        prompt = 9  # the class and eight codes
        y = np.array([3, 7, 10, 10])
        rows = np.concatenate([expected, expected])
        tokens = np.concatenate([np.zeros((4, 1), np.int64), rows[:, : prompt - 1]], axis=1)
        states = {name: np.zeros((4, *shape), np.float32) for name, shape in TINY.config.states.items()}
        out = prefill.run({"y": y, "tokens": tokens, "positions": np.tile(np.arange(-1, prompt - 1), (4, 1)), **states})
        logits = out["logits"][:, -1]
        for i in range(prompt - 1, draws.num_tokens):
            with_class, without = np.split(logits.astype(np.float64), 2)
            code = draws.choose(without + draws.guidance * (with_class - without), np.random.default_rng(0))
            assert np.array_equal(code, expected[:, i])
            position = np.full(4, i)
            out = artifact.run({"y": y, "token": np.tile(code, 2), "position": position, **{n: out[f"last_{n}"] for n in states}})
            logits = out["logits"]


def test_drawing_repeats_and_differs_by_seed():
    step = run(random_weights(STEP.spec(), seed=4))
    first, again, other = (sampler(guidance=1.5)(step, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_codes_are_chosen_by_their_probabilities():
    logits = np.log(np.array([0.05, 0.4, 0.25, 0.3]))
    rows = np.tile(logits, (40_000, 1))
    rng = np.random.default_rng(0)
    for settings, expected in (
        ({}, [0.05, 0.4, 0.25, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 0.5}, np.array([0.0025, 0.16, 0.0625, 0.09]) / 0.315),
        ({"top_k": 9}, [0.05, 0.4, 0.25, 0.3]),
    ):
        shares = np.bincount(sampler(**settings).choose(rows, rng), minlength=4) / len(rows)
        assert np.abs(shares - expected).max() < 0.01
        assert not shares[np.equal(expected, 0)].any()


@pytest.mark.parametrize("settings", [{"labels": ()}, {"guidance": 0.5}, {"top_k": -1}, {"temperature": 0.0}])
def test_samplers_that_are_refused(settings):
    with pytest.raises(ValueError, match="must"):
        sampler(**settings)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("aim-b", 148), ("aim-l", 350), ("aim-xl", 763)],  # the authors' model zoo
)
def test_published_sizes(name, millions):
    with torch.device("meta"):
        modules = [MODELS[n].spec().build() for n in (name, name.replace("aim-", "aim-step-"))]
    for module in modules:
        assert round(sum(p.numel() for p in module.parameters()) / 1e6) == millions
    assert MODELS[name].config == MODELS[name.replace("aim-", "aim-step-")].config


@pytest.mark.parametrize("head", [False, True])
def test_the_authors_layout(head, tmp_path):
    spec = TINY.spec()
    ours = random_weights(spec, seed=4)
    state = {f"mamba.{key}": value for key, value in ours.state_dict().items()} | {"vqvae.decoder.conv_in.weight": torch.ones(2)}
    if head:
        state["mamba.lm_head.weight"] = state["mamba.backbone.embeddings.word_embeddings.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    loaded = spec.build()
    assert load_weights(loaded, tmp_path / "model.safetensors", spec.layouts).layout == "hp-l33/AiM"
    for key, value in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    if head:
        state["mamba.lm_head.weight"] += 1
        save_file(state, tmp_path / "other.safetensors")
        with pytest.raises(WeightsError, match="copies of backbone"):
            load_weights(spec.build(), tmp_path / "other.safetensors", spec.layouts)


@pytest.mark.parametrize("settings", [{"depth": 0}, {"conv_size": 1}, {"head_size": 7}, {"groups": -1}, {"norm_eps": 0.0}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must"):
        AiMConfig(**settings)
