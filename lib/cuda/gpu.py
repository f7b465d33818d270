"""Kernels on a GPU, through CuPy. CuPy is imported when it is asked for, and only then."""
from typing import NamedTuple

from .nvrtc import include_folders


class Availability(NamedTuple):
    """True or False, and the reason: `there, why = gpu_available()`, or simply `if gpu_available():`."""
    there: bool
    why: str

    def __bool__(self):
        return self.there


def gpu_available():
    """Is there a GPU for CuPy arrays, and if not, why?"""
    try:
        import cupy
    except Exception as e:                              # not installed, or its libraries do not load
        return Availability(False, f"cupy does not import ({e})")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except RuntimeError as e:                           # CUDARuntimeError: no driver
        return Availability(False, str(e))
    return Availability(count > 0, f"{count} CUDA device(s)")


class Library:
    """A module compiled by CuPy on the first launch."""

    def __init__(self, module):
        import cupy
        options = ("-std=c++17", *(f"-I{d}" for d in include_folders()))
        self.raw = cupy.RawModule(code=module.source, options=options, name_expressions=[n for n in module.names if "<" in n] or None)

    def run(self, kernel, grid, block, args, shared):
        self.raw.get_function(kernel.name)(grid, block, tuple(args), shared_mem=shared)
