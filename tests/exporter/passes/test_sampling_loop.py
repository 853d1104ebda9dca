"""SamplingLoop: the graph before and after, and the sampler's numbers over the same step."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from isthmus.exporter import onnx as onnx_files
from isthmus.exporter.errors import UnsupportedError
from isthmus.exporter.passes.half_precision import ToHalf
from isthmus.exporter.passes.sampling_loop import SamplingLoop, misfits
from isthmus.exporter.sampling import FILE, GraphSampler, LoopCall, LoopSampler, write_sampler
from isthmus.exporter.spec import SizeRange
from isthmus.models.flow import RectifiedFlowSampler

STEP = """<ir_version: 10, opset_import: ["" : 23]>
f (float[batch, 1, N, 4] x, float[batch] t, int64[batch] y) => (float[batch, 1, N, 4] sample) <int64[4] four = {-1, 1, 1, 1}> {
    e = Gather (table, y)
    s = Reshape (t, four)
    scaled = Mul (s, thousandth)
    u = Reshape (e, four)
    m = MatMul (x, w)
    n = Mul (m, u)
    h = Tanh (n)
    sample = Add (h, scaled)
}"""


def step(size: str = "4", batch: str = "batch") -> ir.Model:
    """A step that uses all that a step has: a weight, the time, and a class that is looked up."""
    model = ir.from_onnx_text(STEP.replace("N", size).replace("batch", batch))
    rng = np.random.Generator(np.random.PCG64(3))
    weights = {
        "w": rng.standard_normal((4, 4), dtype=np.float32),
        "table": rng.standard_normal(6, dtype=np.float32),
        "thousandth": np.array(-1e-3, np.float32),
    }
    for node in model.graph:
        node.name = f"n/{node.outputs[0].name}"
        for value in node.inputs:
            if value.name in weights and not value.is_initializer():
                value.const_value = ir.tensor(weights[value.name], name=value.name)
                value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(weights[value.name].shape)
                model.graph.register_initializer(value)
        for value in node.outputs:
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    return model


def session(model: ir.Model, level: str = "ORT_ENABLE_ALL") -> ort.InferenceSession:
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def caller(model: ir.Model):
    ready = session(model)
    return lambda inputs: {"sample": ready.run(["sample"], dict(inputs))[0]}


def sampler(**settings) -> RectifiedFlowSampler:
    defaults = {"shape": (1, 4, 4), "labels": (0, 1, 2, 2), "names": tuple("abcde"), "null_label": 5, "steps": 4, "guidance": 1.5}
    return RectifiedFlowSampler(**{**defaults, **settings})


def body_of(model: ir.Model) -> ir.Graph:
    (loop,) = (node for node in model.graph if node.op_type == "Loop")
    return loop.attributes["body"].as_graph()


def rng():
    return np.random.Generator(np.random.PCG64(0))


def test_given_and_result():
    """The graphs of the pass's docstring."""
    given = step()
    made = SamplingLoop(sampler(steps=2).loop())(given).model
    assert [node.op_type for node in given.graph][-1] == "Add", "the step graph is left as it was"
    graph, body = made.graph, body_of(made)
    assert [(v.name, str(v.shape)) for v in graph.inputs] == [("noise", "[pictures,1,4,4]"), ("y", "[pictures]")]
    assert [(v.name, str(v.shape)) for v in graph.outputs] == [("latents", "[pictures,1,4,4]")]
    # The class is looked up once, because it is the same in every step.
    assert [n.op_type for n in graph] == ["Shape", "Mul", "Expand", "Concat", "Gather", "Reshape", "Loop"]
    assert [n.op_type for n in body] == [
        "Identity", "Gather", "Expand", "Concat",
        "Reshape", "Mul", "MatMul", "Mul", "Tanh", "Add",
        "Split", "Sub", "Mul", "Add", "Gather", "Mul", "Add",
    ]  # fmt: skip
    constants = {name.removeprefix("sampling_loop/"): v.const_value.numpy() for name, v in graph.initializers.items()}
    assert constants["trips"] == 2
    np.testing.assert_array_equal(constants["times"], np.array([1000, 500], np.float32))
    np.testing.assert_array_equal(constants["change"], np.array([-0.5, -0.5], np.float32))
    np.testing.assert_array_equal(constants["null.y"], [5])
    assert constants["guidance"] == 1.5


def test_the_weights_stay_in_the_outer_graph():
    given = step()
    made = SamplingLoop(sampler().loop())(given).model
    assert not body_of(made).initializers
    assert {"w", "table", "thousandth", "four"} <= set(made.graph.initializers)
    assert made.graph.initializers["w"].const_value is given.graph.initializers["w"].const_value


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("batch", ["batch", "static"])
def test_the_numbers_of_the_sampler(method, guidance, steps, batch):
    """The same arithmetic in the same order: what differs is what ONNX Runtime fuses within the body and without."""
    drawing = sampler(method=method, guidance=guidance, steps=steps)
    model = step(batch=str(drawing.batch) if batch == "static" else batch)
    inputs, expected = drawing.loop_case(caller(model), rng())
    (got,) = session(SamplingLoop(drawing.loop())(model).model).run(None, dict(inputs))
    assert list(inputs) == ["noise", "y"]
    assert np.abs(got - expected["latents"]).max() <= 1e-5 * np.ptp(expected["latents"])
    # The pictures are these latents, clipped.
    images = drawing(caller(model), rng()).images
    np.testing.assert_array_equal(images, np.clip((expected["latents"][:, 0] + 1) / 2, 0, 1))


