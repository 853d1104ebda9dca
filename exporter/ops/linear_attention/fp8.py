"""Scales of FP8 queries, keys and values, which the node has no inputs for: they go into its attribute and into the unit of its state.

y = scale S^T q is linear in q, and S in k and v, for the rules without removal. The delta rules are not linear in k.
"""

from __future__ import annotations

import math

from ...errors import Reason, UsageError


def fold_scales(scale: float, key: int, q_scale: float, k_scale: float, v_scale: float) -> tuple[float, float]:
    """What scales of FP8 tensors become, each of which multiplies its tensor: x = x_scale * x_fp8.

    Args:
        scale: The attribute of the node of x; 0 stands for 1 / sqrt(key).
        key: Keys of a head.
        q_scale: Of q.
        k_scale: Of k.
        v_scale: Of v.

    Returns:
        The attribute `scale` of the node of the FP8 tensors, and the unit of its states: the initial state is divided by it, and the last
        state multiplied.

    Raises:
        UsageError: A scale is not positive, or the product is not within float32's normal range, in which the node keeps it.
    """
    scales = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    reasons = [Reason(f"got {x}, expected a positive number", where=name) for name, x in scales.items() if not 0.0 < x < math.inf]
    unit = k_scale * v_scale
    folded = (scale if scale else key**-0.5) * q_scale * unit
    if not reasons:
        reasons = [
            Reason(f"{what} is {x:.3g}, outside float32's normal range", fix="use scales nearer to 1")
            for what, x in (("the product of the scales", folded), ("k_scale * v_scale", unit))
            if not 2.0**-126 <= abs(x) < 2.0**128
        ]
    if reasons:
        raise UsageError("the scales of the FP8 tensors cannot be folded", reasons=reasons)
    return folded, unit
