"""Keeps the chatter of torch and vendor libraries off the terminal, unless the user asked for it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

LOGGER = logging.getLogger("isthmus")
"""isthmus's own logger. At level DEBUG nothing is silenced."""


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Silences Python warnings, prints, and the named loggers below ERROR, while the block runs.

    What is printed goes to isthmus's logger at DEBUG. Exceptions pass unchanged.
    """
    if LOGGER.isEnabledFor(logging.DEBUG):
        yield
        return
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
