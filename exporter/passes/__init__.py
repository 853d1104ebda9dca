"""Passes over onnx_ir models, one a file. They stand in for torch.onnx.export's own optimiser, which deletes small epsilons."""

from ._sequence import optimise, passes
from .scope import module_of, operator_of

__all__ = ["module_of", "operator_of", "optimise", "passes"]
