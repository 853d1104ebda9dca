"""Element by element: of one operand, activations, of two operands, and quantised; see `operations.py`."""

import numpy as np
import torch
import torch.nn.functional as F


def cases_of(given):
    """How each operation is built, what it is in torch, and on which inputs, by its name."""
    mb, normal = given.mb, given.normal
    X, POSITIVE, UNIT, IMAGE, INTEGERS, NONZERO = given.X, given.POSITIVE, given.UNIT, given.IMAGE, given.INTEGERS, given.NONZERO
    TRUTH = given.TRUTH
    return {
        "abs": (lambda x: mb.abs(x=x), torch.abs, X),
        "acos": (lambda x: mb.acos(x=x), torch.acos, UNIT),
        "asin": (lambda x: mb.asin(x=x), torch.asin, UNIT),
        "atan": (lambda x: mb.atan(x=x), torch.atan, X),
        "atanh": (lambda x: mb.atanh(x=x), torch.atanh, UNIT),
        "ceil": (lambda x: mb.ceil(x=x), torch.ceil, X),
        "cos": (lambda x: mb.cos(x=x), torch.cos, X),
        "cosh": (lambda x: mb.cosh(x=x), torch.cosh, X),
        "erf": (lambda x: mb.erf(x=x), torch.erf, X),
        "exp": (lambda x: mb.exp(x=x), torch.exp, X),
        "exp2": (lambda x: mb.exp2(x=x), torch.exp2, X),
        "floor": (lambda x: mb.floor(x=x), torch.floor, X),
        "identity": (lambda x: mb.identity(x=x), lambda x: x, X),
        "inverse": (lambda x: mb.inverse(x=x, epsilon=1e-2), lambda x: 1 / (x + 1e-2), POSITIVE),
        "log": (lambda x: mb.log(x=x, epsilon=1e-2), lambda x: torch.log(x + 1e-2), POSITIVE),
        "logical_not": (lambda x: mb.logical_not(x=x), torch.logical_not, TRUTH),
        "round": (lambda x: mb.round(x=x), torch.round, X),
        "rsqrt": (lambda x: mb.rsqrt(x=x, epsilon=1e-2), lambda x: torch.rsqrt(x + 1e-2), POSITIVE),
        "sign": (lambda x: mb.sign(x=x), torch.sign, X),
        "sin": (lambda x: mb.sin(x=x), torch.sin, X),
        "sinh": (lambda x: mb.sinh(x=x), torch.sinh, X),
        "sqrt": (lambda x: mb.sqrt(x=x), torch.sqrt, POSITIVE),
        "square": (lambda x: mb.square(x=x), torch.square, X),
        "tan": (lambda x: mb.tan(x=x), torch.tan, UNIT),
        "tanh": (lambda x: mb.tanh(x=x), torch.tanh, X),
        "clip": (lambda x: mb.clip(x=x, alpha=-0.5, beta=0.7), lambda x: x.clamp(-0.5, 0.7), X),
        "threshold": (lambda x: mb.threshold(x=x, alpha=0.2), lambda x: x.clamp(min=0.2), X),
        "cast": (lambda x: mb.cast(x=x, dtype="int32"), lambda x: x.int(), 3 * X),
        # activations
        "clamped_relu": (lambda x: mb.clamped_relu(x=x, alpha=0.1, beta=0.5), lambda x: F.leaky_relu(x, 0.1).clamp(max=0.5), X),
        "elu": (lambda x: mb.elu(x=x, alpha=0.7), lambda x: F.elu(x, 0.7), X),
        "gelu": (lambda x: mb.gelu(x=x, mode="EXACT"), F.gelu, X),
        "gelu, tanh": (lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), lambda x: F.gelu(x, approximate="tanh"), X),
        "gelu, sigmoid": (lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), lambda x: x * torch.sigmoid(1.702 * x), X),
        "leaky_relu": (lambda x: mb.leaky_relu(x=x, alpha=0.1), lambda x: F.leaky_relu(x, 0.1), X),
        "linear_activation": (lambda x: mb.linear_activation(x=x, alpha=2.0, beta=0.3), lambda x: 2 * x + 0.3, X),
        "prelu": (
            lambda x: mb.prelu(x=x, alpha=np.float32([0.1, 0.2, 0.3, 0.4])),
            lambda x: F.prelu(x, torch.tensor([0.1, 0.2, 0.3, 0.4])),
            IMAGE,
        ),
        "relu": (lambda x: mb.relu(x=x), F.relu, X),
        "relu6": (lambda x: mb.relu6(x=x), F.relu6, 5 * X),
        "scaled_tanh": (lambda x: mb.scaled_tanh(x=x, alpha=2.0, beta=0.3), lambda x: 2 * torch.tanh(0.3 * x), X),
        "sigmoid": (lambda x: mb.sigmoid(x=x), torch.sigmoid, 50 * X),
        "sigmoid_hard": (lambda x: mb.sigmoid_hard(x=x, alpha=0.2, beta=0.5), lambda x: (0.2 * x + 0.5).clamp(0, 1), 3 * X),
        "silu": (lambda x: mb.silu(x=x), F.silu, 50 * X),
        "softplus": (lambda x: mb.softplus(x=x), lambda x: F.softplus(x, threshold=1e9), 30 * X),
        "softplus_parametric": (
            lambda x: mb.softplus_parametric(x=x, alpha=np.float32([1, 2, 3]), beta=np.float32([1, 0.5, 2])),
            lambda x: torch.tensor([[1.0], [2], [3]]) * F.softplus(torch.tensor([[1.0], [0.5], [2]]) * x),
            X,
        ),
        "softsign": (lambda x: mb.softsign(x=x), F.softsign, X),
        "thresholded_relu": (lambda x: mb.thresholded_relu(x=x, alpha=0.3), lambda x: torch.where(x >= 0.3, x, 0.0), X),
        # two operands
        "add": (lambda x, y: mb.add(x=x, y=y), torch.add, X, normal(1, 3, 1, seed=5)),
        "sub": (lambda x, y: mb.sub(x=x, y=y), torch.sub, X, normal(4, seed=5)),
        "mul": (lambda x, y: mb.mul(x=x, y=y), torch.mul, X, normal(4, seed=5)),
        "maximum": (lambda x, y: mb.maximum(x=x, y=y), torch.maximum, X, normal(4, seed=5)),
        "minimum": (lambda x, y: mb.minimum(x=x, y=y), torch.minimum, X, normal(4, seed=5)),
        "pow": (lambda x, y: mb.pow(x=x, y=y), torch.pow, POSITIVE, normal(4, seed=5)),
        "mod": (lambda x, y: mb.mod(x=x, y=y), torch.remainder, INTEGERS, NONZERO),
        "floor_div": (lambda x, y: mb.floor_div(x=x, y=y), torch.floor_divide, INTEGERS, NONZERO),
        "real_div": (lambda x, y: mb.real_div(x=x, y=y), torch.div, X, POSITIVE),
        "real_div, integers": (
            lambda x, y: mb.real_div(x=x, y=y),
            lambda x, y: torch.div(x, y, rounding_mode="trunc"),
            INTEGERS,
            NONZERO,
        ),
        "equal": (lambda x, y: mb.equal(x=x, y=y), torch.eq, INTEGERS, INTEGERS[:, :, ::-1].copy()),
        "not_equal": (lambda x, y: mb.not_equal(x=x, y=y), torch.ne, INTEGERS, INTEGERS[:, :, ::-1].copy()),
        "greater": (lambda x, y: mb.greater(x=x, y=y), torch.gt, INTEGERS, INTEGERS[:, :, ::-1].copy()),
        "greater_equal": (lambda x, y: mb.greater_equal(x=x, y=y), torch.ge, INTEGERS, INTEGERS[:, :, ::-1].copy()),
        "less": (lambda x, y: mb.less(x=x, y=y), torch.lt, INTEGERS, INTEGERS[:, :, ::-1].copy()),
        "less_equal": (lambda x, y: mb.less_equal(x=x, y=y), torch.le, INTEGERS, INTEGERS[:, :, ::-1].copy()),
        "logical_and": (lambda x, y: mb.logical_and(x=x, y=y), torch.logical_and, TRUTH, UNIT < 0.3),
        "logical_or": (lambda x, y: mb.logical_or(x=x, y=y), torch.logical_or, TRUTH, UNIT < 0.3),
        "logical_xor": (lambda x, y: mb.logical_xor(x=x, y=y), torch.logical_xor, TRUTH, UNIT < 0.3),
        "select": (lambda c, x, y: mb.select(cond=c, a=x, b=y), torch.where, TRUTH, X, -2 * X),
        # quantised activations
        "quantize": (
            lambda x: mb.quantize(input=x, scale=0.02, zero_point=np.int8(3), output_dtype="int8"),
            lambda x: (torch.round(x / 0.02) + 3).clamp(-128, 127),
            X,
        ),
        "dequantize": (
            lambda x: mb.dequantize(
                input=mb.quantize(input=x, scale=np.float32([0.02, 0.03, 0.04]), output_dtype="int8", axis=1),
                scale=np.float32([0.02, 0.03, 0.04]),
                axis=1,
            ),
            lambda x: torch.fake_quantize_per_channel_affine(
                x, torch.tensor([0.02, 0.03, 0.04]), torch.zeros(3, dtype=torch.int32), 1, -128, 127
            ),
            X,
        ),
    }
