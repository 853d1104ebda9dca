"""Linear attention of FP8 (e4m3) queries, keys and values: numbers through the interpreter, products in the machine code, refusals."""

import math
import zlib

import ml_dtypes
import numpy as np
import pytest

from isthmus.exporter.errors import UsageError
from isthmus.exporter.op import OPS
from isthmus.exporter.ops.gpu import compile as gpu_compile
from isthmus.exporter.ops.gpu import interpret
from isthmus.exporter.ops.linear_attention.fp8 import fold_scales
from isthmus.exporter.ops.linear_attention.gpu import FP8

OP = OPS["linear_attention"]
LARGEST = 448.0
CASES = [c for c in OP.part("cases").cases() if c.attributes["update_rule"] in ("linear", "gated")]
# y has the dtype of the decay, and without one it is float16.
ROWS = [(c.name, out) for c in CASES for out in (("float16", "bfloat16") if c.attributes["update_rule"] == "gated" else ("float16",))]
NUMPY = {"float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16), FP8: np.dtype(ml_dtypes.float8_e4m3fn)}


def _quantized(case, out):
    """Inputs of the node, those of the reference, and the scales."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(case.name.encode())))
    made = {n: x for n, x in case.make(rng).items() if x is not None}
    scales = {n: float(np.abs(made[n]).max()) / LARGEST for n in "qkv"}
    node = {n: (made[n] / scales[n]).astype(NUMPY[FP8]) for n in "qkv"}
    for name, dtype in (("decay", NUMPY[out]), ("initial_state", np.dtype(np.float32))):
        if name in made:
            node[name] = made[name].astype(dtype)
    exact = {n: x.astype(np.float64) * scales.get(n, 1.0) for n, x in node.items()}
    return node, exact, scales


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "out"), ROWS)
def test_every_case_agrees_with_the_reference_of_the_dequantised_inputs(sweep, name, out):
    case = next(c for c in CASES if c.name == name)
    node, exact, scales = _quantized(case, out)
    attributes = OP.resolve(case.attributes)
    key = node["q"].shape[-1] // attributes["q_num_heads"]
    folded, unit = fold_scales(attributes["scale"], key, *(scales[n] for n in "qkv"))
    if "initial_state" in node:
        node["initial_state"] = (node["initial_state"] / unit).astype(np.float32)
    outputs = interpret.run(OP, node, {**attributes, "scale": folded})
    outputs["last_state"] = outputs["last_state"] * np.float32(unit)
    sweep.check(OP, outputs, OP.part("reference").reference(exact, attributes), out, "float32")


def test_a_scale_of_zero_is_resolved_before_it_is_folded():
    assert fold_scales(0.0, 64, 0.5, 0.25, 2.0) == (0.5 * 0.25 * 2.0 / 8.0, 0.5)
    assert fold_scales(3.0, 64, 0.5, 0.25, 2.0) == (3.0 * 0.25, 0.5)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ((0.0, 1.0, 1.0), "q_scale: got 0.0, expected a positive number"),
        ((1.0, -2.0, 1.0), "k_scale: got -2.0"),
        ((1.0, 1.0, math.nan), "v_scale: got nan"),
        ((1.0, 1.0, math.inf), "v_scale: got inf"),
        ((1e-20, 1e-20, 1.0), "the product of the scales is 1.25e-41, outside float32's normal range"),
        ((1e20, 1e-20, 1e-20), r"k_scale \* v_scale is 1e-40"),
    ],
)
def test_scales_that_cannot_be_folded_are_refused(scales, message):
    with pytest.raises(UsageError, match=message):
        fold_scales(0.0, 64, *scales)


@pytest.mark.parametrize(("rule", "form"), [("delta", "DeltaLinearAttention"), ("gated_delta", "GatedDeltaLinearAttention")])
def test_the_delta_rules_refuse_fp8_and_say_what_to_do(rule, form):
    rng = np.random.Generator(np.random.PCG64(1))
    inputs = {n: rng.standard_normal((1, 4, 16)).astype(NUMPY[FP8]) for n in "qkv"}
    inputs["beta"] = np.ones((1, 4, 1), np.float16)
    if rule == "gated_delta":
        inputs["decay"] = np.zeros((1, 4, 1), np.float16)
    with pytest.raises(UsageError) as caught:
        interpret.run(OP, inputs, OP.resolve({"q_num_heads": 1, "kv_num_heads": 1, "update_rule": rule}))
    (reason,) = caught.value.reasons
    assert (reason.where, reason.what) == (form, f"no kernel takes {FP8}")
    assert reason.fix == "dequantize the activations before the node: it takes bfloat16, float16, float32"


def test_a_decay_of_a_dtype_that_y_cannot_have_is_refused():
    node, _, _ = _quantized(next(c for c in CASES if c.name == "gated, odd sizes"), "float16")
    node["decay"] = node["decay"].astype(np.float32)
    with pytest.raises(UsageError) as caught:
        interpret.run(OP, node, OP.resolve({"q_num_heads": 3, "kv_num_heads": 3, "update_rule": "gated"}))
    wanted = {reason.what for reason in caught.value.reasons}
    assert wanted == {"needs decay in float16", "needs decay in bfloat16"}


@pytest.mark.parametrize(("architecture", "opcode"), [("sm_90a", "QGMMA"), ("sm_89", "QMMA")])
def test_queries_times_keys_are_fp8_products(tmp_path, monkeypatch, architecture, opcode):
    """Without a decay a key channel; it scales the factors, which then are no FP8 numbers."""
    monkeypatch.setenv("ISTHMUS_CACHE_DIR", str(tmp_path))
    chunked = [p for p in OP.part("gpu").plans() if p.dtype == FP8 and p.name.endswith("chunks") and p.types["y"] == "float16"]
    assert len(chunked) == 3
    for plan in chunked:
        scaled = plan.name.startswith("decay a key channel")
        launch = next(launch for launch in plan.launches if launch.name == "chunk_outputs")
        if scaled:
            assert any(launch.name == "chunk_products" for launch in plan.launches)
            continue
        compiled = gpu_compile.compile_launch(OP, plan, launch, architecture)
        assert gpu_compile.opcodes(compiled).get(opcode, 0) >= 2, plan.name
        assert compiled.facts.spills == 0
