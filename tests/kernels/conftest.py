"""What the kernel tests share."""
import pytest

from lib.cuda import MissingTool, cpu


@pytest.fixture
def compiler():
    """Kernels on a processor need a C++ compiler; where there is none, their tests are skipped, visibly."""
    try:
        return cpu.compiler()
    except MissingTool as e:
        pytest.skip(str(e))
