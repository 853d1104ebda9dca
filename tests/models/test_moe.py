"""The mixture of experts against loops over tokens and experts in float64."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from isthmus.exporter.errors import WeightsError
from isthmus.exporter.onnx import to_onnx
from isthmus.exporter.passes import optimise
from isthmus.exporter.spec import MODELS
from isthmus.exporter.trace import trace
from isthmus.exporter.weights import load_weights, random_weights
from isthmus.models.moe import GatheredMoE, MoEConfig, SparseMoE

CONFIGS = {
    "mixtral": MODELS["moe-tiny"].config,
    "dbrx": MODELS["moe-dbrx-tiny"].config,
    "jamba": MoEConfig(dim=16, hidden_dim=12, num_experts=16, top_k=2, normalize=False),
    "one expert": MoEConfig(dim=16, hidden_dim=12, num_experts=1, top_k=1),
    "all experts": MoEConfig(dim=16, hidden_dim=12, num_experts=3, top_k=3),
}


def build(config, seed=1, form=SparseMoE):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return form(config).eval().requires_grad_(False)


def tokens(count, config, seed=0):
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal((count, config.dim), dtype=np.float32))


def moe_fp64(config, state, x):
    """The papers' sums for tokens (T, d): for each token the chosen experts one after the other."""
    out = np.zeros_like(x)
    for t, token in enumerate(x):
        logits = state["gate.weight"] @ token
        chosen = sorted(range(config.num_experts), key=lambda e: (-logits[e], e))[: config.top_k]
        over = chosen if config.normalize else range(config.num_experts)
        total = sum(np.exp(logits[e]) for e in over)
        for e in chosen:
            W, V = np.split(state["gate_up_proj"][e], 2)
            a = W @ token
            hidden = a / (1 + np.exp(-a)) * (V @ token)
            out[t] += np.exp(logits[e]) / total * (hidden @ state["down_proj"][e])
    return out


