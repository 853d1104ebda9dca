"""`python -m isthmus.targets.coreai.child ASSET`: executes an asset, in a process that the run time may end.

Every line on standard input is a request, and is answered by a line on standard output, both JSON. The first answer comes unasked, when
the asset is loaded: `{"inputs": {name: [dtype, shape]}, "outputs": [name, …], "widened": N}`, where N is that of `products`. A request is
`{"inputs": FILE, "outputs": FILE}`, two `.npz` files of which the second is written; the answer is `{}`, or `{"error": TEXT}`. The process
ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

FUNCTION = "main"


def main(arguments: list[str]) -> int:
    """Serves requests; see the module's docstring."""
    # What the library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        return asyncio.run(_serve(Path(arguments[0]), answers))
    except Exception as error:  # the library raises RuntimeError, and its own types in other libraries' names
        _answer(answers, {"error": text_of(error)})
        return 1


async def _serve(path: Path, answers: TextIO) -> int:
    import numpy as np
    from coreai.authoring import AIModelAsset
    from coreai.runtime import NDArray

    from ...exporter.arrays import save_arrays

    asset, widened = _widened(AIModelAsset.load(path))
    async with asset.executable() as model:
        function = model.load_function(FUNCTION)
        described: dict[str, Any] = {}
        for name in function.desc.input_names:
            tensor = function.desc.input_descriptor(name)
            described[name] = [str(tensor.dtype), list(tensor.shape)]
        names = list(function.desc.output_names)
        _answer(answers, {"inputs": described, "outputs": names, "widened": widened})
        for line in sys.stdin:
            request = json.loads(line)
            try:
                with np.load(request["inputs"], allow_pickle=False) as data:
                    results = await function({name: NDArray(data[name]) for name in data.files})
                save_arrays(Path(request["outputs"]), {name: results[name].numpy() for name in names})
            except Exception as error:  # as above
                _answer(answers, {"error": text_of(error)})
            else:
                _answer(answers, {})
    return 0


def _widened(asset: Any) -> tuple[Any, int]:
    """The asset, or a copy in the working directory whose products are summed in float32, and the number of them; see `products`."""
    from .products import sum_in_float32

    program = asset.program
    found = sum_in_float32(program)
    return (program.save_asset(Path("widened.aimodel")), found) if found else (asset, 0)


def _answer(answers: TextIO, value: dict[str, Any]) -> None:
    print(json.dumps(value), file=answers, flush=True)


def text_of(error: Exception) -> str:
    """The first line of an error and of what caused it."""
    lines = [line.strip() for one in (error, error.__cause__) if one is not None for line in str(one).splitlines() if line.strip()]
    return ": ".join(lines[:2]) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
