"""The plugin library, driven as TensorRT drives it."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from isthmus.exporter.ops.plugin.host import Host, Recorder


@pytest.fixture(scope="session")
def implementation():
    path = Path(__file__).parents[1] / "implementations" / "tensorrt_launch.py"
    spec = spec_from_file_location("tensorrt_launch_helpers", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    if reason := module.not_run():
        pytest.skip(f"not run: {reason}")
    return module


@pytest.fixture(scope="session")
def host(implementation) -> Host:
    return implementation.host()


@pytest.fixture
def recorder(host):
    driver = Recorder()
    host.use(driver)
    yield driver
    host.use(None)
