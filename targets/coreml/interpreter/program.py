"""Reads ML Programs into memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ....exporter.errors import UsageError


def load(model: Any) -> Any:
    """The MIL program of a model.

    Args:
        model: A path of an `.mlpackage`, a `coremltools.models.MLModel`, or a program, which is returned as it is.

    Returns:
        The program as its specification says it (`coremltools.converters.mil.mil.Program`), not the one that the converter may still hold:
        what is read is what was serialised.

    Raises:
        UsageError: The model is not an ML Program.
    """
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load as load_specification
    from coremltools.converters.mil.mil import Program

    if isinstance(model, Program):
        return model
    if isinstance(model, str | Path):
        model = ct.models.MLModel(str(model), skip_model_load=True)
    specification = model.get_spec()
    kind = specification.WhichOneof("Type")
    if kind != "mlProgram":
        raise UsageError(f"the model is a {kind}, expected an ML Program", hint="convert it with convert_to='mlprogram'")
    return load_specification(specification, specification.specificationVersion, file_weights_dir=model.weights_dir)


def operations_in(block: Any) -> Iterator[Any]:
    """Every operation of a block and of the blocks inside it."""
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from operations_in(inner)


def used_by(operation: Any) -> Iterator[Any]:
    """Every variable that an operation reads, those read inside its blocks included."""
    for value in operation.inputs.values():
        yield from value if isinstance(value, list | tuple) else (value,)
    for block in operation.blocks:
        for inner in block.operations:
            yield from used_by(inner)
        yield from block.outputs
