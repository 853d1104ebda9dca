"""Paths as a caller gives them: a string will do wherever a path does. Public functions make a `Path` of them first."""

from __future__ import annotations

import os

StrPath = str | os.PathLike[str]
