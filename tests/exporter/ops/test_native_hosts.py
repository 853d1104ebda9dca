"""What calls the native kernels: the torch operators, and ONNX Runtime through an interface that is declared by hand."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.exporter.errors import IsthmusError, MachineError
from isthmus.exporter.op import OPS
from isthmus.exporter.ops import native
from isthmus.exporter.ops.native import cmake, sessions
from isthmus.exporter.ops.native.torch_hook import native_kernels


def inputs_of(sweep, name, case):
    inputs, attributes, reference = sweep.prepared(name, case, "float32")
    return OPS[name], dict(inputs), attributes, reference


# torch.


def test_torch_uses_the_library_and_float64_does_not(sweep):
    native.build()
    _, inputs, attributes, reference = inputs_of(sweep, "selective_scan", "everything")
    tensors = {n: torch.from_numpy(x.copy()) for n, x in inputs.items()}
    OPS["selective_scan"].part("torch")
    with native_kernels(True):
        y, _ = torch.ops.isthmus.selective_scan(**tensors, **attributes)
        assert sweep.error(y.numpy(), reference["y"], 2) < 2e-5
        strided = tensors | {"u": tensors["u"].transpose(0, 1).contiguous().transpose(0, 1)}
        torch.testing.assert_close(torch.ops.isthmus.selective_scan(**strided, **attributes)[0], y, rtol=0, atol=0)
        with pytest.raises(MachineError, match="cannot take these tensors"):
            torch.ops.isthmus.selective_scan(**{n: x.double() for n, x in tensors.items()}, **attributes)
    y, _ = torch.ops.isthmus.selective_scan(**{n: x.double() for n, x in tensors.items()}, **attributes)
    assert y.dtype == torch.float64
    assert np.abs(y.numpy() - reference["y"]).max() < 1e-9


# ONNX Runtime.


def node(name, attributes, given, **changed):
    op = OPS[name]
    form = op.form(given, attributes)
    return op, form, sessions.session(name, form.op_type, tuple((attributes | changed).items()), "float32", native.build())


def test_a_session_refuses_shapes_that_do_not_fit(sweep):
    _, inputs, attributes, _ = inputs_of(sweep, "selective_scan", "everything")
    _, form, opened = node("selective_scan", attributes, frozenset(inputs))
    feeds = {n: inputs[n] for n in form.inputs}
    y, _ = opened.run(None, feeds)
    assert y.shape == inputs["u"].shape
    for name, shape, message in (("A", (7, 4), "A has 7 on axis 0, expected 6"), ("C", (3, 64, 12), "C has 12 on axis 2, expected 8")):
        with pytest.raises(Exception, match=message):
            opened.run(None, feeds | {name: np.zeros(shape, np.float32)})
    np.testing.assert_array_equal(opened.run(None, feeds)[0], y)


def test_shapes_are_inferred_with_their_symbols(sweep):
    _, inputs, attributes, _ = inputs_of(sweep, "selective_scan", "everything")
    _, _, opened = node("selective_scan", attributes, frozenset(inputs))
    assert [list(o.shape) for o in opened.get_outputs()] == [["batch", "length", "channels"], ["batch", "channels", "state"]]


def test_a_model_whose_static_shapes_do_not_fit_is_refused_in_words():
    import onnx_ir as ir
    import onnxruntime as ort

    from isthmus.exporter.ops.onnx_models import one_node

    op = OPS["causal_conv1d"]
    model = one_node(op, op.forms[0], {"silu": False}, ir.DataType.FLOAT, static={"batch": 1, "channels": 4, "width": 4, "length": 9})
    model.functions.clear()
    model.graph.inputs[2].shape = ir.Shape([5])
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.build()))
    feeds = {"x": (1, 4, 9), "weight": (4, 1, 4), "bias": (5,), "initial_state": (1, 4, 3)}
    # ONNX Runtime only logs what shape inference finds, so that the kernel is what refuses.
    opened = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="bias has 5 on axis 0, expected 4"):
        opened.run(None, {n: np.zeros(shape, np.float32) for n, shape in feeds.items()})


def test_the_runner_uses_the_kernel_in_place_of_the_body(tmp_path, sweep):
    import onnx_ir as ir

    from isthmus.exporter.ops.onnx_models import node_of, one_node
    from isthmus.targets.onnxruntime.session import OnnxRuntimeRunner

    op, inputs, attributes, reference = inputs_of(sweep, "selective_scan", "groups")
    form, settled, operands = node_of(op, inputs, attributes)
    path = tmp_path / "model.onnx"
    ir.save(one_node(op, form, settled, ir.DataType.FLOAT), path)
    library = native.build()
    results = {}
    for kernels in (library, None):
        runner = OnnxRuntimeRunner(path, threads=1, kernels=kernels)
        assert (library.name in runner.device) == (kernels is not None)
        results[kernels] = runner.run(operands)["y"]
        runner.close()
        assert sweep.error(results[kernels], reference["y"], 2) < 2e-5
    np.testing.assert_array_equal(results[library], sessions.run(op, inputs, attributes, library)["y"])
    assert (results[library] != results[None]).any()
    with pytest.raises(IsthmusError, match="does not load"):
        OnnxRuntimeRunner(path, kernels=tmp_path / "nothing.so")


def test_the_interface_declared_by_hand_is_that_of_the_header(tmp_path):
    """Offsets of OrtApi and OrtCustomOp against the installed onnxruntime_c_api.h, of 1.18 or later."""
    named = os.environ.get("ISTHMUS_ORT_INCLUDE")
    folders = [named] if named else ["/usr/include/onnxruntime", "/usr/local/include/onnxruntime"]
    found = next((f for f in folders if (Path(f) / "onnxruntime_c_api.h").is_file()), None)
    if found is None:
        pytest.skip("not run: needs onnxruntime_c_api.h (Debian package libonnxruntime-dev; or its folder in ISTHMUS_ORT_INCLUDE)")
    members = [
        line.split("(*")[1].split(")")[0]
        for line in (cmake.HERE / "ort_abi.h").read_text().partition("struct CustomOp {")[2].splitlines()
        if "(*" in line
    ]
    assert len(members) == 25
    checks = [f"static_assert(offsetof(ort::CustomOp, {m}) == offsetof(OrtCustomOp, {m}));" for m in members]
    source = """
