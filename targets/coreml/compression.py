"""Compressed weights: integers with scales, or indices into tables; and 8-bit activations beside 8-bit weights.

What is compressed are the weights of linear layers, convolutions and embeddings. Everything else is kept: biases, the vectors of
normalisations, and the tables that a program reads as data, such as the frequencies of a timestep (in int8 they cost 20 dB).
"""

from __future__ import annotations

import collections
import contextlib
import fnmatch
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...exporter.errors import Reason, UsageError
from ...exporter.grids import RoundedWeight
from ...exporter.quiet import quiet
from . import activations
from .interpreter import load
from .palettes import palette
from .ranges import Calibrate, Calibration
from .rewriting import written

Array = np.ndarray[Any, Any]

BLOCK = 32
"""Weights that share a scale in int4, along the input channels."""

GROUP = 16
"""Output channels that share a table, where tables are small."""

MINIMUM = 2048
"""The fewest numbers of a weight that is compressed; below it the package would not become smaller."""

DISTINCT = 16
"""A constant with no more distinct numbers than these is a mask or a table of the program, not a weight."""


@dataclass(frozen=True)
class Scheme:
    """A way to compress.

    Attributes:
        bits: Of a weight.
        since: The oldest system that reads it, by the opset that has the operation (coremltools 9.0, `ops/defs`).
        table: Whether a weight is an index into a table.
        grouped: Whether groups of channels have a table of their own, where the system reads that.
        activations: Whether activations are int8 as well.
    """

    bits: int
    since: str
    table: bool = False
    grouped: bool = False
    activations: bool = False


SCHEMES: Mapping[str, Scheme] = {
    # constexpr_affine_dequantize of iOS 16, constexpr_blockwise_shift_scale of iOS 18
    "int8": Scheme(8, "iOS16"),
    "int4": Scheme(4, "iOS18"),
    # constexpr_lut_to_dense: one table a tensor since iOS 16, one for each group of channels since iOS 18. A table of 64 numbers or more
    # is close enough for a whole tensor; small ones gain 1 to 2 dB by being many.
    "palette8": Scheme(8, "iOS16", table=True),
    "palette6": Scheme(6, "iOS16", table=True),
    "palette4": Scheme(4, "iOS16", table=True, grouped=True),
    "palette2": Scheme(2, "iOS16", table=True, grouped=True),
    # quantize and dequantize of iOS 17
    "w8a8": Scheme(8, "iOS17", activations=True),
}
"""Every way to compress, by name."""

GROUPS_SINCE = "iOS18"
"""The oldest system that reads one table for each group of channels."""

# The operations that read a weight, and by which input; the axis of the output channels follows from them.
_READERS = {
    "linear": ("weight",),
    "conv": ("weight",),
    "conv_transpose": ("weight",),
    "matmul": ("x", "y"),
    "gather": ("x",),
}


def _year(target: str) -> int:
    return int(target.removeprefix("iOS"))


def unsupported(how: str, deployment_target: str, *, group: int | None = None) -> list[Reason]:
    """Why weights cannot be compressed so for that system; empty when they can.

    Args:
        how: One of `SCHEMES`.
        deployment_target: `iOS16`, `iOS17`, …
        group: Channels with a table of their own, when that was asked for.

    Raises:
        UsageError: There is no such scheme.
    """
    scheme = _scheme(how)
    reasons = []
    if _year(deployment_target) < _year(scheme.since):
        reasons.append(
            Reason(
                f"{how} is read since {scheme.since}, got {deployment_target}", fix=f"--minimum-deployment-target {scheme.since}, or int8"
            )
        )
    if group is not None and scheme.table and _year(deployment_target) < _year(GROUPS_SINCE):
        what = f"tables for groups of {group} channels are read since {GROUPS_SINCE}, got {deployment_target}"
        reasons.append(Reason(what, fix=f"--minimum-deployment-target {GROUPS_SINCE}, or one table for each weight"))
    return reasons


