"""Bundles: written whole or not at all, and refused when they are not what they say."""

import errno
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from isthmus.exporter import bundle as bundles
from isthmus.exporter.bundle import check_integrity, read_cases, read_manifest, write_cases, write_manifest
from isthmus.exporter.destination import check_destination, rewriting, write_whole, writing
from isthmus.exporter.errors import IntegrityError, IsthmusError, UsageError
from isthmus.exporter.manifest import Manifest, OutputMetrics, StageResult, WeightsInfo, weakest


def _manifest(**changes: object) -> Manifest:
    fields = {"model": "m", "target": "t", "precision": "fp32", "inputs": (), "outputs": (), "verdict": "verified", "stages": ()}
    return Manifest(**{**fields, "weights": WeightsInfo(origin="random"), **changes})


def _write(destination: Path, *, force: bool = False, text: str = "one") -> None:
    with writing(destination, force=force) as folder:
        (folder / "sub").mkdir()
        (folder / "model.onnx").write_text(text)
        (folder / "sub" / "data").write_bytes(b"\0" * 100)
        write_manifest(folder, _manifest())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _write(tmp_path / "b")
    return tmp_path / "b"


# Written whole or not at all


def test_a_bundle_appears_complete(folder):
    assert sorted(p.name for p in folder.parent.iterdir()) == ["b"]
    manifest = read_manifest(folder)
    assert set(manifest.files) == {"model.onnx", "sub/data"}
    assert manifest.files["model.onnx"] == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"  # sha256sum of "one"
    check_integrity(folder, manifest)


def test_a_block_that_raises_leaves_nothing(tmp_path):
    def fail() -> None:
        with writing(tmp_path / "b", force=False) as partial:
            (partial / "model.onnx").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_a_bundle_and_keeps_it_when_the_export_fails(folder):
    def fail() -> None:
        with writing(folder, force=True):
            raise RuntimeError("late")

    with pytest.raises(RuntimeError, match="late"):
        fail()
    assert (folder / "model.onnx").read_text() == "one"
    _write(folder, force=True, text="two")
    assert (folder / "model.onnx").read_text() == "two"
    assert [p.name for p in folder.parent.iterdir()] == ["b"]


def test_the_old_bundle_comes_back_when_the_new_one_cannot_take_its_place(folder, monkeypatch):
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        _write(folder, force=True, text="two")
    assert (folder / "model.onnx").read_text() == "one"
    assert [p.name for p in folder.parent.iterdir()] == ["b"]


def test_an_existing_output_needs_force(folder):
    with pytest.raises(UsageError, match="exists") as caught:
        check_destination(folder, force=False)
    assert "--force" in caught.value.hint
    check_destination(folder, force=True)


@pytest.mark.parametrize("make", ["folder", "file", "dangling link"])
def test_force_does_not_replace_what_is_not_a_bundle(tmp_path, make):
    path = tmp_path / "precious"
    if make == "folder":
        path.mkdir()
        (path / "thesis.tex").touch()
    elif make == "file":
        path.touch()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is not a bundle"):
        check_destination(path, force=True)


def test_force_takes_an_empty_folder(tmp_path):
    (tmp_path / "b").mkdir()
    _write(tmp_path / "b", force=True)
    assert read_manifest(tmp_path / "b").model == "m"


