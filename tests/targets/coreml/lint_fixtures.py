"""For each rule of the Neural Engine a program that it objects to and one that is in order, built operation by operation and serialised."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isthmus.exporter.memory import settled
from isthmus.exporter.quiet import quiet
from isthmus.targets.coreml.interpreter import load
from isthmus.targets.coreml.rules.program import Package, ProgramSubject

with quiet("coremltools"):  # it reports on import that it was not tested with this torch, and that no Core ML is here
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb  # noqa: N813 - what coremltools' own pages call it
    from coremltools.converters.mil.mil import types

GIB = 1 << 30
B, C, S = 1, 64, 64
SHAPE = (B, C, 1, S)
"""The engine's own layout: channels on the second axis, positions on the last."""


def random(*shape):
    return np.random.Generator(np.random.PCG64(0)).standard_normal(shape).astype(np.float16)


def built(function, *shapes, dtype=types.fp16, state=None):
    """The program of a function of inputs of these shapes, as it reads from the specification that coremltools writes of it."""
    specs = [mb.TensorSpec(shape=shape, dtype=dtype) for shape in shapes]
    if state is not None:
        specs.append(mb.StateTensorSpec(shape=state, dtype=types.fp16))

    # MIL takes the inputs' names from the function's own.
    def one(a):
        return function(a)

    def two(a, b):
        return function(a, b)

    def three(a, b, c):
        return function(a, b, c)

    with quiet("coremltools"):
        program = mb.program(input_specs=specs, opset_version=ct.target.iOS18)((one, two, three)[len(specs) - 1])
        return converted(program, pass_pipeline=ct.PassPipeline.EMPTY)


def converted(source, **options):
    """What coremltools writes of a program or module, read again."""
    with settled():
        return load(ct.convert(source, minimum_deployment_target=ct.target.iOS18, skip_model_load=True, **options))


@functools.cache
def flexible(kind):
    """A convolution over a last axis of 64 positions, of a few numbers of them, or of any from 32 to 128."""
    import torch

    module = torch.nn.Conv2d(C, C, 1).eval()
    sizes = {
        "fixed": SHAPE,
        "enumerated": ct.EnumeratedShapes([SHAPE, (B, C, 1, 128)], default=SHAPE),
        "range": (B, C, 1, ct.RangeDim(32, 128, default=S)),
    }
    with quiet("coremltools"), torch.no_grad():
        traced = torch.jit.trace(module, torch.zeros(SHAPE))
        tensor = ct.TensorType("x", shape=sizes[kind], dtype=np.float16)
        return converted(traced, inputs=[tensor])


# Operations


@functools.cache
def relu(*shape, dtype=types.fp16):
    return built(lambda x: mb.relu(x=x, name="y"), shape, dtype=dtype)


def doubled(shape, dtype):
    return built(lambda x: mb.add(x=x, y=x, name="y"), shape, dtype=dtype)


def product(*shape):
    return built(lambda a, b: mb.matmul(x=a, y=b, name="y"), shape, shape)


def linear():
    return built(lambda x: mb.linear(x=x, weight=random(C, C), bias=random(C), name="y"), (B, S, C))


@functools.cache
def convolution(width=1, *, stored=True):
    if not stored:
        return built(lambda a, b: mb.conv(x=a, weight=b, name="y"), SHAPE, (C, C, 1, width))
    return built(lambda x: mb.conv(x=x, weight=random(C, C, 1, width), pad_type="same", name="y"), SHAPE)


def attention(*shape):
    return built(lambda a, b, c: mb.scaled_dot_product_attention(query=a, key=b, value=c, name="y"), shape, shape, shape)


def masked(lowest):
    mask = np.triu(np.full((S, S), lowest, np.float32), 1).astype(np.float16)
    return built(lambda x: mb.softmax(x=mb.add(x=x, y=mask, name="scores"), axis=-1, name="y"), (B, 1, S, S))


def transposed(*, before_einsum):
    if before_einsum:

        def split_attention(q, k):
            return mb.einsum(values=(mb.transpose(x=k, perm=[0, 3, 2, 1], name="keys"), q), equation="bkhc,bchq->bkhq", name="y")

        return built(split_attention, SHAPE, SHAPE)
    return built(lambda x: mb.relu(x=mb.transpose(x=x, perm=[0, 3, 2, 1], name="moved"), name="y"), SHAPE)


def cumulative(*, lowered):
    if lowered:
        return built(lambda x: mb.matmul(x=np.tril(np.ones((S, S), np.float16)), y=x, name="y"), (B, 1, S, S))
    return built(lambda x: mb.cumsum(x=x, axis=-1, name="y"), SHAPE)


def branch(*, lowered):
    def choose(x):
        positive = mb.greater(x=mb.reduce_max(x=x, axes=[0, 1, 2, 3], keep_dims=False), y=np.float16(0), name="positive")
        if lowered:
            return mb.select(cond=positive, a=mb.relu(x=x), b=mb.abs(x=x), name="y")
        return mb.cond(pred=positive, _true_fn=lambda: mb.relu(x=x), _false_fn=lambda: mb.abs(x=x), name="y")

    return built(choose, SHAPE)


def lstm():
    def cell(x):
        zeros = np.zeros((B, C), np.float16)
        return mb.lstm(
            x=x, initial_h=zeros, initial_c=zeros, weight_ih=random(4 * C, C), weight_hh=random(4 * C, C), output_sequence=True, name="y"
        )[0]

    return built(cell, (S, B, C))


def sine():
    return built(lambda x: mb.sin(x=x, name="y"), SHAPE)


