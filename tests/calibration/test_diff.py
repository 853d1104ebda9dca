"""The module-by-module comparison: its figures against numpy, its bound on memory, and odd modules without false alarms."""

import inspect

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from isthmus.calibration.correspondence import Correspondence, Spot
from isthmus.calibration.diff import Reference, apart, diff
from isthmus.calibration.modules import Visitor, aliases, read_outputs, record, walk
from isthmus.calibration.onnx_values import OnnxValues, flow_of
from isthmus.calibration.pages import Pages
from isthmus.calibration.row import DEFAULT_THRESHOLDS, merged, over, threshold_of
from isthmus.exporter.errors import IsthmusError
from isthmus.exporter.flow import Flow, Step
from isthmus.exporter.onnx import to_onnx
from isthmus.exporter.passes import optimise
from isthmus.exporter.trace import trace

FP32 = DEFAULT_THRESHOLDS["fp32"]


@pytest.fixture(autouse=True)
def one_thread():
    """These models are tiny: threads cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def lowered(module, *inputs):
    """The module as ONNX, the reference, and the inputs by name."""
    module = module.eval()
    example = dict(zip(inspect.signature(module.forward).parameters, inputs, strict=False))
    program = trace(module, example)
    outputs = [f"out_{i}" for i in range(len(program.graph_signature.user_outputs))]
    model = optimise(to_onnx(program, opset=23, input_names=list(example), output_names=outputs))
    return model, Reference(module, example), {name: tensor.numpy() for name, tensor in example.items()}


def compared(model, reference, inputs, **options):
    with OnnxValues(model) as values:
        return {row.module: row for row in diff(reference, values, inputs, threshold=FP32, **options)}


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 6, bias=False), nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return self.second(self.first(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop, self.same = nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.1), nn.Identity()

    def forward(self, x):
        return x + self.drop(self.norm(self.same(self.linear(x))))


class Shared(nn.Module):
    """One block under three names, called four times, and another one in between."""

    def __init__(self):
        super().__init__()
        self.a = Block()
        self.b = self.a
        self.more = nn.ModuleList([Block(), self.a])

    def forward(self, x):
        x = self.b(self.a(self.a(x)))
        for block in self.more:
            x = block(x)
        return x


class Attentions(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.encoder(x + y)


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.GroupNorm(2, 6), nn.SiLU(), nn.Upsample(scale_factor=2), nn.AvgPool2d(2)
        )

    def forward(self, x):
        return self.layers(x)


class Named(nn.Module):
    """Takes a number by keyword and gives a dict of two tensors of one shape."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, *, scale):
        return {"q": self.q(x) * scale, "k": self.k(x)}


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.named, self.out = Named(), nn.Linear(8, 4)

    def forward(self, x, mask):
        named = self.named(x, scale=2.0)
        return self.out(torch.softmax(named["q"] @ named["k"].transpose(1, 2), -1) @ x), mask.sum(1)


