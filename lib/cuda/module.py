"""A .cu file, its kernels, and the launch of one."""
from dataclasses import dataclass, field
from pathlib import Path

from . import cpu, gpu
from .errors import ArgumentError, KernelError
from .signature import Parameter, check_arguments, check_shape, kernel_names, parameters


class Module:
    """The kernels of one CUDA C source. Those declared extern "C" have names; instances of templates are named by the caller.

    >>> Module(source)["scale"]                                          # doctest: +SKIP
    >>> Module(source, names=["scale<3, float>"])["scale<3, float>"]     # doctest: +SKIP
    """

    def __init__(self, source, filename="kernel.cu", names=()):
        self.source, self.filename = source, filename
        self.names = [*kernel_names(source), *names]
        self._kernels, self._libraries = {}, {}

    @classmethod
    def from_file(cls, path, names=()):
        return cls(Path(path).read_text(encoding="utf-8"), Path(path).name, names)

    def __getitem__(self, name):
        if name not in self.names:
            raise KernelError(f"no kernel {name!r} in {self.filename}; it has {self.names} (declare a kernel extern \"C\", or list a template's instance in names=)")
        if name not in self._kernels:
            self._kernels[name] = Kernel(self, name, parameters(self.source, name))
        return self._kernels[name]

    def library(self, side):
        """The compiled module: "numpy" for this processor, "cupy" for the GPU."""
        if side not in self._libraries:
            self._libraries[side] = (cpu if side == "numpy" else gpu).Library(self)
        return self._libraries[side]


@dataclass(frozen=True)
class Kernel:
    module: Module = field(repr=False)
    name: str
    params: tuple[Parameter, ...]


def launch(kernel, grid, block, args, shared=0):
    """Run a kernel on `grid` blocks of `block` threads: on the GPU if the arrays are CuPy's, on this processor if they are NumPy's.

    grid, block: a size, or up to three (x, y, z). args: arrays and numbers in the order of the kernel's parameters; an array's dtype is the
    parameter's, and it is C-contiguous. shared: bytes of dynamic shared memory. Returns nothing: the results are in the arrays that the kernel wrote.
    Raises ArgumentError before anything runs, CompileError, MissingTool, and, for NumPy arrays, KernelError when the kernel leaves an array or a barrier
    can't be met; then no array has changed.
    """
    if not isinstance(kernel, Kernel):
        raise ArgumentError(f"kernel should be a Kernel, module[name]; was {type(kernel).__name__}")
    grid, block = check_shape(grid, block, shared)
    ready, side = check_arguments(kernel.name, kernel.params, args)
    kernel.module.library(side).run(kernel, grid, block, ready, shared)
