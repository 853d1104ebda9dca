"""Our fitting of a Schroedinger bridge against torchcfm's, which couples samples by an entropic transport plan and joins them by bridges.

The two share nothing but the problem: ours alternates between chains of small steps and never sees a plan; theirs makes the plan with POT's
Sinkhorn, puts a Brownian bridge between each pair, and regresses. For Gaussians the drift is linear in the place at each time.
"""

from __future__ import annotations

import numpy as np
import torch
from torchcfm.conditional_flow_matching import SchrodingerBridgeConditionalFlowMatcher

from isthmus.models.schrodinger_bridge import iterative_proportional_fitting

DATA, PRIOR, VARIANCE = (1.0, 0.7), (-2.0, 1.5), 0.8
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
PLACES = np.linspace(-1, 1, 5)  # from the mean, in standard deviations


def torchcfms():
    """Places (5, 5) and drifts (5, 5) at `TIMES`: the regression of the flow and of the score that makes it the drift of an SDE."""
    matcher = SchrodingerBridgeConditionalFlowMatcher(sigma=VARIANCE**0.5, ot_method="sinkhorn")
    # Quantiles in place of draws, of which the plan would need many.
    levels = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(800, dtype=torch.float64) + 0.5) / 800)[:, None]
    data, prior = (mean + std * levels for mean, std in (DATA, PRIOR))
    i, j = matcher.ot_sampler.sample_map(matcher.ot_sampler.get_map(data, prior), 40_000)
    places, drifts = [], []
    for time in TIMES:
        t = torch.full((len(i),), time, dtype=torch.float64)
        x = matcher.sample_xt(data[i], prior[j], t, torch.randn(len(i), 1, dtype=torch.float64))
        flow = matcher.compute_conditional_flow(data[i], prior[j], t, x)
        score = -(x - matcher.compute_mu_t(data[i], prior[j], t)) / matcher.compute_sigma_t(t)[:, None] ** 2
        line = np.polyfit(x[:, 0].numpy(), (flow + VARIANCE / 2 * score)[:, 0].numpy(), 1)
        places.append(x.mean().item() + x.std().item() * PLACES)
        drifts.append(np.polyval(line, places[-1]))
    return np.array(places), np.array(drifts)


def fit_lines(places, changes):
    """A drift a(t) + b(t) x with polynomials of degree 4: each step fitted by itself would gather noise with every fit."""
    x, y = (np.stack(arrays)[..., 0] for arrays in (places, changes))
    powers = np.vander(np.arange(len(x)) / len(x), 5)
    squares, factors = powers[:, :, None] * powers[:, None, :], (np.ones_like(x), x)
    left = [[np.einsum("k,kij->ij", (one * other).sum(1), squares) for one in factors] for other in factors]
    a, b = np.split(np.linalg.solve(np.block(left), np.concatenate([(y * factor).sum(1) @ powers for factor in factors])), 2)
    return lambda x, k: powers[k] @ a + (powers[k] @ b) * x


def test_the_drift_between_gaussians():
    """The paper's regression is exact as the steps grow short."""
    before = np.random.get_state(), torch.get_rng_state()  # torchcfm draws from the global generators
    np.random.seed(0)
    torch.manual_seed(0)
    try:
        places, expected = torchcfms()
    finally:
        np.random.set_state(before[0])
        torch.set_rng_state(before[1])
    assert np.ptp(expected) > 0.8
    errors = []
    for steps in (40, 160):
        rng = np.random.default_rng(0)
        forward, _ = iterative_proportional_fitting(
            lambda count, rng=rng: DATA[0] + DATA[1] * rng.standard_normal((count, 1)),
            lambda count, rng=rng: PRIOR[0] + PRIOR[1] * rng.standard_normal((count, 1)),
            fit_lines,
            gammas=[VARIANCE / 2 / steps] * steps,
            iterations=7,
            samples=40_000,
            rng=rng,
        )
        got = np.stack([steps * forward(x, round(steps * time)) for time, x in zip(TIMES, places, strict=True)])
        errors.append(np.sqrt(np.mean((got - expected) ** 2)))
    assert errors[1] < 0.6 * errors[0]
    assert errors[1] < 0.1
