"""ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer (You, Shi, Guo, Lin; 2023, arXiv:2306.06446).

Implemented: attention on binary codes, whose two products are sums of selected rows; linear layers with weights that are powers of two (DeepShift-Q), whose products are shifts; the mixture of a multiplying and a shifting expert
with its latency-aware balancing loss. The kernels are in shiftaddvit.cu and run where the arrays are; the modules are torch's, for training.

| symbol | name | shape |
|---|---|---|
| $Q_b$, $K_b$, $V$ | `Q`, `K` (bool); `V` | [batch, N, D]; [batch, N, E] float32 |
| $P$ | codes: 0, or sign times $16+P$ | [M, K] int8, $-15\\le P\\le0$ |
| $x$ | fixed(x), units of $2^{-16}$ | [N, K] int32 |
| $\\alpha_i$ | `latency` / its sum | [experts] |

Deviations from the paper
- Codes by the mean threshold, one threshold an image; the released configuration shares Q and K and hashes them with a kernel (EcoFormer).
- The released training loop multiplies the balancing loss by 0, its gate outputs 1 for the winner, and it compares logits with softmaxed thresholds in the load; here all three are as the paper describes them.
- No TVM: the kernels are plain CUDA C.

Cost of attention: (ones in K_b + ones in Q_b) E additions, no multiplication; of a layer: at most N M K shifts and as many additions.
"""
import copy
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lib.cuda import Module, launch

PLACES, LOWEST = 16, -15


# --- attention from additions

@dataclass(frozen=True)
class Sums:
    """out: [batch, N, E] float32, Q_b (K_b^T V). Counted by the kernels, if asked to: additions, popcounts."""
    out: np.ndarray
    additions: int | None = None
    popcounts: int | None = None


