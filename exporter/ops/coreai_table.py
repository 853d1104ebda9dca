"""The decompositions that take a program with operators of ours to Core AI.

coreai-torch offers three ways for an operator that it does not know. A converter function registered on each `TorchConverter` would
build the intermediate language by hand, through modules that are private in coreai-core. A composite operator is a sub-graph under a
name that the devices' compiler may know; coreai-torch 0.4.3 names none of ours but a gated delta rule, as a loop over single tokens. A
decomposition into ATen and `while_loop` needs nothing but torch, can be run in torch itself, and takes every batch and length: it is the
form of every operator here. Each operator's `coreai.py` has a function `decompose(inputs, attributes)`; its arguments are those of
`exporter.ops.torch_library.Compute`.

Measured with coreai-torch 0.4.3 and coreai-core 1.0.0b3 on a CPU: float16 inputs that a program casts to float32 are computed in float32,
bit for bit as by torch; one operator converts in about a second; programs of 20 kB, whatever the length; 1e-7 to 5e-7 from the float64
reference, with batch and length fixed or dynamic. On Apple's hardware: not run.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..op import DOMAIN, OPS, CustomOp

PART = "coreai"


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The decomposition of every torch operator of ours that has one, for `ExportedProgram.run_decompositions`."""
    table: dict[Any, Callable[..., Any]] = {}
    for name in OPS:
        op = OPS[name]
        if op.has(PART):
            op.part("torch")
            table[getattr(getattr(torch.ops, DOMAIN), name).default] = functools.partial(_decomposed, op)
    return table


def decompose(program: ExportedProgram) -> ExportedProgram:
    """The program in terms that `coreai_torch.TorchConverter` takes.

    Args:
        program: An exported program, in which operators of ours may occur.

    Returns:
        A program of ATen operators and loops; the given one is not changed.
    """
    table = coreai_torch().get_decomp_table()
    table.update(decompositions())  # not `|`, which drops what torch's table finds only when asked
    with warnings.catch_warnings():
        # Copying a program with a loop touches a class of torch.utils._pytree that torch 2.13 itself deprecates.
        warnings.filterwarnings("ignore", message=r".*LeafSpec.*", category=FutureWarning)
        decomposed: ExportedProgram = program.run_decompositions(table)
    return decomposed


def coreai_torch() -> ModuleType:
    """The module of that name, imported without its warning."""
    with warnings.catch_warnings():
        # coreai-torch 0.4.3 was validated up to torch 2.13.0, and takes the build 2.13.0+cpu for a later version.
        warnings.filterwarnings("ignore", message="coreai-torch has only been validated", category=UserWarning)
        return importlib.import_module("coreai_torch")


def _decomposed(op: CustomOp, *tensors: Tensor | None, **keywords: Any) -> Any:
    attributes = op.resolve({a.name: keywords.pop(a.name) for a in op.attributes if a.name in keywords})
    given = dict(zip((a.name for a in op.inputs), tensors, strict=False)) | keywords
    outputs = op.part(PART).decompose({name: tensor for name, tensor in given.items() if tensor is not None}, attributes)
    return outputs if len(outputs) > 1 else outputs[0]
