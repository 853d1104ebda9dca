"""Converts a module and executes the asset: in this process the one, in a child process the other, as in an export."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from isthmus.exporter.ops.coreai_table import coreai_torch
from isthmus.exporter.quiet import quiet
from isthmus.targets.coreai.conversion_child import program_of, save
from isthmus.targets.coreai.half import ToHalf
from isthmus.targets.coreai.prepare import expand, prepare
from isthmus.targets.coreai.session import CoreAIRunner
from isthmus.targets.coreai.support import unsupported


class Calls(torch.nn.Module):
    """Calls functions of their own inputs, one output each: many cases share a conversion and a process."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, *tensors):
        given = iter(tensors)
        return tuple(function(*(next(given) for _ in inputs)) for function, inputs in self.calls)


class Converter:
    """Makes assets in a folder."""

    def __init__(self, folder):
        self._folder = folder
        self._count = 0

    def traced(self, module, inputs, dynamic=None):
        with torch.no_grad(), quiet("torch.export"):
            return torch.export.export(module.eval(), tuple(inputs), dynamic_shapes=dynamic)

    def asset(self, module, inputs, *, dynamic=None, half=False, plain=False):
        """The path of the asset of a module, and the names of its inputs. `plain` is what coreai-torch alone makes of it."""
        program = self.traced(module, inputs, dynamic)
        if plain:
            with quiet(), warnings.catch_warnings():
                program = program.run_decompositions(coreai_torch().get_decomp_table())
        else:
            assert unsupported(program) == []
            program = prepare(program)
            program = expand(ToHalf(program)() if half else program)
        names = [f"in{i}" for i in range(len(inputs))]
        outputs = [f"out{i}" for i in range(len(program.graph_signature.user_outputs))]
        self._count += 1
        path = self._folder / f"{self._count}.aimodel"
        save(program_of(program, names, outputs), path, "")
        return path, names

    def run(self, path, names, inputs, dtypes=None):
        """The outputs in order."""
        with CoreAIRunner(path, dtypes or {}, timeout=120) as runner:
            outputs = runner.run({name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        return [outputs[f"out{i}"] for i in range(len(outputs))]

    def outputs(self, module, inputs, **options):
        """What the asset of a module computes."""
        path, names = self.asset(module, inputs, **options)
        return self.run(path, names, inputs)

    def cases(self, calls, **options):
        """The result of every call."""
        return self.outputs(Calls(calls), [x for _, inputs in calls for x in inputs], **options)


@pytest.fixture(scope="module")
def coreai(tmp_path_factory):
    return Converter(tmp_path_factory.mktemp("coreai"))


def close(got, want, tolerance=1e-5):
    """Whether an array is near a tensor, relative to its range; NaN and infinities stand where they stand."""
    want = want.detach().numpy()
    if got.shape != want.shape or (got.dtype.kind == "b") != (want.dtype.kind == "b"):
        return False
    if got.dtype.kind in "biu" and want.dtype.kind in "biu":
        return bool(np.array_equal(got, want))
    finite = np.abs(want[np.isfinite(want)])
    bound = tolerance * max(float(finite.max()) if finite.size else 0.0, 1e-30)
    return bool(np.allclose(got.astype(np.float64), want.astype(np.float64), rtol=tolerance, atol=bound, equal_nan=True))


@pytest.fixture(scope="session")
def is_close():
    return close
