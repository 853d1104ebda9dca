"""Networks of a state and a time, and Runge-Kutta methods, which several of the systems in continuous time share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np

Field = Callable[[Tensor, Tensor], Tensor]
"""A vector field f(t, y): t is (1, 1) or (B, 1), y (B, D), and the result (B, D)."""


class TimeMLP(nn.Module):
    """Layers of tanh or SiLU over [y, t]: the field of a neural differential equation. (B, D) and times to (B, out).

    The first layer is one over the concatenation of y and t, written as two, so that a time known in advance becomes a constant bias.

    Args:
        features: D, width of the state.
        hidden: Width of the hidden layers.
        out: Width of the result; D when None.
        depth: Number of hidden layers, at least 1.
        activation: What stands between the layers.
    """

    def __init__(
        self, features: int, hidden: int, out: int | None = None, *, depth: int = 2, activation: type[nn.Module] = nn.Tanh
    ) -> None:
        super().__init__()
        self.state = nn.Linear(features, hidden)
        self.time = nn.Linear(1, hidden, bias=False)
        layers: list[nn.Module] = [activation()]
        for _ in range(depth - 1):
            layers += [nn.Linear(hidden, hidden), activation()]
        self.rest = nn.Sequential(*layers, nn.Linear(hidden, features if out is None else out))
        for layer in (self.state, *self.rest):
            if isinstance(layer, nn.Linear):  # torch's default shrinks the signal at every layer
                nn.init.xavier_normal_(layer.weight)
        nn.init.normal_(self.time.weight, std=0.5)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The field at times t (1, 1) or (B, 1) and states y (B, D)."""
        out: Tensor = self.rest(self.state(y) + self.time(t))
        return out


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method.

    Attributes:
        a: The weights of the earlier stages in stage 1, 2, ...; stage 0 has none.
        b: The weights of the stages in the step.
        c: The time of each stage, as a part of the step.
        error: The weights of the stages in the estimate of the step's error; empty when there is none. One longer than `b`: the last is
            that of the slope at the end, which is the first stage of the next step.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    error: tuple[float, ...] = ()


TABLEAUS: Mapping[str, Tableau] = {
    "euler": Tableau(a=(), b=(1.0,), c=(0.0,)),
    "heun": Tableau(a=((1.0,),), b=(1 / 2, 1 / 2), c=(0.0, 1.0)),
    "rk4": Tableau(a=((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6), c=(0.0, 1 / 2, 1 / 2, 1.0)),
    "rk4-38": Tableau(
        a=((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
        c=(0.0, 1 / 3, 2 / 3, 1.0),
    ),
    # Dormand and Prince 1980, as in Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, table II.5.2.
    "dopri5": Tableau(
        a=(
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        ),
        b=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
        error=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    ),
}


Combination = tuple[tuple[int, ...], Tensor | float]
"""Which slopes are summed, and their weights: one number for one slope, else (1, n)."""


def combination(weights: Sequence[float], like: Tensor) -> Combination:
    """Weights as a constant in the dtype of `like`; a weight of 0 costs nothing."""
    used = tuple(i for i, w in enumerate(weights) if w != 0)
    if len(used) == 1:
        return used, weights[used[0]]
    return used, torch.tensor([[weights[i] for i in used]], dtype=like.dtype, device=like.device)


def combine(given: Combination, slopes: Sequence[Tensor]) -> Tensor:
    """The weighted sum of slopes, each (B, D)."""
    used, weights = given
    if not isinstance(weights, Tensor):
        return slopes[used[0]] if weights == 1 else slopes[used[0]] * weights
    # One product instead of a product and a sum for each: (1, n) times (B, n, D).
    return torch.matmul(weights, torch.stack([slopes[i] for i in used], dim=1)).squeeze(1)


class Method:
    """A Runge-Kutta method, ready for states of some dtype. Its constants are made outside of loops, because torch allows none within.

    Args:
        tableau: The method.
        like: A state, for its dtype.
    """

    def __init__(self, tableau: Tableau, like: Tensor) -> None:
        self._a = [combination(weights, like) for weights in tableau.a]
        self._c = tableau.c
        self.b = combination(tableau.b, like)
        self.error = combination(tableau.error, like) if tableau.error else None

    def stages(self, field: Field, t: Tensor, y: Tensor, h: Tensor | float, first: Tensor | None = None) -> list[Tensor]:
        """The slopes of one step.

        Args:
            field: f(t, y).
            t: Time at the start, (1, 1) or (B, 1).
            y: State at the start, (B, D).
            h: The step: a number, or (B, 1).
            first: The slope at the start, where it is known already.

        Returns:
            A slope (B, D) for each stage.
        """
        slopes = [field(t, y) if first is None else first]
        for weights, part in zip(self._a, self._c[1:], strict=True):
            slopes.append(field(t + part * h, y + h * combine(weights, slopes)))
        return slopes


def integrate(field: Field, tableau: Tableau, y: Tensor, times: Sequence[float]) -> Tensor:
    """Integrates dy/dt = f(t, y) over a fixed grid of times, which may fall: (B, D) at the first to (B, D) at the last."""
    method = Method(tableau, y)
    for now, after in itertools.pairwise(times):
        t, h = torch.full((1, 1), now, dtype=y.dtype, device=y.device), after - now
        y = y + h * combine(method.b, method.stages(field, t, y, h))
    return y


def grid(start: float, end: float, steps: int) -> list[float]:
    """`steps` + 1 evenly spaced times, the two ends included."""
    return [start + (end - start) * i / steps for i in range(steps)] + [end]


def standard_normal(
    name: str, shape: Sequence[int | str], scale: float = 1.0
) -> Callable[[np.random.Generator, Mapping[str, int]], dict[str, Tensor]]:
    """One input of standard normal float32 numbers times `scale`, as a ModelSpec's `inputs`; names in `shape` are named sizes."""

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        full = [sizes[size] if isinstance(size, str) else size for size in shape]
        return {name: torch.from_numpy(rng.standard_normal(full, dtype="float32")) * scale}

    return inputs
