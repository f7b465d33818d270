"""SageAttention2 Technical Report: Accurate 4 Bit Attention for Plug-and-play Inference Acceleration (Zhang, Huang, Zhang, Wei, Zhu, Chen; 2024, arXiv:2411.10958).

Implemented: attention whose products of queries and keys are made of 4- or 8-bit integers, after means are taken off both, and whose weights and values are FP8 numbers (E4M3); the scales of a tile, a warp, a thread or a token; the
smoothing of V; an emulated short accumulator and the two-level one; and the score by which the paper decides where four bits will do. The kernels are in sageattention2.cu and run where the arrays are.

| symbol | name | shape |
|---|---|---|
| $Q$; $K$, $V$ | `Q`; `K`, `V` | [heads, M, D]; [heads, N, D], float32, D = 16, 32 or 64 |
| $\\gamma(x)$, $\\bar x$ | `centre(x, rows)` | x without the mean of each tile of rows; the means [heads, tiles, D] |
| $\\Delta S = \\bar q_i\\,\\gamma(K)^\\top$ | `delta_s(mean, k)` | [heads, tiles, N] |
| $\\psi$ | `quantize(x, bits, side, per)` | int8 codes as x, and the scale of each row, [heads, rows] |
| $\\tilde P$ | in the kernel | weights before they are divided by their sum, in [0, 1] |

Deviations from the paper
- Integer products are `__dp4a`, and 4-bit codes take a byte each: the numbers are those of a tensor core, the speed and the bytes of Q and K are not. Each thread has a row of its own, so groups of rows for a thread are a
  rule for sharing scales here; on tensor cores they follow the layout of the instruction. A row's scale is stored for the row.
- Delta S is float32, not float16. 1/sqrt(D) is applied to the scores, not to Q before it is quantized.
- The accumulator of FP8 tensor cores is emulated: products of 32 keys are added in float32, then all but 13 bits after the point are cut off.

Cost, a head: M N D / 4 `__dp4a`; ceil(M / 128) N D multiply-adds for Delta S; M N D multiply-adds for P V; ceil(M / 128) N D (1 + 1) bytes of K and V.
"""
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import numpy as np

from lib.cuda import Module, launch

TILE = 128                                                      # rows of Q that share a mean
HEADS = (16, 32, 64)                                            # head sizes that the kernels serve
PER = ("tensor", "block", "warp", "thread", "token")
ACCUMULATORS = ("wide", "short", "two-level")
# How consecutive rows are laid out, and the axes of that layout along which a scale is shared.
# A thread: rows of Q with equal t mod 8 in 32; rows of K with equal floor((t mod 8) / 2) in 64.
LAYOUT = {("q", "block"): ((128,), 2), ("q", "warp"): ((32,), 2), ("q", "thread"): ((4, 8), 2), ("q", "token"): ((1,), 2),
          ("k", "block"): ((64,), 2), ("k", "warp"): ((64,), 2), ("k", "thread"): ((8, 4, 2), (2, 4)), ("k", "token"): ((1,), 2)}


