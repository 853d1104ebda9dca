"""What of TensorRT is on this machine, and what the targets say of it."""

import sys
from types import SimpleNamespace

import pytest

from isthmus.exporter.target import TARGETS
from isthmus.targets.tensorrt import base, library
from isthmus.targets.tensorrt.library import Gpu, find_gpu, installed_version, timing_cache

H100 = Gpu("NVIDIA H100 80GB HBM3", "9.0")


def driver(*, init=0, count=1, name=b"NVIDIA H100 80GB HBM3", attributes=None):
    """A CUDA driver with these answers; a number that is not 0 is an error."""
    attributes = {75: 9, 76: 0} if attributes is None else attributes

    def set_count(pointer):
        pointer._obj.value = count
        return 0

    def set_name(buffer, size, _):
        assert size == len(buffer)
        buffer.value = name
        return 0

    def set_attribute(pointer, attribute, _):
        pointer._obj.value = attributes.get(attribute, -1)
        return 0 if attribute in attributes else 1

    return SimpleNamespace(
        cuInit=lambda flags: init + flags,
        cuDeviceGetCount=set_count,
        cuDeviceGet=lambda *_: 0,
        cuDeviceGetName=set_name,
        cuDeviceGetAttribute=set_attribute,
    )


class TestGpu:
    def test_its_name_and_capability(self):
        assert find_gpu(driver()) == H100

    @pytest.mark.parametrize("broken", [{"init": 100}, {"count": 0}, {"attributes": {75: 9}}])
    def test_what_does_not_answer_is_no_gpu(self, broken):
        assert find_gpu(driver(**broken)) is None

    def test_without_a_driver(self, monkeypatch):
        def missing(_):
            raise OSError("libcuda.so.1: cannot open shared object file")

        monkeypatch.setattr(library.ctypes, "CDLL", missing)
        assert find_gpu() is None


class TestVersions:
    def test_what_is_installed(self, h100):
        assert installed_version("tensorrt") == "11.4.0.106"
        assert installed_version("tensorrt-rtx").startswith("1.")
        assert h100.folder.is_dir()

    def test_what_is_not(self, monkeypatch):
        monkeypatch.setattr(library, "_found", lambda _: False)
        assert installed_version("tensorrt") == ""
        assert library.missing_links() is None

    def test_a_module_without_a_distribution(self, tmp_path, monkeypatch):
        (tmp_path / "tensorrt_of_another_name.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(library, "MODULES", {"tensorrt": ("tensorrt", "tensorrt_of_another_name")})
        monkeypatch.setattr(library, "_DISTRIBUTIONS", {"tensorrt": ("tensorrt-of-another-name",)})
        assert installed_version("tensorrt") == "of an unknown version"

    def test_a_timing_cache_for_each_version_and_gpu(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ISTHMUS_CACHE_DIR", str(tmp_path))
        path = timing_cache("", "11.4.0", Gpu("NVIDIA H100/PCIe ..", "9.0"))
        assert path == tmp_path / "tensorrt" / "timing-11.4.0-NVIDIA_H100_PCIe_...cache"
        assert timing_cache(str(tmp_path / "mine"), "11.4.0", H100) == tmp_path / "mine"


class TestEnvironment:
    def test_the_child_finds_this_package_and_the_link(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PYTHONPATH", "/somewhere")
        monkeypatch.setenv("LD_LIBRARY_PATH", "/elsewhere")
        monkeypatch.setattr(library, "missing_links", lambda: tmp_path)
        found = library.child_environment("tensorrt-rtx")
        assert found["PYTHONPATH"].split(":")[1:] == ["/somewhere"]
        assert found["PYTHONPATH"].split(":")[0] in sys.path
        assert found["LD_LIBRARY_PATH"] == f"{tmp_path}:/elsewhere"
        assert library.child_environment("tensorrt")["LD_LIBRARY_PATH"] == "/elsewhere"


class TestCapabilities:
    def test_of_tensorrt_without_a_gpu(self):
        found = {c.name: c for c in TARGETS["tensorrt"]().capabilities()}
        assert found["lower"].available
        assert not found["build"].available
        assert found["build"].detail == "nothing found; missing: the package tensorrt, an NVIDIA GPU with its driver"
        assert "`isthmus build` on the H100" in found["build"].fix
        assert "the engine: not run here" in found["verify"].detail

    def test_of_tensorrt_with_one(self, h100):
        assert h100.folder.is_dir()
        found = {c.name: c for c in TARGETS["tensorrt"]().capabilities()}
        assert found["build"].available
        assert found["build"].detail == "tensorrt 11.4.0.106, NVIDIA H100 80GB HBM3 (9.0)"
        assert found["verify"].detail.endswith("the engine: on the GPU")

    @pytest.mark.usefixtures("rtx")
    def test_of_tensorrt_rtx(self, monkeypatch):
        found = {c.name: c for c in TARGETS["tensorrt-rtx"]().capabilities()}
        assert found["build"].available
        assert found["build"].detail.startswith("tensorrt-rtx 1.")
        monkeypatch.setattr(base, "installed_version", lambda _: "")
        found = {c.name: c for c in TARGETS["tensorrt-rtx"]().capabilities()}
        assert not found["build"].available
        assert found["build"].fix == "pip install 'isthmus[tensorrt-rtx]' (Linux)"

    def test_what_they_are_for(self):
        for name, device in (
            ("tensorrt", "NVIDIA H100 (sm_90)"),
            ("tensorrt-rtx", "NVIDIA RTX GPUs of compute capability 8.9, 12.0 (Tens"),
        ):
            target = TARGETS[name]()
            assert target.device(target.Options()).startswith(device)
            assert target.precisions == ("fp16", "bf16", "fp8", "int4")
            assert target.opsets == (23, 24)
            target.check_machine(target.Options())