def test_heun_calls_one_body_twice_a_step():
    loop = sampler(method="heun", steps=3).loop()
    assert [(call.time, call.advances) for call in loop.calls] == [
        (1000, False), (pytest.approx(2000 / 3), True), (pytest.approx(2000 / 3), False), (pytest.approx(1000 / 3), True),
        (pytest.approx(1000 / 3), True),
    ]  # fmt: skip
    body = body_of(SamplingLoop(loop)(step()).model)
    assert [n.op_type for n in body].count("MatMul") == 1
    assert len(body.inputs) == len(body.outputs) + 1 == 5  # step, condition; latents, base, answer before


def test_a_picture_size_that_varies_and_numbers_of_pictures():
    drawing = sampler()
    made = SamplingLoop(drawing.loop())(step("height")).model
    assert [str(v.shape) for v in made.graph.inputs] == ["[pictures,1,height,4]", "[pictures]"]
    ready = session(made)
    for height, labels in ((3, (1,)), (9, (0, 4, 2))):
        other = dataclasses.replace(drawing, shape=(1, height, 4), labels=labels)
        inputs, expected = other.loop_case(caller(step("height")), rng())
        np.testing.assert_allclose(ready.run(None, dict(inputs))[0], expected["latents"], atol=1e-5)


def test_after_lowering_to_half_precision():
    model = step()
    ToHalf()(model)
    drawing = sampler(method="heun")
    inputs, expected = drawing.loop_case(caller(model), rng())
    made = SamplingLoop(drawing.loop())(model).model
    assert {v.dtype for v in (*made.graph.inputs, *made.graph.outputs)} == {ir.DataType.FLOAT, ir.DataType.INT64}
    (got,) = session(made, "ORT_DISABLE_ALL").run(None, dict(inputs))
    # A rounding that falls the other way is worth 2^-11, and four steps carry it on.
    np.testing.assert_allclose(got, expected["latents"], atol=4 * 2**-11 * np.abs(expected["latents"]).max())


def test_multistep_sampling_of_a_consistency_model():
    """Song et al., arXiv:2303.01469, algorithm 1: a picture, noise of the next level on it, a picture again."""
    sigmas = (80.0, 20.0, 2.0)
    calls = tuple(LoopCall(time=sigma, keep=0.0, change=1.0, noise=after) for sigma, after in zip(sigmas, (*sigmas[1:], 0.0), strict=True))
    made = SamplingLoop(LoopSampler(calls=calls, start=sigmas[0]))(step()).model
    assert [(v.name, str(v.shape)) for v in made.graph.inputs][-1] == ("step_noise", "[2,pictures,1,4,4]")
    noise, step_noise = (rng().standard_normal(shape, dtype=np.float32) for shape in ((2, 1, 4, 4), (2, 2, 1, 4, 4)))
    y, call = np.array([1, 3]), caller(step())
    x = noise * np.float32(sigmas[0])
    for index, sigma in enumerate(sigmas):
        x = call({"x": x, "t": np.full(2, sigma, np.float32), "y": y})["sample"]
        if index < 2:
            x = x + np.float32(sigmas[index + 1]) * step_noise[index]
    (got,) = session(made).run(None, {"noise": noise, "y": y, "step_noise": step_noise})
    np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-5)


QUANTISED = """<ir_version: 10, opset_import: ["" : 23]>
f (float[batch, 4] x, float[batch] t, float[batch, 4] c) => (float[batch, 4] sample)
  <float[4, 4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, float half = {0.5}, int64[2] column = {-1, 1}> {
    e = Tanh (c)
    q = QuantizeLinear <output_dtype = 17> (e, half)
    d = DequantizeLinear (q, half)
    tall = Transpose <perm = [1, 0]> (d)
    wide = Transpose <perm = [1, 0]> (tall)
    k = Relu (e)
    wq = QuantizeLinear <output_dtype = 17> (w, half)
    wd = DequantizeLinear (wq, half)
    km = MatMul (k, wd)
    t2 = Reshape (t, column)
    a = Mul (x, wide)
    b = MatMul (a, wd)
    h = Add (b, km)
    sample = Mul (h, t2)
}"""


