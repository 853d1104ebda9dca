"""Reading, refusing, drawing and describing weights."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from isthmus.exporter.errors import UsageError, WeightsError
from isthmus.exporter.spec import ModelSpec, StateDictLayout
from isthmus.exporter.weights import describe, fuse, load_weights, nonfinite, random_weights, same_in_all


class Toy(nn.Module):
    """A layer, a gate that starts at zero, a kept buffer and a recomputed one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.gate = nn.Parameter(torch.zeros(4))
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("table", torch.arange(4.0, device="cpu"), persistent=False)

    def forward(self, x):
        return self.gate * self.layer(x) + self.table


def convert(state):
    out = {}
    for name in state:
        if name.startswith("part."):
            fuse(state, [f"part.{x}" for x in "abcd"], out, "layer.weight")
        elif name.startswith("copy."):
            same_in_all(state, [other for other in state if other.startswith("copy.")], out, "gate")
        else:
            out["layer.bias" if name == "bias" else name] = state[name]
    return out


FOREIGN = StateDictLayout("foreign", lambda keys: "bias" in keys, convert, config={"width": 4, "bias": True, "norm": None})
SPEC = ModelSpec(build=Toy, inputs=lambda *_: {"x": torch.zeros(1, 3)}, sizes={}, outputs=("y",), source="this test")


def source(seed=0):
    return random_weights(SPEC, seed)


def foreign_state(state):
    parts = {f"part.{x}": row[None].clone() for x, row in zip("abcd", state["layer.weight"], strict=True)}
    copies = {f"copy.{i}": state["gate"].clone() for i in range(3)}
    return parts | copies | {"bias": state["layer.bias"], "steps": state["steps"]}


@pytest.fixture
def file(tmp_path):
    save_file(source().state_dict(), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def folder_of(tmp_path, state=None, config=None):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(foreign_state(source().state_dict()) if state is None else state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"width": 4, "bias": True} if config is None else config))
    return folder


def assert_same(module, expected):
    for name, value in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


def refused(path, match, layouts=(FOREIGN,)):
    with pytest.raises(WeightsError, match=match) as caught:
        load_weights(Toy(), path, layouts)
    assert caught.value.hint
    return {reason.where: reason.what for reason in caught.value.reasons}


# --- what is read


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_own_layout(file, device):
    with torch.device(device):
        module = Toy().train()
    info = load_weights(module, file, (FOREIGN,))
    assert_same(module, source())
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    assert all(isinstance(p, nn.Parameter) for p in (module.layer.weight, module.gate))
    assert torch.equal(module.table, torch.arange(4.0))
    assert info.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (info.origin, info.path, info.layout, info.dtypes) == ("file", "w.safetensors", "isthmus", ("F32", "I64"))
    assert (info.parameters, info.bytes) == (12 + 4 + 4 + 5, 4 * 20 + 8 * 5)
    assert load_weights(Toy(), file, origin="shipped").origin == "shipped"


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float16, "F16"), (torch.bfloat16, "BF16"), (torch.float64, "F64")])
def test_other_floats_are_converted(tmp_path, dtype, stored):
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in source().state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    module = Toy()
    assert load_weights(module, tmp_path / "w.safetensors").dtypes == tuple(sorted((stored, "I64")))
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    for name, value in state.items():
        assert torch.equal(module.state_dict()[name], value.to(module.state_dict()[name].dtype))


def test_the_file_may_change_afterwards(file):
    """What was read is a copy, not a mapping of the file."""
    module = Toy()
    load_weights(module, file)
    with file.open("r+b") as stream:
        stream.truncate(0)
    assert_same(module, source())


def test_foreign_file_and_folder(tmp_path):
    folder = folder_of(tmp_path)
    for path in (folder, folder / "diffusion_pytorch_model.safetensors"):
        module = Toy()
        assert load_weights(module, path, (FOREIGN,)).layout == "foreign"
        assert_same(module, source())


