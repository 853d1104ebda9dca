"""Writes an `.mlpackage`, the same bytes for the same model."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...exporter.quiet import quiet

_NAMESPACE = uuid.UUID("6c1d9a3e-0f1b-5a52-9a7e-2f6c0f2f7d10")
"""What the identifiers of a package's items are derived from; any fixed number would do."""


def save(model: Any, path: Path, *, description: str = "", facts: Mapping[str, str] | None = None) -> None:
    """Writes a converted model as a package.

    coremltools gives the items of a package random identifiers, and the order of protobuf's maps changes from run to run: both are made
    to depend on the content only, so that equal models are equal files.

    Args:
        model: A `coremltools.models.MLModel`, not loaded.
        path: The package, which must not exist.
        description: One sentence, shown by Xcode.
        facts: Further metadata, shown by Xcode.
    """
    with quiet("coremltools"):
        import coremltools as ct

        specification = model.get_spec()
        specification.description.metadata.shortDescription = description
        for key, value in sorted((facts or {}).items()):
            specification.description.metadata.userDefined[key] = value
        # A program of several blocks (while_loop, cond) is only saved whole when it is taken as a finished one.
        ct.models.MLModel(specification, weights_dir=model.weights_dir, skip_model_load=True).save(str(path))
    manifest = path / "Manifest.json"
    value = json.loads(manifest.read_text("utf-8"))
    names = {key: str(uuid.uuid5(_NAMESPACE, entry["path"])).upper() for key, entry in value["itemInfoEntries"].items()}
    entries = {names[key]: entry for key, entry in sorted(value["itemInfoEntries"].items(), key=lambda item: str(item[1]["path"]))}
    value |= {"itemInfoEntries": entries, "rootModelIdentifier": names[value["rootModelIdentifier"]]}
    manifest.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
    stored = path / "Data" / entries[value["rootModelIdentifier"]]["path"]
    specification = ct.models.utils.load_spec(str(path))
    stored.write_bytes(specification.SerializeToString(deterministic=True))


def size(path: Path) -> int:
    """Bytes of all files of a package."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
