"""From a program of ATen operators to an asset, in a child process: coreai-core 1.0.0b3 ends the process for some programs."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ...exporter.errors import IsthmusError
from ...exporter.quiet import quiet
from .session import environment

_CHILD = "isthmus.targets.coreai.conversion_child"
_TAIL = 2000


def convert(
    program: ExportedProgram, path: Path, *, inputs: Sequence[str], outputs: Sequence[str], description: str, timeout: float
) -> Mapping[str, int]:
    """Writes a program as an asset: the same bytes for the same program.

    Args:
        program: In operators that coreai-torch converts; see `prepare`.
        path: The asset, `*.aimodel`, which does not exist. A copy of the weights lies beside it meanwhile.
        inputs: The names of the inputs, in order.
        outputs: The names of the outputs, in order.
        description: One sentence, shown by Xcode.
        timeout: Seconds that the conversion may take.

    Returns:
        The number of operations of each kind.

    Raises:
        IsthmusError: coreai-torch refuses the program, ends its process, or takes too long.
    """
    with tempfile.TemporaryDirectory(prefix=".coreai-", dir=path.parent) as name:
        folder = Path(name)
        request = folder / "request.json"
        stored = folder / "program.pt2"
        # The example inputs would be written as a pickle.
        program = copy.copy(program)
        program._example_inputs = None
        with quiet("torch.export"):
            torch.export.save(program, stored)
        asked = {"program": stored, "inputs": inputs, "outputs": outputs, "asset": path.absolute(), "description": description}
        request.write_text(json.dumps(asked, default=str), "utf-8")
        answer = _run(request, folder, timeout)
    if "error" in answer:
        raise IsthmusError(
            f"coreai-torch does not convert the program: {answer['error']}", hint="see the error; TORCH_LOGS=+export shows the program"
        )
    counts: dict[str, int] = answer["operators"]
    return counts


def _run(request: Path, folder: Path, timeout: float) -> dict[str, Any]:
    try:
        done = subprocess.run(  # noqa: S603 - our own module
            [sys.executable, "-m", _CHILD, str(request)],
            capture_output=True,
            timeout=timeout,
            check=False,
            cwd=folder,
            env={**environment(), "TMPDIR": str(folder)},  # the library leaves files where a process is ended
        )
    except subprocess.TimeoutExpired as error:
        raise IsthmusError(
            f"the conversion took longer than {timeout:.0f} s and was ended", hint="give it more time with --timeout"
        ) from error
    if done.stdout:
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer
    code = done.returncode
    how = f"ended its process with {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    tail = done.stderr.decode("utf-8", errors="replace").strip()[-_TAIL:]
    raise IsthmusError(
        f"coreai-core {how} while the program was converted" + (f"\nthe end of its log:\n{tail}" if tail else ""),
        hint="this is a fault of the library: change the model where it computes something unusual, or report it to Apple",
    )
