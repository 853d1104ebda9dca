"""TensorRT 11's quick plugins: what TensorRT would be told about the launch is computed, and Triton's interpreter executes it so.

The parameters are passed as TensorRT passes them: inputs, integers, outputs; the attributes are constants.
"""

import numpy as np
import torch

from isthmus.exporter.op import evaluate
from isthmus.exporter.ops.gpu.interpret import execute
from isthmus.exporter.ops.plugin import quick

PART = "tensorrt-quick"
# The kernels are those of the GPU part, which runs in every dtype; here one token after the other is interpreted, which takes long.
DTYPES = ("float16",)
ARITHMETIC = "float32"


def tensor(x: np.ndarray) -> torch.Tensor:
    bits = torch.from_numpy(np.array(x).view(np.int16 if x.dtype.itemsize == 2 else np.int32))
    return bits.view(getattr(torch, x.dtype.name))


def run(op, inputs, attributes):
    form = op.form(frozenset(inputs), attributes)
    dtype = inputs[op.inputs[0].name].dtype
    sizes = op.infer({n: x.shape for n, x in inputs.items()}, attributes)
    known = {a.name: a for a in op.inputs}

    def zeros(argument):
        return np.zeros([evaluate(d, sizes) for d in argument.shape], np.float32 if argument.wide else dtype)

    given = [inputs[n] if n in inputs else zeros(known[n]) for n in form.inputs]
    chosen = quick.choose(op, op.part("tensorrt-quick").plans(), form.op_type, dtype.name, [x.shape for x in given], attributes)
    outputs = {
        a.name: np.full(shape, np.nan, np.float32 if a.wide else dtype)
        for a, shape in zip(op.outputs, op.output_shapes(sizes).values(), strict=True)
    }
    results = [tensor(x) for x in outputs.values()]
    passed = [*map(tensor, given), *chosen.extra, *results]
    assert len(passed) == chosen.count
    execute(quick.interpreted(chosen), chosen.grid, [passed[i] for i in chosen.takes])
    return {
        n: r.view(torch.int16 if x.dtype.itemsize == 2 else torch.int32).numpy().view(x.dtype)
        for (n, x), r in zip(outputs.items(), results, strict=True)
    }
