"""Reference tensors as files that a program in another language reads: raw little-endian values, and an index in JSON."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...exporter.bundle import INPUTS, OUTPUTS, read_cases
from ...exporter.errors import Reason, UnsupportedError
from ...exporter.sampling import LoopSampler
from ...exporter.spec import Arrays
from .session import Interface

Array = np.ndarray[Any, Any]

PICTURES = 3
"""How many pictures the sampler's test draws: not a divisor of most batches, so that cutting and padding are tested too."""

_TYPES = {"bool": "bool", "int": "int32", "uint": "int32", "float": "float32", "bfloat": "float32"}


def scalar_type(dtype: str) -> str:
    """What values of a numpy dtype are outside of Python: `float32`, `int32` or `bool`; empty where there is nothing like it."""
    return _TYPES.get(dtype.rstrip("0123456789").removesuffix("_"), "")


def converted(name: str, array: Array) -> Array:
    """The values as `scalar_type` has them, little-endian.

    Raises:
        UnsupportedError: There is no such type, or an integer does not fit into 32 bits.
    """
    kind = scalar_type(array.dtype.name)
    if not kind:
        raise UnsupportedError(
            "the reference values cannot be written",
            reasons=[Reason(f"{array.dtype} is none of Core ML's types", where=name, fix="export the model with float or integer inputs")],
        )
    if kind == "int32" and array.size and (int(array.min()) < -(2**31) or int(array.max()) >= 2**31):
        raise UnsupportedError(
            "the reference values cannot be written",
            reasons=[Reason(f"values from {array.min()} to {array.max()} do not fit into Core ML's 32-bit integers", where=name)],
        )
    return array.astype({"float32": "<f4", "int32": "<i4", "bool": "u1"}[kind])


def write_golden(bundle: Path, folder: Path, interface: Interface, sampler: LoopSampler | None) -> None:
    """Writes the bundle's reference cases, and one of the sampler, to `folder` (`index.json` and `*.bin`), under the package's names.

    Args:
        bundle: The bundle's folder.
        folder: Where to; does not exist.
        interface: What the package calls the model's inputs, outputs and states. Cases of a whole sampler have other inputs: they are left
            out.
        sampler: The sampler, by PyTorch's names; or None.
    """
    folder.mkdir(parents=True)
    numbers = itertools.count()

    def write(name: str, array: Array) -> dict[str, Any]:
        file = f"tensor{next(numbers)}.bin"
        values = converted(name, array)
        (folder / file).write_bytes(values.tobytes())
        return {"name": name, "type": scalar_type(array.dtype.name), "shape": list(array.shape), "file": file}

    given, wanted = read_cases(bundle / INPUTS), read_cases(bundle / OUTPUTS)
    called = interface.inputs
    cases: list[dict[str, Any]] = []
    for case, arrays in given.items():
        if set(arrays) != set(called) or case not in wanted:
            continue
        values = {called[name]: array for name, array in arrays.items()}
        outputs = {name: wanted[case][info.name] for name, info in interface.outputs.items()}
        found = {
            "name": case,
            "inputs": [write(name, array) for name, array in values.items() if name not in interface.states],
            "outputs": [write(name, array) for name, array in outputs.items()],
        }
        if interface.states:
            found["states"] = [write(name, values[name]) for name in interface.states]
            found["statesAfter"] = [write(name, wanted[case][info.name]) for name, info in interface.states.items()]
        cases.append(found)
    index: dict[str, Any] = {"cases": cases}
    if sampler is not None:
        example = next(arrays for arrays in given.values() if set(arrays) == set(called))
        rng = np.random.Generator(np.random.PCG64(0))
        noise, *further = drawn_noise(sampler, rng, example[sampler.latent].shape[1:])
        names = [name for name in example if name not in (sampler.latent, sampler.time)]
        conditions = {name: np.resize(example[name], (PICTURES, *example[name].shape[1:])) for name in names}
        latents = integrate(sampler, noise, further, conditions)
        index["sampler"] = {
            "noise": write("noise", noise),
            "stepNoise": [write(f"step noise {i}", array) for i, array in enumerate(further)],
            "conditions": [write(called[name], array) for name, array in conditions.items()],
            "latents": write("latents", latents),
        }
    (folder / "index.json").write_text(json.dumps(index, indent=1, allow_nan=False) + "\n", "utf-8")


def drawn_noise(sampler: LoopSampler, rng: np.random.Generator, shape: tuple[int, ...]) -> Iterator[Array]:
    """The starting noise (PICTURES, *shape) float32, then as much for each call that adds some."""
    for _ in range(1 + sum(call.noise != 0 for call in sampler.calls)):
        yield rng.standard_normal((PICTURES, *shape), dtype=np.float32)


def integrate(sampler: LoopSampler, noise: Array, further: list[Array], conditions: Arrays) -> Array:
    """What a sampler makes of noise around a model whose answer is a formula (`answer`), in float32; see `exporter.sampling.LoopCall`."""
    count = len(noise)
    full: Mapping[str, Array] = conditions
    if sampler.guidance > 1:
        full = {name: np.concatenate([a, np.repeat(sampler.null[name], count, axis=0)]) for name, a in conditions.items()}
    pending = iter(further)
    base = x = np.float32(sampler.start) * noise
    before = np.zeros_like(x)
    for call in sampler.calls:
        if sampler.guidance > 1:
            given, null = np.split(answer(np.concatenate([x, x]), call.time, full), 2)
            out = null + np.float32(sampler.guidance) * (given - null)
        else:
            out = answer(x, call.time, full)
        x = np.float32(call.keep) * base + np.float32(call.change) * (out + np.float32(call.previous) * before)
        if call.noise:
            x = x + np.float32(call.noise) * next(pending)
        before = out
        base = x if call.advances else base
    return np.asarray(x, np.float32)


def answer(x: Array, time: float, conditions: Arrays) -> Array:
    """Half the latents, plus a thousandth of the time, plus a hundredth of the sum of the row's conditions; float32."""
    sums = np.zeros(len(x), np.float32)
    for array in conditions.values():
        sums += array.reshape(len(x), -1).sum(axis=1, dtype=np.float32)
    added = np.float32(0.001) * np.float32(time) + np.float32(0.01) * sums
    return np.asarray(np.float32(0.5) * x + added.reshape(-1, *[1] * (x.ndim - 1)), np.float32)
