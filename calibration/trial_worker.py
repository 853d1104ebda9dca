"""A process that runs trials: a line of JSON in for each, and a line out. It ends when its input does, as when its parent is killed.

In: `{"folder": PATH, "on": [INDEX, …]}`. Out: `{"noise": [NUMBER, …]}` or `{"error": TEXT}`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..exporter.errors import IsthmusError
from .trials import Trials


def main() -> None:
    """Answers line by line."""
    folder, trials = "", None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if trials is None or asked["folder"] != folder:
                folder, trials = asked["folder"], Trials(Path(asked["folder"]))
            answer: dict[str, object] = {"noise": list(trials.noise(asked["on"]))}
        except IsthmusError as error:
            answer = {"error": error.message}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
