"""Arrays in a file: exactly the names that were given, and the bytes of `numpy.savez`."""

import numpy as np
import pytest

from isthmus.calibration.trials import HELD_OUT, write_facts
from isthmus.exporter.arrays import save_arrays
from isthmus.exporter.bundle import write_cases

ARRAYS = {"x": np.arange(6.0).reshape(2, 3), "case/y": np.array(2), "empty": np.ones((0, 3), np.float16), "mask": np.array([True])}


def test_the_bytes_are_those_of_savez(tmp_path):
    save_arrays(tmp_path / "ours.npz", ARRAYS)
    np.savez(tmp_path / "numpys.npz", **ARRAYS)
    assert (tmp_path / "ours.npz").read_bytes() == (tmp_path / "numpys.npz").read_bytes()


@pytest.mark.parametrize("name", ["x", "file", "allow_pickle"])
def test_a_file_holds_the_names_that_were_given(tmp_path, name):
    """With `numpy.savez` in place, `file` is no name, and `allow_pickle` one of every file where numpy does not know the keyword."""
    array = np.ones(2, np.float32)
    save_arrays(tmp_path / "a.npz", {name: array})
    write_cases(tmp_path / "b.npz", {"example": {name: array}})
    write_facts(tmp_path, switches=1, outputs=["y"], sets=[{name: array}])
    found = {}
    for file in ("a.npz", "b.npz", HELD_OUT):
        with np.load(tmp_path / file, allow_pickle=False) as held:
            found[file] = held.files
    assert found == {"a.npz": [name], "b.npz": [f"example/{name}"], HELD_OUT: [f"0/{name}"]}


def test_objects_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"[Oo]bject arrays"):
        save_arrays(tmp_path / "a.npz", {"x": np.array([{}], dtype=object)})