class InPlace(nn.Module):
    """The activation changes what the linear layer returned, and the sum reads the change."""

    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(8, 8), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.linear(x)
        return self.act(y) + y


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(5, 8))

    def forward(self, x):  # noqa: ARG002 - its result depends on nothing
        return self.table.cos()


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.linear = Table(), nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x) * self.table(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        y, _ = self.gru(x)
        return self.out(y)


class Square(nn.Module):
    """Tokens and channels are as many: a transposed value has the shape of the original."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(self.a(x.transpose(1, 2)).transpose(1, 2).transpose(1, 2))


class Sines(nn.Module):
    """A timestep of up to 1000 as an angle: a rounding of it is 1e-5 and more of the sine."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(16, 4)

    def forward(self, t):
        return self.out(_sines(t))


def _sines(t):
    return torch.sin(t[:, None] * torch.exp(-0.1 * torch.arange(16.0)))


class SinesThrough(nn.Module):
    """Sines of large angles, through a container whose result is mostly a constant."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        nn.init.constant_(self.layers[1].bias, 100.0)

    def forward(self, t):
        return self.layers(_sines(t))


SEQUENCE = (2, 5, 8)
MODULES = {
    "two": (Two, [(3, 8)]),
    "shared": (Shared, [SEQUENCE]),
    "attentions": (Attentions, [SEQUENCE]),
    "pictures": (Pictures, [(2, 3, 8, 8)]),
    "several": (Several, [SEQUENCE, (2, 3)]),
    "in place": (InPlace, [SEQUENCE]),
    "positions": (Positions, [SEQUENCE]),
    "recurrent": (Recurrent, [SEQUENCE]),
    "square": (Square, [(2, 8, 8)]),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_faithful_program_raises_no_alarm(name):
    make, shapes = MODULES[name]
    rows = compared(*lowered(make(), *(torch.randn(shape) for shape in shapes)))
    assert not over(list(rows.values()), FP32)
    assert rows[""].total.relative_l2 < FP32
    for row in rows.values():
        assert row.visible or row.reason


def test_the_figures_are_those_of_the_formulas():
    model, reference, inputs = lowered(Two(), torch.randn(3, 8))
    first, second = (layer.weight.detach().double().numpy() for layer in (reference.module.first, reference.module.second))
    change = np.zeros_like(first)
    change[2, 3] = 0.25
    weight = model.graph.initializers["first.weight"]
    weight.const_value = ir.tensor((first + change).astype(np.float32), name="first.weight")
    rows = compared(model, reference, inputs)

    x = inputs["x"].astype(np.float64)
    r1, a1 = x @ first.T, x @ (first + change).T
    r2, a2 = r1 @ second.T, a1 @ second.T
    norm = np.linalg.norm
    # The first layer's error is its own; the second computes rightly on wrong values.
    assert rows["first"].injected.relative_l2 == pytest.approx(norm(a1 - r1) / norm(r1), rel=1e-5)
    assert rows["first"].inherited.relative_l2 == 0
    assert rows["first"].injected.max_abs == pytest.approx(np.abs(a1 - r1).max(), rel=1e-5)
    assert rows["first"].injected.sqnr_db == pytest.approx(20 * np.log10(norm(r1) / norm(a1 - r1)), abs=1e-3)
    assert rows["second"].injected.relative_l2 < 1e-6
    assert rows["second"].inherited.relative_l2 == pytest.approx(norm(a2 - r2) / norm(r2), rel=1e-4)
    assert rows["second"].total.relative_l2 == pytest.approx(norm(a2 - r2) / norm(r2), rel=1e-4)
    assert rows["first"].nodes == ("Gemm first/linear",)
    assert [row.module for row in over(list(rows.values()), FP32)] == ["first"]


def test_the_third_call_of_a_shared_module_is_told_from_the_others():
    model, reference, inputs = lowered(Shared(), torch.randn(SEQUENCE))
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert len(norms) == 5
    norms[2].attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.1)
    rows = compared(model, reference, inputs)
    assert [row.module for row in over(list(rows.values()), FP32)] == ["a.norm#3"]


def test_an_error_of_a_blocks_own_code_is_the_blocks():
    model, reference, inputs = lowered(Shared(), torch.randn(SEQUENCE))
    sums = [node for node in model.graph if node.op_type == "Add" and node.metadata_props["isthmus.module"] == "more.0"]
    sums[-1].op_type = "Sub"
    rows = compared(model, reference, inputs)
    assert [row.module for row in over(list(rows.values()), FP32)] == ["more.0"]
    assert rows["more.0"].at == "output"


def test_what_is_not_in_the_program_is_said_not_to_be():
    rows = compared(*lowered(Positions(), torch.randn(SEQUENCE)))
    assert not rows["table"].visible
    assert "folded into constants" in rows["table"].reason


def test_a_rounded_argument_is_no_fault_and_a_wrong_one_is():
    times = torch.tensor([999.7, 641.3, 12.9])
    model, reference, inputs = lowered(Sines(), times)
    # One unit in the last place of the frequencies: what another library's exp may give.
    name = next(name for name in model.graph.initializers if name.endswith("const"))
    table = model.graph.initializers[name].const_value.numpy()
    model.graph.initializers[name].const_value = ir.tensor(np.nextafter(table, np.float32(2)), name=name)
    rows = compared(model, reference, inputs)
    assert rows[""].error > FP32
    assert rows[""].sensitivity > FP32 / 8
    assert not over(list(rows.values()), FP32)
    model.graph.initializers[name].const_value = ir.tensor(table * np.float32(1.0001), name=name)
    assert [row.module for row in over(list(compared(model, reference, inputs).values()), FP32)] == [""]


def test_an_argument_is_the_matter_of_who_made_it_and_not_of_who_passes_it_on():
    """The results hardly show the error, so that the container's argument is not certain to be the program's value, and its layer's is."""
    model, reference, inputs = lowered(SinesThrough(), torch.tensor([999.7, 641.3, 12.9]))
    name = next(name for name in model.graph.initializers if name.endswith("const"))
    table = model.graph.initializers[name].const_value.numpy()
    model.graph.initializers[name].const_value = ir.tensor(np.nextafter(table, np.float32(2)), name=name)
    rows = compared(model, reference, inputs)
    assert rows[""].error > FP32
    assert rows["layers"].error < FP32
    assert not over(list(rows.values()), FP32)


@pytest.mark.parametrize("name", ["shared", "several", "attentions"])
def test_little_memory_gives_the_same_rows(name):
    make, shapes = MODULES[name]
    model, reference, inputs = lowered(make(), *(torch.randn(shape) for shape in shapes))
    whole = compared(model, reference, inputs)
    held = []

    class Spy(OnnxValues):
        def read(self, inputs, names):
            found = super().read(inputs, names)
            held.append(sum(array.nbytes for array in found.values()))
            return found

    largest = max(tensor.nbytes for call in record(reference.module, reference.tensors(inputs)) for tensor in call.outputs)
    with Spy(model) as values:
        rows = {row.module: row for row in diff(reference, values, inputs, threshold=FP32, memory=4 * largest)}
    assert list(rows) == list(whole)
    for module, row in rows.items():
        # Not equal to the last bit: what is taken out of the graph decides what ONNX Runtime fuses.
        assert row.error == pytest.approx(whole[module].error, abs=1e-6)
        assert (row.at, row.nodes, row.reason) == (whole[module].at, whole[module].nodes, whole[module].reason) or row.error < 1e-6
    assert len(held) > 2
    assert max(held) <= 2 * largest


def test_two_programs_are_compared_with_each_other():
    model, reference, inputs = lowered(Two(), torch.randn(3, 8))
    other = model.clone()
    weight = other.graph.initializers["second.weight"]
    weight.const_value = ir.tensor(1.5 * weight.const_value.numpy(), name="second.weight")
    with OnnxValues(model) as a, OnnxValues(other) as b:
        found = apart(reference, a, b, {"example": inputs})
    assert found["first"].relative_l2 == 0
    assert found["second"].relative_l2 == pytest.approx(0.5, rel=1e-5)


def test_nan_is_named_where_it_begins_and_nowhere_else():
    model, reference, inputs = lowered(Shared(), torch.randn(SEQUENCE))
    norm = [node for node in model.graph if node.op_type == "LayerNormalization"][1]
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", -100.0)
    rows = compared(model, reference, inputs)
    assert [row.module for row in over(list(rows.values()), FP32)] == ["a.norm#2"]
    assert "NaN" in rows["a.norm#2"].injected.problem
    assert rows["a.norm#2"].value()["injected"]["relative_l2"] == "inf"


def test_the_worst_case_of_a_module_counts():
    model, reference, inputs = lowered(Two(), torch.randn(3, 8))
    with OnnxValues(model) as values:
        cases = [diff(reference, values, {"x": inputs["x"] * s}, threshold=FP32, case=str(s)) for s in (1.0, 3.0)]
    best = merged(cases)
    assert [row.module for row in best] == ["first", "second", ""]
    for row in best:
        assert row.error == max(other.error for case in cases for other in case if other.module == row.module)


def test_a_threshold_for_every_precision():
    assert threshold_of("fp16") == DEFAULT_THRESHOLDS["fp16"]
    # 30 dB, less 8: 22 dB are 0.079.
    assert threshold_of("w8a8", 30.0) == pytest.approx(10 ** (-22 / 20))
    assert threshold_of("int4") == pytest.approx(10 ** (-12 / 20))
    assert threshold_of("something") == DEFAULT_THRESHOLDS["fp8"]


# The reference's calls


def test_calls_are_numbered_in_the_order_in_which_they_begin():
    module = Shared().eval()
    calls = record(module, (torch.randn(SEQUENCE),))
    assert [call.key for call in calls if call.kind == "Block"] == ["a", "a#2", "a#3", "more.0", "a#4"]
    assert calls[0].key == ""
    assert calls[0].parent is None
    assert {call.parent for call in calls if call.kind == "LayerNorm"} == {"a", "a#2", "a#3", "more.0", "a#4"}
    assert aliases(module)["more.1.norm"] == "a.norm"
    # Equal tensors have equal fingerprints: a block reads what the one before returned.
    by_key = {call.key: call for call in calls}
    assert by_key["a#2"].inputs[0] == by_key["a"].outputs[0]
    assert by_key["a.norm"].outputs[0].nbytes == 2 * 5 * 8 * 4


def test_a_reader_sees_results_and_a_visitor_replaces_them():
    module, x = Two().eval(), torch.randn(3, 8)
    found = read_outputs(module, (x,), {("first", 0)})
    np.testing.assert_array_equal(found["first", 0], module.first(x).detach().numpy())

    class Zero(Visitor):
        def leave(self, key, module, tensors):  # noqa: ARG002 - the visitor's signature
            return {0: torch.zeros_like(tensors[0])} if key == "first" else {}

    assert not walk(module, (x,), Zero()).any()
    assert module(x).any()  # the hooks are gone


def test_a_module_that_fails_is_an_error_of_ours():
    with pytest.raises(IsthmusError, match=r"the PyTorch module failed: RuntimeError.*mat1"):
        record(Two().eval(), (torch.randn(3, 7),))


# Where values are


def test_a_layout_is_undone_where_it_is_unambiguous():
    calls = record(nn.Sequential(nn.Linear(8, 6)).eval(), (torch.randn(2, 5, 8),))
    steps = (Step("m", "MatMul", "0", ("x",), ("m",)), Step("t", "Transpose", "", ("m",), ("y",)))
    found = Correspondence(calls, Flow(steps, ("x",), ("y",)), {})
    place = found.places({"x": (2, 5, 8), "m": (2, 6, 1, 5), "y": (2, 5, 6)})["0"]
    assert place.outputs == (Spot("m", (0, 2, 1)),)
    array = np.arange(60).reshape(2, 6, 1, 5)
    np.testing.assert_array_equal(place.outputs[0].arranged(array, (2, 5, 6)), array[:, :, 0].transpose(0, 2, 1))
    # With two axes of one size there are two ways, and so none.
    calls = record(nn.Sequential(nn.Linear(8, 5)).eval(), (torch.randn(2, 5, 8),))
    place = Correspondence(calls, Flow(steps, ("x",), ("y",)), {}).places({"x": (2, 5, 8), "m": (2, 5, 1, 5), "y": (2, 5, 5)})["0"]
    assert place.outputs == (None,)
    assert place.reason == "fused into the model itself: no value of its shape leaves it"


def test_subgraphs_are_read_by_the_node_that_holds_them():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 20]>
        f (float[2] x, bool c) => (float[2] y) {
            a = Neg (x)
            y = If (c) <then_branch = t () => (float[2] u) { u = Abs (a) }, else_branch = e () => (float[2] v) { v = Identity (x) }>
        }
    """)
    assert set(flow_of(model).steps[1].inputs) >= {"c", "a", "x"}


# Pages


def test_pages_hold_what_comes_next_within_the_budget():
    sizes = {"a": 4, "b": 4, "c": 4, "d": 40, "e": 4}
    order = ["a", "b", "a", "c", "d", "e", "a"]
    groups = []

    def read(keys):
        groups.append(list(keys))
        return {key: np.zeros(sizes[key], np.uint8) for key in keys}

    pages = Pages(read, order, sizes, 10)
    for key in order:
        assert pages.take(key).nbytes == sizes[key]
    # `d` is larger than the budget and comes alone; `a` is held from its first use to its second, and read again for the third.
    assert groups == [["a", "b"], ["c"], ["d"], ["e", "a"]]
    assert pages.reads == 4


def test_pages_skip_what_is_not_taken():
    groups = []

    def read(keys):
        groups.append(list(keys))
        return {key: np.zeros(1, np.uint8) for key in keys}

    pages = Pages(read, ["a", "b", "c"], dict.fromkeys("abc", 1), 2)
    pages.take("a")
    pages.take("c")
    assert groups == [["a", "b"], ["c"]]
