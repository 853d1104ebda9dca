"""The chart auto-encoder against its formulas in float64, chart by chart and point by point."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights

SETTINGS = [{}, {"data_size": 7, "latent_size": 5, "num_charts": 3, "chart_size": 1, "hidden_size": 9, "depth": 3}]


def draw(spec, seed=0, **sizes):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})


def module_of(form, settings, seed=0):
    name = {"reconstruct": "chart-autoencoder-tiny"}.get(form, f"chart-autoencoder-{form}-tiny")
    spec = MODELS[name].spec(settings)
    module = random_weights(spec, seed)
    return spec, module, {key: value.double().numpy() for key, value in module.state_dict().items()}


def layers(state, name):
    return sorted({int(key.split(".")[1]) for key in state if key.startswith(f"{name}.")})


def network(state, name, x, chart=None):
    for i in layers(state, name):
        weight, bias = state[f"{name}.{i}.weight"], state[f"{name}.{i}.bias"]
        x = weight @ x + bias if chart is None else x @ weight[chart] + bias[chart, 0]
        if i != layers(state, name)[-1]:
            x = np.maximum(x, 0)
    return x


def coordinates(state, x, chart):
    return 1 / (1 + np.exp(-network(state, "chart_encoders", network(state, "encoder", x), chart)))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize("settings", SETTINGS)
def test_reconstruct(settings):
    spec, module, state = module_of("reconstruct", settings)
    x = draw(spec, batch=32)["x"]
    got = [value.double().numpy() for value in module(x)]
    charts = module.config.num_charts
    for y, p, chart, z, point in zip(*got, x.double().numpy(), strict=True):
        expected = np.stack([coordinates(state, point, a) for a in range(charts)])
        np.testing.assert_allclose(z, expected, atol=2e-6)
        probabilities = softmax(network(state, "prediction", network(state, "encoder", point)))
        np.testing.assert_allclose(p, probabilities, atol=2e-6)
        assert chart == probabilities.argmax()
        np.testing.assert_allclose(y, network(state, "chart_decoders", expected[int(chart)], int(chart)), atol=1e-5)
    assert len(set(got[2])) > 1


@pytest.mark.parametrize("settings", SETTINGS)
def test_decode(settings):
    spec, module, state = module_of("decode", settings)
    inputs = draw(spec)
    for y, z, chart in zip(module(**inputs), *inputs.values(), strict=True):
        np.testing.assert_allclose(y, network(state, "chart_decoders", z.double().numpy(), int(chart)), atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS)
def test_transition_is_decoding_by_one_chart_and_encoding_by_the_other(settings):
    spec, module, state = module_of("transition", settings)
    inputs = draw(spec, batch=16)
    for got, z, source, target in zip(module(**inputs), *inputs.values(), strict=True):
        point = network(state, "chart_decoders", z.double().numpy(), int(source))
        np.testing.assert_allclose(got, coordinates(state, point, int(target)), atol=1e-5)


def test_the_forms_share_their_weights_and_agree():
    _, reconstruct, _ = module_of("reconstruct", {})
    decode, transition = (module_of(form, {}, seed=2)[1] for form in ("decode", "transition"))
    for other in (decode, transition):
        other.load_state_dict(reconstruct.state_dict())
    x = draw(MODELS["chart-autoencoder-tiny"].spec(), 3)["x"]
    y, _, chart, z = reconstruct(x)
    chosen = z[torch.arange(8), chart]
    torch.testing.assert_close(decode(chosen, chart), y)
    target = (chart + 1) % 4
    torch.testing.assert_close(transition(chosen, chart, target), reconstruct(y)[3][torch.arange(8), target])


def test_of_equally_trusted_charts_the_first_is_assigned():
    _, module, _ = module_of("reconstruct", {})
    with torch.no_grad():
        module.prediction[-1].weight[1:] = module.prediction[-1].weight[:1]
        module.prediction[-1].bias[1:] = module.prediction[-1].bias[:1]
    assert module(torch.randn(5, 3))[2].tolist() == [0] * 5


@pytest.mark.parametrize("form", ["", "decode-", "transition-"])
def test_the_published_size(form):
    """The paper gives no count; this is that of the layers of `depth` 3 and width 256, 4 charts of dimension 4 and 64 latent channels."""
    with torch.device("meta"):
        module = MODELS[f"chart-autoencoder-{form}mnist"].spec().build()

    def of(*sizes):
        return sum((given + 1) * out for given, out in itertools.pairwise(sizes))

    parts = {
        "encoder": of(784, 256, 256, 256, 64),
        "chart_encoders": 4 * of(64, 256, 4),
        "chart_decoders": 4 * of(4, 256, 256, 256, 784),
        "prediction": of(64, 256, 4),
    }
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in module.named_children()} == parts
    assert sum(parts.values()) == 1_774_740


@pytest.mark.parametrize("settings", [{"num_charts": 0}, {"chart_size": 0}, {"form": "encode"}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must be"):
        dataclasses.replace(MODELS["chart-autoencoder-tiny"].config, **settings)
