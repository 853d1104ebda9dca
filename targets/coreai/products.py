"""Products of float16 matrices as the run time on a CPU is given them: summed in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_PRODUCTS = frozenset({"coreai.decomposable.broadcasting_batch_matmul", "coreai.batch_matmul"})


def sum_in_float32(program: Any) -> int:
    """Computes a program's products of float16 matrices in float32, and rounds the results.

    The kernel of coreai-core 1.0.0b3 for float16 on a CPU takes 80 ns for each term, a thousand times as long as that for float32, so
    that a model of half a million parameters would take half a minute a step. The operands are float16 as before, and so are the results.
    Drop this when that kernel is as fast as the cast.

    Args:
        program: A `coreai.authoring.AIProgram`, changed in place. That of the asset on the disk stays as it is.

    Returns:
        The number of products.
    """
    from coreai._compiler.dialects import coreai
    from coreai._compiler.ir import F16Type, F32Type, InsertionPoint

    module = program._module._mlir_module
    found = 0
    with module.context, module.operation.location:
        half, single = F16Type.get(), F32Type.get()
        for operation in list(operations(program)):
            if operation.name not in _PRODUCTS or operation.results[0].type.element_type != half:
                continue
            with InsertionPoint(operation):
                left, right = (coreai.cast(operand, single) for operand in operation.operands)
                product = coreai.cast(coreai.broadcasting_batch_matmul(left, right), half)
            operation.results[0].replace_all_uses_with(product)
            operation.erase()
            found += 1
    return found


def operations(program: Any) -> Iterator[Any]:
    """Every operation of a `coreai.authoring.AIProgram`, those within others included."""
    # There is no public way to them.
    return _within(program._module._mlir_module.operation)


def _within(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from _within(inner.operation)
