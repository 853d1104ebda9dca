"""Runs PyTorch and an artifact over the same cases, one after the other, and says how far apart they are."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ..exporter.errors import IsthmusError, MachineError, Reason, UnsupportedError
from ..exporter.manifest import OutputMetrics, StageResult
from ..exporter.quiet import quiet
from ..exporter.runner import Runner
from ..exporter.spec import Arrays, Sampler, Samples, Tolerance
from ..exporter.target import Stage
from .metrics import check, compare

LOGGER = logging.getLogger("isthmus.verify")

CaseArrays = Mapping[str, Mapping[str, np.ndarray[Any, Any]]]

SAMPLES = "samples"
"""The case whose rows are pictures, or the latents of them."""

SAMPLE_TOLERANCES: Mapping[str, Tolerance] = {
    # A sampler feeds each step's error into the next, so pictures are held to what an eye and a classifier can tell, not to rounding:
    # 60 dB is a quarter of one grey level in 8 bits, 40 dB some two and a half.
    "fp32": Tolerance(min_psnr=60.0),
    "fp16": Tolerance(min_psnr=40.0),
    # What their outputs are held to: 30 dB is a rms difference of 3 % of black to white.
    "bf16": Tolerance(min_psnr=40.0),
    "fp8": Tolerance(min_psnr=30.0),
    # ONNX Runtime's pictures of dit-digits, sana-digits and diffussm-digits, ranges by max, weights to nearest: 52.6, 43.0 and 48.6 dB in
    # int8. Core ML's of dit-digits: 46.7 dB in w8a8. The bound is 8 dB below the worst, for other seeds and machines: 1.8 % of black to
    # white. Core ML's int8, of weights alone, is nearer, and held to the same.
    "int8": Tolerance(min_psnr=35.0),
    "w8a8": Tolerance(min_psnr=35.0),
    # 34.2, 32.5 and 33.5 dB in int4, blocks of 32, to nearest (41.8 by GPTQ on dit-digits); again some 8 dB below the worst.
    "int4": Tolerance(min_psnr=25.0),
}


def to_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A copy of the tensor's values as numpy has them; bfloat16, which numpy lacks, as float32.

    A copy, because a module may return its own state, or an input that it changes later.
    """
    tensor = tensor.detach().cpu()
    return np.array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(), copy=True)


def to_tensors(arrays: Arrays, like: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Copies of the arrays as tensors, in the types of the example: a module may change its inputs in place."""
    return tuple(torch.from_numpy(np.array(array, copy=True)).to(like[name].dtype) for name, array in arrays.items())


def flatten(outputs: object) -> list[torch.Tensor]:
    """The tensors among the outputs of a module, in the order of torch's pytrees."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def module_runner(
    module: nn.Module, example: Mapping[str, torch.Tensor], output_names: tuple[str, ...] | None = None
) -> Callable[[Arrays], Arrays]:
    """One call of a PyTorch module, inputs and outputs as numpy arrays by name.

    Args:
        module: In eval mode.
        example: Example inputs, for the inputs' types.
        output_names: Names of the outputs; `output`, or `output_0`, `output_1`, … when they are not known.

    Returns:
        The call. It raises IsthmusError when the module does.
    """

    def run(inputs: Arrays) -> Arrays:
        try:
            with torch.no_grad(), quiet():
                result = module(*to_tensors(inputs, example))
        except Exception as error:  # the user's code raises what it likes
            shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in inputs.items())
            raise IsthmusError(
                f"the PyTorch module failed: {type(error).__name__}: {error}",
                reasons=[Reason(f"the inputs were {shapes}")],
                hint="check the example inputs; where an axis is dynamic, the module has to run at both ends of its range",
            ) from error
        outputs = flatten(result)
        if not outputs:
            raise UnsupportedError(
                f"{type(module).__name__} gives no tensor, got {type(result).__name__}", hint="wrap it in a module that returns tensors"
            )
        stem = "output"
        while any(name.startswith(stem) for name in example):  # an input may be called so
            stem += "_"
        names = output_names or ((stem,) if len(outputs) == 1 else tuple(f"{stem}_{i}" for i in range(len(outputs))))
        if len(names) != len(outputs):
            raise IsthmusError(f"the PyTorch module gave {len(outputs)} tensors, expected {len(names)}")
        return {name: to_array(t) for name, t in zip(names, outputs, strict=True)}

    return run