@dataclass(frozen=True)
class Recipe:
    """What is quantized and how. bits: of Q and K, 2 to 8, None leaves them float32; per: what shares a scale, see PER; smooth_q, smooth_k, smooth_v: take means off first;
    fp8: weights and values in E4M3; accumulator: of their product, see ACCUMULATORS. Defaults are the paper's. Raises ValueError."""
    bits: int | None = 4
    per: str = "thread"
    smooth_q: bool = True
    smooth_k: bool = True
    smooth_v: bool = False
    fp8: bool = True
    accumulator: str = "two-level"

    def __post_init__(self):
        if self.bits is not None:
            _bits(self.bits)
        for name, allowed in (("per", PER), ("accumulator", ACCUMULATORS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: should be one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Attention:
    """out: [heads, M, D] float32. Counted by the kernels, if asked to: products of Q and K (`__dp4a`, or single ones without bits), multiply-adds of Delta S, bytes of K and V read."""
    out: np.ndarray
    products: int | None = None
    delta: int | None = None
    bytes: int | None = None


def centre(x, rows=None):
    """Take the mean of each tile of `rows` rows (None: of all rows) off: (x - mean, mean [heads, tiles, D]). x: [heads, N, D]. The last tile may be shorter."""
    heads, n, d = x.shape
    rows = rows or n
    tiles = -(-n // rows)
    mean = _padded(x, tiles * rows).reshape(heads, tiles, rows, d).mean(axis=2)
    mean[:, -1] *= rows / (n - rows * (tiles - 1))              # the pad of the last tile counts for nothing
    return x - np.repeat(mean, rows, axis=1)[:, :n], mean


def quantize(x, bits, side, per="thread"):
    """Symmetric codes of `bits` bits, rounded half away from zero, and the scale of each row: x ~ scale[..., None] * codes. x: [heads, N, D]; side: "q" or "k". Raises ValueError."""
    top = 2 ** (_bits(bits) - 1) - 1
    if side not in ("q", "k") or per not in PER:
        raise ValueError(f"side={side!r}, per={per!r}: should be q or k, and one of {', '.join(PER)}")
    heads, n, _ = x.shape
    layout, shared = ((n,), 2) if per == "tensor" else LAYOUT[side, per]
    size = _padded(abs(x).max(axis=2), -(-n // prod(layout)) * prod(layout)).reshape(heads, -1, *layout)
    most = np.broadcast_to(size.max(axis=shared, keepdims=True), size.shape).reshape(heads, -1)[:, :n]
    scale = most / np.float32(top) + np.float32(1e-7)           # the addend keeps a group of zeros from dividing by zero
    codes = x / scale[..., None]
    return np.trunc(codes + np.copysign(np.float32(0.5), codes)).astype(np.int8), scale


def to_e4m3(x):
    """Codes, uint8, of the nearest E4M3 numbers, ties to even; beyond 448 the largest. x: float32 array, finite. Raises TypeError and ValueError."""
    _array("x", x)
    codes = np.zeros_like(x, dtype=np.uint8)
    launch(_kernels(64, False)["to_e4m3"], -(-x.size // 256), 256, (x, codes, x.size))
    return codes


def delta_s(mean, k, counts=None):
    """What the means of Q add to the scores: mean [heads, tiles, D] times smoothed keys k [heads, N, D] -> [heads, tiles, N]."""
    heads, n, d = k.shape
    delta = np.zeros_like(k, shape=(heads, mean.shape[1], n))
    nobody = np.zeros_like(k, dtype=np.uint64, shape=3)
    launch(_kernels(d, counts is not None)["delta_s"], (-(-n // TILE), mean.shape[1], heads), TILE, (mean, k, delta, n, nobody if counts is None else counts))
    return delta


def attend(Q, K, V, recipe=None, causal=False, count=False):
    """softmax(Q K^T / sqrt(D)) V as the recipe (None: the paper's) says. Q: [heads, M, D]; K, V: [heads, N, D]; causal: row i sees keys up to i, M = N. -> Attention. Raises TypeError and ValueError before anything runs."""
    heads, m, d = _array("Q", Q, (None, None, None))
    if d not in HEADS:
        raise ValueError(f"Q: head size {d}, these kernels serve {', '.join(map(str, HEADS))}")
    n = _array("K", K, (heads, None, d))[1]
    _array("V", V, (heads, n, d))
    if causal and m != n:
        raise ValueError(f"causal: needs as many queries as keys, there are {m} and {n}")
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: should be a Recipe, was {type(recipe).__name__}")
    zeros, counts = lambda *shape: np.zeros_like(Q, shape=shape), np.zeros_like(Q, dtype=np.uint64, shape=3)
    k = centre(K)[0] if recipe.smooth_k else K                  # one mean for all tokens
    q, mean = centre(Q, TILE) if recipe.smooth_q else (Q, None) # one for each tile
    v, v_mean = centre(V) if recipe.smooth_v else (V, zeros(heads, 1, d))
    delta = delta_s(mean, k, counts if count else None) if recipe.smooth_q else zeros(1)
    q_scale, k_scale, v_scale = zeros(heads, m), zeros(heads, n), zeros(heads, d) + np.float32(1)
    if recipe.bits is not None:
        (q, q_scale), (k, k_scale) = quantize(q, recipe.bits, "q", recipe.per), quantize(k, recipe.bits, "k", recipe.per)
    if recipe.fp8:
        most = abs(v).max(axis=1)
        v_scale = np.where(most > 0, most, np.float32(448)) / np.float32(448)
        v, v_scale = to_e4m3(v / v_scale[:, None]), v_scale / np.float32(448)        # 448 again: P~ has the static scale 1/448
    out, words = np.zeros_like(Q), lambda x: np.ascontiguousarray(x).view(np.int32)
    launch(_kernels(d, count)["attend"], (-(-m // TILE), heads), TILE,
           (words(q), words(k), words(v), np.ascontiguousarray(q_scale), np.ascontiguousarray(k_scale), delta, v_scale, v_mean, out, m, n, int(recipe.bits is not None),
            int(recipe.smooth_q), int(recipe.fp8), ACCUMULATORS.index(recipe.accumulator), int(causal), np.float32(d ** -0.5), counts))
    return Attention(out, *map(int, counts)) if count else Attention(out)


def similarity(out, exact):
    """How well a quantized attention does on calibration data: cosine similarity times (1 - relative L1 distance). 1 is perfect. The paper takes four bits where it is high, and eight elsewhere."""
    a, b = np.asarray(out, dtype=np.float64).ravel(), np.asarray(exact, dtype=np.float64).ravel()
    return a @ b / np.sqrt((a @ a) * (b @ b)) * (1 - abs(a - b).sum() / abs(b).sum())


@cache
def _kernels(head, count):
    module = Module.from_file(Path(__file__).with_suffix(".cu"))
    return Module(f'#define HEAD {head}\n{"#define COUNT_WORK" if count else ""}\n#line 1 "sageattention2.cu"\n' + module.source, module.filename)


def _padded(x, n):
    wide = np.zeros_like(x, shape=(x.shape[0], n, *x.shape[2:]))
    wide[:, :x.shape[1]] = x
    return wide


def _bits(bits):
    if not isinstance(bits, (int, np.integer)) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise ValueError(f"bits={bits!r}: should be an integer from 2 to 8")
    return int(bits)


def _array(name, x, shape=None):
    if getattr(x, "dtype", None) != np.float32:
        raise TypeError(f"{name}: should be an array of float32, {'has ' + str(x.dtype) if hasattr(x, 'dtype') else 'was ' + type(x).__name__}")
    if x.size == 0 or shape is not None and (x.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, x.shape))):
        raise ValueError(f"{name}: should have shape {tuple('any' if s is None else s for s in shape or ())} and not be empty, has {x.shape}")
    if not x.flags.c_contiguous:
        raise ValueError(f"{name}: should be contiguous in C order")
    if not bool(np.isfinite(x).all()):
        raise ValueError(f"{name}: should be finite, has NaN or infinity")
    return x.shape
