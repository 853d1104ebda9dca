"""How the plugin library is built, and what it says when it cannot be."""

import subprocess
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

from isthmus.exporter.errors import IsthmusError, MachineError
from isthmus.exporter.op import OPS
from isthmus.exporter.ops.gpu import compile as gpu_compile
from isthmus.exporter.ops.plugin import build, headers, tables
from isthmus.exporter.ops.plugin.host import Host, Recorder


def _nodes():
    spec = spec_from_file_location("plugin_nodes", Path(__file__).with_name("nodes.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NODES = _nodes()
SIZES = NODES.SIZES
described = NODES.described


class TestBuild:
    """How the library is built, and what it says when it cannot be."""

    def test_without_headers(self, tmp_path):
        with pytest.raises(MachineError, match=r"no NvInferRuntime\.h in") as caught:
            headers.find(tmp_path)
        assert "TENSORRT_ROOT" in caught.value.hint

    def test_headers_of_an_installation(self, tmp_path, monkeypatch):
        (tmp_path / "include").mkdir()
        (tmp_path / "include" / headers.REQUIRED).write_text("")
        assert headers.find(tmp_path) == tmp_path / "include"
        monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
        assert headers.find() == tmp_path / "include"

    def test_without_a_compiler(self):
        with pytest.raises(MachineError, match=r"no C\+\+ compiler 'no-such-compiler'"):
            build.find_compiler("no-such-compiler")

    def test_the_state_never_raises(self, implementation, tmp_path, monkeypatch):
        available, detail, fix = build.state()
        assert (available, fix) == (True, "")
        assert "not run" in detail
        monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
        available, detail, fix = build.state()
        assert not available
        assert "TENSORRT_ROOT" in fix

    def test_the_command_line(self, implementation, tmp_path, capsys):
        from isthmus.exporter.ops.plugin import __main__ as command

        assert command.main(["--no-kernels"]) == 0
        assert capsys.readouterr().out.strip() == str(build.build(architectures=()))
        assert command.main(["--no-kernels", "--tensorrt", str(tmp_path)]) == 5
        assert "NvInferRuntime.h" in capsys.readouterr().err

    def test_an_error_of_the_compiler_is_shown(self, implementation, tmp_path, monkeypatch):
        monkeypatch.setenv("ISTHMUS_CACHE_DIR", str(tmp_path / "cache"))
        (tmp_path / headers.REQUIRED).write_text("#error these are no headers\n")
        with pytest.raises(IsthmusError, match="these are no headers"):
            build.build_host(tmp_path)

    def test_nothing_is_linked_and_nothing_warned_of(self, implementation):
        library = build.build(architectures=())
        assert b"libcuda.so.1\0" in library.read_bytes()
        needed = subprocess.run(["readelf", "--dynamic", library], capture_output=True, text=True, check=True).stdout
        assert not [line for line in needed.splitlines() if "NEEDED" in line and ("cuda" in line or "nvinfer" in line)]
        assert (library.parent / "warnings.txt").read_text() == ""

    def test_the_kernels_are_in_the_library(self, implementation, monkeypatch):
        op = OPS["causal_conv1d"]
        plan = op.part("gpu").plans()[0]
        monkeypatch.setattr(op.part("gpu"), "plans", lambda: (plan,))
        compiled = gpu_compile.compile_plan(op, plan, "sm_90a")[0]
        library = build.build(architectures=("sm_90a",), operators=("causal_conv1d",))

        def identify(address):
            import ctypes

            assert ctypes.string_at(address, len(compiled.cubin)) == compiled.cubin
            return tables.stub(op, plan, 0)

        host = Host(build.build_host(), library)
        driver = Recorder(identify=identify)
        host.use(driver)
        try:
            inputs, outputs = described(op, "CausalConv1d", "float32", {**SIZES, "length": 9})
            arrays = [implementation.buffer(4 * int(np.prod(s))).view(np.float32).reshape(s) for _, s in (*inputs, *outputs)]
            host.create("CausalConv1d", {"silu": 0}).enqueue(arrays, 2, implementation.buffer(0))
        finally:
            host.use(None)
        (launched,) = driver.launches
        assert (launched.kernel, launched.shared) == (compiled.facts.name, compiled.facts.shared)
        # The code's own view of its parameters: pointers of 8 bytes and integers of 4, in this order.
        declared = compiled.ptx.partition(".entry")[2].partition(")")[0]
        widths = [8 if ".u64" in line or ".b64" in line else 4 for line in declared.splitlines() if ".param" in line]
        assert widths == [8 if p.kind == "pointer" else 4 for p in launched.plan()[2]] + [8, 8]