def test_nothing_that_is_quantised_passes_into_the_loop():
    """There TensorRT would multiply in half precision, and ONNX Runtime 1.32 ends its process on it."""
    model = ir.from_onnx_text(QUANTISED)
    for node in model.graph:
        node.name = f"n/{node.outputs[0].name}"
    made = SamplingLoop(LoopSampler(calls=(LoopCall(time=1.0, change=1.0),)))(model).model
    # `wd` is read by a product that could stand before the loop and by one within: both stay within.
    assert [n.outputs[0].name for n in made.graph] == ["sampling_loop/Shape.0", "e", "k", "latents"]
    within = {n.outputs[0].name for n in body_of(made)}
    assert {"q", "d", "tall", "wide", "wq", "wd", "km", "b"} <= within
    assert session(made).run(None, {"noise": np.ones((2, 4), np.float32), "c": np.ones((2, 4), np.float32)})[0].shape == (2, 4)


def test_names_that_the_sampling_graph_needs_are_freed():
    model = step()
    ir.convenience.rename_values([model.graph.initializers["w"], model.graph[5].outputs[0]], ["noise", "latents"])
    inputs, expected = sampler().loop_case(caller(model), rng())
    (got,) = session(SamplingLoop(sampler().loop())(model).model).run(["latents"], dict(inputs))
    np.testing.assert_allclose(got, expected["latents"], atol=1e-5)


def reasons(model: ir.Model, **changes) -> list[str]:
    loop = dataclasses.replace(sampler().loop(), **changes)
    found = [str(r) for r in misfits(model.graph, loop)]
    with pytest.raises(UnsupportedError, match="cannot be written as one graph"):
        SamplingLoop(loop)(model)
    return found


def test_steps_that_do_not_fit():
    assert reasons(step(), latent="z", output="v") == [
        "z: there is no such input; they are x, t, y",
        "v: there is no such output; they are sample",
    ]
    assert reasons(step(), null={}) == ["y: guidance needs its null condition, and the sampler has none"]
    assert reasons(step(), null={"y": np.array([5], np.int32)}) == ["y: its null condition is int32, expected int64"]
    assert reasons(step(), null={"y": np.array([5, 5])}) == ["y: its null condition has shape (2,), expected one row of ['batch']"]
    (odd,) = reasons(step(batch="3"))
    assert odd.startswith("x: guidance needs two rows a picture, and the model takes 3")
    other = step()
    other.graph.inputs[2].shape = ir.Shape(["rows"])
    assert reasons(other) == ["y: has shape ['rows'], expected one row for each of the latents, batch"]
    other = step()
    other.graph.outputs[0].shape = ir.Shape(["batch", 2, 4, 4])
    assert "expected that of the latents" in reasons(other)[0]
    other = step()
    other.graph.inputs[2].name = "noise"
    assert "is a name that the sampling graph has" in reasons(other, null={"noise": np.array([5])})[0]


def test_samplers_that_are_none():
    call = LoopCall(time=1.0, change=1.0)
    for calls in ((), (dataclasses.replace(call, previous=1.0),), (dataclasses.replace(call, advances=False),)):
        with pytest.raises(ValueError, match="a sampler needs calls"):
            LoopSampler(calls=calls)
    with pytest.raises(ValueError, match="guidance must be at least 1"):
        LoopSampler(calls=(call,), guidance=0.5)


def test_pictures_of_a_batch():
    guided, plain = sampler().loop(), sampler(guidance=1.0).loop()
    assert plain.pictures(SizeRange(1, 40, 64)) == SizeRange(1, 40, 64)
    assert guided.pictures(SizeRange(1, 40, 64)) == SizeRange(1, 20, 32)
    assert guided.pictures(SizeRange(3, 3, 5)) == SizeRange(2, 2, 2)
    with pytest.raises(ValueError, match="a picture needs 2 rows, and the model takes at most 1"):
        guided.pictures(SizeRange(1, 1, 1))
    assert isinstance(sampler(), GraphSampler)


@pytest.mark.parametrize("external", [False, True])
def test_the_file(tmp_path, monkeypatch, external):
    """Weights in a file of their own are shared; others are in each of the two files once."""
    model = step()
    model.graph.initializers["table"].const_value = ir.tensor(np.zeros(1 << 18, np.float32), name="table")
    model.graph.initializers["table"].shape = ir.Shape([1 << 18])
    if external:
        monkeypatch.setattr(onnx_files, "EXTERNAL_DATA_BYTES", 0)
    path = tmp_path / "model.onnx"
    onnx_files.save(model, path, bytes_of_weights=1 << 20)
    written = write_sampler(path, sampler().loop())
    assert written.inputs == {"noise": ("pictures", 1, 4, 4), "y": ("pictures",)}
    assert written.details["calls"] == 4
    data = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert set(data) == ({"model.onnx", FILE, "model.onnx.data"} if external else {"model.onnx", FILE})
    small = 1 << 14
    assert data[FILE] < small if external else (1 << 20) < data[FILE] < (1 << 20) + small
    ready = ort.InferenceSession(str(tmp_path / FILE), providers=["CPUExecutionProvider"])
    inputs, expected = sampler().loop_case(caller(model), rng())
    np.testing.assert_allclose(ready.run(None, dict(inputs))[0], expected["latents"], atol=1e-5)
