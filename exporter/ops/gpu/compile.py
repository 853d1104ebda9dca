"""Compiles kernels ahead of time, without a GPU, to PTX and to the machine code of an architecture; and reads the facts of that code."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import IsthmusError, MachineError
from ...op import CustomOp
from .plan import ALIGNMENT, Launch, Plan, parameters

ARCHITECTURES = {"sm_89": 89, "sm_90a": 90, "sm_120": 120}
"""The architectures that kernels are compiled for, and Triton's numbers for them. Triton compiles sm_120 as sm_120a."""

OPCODES = ("HGMMA", "QGMMA", "HMMA", "QMMA", "LDL", "STL", "MUFU.EX2", "SHFL", "BAR", "LDS", "STS", "LDG", "STG", "LDGSTS")
"""What is counted in the machine code: tensor core products, spills, exponentials, exchanges within a block, memory."""

_VERSION = 3  # of the cache's contents


@dataclass(frozen=True)
class Facts:
    """What the compiler made of a kernel.

    Attributes:
        name: The entry in PTX and cubin.
        architecture: Key of `ARCHITECTURES`.
        warps: Warps of a block.
        shared: Dynamic shared memory of a block, in bytes: an argument of the launch.
        static_shared: Shared memory that the code declares, in bytes.
        registers: Of a thread.
        spills: Local memory of a thread, in bytes.
        parameters: Number of parameters, with the two hidden ones.
    """

    name: str
    architecture: str
    warps: int
    shared: int
    static_shared: int
    registers: int
    spills: int
    parameters: int


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture.

    Attributes:
        key: The same for the same code: several plans share a kernel.
        ptx: For the driver to compile.
        cubin: Machine code.
        facts: What is in it.
    """

    key: str
    ptx: str
    cubin: bytes
    facts: Facts


def cache_folder() -> Path:
    """Where compiled kernels are kept: below ISTHMUS_CACHE_DIR, or the user's cache folder."""
    if root := os.environ.get("ISTHMUS_CACHE_DIR"):
        return Path(root) / "gpu"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isthmus" / "gpu"


def compile_plan(op: CustomOp, plan: Plan, architecture: str) -> tuple[Compiled, ...]:
    """Compiles every kernel of a plan, in order."""
    return tuple(compile_launch(op, plan, launch, architecture) for launch in plan.launches)


def compile_launch(
    op: CustomOp, plan: Plan, launch: Launch, architecture: str, baked: Mapping[str, int | float | bool] | None = None
) -> Compiled:
    """Compiles one kernel, or takes it from the cache.

    Args:
        op: The operator.
        plan: The plan that the launch is of.
        launch: The kernel and its constants.
        architecture: Key of `ARCHITECTURES`.
        baked: Run-time parameters that become constants, for hosts that cannot pass them.

    Raises:
        MachineError: Triton is not installed, or was told to interpret.
        IsthmusError: The kernel needs scratch memory, which no host gives it.
    """
    triton = _triton(launch)
    baked = baked or {}
    names = [*launch.kernel.arg_names]
    run_time = {p.name: p.signature() for p in parameters(op, plan, launch) if p.name not in baked}
    aligned = {n: ALIGNMENT for n, text in run_time.items() if text.startswith("*")} | dict.fromkeys(launch.divisible, launch.multiple)
    signature = {n: run_time.get(n, "constexpr") for n in names}
    constants = {**launch.constants, **baked}
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    key = _key(
        _VERSION,
        triton.__version__,
        launch.kernel.cache_key,
        architecture,
        signature,
        sorted(constants.items()),
        sorted(aligned.items()),
        options,
    )
    folder = cache_folder() / key[:2] / key
    if not (folder / "facts.json").is_file():
        _compile(triton, launch, architecture, signature, constants, aligned, options, folder)
    facts = Facts(**json.loads((folder / "facts.json").read_text("utf-8")))
    return Compiled(key, (folder / "kernel.ptx").read_text("utf-8"), (folder / "kernel.cubin").read_bytes(), facts)


def _triton(launch: Launch) -> Any:
    try:
        import triton
        from triton.runtime.jit import JITFunction
    except ImportError as error:
        raise MachineError("Triton is needed to compile GPU kernels", hint="pip install triton==3.7.1 (Linux)") from error
    if not isinstance(launch.kernel, JITFunction):
        raise MachineError("TRITON_INTERPRET was set when the kernels were imported", hint="unset it: kernels are interpreted without it")
    return triton


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _compile(
    triton: Any,
    launch: Launch,
    architecture: str,
    signature: dict[str, str],
    constants: dict[str, Any],
    aligned: dict[str, int],
    options: dict[str, int],
    folder: Path,
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [*launch.kernel.arg_names]
    source = ASTSource(
        fn=launch.kernel,
        signature=signature,
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", multiple]] for n, multiple in aligned.items()},
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        with triton.knobs.cache.scope(), triton.knobs.compilation.scope():
            triton.knobs.cache.dir = str(scratch / "triton")
            triton.knobs.compilation.disable_line_info = True  # else the code names the folders of this machine
            kernel = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURES[architecture], 32), options=options)
        shutil.rmtree(scratch / "triton")
        meta = kernel.metadata
        if meta.global_scratch_size or meta.profile_scratch_size:
            raise IsthmusError(
                f"{launch.name} needs {meta.global_scratch_size} bytes of global and {meta.profile_scratch_size} of profile scratch memory"
            )
        ptx, cubin = kernel.asm["ptx"], kernel.asm["cubin"]
        (scratch / "kernel.ptx").write_text(ptx, "utf-8")
        (scratch / "kernel.cubin").write_bytes(cubin)
        facts = _facts(meta.name, architecture, meta.num_warps, meta.shared, ptx, scratch / "kernel.cubin")
        (scratch / "facts.json").write_text(json.dumps(asdict(facts), sort_keys=True), "utf-8")
        try:
            scratch.replace(folder)
        except OSError:  # another process was first, with the same contents
            if not (folder / "facts.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _facts(name: str, architecture: str, warps: int, shared: int, ptx: str, cubin: Path) -> Facts:
    usage = _tool("cuobjdump", "-res-usage", str(cubin))
    found = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    entry = re.search(r"\.visible \.entry \w+\((.*?)\)", ptx, re.DOTALL)
    if len(found) != 4 or entry is None:
        raise IsthmusError(f"the resource usage of {name} could not be read: {usage.strip()}")
    return Facts(
        name=name,
        architecture=architecture,
        warps=warps,
        shared=shared,
        static_shared=int(found["SHARED"]),
        registers=int(found["REG"]),
        spills=int(found["STACK"]) + int(found["LOCAL"]),
        parameters=entry.group(1).count(".param"),
    )


def opcodes(compiled: Compiled) -> dict[str, int]:
    """How often each of `OPCODES` that is there occurs in the machine code. The disassembler takes longer than the compiler, so it is asked
    only here.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.cubin)
        listing = _tool("nvdisasm", "-c", str(path))
    # /*0a30*/   @!P0 LDG.E.64 R4, ...
    code = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE)
    counts = {op: sum(1 for c in code if c == op or c.startswith(f"{op}.")) for op in OPCODES}
    return {op: count for op, count in counts.items() if count}


@functools.cache
def _tool_path(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _tool(name: str, *arguments: str) -> str:
    command = [_tool_path(name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603 - Triton's own tools
    if done.returncode:
        raise IsthmusError(f"{name} failed with {done.returncode}: {done.stderr.strip()}")
    return done.stdout + done.stderr
