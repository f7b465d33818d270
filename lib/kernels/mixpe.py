"""MixPE: Quantization and Hardware Co-design for Efficient LLM Inference (Zhang, Wang, Zou, Liu, Zhen, Yuan, Yu; 2024, arXiv:2411.16158).

Implemented: products of weights in 4-bit groups with int8 (W4A8) or float16 (W4A16) activations, with the scale applied to each weight or to the sum of a group; products by shifts and additions; counts of the work, and a price list for it.
The kernels are in mixpe.cu and run where the arrays are: CuPy's on a GPU, NumPy's on the CPU.

| symbol | name | shape |
|---|---|---|
| $W$, groups of $g$: codes $u$, scales $\\sigma$, zeros $z$ | W, a `groups.Groups` | [M, K] |
| $X$, activations | X, int8 or float16 | [N, K] |
| $s_n$, scale of a row of int8 activations | x_scale, float32 | [N] |
| $Y = W X^T$ | Product.Y, float32 | [M, N] |
| a group's sum of activations | made by `sums_a8`, `sums_a16` | [N, K / g], int32 or float32 |

Deviations from the paper
- Its processing element is hardware. Here its arithmetic is a CUDA kernel; in `shift` mode nothing is multiplied inside a group.
- *Assumed*: unsigned codes with a zero (signed ones are an option of `shift_products`); accumulators of 32 bits, int32 for int8 activations and float32 for float16; scales of 16 bits; symmetric int8 activations with one scale a row.
- The shifted float16 handles zero, subnormal numbers and overflow; whether the paper's unit does is not known.
- ENERGY is not the paper's: it lists published estimates for a 45 nm process (Horowitz, 2014) for a comparison by counts. The paper simulates a chip.

Cost: M N K products; M N K / g scalings (`after`), M K ceil(N / 16) (`first`), M K (`once`).
"""
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from lib.cuda import Module, launch
from lib.number_formats.uniform import Uniform

from .groups import Groups

TILE = 16
ORDERS = {"first": 0, "once": 1, "after": 2, "shift": 3}
ENERGY = {"int8 add": 0.03, "int16 add": 0.05, "int32 add": 0.1, "int8 mul": 0.2, "fp16 add": 0.4, "fp16 mul": 1.1}   # pJ, 45 nm, assumed


@dataclass(frozen=True)
class Product:
    """Y: [M, N] float32. Counted by the kernels, if asked to: multiplications by a scale, uses of a zero, additions for sums of activations, shifts, additions of shifted parts, bytes through global memory."""
    Y: np.ndarray
    scalings: int | None = None
    zeros: int | None = None
    sums: int | None = None
    shifts: int | None = None
    adds: int | None = None
    bytes: int | None = None


def quantize_rows(X):
    """Symmetric int8 activations: X [N, K] real -> codes [N, K] int8 in -127..127, scales [N] float32. NaN raises ValueError."""
    X = torch.as_tensor(np.asarray(X, dtype=np.float64))
    if X.ndim != 2:
        raise ValueError(f"X: should be a matrix [N, K], has shape {tuple(X.shape)}")
    grid = Uniform(bits=8, per="token").fit(X)
    return grid.quantize(X).numpy().astype(np.int8), grid.scale.flatten().numpy().astype(np.float32)