#include <cstddef>
#include <onnxruntime_c_api.h>
#include "ort_abi.h"
namespace ort = isthmus::ort;
#define CHECK(number, name, result, arguments) static_assert(offsetof(OrtApi, name) == number * sizeof(void*));
ISTHMUS_ORT_FUNCTIONS(CHECK)
static_assert(ORT_API_VERSION >= ort::API_VERSION);
static_assert(sizeof(ort::CustomOp) <= sizeof(OrtCustomOp));
static_assert(offsetof(ort::ApiBase, GetApi) == offsetof(OrtApiBase, GetApi));
static_assert(offsetof(ort::ApiBase, GetVersionString) == offsetof(OrtApiBase, GetVersionString));
static_assert(ort::STATUS_FAIL == ORT_FAIL && ort::STATUS_INVALID_ARGUMENT == ORT_INVALID_ARGUMENT);
static_assert(ort::ATTRIBUTE_INT == ORT_OP_ATTR_INT && ort::ATTRIBUTE_FLOAT == ORT_OP_ATTR_FLOAT);
static_assert(ort::REQUIRED == INPUT_OUTPUT_REQUIRED && ort::DEFAULT_MEMORY == OrtMemTypeDefault);
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT == 1 && ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 == 10);
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 == 16);
"""
    file = tmp_path / "check.cpp"
    file.write_text(source + "\n".join(checks) + "\n")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    subprocess.run(
        [compiler, "-std=c++17", "-Wno-invalid-offsetof", f"-I{found}", f"-I{cmake.HERE}", "-fsyntax-only", str(file)], check=True
    )