def compress(
    model: Any, how: str, calibrate: Calibrate | None = None, keep: Sequence[str] = (), *, group: int | None = None
) -> tuple[Any, list[dict[str, object]]]:
    """Compresses the weights of a converted model, and for `w8a8` the inputs and outputs of the layers that read them.

    Args:
        model: A `coremltools.models.MLModel` with one function.
        how: One of `SCHEMES`.
        calibrate: What gives the ranges of the program's activations, and weights that are not rounded to nearest; for `w8a8` alone.
        keep: Patterns of weights that stay as they are, by their names in PyTorch or in the package (`blocks.0.*`, `*.proj_out.weight`).
        group: Output channels that share a table; that of the scheme when None, 0 for one table for each weight.

    Returns:
        The compressed model, not loaded; and for the manifest what was done with each constant: `name`, `operation` that reads it,
        `shape`, `bits`, `how` when it was compressed, `reason` when it was not, or not as asked.

    Raises:
        UsageError: There is no such scheme, the model's system does not read it, a pattern fits no weight, or `w8a8` has no calibration.
        IsthmusError: The model cannot be read or run.
    """
    scheme = _scheme(how)
    with quiet("coremltools"):
        program = load(model)
        target = _target(program)
        reasons = unsupported(how, target, group=group or None)
        reasons += (
            [Reason("a calibration is missing", where=how, fix="give --calibration-data or --calibration-table")]
            if scheme.activations and calibrate is None
            else []
        )
        weights = list(_constants(program))
        names = [weight.name for weight in weights]
        reasons += [
            Reason("fits no weight of the package", where=pattern, fix=f"names are like {', '.join(names[:3])}")
            for pattern in keep
            if not any(_fits(name, [pattern]) for name in names)
        ]
        if reasons:
            raise UsageError(f"the model cannot be compressed to {how}", reasons=reasons)
        if group is None:
            group = GROUP if scheme.grouped and _year(target) >= _year(GROUPS_SINCE) else 0
        done: list[dict[str, object]] = []
        configs: dict[str, Any] = {}
        calibration = calibrate(program) if calibrate is not None and scheme.activations else Calibration()
        codes: list[tuple[_Weight, RoundedWeight]] = []
        for weight in weights:
            config, note = _plan(weight, scheme, keep, group)
            entry: dict[str, object] = {"name": weight.name, "operation": weight.operation, "shape": list(weight.shape)}
            if config is None:
                entry |= {"bits": weight.bits, "reason": note}
            elif (found := _rounded(weight, calibration)) is not None:
                codes.append((weight, found))
                entry |= {"bits": scheme.bits, "how": f"{note}, {found.how}"}
            else:
                configs[weight.variable.op.name] = config
                entry |= {"bits": scheme.bits, "how": note}
            done.append(entry)
        if scheme.activations:
            taken = {*configs, *(weight.variable.op.name for weight, _ in codes)}
            layers = {op for weight in weights if weight.variable.op.name in taken for op in weight.variable.child_ops}
            done += activations.quantize(program, layers, calibration)
        for weight, found in codes:
            _store(weight, found, calibration, blocks=_year(target) >= _year(GROUPS_SINCE))
        _compress(program, scheme, configs)
        return written(program, model), done


@contextlib.contextmanager
def _names_of_its_own() -> Iterator[None]:
    """While the block runs, coremltools numbers new constants from 0 on, not on from the last program: equal models get equal names."""
    from coremltools.converters.mil import Builder

    before = Builder.name_count
    Builder.name_count = collections.defaultdict(int)
    try:
        yield
    finally:
        Builder.name_count = before


def _scheme(how: str) -> Scheme:
    if how not in SCHEMES:
        raise UsageError(f"unknown compression {how!r}", hint=f"known: {', '.join(SCHEMES)}")
    return SCHEMES[how]


def _target(program: Any) -> str:
    versions = [function.opset_version.name for function in program.functions.values()]
    return str(max(versions, key=_year))


@dataclass(frozen=True)
class _Weight:
    variable: Any
    operation: str
    """The type of the operation that reads it; several are joined by commas."""

    @property
    def name(self) -> str:
        return str(self.variable.name)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(int, self.variable.shape))

    @property
    def bits(self) -> int:
        return int(self.variable.val.dtype.itemsize * 8)


def _constants(program: Any) -> Iterator[_Weight]:
    """The constants that the package keeps in its file of weights."""
    from coremltools.converters.mil.backend.mil.load import should_use_weight_file

    from .interpreter.program import operations_in

    for function in program.functions.values():
        for operation in operations_in(function):
            if operation.op_type != "const" or not operation.outputs[0].child_ops:
                continue
            variable = operation.outputs[0]
            if isinstance(variable.val, np.ndarray) and variable.val.dtype.kind == "f" and should_use_weight_file(variable.val):
                yield _Weight(variable, ", ".join(sorted({op.op_type for op in variable.child_ops})))


def _fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether a constant's name fits one of the patterns."""
    # torch.export writes blocks.0.weight as p_blocks_0_weight, and a buffer's with b_; coremltools appends what it cast to.
    plain = re.sub(r"^[pbc]_|_promoted|_to_fp(16|32)$", "", name)
    return any(fnmatch.fnmatchcase(n, p) for pattern in patterns for p in (pattern, pattern.replace(".", "_")) for n in (name, plain))


