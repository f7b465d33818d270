"""What this machine has: tests that need more are skipped, and say why."""
import shutil

import pytest

from lib.cuda import MissingTool, cpu, gpu_available


def _compiler():
    try:
        return cpu.compiler()
    except MissingTool as e:
        return str(e)


@pytest.fixture(scope="session")
def compiler():
    found = _compiler()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def nvrtc():
    from lib.cuda.nvrtc import _nvrtc
    try:
        return _nvrtc()
    except MissingTool as e:
        pytest.skip(str(e))


@pytest.fixture
def cupy():
    there, why = gpu_available()
    if not there:
        pytest.skip(f"no GPU: {why}")
    import cupy
    return cupy


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without any C++ compiler."""
    monkeypatch.delenv("LUC_CXX", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "ziglang", None)
