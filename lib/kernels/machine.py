"""GPUs by their data sheets: what limits a kernel before it has run once.

| symbol | name | unit |
|---|---|---|
| I | `intensity` | operations a byte of global memory traffic |
| P, B | `peak[unit]`, `bandwidth` | operations a second; bytes a second |
| R, S | `registers`, `shared` | registers of a thread; bytes of shared memory of a block (both from `lib.cuda.compile_check`) |

`roofline`: no kernel is faster than min(P, I B) (Williams, Waterman and Patterson, 2009). `occupancy`: how many blocks a multiprocessor holds at once, by the allocation rules of the CUDA programming guide for compute
capability 8.0 and 9.0. Both are bounds computed from documents, not measurements.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """peak: operations a second by unit (a multiply-add counts as two), dense; bandwidth: bytes a second; shared: bytes a multiprocessor can give to blocks."""
    name: str
    arch: str
    multiprocessors: int
    bandwidth: float
    peak: dict
    shared: int
    shared_block: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


# NVIDIA A100 Tensor Core GPU data sheet (SXM, 80 GB) and NVIDIA H100 Tensor Core GPU data sheet (SXM); without sparsity.
A100 = GPU("A100 SXM 80 GB", "sm_80", 108, 2.039e12, {"fp32": 19.5e12, "fp16 tensor": 312e12, "int8 tensor": 624e12, "int4 tensor": 1248e12}, 164 * 1024, 163 * 1024)
H100 = GPU("H100 SXM", "sm_90", 132, 3.35e12, {"fp32": 67e12, "fp16 tensor": 989e12, "int8 tensor": 1979e12, "fp8 tensor": 1979e12}, 228 * 1024, 227 * 1024)


def roofline(gpu, unit, intensity):
    """The most operations a second that a kernel of this intensity can reach: min(P, I B). intensity: a number or an array, > 0. Raises ValueError."""
    if unit not in gpu.peak:
        raise ValueError(f"unit={unit!r}: {gpu.name} has {sorted(gpu.peak)}")
    reach = intensity * gpu.bandwidth
    if not (reach > 0 if isinstance(reach, float) else (reach > 0).all()):
        raise ValueError(f"intensity={intensity!r}: expected operations a byte, > 0")
    return reach.clip(max=gpu.peak[unit]) if hasattr(reach, "clip") else min(reach, gpu.peak[unit])


@dataclass(frozen=True)
class Occupancy:
    """blocks: resident on a multiprocessor at once; warps: theirs; share: of the warps it could hold; limits: all resources that allow no more."""
    blocks: int
    warps: int
    share: float
    limits: tuple


def occupancy(gpu, block, registers, shared=0):
    """Occupancy of a kernel with `block` threads a block, `registers` a thread and `shared` bytes a block. Raises ValueError when a block does not fit at all.

    A warp's registers come in units of 256 from one of four partitions; shared memory in units of 128 bytes, after 1 KiB that the system keeps a block.
    """
    if not 1 <= block <= 1024:
        raise ValueError(f"block={block!r}: expected 1 to 1024 threads")
    if not 1 <= registers <= 255:
        raise ValueError(f"registers={registers!r}: expected 1 to 255")
    if not 0 <= shared <= gpu.shared_block:
        raise ValueError(f"shared={shared!r}: expected at most {gpu.shared_block} bytes a block on {gpu.name}")
    warps = -(-block // 32)
    by_warp = -(-32 * registers // 256) * 256
    fit = {"threads": gpu.warps // warps, "blocks": gpu.blocks, "registers": gpu.registers // 4 // by_warp * 4 // warps,
           "shared memory": gpu.shared // (-(-shared // 128) * 128 + 1024)}
    blocks = min(fit.values())
    if blocks == 0:
        raise ValueError(f"block={block!r}, registers={registers!r}: one block needs more registers than a multiprocessor of {gpu.name} has")
    return Occupancy(blocks, blocks * warps, blocks * warps / gpu.warps, tuple(k for k, v in fit.items() if v == blocks))
