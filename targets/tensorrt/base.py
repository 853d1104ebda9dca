"""What the targets `tensorrt` and `tensorrt-rtx` share: one lowering, one recipe, one compiler."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from ...exporter.bundle import sha256_of
from ...exporter.errors import IsthmusError, MachineError, Reason, UnsupportedError
from ...exporter.manifest import Manifest, StageResult
from ...exporter.runner import Runner
from ...exporter.sampling import FILE as SAMPLER
from ...exporter.sampling import PICTURES, WrittenSampler, write_sampler
from ...exporter.target import Built, Capability, Job, Lowered, Stage, Target
from .library import INSTALL, MODULES, OLDEST, find_gpu, installed_version
from .options import TensorRTOptions
from .recipe import ENGINES, MODEL, Fp8Layer, Library, PluginLibrary, Recipe, profiles_of, recipe_of

if TYPE_CHECKING:
    from ...exporter.passes.fp8_layers import Layer

O = TypeVar("O", bound=TensorRTOptions)  # noqa: E741 - the options of a target

LAYERS = "layers.json"
OPSETS = (23, 24)
"""The first has Attention and RMSNormalization; 24 is the last that the parser was tried with."""


class TensorRTTarget(Target[O]):
    """Lowers to the ONNX file that TensorRT gets, with its plugins and a recipe, and builds the engine where this machine can.

    Class attributes:
        library: Which of NVIDIA's two libraries.
        needs_gpu: Whether it builds on the GPU that the engine is for only.
    """

    precisions: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp8", "int4")
    calibrated: ClassVar[tuple[str, ...]] = ("fp8",)
    rounded: ClassVar[tuple[str, ...]] = ("int4",)
    computes: ClassVar[Mapping[str, str]] = {**Target.computes, "int4": "fp16"}
    samplers: ClassVar[tuple[str, ...]] = ("step", "loop")
    opsets: ClassVar[tuple[int, ...]] = OPSETS
    library: ClassVar[Library]
    needs_gpu: ClassVar[bool]

    @abstractmethod
    def compute_capabilities(self, options: O) -> tuple[str, ...]:
        """Of the GPUs that the engine is for."""

    @abstractmethod
    def device(self, options: O) -> str:
        """What the artifact is for, in words."""

    def capabilities(self) -> list[Capability]:
        """Lowering works everywhere; building needs the library, and for TensorRT the GPU; verifying on the device needs all of it."""
        from ...exporter.ops.plugin import build as plugin_library
        from ..onnxruntime.session import installed

        lacking, found = self._lacking(), self._found()
        made, kernels, fix = plugin_library.state()
        runtime, _ = installed()
        cannot_run = [*lacking, *(["a GPU"] if find_gpu() is None and not self.needs_gpu else [])]
        return [
            Capability("lower", available=True, detail="writes ONNX, plugins and a recipe on any machine"),
            Capability("build", not lacking, found if not lacking else f"{found}; missing: {', '.join(lacking)}", self._fix(lacking)),
            Capability(
                "verify",
                available=bool(runtime),
                detail=f"the ONNX file in onnxruntime {runtime}; the engine: {'not run here, missing: ' if cannot_run else 'on the GPU'}"
                f"{', '.join(cannot_run)}"
                if runtime
                else "the onnxruntime package is not installed",
                fix="" if runtime else "pip install 'isthmus[cpu]'",
            ),
            Capability("plugins", made, kernels, fix),
        ]

    def _found(self) -> str:
        version, gpu = installed_version(self.library), find_gpu()
        parts = [f"{self.library} {version}" if version else "", f"{gpu.name} ({gpu.capability})" if gpu else ""]
        return ", ".join(filter(None, parts)) or "nothing found"

    def _lacking(self, capabilities: tuple[str, ...] = ()) -> list[str]:
        """What a build needs and this machine has not."""
        version, oldest = installed_version(self.library), OLDEST.get(self.library, 0)
        lacking = [] if version else [f"the package {self.library}"]
        if version[:1].isdigit() and int(version.partition(".")[0]) < oldest:
            lacking.append(f"{self.library} {oldest}.0 or newer (this is {version})")
        if self.needs_gpu:
            gpu = find_gpu()
            if gpu is None:
                lacking.append("an NVIDIA GPU with its driver")
            elif capabilities and gpu.capability not in capabilities:
                lacking.append(f"a GPU of compute capability {', '.join(capabilities)} (this is {gpu.name}, {gpu.capability})")
        return lacking

    def _fix(self, lacking: list[str]) -> str:
        if not lacking:
            return ""
        return INSTALL[self.library] + ("; `isthmus build` on the H100" if self.needs_gpu else "")

    def check_machine(self, options: O) -> None:
        """Nothing that an option asks for depends on the machine: where a build is not possible, the bundle is built elsewhere."""

    def unsupported(self, job: Job[O]) -> list[Reason]:
        """Operators, types and sizes that TensorRT refuses; see `support`.

        Raises:
            UsageError: Patterns of layers are given for another precision.
        """
        from .support import unsupported

        job.options.check_precision(job.precision)
        return unsupported(cast("Job[TensorRTOptions]", job))

    def observed(self, job: Job[O]) -> tuple[str, ...]:
        """The activations of the layers that compute in FP8, or have INT4 weights; see `lower.selection`."""
        from .lower import selection

        return selection(job).observed()

    def quantised(self, job: Job[O]) -> tuple[Layer, ...]:
        """The layers that compute in FP8, or have INT4 weights; see `lower.selection`."""
        from .lower import selection

        return selection(job).layers

    def lower(self, job: Job[O], folder: Path) -> Lowered:
        """Writes `model.onnx`, `plugins/`, and `build.sh`; the recipe is in the details. Where `sampler.onnx` is asked for, the recipe
        makes the engine of it, in place of the model.

        Raises:
            MachineError: The graph needs our plugins, this machine cannot make them, and the plan is to be built on it.
            IsthmusError: Lowering failed.
        """
        from ...exporter.passes.write_attention import WriteAttention
        from .command import FILE, script
        from .lower import write_model

        written, details, tables = write_model(job, folder)
        sampler = None
        if job.loop is not None:
            # TensorRT-RTX 1.7.1 does not compile its own attention within a loop: Myelin is "called with unknown input tensor".
            sampler = write_sampler(folder / MODEL, job.loop, first=WriteAttention(lambda _: True))
            written, details = [*written, sampler.note], {**details, "sampler": sampler.details}
        plugins, made = self._plugins(job, folder)
        recipe = self._recipe(job, folder, plugins, details, sampler)
        (folder / FILE).write_text(script(recipe), "utf-8")
        (folder / FILE).chmod(0o755)
        return Lowered(
            device=self.device(job.options),
            notes=(*written, *made),
            details={**details, "build": recipe.model_dump(mode="json")},
            tables=tuple(tables),
        )

    def _plugins(self, job: Job[O], folder: Path) -> tuple[tuple[PluginLibrary, ...], tuple[str, ...]]:
        from .plugins import architectures, copy_into, how_to_make, needed, to_be_made

        operators = needed(job.onnx) if job.options.ssm_op == "plugin" else ()
        if not operators:
            return (), ()
        wanted = architectures(self.compute_capabilities(job.options))
        try:
            made = copy_into(folder, operators, wanted)
        except MachineError as error:
            if not self.needs_gpu:
                raise MachineError(
                    f"the plan needs our plugins, and they cannot be made here: {error.message}",
                    hint=f"{error.hint}; or choose --ssm-op decomposed",
                ) from error
            entry = to_be_made(operators, wanted)
            return (entry,), (how_to_make(entry, error),)
        size = (folder / made.path).stat().st_size
        return (made,), (f"{made.path} ({size / 2**20:.1f} MiB) runs {', '.join(operators)} on {', '.join(wanted)}",)

    def _recipe(
        self,
        job: Job[O],
        folder: Path,
        plugins: tuple[PluginLibrary, ...],
        details: Mapping[str, object],
        sampler: WrittenSampler | None,
    ) -> Recipe:
        from ...exporter.passes._rewrite import dims

        shapes = {value.name or "": tuple(dims(value) or ()) for value in job.onnx.graph.inputs}
        sizes = dict(job.sizes)
        if job.loop is not None and sampler is not None:
            batch = shapes[job.loop.latent][0]
            if isinstance(batch, str):
                sizes[PICTURES] = job.loop.pictures(sizes[batch])
            shapes = dict(sampler.inputs)
        profiles, reasons = profiles_of(shapes.items(), sizes)
        if reasons:
            raise UnsupportedError("an engine needs a range for every size", reasons=reasons)
        return Recipe(
            library=self.library,
            model=MODEL if sampler is None else SAMPLER,
            engine=ENGINES[self.library],
            profiles=profiles,
            workspace=job.options.workspace,
            plugins=plugins,
            plugin_override=bool(plugins),
            compute_capabilities=self.compute_capabilities(job.options),
            timing_cache=str(getattr(job.options, "timing_cache", "")),
            timeout=job.options.build_timeout,
            fp8=expected_fp8(folder / (MODEL if sampler is None else SAMPLER), details.get("fp8")),
            versions={self.library: version} if (version := installed_version(self.library)) else {},
        )

    def build(self, folder: Path, manifest: Manifest, *, required: bool, trust: bool = False) -> Built:
        """Builds the engine in a child process, and reads it back where TensorRT has the GPU for that; see `Target.build`.

        Returns:
            Stage `plan`: `built`; `lowered` where this machine cannot build; `blocked` when layers that have to compute in FP8 do not,
            named by PyTorch module.

        Raises:
            MachineError: `required`, and this machine lacks the library or the GPU.
            UnsupportedError: The library refuses the model; the reasons name the PyTorch modules.
            IntegrityError: The bundle has no recipe for this target, or its plugins are not those of the recipe.
            IsthmusError: The library ended its process, or did not end in time.
        """
        from .plugins import make_missing

        recipe = recipe_of(manifest, self.library)
        lacking = self._lacking(recipe.compute_capabilities)
        try:
            if lacking:
                raise MachineError(f"not built here: {' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing")
            recipe = make_missing(folder, recipe, trust=trust)
        except MachineError as error:
            if required:
                raise MachineError(error.message, reasons=error.reasons, hint=error.hint or self._fix(lacking)) from error
            return Built(StageResult(name="plan", verdict="lowered", reason=f"{error.message} (fix: {error.hint or self._fix(lacking)})"))
        return self._built(folder, recipe)

    def _built(self, folder: Path, recipe: Recipe) -> Built:
        from ...exporter.passes.scope import MODULE
        from .compiler import Request
        from .inspector import not_fp8, parse_layers
        from .library import timing_cache
        from .process import compile_in_child

        gpu = find_gpu() if self.needs_gpu else None
        outcome = compile_in_child(
            Request(
                modules=MODULES[self.library],
                folder=folder.absolute(),
                recipe=recipe,
                module_key=MODULE,
                timing_cache=timing_cache(recipe.timing_cache, installed_version(self.library), gpu) if gpu else None,
                layers=folder.absolute() / LAYERS if gpu else None,
            )
        )
        if outcome.reasons:
            raise UnsupportedError(
                f"{self.library} {outcome.version} does not build {recipe.model}",
                reasons=outcome.reasons,
                hint="see `isthmus lint`; another --precision or --opset may help",
            )
        missing = not_fp8(parse_layers((folder / LAYERS).read_text("utf-8")), recipe.fp8) if gpu else []
        words = f"{self.library} {outcome.version}"
        engine = {
            "file": recipe.engine,
            "sha256": sha256_of(folder / recipe.engine),
            "bytes": outcome.engine_bytes,
            "library": self.library,
            "version": outcome.version,
            "gpu": gpu.name if gpu else "",
            "compute_capabilities": list(recipe.compute_capabilities),
            "seconds": round(outcome.seconds, 3),
            "peak_rss": outcome.peak_rss,
            "network_layers": outcome.network_layers,
            "plugins": list(outcome.plugins),
            "warnings": list(outcome.warnings),
        }
        if gpu:
            engine["fp8"] = {"expected": len(recipe.fp8), "found": len(recipe.fp8) - len(missing)}
        note = (
            f"{words} built {recipe.engine} ({outcome.engine_bytes / 2**20:.1f} MiB) in {outcome.seconds:.1f} s, "
            f"with up to {outcome.peak_rss / 2**20:.0f} MiB of memory"
        )
        return Built(
            stage=StageResult(
                name="plan",
                verdict="blocked" if missing else "built",
                reason="; ".join(map(str, missing)),
                device=f"{gpu.name}, {words}" if gpu else words,
            ),
            device=f"{gpu.name} (sm_{gpu.capability.replace('.', '')}), {words}" if gpu else "",
            notes=(note,),
            details={"engine": engine, "build": recipe.model_dump(mode="json")},
        )

    def engines(self, manifest: Manifest) -> tuple[str, ...]:
        """The engine, and the plugin libraries that it loads."""
        recipe = recipe_of(manifest, self.library)
        return (recipe.engine, *(plugin.path for plugin in recipe.plugins))

    def stages(self, folder: Path, manifest: Manifest, *, trust: bool = False) -> list[Stage]:
        """`onnx` (`quantized` in fp8 and int4): the file in ONNX Runtime on the CPU, whose Q/DQ is exact. `sampler`, with `--sampler loop`:
        the sampling graph, as well. `device`: the engine on the GPU.

        Args:
            folder: The bundle's folder.
            manifest: Its manifest.
            trust: Execute an engine that isthmus did not build for this bundle. Never taken from the bundle itself.
        """
        name = "quantized" if manifest.precision in ("fp8", "int4") else "onnx"
        widened, sampling = manifest.precision == "bf16", "sampler" in manifest.details
        hosts = [Stage(name, _onnx_opener(folder / MODEL, widened=widened))]
        if sampling:
            hosts.append(Stage("sampler", _onnx_opener(folder / SAMPLER, widened=widened), sampling=True))
        engine = ENGINES[self.library]
        lacking = [] if (folder / engine).is_file() else [f"{engine} is not built"]
        lacking += [] if find_gpu() is not None else ["there is no NVIDIA GPU here"]
        lacking += [] if installed_version(self.library) else [f"the package {self.library} is not installed"]
        if lacking:
            return [*hosts, Stage("device", None, reason=" and ".join(lacking), sampling=sampling)]
        return [*hosts, Stage("device", lambda: _engine_runner(folder, manifest, self.library, trust=trust), sampling=sampling)]


def expected_fp8(path: Path, details: Any) -> tuple[Fp8Layer, ...]:
    """The nodes that have to compute in FP8, from the lowering's details, with the number of activations that each multiplies.

    Raises:
        IsthmusError: A node is not in the file, or does not read FP8 there.
    """
    if not isinstance(details, Mapping) or not details.get("layers"):
        return ()
    import onnx_ir as ir

    from .quantized import product

    nodes = {node.name: node for node in ir.traversal.RecursiveGraphIterator(ir.load(path).graph)}
    layers, reasons = [], []
    for entry in details["layers"]:
        node = nodes.get(entry["node"])
        found = product(node) if node is not None else None
        if found is None or not (found.a.fp8 and found.b.fp8):
            reasons.append(Reason(f"node {entry['node']} is to compute in FP8, and does not read it in {path.name}", where=entry["module"]))
            continue
        operands = sum(not operand.weight for operand in (found.a, found.b))
        layers.append(Fp8Layer(node=entry["node"], module=entry["module"], operands=max(1, operands)))
    if reasons:
        raise IsthmusError("the lowering lost layers that are to compute in FP8", reasons=reasons, hint="this is a bug; please report it")
    return tuple(layers)


def _onnx_opener(path: Path, *, widened: bool) -> Callable[[], Runner]:
    def make() -> Runner:
        from ..onnxruntime.session import OnnxRuntimeRunner
        from ..onnxruntime.widened import WidenedRunner

        return WidenedRunner(path) if widened else OnnxRuntimeRunner(path, lean=True)

    return make


def _engine_runner(folder: Path, manifest: Manifest, library: Library, *, trust: bool) -> Runner:
    from .session import EngineRunner

    return EngineRunner(folder, manifest, library, trust=trust)
