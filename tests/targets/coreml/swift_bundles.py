"""Bundles for the tests of the Swift package. Their `.mlpackage` is a few bytes: embedding copies it, and reads nothing in it."""

import numpy as np

from isthmus.exporter.bundle import INPUTS, OUTPUTS, write_cases, write_manifest
from isthmus.exporter.manifest import Manifest, StageResult, TensorInfo, WeightsInfo
from isthmus.exporter.spec import MODELS
from isthmus.exporter.subject import evaluate


def values(dtype, *shape, seed=0):
    rng = np.random.Generator(np.random.PCG64(seed))
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    return rng.integers(0, 9, shape).astype(dtype) if "int" in dtype else rng.standard_normal(shape, dtype=np.float32).astype(dtype)


def write(folder, inputs, outputs, *, model="tiny", packages=("model.mlpackage",), options=None, details=None, largest=False, **more):
    """Writes a bundle for Core ML. Inputs and outputs: name to (dtype, shape), where a size may be a text; `sizes` has its range.

    There are two cases at the usual sizes, and with `largest` one at the largest.
    """
    folder.mkdir(parents=True)
    for package in packages:
        path = folder / package / "Data" / "com.apple.CoreML" / "model.mlmodel"
        path.parent.mkdir(parents=True)
        path.write_bytes(package.encode())
        (folder / package / "Manifest.json").write_text("{}")
    sizes = more.get("sizes", {})

    def drawn(tensors, seed, end=1):
        at = {name: r[end] for name, r in sizes.items()}
        numbered = enumerate(tensors.items(), start=seed)
        return {name: values(dtype, *(evaluate(s, at) for s in shape), seed=number) for number, (name, (dtype, shape)) in numbered}

    cases = [("example", 0, 1), ("second", 10, 1)] + [("largest", 40, 2)] * largest
    for file, tensors, add in ((INPUTS, inputs, 0), (OUTPUTS, outputs, 20)):
        write_cases(folder / file, {case: drawn(tensors, seed + add, end) for case, seed, end in cases})
    manifest = Manifest(
        model=model,
        target=more.pop("target", "coreml"),
        precision="fp16",
        options={"coreml": {"minimum_deployment_target": "iOS18", "compute_units": "cpu-and-ne", **(options or {})}},
        inputs=tuple(TensorInfo(name=n, dtype=d, shape=s) for n, (d, s) in inputs.items()),
        outputs=tuple(TensorInfo(name=n, dtype=d, shape=s) for n, (d, s) in outputs.items()),
        weights=more.pop("weights", WeightsInfo(origin="random")),
        tolerance={"max_relative": 1e-2, "min_psnr": 60.0},
        verdict="verified",
        stages=(StageResult(name="mil", verdict="verified"), StageResult(name="device", verdict="not run", reason="this is no Mac")),
        details={**({"packages": list(packages)} if packages != ("model.mlpackage",) else {}), **(details or {})},
        **more,
    )
    write_manifest(folder, manifest)
    return folder


def fixed(folder):
    """Fixed sizes, one output."""
    return write(folder, {"x": ("float32", (2, 3)), "t": ("float32", (2,))}, {"sample": ("float32", (2, 3))}, model="dit-tiny")


def states(folder):
    """A state, which PyTorch takes and returns, and the system that brought them."""
    state = {"name": "cache", "dtype": "float16", "shape": [1, 2, 32]}
    inputs = {"token": ("float32", (1, 4)), "cache": ("float32", (1, 2, 32))}
    outputs = {"out": ("float32", (1, 4)), "cache_after": ("float32", (1, 2, 32))}
    return write(folder, inputs, outputs, model="rwkv", details={"states": [state], "state_outputs": {"cache": "cache_after"}})


def sampler(folder):
    """A model of the registry whose sampler is known, in another batch than the sampler's."""
    latents, time, label = ("float32", (4, 1, 8, 8)), ("float32", (4,)), ("int64", (4,))
    return write(
        folder,
        {"x": latents, "t": time, "y": label},
        {"sample": latents},
        model="dit-digits",
        weights=WeightsInfo(origin="shipped"),
        config={name: option.default for name, option in MODELS.entry("dit-digits").options.items()},
    )


def integers(folder):
    """Every type, sizes from a list, an old system."""
    inputs = {"ids": ("int64", ("batch", 4)), "mask": ("bool", ("batch", 4)), "half": ("float16", ("batch", 2)), "u": ("uint8", (1,))}
    options = {"shapes": "enumerated", "minimum_deployment_target": "iOS16", "compute_units": "all"}
    return write(folder, inputs, {"classes": ("int64", ("batch",))}, model="42-net", sizes={"batch": (1, 2, 8)}, options=options)


HOSTILE = 'x"); exit(1) //\n\r`}\\(print(1))\u2028*/ \U0001f600 {{ 7 * 7 }} {% raw %}|</td>'


def hostile(folder):
    """Names that would be code, or words of Swift's, or alike."""
    names = [HOSTILE, "self", "Type", "in", "hidden_states", "hiddenStates", "hidden.states", "1st", "", "é", "named", "tensor", "given0"]
    inputs = dict.fromkeys(names, ("float32", (2,)))
    outputs = {HOSTILE: ("float32", (2,)), "init": ("int32", (2,)), "values": ("bool", (2,))}
    return write(folder, inputs, outputs, model=HOSTILE)


def several(folder):
    """Several packages and several outputs, one of them a single value; a range of sizes."""
    outputs = {"a": ("float32", ("tokens", 3)), "b": ("float32", ()), "c": ("int32", (1,))}
    options = {"shapes": "range", "minimum_deployment_target": "iOS26", "compute_units": "cpu-only"}
    packages = ("part0.mlpackage", "part1.mlpackage")
    return write(folder, {"x": ("float32", ("tokens", 3))}, outputs, packages=packages, sizes={"tokens": (1, 16, 64)}, options=options)


def functions(folder):
    """A function for each of three batch sizes, and a size that is computed of another."""
    shapes = {name: {"x": [n, 3], "pairs": [2 * n], "scale": [1]} for name, n in (("main", 2), ("x_1x3_pairs_2", 1), ("x_8x3_pairs_16", 8))}
    inputs = {"x": ("float32", ("batch", 3)), "pairs": ("int32", ("2*batch",)), "scale": ("float32", ())}
    outputs = {"y": ("float32", ("batch", 3))}
    return write(
        folder,
        inputs,
        outputs,
        model="sizes",
        sizes={"batch": (1, 2, 8)},
        options={"shapes": "functions"},
        details={"functions": shapes},
        largest=True,
    )


BUNDLES = {made.__name__: made for made in (fixed, states, sampler, integers, hostile, several, functions)}
