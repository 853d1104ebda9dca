"""Arrays in a file by name, as `numpy.savez` writes them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Writes an `.npz` that holds the given names and no other, uncompressed. The bytes are those of `numpy.savez`.

    `numpy.savez` takes the arrays as keywords, so that an array cannot be called `file`; and before its keyword `allow_pickle` was there,
    a call with it writes an array of that name.

    Args:
        path: The file; one that is there is overwritten.
        arrays: Of any shape and dtype but object.

    Raises:
        ValueError: An array holds Python objects, which would be pickled.
        OSError: The file cannot be written.
    """
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)  # type: ignore[no-untyped-call]  # untyped
