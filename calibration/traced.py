"""The stages of the traced program: it computes what the module computes, and so much is lost in the target's dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..exporter.errors import Reason, UnsupportedError
from ..exporter.manifest import StageResult
from ..exporter.passes.half_precision import overflowing
from ..exporter.spec import Arrays, Tolerance
from .half import module_peaks, run_rounded
from .metrics import DEFAULT_TOLERANCES
from .verify import CaseArrays, compare_cases, flatten, judge, to_array, to_tensors


def check_trace(
    program: torch.export.ExportedProgram,
    example: Mapping[str, torch.Tensor],
    inputs: CaseArrays,
    reference: CaseArrays,
    *,
    with_peaks: bool,
) -> tuple[StageResult, dict[str, float]]:
    """The stage `torch`: the traced program against the module that it was traced from, over every case.

    Args:
        program: The traced program.
        example: The example inputs, for their types.
        inputs: Every case's inputs.
        reference: The module's outputs for them.
        with_peaks: Also record how large the values are that each module reads and computes.

    Returns:
        The stage, and module path to the largest |value|; empty without `with_peaks`.

    Raises:
        UnsupportedError: The program refuses a case: torch.export has specialised it to the example's sizes.
    """
    traced: dict[str, Arrays] = {}
    peaks: dict[str, float] = {}
    module = program.module()
    for case, arrays in inputs.items():
        tensors = to_tensors(arrays, example)
        try:
            if with_peaks:
                outputs, found = module_peaks(program, tensors)
                peaks = {path: max(peaks.get(path, 0.0), found.get(path, 0.0)) for path in peaks | found}
            else:
                with torch.no_grad():
                    outputs = module(*tensors)
        except (AssertionError, RuntimeError) as error:
            shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in arrays.items())
            raise UnsupportedError(
                "what torch.export captured holds for the example's sizes only",
                reasons=[Reason(f"{error}", where=f"case {case}: {shapes}")],
                hint="give example inputs whose dynamic sizes differ from each other, or leave the axis out of --dynamic",
            ) from error
        traced[case] = {name: to_array(t) for name, t in zip(reference[case], flatten(outputs), strict=True)}
    return judge(
        "torch", compare_cases(reference, traced), DEFAULT_TOLERANCES["fp32"], device=f"PyTorch {torch.__version__} on the CPU"
    ), peaks


def check_rounded(
    program: torch.export.ExportedProgram,
    example: Mapping[str, torch.Tensor],
    inputs: CaseArrays,
    reference: CaseArrays,
    precision: str,
    peaks: Mapping[str, float],
    tolerance: Tolerance,
) -> StageResult:
    """The stage `torch-dtype`: the traced program with values rounded to the target's dtype, over every case.

    Args:
        program: The traced program, in float32.
        example: The example inputs, for their types.
        inputs: Every case's inputs.
        reference: The module's outputs for them, in float32.
        precision: `fp16` or `bf16`.
        peaks: Module path to the largest |value|; modules that come near the dtype's largest value are not rounded.
        tolerance: The bounds.
    """
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    keep = overflowing(peaks, torch.finfo(dtype).max)
    rounded: dict[str, Arrays] = {}
    for case, arrays in inputs.items():
        outputs = run_rounded(program, to_tensors(arrays, example), dtype, keep)
        rounded[case] = {name: to_array(t) for name, t in zip(reference[case], flatten(outputs), strict=True)}
    return judge(
        "torch-dtype",
        compare_cases(reference, rounded, tolerance),
        tolerance,
        device=f"PyTorch {torch.__version__}, rounded to {precision}",
    )
