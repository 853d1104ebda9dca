"""The native kernels beyond the sweep: elementary functions, threads, states over splits, refusals, other instruction sets, sanitizers."""

import math
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from isthmus.exporter.errors import UsageError
from isthmus.exporter.op import OPS
from isthmus.exporter.ops import native
from isthmus.exporter.ops.native import binding, cmake, numpy_call, schemas

EXP, EXP2, SOFTPLUS, SILU, EXP2_NEAR = range(5)
LEVELS = ("baseline", "avx2", "avx2x16", "avx512")


@pytest.fixture(params=LEVELS)
def level(request):
    if reason := numpy_call.missing(request.param):
        pytest.skip(f"not run: {reason}")
    return request.param


def probe(function, x, level):
    library = native.load(native.build())
    x = np.ascontiguousarray(x, np.float32)
    y = np.full_like(x, np.nan)
    library.choose_level(level)
    try:
        library.probe(function, numpy_call.buffer(x), numpy_call.buffer(y), x.size)
    finally:
        library.choose_level("")
    return y


def units(got, expected):
    """The largest error in units of the last place of float32."""
    return float(np.max(np.abs(got.astype(np.float64) - expected) / np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)))


def test_exponentials_are_right_to_the_last_units(level):
    x = np.linspace(-86.9, 88.7, 1_000_003).astype(np.float32)
    assert units(probe(EXP, x, level), np.exp(x.astype(np.float64))) <= 1
    # The scan's: 1.6 * 2^-24 of the polynomial is 1.6 units just below a power of two, and its sums round half a unit.
    x = np.linspace(-125.9, 127.4, 1_000_003).astype(np.float32)
    assert units(probe(EXP2, x, level), np.exp2(x.astype(np.float64))) <= 2.25
    x = np.linspace(-125.0, 125.0, 1_000_003).astype(np.float32)
    assert units(probe(EXP2_NEAR, x, level), np.exp2(x.astype(np.float64))) <= 2.25