def counted(n):
    def count(x):
        ones = mb.cast(x=mb.greater(x=x, y=np.float16(0)), dtype="fp16")
        return mb.reduce_sum(x=ones, axes=[-1], keep_dims=True, name="y")

    return built(count, (B, 1, 1, n))


def halves(axis):
    return built(lambda x: mb.split(x=x, num_splits=2, axis=axis, name="y"), SHAPE)


@functools.cache
def root_mean_square(*, divided, bounded=True):
    def norm(x):
        if divided:
            largest = mb.reduce_max(x=mb.abs(x=x), axes=[1], keep_dims=True, name="largest")
            x = mb.real_div(x=x, y=mb.maximum(x=largest, y=np.float16(1e-3)) if bounded else largest, name="divided")
        mean = mb.reduce_mean(x=mb.mul(x=x, y=x), axes=[1], keep_dims=True)
        return mb.mul(x=x, y=mb.rsqrt(x=mb.add(x=mean, y=np.float16(1e-5)), epsilon=np.float16(1e-6), name="root"), name="y")

    return built(norm, SHAPE)


def stateful(last):
    shape = (B, C, 1, last)

    def step(x, state):
        return mb.add(x=mb.read_state(input=state), y=x, name="y")

    return built(step, shape, state=shape)


@dataclass(frozen=True)
class Given:
    """A program, and what else a subject has.

    Attributes:
        program: Makes it.
        subject: Arguments of `ProgramSubject`.
        files: See `Package`.
    """

    program: Callable[[], Any]
    subject: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)

    @functools.cached_property
    def _program(self):
        return self.program()

    def open(self, *, modules=None, **more) -> ProgramSubject:
        return ProgramSubject((Package(self._program, self.files, modules or {}),), **{"target": "coreml", **self.subject, **more})


@dataclass(frozen=True)
class Fixture:
    """What a rule objects to, and the like of it that is in order.

    Attributes:
        names: The operation, or the input, state or file, that the finding is about: its type in the text, or its name.
        ends: The first chip for which the wrong one is in order; empty when that is none.
    """

    wrong: Given
    right: Given
    names: str
    ends: str = ""


def pair(wrong, right, names, ends=""):
    return Fixture(Given(wrong), Given(right), names, ends)


def peaks(program, wrong, right, names, ends=""):
    """Of one program, with two largest values of `y` and of the input."""
    return Fixture(Given(program, {"peaks": wrong}), Given(program, {"peaks": right}), names, ends)


def sized(size):
    return Given(convolution, files={"model.mlpackage/Data/weights/weight.bin": size})


FIXTURES = {
    "ANE-101": pair(lambda: relu(*SHAPE, dtype=types.fp32), lambda: relu(*SHAPE), "relu"),
    "ANE-102": pair(lambda: doubled((B, 128), types.int32), lambda: doubled((B, 128), types.fp16), "add"),
    "ANE-201": pair(lambda: flexible("range"), lambda: flexible("fixed"), "x"),
    "ANE-202": pair(lambda: flexible("enumerated"), lambda: flexible("fixed"), "x"),
    "ANE-203": pair(lambda: relu(B, 2, 4, 8, S), lambda: relu(B, 8, 8, S), "relu"),
    "ANE-204": pair(lambda: product(B, 2, 4, S, S), lambda: product(B, 8, S, S), "matmul"),
    "ANE-205": pair(lambda: relu(B, 16385), lambda: relu(B, 16384), "relu", "A16"),
    "ANE-206": pair(lambda: relu(B, C, S, 1), lambda: relu(*SHAPE), "relu"),
    "ANE-301": pair(linear, convolution, "linear"),
    "ANE-302": pair(lambda: attention(B, 16, 1024, 64), lambda: attention(B, 16, 2048, 64), "scaled_dot_product_attention"),
    "ANE-303": pair(lambda: masked(-np.inf), lambda: masked(-40000), "add"),
    "ANE-304": pair(lambda: convolution(15), lambda: convolution(13), "conv", "A16"),
    "ANE-305": pair(lambda: convolution(stored=False), convolution, "conv"),
    "ANE-306": pair(lambda: transposed(before_einsum=False), lambda: transposed(before_einsum=True), "transpose"),
    "ANE-401": pair(lambda: cumulative(lowered=False), lambda: cumulative(lowered=True), "cumsum"),
    "ANE-402": pair(lambda: branch(lowered=False), lambda: branch(lowered=True), "cond"),
    "ANE-403": pair(lstm, convolution, "lstm"),
    "ANE-404": pair(sine, lambda: relu(*SHAPE), "sin", "A15"),
    "ANE-501": peaks(lambda: product(B, 8, S, S), {"y": 32800.0}, {"y": 32700.0}, "matmul"),
    "ANE-502": pair(lambda: counted(2049), lambda: counted(2048), "reduce_sum"),
    "ANE-503": peaks(lambda: halves(-1), {"a": 4100.0}, {"a": 4090.0}, "split", "A16"),
    "ANE-504": pair(lambda: root_mean_square(divided=False), lambda: root_mean_square(divided=True), "rsqrt"),
    "ANE-505": pair(lambda: root_mean_square(divided=True, bounded=False), lambda: root_mean_square(divided=True), "real_div"),
    "ANE-601": pair(lambda: stateful(48), lambda: stateful(64), "b"),
    "ANE-602": Fixture(sized(3 * GIB // 2), sized(GIB), "model.mlpackage/Data/weights/weight.bin", "M1"),
}
"""By the rule's id. Nothing in a fixture is wrong but what its rule is about."""