@pytest.mark.parametrize("parent", ["/proc", "/dev/null", "file"])
def test_an_unwritable_parent_is_an_error(tmp_path, parent):
    if parent == "file":
        parent = tmp_path / "file"
        parent.touch()
    with pytest.raises(IsthmusError, match="cannot write into") as caught:
        check_destination(Path(parent) / "b", force=False)
    assert "-o" in caught.value.hint
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, number):
    def fail() -> None:
        with writing(tmp_path / "b", force=False) as partial:
            (partial / "model.onnx").write_text("half")
            raise OSError(number, os.strerror(number))

    with pytest.raises(IsthmusError, match=r"cannot write the bundle .* MiB free"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_the_leftovers_of_dead_processes_are_removed_and_of_living_ones_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        for process in (dead, alive):
            partial = tmp_path / f".b.{process.pid}.partial"
            partial.mkdir()
            (partial / "model.onnx").touch()
        (tmp_path / f".other.{dead.pid}.partial").mkdir()
        _write(tmp_path / "b")
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([f".b.{alive.pid}.partial", f".other.{dead.pid}.partial", "b"])
    finally:
        alive.communicate(b"\n")


# Integrity


def test_every_difference_is_listed(folder):
    manifest = read_manifest(folder)
    data = bytearray((folder / "sub" / "data").read_bytes())
    data[50] ^= 1
    (folder / "sub" / "data").write_bytes(data)
    (folder / "model.onnx").unlink()
    (folder / "extra.txt").touch()
    with pytest.raises(IntegrityError) as caught:
        check_integrity(folder, manifest)
    assert caught.value.exit_code == 1
    assert [r.where for r in caught.value.reasons] == ["model.onnx", "sub/data", "extra.txt"]
    assert [r.what.split()[0] for r in caught.value.reasons] == ["the", "sha256", "the"]


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/../../outside", "link"])
def test_a_path_out_of_the_bundle_is_refused(folder, name):
    (folder.parent / "outside").write_text("secret")
    if name == "link":
        (folder / "link").symlink_to(folder.parent / "outside")
    outside = bundles.sha256_of(folder.parent / "outside")
    manifest = _manifest(files={**read_manifest(folder).files, name: outside})
    with pytest.raises(IntegrityError) as caught:
        check_integrity(folder, manifest)
    assert (caught.value.reasons[0].where, caught.value.reasons[0].what) == (name, "the path leads out of the bundle")


def test_a_folder_without_a_manifest_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="holds no manifest"):
        read_manifest(tmp_path)
    with pytest.raises(UsageError, match="is not a bundle"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:100], "is not a manifest"),
        (lambda _: "[]", "is not a manifest"),
        (lambda text: text.replace('"model": "m"', '"model": 3'), "model: "),
        (lambda text: text.replace('"verdict": "verified"', '"verdict": "perfect"'), "verdict: "),
        (lambda text: text.replace('"model":', '"modell":'), "is not a manifest"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "has schema 2, expected 1"),
        (lambda _: "[" * 100_000, "is not a manifest"),
    ],
)
def test_a_damaged_manifest_is_refused(folder, change, message):
    path = folder / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(IntegrityError, match=message):
        read_manifest(folder)


def test_a_huge_manifest_is_not_read(folder):
    with (folder / "manifest.json").open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(IntegrityError, match="larger than 64 MiB"):
        read_manifest(folder)


def test_the_manifest_round_trips_and_infinity_is_valid_json(folder):
    metrics = OutputMetrics(
        case="example", output="y", shape=(1, 2), max_abs=0, mean_abs=0, range=1, max_relative=0, relative_l2=0, cosine=1,
        sqnr_db=float("inf"), psnr_db=float("inf"),
    )  # fmt: skip
    manifest = write_manifest(folder, _manifest(stages=(StageResult(name="onnx", verdict="verified", metrics=(metrics,)),)))
    assert read_manifest(folder) == manifest

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    value = json.loads((folder / "manifest.json").read_text(), parse_constant=refuse)
    assert value["schema"] == 1
    assert value["stages"][0]["metrics"][0]["psnr_db"] == "inf"


def test_the_weakest_verdict_is_that_of_the_stages_that_were_run():
    def stages(*verdicts):
        return tuple(StageResult(name="onnx", verdict=v) for v in verdicts)

    assert weakest(stages("verified", "not run")) == "verified"
    assert weakest(stages("verified", "lowered", "built")) == "lowered"
    assert weakest(stages("blocked", "failed", "verified")) == "failed"
    assert weakest(stages("not run")) == "not run"
    assert weakest(()) == "not run"


# Reference tensors


def test_tensors_round_trip(tmp_path):
    rng = np.random.Generator(np.random.PCG64(0))
    cases = {
        "example": {"x": rng.standard_normal((2, 3), dtype=np.float32), "t": np.array([1, 2], dtype=np.int64)},
        "second": {"x": rng.standard_normal((0, 3)).astype(np.float16), "flag": np.array(True)},
    }
    write_cases(tmp_path / "reference" / "inputs.npz", cases)
    got = read_cases(tmp_path / "reference" / "inputs.npz")
    assert {case: list(tensors) for case, tensors in got.items()} == {case: list(tensors) for case, tensors in cases.items()}
    for case, tensors in cases.items():
        for name, array in tensors.items():
            assert got[case][name].dtype == array.dtype
            np.testing.assert_array_equal(got[case][name], array)


