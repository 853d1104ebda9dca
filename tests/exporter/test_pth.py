"""The reader of `.pth` files: tensors by name and nothing else, and nothing in the file runs."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from isthmus.exporter.errors import WeightsError
from isthmus.exporter.pth import TYPES, read_pth
from isthmus.exporter.spec import StateDictLayout
from isthmus.exporter.weights import load_weights


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def refused(path, match):
    with pytest.raises(WeightsError, match=match) as caught:
        read_pth(path, hint="do this")
    assert caught.value.hint == "do this"
    assert str(path) in str(caught.value)
    return caught.value.reasons


def saved(tmp_path, content, **options):
    path = tmp_path / "w.pth"
    torch.save(content, path, **options)
    return path


def replaced(path, member, change, compression=zipfile.ZIP_STORED):
    """The archive with one member changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, change(content) if name.endswith(member) else content)
    return path


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_tensors_of_every_type(tmp_path, kind):
    state = kind((str(dtype), torch.arange(6).reshape(2, 3).to(dtype)) for dtype in TYPES)
    state["view"] = torch.arange(8.0)[2:5]
    state["transposed"] = torch.arange(6.0).reshape(2, 3).T
    state["shared"] = state["view"]
    state["empty"], state["scalar"] = torch.empty(0, 3), torch.tensor(2.5)
    got = read_pth(saved(tmp_path, state), hint="")
    assert list(got) == list(state)
    for name, value in state.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value)


def test_only_where_a_layout_says_so(tmp_path):
    module = torch.nn.Linear(3, 2)
    path = saved(tmp_path, module.state_dict())
    layouts = [StateDictLayout("theirs", lambda _: False, dict, pth=pth) for pth in (False, True)]
    with pytest.raises(WeightsError, match="is a pickle"):
        load_weights(torch.nn.Linear(3, 2), path, layouts[:1])
    other = torch.nn.Linear(3, 2)
    info = load_weights(other, path, layouts)
    assert (info.layout, info.dtypes) == ("isthmus", ("F32",))
    assert torch.equal(other.weight, module.weight)
    with pytest.raises(WeightsError, match="is a pickle"):
        load_weights(torch.nn.Linear(3, 2), path.rename(path.with_suffix(".pt")), layouts)


def test_values_that_are_not_finite(tmp_path):
    path = saved(tmp_path, {"weight": torch.full((2, 3), torch.nan), "bias": torch.zeros(2)})
    with pytest.raises(WeightsError, match="not finite"):
        load_weights(torch.nn.Linear(3, 2), path, [StateDictLayout("theirs", lambda _: False, dict, pth=True)])


def test_code(tmp_path):
    """Named in the refusal, and not run."""
    path = saved(tmp_path, {"w": torch.zeros(2), "trap": Trap(tmp_path / "ran")})
    assert any("pathlib" in reason.where or "getattr" in reason.where for reason in refused(path, "calls more than what rebuilds tensors"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_put_into_the_archive(tmp_path, protocol):
    """Protocol 4 computes its names."""
    path = saved(tmp_path, {"w": torch.zeros(2)})
    refused(replaced(path, "data.pkl", lambda _: pickle.dumps(Trap(tmp_path / "ran"), protocol)), "calls more than")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "match", "where"),
    [
        (torch.zeros(2), "holds a Tensor", None),
        ([torch.zeros(2)], "holds a list", None),
        ({"model": {"w": torch.zeros(2)}, "w": torch.zeros(1)}, "1 of its 2 entries", "model"),
        ({"epoch": 3}, "1 of its 1 entries", "epoch"),
        ({3: torch.zeros(1)}, "1 of its 1 entries", "3"),
        ({"w": torch.zeros(1, dtype=torch.complex64)}, "1 of its 1 entries", "w"),
        ({"w": torch.zeros(1).expand(10**12)}, "1 of its 1 entries", "w"),
        ({"w": torch.nn.Parameter(torch.zeros(1))}, "calls more", "torch._utils._rebuild_parameter"),
        ({"w": torch.eye(2).to_sparse()}, "calls more", "torch._utils._rebuild_sparse_tensor"),
        ({"w": torch.zeros(1, device="meta")}, "calls more", "torch._utils._rebuild_meta_tensor_no_storage"),
    ],
)
def test_what_is_not_a_tensor_by_name(tmp_path, content, match, where):
    reasons = refused(saved(tmp_path, content), match)
    assert where is None or where in [reason.where for reason in reasons]


def test_files_that_are_no_archive(tmp_path):
    state = {"w": torch.arange(1000.0)}
    refused(saved(tmp_path, state, _use_new_zipfile_serialization=False), "not a whole zip archive")
    path = saved(tmp_path, state)
    content = path.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        refused(path, "not a whole zip archive")
    refused(tmp_path, "not a regular file")


def test_a_small_file_that_unpacks_to_much(tmp_path):
    path = saved(tmp_path, {"w": torch.zeros(100_000)})
    refused(replaced(path, "data.pkl", bytes, zipfile.ZIP_DEFLATED), "compressed or overlap")


def test_a_damaged_pickle(tmp_path):
    path = saved(tmp_path, {"w": torch.zeros(2)})
    refused(replaced(path, "data.pkl", lambda content: content[: len(content) // 2]), "not a whole zip archive|cannot be read")
    path = saved(tmp_path, {"w": torch.zeros(2)})
    refused(replaced(path, "data.pkl", lambda _: b"\x80\x02]q\x00e."), "cannot be read|holds a list")
