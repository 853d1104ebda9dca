"""Runs a graph with switches (see `switches`) on held-out inputs, and measures the noise that a choice of modules makes at its outputs.

A folder holds all that is needed, so that any process that sees it can run trials::

    model.onnx (and model.onnx.data)    the graph
    held_out.npz                        INDEX/NAME: the inputs of each call
    trials.json                         {"switches": N, "outputs": [NAME, …]}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..exporter.arrays import save_arrays
from ..exporter.errors import IsthmusError, MachineError
from ..exporter.spec import Arrays

MODEL = "model.onnx"
HELD_OUT = "held_out.npz"
FACTS = "trials.json"

WORST = 1e30
"""The noise of outputs that are NaN or Inf, and of any error where the reference is 0: -300 dB."""

_SWITCH = "isthmus.switch."

Noise = tuple[float, ...]


class Trials:
    """The trials of a folder. One thread, so that every machine of one kind gives the same numbers, and processes do not get into each
    other's way.

    Args:
        folder: See `write_facts`.

    Raises:
        MachineError: onnxruntime is not installed.
        IsthmusError: The folder cannot be read, or ONNX Runtime refuses the graph.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise MachineError("trials run in ONNX Runtime, which is not installed", hint="pip install 'isthmus[cpu]'") from error
        settings = ort.SessionOptions()
        settings.log_severity_level = 4  # errors arrive as exceptions
        settings.intra_op_num_threads = settings.inter_op_num_threads = 1
        # Optimisers would see pairs of QuantizeLinear and DequantizeLinear, and compute in integers what is to be measured in float32.
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Weights are read where the file is mapped; a packed one would be a copy in every process.
        settings.add_session_config_entry("session.disable_prepacking", "1")
        try:
            facts = json.loads((folder / FACTS).read_text("utf-8"))
            self._count, self._outputs = int(facts["switches"]), [str(name) for name in facts["outputs"]]
            with np.load(folder / HELD_OUT, allow_pickle=False) as held:
                sets: dict[int, dict[str, np.ndarray[Any, Any]]] = {}
                for key in held.files:
                    index, _, name = key.partition("/")
                    sets.setdefault(int(index), {})[name] = held[key]
            self._session = ort.InferenceSession(str(folder / MODEL), settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exception classes live in a private module, and the files may hold anything
            raise IsthmusError(f"the trials in {folder} cannot be run: {str(error).splitlines()[0]}") from error
        self._sets = [sets[index] for index in sorted(sets)]
        self._reference = [self.run(inputs, ()) for inputs in self._sets]

    def run(self, inputs: Arrays, on: Collection[int]) -> Arrays:
        """The outputs by name, with some switches on.

        Raises:
            IsthmusError: ONNX Runtime fails.
        """
        switches = {f"{_SWITCH}{i}": np.array(i in on) for i in range(self._count)}
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, {**inputs, **switches}), strict=True))
        except Exception as error:  # its exception classes live in a private module
            raise IsthmusError(f"ONNX Runtime failed on a trial: {str(error).splitlines()[0]}") from error

    def noise(self, on: Collection[int]) -> Noise:
        """The energy of the error of each float output over that of the output without quantisation, over all held-out inputs."""
        errors = dict.fromkeys(self._outputs, 0.0)
        signals = dict.fromkeys(self._outputs, 0.0)
        for inputs, reference in zip(self._sets, self._reference, strict=True):
            found = self.run(inputs, on)
            for name, expected in reference.items():
                if expected.dtype.kind == "f":
                    wide = expected.astype(np.float64)
                    errors[name] += float(np.square(found[name] - wide).sum())
                    signals[name] += float(np.square(wide).sum())
        return tuple(_ratio(errors[name], signals[name]) for name in self._outputs)


def _ratio(error: float, signal: float) -> float:
    if error == 0:
        return 0.0
    ratio = error / signal if signal > 0 else WORST
    return min(ratio, WORST) if np.isfinite(ratio) else WORST


def sqnr_db(noise: Sequence[float]) -> float:
    """The signal-to-quantisation-noise ratio of the worst output, dB, from -300 to 300."""
    return float(-10 * np.log10(min(max(max(noise, default=0.0), 1 / WORST), WORST)))


def write_facts(folder: Path, *, switches: int, outputs: Sequence[str], sets: Sequence[Arrays]) -> None:
    """Writes what a folder of trials holds beside the graph."""
    arrays: Mapping[str, np.ndarray[Any, Any]] = {f"{i}/{name}": array for i, inputs in enumerate(sets) for name, array in inputs.items()}
    save_arrays(folder / HELD_OUT, arrays)
    (folder / FACTS).write_text(json.dumps({"switches": switches, "outputs": list(outputs)}), "utf-8")


def fingerprint(folder: Path, *facts: str) -> str:
    """sha256 of all that the results of a folder's trials depend on: its files, the release of ONNX Runtime, and further facts."""
    import onnxruntime as ort

    digest = hashlib.sha256(json.dumps([ort.__version__, *facts]).encode())
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        digest.update(f"\n{path.name}\n".encode())
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()
