"""One CUDA source, two machines.

A paper's kernels are a `.cu` file beside its module. The same file runs on a GPU, when the arrays are CuPy's, and on this computer's processor, when
they are NumPy's:

    kernels = Module.from_file(Path(__file__).with_suffix(".cu"))
    launch(kernels["scale"], grid=4, block=256, args=(x, y, n))

On the processor a block's threads are fibers: shared memory is shared, barriers wait, shuffles and atomics mean what they mean on a GPU. What it is not
is fast: a time measured there is the time of an emulation and says nothing about a GPU.

    check(kernel, grid, block, args)    out-of-bounds accesses, races and bad barriers, with their lines
    compile_check(path, arch)           NVIDIA's compiler, no GPU needed: registers and shared memory of each kernel
    gpu_available()                     is there a GPU for CuPy arrays, and if not, why

Environment: LUC_CXX (or CXX) names the C++ compiler, LUC_CUDA_CACHE the folder of compiled kernels (~/.cache/learning-under-constraints/cuda).
"""
from .checks import Finding, Report, check
from .errors import ArgumentError, CompileError, KernelError, MissingTool
from .gpu import gpu_available
from .module import Kernel, Module, launch
from .nvrtc import Compiled, Usage, compile_check

__all__ = ["ArgumentError", "CompileError", "Compiled", "Finding", "Kernel", "KernelError", "MissingTool", "Module", "Report", "Usage",
           "check", "compile_check", "gpu_available", "launch"]
