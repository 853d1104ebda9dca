"""What garbage collection costs where torch is loaded, and memory that is given back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
from collections.abc import Iterator

LARGE = 2**26
"""Bytes of weights from which on it is worth to look through all objects for what is left of them."""


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """What is there already is not looked through for garbage while the block runs: over a traced program, one full collection takes a
    third of a second, and coremltools asks for one after every conversion. Where something is set aside already, all stays as it is.
    """
    freeze = not gc.get_freeze_count()
    if freeze:
        gc.freeze()
    try:
        yield
    finally:
        if freeze:
            gc.unfreeze()


def release(weight_bytes: int) -> None:
    """Gives back to the system what objects that refer to each other, and that nobody else refers to, hold of weights.

    Args:
        weight_bytes: The size of the weights; below `LARGE` nothing is done.
    """
    if weight_bytes <= LARGE:
        return
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
