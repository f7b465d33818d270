"""NVIDIA's runtime compiler without a GPU: does a source compile for an architecture, and what does each kernel take?"""
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from .errors import CompileError, MissingTool


@dataclass(frozen=True)
class Usage:
    """What a kernel takes: registers and spilled bytes of a thread, static shared bytes of a block."""
    registers: int
    shared: int
    spilled: int


@dataclass(frozen=True)
class Compiled:
    arch: str
    kernels: dict[str, Usage]
    ptx: str
    log: str


def _nvrtc():
    try:
        from cuda.bindings import nvrtc
        nvrtc.nvrtcVersion()                            # only now the library itself is looked for
        return nvrtc
    except (ImportError, RuntimeError) as e:
        raise MissingTool(f"the compile check needs NVRTC, which NVIDIA has for Linux and Windows: pip install cuda-bindings nvidia-cuda-nvrtc ({e})") from None


def include_folders():
    """Where the headers of the package nvidia-cuda-runtime are (cuda_fp16.h and its like)."""
    folders = (Path(p) / sub for p in sys.path for sub in ("nvidia/cu13/include", "nvidia/cuda_runtime/include"))
    return [f for f in folders if (f / "cuda_fp16.h").exists()][:1]


def compile_check(source, arch="sm_80", names=()):
    """Compile a .cu file (its path), or a source, for a real architecture such as "sm_90": up to machine code, so that registers and shared memory
    are known. names: instances of templates to compile. Raises CompileError with file and line, MissingTool where there is no NVRTC."""
    nvrtc = _nvrtc()
    if isinstance(source, str) and source.endswith(".cu"):
        source = Path(source)
    filename = source.name if isinstance(source, Path) else "kernel.cu"
    text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
    options = [f"-arch={arch}", "-std=c++17", "-lineinfo", "--ptxas-options=-v", *(f"-I{d}" for d in include_folders())]
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), filename.encode(), 0, [], [])

    def read(size, content):
        _, n = size(program)
        buffer = b" " * n
        content(program, buffer)
        return buffer.decode(errors="replace").rstrip("\0 \n")

    try:
        for name in names:
            nvrtc.nvrtcAddNameExpression(program, name.encode())
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        log = read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{arch}: {log or result}")
        ptx = read(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        plain = {nvrtc.nvrtcGetLoweredName(program, n.encode())[1].decode(): n for n in names}
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    kernels = {}
    for name, about in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", log, re.S):
        def number(pattern, about=about):
            found = re.search(pattern, about)
            return int(found[1]) if found else 0
        kernels[plain.get(name, name)] = Usage(number(r"Used (\d+) registers"), number(r"(\d+) bytes smem"), number(r"(\d+) bytes spill stores"))
    return Compiled(arch, kernels, ptx, log)
