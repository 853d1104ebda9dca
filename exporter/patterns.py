"""Patterns of module paths: how options and recipes name the modules that they are for."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable


def matches(module: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern (`fnmatch`, case-sensitive) matches a module, or one that contains it.

    A pattern that begins with `=` is for the module's own path alone: attention's products belong to `blocks.0.attn`, and
    `=blocks.0.attn` names them without its projections `blocks.0.attn.qkv` and `blocks.0.attn.proj`.

    Args:
        module: A path such as `blocks.0.attn.qkv`; empty for the root.
        patterns: The patterns.
    """
    parts = module.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(
        fnmatch.fnmatchcase(module, pattern[1:]) if pattern.startswith("=") else any(fnmatch.fnmatchcase(path, pattern) for path in paths)
        for pattern in patterns
    )
