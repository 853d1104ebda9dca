"""`training` is no part of the package: it is found in the repository's root, after everything that is installed."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parent.parent.parent)
if ROOT not in sys.path:
    sys.path.append(ROOT)
