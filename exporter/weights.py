"""The weights of a module: read from safetensors, drawn at random, and described.

Only safetensors is read. A pickle, which is what `.pt`, `.pth`, `.ckpt` and most `.bin` files are, runs code of its author's choice when
it is loaded, and is refused. A model whose weights are published in no other way says so in its layout; a `.pth` for it is read if it
holds nothing but tensors by name (`pth.py`). Reading needs memory for one copy of the weights: keys and shapes are compared on the meta
device before anything is read, and tensors are then read one by one.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .bundle import sha256_of
from .errors import Reason, UsageError, WeightsError
from .manifest import WeightsInfo
from .pth import TYPES, read_pth
from .spec import ModelSpec, StateDictLayout

_PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"})
_CONVERT_HINT = (
    "convert it to safetensors on a machine where you trust it: "
    "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'weights.safetensors')"
)
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})  # what may be converted to the module's own type; FP8 needs scales to mean anything
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_MAX_JSON_BYTES = 16 * 2**20
_DIFFUSERS_STEM = "diffusion_pytorch_model"

Origin = Literal["shipped", "file", "random", "module"]


def load_weights(module: nn.Module, path: Path, layouts: Sequence[StateDictLayout] = (), *, origin: Origin = "file") -> WeightsInfo:
    """Puts the weights of a file or folder into `module`, in eval mode and without gradients.

    The module's own parameters are freed first, and those of the file take their place, so that one copy exists at a time; a module built
    under `torch.device("meta")` costs nothing beside it. 16-bit and 64-bit floats are converted to the module's type, and the types in the
    file are named in the result. After an error the module is not to be used.

    Args:
        module: Built from the settings that the weights were made for.
        path: A safetensors file; a `.pth` where one of the layouts is published as such; or a folder in the diffusers layout, with
            `config.json` and `diffusion_pytorch_model.safetensors` or its shards and their index.
        layouts: The foreign layouts to recognise besides the module's own.
        origin: What to call the weights in the result.

    Returns:
        What was read. The sha256 is that of the file; of several shards, that of their hashes' concatenation in order of name.

    Raises:
        UsageError: There is no such file or folder.
        WeightsError: The file is a pickle, is damaged, holds NaN or Inf, or its keys and shapes are not exactly those of the module. A file
            with unexpected keys is refused like one with missing keys: it is the file of another model. All reasons are listed.
    """
    files = _find_files(path)
    published_as_pth = files == [path] and path.suffix == ".pth" and any(layout.pth for layout in layouts)
    stored = _StoredPth(path, _float_type(module)) if published_as_pth else _Stored(files, _float_type(module))
    layout = next((candidate for candidate in layouts if candidate.matches(frozenset(stored))), None)
    reasons = _compare_config(path / "config.json", layout.config) if layout is not None and path.is_dir() else []
    if reasons:
        raise WeightsError(
            f"{path / 'config.json'} describes another model than the one asked for",
            reasons=reasons,
            hint="choose the model, or its settings with --set, that the weights were made for",
        )

    expected = _Slots(module)
    _check_fit(path, _converted(path, layout, stored.on_meta()), expected, stored, layouts)

    expected.free()
    tensors = _converted(path, layout, stored)
    bad = []
    for name in list(tensors):
        tensor = tensors.pop(name).detach()
        bad += _nonfinite(name, tensor)
        expected.fill(name, tensor)
    if bad:
        raise WeightsError(f"{path} holds values that are not finite", reasons=bad, hint="use weights from before the training diverged")
    unfilled = [name for name, tensor in _all_tensors(module) if tensor.is_meta]
    if unfilled:
        raise WeightsError(
            "the module has tensors on the meta device that no weights file holds",
            reasons=[Reason("is a buffer computed at construction", where=name) for name in unfilled],
            hint="compute it on the CPU explicitly, or build the module on the CPU",
        )
    module.eval().requires_grad_(False)
    return _measure(module).model_copy(
        update={
            "origin": origin,
            "path": path.name,
            "layout": "isthmus" if layout is None else layout.name,
            "dtypes": stored.dtypes,
            "sha256": _hash_files(files),
        }
    )


def random_weights(spec: ModelSpec, seed: int) -> nn.Module:
    """A freshly initialised module, with something in every parameter.

    Parameters that start at zero get 0.05 * randn: a gate of zero hides all that lies behind it, and a check of outputs would check
    nothing. The global generator is left as it was.

    Args:
        spec: The model.
        seed: Seeds torch's generator.

    Returns:
        The module, in eval mode, without gradients.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        module = spec.build()
        for parameter in module.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.05)
    return module.eval().requires_grad_(False)


