"""Several functions in one package, with each weight stored once."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...exporter.errors import Reason, UsageError
from ...exporter.quiet import quiet
from .package import save as save_package

SINCE = "iOS18"
"""The oldest system that reads a package with several functions."""


def unsupported(deployment_target: str) -> list[Reason]:
    """Why a package cannot have several functions for that system; empty when it can."""
    if int(deployment_target.removeprefix("iOS")) >= int(SINCE.removeprefix("iOS")):
        return []
    return [Reason(f"several functions are read since {SINCE}, got {deployment_target}", fix=f"--minimum-deployment-target {SINCE}")]


def save(
    models: Mapping[str, Any], path: Path, *, default: str | None = None, description: str = "", facts: Mapping[str, str] | None = None
) -> None:
    """Writes one package with a function for each model; what equals a weight of another function refers to it.

    Functions stand for sizes (one for each enumerated shape, each of fixed sizes, as the Neural Engine wants them) or for uses (the first
    tokens at once and one token after the other). An application chooses one by name when it loads the package.

    Args:
        models: `coremltools.models.MLModel` by the names of the functions; each has one function.
        path: The package, which must not exist.
        default: The function that is loaded where none is named; the first when None.
        description: See `package.save`.
        facts: See `package.save`.

    Raises:
        UsageError: There are no models, a name is none of Swift's and MIL's (letters, digits, `_`), the default is no function, or a model
            is for systems before `SINCE`.
    """
    default = next(iter(models), "") if default is None else default
    reasons = [Reason("is no name of a function", where=name, fix="letters, digits and _") for name in models if not _is_name(name)]
    reasons += (
        [] if default in models else [Reason(f"is none of the functions {', '.join(models) or '(none)'}", where=default or "default")]
    )
    for name, model in models.items():
        target = f"iOS{model.get_spec().specificationVersion + _YEAR}"
        reasons += [Reason(reason.what, where=name, fix=reason.fix) for reason in unsupported(target)]
    if reasons:
        raise UsageError("these functions cannot be put into one package", reasons=reasons)
    with quiet("coremltools"), tempfile.TemporaryDirectory() as folder:
        import coremltools as ct

        described = ct.utils.MultiFunctionDescriptor()
        for name, model in models.items():
            single = Path(folder) / f"{name}.mlpackage"
            save_package(model, single)
            described.add_function(str(single), src_function_name="main", target_function_name=name)
        described.default_function_name = default
        together = Path(folder) / "together" / "model.mlpackage"
        together.parent.mkdir()
        ct.utils.save_multifunction(described, str(together))
        save_package(ct.models.MLModel(str(together), skip_model_load=True), path, description=description, facts=facts)


_YEAR = 9
"""Version 9 of the specification came with iOS 18, and each version before it with the iOS before (Model.proto of coremltools)."""


def _is_name(name: str) -> bool:
    return name.isascii() and name.isidentifier()
