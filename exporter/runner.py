"""Something that executes a model: PyTorch, ONNX Runtime, an engine, an interpreter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType

from .spec import Arrays


class Runner(ABC):
    """Executes one model. Use it as a context manager: leaving it frees the weights.

    Class attributes:
        device: What executes the model, in words, e.g. `CPUExecutionProvider`.
    """

    device: str

    @abstractmethod
    def run(self, inputs: Arrays) -> Arrays:
        """Executes the model once.

        Args:
            inputs: Every input by name, in the model's dtypes.

        Returns:
            Every output by name.

        Raises:
            IsthmusError: The inputs do not fit, or the run time failed; the message names the run time and the input.
        """

    @abstractmethod
    def close(self) -> None:
        """Frees what the runner holds. Calling it twice is allowed."""

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
