"""Our Sinkhorn iterations against POT's, both until they have converged."""

from __future__ import annotations

import numpy as np
import ot
import pytest

from isthmus.exporter.spec import MODELS

from .compare import draw


@pytest.mark.parametrize(("seed", "settings"), [(0, {}), (1, {"points": 7, "targets": 20, "cost": "euclidean"}), (2, {"epsilon": 0.03})])
def test_plan_and_cost(seed, settings):
    spec = MODELS["sinkhorn-tiny"].spec({"iterations": 2000, **settings})
    config = spec.build().config
    inputs = {name: value.double() for name, value in draw(spec, seed).items()}
    inputs |= {name: inputs[name] / inputs[name].sum(1, keepdim=True) for name in "ab"}
    plan, paid, _, _ = spec.build()(**inputs)
    for i in range(2):
        x, y, a, b = (value[i].numpy() for value in inputs.values())
        costs = ot.dist(x, y, metric=config.cost)
        expected = ot.sinkhorn(a, b, costs, config.epsilon, method="sinkhorn_log", numItermax=20_000, stopThr=1e-15, warn=False)
        assert np.abs(plan[i].numpy() - expected).max() < 1e-8
        assert abs(paid[i].sum().item() - (expected * costs).sum()) < 1e-8
        assert np.ptp(expected) > 0.01
