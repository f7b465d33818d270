"""All tests run with the network blocked and one thread a worker."""
import pytest

from lib.book import offline


def pytest_configure(config):
    offline.block_network()


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped, visibly, where there is no GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from lib.cuda import gpu_available

    there, why = gpu_available()
    if not there:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"no GPU: {why}"))


def pytest_make_parametrize_id(val):
    """Functions and classes by name: the default shows their address, which differs between the workers."""
    return val.__name__ if callable(val) and hasattr(val, "__name__") else None
