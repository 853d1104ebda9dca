"""Programs of small modules: rewritten, executed in PyTorch, converted to Core ML and interpreted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from isthmus.exporter.quiet import quiet
from isthmus.targets.coreml.convert import convert, decomposed
from isthmus.targets.coreml.interpreter import Interpreter, load
from isthmus.targets.coreml.layout.graph import Editor

Rewrite = Callable[[Editor], None]


class Function(nn.Module):
    """A function as a module, whose parameters and buffers (not floating-point) are the tensors that are named."""

    def __init__(self, function: Callable[..., object], **stored: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in stored.items():
            if value.is_floating_point():
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, *inputs: torch.Tensor) -> object:
        return self.function(self, *inputs)


@pytest.fixture
def function() -> type[Function]:
    return Function


@pytest.fixture
def exported() -> Callable[..., ExportedProgram]:
    """The program of a module, as the target hands it over."""

    def export(module: nn.Module, *inputs: torch.Tensor, **options: object) -> ExportedProgram:
        with quiet("torch.export"):
            return decomposed(torch.export.export(module.eval(), inputs, strict=False, **options))

    return export


@pytest.fixture
def rewritten() -> Callable[..., ExportedProgram]:
    """The program after these rewrites, and nothing else."""

    def rewrite(program: ExportedProgram, *rewrites: Rewrite) -> ExportedProgram:
        editor = Editor(program)
        for each in rewrites:
            each(editor)
        return editor.finish()

    return rewrite


def _run(program: ExportedProgram, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    results = program.module()(*(x.clone() for x in inputs))
    return [r.detach() for r in (results if isinstance(results, tuple | list) else (results,)) if r is not None]


@pytest.fixture
def same() -> Callable[..., None]:
    """Both programs give the same, in the dtype of their inputs: relative to the largest magnitude of each output."""

    def check(program: ExportedProgram, given: ExportedProgram, *inputs: torch.Tensor, bound: float = 0.0) -> None:
        got, expected = _run(program, inputs), _run(given, inputs)
        assert len(got) == len(expected) > 0
        for a, b in zip(got, expected, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            limit = bound or (1e-13 if b.dtype == torch.float64 else 1e-5)
            largest = b.abs().max().item() if b.numel() else 0.0
            assert b.isfinite().all(), "the reference is to be compared with"
            torch.testing.assert_close(a, b, rtol=0.0, atol=limit * largest)

    return check


@pytest.fixture
def in_core_ml() -> Callable[..., list[np.ndarray]]:
    """What the program gives in Core ML's interpreter, with float16 numbers unless told otherwise; float32 arrays."""

    def run(
        program: ExportedProgram, *inputs: torch.Tensor, precision: str = "fp16", model: list[object] | None = None
    ) -> list[np.ndarray]:
        loaded = load(convert(program, precision))
        if model is not None:
            model.append(loaded)
        interpreter = Interpreter(loaded)
        arrays = [x.numpy() for x in inputs]
        results = interpreter.run(dict(zip(interpreter.inputs, arrays, strict=True)))
        return [r.astype(np.float32) for r in results.values()]

    return run
