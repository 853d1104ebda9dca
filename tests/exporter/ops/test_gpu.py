"""The GPU kernels: their plans, what the compiler makes of them, and what the interpreter computes beyond the sweep."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from isthmus.exporter.errors import IsthmusError, MachineError, UsageError
from isthmus.exporter.op import OPS
from isthmus.exporter.ops.gpu import compile as gpu_compile
from isthmus.exporter.ops.gpu import interpret
from isthmus.exporter.ops.gpu import plan as plans
from isthmus.exporter.ops.gpu.__main__ import differences, golden, table
from isthmus.exporter.ops.gpu.__main__ import main as command
from isthmus.exporter.ops.gpu.expressions import cpp, evaluate, names

GOLDEN = Path(__file__).parents[2] / "goldens" / "kernels.json"
WITH = [name for name in OPS if OPS[name].has("gpu")]

pytestmark = pytest.mark.xdist_group("compiled kernels")  # one process compiles each once


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISTHMUS_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


def _every(name):
    return OPS[name].part("gpu").plans()


def _half(name):
    """One plan and launch for each kernel function of an operator, in float16."""
    found = {}
    for plan in _every(name):
        for launch in plan.launches:
            if plan.dtype == "float16":
                found.setdefault(launch.name, (plan, launch))
    return found.values()


# Expressions.


@pytest.mark.parametrize(
    ("text", "value", "code", "used"),
    [
        ("cdiv(length, 64)", 4, "cdiv(length, 64)", {"length"}),
        ("batch * (length - 1) // 7", 85, "((batch * (length - 1)) / 7)", {"batch", "length"}),
        (
            "min(length, 3) + max(batch, 9)",
            12,
            "(std::min<std::int64_t>(length, 3) + std::max<std::int64_t>(batch, 9))",
            {"batch", "length"},
        ),
        ("length % 16 == 8 and batch < 9", True, "(((length % 16) == 8) && (batch < 9))", {"batch", "length"}),
        ("length > 200 or batch != 3", False, "((length > 200) || (batch != 3))", {"batch", "length"}),
    ],
)
def test_an_expression_is_the_same_in_python_and_cpp(text, value, code, used):
    assert evaluate(text, {"length": 200, "batch": 3}) == value
    assert cpp(text) == code
    assert names(text) == used


def test_names_are_renamed_in_cpp():
    assert cpp("cdiv(length, 4) * batch", {"length": "sizes[0]"}) == "(cdiv(sizes[0], 4) * batch)"


@pytest.mark.parametrize(
    "text", ["length / 2", "f(length)", "__import__('os')", "length.real", "1.5", "min(1, 2, 3)", "a < b < c", "-1", "(", ""]
)
def test_what_is_not_of_the_grammar_is_refused(text):
    with pytest.raises(IsthmusError, match="is not an expression"):
        evaluate(text, {"length": 4, "a": 1, "b": 2, "c": 3})


def test_a_name_without_value_is_named():
    with pytest.raises(IsthmusError, match="'width' in 'width \\+ 1' has no value"):
        evaluate("width + 1", {"length": 4})


# Plans.


@pytest.mark.parametrize("name", WITH)
def test_plans_name_only_what_is_there(name):
    op = OPS[name]
    plans.check(op, _every(name))
    keys = [(p.form, p.dtype, p.name) for p in _every(name)]
    assert len(set(keys)) == len(keys)
    assert {p.form for p in _every(name)} == {form.op_type for form in op.forms}


def test_faults_of_plans_are_all_listed():
    op = OPS["causal_conv1d"]
    plan = _every("causal_conv1d")[0]
    launch = replace(plan.launches[0], grid=("cdiv(tokens, 4)", "1", "1"), rename={"wrong": "batch", "rows": "lines"})
    with pytest.raises(IsthmusError) as caught:
        plans.check(op, [replace(plan, launches=(launch,), fits="depth < 3")])
    assert {word for word in ("'tokens'", "'wrong'", "'lines'", "'depth'") if any(word in str(r) for r in caught.value.reasons)} == {
        "'tokens'",
        "'wrong'",
        "'lines'",
        "'depth'",
    }


def test_sizes_that_no_kernel_takes_are_refused_with_the_reasons():
    sizes = {"batch": 1, "length": 8, "channels": 4, "state": 300, "groups": 1}
    with pytest.raises(UsageError, match="needs state <= 256"):
        plans.choose(_every("selective_scan"), "SelectiveScan", "float32", sizes)
    with pytest.raises(UsageError, match="no kernel takes float64"):
        plans.choose(_every("selective_scan"), "SelectiveScan", "float64", sizes)


def test_what_passes_32_bits_is_refused():
    op = OPS["causal_conv1d"]
    plan = _every("causal_conv1d")[0]
    known = plans.values(op, plan, {"batch": 2**16, "channels": 2**16, "length": 4, "width": 4}, {"silu": False})
    rows = next(p for p in plans.parameters(op, plan, plan.launches[0]) if p.name == "rows")
    with pytest.raises(UsageError, match="rows = 4294967296"):
        plans.integer(plan.launches[0], rows, known)
    with pytest.raises(UsageError, match="the grid"):
        plans.grid(replace(plan.launches[0], grid=("1", "batch", "1")), known)
    assert plans.grid(replace(plan.launches[0], when="length > 4"), known) is None


# What the compiler makes of the kernels.


@pytest.mark.matrix
@pytest.mark.full  # .ci/run calls `make kernels`
def test_registers_shared_memory_and_spills_are_as_recorded():
    """Of two launches of each kernel function. `make kernels` compiles and checks all of them.

    Renew with `python -m isthmus.exporter.ops.gpu --golden tests/goldens/kernels.json` and read the difference.
    """
    recorded = json.loads(GOLDEN.read_text("utf-8"))
    found = golden(list(table("sm_90a", disassemble=False, sample=True)))
    assert {name.split("/")[0] for name in found} == set(WITH)
    assert differences(found, {name: recorded[name] for name in found if name in recorded}) == []


def test_every_kernel_is_recorded_and_none_spills():
    recorded = json.loads(GOLDEN.read_text("utf-8"))
    every = [(n, p.form, p.dtype, p.name, launch.name) for n in WITH for p in _every(n) for launch in p.launches]
    # The second launch of a kernel in a plan is recorded as "kernel 2".
    assert sorted(re.sub(r" \d+$", "", name) for name in recorded) == sorted("/".join(row) for row in every)
    assert [name for name, facts in recorded.items() if facts["spills"]] == []


@pytest.mark.skipif("ISTHMUS_FULL_TESTS" not in os.environ, reason="not run: `make kernels` does the same, and takes minutes")
def test_the_whole_table_is_as_recorded(capsys):
    assert command(["--golden", str(GOLDEN), "--check"]) == 0, capsys.readouterr().err


def test_the_check_names_every_difference(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    only = ["--operator", "causal_conv1d", "--golden", str(path)]
    assert command(only) == 0
    assert command([*only, "--check"]) == 0
    recorded = json.loads(path.read_text("utf-8"))
    first, second, *rest = recorded
    recorded[first]["registers"] += 1
    recorded["causal_conv1d/CausalConv1d/float64/short/causal_conv1d"] = recorded.pop(second)
    path.write_text(json.dumps(recorded))
    capsys.readouterr()
    assert command([*only, "--check"]) == 1
    captured = capsys.readouterr()
    assert f"{len(rest) + 2} launches of 1 operators, 3 differences" in captured.out
    for line in (f"{first}: registers", f"{second}: is not recorded", "float64/short/causal_conv1d: is recorded, and no kernel"):
        assert line in captured.err
    spilled = {"a": {"spills": 8}}
    assert differences(spilled, spilled) == ["a: spills 8 bytes"]


# RWKV-7's kernels are those of linear attention with other constants: once is enough.
ELSEWHERE = [(n, architecture) for n in WITH for architecture in ("sm_89", "sm_120") if (n, architecture) != ("rwkv7", "sm_89")]


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "architecture"), ELSEWHERE)
def test_every_kernel_compiles_for_the_other_architectures(name, architecture):
    for plan, launch in _half(name):
        compiled = gpu_compile.compile_launch(OPS[name], plan, launch, architecture)
        assert f".target {architecture}" in compiled.ptx
        assert compiled.cubin.startswith(b"\x7fELF")


_TUNED = (
    "the tiles are chosen for sm_90a, whose products take their factors from shared memory; on these they stand in registers, and spill"
)


_SPILLS = pytest.mark.xfail(strict=True, reason=_TUNED)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "architecture"), [pytest.param(*row, marks=[_SPILLS] * (row[0] in ("linear_attention", "rwkv7"))) for row in ELSEWHERE]
)
def test_no_kernel_spills_on_the_other_architectures(name, architecture):
    spills = {
        f"{plan.name}: {launch.name}": gpu_compile.compile_launch(OPS[name], plan, launch, architecture).facts.spills
        for plan, launch in _half(name)
    }
    assert not any(spills.values()), spills


@pytest.mark.matrix
@pytest.mark.parametrize("name", WITH)
def test_tensor_cores_are_used_where_they_are_claimed(name):
    claimed = OPS[name].part("gpu").TENSOR_CORES
    found = set()
    for plan, launch in _half(name):
        compiled = gpu_compile.compile_launch(OPS[name], plan, launch, "sm_90a")
        found |= {compiled.facts.name} if "wgmma.mma_async" in compiled.ptx else set()
        # Two more than the plan passes: the scratch memories.
        assert compiled.facts.parameters == compiled.ptx.partition(")")[0].count(".param")
        assert compiled.facts.parameters == len(plans.parameters(OPS[name], plan, launch)) + 2
    assert bool(found) == claimed


@pytest.mark.parametrize("name", WITH)
def test_the_machine_code_of_an_operator_has_hopper_s_products_where_claimed(name):
    claimed, found = OPS[name].part("gpu").TENSOR_CORES, False
    for plan, launch in _half(name):
        counts = gpu_compile.opcodes(gpu_compile.compile_launch(OPS[name], plan, launch, "sm_90a"))
        assert not counts.keys() & {"LDL", "STL"}, launch.name
        found = found or "HGMMA" in counts
        if claimed and found:  # disassembling takes longer than compiling
            break
    assert found == claimed


def test_the_scan_of_16_states_exchanges_nothing_and_loads_matrices_whole():
    """Its design: no shuffles, and as few loads as 16-byte words allow."""
    op = OPS["selective_scan"]
    plan = next(p for p in _every("selective_scan") if (p.form, p.dtype, p.name) == ("SelectiveScan", "float16", "state 16, whole"))
    counts = gpu_compile.opcodes(gpu_compile.compile_launch(op, plan, plan.launches[0], "sm_90a"))
    # Three copies of the token (two in the loop, one for an odd end): 16 states, softplus, and the gate each.
    assert counts["MUFU.EX2"] == 3 * 18
    assert "SHFL" not in counts


def test_compiled_code_is_cached_and_names_no_folder(monkeypatch):
    op = OPS["causal_conv1d"]
    plan = _every("causal_conv1d")[0]
    first = gpu_compile.compile_launch(op, plan, plan.launches[0], "sm_90a")
    monkeypatch.setattr(gpu_compile, "_compile", None)
    assert gpu_compile.compile_launch(op, plan, plan.launches[0], "sm_90a") == first
    assert str(Path.cwd()) not in first.ptx
    assert ".py" not in first.ptx


def test_a_parameter_can_be_baked_in():
    op = OPS["causal_conv1d"]
    plan = _every("causal_conv1d")[0]
    whole = gpu_compile.compile_launch(op, plan, plan.launches[0], "sm_90a")
    baked = gpu_compile.compile_launch(op, plan, plan.launches[0], "sm_90a", {"silu": 1})
    assert baked.facts.parameters == whole.facts.parameters - 1
    assert baked.key != whole.key


def test_kernels_that_were_imported_for_the_interpreter_are_refused():
    op = OPS["causal_conv1d"]
    plan = _every("causal_conv1d")[0]
    kernel = triton.runtime.interpreter.InterpretedFunction(plan.launches[0].kernel.fn)
    with pytest.raises(MachineError, match="TRITON_INTERPRET"):
        gpu_compile.compile_launch(op, plan, replace(plan.launches[0], kernel=kernel), "sm_90a")


# What the interpreter computes: its own faults are put right, and nothing of that stays.


@triton.jit
def _product(a, b, c, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


@triton.jit
def _converted(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


def _dot(dtype, precision):
    rng = np.random.Generator(np.random.PCG64(3))
    a, b = (torch.from_numpy(rng.standard_normal((16, 16))).to(dtype) for _ in range(2))
    c = torch.zeros(16, 16)
    launch = plans.Launch(_product, ("1", "1", "1"), {"N": 16, "PRECISION": precision})
    interpret.execute(launch, (1, 1, 1), [a, b, c])
    return float((c.double() - a.double() @ b.double()).abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_products_of_narrow_numbers_are_right(dtype):
    assert _dot(dtype, "ieee") < 1e-5


def test_products_in_tf32_are_as_coarse_as_the_hardware_s():
    assert 1e-4 < _dot(torch.float32, "tf32") < 3e-2
    assert _dot(torch.float32, "ieee") < 1e-5


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", np.inf), ("float8_e4m3fn", 448.0)])
def test_conversions_round_to_even_and_saturate(dtype, limit):
    bits = np.random.Generator(np.random.PCG64(4)).integers(0, 2**32, 4096, dtype=np.uint32)
    x = np.where(np.isfinite(bits.view(np.float32)), bits.view(np.float32), 1.9999)
    x[:4] = [1.999, 500.0, -1e9, 0.00097]
    y = torch.empty(4096, dtype=getattr(torch, dtype))
    interpret.execute(plans.Launch(_converted, ("1", "1", "1"), {"N": 4096}), (1, 1, 1), [torch.from_numpy(x), y])
    with np.errstate(over="ignore"):
        expected = np.clip(x, -limit, limit).astype(getattr(ml_dtypes, dtype)).astype(np.float32)
    np.testing.assert_array_equal(y.float().numpy(), expected)


def test_the_interpreter_leaves_triton_as_it_was():
    watched = [
        (tl, "sum"),
        (tl, "load"),
        (tl.block_type, "__init__"),
        (tl.tensor, "__init__"),
        (triton.runtime.interpreter, "_convert_float"),
    ]
    before = [getattr(place, name) for place, name in watched]
    assert _dot(torch.float32, "ieee") < 1e-5
    assert [getattr(place, name) for place, name in watched] == before
    with pytest.raises(Exception, match="rror"):  # a failure inside a kernel, here a pointer that is none
        interpret.execute(plans.Launch(_converted, ("1", "1", "1"), {"N": 4}), (1, 1, 1), [1, 2])
    assert [getattr(place, name) for place, name in watched] == before


# The operators beyond the sweep.


def _scan(batch, length, channels, state, groups=1, *, seed=5):
    rng = np.random.Generator(np.random.PCG64(seed))
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731 - one line, used below
    return {
        "u": normal(batch, length, channels),
        "delta": np.abs(normal(batch, length, channels)) * 0.1,
        "A": -np.abs(normal(channels, state)) - 0.1,
        "B": normal(batch, length, groups * state),
        "C": normal(batch, length, groups * state),
        "z": normal(batch, length, channels),
        "initial_state": normal(batch, channels, state),
    }


def _agrees(op, inputs, attributes, plan):
    attributes = op.resolve(attributes)
    got, expected = interpret.run(op, inputs, attributes, plan), op.part("reference").reference(inputs, attributes)
    for name, values in expected.items():
        assert np.isfinite(got[name]).all(), name
        assert np.abs(got[name] - values).max() <= 2e-5 * np.abs(values).max(), name


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("state", "groups", "kind"), [(16, 1, "state 16"), (3, 2, "state to 8"), (24, 1, "state to 64"), (130, 1, "state to 256")]
)
@pytest.mark.parametrize("split", ["whole", "chunked"])
def test_every_plan_of_the_scan_computes_the_scan(state, groups, kind, split, reverse):
    """Each plan is right wherever it fits, preferred or not: 70 tokens are two chunks of 36 and 34."""
    op = OPS["selective_scan"]
    plan = next(p for p in _every("selective_scan") if (p.form, p.dtype, p.name) == ("GatedSelectiveScan", "float32", f"{kind}, {split}"))
    _agrees(op, _scan(3, 70 if split == "chunked" else 9, 6, state, groups), {"reverse": reverse, "delta_softplus": reverse}, plan)


def test_the_scan_s_extra_memory_does_not_grow_with_the_length():
    op = OPS["selective_scan"]
    plan = next(p for p in _every("selective_scan") if p.name == "state 16, chunked")
    sizes = {"batch": 1, "channels": 1536, "state": 16, "groups": 1}
    workspace = []
    for length in (4096, 65536):
        known = plans.values(op, plan, {**sizes, "length": length}, {"delta_softplus": 0, "reverse": 0})
        workspace.append(sum(4 * np.prod(plans.shapes(op, plan, known)[w.name]) for w in plan.workspace))
    assert max(workspace) <= 1.1 * min(workspace)
    assert max(workspace) < 8 * 2**20


@pytest.mark.parametrize(
    ("batch", "channels", "length", "chosen"), [(1, 1536, 4096, "chunked"), (16, 1536, 4096, "whole"), (1, 1536, 1, "whole")]
)
def test_the_scan_is_cut_where_the_gpu_would_be_idle(batch, channels, length, chosen):
    sizes = {"batch": batch, "channels": channels, "length": length, "state": 16, "groups": 1}
    plan = plans.choose(_every("selective_scan"), "SelectiveScan", "float16", sizes)
    assert plan.name == f"state 16, {chosen}"


@pytest.mark.parametrize("width", [2, 3, 5, 8, 9])
@pytest.mark.parametrize("name", ["short", "long"])
@pytest.mark.parametrize("length", [1, 5, 40])
def test_every_plan_of_the_convolution_takes_every_width(name, width, length):
    rng = np.random.Generator(np.random.PCG64(6))
    shapes = {"x": (2, 5, length), "weight": (5, 1, width), "bias": (5,), "initial_state": (2, 5, width - 1)}
    inputs = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    plan = next(p for p in _every("causal_conv1d") if (p.dtype, p.name) == ("float32", name))
    _agrees(OPS["causal_conv1d"], inputs, {"silu": True}, plan)
