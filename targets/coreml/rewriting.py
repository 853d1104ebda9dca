"""From a program in memory back to a package: what every step that changes a converted model ends with."""

from __future__ import annotations

from typing import Any

from ...exporter.memory import settled
from ...exporter.quiet import quiet


def written(program: Any, like: Any, *, same_interface: bool = True) -> Any:
    """A model of a program that was loaded and changed. coremltools' passes do not run again: they ran when the model was converted.

    Args:
        program: From `interpreter.load`, changed.
        like: The `coremltools.models.MLModel` that it came from, or one for the same systems.
        same_interface: Whether inputs, outputs and states are those of `like`, whose description is kept then; else it is made anew.

    Returns:
        A `coremltools.models.MLModel`, not loaded.

    Raises:
        Exception: What coremltools raises for a program that it cannot write.
    """
    with quiet("coremltools"):
        from coremltools.converters.mil.converter import mil_convert

        specification = like.get_spec()
        program.skip_all_passes = True
        with settled():
            return mil_convert(
                program,
                convert_from="milinternal",
                convert_to="mlprogram",
                compute_units=like.compute_unit,
                specification_version=specification.specificationVersion,
                model_description=specification.description if same_interface else None,
                skip_model_load=True,
            )