def test_exponentials_at_the_ends(level):
    ends = np.array([-np.inf, -3e38, -1000.0, -200.0, 0.0, -0.0, 1000.0, np.inf, np.nan], np.float32)
    expected = np.array([0, 0, 0, 0, 1, 1, np.inf, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(probe(EXP, ends, level), expected)
    np.testing.assert_array_equal(probe(EXP2, ends, level), expected)


def test_softplus_and_silu(level):
    x = np.concatenate([np.linspace(-86, 100, 400_001), -np.logspace(-6, 1, 1001), np.logspace(-6, 1, 1001)]).astype(np.float32)
    wide = x.astype(np.float64)
    # The exponential's two units, and as many from the series and its quotient.
    assert units(probe(SOFTPLUS, x, level), np.logaddexp(wide, 0.0)) <= 4
    assert units(probe(SILU, x[x != 0], level), (wide / (1 + np.exp(-wide)))[x != 0]) <= 4
    assert np.isnan(probe(SOFTPLUS, [np.nan], level)).all()
    assert probe(SOFTPLUS, [np.inf], level)[0] == np.inf


def inputs_of(sweep, name, case):
    inputs, attributes, reference = sweep.prepared(name, case, "float32")
    return OPS[name], dict(inputs), attributes, reference


ANY_CASE = {
    "selective_scan": "everything",
    "linear_attention": "gated delta, a key channel",
    "normalized_linear_attention": "square",
    "rwkv7": "initial state",
    "causal_conv1d": "everything",
}


@pytest.mark.parametrize("name", list(OPS))
def test_the_number_of_threads_does_not_change_a_bit(name, sweep):
    op, inputs, attributes, _ = inputs_of(sweep, name, ANY_CASE[name])
    one, many = (numpy_call.run(op, inputs, attributes, threads=n) for n in (1, 7))
    for key, value in one.items():
        np.testing.assert_array_equal(value, many[key])


@pytest.mark.parametrize("name", list(OPS))
def test_nan_is_not_swallowed(name, sweep, level):
    op, inputs, attributes, _ = inputs_of(sweep, name, ANY_CASE[name])
    for argument in op.inputs:
        if argument.name not in inputs:
            continue
        damaged = inputs[argument.name].copy()
        damaged.flat[damaged.size // 2] = np.nan
        outputs = numpy_call.run(op, inputs | {argument.name: damaged}, attributes, level=level)
        assert any(np.isnan(x).any() for x in outputs.values()), argument.name


SPLITS = [1, 5, 8, 16, 31, 63]
LENGTH_AXES = {"selective_scan": 1, "linear_attention": 1, "rwkv7": 1, "causal_conv1d": 2}


@pytest.mark.parametrize("at", SPLITS)
@pytest.mark.parametrize("name", list(LENGTH_AXES))
def test_a_split_sequence_with_the_carried_state_is_the_sequence(name, at, sweep):
    op, inputs, attributes, _ = inputs_of(sweep, name, ANY_CASE[name])
    axis = LENGTH_AXES[name]
    long = {a.name for a in op.inputs if "length" in a.shape}

    def part(start, stop):
        cut = [slice(None)] * axis + [slice(start, stop)]
        return {n: x[tuple(cut)] if n in long else x for n, x in inputs.items()}

    whole = numpy_call.run(op, inputs, attributes)
    first = numpy_call.run(op, part(0, at), attributes)
    second = numpy_call.run(op, part(at, None) | {"initial_state": first["last_state"]}, attributes)
    joined = np.concatenate([first["y"], second["y"]], axis=axis)
    # Chunks end elsewhere, so that sums are made in another order: some units of float32.
    assert sweep.error(joined, whole["y"].astype(np.float64), joined.ndim - 1) < 3e-6
    assert sweep.error(second["last_state"], whole["last_state"].astype(np.float64), 1) < 3e-6


def test_sizes_beyond_one_block_of_everything(sweep):
    rng = np.random.Generator(np.random.PCG64(5))
    batch, length, channels, state, groups = 2, 37, 2 * 133, 19, 2
    op = OPS["selective_scan"]
    inputs = {
        "u": rng.standard_normal((batch, length, channels)),
        "delta": rng.uniform(0.001, 0.1, (batch, length, channels)),
        "A": -rng.uniform(1, 16, (channels, state)),
        "B": rng.standard_normal((batch, length, groups * state)),
        "C": rng.standard_normal((batch, length, groups * state)),
        "z": rng.standard_normal((batch, length, channels)),
    }
    inputs = {n: x.astype(np.float32) for n, x in inputs.items()}
    for reverse in (False, True):
        attributes = op.resolve({"reverse": reverse})
        sweep.check(op, numpy_call.run(op, inputs, attributes), op.part("reference").reference(inputs, attributes), "float32", "float32")
    op = OPS["rwkv7"]
    heads, key, value = 1, 70, 131
    widths = {"r": key, "decay": key, "k": key, "v": value, "a": key, "b": key}
    inputs = {n: (rng.standard_normal((batch, length, heads * w)) * 0.1).astype(np.float32) for n, w in widths.items()}
    inputs["decay"] = -np.abs(inputs["decay"])
    attributes = {"num_heads": heads}
    sweep.check(op, numpy_call.run(op, inputs, attributes), op.part("reference").reference(inputs, attributes), "float32", "float32")
    op = OPS["causal_conv1d"]
    inputs = {"x": rng.standard_normal((1, 3, 2500)), "weight": rng.standard_normal((3, 1, 90))}
    inputs = {n: x.astype(np.float32) for n, x in inputs.items()}
    attributes = {"silu": True}
    sweep.check(op, numpy_call.run(op, inputs, attributes), op.part("reference").reference(inputs, attributes), "float32", "float32")


@pytest.mark.parametrize("name", list(OPS))
def test_no_tokens_give_the_state_back(name, sweep):
    op, inputs, attributes, _ = inputs_of(sweep, name, ANY_CASE[name])
    axes = {"length": 0, "tokens": 0}
    shapes = {
        a.name: tuple(axes.get(dim, s) for dim, s in zip(a.shape, inputs[a.name].shape, strict=True)) for a in op.inputs if a.name in inputs
    }
    empty = {n: np.zeros(shape, np.float32) if 0 in shape else inputs[n] for n, shape in shapes.items()}
    outputs = numpy_call.run(op, empty, attributes)
    assert outputs["y"].size == 0
    if "last_state" in outputs:
        np.testing.assert_array_equal(outputs["last_state"], inputs["initial_state"])


# Refusals.


def test_shapes_that_do_not_fit_are_refused_in_words(sweep):
    op, inputs, attributes, _ = inputs_of(sweep, "selective_scan", "everything")
    library = native.load(native.build())
    outputs = [np.zeros((3, 64, 6), np.float32), np.zeros((3, 6, 4), np.float32)]

    def call(**changed):
        arrays = inputs | changed
        buffers = {n: numpy_call.buffer(x) for n, x in arrays.items() if x is not None}
        library.run(op, buffers, [numpy_call.buffer(x) for x in outputs], attributes, threads=1)

    call()
    with pytest.raises(UsageError, match="A has 7 on axis 0, expected 6"):
        call(A=np.zeros((7, 4), np.float32))
    with pytest.raises(UsageError, match="B has 7 on axis 2, expected a multiple of 4"):
        call(B=np.zeros((3, 64, 7), np.float32))
    with pytest.raises(UsageError, match="do not divide"):
        call(B=np.zeros((3, 64, 16), np.float32), C=np.zeros((3, 64, 16), np.float32))
    with pytest.raises(UsageError, match="u has 2 axes, expected 3"):
        call(u=np.zeros((64, 6), np.float32))
    with pytest.raises(UsageError, match="delta is missing"):
        call(delta=None)
    with pytest.raises(UsageError, match="A has element type 10, expected 1"):
        call(A=np.zeros((6, 4), np.float16))
    outputs[0] = np.zeros((3, 64, 5), np.float32)
    with pytest.raises(UsageError, match="y does not have the shape"):
        call()


def test_a_rule_without_its_inputs_is_refused(sweep):
    op, inputs, attributes, reference = inputs_of(sweep, "linear_attention", "gated delta, a key channel")
    library = native.load(native.build())
    outputs = [np.zeros(reference[a.name].shape, np.float32) for a in op.outputs]
    for rule in ("linear", "gated", "delta", "no such rule"):
        buffers = {n: numpy_call.buffer(x) for n, x in inputs.items()}
        with pytest.raises(UsageError, match="linear_attention: "):
            library.run(op, buffers, [numpy_call.buffer(x) for x in outputs], attributes | {"update_rule": rule}, threads=1)


def test_an_unknown_instruction_set_is_refused():
    library = native.load(native.build())
    with pytest.raises(UsageError, match="there is no instruction set 'mmx'"):
        library.choose_level("mmx")


@pytest.mark.parametrize(("value", "starts"), [("baseline", "baseline "), ("sse9", "there is no instruction set 'sse9'")])
def test_the_environment_chooses_the_instruction_set(value, starts):
    code = (
        "import ctypes, sys; b = ctypes.create_string_buffer(512); ctypes.CDLL(sys.argv[1]).isthmus_levels(b, 512); print(b.value.decode())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(native.build())],
        env=os.environ | {"ISTHMUS_OPS_ISA": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(starts)


# The kernels as they are compiled.


def test_kernels_define_nothing_outside_their_instruction_set(tmp_path):
    """The linker keeps one copy of an inline function: one of AVX-512 in place of the baseline's would stop older processors."""
    if platform.machine() != "x86_64" or shutil.which("nm") is None:
        pytest.skip("not run: needs x86-64 and nm (Debian package binutils)")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    generate(tmp_path)
    flags = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl".split()
    for op in OPS:
        target = tmp_path / f"{op}.o"
        compile_kernel(compiler, op, target, tmp_path, "-DISTHMUS_ISA=avx512", "-DISTHMUS_LANES=16", "-O1", *flags)
        names = subprocess.run(["nm", "--defined-only", "-C", str(target)], capture_output=True, text=True, check=True).stdout
        outside = [line for line in names.splitlines() if "isthmus::avx512::" not in line and line.split()[1] in "WVuTDBR"]
        assert not outside, op


def generate(folder):
    ops = [OPS[name] for name in OPS]
    (folder / "schemas.h").write_text(schemas.header(ops))
    (folder / "schemas.cpp").write_text(schemas.tables(ops))


def compile_kernel(compiler, op, target, folder, *flags):
    source = OPS[op].folder / "kernel.cpp"
    common = ["-std=gnu++17", "-Wno-psabi", "-ffp-contract=fast", "-fno-math-errno", f"-I{cmake.HERE}", f"-I{folder}"]
    subprocess.run([compiler, *common, *flags, "-c", str(source), "-o", str(target)], check=True)


CROSS = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}


def test_arm64_kernels_under_emulation(tmp_path, sweep):
    """The NEON build of every kernel, in qemu's user mode, on one case of each operator and dtype."""
    if lacking := [package for tool, package in CROSS.items() if shutil.which(tool) is None]:
        pytest.skip(f"not run: needs the Debian packages {', '.join(lacking)}")
    generate(tmp_path)
    compiler = "aarch64-linux-gnu-g++"
    flags = ["-O1", "-fPIC", "-DISTHMUS_ISA=baseline", "-DISTHMUS_LANES=4"]
    objects = [tmp_path / f"{op}.o" for op in OPS]
    for op, target in zip(OPS, objects, strict=True):
        compile_kernel(compiler, op, target, tmp_path, *flags)
    shared = [cmake.HERE / name for name in ("operators.cpp", "c_api.cpp", "probe.cpp")]
    sources = [*shared, tmp_path / "schemas.cpp", Path(__file__).parent / "native_driver.cpp", *objects]
    program = tmp_path / "driver"
    command = [compiler, "-std=gnu++17", "-static", "-Wno-psabi", *flags, f"-I{cmake.HERE}", f"-I{tmp_path}", *map(str, sources)]
    subprocess.run([*command, "-pthread", "-o", str(program)], check=True)
    for name in OPS:
        for dtype in ("float32", "float16", "bfloat16"):
            drive(["qemu-aarch64", str(program)], name, ANY_CASE[name], dtype, tmp_path, sweep)


def drive(command, name, case, dtype, folder, sweep):
    """Runs the driver on a case's inputs from files, and checks the outputs that it wrote."""
    op = OPS[name]
    inputs, attributes, reference = sweep.prepared(name, case, dtype)
    lines = [f"{name} 2"]
    for a in op.inputs:
        if a.name not in inputs:
            lines.append("absent")
            continue
        inputs[a.name].tofile(folder / f"{a.name}.in")
        lines.append(describe(inputs[a.name], folder / f"{a.name}.in"))
    kinds = {a.name: np.dtype(np.float32) if a.wide else inputs[op.inputs[0].name].dtype for a in op.outputs}
    empty = {n: np.empty(reference[n].shape, kind) for n, kind in kinds.items()}
    lines += [describe(empty[n], folder / f"{n}.out") for n in empty]
    for a in op.attributes:
        value = attributes[a.name]
        lines.append(f"text {value}" if isinstance(value, str) else f"number {float(value)!r}")
    subprocess.run([*command], input="\n".join(lines) + "\n", text=True, check=True)
    outputs = {n: np.fromfile(folder / f"{n}.out", kind).reshape(empty[n].shape) for n, kind in kinds.items()}
    sweep.check(op, outputs, reference, dtype, "float32")


def describe(x, path):
    return f"{path} {binding.DTYPES[str(x.dtype)]} {x.itemsize} {x.ndim} {' '.join(map(str, x.shape))}"


@pytest.mark.matrix
def test_no_read_or_write_outside_a_tensor(tmp_path, sweep):
    """Odd sizes under AddressSanitizer and UndefinedBehaviorSanitizer, at the best instruction set of this machine."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}\n")
    if (
        compiler is None
        or subprocess.run([compiler, *sanitize, str(empty), "-o", str(tmp_path / "empty")], capture_output=True, check=False).returncode
    ):
        pytest.skip("not run: needs a C++ compiler with AddressSanitizer (Debian package g++)")
    generate(tmp_path)
    wide = "avx2" in native.load(native.build()).levels()
    lanes = ["-DISTHMUS_LANES=8", "-mavx2", "-mfma", "-mf16c"] if wide else ["-DISTHMUS_LANES=4"]
    flags = ["-O1", "-DISTHMUS_ONE_LEVEL", "-DISTHMUS_ISA=baseline", *lanes, *sanitize]
    objects = [tmp_path / f"{op}.o" for op in OPS]
    for op, target in zip(OPS, objects, strict=True):
        compile_kernel(compiler, op, target, tmp_path, *flags)
    shared = [cmake.HERE / name for name in ("operators.cpp", "c_api.cpp", "probe.cpp")]
    sources = [*shared, tmp_path / "schemas.cpp", Path(__file__).parent / "native_driver.cpp", *objects]
    program = tmp_path / "driver"
    command = [compiler, "-std=gnu++17", "-Wno-psabi", *flags, f"-I{cmake.HERE}", f"-I{tmp_path}", *map(str, sources)]
    subprocess.run([*command, "-pthread", "-o", str(program)], check=True)
    for name in OPS:
        for case in ("short, odd channels", "short, odd sizes", "gated, odd sizes", "plain", ANY_CASE[name]):
            if case in {c.name for c in sweep.cases(OPS[name])}:
                for dtype in ("float32", "float16"):
                    drive([str(program)], name, case, dtype, tmp_path, sweep)


def test_the_polynomials_leading_terms_are_exact():
    """exp(0) = 1, and near 0 the error goes with the exponent: decays of long sequences do not drift."""
    x = np.array([0.0, 1e-7, 1e-5, 1e-4], np.float32)
    assert np.abs(probe(EXP, -x, "") - np.exp(-x.astype(np.float64))).max() <= 2.0**-24
    assert math.isclose(probe(EXP2, np.zeros(1), "")[0], 1.0, rel_tol=0)
