"""Executes an ONNX file in ONNX Runtime, and makes sure that it ran where it was asked to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ...exporter.errors import IsthmusError, MachineError, Reason
from ...exporter.runner import Runner
from ...exporter.spec import Arrays

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def installed() -> tuple[str, tuple[str, ...]]:
    """The version of the installed onnxruntime and its providers; `("", ())` when it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return "", ()
    # onnxruntime and onnxruntime-gpu own the same folder: removing one leaves the other importable and empty.
    if not hasattr(onnxruntime, "InferenceSession"):
        return "", ()
    return onnxruntime.__version__, tuple(onnxruntime.get_available_providers())


def check_provider(provider: Literal["cpu", "cuda"]) -> str:
    """ONNX Runtime's name of the provider.

    Raises:
        MachineError: onnxruntime is not installed, or the provider is not part of it.
    """
    version, available = installed()
    if not version:
        raise MachineError(
            "ONNX Runtime is not installed, so the artifact cannot be executed",
            hint="pip install 'isthmus[cpu]', or 'isthmus[gpu]' for CUDA; never both",
        )
    wanted = _PROVIDERS[provider]
    if wanted not in available:
        raise MachineError(
            f"this onnxruntime {version} has no {wanted}; it has {', '.join(available)}",
            hint="install onnxruntime-gpu in place of onnxruntime (pip uninstall both first), or use --execution-provider cpu",
        )
    return wanted


class OnnxRuntimeRunner(Runner):
    """A session over one ONNX file.

    Args:
        path: The ONNX file; external data lies beside it.
        provider: `cpu` or `cuda`.
        optimization: Graph optimisation level.
        threads: Threads within an operator, 0 for ONNX Runtime's choice.
        lean: Hold weights once: no packed copies beside them, which cost as much memory again and save time, and no arena, which keeps
            what one run used while the next needs other sizes.
        kernels: The library of our operators' CPU kernels; None for their bodies in the file, which is what every ONNX Runtime does.

    Raises:
        MachineError: onnxruntime is not installed, the provider is not part of it, or the session fell back to another provider.
        IsthmusError: ONNX Runtime refuses the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        provider: Literal["cpu", "cuda"] = "cpu",
        optimization: Literal["disable", "basic", "extended", "all"] = "all",
        threads: int = 0,
        lean: bool = False,
        kernels: Path | None = None,
    ) -> None:
        wanted = check_provider(provider)
        import onnxruntime as ort

        settings = ort.SessionOptions()
        settings.graph_optimization_level = {
            "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
            "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
            "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
            "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
        }[optimization]
        settings.intra_op_num_threads = threads
        settings.log_severity_level = 3  # errors; they also arrive as exceptions
        if lean:
            settings.add_session_config_entry("session.disable_prepacking", "1")
            settings.enable_cpu_mem_arena = False
            settings.enable_mem_pattern = False
        if kernels is not None:
            try:
                settings.register_custom_ops_library(str(kernels))
            except Exception as error:  # its exception classes live in a private module
                raise IsthmusError(
                    f"ONNX Runtime {ort.__version__} does not load {kernels}: {_first_line(error)}",
                    hint="delete the file; `python -m isthmus.exporter.ops.native` builds it again",
                ) from error
        try:
            self._session: Any = ort.InferenceSession(str(path), settings, providers=[wanted])
        except Exception as error:  # its exception classes live in a private module
            raise IsthmusError(
                f"ONNX Runtime {ort.__version__} refuses {path.name}: {_first_line(error)}", hint="see the error; try another --opset"
            ) from error
        used = self._session.get_providers()
        if used[0] != wanted:
            self.close()
            raise MachineError(
                f"asked for {wanted}, ONNX Runtime runs on {used[0]}",
                hint="its CUDA or cuDNN libraries did not load: run `isthmus doctor`, and see --log-level debug for the loader's message",
            )
        self.device = f"{wanted} with {kernels.name}" if kernels else wanted
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run(self, inputs: Arrays) -> Arrays:
        """Executes the model once; see `Runner.run`."""
        reasons = [Reason("the model has this input and it was not given", where=name) for name in self._inputs if name not in inputs]
        reasons += [Reason("was given and the model has no such input", where=name) for name in inputs if name not in self._inputs]
        reasons += [
            Reason(f"has dtype {inputs[name].dtype}, expected {expected}", where=name)
            for name, value in self._inputs.items()
            if name in inputs and (expected := _NUMPY_TYPES.get(value.type)) is not None and str(inputs[name].dtype) != expected
        ]
        if reasons:
            raise IsthmusError("the inputs do not fit the model", reasons=reasons)
        try:
            return dict(zip(self._outputs, self._session.run(None, dict(inputs)), strict=True))
        except Exception as error:  # its exception classes live in a private module
            raise IsthmusError(f"ONNX Runtime failed while executing the model: {_first_line(error)}") from error

    def close(self) -> None:
        """Frees the session and its weights."""
        self._session = None


_NUMPY_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
