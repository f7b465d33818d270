"""Efficient Arbitrary Precision Acceleration for Large Language Models on GPU Tensor Cores (Ma, Fang, Shao, Wang; 2024, arXiv:2409.17870).

Implemented: the bipolar-INT format, its conversion from signed integers, the decomposition into packed bit planes, and their product with recovery on
chip (`fused`) or through global memory (unfused). The kernels are in bipolar_int.cu and run where the arrays are: CuPy's on a GPU, NumPy's on the CPU.

| symbol | name | shape |
|---|---|---|
| $u \\in 0..2^n-1$ | codes | [rows, K], uint8 |
| $v = 2u - (2^n - 1)$ | values, the odd numbers of at most n bits | [rows, K], int64 |
| $w^{(i)}$, bit i of the codes | Planes.words, 32 bits along K to a word | [n, rows, ceil(K / 32)], uint32 |
| $Y = W X^T$ | Product.Y | [M, N], int32 |

Deviations from the paper
- The plane products use XOR and popcount of 32-bit words, not the tensor cores' 1-bit matrix instruction: the arithmetic is the same, the speed is not.
- Tiles are 16 x 16 outputs and 512 bits of K. The paper's tiling and its padded layout for tensor cores are not reproduced.
- Partial products are shifted and added in a register as soon as they exist; the paper keeps them in shared memory until the tile is done.
- The scale of `quantize` is max|x| / (2^n - 1), of a row or of the whole matrix; the paper leaves calibration to the quantization method.

Cost: n_w n_x M N ceil(K / 32) popcounts; 4 M N bytes of products written (fused), or 4 M N (2 n_w n_x + 1) written and read (unfused).
"""
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from lib.cuda import Module, launch

MAX_BITS = 8
INT32 = 2**31