def pack(bits):
    """[batch, rows, cols] bool -> [batch, rows, ceil(cols / 32)] uint32, column j in bit j % 32 of word j // 32."""
    batch, rows, cols = bits.shape
    wide = np.zeros_like(bits, dtype=np.uint32, order="C", shape=(batch, rows, -(-cols // 32) * 32))
    wide[:, :, :cols] = bits
    weights = np.asarray(2 ** np.arange(32, dtype=np.uint64), like=wide)
    return np.ascontiguousarray((wide.reshape(batch, rows, -1, 32) * weights).sum(axis=-1).astype(np.uint32))


def add_attention(Q, K, V, quadratic=False, count=False):
    """Q_b (K_b^T V) by additions of selected rows; `quadratic`: (Q_b K_b^T) V, with scores by popcount. Q, K: [batch, N, D] bool; V: [batch, N, E] float32, E at most 64. Raises TypeError, ValueError."""
    for name, x, dtype in (("Q", Q, np.bool_), ("K", K, np.bool_), ("V", V, np.float32)):
        if getattr(x, "dtype", None) != dtype:
            raise TypeError(f"{name}: should be an array of {np.dtype(dtype)}, {'has ' + str(x.dtype) if hasattr(x, 'dtype') else 'was ' + type(x).__name__}")
        if x.ndim != 3 or 0 in x.shape or x.shape[:2] != Q.shape[:2]:
            raise ValueError(f"{name}: should be [batch, N, .] like Q, without an axis of length 0; has shape {x.shape}, Q {Q.shape}")
    if K.shape != Q.shape or V.shape[2] > 64:
        raise ValueError(f"K, V: K should have the shape of Q, {Q.shape}, and V at most 64 columns; have {K.shape} and {V.shape}")
    if not V.flags.c_contiguous or not bool(np.isfinite(V).all()):
        raise ValueError("V: should be contiguous in C order, and finite")
    (batch, n, d), e, kernels = Q.shape, V.shape[2], _kernels(count)
    counts = np.zeros_like(V, dtype=np.uint64, shape=3)
    if quadratic:
        q, k = pack(Q), pack(K)
        scores = np.zeros_like(V, dtype=np.int32, shape=(batch, n, n))
        launch(kernels["popcount_scores"], (-(-n // 16), -(-n // 16), batch), (16, 16), (q, k, scores, n, q.shape[2], counts))
        out = scores.astype(np.float32) @ V                                    # here the scores multiply
    else:
        k, q = pack(K.transpose(0, 2, 1)), pack(Q)                             # rows of K_b^T are channels
        inner, out = np.zeros_like(V, shape=(batch, d, e)), np.zeros_like(V)
        launch(kernels["matadd"], (d, batch), 64, (k, V, inner, d, n, k.shape[2], e, counts))
        launch(kernels["matadd"], (n, batch), 64, (q, inner, out, n, d, q.shape[2], e, counts))
    return Sums(out, int(counts[0]), int(counts[1])) if count else Sums(out)


class _Threshold(torch.autograd.Function):
    """1 where x > mean; backward that of clamp(x, 0, 1)."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > x.mean(dim=(1, 2, 3), keepdim=True)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * ((x > 0) & (x < 1))


def binary_codes(x):
    """Codes of queries or keys: rows to unit length, then 1 above the mean of the image. x: [n, heads, N, D] -> the same shape, 0 or 1, with a straight-through gradient."""
    return _Threshold.apply(F.normalize(x, dim=-1))


class AddAttention(nn.Module):
    """Takes the place of an attention with wq, wk, wv, wo: o = y / |y| + dconv(V), y = V / 2 + Q_b (K_b^T V) / pi. A row y = 0 stays 0.

    dconv: a filter of 9 tokens, one a head. sums: how the middle is computed, `torch_sums` for training."""

    def __init__(self, attention):
        super().__init__()
        self.heads, self.sums = attention.heads, torch_sums
        self.wq, self.wk, self.wv, self.wo = (copy.deepcopy(getattr(attention, w)) for w in ("wq", "wk", "wv", "wo"))
        self.dconv = nn.Conv1d(self.heads, self.heads, 9, padding=4, groups=self.heads, bias=False)
        nn.init.zeros_(self.dconv.weight)

    def forward(self, x, rope=None):                                           # [n, t, d]
        n, t, d = x.shape
        q, k, v = (w(x).view(n, t, self.heads, -1).transpose(1, 2) for w in (self.wq, self.wk, self.wv))     # [n, h, t, e]
        y = v / 2 + self.sums(binary_codes(q), binary_codes(k), v) / math.pi
        near = self.dconv(v.permute(0, 3, 1, 2).reshape(-1, self.heads, t)).view(n, -1, self.heads, t).permute(0, 2, 3, 1)
        return self.wo((F.normalize(y, dim=-1) + near).transpose(1, 2).reshape(n, t, d))


def torch_sums(q, k, v):
    """Q_b (K_b^T V) as two products: what the released code computes, and what gradients flow through."""
    return q @ (k.transpose(-2, -1) @ v)


def kernel_sums(q, k, v):
    """The same through the kernel, without gradient."""
    flat = [x.detach().flatten(0, 1).contiguous().numpy() for x in (q, k, v)]
    return torch.from_numpy(add_attention(flat[0] > 0, flat[1] > 0, flat[2]).out).view_as(v)


# --- layers from shifts

def power_of_two(w):
    """sign(w) 2^P, P = log2|w| rounded half to even, |w| clamped to [2^-15, 1]; 0 stays 0. Raises ValueError for NaN."""
    if bool(torch.isnan(w).any()):
        raise ValueError("w: should hold no NaN")
    return torch.sign(w) * torch.exp2(torch.log2(w.abs().clamp(2.0 ** LOWEST, 1.0)).round())


def shift_codes(w):
    """int8 codes for the kernel: 0, or sign times (16 + P). w: [M, K] tensor -> [M, K] NumPy int8."""
    w = power_of_two(w.detach())
    return (torch.sign(w) * (torch.log2(w.abs().clamp_min(2.0 ** LOWEST)) + 1 - LOWEST)).to(torch.int8).numpy()


def fixed(x):
    """Activations in units of 2^-16, floored, within +-2^15: float -> the same kind of float, a multiple of 2^-16."""
    return (x * 2.0 ** PLACES).floor().div(2.0 ** PLACES).clamp(-2.0 ** 15, 2.0 ** 15 - 1)


def shift_gemm(X, codes, count=False):
    """X W^T exactly, in units of 2^-31 (int64), and the number of shifts if asked. X: [N, K] int32 in units of 2^-16; codes: [M, K] int8 of `shift_codes`. Raises TypeError, ValueError."""
    for name, x, dtype in (("X", X, np.int32), ("codes", codes, np.int8)):
        if getattr(x, "dtype", None) != dtype:
            raise TypeError(f"{name}: should be an array of {np.dtype(dtype)}, {'has ' + str(x.dtype) if hasattr(x, 'dtype') else 'was ' + type(x).__name__}")
        if x.ndim != 2 or 0 in x.shape or not x.flags.c_contiguous:
            raise ValueError(f"{name}: should be a matrix, contiguous in C order, has shape {x.shape}")
    if X.shape[1] != codes.shape[1] or X.shape[1] > 65536:
        raise ValueError(f"codes: rows of X have {X.shape[1]} values, rows of codes {codes.shape[1]}; they should have the same number, at most 65536")
    if int(abs(codes.astype(np.int32)).max()) > 1 - LOWEST:
        raise ValueError(f"codes: should be from {LOWEST - 1} to {1 - LOWEST}")
    Y, counts = np.zeros_like(X, dtype=np.int64, shape=(len(X), len(codes))), np.zeros_like(X, dtype=np.uint64, shape=3)
    launch(_kernels(count)["shift_gemm"], (-(-len(codes) // 16), -(-len(X) // 16)), (16, 16), (X, codes, Y, len(X), len(codes), X.shape[1], counts))
    return (Y, int(counts[2])) if count else Y


class ShiftLinear(nn.Module):
    """A linear layer whose weights are powers of two. Gradients go to the weights as if they were not rounded, and to the input through the rounded ones. kernel: forward through the kernel, without gradient."""

    def __init__(self, linear, kernel=False):
        super().__init__()
        self.weight, self.kernel = nn.Parameter(linear.weight.detach().clone()), kernel
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())

    def forward(self, x):
        with torch.no_grad():                                                  # as released: in place, so that a weight comes back from beyond
            self.weight.copy_(torch.sign(self.weight) * self.weight.abs().clamp(2.0 ** LOWEST, 1.0))
        bias = None if self.bias is None else self.bias + (fixed(self.bias) - self.bias).detach()
        if self.kernel:
            X = (fixed(x.detach()).flatten(0, -2).double() * 2.0 ** PLACES).to(torch.int32).numpy()
            Y = torch.from_numpy(shift_gemm(X, shift_codes(self.weight))).double() * 2.0 ** (LOWEST - PLACES)
            return Y.to(x.dtype).view(*x.shape[:-1], -1) + (0 if bias is None else bias.detach())
        w = self.weight + (power_of_two(self.weight) - self.weight).detach()
        return F.linear(x + (fixed(x) - x).detach(), w, bias)


def shifted(module, kernel=False):
    """A copy of a module in which every nn.Linear and ShiftLinear is a ShiftLinear."""
    module = copy.deepcopy(module)
    for name, child in list(module.named_children()):
        setattr(module, name, ShiftLinear(child, kernel) if isinstance(child, (nn.Linear, ShiftLinear)) else shifted(child, kernel))
    return module


# --- the mixture

def scv(x):
    """Squared coefficient of variation: variance (n - 1) over squared mean. x: [experts]"""
    return x.var() / (x.mean() ** 2 + 1e-10)


def balance_loss(logits, noisy, latency, sigma):
    """SCV of latency-weighted importance plus SCV of latency-weighted load. logits, noisy: [tokens, experts], noisy = logits + sigma eps; latency: [experts] > 0; sigma > 0. Raises ValueError."""
    if not sigma > 0 or latency.shape != logits.shape[-1:] or not bool((latency > 0).all()):
        raise ValueError(f"latency={latency}, sigma={sigma!r}: should be one number > 0 for each of {logits.shape[-1]} experts, and a number > 0")
    alpha, (best, second) = latency / latency.sum(), noisy.topk(2, dim=-1).values.unbind(-1)
    rival = torch.where(noisy == best[:, None], second[:, None], best[:, None])               # the best of the others
    load = torch.special.ndtr((logits - rival) / sigma).sum(0)
    return scv(alpha * logits.softmax(-1).sum(0)) + scv(alpha * load)


class Mixture(nn.Module):
    """Each token to one of two experts, the MLP as it is or with shifts; the answer is scaled by the gate's probability. `chosen` and `balance` are of the last call; noise (training only) from `generator`."""

    def __init__(self, mlp, width, latency=(6.0, 4.0), generator=None):
        super().__init__()
        self.experts, self.gate = nn.ModuleList([copy.deepcopy(mlp), shifted(mlp)]), nn.Linear(width, 2, bias=False)
        nn.init.zeros_(self.gate.weight)
        self.generator, self.latency, self.sigma = generator, torch.tensor(latency), 0.5
        if self.latency.shape != (2,) or not bool((self.latency > 0).all()):
            raise ValueError(f"latency={latency!r}: should be two numbers > 0")

    def forward(self, x):
        logits = self.gate(x)
        noisy = logits + self.sigma * torch.randn(logits.shape, generator=self.generator) if self.training else logits
        self.chosen = noisy.argmax(-1)                                          # 0: multiply, 1: shift
        self.balance = balance_loss(logits.flatten(0, -2), noisy.flatten(0, -2), self.latency, self.sigma)
        weight = noisy.softmax(-1).gather(-1, self.chosen[..., None])
        return weight * torch.where(self.chosen[..., None] == 0, *(expert(x) for expert in self.experts))


@cache
def _kernels(count):
    module = Module.from_file(Path(__file__).with_suffix(".cu"))
    return Module('#define COUNT_WORK\n#line 1 "shiftaddvit.cu"\n' + module.source, module.filename) if count else module
