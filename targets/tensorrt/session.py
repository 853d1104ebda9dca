"""Executes an engine on the GPU, with PyTorch's memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...exporter.bundle import inside, sha256_of
from ...exporter.errors import IntegrityError, IsthmusError, MachineError, Reason
from ...exporter.manifest import Manifest
from ...exporter.op import OPS
from ...exporter.runner import Runner
from ...exporter.spec import Arrays
from .child import import_first
from .compiler import make_log
from .library import INSTALL, MODULES, Gpu, find_gpu, installed_version
from .recipe import Library, Recipe, recipe_of


class Memory:
    """Memory of the GPU, by PyTorch.

    Args:
        device: Where, as PyTorch calls it.

    Raises:
        MachineError: This PyTorch has no CUDA.
    """

    def __init__(self, device: str = "cuda") -> None:
        import torch

        if not torch.cuda.is_available():
            raise MachineError(
                f"this PyTorch {torch.__version__} has no CUDA, and its memory is what the engine computes in",
                hint="install PyTorch with CUDA: https://pytorch.org/get-started/locally",
            )
        self._torch, self._device = torch, device

    def upload(self, array: np.ndarray[Any, Any], dtype: str) -> Any:
        """A tensor with the array's values, in a type of PyTorch."""
        return self._torch.from_numpy(np.array(array)).to(device=self._device, dtype=getattr(self._torch, dtype))

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """A tensor for results."""
        return self._torch.empty(tuple(shape), dtype=getattr(self._torch, dtype), device=self._device)

    def stream(self) -> int:
        """The handle of PyTorch's current stream."""
        return int(self._torch.cuda.current_stream().cuda_stream)

    def synchronize(self) -> None:
        """Waits for the stream."""
        self._torch.cuda.current_stream().synchronize()


def check_origin(folder: Path, manifest: Manifest, library: Library, gpu: Gpu, version: str, *, trust: bool) -> Path:
    """The engine's file, when it is the one that isthmus built, for this GPU and with this version.

    Loading an engine can run code that is in it, so one from elsewhere is loaded only for those who trust it.

    Args:
        folder: The bundle's.
        manifest: Its manifest.
        library: Whose engine it has to be.
        gpu: This machine's.
        version: Of the installed library.
        trust: Take an engine that the manifest does not know.

    Raises:
        IntegrityError: The engine, or a plugin library, is missing or not the one that was built.
        MachineError: It was built for another GPU or with another version.
    """
    recipe = recipe_of(manifest, library)
    path = folder / recipe.engine
    if not path.is_file():
        raise IntegrityError(f"the bundle holds no engine: {recipe.engine} is missing", hint=f"run `isthmus build {folder}` first")
    known = manifest.details.get("engine")
    engine = known if isinstance(known, dict) else {}
    strange, other = [], []
    if trust is False and (engine.get("library") != library or engine.get("sha256") != sha256_of(path)):
        strange.append(Reason("isthmus did not build this file for this bundle: its sha256 is not the manifest's", where=recipe.engine))
    for plugin in recipe.plugins:
        file, recorded = inside(folder, plugin.path), manifest.files.get(plugin.path) or plugin.sha256
        if file is None or not file.is_file():
            strange.append(Reason("the library of plugins is missing", where=plugin.path))
        elif recorded != sha256_of(file) and not trust:
            strange.append(Reason("the library of plugins is not the one that was built with the model", where=plugin.path))
    if strange:
        raise IntegrityError(
            "the engine was not loaded", reasons=strange, hint="build it again here, or give --trust if you know who made these files"
        )
    if gpu.capability not in recipe.compute_capabilities:
        wanted = ", ".join(recipe.compute_capabilities)
        other.append(Reason(f"the engine is for compute capability {wanted}, and this is {gpu.name} ({gpu.capability})"))
    if not trust and engine.get("version") != version:
        other.append(Reason(f"the engine was built with {library} {engine.get('version')}, and {version} is installed"))
    if other:
        raise MachineError("the engine was not loaded", reasons=other, hint=f"run `isthmus build {folder}` on this machine")
    return path


