"""Streams tokens through the recurrent export of a model, one a call, in a process that holds nothing else: `test_retnet.py` runs it.

    python token_stream.py model.onnx stream.npz kept.npz

`stream.npz` has `tokens`, the first `state`, and the `places` after which the logits and the state are kept. `kept.npz` gets `logits`,
`states` and `sizes`, the resident bytes of this process, a row a place. In a process that has exported before, these tell of what the
exports left.
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
import psutil


def main(model: str, stream: str, kept: str) -> None:
    """Raises AssertionError: a state that is not finite, which would never become so again."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    step = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run
    given = np.load(stream)
    tokens, state, places = given["tokens"], given["state"], set(given["places"].tolist())
    rows: list[np.ndarray] = []
    states: list[np.ndarray] = []
    sizes: list[int] = []
    for place in range(len(tokens)):
        logits, state = step(None, {"tokens": tokens[place : place + 1], "state": state})
        if place + 1 in places:
            assert np.isfinite(state).all(), place
            rows.append(logits[0])
            states.append(state)
            sizes.append(psutil.Process().memory_info().rss)
    np.savez(kept, logits=rows, states=states, sizes=sizes)


if __name__ == "__main__":
    main(*sys.argv[1:])
