"""The folder of a search's graphs: what killed searches left is removed, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from isthmus.calibration.workplace import workplace
from isthmus.exporter.errors import IsthmusError


@pytest.fixture
def ended():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def folder(tmp_path, name):
    made = tmp_path / name
    made.mkdir()
    (made / "model.onnx").write_bytes(b"weights")
    return made


def test_the_folder_is_beside_the_output_and_goes_with_the_block(tmp_path):
    with workplace(tmp_path / "deep" / "recipe.yaml") as place:
        assert not place.exists(), "what fails before there is anything to keep leaves nothing"
        assert place.parent == tmp_path / "deep"
        place.mkdir(parents=True)
        (place / "model.onnx").write_bytes(b"weights")
    assert not place.exists()
    failing = workplace(tmp_path / "recipe.yaml")
    failing.__enter__().mkdir()
    assert not failing.__exit__(KeyError, KeyError(), None)
    assert list(tmp_path.iterdir()) == [tmp_path / "deep"]


def test_what_a_killed_search_left_is_removed(tmp_path, ended):
    left = [folder(tmp_path, f".recipe.yaml.{pid}.trials") for pid in (ended, os.getpid())]
    os.utime(left[0], (0, 0))
    # A number that was given out again: the process began after the folder's last change.
    again = folder(tmp_path, f".recipe.yaml.{os.getppid()}.trials")
    os.utime(again, (1, 1))
    with workplace(tmp_path / "recipe.yaml"):
        assert list(tmp_path.iterdir()) == []


def test_what_is_not_left_by_a_killed_search_stays(tmp_path, ended):
    mine = folder(tmp_path, "mine")
    folder(tmp_path, f".recipe.yaml.{os.getppid()}.trials")  # of a process that runs
    folder(tmp_path, f".other.yaml.{ended}.trials")
    folder(tmp_path, f".recipe.yaml.x.{ended}.trials")  # of `recipe.yaml.x`
    folder(tmp_path, ".recipe.yaml.mine.trials")
    (tmp_path / f".recipe.yaml.{ended}.trials").symlink_to(mine)
    before = sorted(tmp_path.rglob("*"))
    with workplace(tmp_path / "recipe.yaml"):
        pass
    assert sorted(tmp_path.rglob("*")) == before
    assert (mine / "model.onnx").read_bytes() == b"weights"


def test_a_link_in_the_folders_place_is_refused(tmp_path):
    mine = folder(tmp_path, "mine")
    (tmp_path / f".recipe.yaml.{os.getpid()}.trials").symlink_to(mine)
    with pytest.raises(IsthmusError, match="is in the way"), workplace(tmp_path / "recipe.yaml"):
        pass
    assert (mine / "model.onnx").exists()


def test_where_no_folder_can_be_made_is_said_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(IsthmusError, match="cannot write into"), workplace(tmp_path / "file" / "recipe.yaml"):
        pass