def test_a_variant_is_found(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    load_weights(Toy(), folder, (FOREIGN,))
    save_file({}, folder / "diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(UsageError, match=r"bf16\.safetensors, diffusion_pytorch_model\.fp16"):
        load_weights(Toy(), folder, (FOREIGN,))


def sharded(tmp_path, rename=lambda name: name):
    folder = folder_of(tmp_path)
    whole = folder / "diffusion_pytorch_model.safetensors"
    whole.unlink()
    state = foreign_state(source().state_dict())
    names = sorted(state)
    shards = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
    for shard, keys in shards.items():
        save_file({key: state[key] for key in keys}, folder / shard)
    index = {"metadata": {}, "weight_map": {key: rename(shard) for shard, keys in shards.items() for key in keys}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards(tmp_path):
    folder = sharded(tmp_path)
    module = Toy()
    info = load_weights(module, folder, (FOREIGN,))
    assert_same(module, source())
    hashes = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("a.safetensors", "b.safetensors")]
    assert info.sha256 == hashlib.sha256("".join(hashes).encode()).hexdigest()


def test_tied_weights(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

    weight = torch.arange(9.0).reshape(3, 3)
    for name in ("first.weight", "second.weight"):
        save_file({name: weight}, tmp_path / "w.safetensors")
        module = Tied()
        load_weights(module, tmp_path / "w.safetensors")
        assert torch.equal(module.first.weight, weight)
        assert module.second.weight is module.first.weight


# --- what does not fit


def test_everything_that_does_not_fit_is_listed(tmp_path):
    state = source().state_dict()
    del state["layer.bias"]
    state |= {"gate": torch.zeros(7), "extra": torch.zeros(2, dtype=torch.float16), "steps": torch.zeros(5)}
    save_file(state, tmp_path / "w.safetensors")
    assert refused(tmp_path / "w.safetensors", "1 missing, 2 mismatched, 1 unexpected") == {
        "layer.bias": "missing; the model has float32 (4,)",
        "gate": "has F32 (7,), expected float32 (4,)",
        "steps": "has F32 (5,), expected int64 (5,)",
        "extra": "unexpected, F16 (2,); the model has no such tensor",
    }


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_other_types_do_not_pass_for_floats(tmp_path, dtype):
    save_file(source().state_dict() | {"gate": torch.zeros(4).to(dtype)}, tmp_path / "w.safetensors")
    assert list(refused(tmp_path / "w.safetensors", "1 mismatched")) == ["gate"]


def test_a_missing_part_of_a_fused_tensor_is_reported(tmp_path):
    state = foreign_state(source().state_dict())
    del state["part.c"]
    save_file(state, tmp_path / "w.safetensors")
    assert set(refused(tmp_path / "w.safetensors", "1 missing")) == {"layer.weight", "part.a", "part.b", "part.d"}


def test_parts_that_cannot_be_fused(tmp_path):
    save_file(foreign_state(source().state_dict()) | {"part.b": torch.zeros(1, 9)}, tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors", "foreign layout and cannot be converted")


@pytest.mark.parametrize("other", [torch.ones(4), torch.ones(5)])
def test_copies_that_differ(tmp_path, other):
    save_file(foreign_state(source().state_dict()) | {"copy.2": other}, tmp_path / "w.safetensors")
    assert list(refused(tmp_path / "w.safetensors", "copies of gate differ")) == ["copy.2"]


def test_nan_and_inf_are_named(tmp_path):
    state = source().state_dict()
    state["layer.weight"][1, 2] = float("nan")
    state["gate"][:2] = torch.tensor([float("inf"), float("-inf")])
    save_file(state, tmp_path / "w.safetensors")
    assert refused(tmp_path / "w.safetensors", "not finite") == {
        "gate": "0 NaN and 2 Inf among 4 values",
        "layer.weight": "1 NaN and 0 Inf among 12 values",
    }


def test_values_too_large_for_the_module_are_named(tmp_path):
    state = {name: value.double() if value.is_floating_point() else value for name, value in source().state_dict().items()}
    save_file(state | {"gate": torch.full((4,), 1e300, dtype=torch.float64)}, tmp_path / "w.safetensors")
    assert list(refused(tmp_path / "w.safetensors", "not finite")) == ["gate"]


def test_a_buffer_that_was_built_on_meta_is_named(tmp_path):
    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)
            self.register_buffer("table", torch.arange(3), persistent=False)

    with torch.device("meta"):
        module = Careless()
    save_file(Careless().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="meta device") as caught:
        load_weights(module, tmp_path / "w.safetensors")
    assert [reason.where for reason in caught.value.reasons] == ["table"]


# --- folders


def test_config_differences_are_listed(tmp_path):
    folder = folder_of(tmp_path, config={"width": 8, "norm": "rms"})
    assert refused(folder, r"config\.json describes another model") == {
        "width": "the file says 8, the model has 4",
        "bias": "the file says nothing, the model has true",
        "norm": 'the file says "rms", the model has null',
    }


@pytest.mark.parametrize("content", [None, "{", "[]", "[" * 100_000])
def test_damaged_config(tmp_path, content):
    folder = folder_of(tmp_path)
    (folder / "config.json").unlink() if content is None else (folder / "config.json").write_text(content)
    refused(folder, r"config\.json")


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "..\\a", "a\0"])
def test_an_index_may_not_leave_its_folder(tmp_path, name):
    folder = sharded(tmp_path, rename=lambda shard: name if shard.startswith("a") else shard)
    assert list(refused(folder, "outside its folder")) == [repr(name)]


def test_missing_shard(tmp_path):
    folder = sharded(tmp_path)
    (folder / "b.safetensors").unlink()
    assert list(refused(folder, "lacks shards")) == ["b.safetensors"]


def test_a_tensor_in_two_shards(tmp_path):
    folder = sharded(tmp_path)
    save_file(foreign_state(source().state_dict()), folder / "b.safetensors")
    refused(folder, r"is in a\.safetensors and in b\.safetensors")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "?"])