def encode(v, n):
    """Codes of bipolar values: u = (v + 2^n - 1) / 2. v: odd integers of at most n bits."""
    v, top = np.asarray(v), 2 ** _width("n", n) - 1
    if not np.issubdtype(v.dtype, np.integer):
        raise TypeError(f"v: should be integers, has dtype {v.dtype}")
    if not ((v % 2 == 1) & (abs(v) <= top)).all():
        raise ValueError(f"v: should be odd numbers from {-top} to {top}; there is no zero in this format")
    return ((v + top) // 2).astype(np.uint8)


def decode(u, n):
    """Values of codes: v = sum_i 2^i (2 b_i - 1) = 2u - (2^n - 1)."""
    return 2 * _codes("u", u, n).astype(np.int64) - (2 ** n - 1)


def from_signed(s, n):
    """Codes of two's-complement integers s in [-2^(n-1), 2^(n-1) - 1]: u = s + 2^(n-1), so that v = 2s + 1."""
    s, half = np.asarray(s), 2 ** (_width("n", n) - 1)
    if not np.issubdtype(s.dtype, np.integer):
        raise TypeError(f"s: should be integers, has dtype {s.dtype}")
    if not ((s >= -half) & (s < half)).all():
        raise ValueError(f"s: should be from {-half} to {half - 1}")
    return (s.astype(np.int64) + half).astype(np.uint8)


def quantize(x, n, axis=None):
    """Nearest bipolar codes of real numbers, and the scale: x ~ scale * decode(codes, n). axis: 1 gives each row a scale, None one to all."""
    x = np.asarray(x, dtype=np.float64)
    if not np.isfinite(x).all():
        raise ValueError("x: should be finite, has NaN or infinity")
    scale = abs(x).max(axis=axis, keepdims=True) / (2 ** _width("n", n) - 1)
    scale = np.where(scale > 0, scale, 1.0)                       # a row of zeros has no scale of its own
    codes = np.clip(np.floor(x / (2 * scale)) + 2 ** (n - 1), 0, 2 ** n - 1)      # a mid-rise staircase: no step is centred on 0
    return codes.astype(np.uint8), scale


@dataclass(frozen=True)
class Planes:
    """A matrix of bipolar integers as packed bit planes. words: [n, rows, ceil(K / 32)] uint32; K: the true length of a row."""
    words: np.ndarray
    K: int

    @property
    def n(self):
        return self.words.shape[0]

    @property
    def rows(self):
        return self.words.shape[1]


@dataclass(frozen=True)
class Product:
    """Y: [M, N] int32. Counted by the kernels, if asked to: XOR-popcounts, operand words loaded, bytes of products moved through global memory."""
    Y: np.ndarray
    popcounts: int | None = None
    words: int | None = None
    bytes: int | None = None


def pack(codes, n):
    """Planes of codes [rows, K] (uint8, NumPy or CuPy). The bits beyond K are 0 in every plane."""
    codes = _codes("codes", codes, n)
    if codes.ndim != 2 or 0 in codes.shape:
        raise ValueError(f"codes: should be a matrix [rows, K], has shape {codes.shape}")
    rows, K = codes.shape
    words = np.zeros_like(codes, dtype=np.uint32, shape=(n, rows, -(-K // 32)))
    launch(_kernels(False)["pack"], (words.shape[2], -(-rows // 8)), (32, 8), (codes, words, rows, K, n))
    return Planes(words, K)


def matmul(W, X, fused=True, count=False):
    """Y = W X^T in bipolar values, exact. W: Planes of [M, K], X: Planes of [N, K]; fused: recover on chip; count: also count the work."""
    for name, planes in (("W", W), ("X", X)):
        if not isinstance(planes, Planes):
            raise TypeError(f"{name}: should be Planes, see pack(); was {type(planes).__name__}")
    if W.K != X.K:
        raise ValueError(f"X: rows of W have {W.K} values, rows of X have {X.K}; they should have the same number")
    M, N, K, n_w, n_x = W.rows, X.rows, W.K, W.n, X.n
    if K * (2 ** n_w - 1) * (2 ** n_x - 1) >= INT32:
        raise ValueError(f"K={K}: a product of {n_w}- and {n_x}-bit values can reach K (2^n_w - 1)(2^n_x - 1) = {K * (2 ** n_w - 1) * (2 ** n_x - 1)}, "
                         "beyond int32; split K")
    kernels, block, tiles = _kernels(count), (16, 16), (-(-N // 16), -(-M // 16))
    Y = np.zeros_like(W.words, dtype=np.int32, shape=(M, N))
    counts = np.zeros_like(W.words, dtype=np.uint64, shape=3)
    if fused:
        launch(kernels["fused"], tiles, block, (W.words, X.words, Y, M, N, K, n_w, n_x, counts))
    else:
        P = np.zeros_like(W.words, dtype=np.int32, shape=(n_w * n_x, M, N))
        launch(kernels["plane_products"], (*tiles, n_w * n_x), block, (W.words, X.words, P, M, N, K, n_x, counts))
        launch(kernels["recover"], -(-M * N // 256), 256, (P, Y, M * N, n_w, n_x, counts))
    return Product(Y, *map(int, counts)) if count else Product(Y)


def signed_product(Y, row_sums_w, row_sums_x, K):
    """Products of the signed integers a = (v_w - 1) / 2, b = (v_x - 1) / 2 from the bipolar ones: sum ab = (Y - sum v_w - sum v_x + K) / 4.

    Y: [M, N]; row_sums_w: [M], sums of the bipolar values of W along K; row_sums_x: [N]. Returns [M, N] int64."""
    return (np.asarray(Y, dtype=np.int64) - row_sums_w[:, None] - row_sums_x[None, :] + K) // 4


@cache
def _kernels(count):
    module = Module.from_file(Path(__file__).with_suffix(".cu"))
    return Module('#define COUNT_WORK\n#line 1 "bipolar_int.cu"\n' + module.source, module.filename) if count else module


def _width(name, n):
    if not isinstance(n, (int, np.integer)) or not 1 <= n <= MAX_BITS:
        raise ValueError(f"{name}={n!r}: should be an integer from 1 to {MAX_BITS}")
    return int(n)


def _codes(name, u, n):
    if getattr(u, "dtype", None) != np.uint8:
        raise TypeError(f"{name}: codes should have dtype uint8, {'have ' + str(u.dtype) if hasattr(u, 'dtype') else 'was ' + type(u).__name__}")
    if u.size and int(u.max()) >= 2 ** _width("n", n):
        raise ValueError(f"{name}: codes of {n} bits should be below {2 ** n}, the largest is {int(u.max())}")
    _width("n", n)
    return u