def compare_cases(reference: CaseArrays, candidate: CaseArrays, tolerance: Tolerance | None = None) -> list[OutputMetrics]:
    """Metrics for every case and output of the reference; with the `excess` over the tolerance's atol and rtol, where it sets them."""
    return [
        compare(array, candidate[case][name], case=case, output=name, tolerance=tolerance)
        for case, outputs in reference.items()
        for name, array in outputs.items()
    ]


def judge(
    name: str, metrics: Iterable[OutputMetrics], tolerance: Tolerance, *, device: str, samples: Tolerance | None = None
) -> StageResult:
    """The verdict of a stage that was executed: `verified` when every bound holds, else `failed` with all reasons.

    Args:
        name: The stage's name.
        metrics: What was measured; rows of case `samples` are pictures.
        tolerance: The bounds of the outputs.
        device: What executed it.
        samples: The bounds of the pictures.
    """
    rows = tuple(metrics)
    reasons = check([m for m in rows if m.case != SAMPLES], tolerance)
    reasons += check([m for m in rows if m.case == SAMPLES], samples or tolerance)
    return StageResult(
        name=name,
        verdict="failed" if reasons else "verified",
        reason="; ".join(map(str, reasons)),
        metrics=rows,
        device=device,
        tolerance=_bounds(tolerance),
        sample_tolerance=_bounds(samples or tolerance) if any(m.case == SAMPLES for m in rows) else None,
    )


def _bounds(tolerance: Tolerance) -> dict[str, float]:
    return {name: bound for name, bound in dataclasses.asdict(tolerance).items() if bound is not None}


def run_stage(
    stage: Stage,
    inputs: CaseArrays,
    reference: CaseArrays,
    tolerance: Tolerance,
    *,
    sampler: Sampler | None = None,
    pictures: Samples | None = None,
    seed: int = 0,
    sample_tolerance: Tolerance | None = None,
) -> tuple[StageResult, Samples | None]:
    """Executes an artifact at one stage over every case, and the sampler over it where there is one.

    Args:
        stage: The stage.
        inputs: Every case's inputs. The case `samples` is for stages that draw whole pictures, and the others are for the rest.
        reference: PyTorch's outputs.
        tolerance: The bounds of the outputs.
        sampler: How pictures are made.
        pictures: PyTorch's pictures from the same sampler and seed.
        seed: The sampler's seed.
        sample_tolerance: The bounds of the pictures.

    Raises:
        MachineError: The stage is required, and this machine cannot run it.

    Returns:
        The result, and the artifact's pictures. A machine without the run time gives `not run`; an artifact that its run time refuses, or
        that fails while it runs, gives `blocked`.
    """
    if stage.open is None:
        return StageResult(name=stage.name, verdict="not run", reason=stage.reason), None
    samples = None
    cases = {case: arrays for case, arrays in inputs.items() if (case == SAMPLES) == stage.sampling}
    try:
        with stage.open() as runner:
            device = runner.device
            metrics = [row for case, arrays in cases.items() for row in _run_case(runner, case, arrays, reference[case], tolerance)]
            if sampler is not None and pictures is not None and not stage.sampling:
                samples = sampler(runner.run, np.random.Generator(np.random.PCG64(seed)))
                metrics.append(compare(pictures.images, samples.images, case=SAMPLES, output="images"))
    except MachineError as error:
        if stage.required:
            raise
        LOGGER.debug("stage %s", stage.name, exc_info=error)
        return StageResult(name=stage.name, verdict="not run", reason=str(error)), None
    except IsthmusError as error:
        LOGGER.debug("stage %s", stage.name, exc_info=error)
        return StageResult(name=stage.name, verdict="blocked", reason=str(error)), None
    return judge(stage.name, metrics, tolerance, device=device, samples=sample_tolerance), samples


def _run_case(runner: Runner, case: str, inputs: Arrays, reference: Arrays, tolerance: Tolerance) -> list[OutputMetrics]:
    outputs = runner.run(inputs)
    if set(outputs) != set(reference):
        raise IsthmusError(f"the artifact's outputs are {', '.join(outputs)}, expected {', '.join(reference)}")
    return [compare(array, outputs[name], case=case, output=name, tolerance=tolerance) for name, array in reference.items()]