def _plan(weight: _Weight, scheme: Scheme, keep: Sequence[str], group: int) -> tuple[Any, str]:
    """The settings for one weight and what they are in words, or None and why it is left as it is."""
    import coremltools.optimize.coreml as cto

    variable = weight.variable
    size = int(np.prod(weight.shape))
    if _fits(weight.name, keep):
        return None, "kept as asked"
    if len(weight.shape) < 2:
        return None, "a vector"
    if size < MINIMUM:
        return None, f"{size} numbers, fewer than {MINIMUM}"
    readers = [op for op in variable.child_ops if not any(op.inputs.get(key) is variable for key in _READERS.get(op.op_type, ()))]
    if readers:
        return None, f"read by {readers[0].op_type}, not as the weight of a layer"
    if not np.isfinite(variable.val).all():
        return None, "holds infinities"
    if len(np.unique(variable.val.reshape(-1)[: 64 * MINIMUM])) <= DISTINCT and len(np.unique(variable.val)) <= DISTINCT:
        return None, f"at most {DISTINCT} distinct numbers: a mask or a table"
    outputs, inputs = _channels(weight)
    if scheme.table:
        table = functools.partial(palette, bits=scheme.bits)
        if group and weight.shape[outputs] % group == 0 and weight.shape[outputs] > group:
            granularity = {"granularity": "per_grouped_channel", "group_size": group, "channel_axis": outputs}
            words = f"a table of {1 << scheme.bits} for every {group} channels"
        else:
            granularity = {"granularity": "per_tensor"}
            words = f"a table of {1 << scheme.bits}"
        return cto.OpPalettizerConfig(mode="custom", lut_function=table, weight_threshold=0, **granularity), words
    settings: dict[str, Any] = {"mode": "linear_symmetric", "dtype": f"int{scheme.bits}", "weight_threshold": 0}
    if scheme.bits == 4 and weight.shape[inputs] % BLOCK == 0:
        return cto.OpLinearQuantizerConfig(
            granularity="per_block", block_size=BLOCK, **settings
        ), f"a scale for every {BLOCK} input channels"
    if scheme.bits == 4:
        return None, f"{weight.shape[inputs]} input channels, no multiple of {BLOCK}"
    return cto.OpLinearQuantizerConfig(granularity="per_channel", **settings), "a scale for each output channel"


def _channels(weight: _Weight) -> tuple[int, int]:
    """The axes of the output and of the input channels."""
    operation, rank = weight.variable.child_ops[0], len(weight.shape)
    if operation.op_type == "conv_transpose":
        return 1, 0
    if operation.op_type == "matmul":
        first = operation.x is weight.variable
        turned = bool((operation.transpose_x if first else operation.transpose_y).val)
        return (rank - 1, rank - 2) if first == turned else (rank - 2, rank - 1)
    return 0, 1


def _rounded(weight: _Weight, calibration: Calibration) -> RoundedWeight | None:
    """The codes of a weight, where there are some, and every layer that reads it is one of a matrix."""
    layers = weight.variable.child_ops
    found = [calibration.weights.get(layer.outputs[0].name) for layer in layers]
    plain = all(layer.op_type in ("linear", "conv") and layer.weight is weight.variable for layer in layers)
    rounded = found[0]
    if rounded is None or not plain or any(other is not rounded for other in found):
        return None
    return rounded if rounded.codes.size == math.prod(weight.shape) and len(rounded.scale) == weight.shape[0] else None


def _store(weight: _Weight, rounded: RoundedWeight, calibration: Calibration, *, blocks: bool) -> None:
    """Puts codes in the place of a weight, and what the layers' outputs lack on average into their biases."""
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import types

    old = weight.variable.op
    block, dtype = old.enclosing_block, weight.variable.val.dtype
    data = rounded.codes.astype(np.int8).reshape(weight.shape)
    with block:
        for layer in list(weight.variable.child_ops):
            added = calibration.corrections.get(layer.outputs[0].name)
            if added is not None:
                before = layer.bias.val if layer.bias is not None else np.zeros(len(added))
                wide = np.float32 if layer.outputs[0].dtype == types.fp32 else np.float16
                bias = Builder.const(
                    val=(before.astype(np.float64) + added).astype(wide), before_op=layer, name=f"{layer.name}_bias_corrected"
                )
                layer.set_inputs(no_check_var_types=True, **{**layer.inputs, "bias": bias})
        if blocks:
            shape = (-1, *(1 for _ in weight.shape[1:]))
            new = Builder.constexpr_blockwise_shift_scale(
                data=data, scale=rounded.scale.astype(dtype).reshape(shape), before_op=old, name=f"{old.name}_quantized"
            )
        else:
            new = Builder.constexpr_affine_dequantize(
                quantized_data=data, zero_point=np.int8(0), scale=rounded.scale.astype(dtype), axis=np.int32(0), before_op=old,
                name=f"{old.name}_quantized",
            )  # fmt: skip
        block.replace_uses_of_var_after_op(anchor_op=old, old_var=weight.variable, new_var=new, no_check_var_types=True)
        block.remove_ops([old])


def _compress(program: Any, scheme: Scheme, configs: Mapping[str, Any]) -> None:
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    name = "compression::palettize_weights" if scheme.table else "compression::linear_quantize_weights"
    # A pass of its own: the registered one is shared, and would keep the settings.
    own = type(PASS_REGISTRY[name])(cto.OptimizationConfig(op_name_configs=dict(configs)))
    own.apply(program)
