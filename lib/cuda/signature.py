"""What a kernel takes, read from its source: the name, type and direction of each parameter, and the check of a launch against it."""
import numbers
import re
from dataclasses import dataclass

import numpy as np

from .errors import ArgumentError, KernelError

# C type -> NumPy dtype. The <stdint.h> names are missing on purpose: NVIDIA's runtime compiler does not know them. bfloat16 travels as uint16.
DTYPES = {"float": "f4", "double": "f8", "half": "f2", "__half": "f2", "__nv_bfloat16": "u2", "bool": "?",
          "char": "i1", "signed char": "i1", "short": "i2", "int": "i4", "signed": "i4", "long long": "i8",
          "unsigned char": "u1", "unsigned short": "u2", "unsigned": "u4", "unsigned long long": "u8", "size_t": "u8"}
VECTORS = {f"{name}{n}": (code, n) for n in (2, 4)
           for name, code in {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4", "double": "f8"}.items()}


@dataclass(frozen=True)
class Parameter:
    name: str
    ctype: str             # without const and *
    pointer: bool
    const: bool
    dtype: np.dtype
    align: int             # bytes, more than one element for vector types

    def __str__(self):
        return f"'{self.name}' ({'const ' * (self.const and self.pointer)}{self.ctype}{'*' * self.pointer})"


def without_comments(source):
    """The source with its comments blanked; lines keep their numbers."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m.group()), source, flags=re.S)


BOUNDS = r"(?:__launch_bounds__\s*\([^)]*\)\s*)?"


def kernel_names(source):
    """The kernels that can be called by their plain names: the extern "C" ones."""
    return re.findall(r"extern\s+\"C\"\s+__global__\s+" + BOUNDS + r"void\s+" + BOUNDS + r"(\w+)\s*\(", without_comments(source))


def parameters(source, name):
    """The parameters of kernel `name`, which may be an instance of a template: "scale<3, float>"."""
    base, _, given = name.partition("<")
    found = re.search(r"(?:template\s*<([^>]*)>\s*)?(?:extern\s+\"C\"\s+)?__global__\s+" + BOUNDS + r"void\s+" + BOUNDS
                      + re.escape(base.strip()) + r"\s*\(([^)]*)\)", without_comments(source))
    if not found:
        raise KernelError(f"no kernel {base!r} in this source; it has {kernel_names(source)}")
    named = [p.split()[-1] for p in found[1].split(",")] if found[1] else []
    values = dict(zip(named, (v.strip() for v in given.rstrip("> ").split(","))))
    return tuple(_parameter(text, values, name) for text in found[2].split(",") if text.strip())


def _parameter(text, values, kernel):
    words = [w for w in re.findall(r"\w+", text) if w not in ("const", "volatile", "__restrict__")]
    name, words = words[-1], words[:-1]
    if len(words) > 1 and words[-1] == "int":              # "unsigned int" is "unsigned"
        words.pop()
    ctype = values.get(" ".join(words), " ".join(words))
    code, n = VECTORS.get(ctype, (DTYPES.get(ctype), 1))
    if code is None or text.count("*") > 1 or "[" in text or "&" in text:
        raise KernelError(f"{kernel}: the launcher does not know the type of parameter {name!r} ({' '.join(text.split())})")
    dtype = np.dtype(code)
    return Parameter(name, ctype, "*" in text, "const" in text.split("*")[0].split(), dtype, dtype.itemsize * n)


def as_dim3(size, what):
    """A grid or block size of 1 to 3 numbers as three."""
    sizes = tuple(size) if isinstance(size, (tuple, list)) else (size,)
    if not 1 <= len(sizes) <= 3 or not all(isinstance(s, (int, np.integer)) and s >= 1 for s in sizes):
        raise ArgumentError(f"{what}={size!r}: should be 1 to 3 positive integers")
    return (*map(int, sizes), 1, 1)[:3]


def check_shape(grid, block, shared):
    """The launch sizes as triples, within the limits of every current GPU."""
    grid, block = as_dim3(grid, "grid"), as_dim3(block, "block")
    if block[0] * block[1] * block[2] > 1024 or block[2] > 64:
        raise ArgumentError(f"block={block}: a block has at most 1024 threads, and at most 64 of them along z")
    if grid[0] > 2**31 - 1 or max(grid[1:]) > 65535:
        raise ArgumentError(f"grid={grid}: a grid has at most 2^31 - 1 blocks along x and 65535 along y and z")
    if not 0 <= shared <= 48 * 1024:
        raise ArgumentError(f"shared={shared}: dynamic shared memory is 0 to 49152 bytes")
    return grid, block


def check_arguments(kernel, params, args):
    """The arguments ready to be passed (scalars in the kernel's type), and the side they are on: "numpy" or "cupy"."""
    if len(args) != len(params):
        raise ArgumentError(f"{kernel} takes {len(params)} arguments ({', '.join(p.name for p in params)}), got {len(args)}")
    sides, ready = {}, []
    for p, a in zip(params, args):
        where = f"{kernel}: argument {p}"
        if not p.pointer:
            ready.append(_scalar(where, p, a))
            continue
        side = "numpy" if isinstance(a, np.ndarray) else type(a).__module__.split(".")[0]
        if side not in ("numpy", "cupy") or not hasattr(a, "dtype"):
            raise ArgumentError(f"{where} should be a numpy or cupy array, was {type(a).__name__}")
        sides.setdefault(side, p.name)
        if a.dtype != p.dtype:
            raise ArgumentError(f"{where} should have dtype {p.dtype}, has {a.dtype}")
        if not a.flags.c_contiguous:
            raise ArgumentError(f"{where} should be C-contiguous, has shape {a.shape} and strides {a.strides}; np.ascontiguousarray makes a copy that is")
        if side == "numpy" and not p.const and not a.flags.writeable:
            raise ArgumentError(f"{where} is written by the kernel, and this array is read-only")
        if (a.ctypes.data if side == "numpy" else a.data.ptr) % p.align:
            raise ArgumentError(f"{where} should start at a multiple of {p.align} bytes")
        ready.append(a)
    if len(sides) > 1:
        raise ArgumentError(f"{kernel}: '{sides['numpy']}' is a numpy array and '{sides['cupy']}' a cupy one; all should be on one side "
                            "(cupy.asarray, cupy.asnumpy)")
    return ready, next(iter(sides), "numpy")


def _scalar(where, p, a):
    if not isinstance(a, (numbers.Number, np.generic)) or isinstance(a, (complex, np.complexfloating)):
        raise ArgumentError(f"{where} should be a number, was {type(a).__name__}")
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            value = p.dtype.type(a)
    except (OverflowError, ValueError):
        value = None
    fits = value is not None and (value == a if p.dtype.kind in "iub" else np.isfinite(value) or not np.isfinite(a))
    if not fits:
        raise ArgumentError(f"{where} should be a {p.dtype}, and {a!r} does not fit")
    return value