def multiply(W, X, x_scale=None, order="after", warp=False, count=False):
    """Y = W X^T, times x_scale [N] if given.

    W: Groups of [M, K]; X: [N, K] int8 or float16. order: "after" scales the sum of each group, "shift" does so and multiplies by shifts; "first" scales the weights of a tile when it is loaded, "once" all of them beforehand, both to float16.
    warp: one result a warp instead of 16 x 16 a block, for few rows ("first" and "after"). Raises TypeError and ValueError before anything runs.
    """
    M, N, K, g, kind, x_scale = _operands(W, X, x_scale, order, warp)
    new = lambda dtype, *shape: np.zeros_like(X, dtype=dtype, shape=shape)
    kernels, counts, codes = _kernels(count), new(np.uint64, 6), W.codes.size
    Y, sums = new(np.float32, M, N), new(np.int32 if kind == "a8" else np.float32, N, K // g)
    w16 = new(np.float16, *((M, K) if order == "once" else (1, 1)))
    if order in ("after", "shift"):
        launch(kernels[f"sums_{kind}"], -(-sums.size // 256), 256, (X, sums, sums.size, g, counts))
    if order == "once":
        launch(kernels["dequantize"], -(-codes // 256), 256, (W.codes, W.scale, W.zero, w16, codes, g, counts))
    grid, block = ((-(-M // 8), N), (32, 8)) if warp else ((-(-N // TILE), -(-M // TILE)), (TILE, TILE))
    args = W.codes, w16, W.scale, W.zero, X, x_scale, sums, Y, M, N, K, g, ORDERS[order], counts
    launch(kernels[f"{'warp' if warp else 'tile'}_{kind}"], grid, block, args)
    return Product(Y, *map(int, counts)) if count else Product(Y)


def _operands(W, X, x_scale, order, warp):
    """What `multiply` was given, checked: (M, N, K, g, kind, x_scale)."""
    if not isinstance(W, Groups):
        raise TypeError(f"W: should be Groups, see groups.quantize(); was {type(W).__name__}")
    if getattr(X, "dtype", None) not in (np.int8, np.float16):
        raise TypeError(f"X: should be an array of int8 or float16, was {getattr(X, 'dtype', type(X).__name__)}")
    if X.ndim != 2 or X.shape[1] != W.K or not X.shape[0]:
        raise ValueError(f"X: should be a matrix [N, {W.K}], has shape {X.shape}")
    if not X.flags.c_contiguous:
        raise ValueError(f"X: should be C-contiguous, has strides {X.strides}")
    if order not in ORDERS or warp and order not in ("first", "after"):
        raise ValueError(f"order={order!r}: should be one of {', '.join(ORDERS)}; with warp=True, first or after")
    if X.dtype == np.float16 and not bool(np.isfinite(X).all()):
        raise ValueError("X: should be finite, has NaN or infinity")
    most = 2 * 128 * 15 * W.g
    if X.dtype == np.int8 and most >= 2**31:
        raise ValueError(f"g={W.g}: the sum of a group can reach 2 * 128 * 15 g = {most}, beyond int32")
    N = len(X)
    if x_scale is None:
        x_scale = np.zeros_like(X, dtype=np.float32, shape=N) + np.float32(1)
    if getattr(x_scale, "dtype", None) != np.float32 or x_scale.shape != (N,) or not bool(np.isfinite(x_scale).all()):
        raise ValueError(f"x_scale: should be {N} finite numbers of float32, was {x_scale!r}")
    return W.M, N, W.K, W.g, "a8" if X.dtype == np.int8 else "a16", x_scale


def shift_products(a, u, signed=False):
    """Single products a u by shifts and additions. a: [n] int8 or float16; u: [n] uint8 below 16, as four-bit two's complement if signed.

    int8: (products int32, shifts, additions). float16: (exact products as float32, rounded to float16 at each addition, the same when b is added to the exponent's bits of every number alike)."""
    if getattr(a, "dtype", None) not in (np.int8, np.float16) or getattr(u, "dtype", None) != np.uint8:
        raise TypeError(f"a, u: should be arrays of int8 or float16, and of uint8; were {getattr(a, 'dtype', type(a).__name__)} and {getattr(u, 'dtype', type(u).__name__)}")
    if a.ndim != 1 or a.shape != u.shape or not a.size:
        raise ValueError(f"a, u: should be vectors of one length, have shapes {a.shape} and {u.shape}")
    if int(u.max()) > 15:
        raise ValueError(f"u: codes of four bits should be below 16, the largest is {int(u.max())}")
    n, counts, new = a.size, np.zeros_like(a, dtype=np.uint64, shape=6), lambda dtype: np.zeros_like(a, dtype=dtype)
    a8 = a.dtype == np.int8
    out = [new(np.int32)] if a8 else [new(np.float32), new(np.float16), new(np.float16)]
    launch(_kernels(a8)["products_a8" if a8 else "products_a16"], -(-n // 256), 256, (a, u, *out, n, -1 if signed else 1, counts))
    return (out[0], int(counts[3]), int(counts[4])) if a8 else tuple(out)


def scalings(M, N, K, g, order, reuse=TILE):
    """Multiplications by a scale of a product [M, K] x [N, K]^T. reuse: how many rows of X a scaled weight serves with order "first" (1: none)."""
    return {"first": M * K * -(-N // reuse), "once": M * K, "after": M * N * K // g, "shift": M * N * K // g}[order]


def work(M, N, K, g, order, kind="a8", adder="int16 add"):
    """Operations of a product, {part: {operation: how many}}; kind: "a8" or "a16".

    Parts: "products" (all inside a group), "scales" (scales and zeros), "sums" (of activations). adder: what adds the four shifted parts of one product. They lie one place apart, so that integers of 16 bits hold their fractions; "fp16 add" is a unit that does not use that."""
    if kind not in ("a8", "a16") or order not in ORDERS or adder not in ENERGY:
        raise ValueError(f"kind={kind!r}, order={order!r}, adder={adder!r}: should be a8 or a16, one of {', '.join(ORDERS)}, and one of {', '.join(ENERGY)}")
    after, macs, s = order in ("after", "shift"), M * N * K, scalings(M, N, K, g, order)
    exact = after and kind == "a8"                                 # integers inside a group
    product = {adder: 3, "int8 add": 4 * (kind == "a16")} if order == "shift" else {"int8 mul" if exact else "fp16 mul": 1}     # four exponents
    zero = {"int8 mul": 2, "int32 add": 1} if exact else {"fp16 mul": 1, "fp16 add": 1} if after else {"int8 add": 1}           # a sum has 16 bits
    parts = {"products": [(macs, product), (macs, {"int32 add" if exact else "fp16 add": 1})],
             "scales": [(s, zero), (s, {"fp16 mul": 1, "fp16 add": after})],
             "sums": [(after * N * (K - K // g), {"int32 add" if exact else "fp16 add": 1})]}
    return {part: {op: sum(times * n.get(op, 0) for times, n in terms) for op in ENERGY} for part, terms in parts.items()}


def energy(operations):
    """Picojoules of {operation: how many}, by ENERGY. *Assumed* prices of single operations; no memory, no control."""
    return sum(ENERGY[name] * n for name, n in operations.items())


@cache
def _kernels(count):
    module = Module.from_file(Path(__file__).with_suffix(".cu"))
    return Module('#define COUNT_WORK\n#line 1 "mixpe.cu"\n' + module.source, module.filename) if count else module