def in_fp64(module):
    return {key: value.double().numpy() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("form", [SparseMoE, GatheredMoE])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_token_is_the_formula(config, form):
    module = build(config, form=form)
    x = tokens(40, config)
    got, expected = module(x).double().numpy(), moe_fp64(config, in_fp64(module), x.double().numpy())
    error = np.abs(got - expected).max(-1) / np.ptp(expected)
    assert error.shape == (40,)
    assert error.max() <= 1e-6  # the worst token, none left out
    assert np.abs(expected).max(-1).min() > 1e-4  # and each of them has been somewhere


def test_the_weights_of_the_papers():
    """Mixtral's and DBRX's add up to 1, Jamba's to the probability of the chosen; k are positive."""
    for name, config in CONFIGS.items():
        weights, places = build(config).gate(tokens(40, config))
        assert ((weights > 0).sum(-1) == config.top_k).all()
        assert (places.sort(-1).values == torch.arange(config.num_experts)).all()
        total = weights.sum(-1)
        assert (total < 0.9).all() if name == "jamba" else torch.allclose(total, torch.ones(40))


@pytest.mark.parametrize("form", [SparseMoE, GatheredMoE])
def test_of_equal_logits_the_lower_index_is_chosen(form):
    config = CONFIGS["mixtral"]
    module = build(config, form=form)
    module.gate.weight.copy_(module.gate.weight[2].expand(8, -1))  # all equal
    module.gate.weight[5] = module.gate.weight[3] + 0.0
    x = tokens(5, config)
    weights, _ = module.gate(x)
    assert (weights == torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0])).all()
    module.gate.weight[6] *= 2  # first for the tokens whose logit is positive, last for the others; behind it again 0, then 1
    weights, _ = module.gate(x)
    positive = (x @ module.gate.weight[0]) > 0
    assert 0 < positive.sum() < 5
    assert ((weights[:, 6] > 0) == positive).all()
    assert (weights[:, 0] > 0).all()
    assert ((weights[:, 1] > 0) == ~positive).all()
    expected = moe_fp64(config, in_fp64(module), x.double().numpy())
    np.testing.assert_allclose(module(x).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("form", [SparseMoE, GatheredMoE])
def test_a_permutation_of_the_tokens_permutes_the_outputs(form):
    """No expert is ever full: what a token gets does not depend on the tokens before it, even when all want the same experts."""
    config = CONFIGS["mixtral"]
    module = build(config, form=form)
    x = tokens(40, config)
    x[10:] = x[9] + 0.01 * x[10:]
    order = torch.from_numpy(np.random.default_rng(0).permutation(40))
    torch.testing.assert_close(module(x[order]), module(x)[order], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(module(x.reshape(4, 10, -1)).reshape(40, -1), module(x), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.cat([module(x[t : t + 1]) for t in range(40)]), module(x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", [SparseMoE, GatheredMoE])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_expert_that_was_not_chosen_has_no_effect(form, bad):
    config = CONFIGS["mixtral"]
    module = build(config, form=form)
    x = tokens(40, config)
    before, (weights, _) = module(x), module.gate(x)
    module.gate_up_proj[3] = bad
    with_3 = weights[:, 3] > 0
    assert 0 < with_3.sum() < 40
    after = module(x)
    assert torch.equal(after[~with_3], before[~with_3])
    assert after[with_3].isnan().all()


def test_both_forms_are_equal():
    for config in CONFIGS.values():
        dense, gathered = build(config), build(config, form=GatheredMoE)
        x = tokens(7, config)
        torch.testing.assert_close(dense(x), gathered(x), rtol=1e-5, atol=1e-6)


def exported(name, settings):
    spec = MODELS[name].spec(settings)
    module = random_weights(spec, seed=0)
    inputs = spec.inputs(np.random.default_rng(0), spec.sizes)
    model = to_onnx(trace(module, inputs, dynamic=spec.dynamic, ranges=spec.ranges), opset=23, input_names=("x",), output_names=("y",))
    optimise(model)
    return collections.Counter(node.op_type for node in model.graph.all_nodes())


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "products"), [("moe-tiny", 3), ("moe-step-tiny", 3)])
def test_the_graph_has_the_same_nodes_for_any_number_of_experts(name, products):
    """The router and two products for all experts; nothing whose shape depends on data, no TopK, no loop."""
    few, many = (exported(name, {"num_experts": experts, "top_k": k}) for experts, k in ((3, 2), (12, 5)))
    assert few == many
    assert few["MatMul"] + few["Gemm"] == products
    assert not {"NonZero", "TopK", "Loop", "If", "ScatterElements", "ScatterND", "Compress", "Unique"} & few.keys()


def mixtral_file(config, state, prefix=""):
    """One by one, as in Mixtral's files."""
    files = {f"{prefix}gate.weight": state["gate.weight"]}
    for e in range(config.num_experts):
        w1, w3 = state["gate_up_proj"][e].chunk(2)
        files |= {f"{prefix}experts.{e}.{n}.weight": w.contiguous() for n, w in (("w1", w1), ("w3", w3), ("w2", state["down_proj"][e].T))}
    return files


@pytest.mark.parametrize("prefix", ["", "model.layers.7.block_sparse_moe."])
@pytest.mark.parametrize("name", ["moe-tiny", "moe-step-tiny"])
def test_a_layer_of_mixtral_s_files(name, prefix, tmp_path):
    spec, config = MODELS[name].spec(), MODELS[name].config
    ours = random_weights(spec, seed=1)
    save_file(mixtral_file(config, ours.state_dict(), prefix), tmp_path / "layer.safetensors")
    loaded = spec.build()
    assert load_weights(loaded, tmp_path / "layer.safetensors", spec.layouts).layout == "mistralai/Mixtral"
    x = tokens(3, config)
    assert torch.equal(loaded(x), ours(x))


@pytest.mark.parametrize("fault", ["experts.3.w2.weight", "two layers", "experts"])
def test_files_that_do_not_fit_are_refused(fault, tmp_path):
    spec, config = MODELS["moe-tiny"].spec(), MODELS["moe-tiny"].config
    files = mixtral_file(config, random_weights(spec, seed=1).state_dict())
    if fault == "two layers":
        files = {f"layers.{i}.block_sparse_moe.{key}": value.clone() for i in range(2) for key, value in files.items()}
    elif fault == "experts":
        files = {key: value for key, value in files.items() if not key.startswith("experts.7.")}
    else:
        del files[fault]
    save_file(files, tmp_path / "layer.safetensors")
    with pytest.raises(WeightsError):
        load_weights(spec.build(), tmp_path / "layer.safetensors", spec.layouts)


@pytest.mark.parametrize(
    ("name", "experts", "top_k", "billions"),
    [("moe-mixtral-8x7b", 8, 2, 1.409), ("moe-dbrx", 16, 4, 3.171), ("moe-step-mixtral-8x7b", 8, 2, 1.409)],
)
def test_published_size(name, experts, top_k, billions):
    """32 layers of 1.409 G and 1.6 G in attention, norms and embeddings are Mixtral's 46.7 G; 40 of 3.171 G and 5 G are DBRX's 132 G."""
    with torch.device("meta"):
        module = MODELS[name].spec().build()
    config = MODELS[name].config
    assert (config.num_experts, config.top_k, config.normalize) == (experts, top_k, True)
    assert sum(p.numel() for p in module.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)


@pytest.mark.parametrize("settings", [{"dim": 0}, {"hidden_dim": 0}, {"top_k": 0}, {"top_k": 9}, {"num_experts": 0}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match=r"must be .*got"):
        dataclasses.replace(MODELS["moe-tiny"].config, **settings)