def describe(module: nn.Module, *, origin: Origin, seed: int | None = None) -> WeightsInfo:
    """Describes weights that come from no file: the sha256 is that of the bytes of the state dict's tensors, in order of name."""
    digest = hashlib.sha256()
    for _, tensor in sorted(_state(module).items()):
        flat: np.ndarray[Any, np.dtype[np.uint8]] = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(flat.data)
    return _measure(module).model_copy(update={"origin": origin, "seed": seed, "sha256": digest.hexdigest()})


def nonfinite(module: nn.Module) -> list[Reason]:
    """Every parameter that holds NaN or Inf and every buffer that holds NaN, with their numbers; empty when there is none.

    An infinite buffer is a mask.
    """
    bad = [reason for name, tensor in module.named_parameters() for reason in _nonfinite(name, tensor)]
    return bad + [
        r
        for name, tensor in module.named_buffers()
        if tensor.is_floating_point() and tensor.isnan().any()
        for r in _nonfinite(name, tensor)
    ]


def fuse(state: Mapping[str, Tensor], names: Sequence[str], out: dict[str, Tensor], target: str) -> None:
    """Puts the concatenation of `names` along their first axis into `out[target]`, once.

    For layouts whose queries, keys and values are apart. If one of them is missing, the others are passed through under their own
    names, so that they are reported.
    """
    if all(name in state for name in names):
        if target not in out:
            out[target] = torch.cat([state[name] for name in names])
    else:
        out.update({name: state[name] for name in names if name in state})


def same_in_all(state: Mapping[str, Tensor], names: Sequence[str], out: dict[str, Tensor], target: str) -> None:
    """Puts the first of `names` into `out[target]`, once, after checking that all of them are equal.

    For layouts that hold copies of what is one parameter here.

    Raises:
        WeightsError: Some differ; they are listed.
    """
    if target in out:
        return
    first = state[names[0]]
    if first.is_meta:
        different = [name for name in names[1:] if state[name].shape != first.shape]
    else:
        different = [name for name in names[1:] if not torch.equal(state[name], first)]
    if different:
        raise WeightsError(
            f"the file's copies of {target} differ, and the model has only one",
            reasons=[Reason(f"differs from {names[0]}", where=name) for name in different],
            hint="give weights whose copies are equal",
        )
    out[target] = first