def test_damaged_index(tmp_path, index):
    folder = sharded(tmp_path)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    refused(folder, "index")


def test_folders_without_weights(tmp_path):
    with pytest.raises(UsageError, match="no weights at"):
        load_weights(Toy(), tmp_path / "absent")
    refused(tmp_path, r"holds no diffusion_pytorch_model\.safetensors")
    (tmp_path / "transformer").mkdir()
    with pytest.raises(UsageError, match="whole pipeline") as caught:
        load_weights(Toy(), tmp_path)
    assert str(tmp_path / "transformer") in caught.value.hint
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, "is a pickle")


# --- files that are refused


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.ckpt", "w.safetensors", "w"])
@pytest.mark.parametrize("kind", ["zip", "legacy", 2, 3, 4, 5])
def test_pickles(tmp_path, name, kind):
    path, content = tmp_path / name, {"gate": torch.zeros(4), "trap": Trap(tmp_path / "ran")}
    if isinstance(kind, int):
        path.write_bytes(pickle.dumps(content, protocol=kind))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    refused(path, "is a pickle")
    assert not (tmp_path / "ran").exists()


def test_the_name_of_a_pickle_is_enough(file):
    refused(file.rename(file.with_suffix(".bin")), "is a pickle")


@pytest.mark.parametrize("length", [0x280, 0x480])
def test_a_header_that_begins_like_a_pickle(tmp_path, length):
    """A header of 640 bytes makes a file that begins with 80 02, as pickles of protocol 2 do."""
    content = save(source().state_dict())
    header = content[8 : 8 + struct.unpack("<Q", content[:8])[0]]
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", length) + header.ljust(length) + content[8 + len(header) :])
    assert path.read_bytes()[:1] == b"\x80"
    module = Toy()
    load_weights(module, path)
    assert_same(module, source())


def test_every_truncation(file):
    content = file.read_bytes()
    header = struct.unpack("<Q", content[:8])[0]
    path = file.with_name("t.safetensors")
    for length in (0, 1, 7, 8, 9, 20, 8 + header - 1, 8 + header, 8 + header + 1, len(content) - 1):
        path.write_bytes(content[:length])
        refused(path, "not a complete safetensors file")


