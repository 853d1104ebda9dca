"""Reads ML Programs into memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....exporter.errors import IsthmusError, UsageError

_ACCEPTED = "_isthmus_accepted"


@dataclass(frozen=True)
class Accepted:
    """The shapes that an input of flexible shape takes.

    Attributes:
        shapes: The enumerated ones; empty when there are ranges.
        ranges: (lowest, highest) of each axis, highest None where there is no bound; empty when shapes are enumerated.
    """

    shapes: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int | None], ...] = ()

    def __contains__(self, shape: object) -> bool:
        if not isinstance(shape, tuple):
            return False
        if self.shapes:
            return shape in self.shapes
        return len(shape) == len(self.ranges) and all(
            low <= size and (high is None or size <= high) for size, (low, high) in zip(shape, self.ranges, strict=True)
        )

    def __str__(self) -> str:
        if self.shapes:
            return f"one of {', '.join(map(str, self.shapes))}"
        return "(" + ", ".join(str(a) if a == b else f"{a} to {'any' if b is None else b}" for a, b in self.ranges) + ")"


def load(model: Any) -> Any:
    """The MIL program of a model.

    Args:
        model: A path of an `.mlpackage`, a `coremltools.models.MLModel`, or a program, which is returned as it is.

    Returns:
        The program as its specification says it (`coremltools.converters.mil.mil.Program`), not the one that the converter may still hold:
        what is read is what was serialised.

    Raises:
        IsthmusError: There is no such package, or its manifest, specification or weights are missing or damaged.
        UsageError: The model is not an ML Program.
    """
    from coremltools.converters.mil.frontend.milproto.load import load as load_specification
    from coremltools.converters.mil.mil import Program

    if isinstance(model, Program):
        return model
    where = Path(model) if isinstance(model, str | Path) else None
    specification, weights = _package(where) if where else (model.get_spec(), model.weights_dir)
    kind = specification.WhichOneof("Type")
    if kind != "mlProgram":
        raise UsageError(
            f"the model is a {kind or 'specification of nothing'}, expected an ML Program", hint="convert it with convert_to='mlprogram'"
        )
    try:
        program = load_specification(specification, specification.specificationVersion, file_weights_dir=weights)
    except Exception as error:  # whatever the reader of the weights, and coremltools' own checks, raise
        raise _damaged("a weight file is missing or damaged, or the program is", where or weights, error) from error
    setattr(program, _ACCEPTED, _accepted(specification))
    if specification.description.defaultFunctionName:
        program.default_function_name = specification.description.defaultFunctionName  # coremltools 9.0 says `main` whatever it is
    return program


def _package(path: Path) -> tuple[Any, str]:
    import coremltools as ct

    if not (path / "Manifest.json").is_file():
        what = "it has no Manifest.json" if path.is_dir() else "it is not there"
        raise IsthmusError(f"{path} is no Core ML package: {what}", hint="give the folder that ends in .mlpackage, whole")
    try:
        model = ct.models.MLModel(str(path), skip_model_load=True)
        return model.get_spec(), model.weights_dir or str(path)
    except Exception as error:  # coremltools raises RuntimeError and protobuf's own
        raise _damaged("its manifest or specification is missing or damaged", path, error) from error


def _damaged(what: str, where: Any, error: Exception) -> IsthmusError:
    return IsthmusError(
        f"the Core ML package at {where} cannot be read: {what} ({error})", hint="copy the whole package again, or export it again"
    )


def accepted_shapes(program: Any, function: str) -> dict[str, Accepted]:
    """For each input of flexible shape the shapes that it takes; empty for a program that was not loaded from a specification."""
    every: dict[str, dict[str, Accepted]] = getattr(program, _ACCEPTED, {})
    return every.get(function, {})


def _accepted(specification: Any) -> dict[str, dict[str, Accepted]]:
    description = specification.description
    if description.functions:
        return {function.name: dict(_flexible(function.input)) for function in description.functions}
    return {"main": dict(_flexible(description.input))}


def _flexible(inputs: Iterable[Any]) -> Iterator[tuple[str, Accepted]]:
    for feature in inputs:
        array = feature.type.multiArrayType
        how = array.WhichOneof("ShapeFlexibility")
        if how == "enumeratedShapes":
            yield feature.name, Accepted(shapes=tuple(tuple(int(n) for n in s.shape) for s in array.enumeratedShapes.shapes))
        elif how == "shapeRange":
            sizes = array.shapeRange.sizeRanges
            yield feature.name, Accepted(ranges=tuple((int(r.lowerBound), None if r.upperBound < 0 else int(r.upperBound)) for r in sizes))


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