class _Stored(Mapping[str, Tensor]):
    """The tensors of some safetensors files by name, each read when it is asked for and not kept."""

    def __init__(self, files: Sequence[Path], float_type: torch.dtype) -> None:
        self._float_type = float_type
        self._file: dict[str, Path] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, str] = {}
        for file in files:
            _check_header(file)
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 - not a mapping
                        if name in self._file:
                            raise WeightsError(f"{name} is in {self._file[name].name} and in {file.name}", hint="download the shards again")
                        view = handle.get_slice(name)
                        self._file[name], self._shape[name], self._dtype[name] = file, tuple(view.get_shape()), view.get_dtype()
            except (SafetensorError, OSError) as error:
                raise _damaged(file, str(error)) from error

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The element types in the files, by safetensors' names."""
        return tuple(sorted(set(self._dtype.values())))

    def dtype(self, name: str) -> str:
        """The element type of one tensor in the file."""
        return self._dtype[name]

    def on_meta(self) -> dict[str, Tensor]:
        """The same tensors without their values. Types other than floats keep a type that no parameter has, so that they do not fit."""
        return {
            name: torch.empty(
                shape, dtype=self._float_type if self._dtype[name] in _FLOATS else _other_type(self._dtype[name]), device="meta"
            )
            for name, shape in self._shape.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        file = self._file[name]
        # Opened for every tensor: pages of a mapping that stays open would count as a second copy of the weights.
        try:
            with safe_open(file, framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(file, str(error)) from error
        return tensor.to(self._float_type, copy=True) if self._dtype[name] in _FLOATS else tensor.clone()

    def __contains__(self, name: object) -> bool:
        return name in self._file

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)


class _StoredPth(_Stored):
    """The tensors of a `.pth`, which are mapped into memory, and copied when they are asked for."""

    def __init__(self, file: Path, float_type: torch.dtype) -> None:
        self._float_type = float_type
        self._tensors = read_pth(file, hint=_CONVERT_HINT)
        self._file = dict.fromkeys(self._tensors, file)
        self._shape = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self._dtype = {name: TYPES[tensor.dtype] for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return tensor.to(self._float_type, copy=True) if self._dtype[name] in _FLOATS else tensor.clone()


class _Slots:
    """The places in a module that its state dict names. Names of one shared tensor (tied weights) are one place."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.tensors = _state(module)
        self._names: dict[int, list[str]] = {}
        for name in self.tensors:
            self._names.setdefault(id(_get(module, name)), []).append(name)
        self._shared = {name: names for names in self._names.values() for name in names}

    def shared_with(self, name: str) -> list[str]:
        """Every name of the tensor called `name`."""
        return self._shared[name]

    def free(self) -> None:
        """Drops the values, keeping shapes and types."""
        for names in self._names.values():
            self._put(names, self.tensors[names[0]].to("meta"))
        self.tensors = {}

    def fill(self, name: str, tensor: Tensor) -> None:
        """Puts `tensor` in the place called `name`, under all its names."""
        self._put(self._shared[name], tensor)

    def _put(self, names: Sequence[str], tensor: Tensor) -> None:
        is_parameter = isinstance(_get(self._module, names[0]), nn.Parameter)
        value = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        for name in names:
            owner, _, attribute = name.rpartition(".")
            setattr(self._module.get_submodule(owner), attribute, value)


def _get(module: nn.Module, name: str) -> Any:
    owner, _, attribute = name.rpartition(".")
    return getattr(module.get_submodule(owner), attribute)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _all_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _float_type(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _other_type(name: str) -> torch.dtype:
    integers = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
    return integers.get(name, torch.complex64)


def _measure(module: nn.Module) -> WeightsInfo:
    state = _state(module)
    return WeightsInfo(
        origin="module",
        parameters=sum(tensor.numel() for tensor in state.values()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
    )


def _nonfinite(name: str, tensor: Tensor) -> list[Reason]:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return []
    low, high = torch.aminmax(tensor.detach())  # NaN if any is NaN; needs no mask as large as the tensor
    if math.isfinite(low) and math.isfinite(high):
        return []
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    return [Reason(f"{nan} NaN and {inf} Inf among {tensor.numel()} values", where=name)]


def _hash_files(files: Sequence[Path]) -> str:
    hashes = [sha256_of(file) for file in sorted(files)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _converted(path: Path, layout: StateDictLayout | None, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if layout is None:
        return {name: state[name] for name in state}
    try:
        return layout.convert(state)
    except RuntimeError as error:  # torch cannot concatenate what the file holds
        raise WeightsError(
            f"{path} looks like the {layout.name} layout and cannot be converted: {error}", hint="give the weights of this model"
        ) from error


def _check_fit(path: Path, got: Mapping[str, Tensor], slots: _Slots, stored: _Stored, layouts: Sequence[StateDictLayout]) -> None:
    want = slots.tensors
    missing = [name for name in want if not any(alias in got for alias in slots.shared_with(name))]
    unexpected = [name for name in got if name not in want]
    mismatched = [name for name in got if name in want and (got[name].shape, got[name].dtype) != (want[name].shape, want[name].dtype)]
    if not (missing or unexpected or mismatched):
        return
    reasons = [Reason(f"missing; the model has {_form(want[name])}", where=name) for name in missing]
    reasons += [Reason(f"has {_form(got[name], stored, name)}, expected {_form(want[name])}", where=name) for name in mismatched]
    reasons += [Reason(f"unexpected, {_form(got[name], stored, name)}; the model has no such tensor", where=name) for name in unexpected]
    known = ", ".join(["isthmus", *(layout.name for layout in layouts)])
    raise WeightsError(
        f"{path} does not fit the model: {len(missing)} missing, {len(mismatched)} mismatched, {len(unexpected)} unexpected",
        reasons=reasons,
        hint=f"give weights made for this model and these settings, in one of the layouts {known}",
    )


def _form(tensor: Tensor, stored: _Stored | None = None, name: str = "") -> str:
    dtype = stored.dtype(name) if stored is not None and name in stored else str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {tuple(tensor.shape)}"


def _compare_config(file: Path, expected: Mapping[str, Any]) -> list[Reason]:
    config = _read_json(file)
    reasons = []
    for key, value in expected.items():
        # What an older file does not mention yet is off in it.
        if config.get(key) != value and (key in config or value not in (None, False)):
            got = json.dumps(config[key]) if key in config else "nothing"
            reasons.append(Reason(f"the file says {got}, the model has {json.dumps(value)}", where=key))
    return reasons


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise WeightsError(f"{file} is larger than {_MAX_JSON_BYTES // 2**20} MiB and was not read", hint="download the folder again")
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise WeightsError(f"{file} is missing", hint="give a complete folder, or the safetensors file itself") from error
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file} cannot be read as JSON: {error}", hint="download the folder again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file} holds a {type(content).__name__}, expected an object", hint="download the folder again")
    return content


def _find_files(path: Path) -> list[Path]:
    if not path.exists():
        raise UsageError(
            f"there are no weights at {path}", hint="give a safetensors file or a folder in the diffusers layout with --weights"
        )
    if not path.is_dir():
        return [path]
    index = path / f"{_DIFFUSERS_STEM}.safetensors.index.json"
    if index.is_file():
        return _read_index(index)
    whole = path / f"{_DIFFUSERS_STEM}.safetensors"
    found = [whole] if whole.is_file() else sorted(path.glob(f"{_DIFFUSERS_STEM}*.safetensors"))  # a variant: NAME.fp16.safetensors
    if len(found) == 1:
        return found
    if found:
        raise UsageError(f"{path} holds several weights: {', '.join(f.name for f in found)}", hint="give one of these files with --weights")
    pickles = sorted(f for f in path.iterdir() if f.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise _pickle(pickles[0])
    if (path / "transformer").is_dir():
        raise UsageError(f"{path} is a whole pipeline", hint=f"give the folder of the model alone: --weights {path / 'transformer'}")
    raise WeightsError(
        f"{path} holds no {_DIFFUSERS_STEM}.safetensors", hint="give a folder in the diffusers layout, or a safetensors file"
    )


def _read_index(index: Path) -> list[Path]:
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise WeightsError(f"{index} has no weight_map from names to files", hint="download the folder again")
    names = sorted(set(shards.values()))
    outside = [name for name in names if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name]
    if outside:
        raise WeightsError(
            f"{index} names files outside its folder",
            reasons=[Reason("is not a plain file name", where=repr(name)) for name in outside],
            hint="do not use this folder; shards lie beside their index",
        )
    files = [index.parent / name for name in names]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise WeightsError(
            f"{index.parent} lacks shards that its index names",
            reasons=[Reason("is missing", where=name) for name in absent],
            hint="download the folder again",
        )
    return files


def _check_header(file: Path) -> None:
    """Refuses what is not the beginning of a safetensors file: its header's length, as 8 bytes, then the header, a JSON object."""
    if file.suffix in _PICKLE_SUFFIXES:
        raise _pickle(file)
    if not file.is_file():
        raise WeightsError(f"{file} is not a regular file", hint="give a safetensors file")
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(9)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror}", hint="check its permissions") from error
    length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else 0
    is_header = start[8:] == b"{" and 2 <= length <= min(size - 8, _MAX_HEADER_BYTES)
    # Zip is torch.save's container; b"\x80" opens a pickle of protocol 2 to 5, but also a header of 640 or so bytes.
    if not is_header and (start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05")):
        raise _pickle(file)
    if not is_header and start[8:] == b"{" and size - 8 < length <= _MAX_HEADER_BYTES:
        raise _damaged(file, f"its header should have {length} bytes, and the file has {size}")
    if not is_header:
        raise _damaged(file, f"its {size} bytes do not begin with a safetensors header")


def _pickle(file: Path) -> WeightsError:
    return WeightsError(f"{file} is a pickle, or of a kind that usually is: loading it could run any code", hint=_CONVERT_HINT)


def _damaged(file: Path, why: str) -> WeightsError:
    return WeightsError(
        f"{file} is not a complete safetensors file: {why}", hint="it is truncated, damaged or of another format: copy it again"
    )
