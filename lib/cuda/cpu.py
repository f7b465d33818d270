"""Kernels on this computer's processor: compile the .cu file as C++ (once; the result is cached), then run its blocks one after another."""
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from .errors import CompileError, KernelError, MissingTool

INCLUDE = Path(__file__).parent / "include"
ORDERS = {"up": 0, "down": 1, "shuffled": 2}
_LOCK = threading.Lock()                                # the state of a launch, its stacks and its fault handler are the process's


def compiler():
    """The command of the C++ compiler: LUC_CXX, CXX, g++, clang++, or the one that `pip install ziglang` brings."""
    for variable in ("LUC_CXX", "CXX"):
        if os.environ.get(variable):
            return tuple(os.environ[variable].split())
    for name in ("g++", "clang++"):
        if shutil.which(name):
            return (name,)
    try:
        import ziglang  # noqa: F401
    except ImportError:
        raise MissingTool("kernels on numpy arrays need a C++ compiler, and there is none: install g++ or clang++, or `pip install ziglang`; "
                          "the environment variable LUC_CXX names another one") from None
    return (sys.executable, "-m", "ziglang", "cc")       # its "c++" would first build a standard library, for a minute


def flags(command):
    """The compiler's options. Contraction of a*b+c is off: a CPU's rounding should not depend on which CPU it is."""
    options = ["-std=c++17", "-O2", "-g1", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-math-errno", "-w", f"-I{INCLUDE}", "-include", "cudacpu.h"]
    if "ziglang" in command:
        return options + ["-fno-sanitize=undefined"]
    return options + ["-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"]


@functools.cache
def this_cpu():
    """What tells one processor from another: code compiled for its instructions must not be run on another's."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({s for s in lines if s.startswith(("model name", "flags", "Features", "CPU part"))}))
    except OSError:
        try:
            return subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout
        except OSError:
            return platform.processor()


@functools.cache
def version(command):
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    except OSError as e:
        raise MissingTool(f"the C++ compiler {' '.join(command)!r} does not run: {e}") from None


@functools.cache
def _own_folder():
    return tempfile.TemporaryDirectory(prefix="luc-cuda-")   # removed when the process ends


def cache_folder():
    folder = os.environ.get("LUC_CUDA_CACHE")
    folder = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "learning-under-constraints" / "cuda"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(_own_folder().name)                     # a home that can't be written: compile anew in each process


def build(source, extra, suffix):
    """The compiled file of a C++ source. Two processes may build the same one: each writes a file of its own and renames it."""
    if os.name == "nt":
        raise MissingTool("kernels on numpy arrays run on Linux and macOS; on Windows use WSL")
    command = compiler()
    options = [*flags(command), *extra]
    headers = [p.read_text() for p in sorted(INCLUDE.iterdir())]
    asked = [o for o in options if not o.startswith("-I")]   # what the headers say counts, not where they are
    key = hashlib.sha256("\0".join([source, *command, version(command), *asked, this_cpu(), *headers]).encode()).hexdigest()[:32]
    made = cache_folder() / (key + suffix)
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=made.parent) as work:
            text, out = Path(work) / "kernel.cc", Path(work) / "out"
            text.write_text(source)
            done = subprocess.run([*command, *options, str(text), "-o", str(out)], capture_output=True, text=True)
            if done.returncode:
                raise CompileError(done.stderr.strip() or f"{command[0]} stopped with status {done.returncode}")
            os.replace(out, made)
    return made


def as_cpp(module):
    """The .cu text as C++: dynamic shared arrays become pointers, and each kernel gets an entry that unpacks an array of argument addresses."""
    kernels = [module[name] for name in module.names]
    text = re.sub(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s*)?([\w ]+?)\s+(\w+)\s*\[\s*\]\s*;", r"CC_DYNAMIC_SHARED(\1, \2);", module.source)
    entries = "".join(f"CC_EXPORT void cc_entry_{i}(void** p) {{ {k.name}({', '.join(_unpack(j, p) for j, p in enumerate(k.params))}); }}\n"
                      for i, k in enumerate(kernels))
    table = ", ".join(f"cc_entry_{i}" for i in range(len(kernels)))
    main = f"#if defined(CC_PROGRAM)\nint main(int, char** argv) {{ void (*table[])(void**) = {{{table}}}; return cc::program(table, argv); }}\n#endif\n"
    return f'#line 1 "{module.filename}"\n{text}\n#line 1 "entries"\n{entries}{main}'


def _unpack(i, p):
    return f"*({'const ' * p.const}{p.ctype}{'*' * p.pointer}*)p[{i}]"


class Library:
    """A compiled module, loaded into this process."""

    def __init__(self, module):
        self.names = module.names
        self.dll = ctypes.CDLL(str(build(as_cpp(module), ["-fPIC", "-shared", "-fvisibility=hidden"], ".so")))
        self.dll.cc_launch.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_size_t, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p]
        self.dll.cc_fence.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self.dll.cc_fence.restype = ctypes.c_void_p

    def run(self, kernel, grid, block, args, shared, order="up", seed=1, strict=False):
        """One launch. The kernel works on fenced copies of the arrays, which are copied back when it has succeeded."""
        entry = ctypes.cast(getattr(self.dll, f"cc_entry_{self.names.index(kernel.name)}"), ctypes.c_void_p)
        error = ctypes.create_string_buffer(512)
        with _LOCK:
            try:
                regions = self._fence(kernel.params, args)
                values = [ctypes.c_void_p(self._inside(regions, a)) if p.pointer else np.asarray(a) for p, a in zip(kernel.params, args)]
                addresses = (ctypes.c_void_p * max(1, len(values)))(*(v.ctypes.data if isinstance(v, np.ndarray) else ctypes.addressof(v) for v in values))
                self.dll.cc_trap(1)
                try:
                    failed = self.dll.cc_launch(entry, addresses, (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), shared, ORDERS[order], seed, strict, error)
                finally:
                    self.dll.cc_trap(0)
                before = self.dll.cc_written_before()
                for lo, hi, copy, written, _ in regions:
                    if written and not failed and before < 0:
                        ctypes.memmove(lo, copy, hi - lo)
            finally:
                self.dll.cc_unfence()
        if before >= 0:
            raise KernelError(f"{kernel.name}: writes before the start of array '{regions[before][4]}'")
        if failed:
            kind, number, text = error.value.decode().split("\t", 2)
            raise KernelError(f"{kernel.name}: {text}" + (f" array '{regions[int(number)][4]}'" if kind == "bounds" and int(number) >= 0 else ""))

    def _fence(self, params, args):
        """Fenced copies of the memory the arrays take: (from, to, copy, is it written, name). Arrays that share memory share one copy."""
        spans = []
        for p, a in sorted(((p, a) for p, a in zip(params, args) if p.pointer), key=lambda pa: pa[1].ctypes.data):
            lo, hi = a.ctypes.data, a.ctypes.data + a.nbytes
            if spans and lo < spans[-1][1]:
                spans[-1][1], spans[-1][2] = max(hi, spans[-1][1]), spans[-1][2] or not p.const
            else:
                spans.append([lo, hi, not p.const, p.name, p.align])
        regions = [(lo, hi, self.dll.cc_fence(lo, hi - lo, align), written, name) for lo, hi, written, name, align in spans]
        if any(r[2] is None for r in regions):
            raise KernelError("no memory for copies of the arrays")
        return regions

    @staticmethod
    def _inside(regions, a):
        start = a.ctypes.data
        return next(copy + start - lo for lo, hi, copy, _, _ in regions if lo <= start < hi or start == lo == hi)