class EngineRunner(Runner):
    """An engine of a bundle, loaded on the GPU.

    Args:
        folder: The bundle's.
        manifest: Its manifest.
        library: `tensorrt` or `tensorrt-rtx`.
        trust: See `check_origin`.
        module: The library's Python module; the installed one by default.
        memory: Where the tensors lie; the GPU by default.
        gpu: This machine's GPU; found by default.

    Raises:
        MachineError: The library, the GPU or PyTorch's CUDA is missing, or the engine is for another one.
        IntegrityError: See `check_origin`.
        IsthmusError: The library refuses the engine.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        library: Library,
        *,
        trust: bool = False,
        module: Any = None,
        memory: Memory | None = None,
        gpu: Gpu | None = None,
    ) -> None:
        gpu = gpu or find_gpu()
        version = str(module.__version__) if module is not None else installed_version(library)
        if gpu is None or not version:
            what = f"{library} is not installed" if gpu else "there is no NVIDIA GPU, or no driver for it"
            raise MachineError(f"the engine cannot be executed: {what}", hint=INSTALL[library])
        path = check_origin(folder, manifest, library, gpu, version, trust=trust)
        trt = module if module is not None else import_first(MODULES[library])
        self._memory = memory if memory is not None else Memory()
        self._trt, self._log = trt, make_log(trt)
        recipe = recipe_of(manifest, library)
        if library == "tensorrt":  # a plan of TensorRT-RTX holds its plugins
            _load_plugins(trt.get_plugin_registry(), folder, recipe)
        runtime = trt.Runtime(self._log)
        # A plan with plugins inside is a plan with code inside; `check_origin` has said whose it is.
        runtime.engine_host_code_allowed = library == "tensorrt-rtx" and bool(recipe.plugins)
        self._engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise IsthmusError(f"{library} {version} does not load {path.name}: {self._last_error()}")
        self._runtime = runtime
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise IsthmusError(f"{library} cannot execute {path.name}: {self._last_error()}", hint="is the GPU's memory full?")
        self.device = f"{gpu.name}, {library} {version}"
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = {name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        self._inputs = [name for name in names if name in inputs]
        self._outputs = [name for name in names if name not in inputs]

    def run(self, inputs: Arrays) -> Arrays:
        """Executes the engine once; see `Runner.run`. Outputs in bfloat16, which numpy lacks, come as float32."""
        reasons = [Reason("the engine has this input and it was not given", where=name) for name in self._inputs if name not in inputs]
        reasons += [Reason("was given and the engine has no such input", where=name) for name in inputs if name not in self._inputs]
        if reasons:
            raise IsthmusError("the inputs do not fit the engine", reasons=reasons)
        tensors = {}
        for name in self._inputs:
            array = np.asarray(inputs[name])
            if not self._context.set_input_shape(name, tuple(array.shape)):
                low, _, high = self._engine.get_tensor_profile_shape(name, 0)
                reasons.append(Reason(f"has shape {array.shape}, and the engine takes {tuple(low)} to {tuple(high)}", where=name))
                continue
            tensors[name] = self._memory.upload(array, self._dtype(name))
        if reasons:
            raise IsthmusError("the inputs do not fit the engine", reasons=reasons)
        if missing := self._context.infer_shapes():
            raise IsthmusError(f"the engine's shapes do not follow from its inputs: {', '.join(missing)}")
        for name in self._outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise IsthmusError(f"the shape of output {name} depends on values, and is known after the run only: {shape}")
            tensors[name] = self._memory.empty(shape, self._dtype(name))
        for name, tensor in tensors.items():
            if not self._context.set_tensor_address(name, tensor.data_ptr()):
                raise IsthmusError(f"the engine does not take the memory of {name}: {self._last_error()}")
        if not self._context.execute_async_v3(self._memory.stream()):
            raise IsthmusError(f"the engine failed: {self._last_error()}")
        self._memory.synchronize()
        return {name: _to_array(tensors[name]) for name in self._outputs}

    def close(self) -> None:
        """Frees the context before the engine, and the engine before the runtime."""
        self._context = None
        self._engine = None
        self._runtime = None

    def _dtype(self, name: str) -> str:
        return _TORCH_TYPES[self._engine.get_tensor_dtype(name).name]

    def _last_error(self) -> str:
        return self._log.errors[-1] if self._log.errors else "it gives no reason"


def _load_plugins(registry: Any, folder: Path, recipe: Recipe) -> None:
    """Loads the plugins that the process does not have yet: a library that was loaded once keeps its names."""
    known = {creator.name for creator in registry.all_creators}
    for plugin in recipe.plugins:
        needed = {form.op_type for name in plugin.operators for form in OPS[name].forms}
        if not needed <= known and registry.load_library(str(folder / plugin.path)) is None:
            raise IsthmusError(
                f"{recipe.library} does not load {plugin.path}", hint="it was made for another machine: build the bundle again here"
            )


_TORCH_TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


def _to_array(tensor: Any) -> np.ndarray[Any, Any]:
    wide = tensor.float() if str(tensor.dtype) in ("torch.bfloat16", "torch.float8_e4m3fn") else tensor
    array: np.ndarray[Any, Any] = wide.cpu().numpy()
    return array
