"""The quick plugins of TensorRT 11. Its own module is not run: a stand-in has its operators and reads its signatures."""

import subprocess
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from isthmus.exporter.errors import IsthmusError
from isthmus.exporter.op import OPS
from isthmus.exporter.ops.gpu import compile as gpu_compile
from isthmus.exporter.ops.gpu import plan as plans
from isthmus.exporter.ops.plugin import quick


def _nodes():
    spec = spec_from_file_location("plugin_nodes", Path(__file__).with_name("nodes.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NODES = _nodes()
FORMS = NODES.FORMS
SIZES = NODES.SIZES
described = NODES.described
fields = NODES.fields


class FakeInt:
    """As TensorRT's symbolic integers: their operators, no more, and a symbolic integer on the left. Its value shows only at the end."""

    def __init__(self, value):
        self.hidden = value.hidden if isinstance(value, FakeInt) else value

    is_constant = False

    def _with(self, other, function):
        return FakeInt(int(function(self.hidden, other.hidden if isinstance(other, FakeInt) else other)))

    def __add__(self, other):
        return self._with(other, lambda a, b: a + b)

    def __sub__(self, other):
        return self._with(other, lambda a, b: a - b)

    def __mul__(self, other):
        return self._with(other, lambda a, b: a * b)

    def __floordiv__(self, other):
        return self._with(other, lambda a, b: a // b)

    def __lt__(self, other):
        return self._with(other, lambda a, b: a < b)

    def __bool__(self):
        raise RuntimeError("a symbolic expression is no boolean")


class FakeAPI:
    """The part of `tensorrt.plugin` that `quick.register` uses, with its checks of signatures."""

    SymInt32 = FakeInt

    class TensorDesc:
        def __init__(self, shape, dtype):
            self.shape_expr, self.dtype = (
                shape,
                type("DataType", (), {"name": {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}[dtype]}),
            )

    class KernelLaunchParams:
        grid_x = grid_y = grid_z = block_x = block_y = block_z = 1
        shared_mem = 0

    class SymIntExprs(list):
        def __init__(self, count):
            super().__init__([None] * count)

    class AutoTuneCombination:
        def __init__(self, types, layout):
            self.types, self.layout = types.split(", "), layout

    def __init__(self):
        self.functions = {}

    def from_shape_expr(self, shape, dtype):
        return shape, dtype.name

    def __getattr__(self, name):
        if name not in ("register", "autotune", "aot_impl"):
            raise AttributeError(name)
        return lambda plugin: lambda function: self.functions.setdefault((plugin, name), function)


class TestQuick:
    """The quick plugins of TensorRT 11. Its own module is not run: a stand-in has its operators and reads its signatures."""

    @pytest.mark.parametrize(("name", "op_type"), FORMS)
    def test_symbolic_sizes_give_the_launch_of_the_numbers(self, name, op_type):
        op = OPS[name]
        every = op.part("tensorrt-quick").plans()
        attributes = {**fields(op, op_type), **plans.form_of(op, op_type).fixed}
        inputs, _ = described(op, op_type, "float16")
        shapes = [shape for _, shape in inputs]
        known = {a.name: a for a in op.inputs}
        free = ("batch", "length", "tokens")
        symbols = [
            [FakeInt(s) if d in free else s for d, s in zip(known[n].shape, shape, strict=True)]
            for n, shape in zip(plans.form_of(op, op_type).inputs, shapes, strict=True)
        ]
        expected = quick.choose(op, every, op_type, "float16", shapes, attributes)
        got = quick.choose(op, every, op_type, "float16", symbols, attributes, FakeAPI())
        assert (got.plan, got.takes, got.baked, got.count) == (expected.plan, expected.takes, expected.baked, expected.count)
        assert tuple(FakeInt(g).hidden for g in got.grid) == expected.grid
        assert tuple(FakeInt(e).hidden for e in got.extra) == expected.extra

    def test_expressions_of_symbols(self):
        api = FakeAPI()
        functions = quick._functions(api)
        for a, b in ((7, 3), (3, 7), (8, 8)):
            x, y = quick.Symbol(FakeInt(a), api), quick.Symbol(FakeInt(b), api)
            assert [functions[n](x, y).value.hidden for n in ("cdiv", "min", "max")] == [-(-a // b), min(a, b), max(a, b)]
            assert [v.value.hidden for v in (9 - x, 9 * x, 99 // x, 9 + x, x % y)] == [9 - a, 9 * a, 99 // a, 9 + a, a % b]

    def test_what_does_not_fit_is_refused(self):
        op = OPS["selective_scan"]
        inputs, _ = described(op, "SelectiveScan", "float16", {**SIZES, "state": 300})
        with pytest.raises(IsthmusError, match="no quick plugin of SelectiveScan takes these inputs"):
            quick.choose(
                op,
                op.part("tensorrt-quick").plans(),
                "SelectiveScan",
                "float16",
                [s for _, s in inputs],
                {"reverse": 0, "delta_softplus": 0},
            )

    def test_the_parameters_are_rearranged(self):
        types = ["u64 .ptr .global .align 1", "u64", "u32", "u64", "u64", "u64"]
        declared = ",\n\t".join(f".param .{t} kernel_param_{i}" for i, t in enumerate(types))
        ptx = f"head\n.visible .entry kernel(\n\t{declared}\n)\n{{ ld 0 kernel_param_0; 1 kernel_param_1; 3 kernel_param_3; }}"
        arranged = quick.arrange(ptx, (0, 3, 2, 0), 4)
        head, _, body = arranged.partition(")")
        assert [line.split()[-1].rstrip(",") for line in head.splitlines()[2:]] == [
            "kernel_param_0",
            "unread_param_1",
            "kernel_param_2",
            "kernel_param_1",
        ]
        assert body == "\n{ ld 0 kernel_param_0; 1 kernel_param_1; 3 kernel_param_0; }"
        with pytest.raises(IsthmusError, match="the kernel uses scratch memory: kernel_param_5"):
            quick.arrange(ptx.replace("3 kernel_param_3", "5 kernel_param_5"), (0, 3, 2, 1), 4)
        with pytest.raises(IsthmusError, match="expected 9 parameters"):
            quick.arrange(ptx, tuple(range(9)), 9)

    @pytest.mark.parametrize(
        ("name", "op_type", "dtype"), [("causal_conv1d", "CausalConv1d", "float16"), ("selective_scan", "SelectiveScan", "bfloat16")]
    )
    def test_what_the_shell_returns(self, tmp_path, name, op_type, dtype):
        op = OPS[name]
        api = FakeAPI()
        every = op.part("tensorrt-quick").plans()
        quick.register(op, every, "sm_90a", api)
        inputs, outputs = described(op, op_type, dtype)
        given = [
            FakeAPI.TensorDesc([FakeInt(s) if i < 2 and len(shape) == 3 else s for i, s in enumerate(shape)], t) for t, shape in inputs
        ]
        for desc in given:  # constants know their value
            desc.shape_expr = [
                type("Constant", (FakeInt,), {"is_constant": True, "constant_value": lambda self: self.hidden})(s) for s in desc.shape_expr
            ]
        settings = list(fields(op, op_type).values())
        results = api.functions[f"isthmus::{op_type}", "register"](*given, *settings)
        assert [tuple(FakeInt(s).hidden for s in shape) for shape, _ in results] == [shape for _, shape in outputs]
        (combination,) = api.functions[f"isthmus::{op_type}", "autotune"](*given, *settings, ())
        wide = "FP32|FP32|FP32"
        assert combination.types == [wide if a == "float32" else "FP32|FP16|BF16" for a, _ in (*inputs, *outputs)]
        kernel, ptx, launch, extra = api.functions[f"isthmus::{op_type}", "aot_impl"](*given, *settings, (), 0)
        chosen = quick.choose(
            op, every, op_type, dtype, [s for _, s in inputs], {**{a.name: a.default for a in op.attributes}, **fields(op, op_type)}
        )
        assert (launch.grid_x, launch.grid_y, launch.grid_z, launch.block_x) == (*chosen.grid, chosen.threads)
        assert [e.hidden for e in extra] == list(chosen.extra)
        # The PTX declares what TensorRT passes, and the assembler takes it.
        declared = ptx.partition(".entry")[2].partition(")")[0].splitlines()[1:]
        widths = ["u32" if len(inputs) <= i < len(inputs) + len(extra) else "u64" for i in range(chosen.count)]
        assert [line.split()[1].lstrip(".") for line in declared] == widths
        (tmp_path / "kernel.ptx").write_text(ptx)
        assembler = gpu_compile._tool_path("ptxas")
        subprocess.run(
            [assembler, "-arch=sm_90a", "-o", tmp_path / "kernel.cubin", tmp_path / "kernel.ptx"], check=True, capture_output=True
        )
        assert kernel in ptx
        signature = api.functions[f"isthmus::{op_type}", "aot_impl"].__signature__
        assert list(signature.parameters)[-2:] == ["outputs", "tactic"]
