"""From a PyTorch program to an ML Program, with the lowerings of our operators."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...exporter.op import OPS
from ...exporter.quiet import quiet

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "fp16", "fp16-wide-scans")
"""How operations compute: in float32; in float16; in float16 but float32 inside the operators of ours (see `exporter.ops.mil`)."""


def convert(program: torch.export.ExportedProgram, precision: str, *, passes: Sequence[str] | None = None) -> Any:
    """Converts a program, without chatter.

    Args:
        program: From torch.export. It is decomposed no further than coremltools needs: attention stays one operation.
        precision: One of `PRECISIONS`.
        passes: The names of coremltools' passes to run; its default ones when None.

    Returns:
        A `coremltools.models.MLModel` for iOS 18 and macOS 15, not loaded: on Linux nothing could run it.

    Raises:
        ValueError: The precision is none of these.
        UnsupportedError: A lowering refuses the program.
        Exception: What coremltools raises for a program that it cannot convert.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"got precision {precision!r}, expected one of {', '.join(PRECISIONS)}")
    with quiet("coremltools"):
        import coremltools as ct

        for name in OPS:
            if OPS[name].has("coreml"):
                OPS[name].part("coreml")
        from ...exporter.ops.mil import float16_around

        named = {"fp32": ct.precision.FLOAT32, "fp16": ct.precision.FLOAT16}
        compute = named[precision] if precision in named else float16_around()
        options = {} if passes is None else {"pass_pipeline": ct.PassPipeline(list(passes), "chosen")}
        # coremltools collects garbage after every conversion, which takes most of a second where torch is loaded: what exists already is
        # set aside meanwhile.
        gc.freeze()
        try:
            return ct.convert(
                program.run_decompositions({}),
                minimum_deployment_target=ct.target.iOS18,
                skip_model_load=True,
                compute_precision=compute,
                **options,
            )
        except Exception as error:
            # A conversion that fails leaves a temporary folder to the garbage collection of its frames, which warns of it.
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            gc.unfreeze()