HUGE = json.dumps({"gate": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
OVERLAP = json.dumps(
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}
).encode()
LYING = json.dumps({"gate": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"\x00" * 100,
        bytes(range(256)),
        b"GGUF" + b"\x00" * 60,
        struct.pack("<Q", 2**63) + b"{" * 50,
        struct.pack("<Q", 90_000_000) + b"{}",
        struct.pack("<Q", 40) + b"{" * 50,
        struct.pack("<Q", len(HUGE)) + HUGE + b"\x00" * 64,
        struct.pack("<Q", len(OVERLAP)) + OVERLAP + b"\x00" * 12,
        struct.pack("<Q", len(LYING)) + LYING + b"\x00" * 16,
        struct.pack("<Q", 2) + b"{]",
    ],
)
def test_garbage(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    refused(tmp_path / "w.safetensors", "not a complete safetensors file")


def test_what_is_not_a_file():
    refused(Path("/dev/null"), "not a regular file")


# --- random weights and descriptions


def test_random_weights():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second, other = random_weights(SPEC, 1), random_weights(SPEC, 1), random_weights(SPEC, 2)
    assert torch.equal(torch.rand(3), expected), "the global generator moved"
    assert_same(first, second)
    assert not torch.equal(first.layer.weight, other.layer.weight)
    assert all(p.any() and not p.requires_grad for p in first.parameters())
    assert 0.005 < first.gate.std() < 0.2
    assert not first.training
    assert torch.equal(first.steps, torch.arange(5))


def test_describe():
    module = source()
    digest = hashlib.sha256()
    for name in ("gate", "layer.bias", "layer.weight", "steps"):
        digest.update(module.state_dict()[name].numpy().tobytes())
    info = describe(module, origin="random", seed=3)
    assert (info.origin, info.seed, info.parameters, info.bytes, info.sha256) == ("random", 3, 25, 120, digest.hexdigest())
    with torch.no_grad():
        module.gate[0] = module.gate[0].nextafter(torch.tensor(9.0))
    assert describe(module, origin="random").sha256 != info.sha256
    assert describe(module.bfloat16(), origin="module").bytes == 2 * 20 + 8 * 5


def test_nonfinite():
    module = source()
    assert nonfinite(module) == []
    module.table[1] = float("-inf")
    assert nonfinite(module) == []  # an infinite buffer is a mask
    module.table[2] = float("nan")
    with torch.no_grad():
        module.layer.bias[0] = float("inf")
    assert {reason.where: reason.what for reason in nonfinite(module)} == {
        "layer.bias": "0 NaN and 1 Inf among 4 values",
        "table": "1 NaN and 1 Inf among 4 values",
    }


@pytest.mark.matrix
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_for_one_copy(tmp_path, device, dtype):
    """192 MiB of weights, as eight tensors of which pairs are fused: the peak stays below one copy and a half."""
    save_file(
        {f"{i}.{x}": torch.zeros(6 * 2**20 // 2, dtype=getattr(torch, dtype)) for i in range(8) for x in "ab"}, tmp_path / "w.safetensors"
    )
    script = """
        import resource, sys, torch
        from pathlib import Path
        from torch import nn
        from isthmus.exporter.spec import StateDictLayout
        from isthmus.exporter.weights import fuse, load_weights

        class Big(nn.Module):
            def __init__(self):
                super().__init__()
                self.parts = nn.ParameterList([torch.ones(6 * 2**20) for _ in range(8)])

        def convert(state):
            out = {}
            for i in range(8):
                fuse(state, [f"{i}.a", f"{i}.b"], out, f"parts.{i}")
            return out

        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        layout = StateDictLayout("halves", lambda keys: True, convert)
        before = peak()
        with torch.device(sys.argv[2]):
            module = Big()
        info = load_weights(module, Path(sys.argv[1]), [layout])
        assert info.bytes == 192 * 2**20 and not any(p.any() for p in module.parameters())
        print(peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "w.safetensors"), device]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1.5 * 192
