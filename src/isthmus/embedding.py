"""Writes a program around a bundle's artifact, in the language of the platform that runs it. Part of the Python API, see `pipeline`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.exporter import bundle as bundles
from isthmus.exporter.destination import check_destination, writing
from isthmus.exporter.errors import IsthmusError, UnknownNameError, UnsupportedError, UsageError
from isthmus.exporter.manifest import MANIFEST, Manifest
from isthmus.exporter.options import check_settings
from isthmus.exporter.paths import StrPath
from isthmus.exporter.sampling import GraphSampler, LoopSampler
from isthmus.exporter.spec import MODELS
from isthmus.exporter.target import TARGETS
from isthmus.results import Progress, Silent

MARKER = "isthmus.json"
"""The file of a program that says what it was made from, and by which `force` knows one."""


@dataclass(frozen=True)
class EmbedResult:
    """What was written around an artifact.

    Attributes:
        path: The program's folder.
        name: What it is called in its language.
        language: The language.
        manifest: The bundle's manifest.
        files: Its files, relative to `path`.
        notes: Facts for people: what was not compiled, and what was left out.
    """

    path: Path
    name: str
    language: str
    manifest: Manifest
    files: tuple[str, ...]
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "path": str(self.path),
            "name": self.name,
            "language": self.language,
            "model": self.manifest.model,
            "target": self.manifest.target,
            "files": list(self.files),
            "notes": list(self.notes),
            "exit_code": 0,
        }


def check_embedding(bundle: Path, language: str, output: Path, *, force: bool) -> Manifest:
    """Refuses a call that cannot succeed, before anything is read or imported for it. Returns the bundle's manifest.

    Raises:
        UnknownNameError: No target has the language.
        UsageError: The folder is not a bundle; the output exists, or lies in the bundle or around it.
        UnsupportedError: The bundle's target does not have the language.
    """
    speaking = {name: TARGETS[name].languages for name in TARGETS}
    known = sorted({word for words in speaking.values() for word in words})
    if language not in known:
        raise UnknownNameError("language", language, known)
    manifest = bundles.read_manifest(bundle)
    if language not in speaking.get(manifest.target, ()):
        able = " or ".join(name for name, words in speaking.items() if language in words)
        raise UnsupportedError(
            f"a bundle for {manifest.target} cannot be embedded in {language}", hint=f"export {manifest.model} with --target {able}"
        )
    here, there = output.resolve(), bundle.resolve()
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise UsageError(f"the output {output} lies in the bundle {bundle}, or around it", hint="give another -o")
    check_destination(output, force=force, marker=MARKER, kind="program that `isthmus embed` wrote")
    return manifest


def embed(bundle: StrPath, language: str, output: StrPath, *, force: bool = False, progress: Progress | None = None) -> EmbedResult:
    """Writes a program that runs a bundle's artifact on its device: a Swift package for Core ML.

    The program is written whole or not at all. Nothing of it is compiled.

    Args:
        bundle: The bundle's folder.
        language: One of the languages of the bundle's target: `swift`.
        output: The program's folder.
        force: Replace a program that exists there.
        progress: Told of every step.

    Raises:
        UsageError: The folder is not a bundle, the language is unknown, or the output exists.
        UnsupportedError: The bundle's target does not have the language, or the program cannot take the model; all reasons are listed.
        IntegrityError: A file of the bundle is changed, missing or additional.
        IsthmusError: The output cannot be written.
    """
    bundle, output = Path(bundle), Path(output)
    step = (progress or Silent()).step
    manifest = check_embedding(bundle, language, output, force=force)
    with step("checking the files"):
        bundles.check_integrity(bundle, manifest)
    with step(f"writing the {language} program"), writing(output, force=force, marker=MARKER, kind="program") as folder:
        embedded = TARGETS[manifest.target]().embed(bundle, manifest, language, folder, sampler=_sampler(manifest))
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        origin = {
            "language": language,
            "name": embedded.name,
            "model": manifest.model,
            "target": manifest.target,
            "precision": manifest.precision,
            "manifest": bundles.sha256_of(bundle / MANIFEST),
            "notes": embedded.notes,
            "files": {name: bundles.sha256_of(folder / name) for name in files},
        }
        (folder / MARKER).write_text(json.dumps(origin, indent=2) + "\n", "utf-8")
    return EmbedResult(output, embedded.name, language, manifest, (*files, MARKER), embedded.notes)


def _sampler(manifest: Manifest) -> LoopSampler | None:
    """How pictures are drawn with a registered model that has trained weights, at the settings that it was exported with."""
    if manifest.model not in MODELS or manifest.weights.origin not in ("shipped", "file"):
        return None
    settings, reasons = check_settings(MODELS.entry(manifest.model), manifest.config)
    if reasons:
        raise IsthmusError(f"the manifest's settings of {manifest.model} cannot be used", reasons=reasons, hint="export again")
    try:
        sampler = MODELS[manifest.model].spec(settings).sampler
    except ValueError as error:
        raise IsthmusError(f"the manifest's settings of {manifest.model} contradict each other: {error}", hint="export again") from error
    return sampler.loop() if isinstance(sampler, GraphSampler) else None
