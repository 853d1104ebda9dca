"""Apple's two packages: `coreai-torch`, which converts, and `coreai-core`, which writes and executes assets."""

from __future__ import annotations

from ...exporter.errors import MachineError

INSTALL = "pip install 'isthmus[coreai]'"


def installed() -> str:
    """The two packages and their versions in words; empty when either is not there. Imports neither."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"coreai-torch {version('coreai-torch')}, coreai-core {version('coreai-core')}"
    except PackageNotFoundError:
        return ""


def check_installed(purpose: str) -> None:
    """Refuses a machine without the packages.

    Raises:
        MachineError: They are not there.
    """
    if not installed():
        raise MachineError(f"coreai-torch is not installed, so {purpose}", hint=INSTALL)