def test_objects_are_neither_written_nor_read(tmp_path):
    objects = np.array([{"a": 1}], dtype=object)
    with pytest.raises(ValueError, match=r"[Oo]bject arrays"):
        write_cases(tmp_path / "a.npz", {"example": {"x": objects}})
    np.savez(tmp_path / "b.npz", **{"example/x": objects})
    with pytest.raises(IntegrityError, match=r"b\.npz cannot be read as tensors"):
        read_cases(tmp_path / "b.npz")


def test_a_zip_that_unpacks_to_too_much_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("example/x.npy", b"\0" * 10**7)
    assert path.stat().st_size < 10**5
    with pytest.raises(IntegrityError, match="unpacks to 10000000 bytes, expected at most 1000000"):
        read_cases(path, limit_bytes=10**6)


@pytest.mark.parametrize("damage", ["truncated", "not a zip", "bad npy", "lying shape"])
def test_damaged_tensors_are_refused(tmp_path, damage):
    path = tmp_path / "a.npz"
    write_cases(path, {"example": {"x": np.zeros((100, 100))}})
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "not a zip":
        path.write_bytes(b"PK" + b"\0" * 100)
    else:
        header = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }" if damage == "lying shape" else "nonsense"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("example/x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 100)
    with pytest.raises(IntegrityError, match=r"cannot be read as tensors|says 8000000000000 bytes"):
        read_cases(path)


def test_the_leftover_of_an_earlier_process_of_the_same_number_is_removed(tmp_path):
    """In a container every run may be process 1."""
    leftover = tmp_path / f".b.{os.getpid()}.partial"
    leftover.mkdir()
    (leftover / "model.onnx").write_text("half")
    _write(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


def test_a_bundle_killed_between_its_renames_comes_back(tmp_path):
    _write(tmp_path / "b", text="old")
    (tmp_path / "b").rename(tmp_path / f".b.{os.getpid()}.replaced")
    with pytest.raises(UsageError, match="exists"), writing(tmp_path / "b", force=False):
        pass
    assert (tmp_path / "b" / "model.onnx").read_text() == "old"


@pytest.mark.parametrize("name", ["n" * 240, "with spaces and [brackets]*", "größer"])
def test_names_that_file_systems_allow(tmp_path, name):
    _write(tmp_path / name)
    _write(tmp_path / name, force=True, text="two")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "model.onnx").read_text() == "two"


def test_a_rewritten_bundle_replaces_the_old_one_and_a_failure_leaves_it(tmp_path):
    bundle = tmp_path / "bundle"
    (bundle / "plugins").mkdir(parents=True)
    (bundle / "manifest.json").write_text("{}")
    (bundle / "plugins" / "small").write_text("as it was")
    (bundle / "large").write_bytes(b"0" * 2**21)
    inode = (bundle / "large").stat().st_ino

    def fail(folder):
        (folder / "plugins" / "small").write_text("changed")
        bundles.write_text(folder / "large", "changed")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), rewriting(bundle) as folder:
        fail(folder)
    assert (bundle / "plugins" / "small").read_text() == "as it was"
    assert (bundle / "large").stat().st_size == 2**21

    with rewriting(bundle) as folder:
        bundles.write_text(folder / "plugins" / "small", "changed")
        (folder / "engine.plan").write_bytes(b"new")
    assert (bundle / "plugins" / "small").read_text() == "changed"
    assert (bundle / "engine.plan").read_bytes() == b"new"
    assert (bundle / "large").stat().st_ino == inode  # linked, not copied
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_trusted_files_may_be_others(folder):
    manifest = read_manifest(folder)
    (folder / "model.onnx").write_text("theirs")
    (folder / "library").write_text("theirs")
    with pytest.raises(IntegrityError):
        check_integrity(folder, manifest)
    check_integrity(folder, manifest, trusted=("model.onnx", "library"))
    (folder / "model.onnx").unlink()
    with pytest.raises(IntegrityError):
        check_integrity(folder, manifest, trusted=("model.onnx", "library"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "f"
    write_whole(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    write_whole(path, b"\0")
    with pytest.raises(IsthmusError, match=r"cannot write .*/new/f/g"):
        write_whole(path / "g", "")

    def replace(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(IsthmusError, match="No space left on device") as error:
        write_whole(path, "other", hint="free some space")
    assert error.value.hint == "free some space"
    assert path.read_bytes() == b"\0"
    assert list(path.parent.iterdir()) == [path]
