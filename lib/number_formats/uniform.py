"""The uniform quantizer: an even grid of 2^b integers laid over a range of real numbers. What every page on bits stands on.

    spec = Uniform(bits=4, per="channel", clip="mse")     what to do: a frozen description, checked when made
    grid = spec.fit(w)                                    where the grid lies for this tensor: scales and zero points
    q = grid.quantize(w); r = grid.dequantize(q)          integer codes (int32), and the real numbers they stand for
    grid(w)                                               both at once, with the straight-through gradient; spec(w) fits first

Symbols: r real value, q code, S scale, Z zero point, [alpha, beta] range, b bits.

    affine      codes 0 .. 2^b - 1               S = (beta - alpha) / (2^b - 1)   Z = clip(round(-alpha / S))   zero always on the grid
    symmetric   codes -(2^(b-1) - 1) .. same     S = max|r| / (2^(b-1) - 1)       Z = 0   "restricted" range, the default
    full=True   codes -2^(b-1) .. 2^(b-1) - 1    S = 2 max|r| / (2^b - 1)         Z = 0   one level more, extremes S/2 off the grid

Granularity `per`: one (S, Z) per "tensor"; per "channel" (first axis); per "group" of `group` neighbours within a channel; per "token"
(last axis, for activations). Each is a reshape to rows [m, k] with one (S, Z) a row, so nothing below needs to know which it is.
Rounding is half to even, of r * (1/S), before Z is added: that is what `torch.fake_quantize_*` does, bit for bit. A row whose S
would be 0 (or have no finite reciprocal) gets S = 1. Cost: O(n); clip="mse" costs one pass for each of its 100 candidates.
"""

from dataclasses import dataclass
from typing import Callable

import torch


def codes(bits, symmetric=True, full=False):
    """Smallest and largest integer code."""
    if not symmetric:
        return 0, 2**bits - 1
    return (-(2 ** (bits - 1)) if full else 1 - 2 ** (bits - 1)), 2 ** (bits - 1) - 1


def check_real(r, name="r"):
    """Refuse what cannot be quantized: not a float tensor, empty, NaN or infinite."""
    if not isinstance(r, torch.Tensor) or not r.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, was {getattr(r, 'dtype', type(r).__name__)}")
    if r.numel() == 0:
        raise ValueError(f"{name} is empty (shape {tuple(r.shape)}): there is no range to fit")
    if not torch.isfinite(r).all():
        bad = int((~torch.isfinite(r)).sum())
        raise ValueError(f"{name} must be finite, but {bad} of its {r.numel()} values are NaN or infinite")


def rows(r, per, group=None):
    """Reshape r to [m, k] such that each row is to share one scale."""
    if per == "tensor":
        return r.reshape(1, -1)
    if per == "token":
        return r.reshape(-1, r.shape[-1])
    flat = r.flatten(1) if r.dim() > 1 else r[None]                # [channels, k]
    if per == "channel":
        return flat
    if flat.shape[1] % group:
        raise ValueError(f"group must divide the {flat.shape[1]} weights of a channel (shape {tuple(r.shape)}), was {group}")
    return flat.reshape(-1, group)


# ------------------------------------------------------------------------------------------------ the quantizer itself

def scale_zero(low, high, bits, symmetric=True, full=False):
    """Range -> (S, Z), elementwise; the range is first widened to hold 0, or to be symmetric about it."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        top = torch.maximum(-low, high)
        scale = top / ((2**bits - 1) / 2 if full else 2 ** (bits - 1) - 1)
    else:
        scale = high / (2**bits - 1) - low / (2**bits - 1)         # two quotients: high - low could overflow
    scale = torch.where(torch.isfinite(1 / scale), scale, torch.ones_like(scale))
    zero = torch.zeros_like(scale) if symmetric else torch.round(-low / scale).clamp(0, 2**bits - 1)
    return scale, zero


def unclipped(r, scale, zero):
    """round(r / S) + Z, whether or not there is such a code; in r's dtype."""
    return torch.round(r * (1 / scale)) + zero


def quantize(r, scale, zero, qmin, qmax):
    """q = clip(round(r / S) + Z)."""
    return unclipped(r, scale, zero).clamp(qmin, qmax)


def dequantize(q, scale, zero):
    """r^ = S (q - Z)."""
    return (q - zero) * scale


class StraightThrough(torch.autograd.Function):
    """Forward: dequantize(quantize(r)). Backward: the gradient passes where r rounds to a code that exists, and stops elsewhere."""

    @staticmethod
    def forward(ctx, r, scale, zero, qmin, qmax):
        code = unclipped(r, scale, zero)
        ctx.save_for_backward((code >= qmin) & (code <= qmax))
        return dequantize(code.clamp(qmin, qmax), scale, zero)

    @staticmethod
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None, None


# ------------------------------------------------------------------------------------------------ choosing the range

def minmax_range(x, spec):
    """x [m, k] -> low, high [m, 1]: nothing is clipped."""
    return x.amin(1, keepdim=True), x.amax(1, keepdim=True)


def percentile_range(x, spec, p=99.9):
    """Clip the (100 - p) % of largest magnitude; for an affine grid, half of them at each end."""
    if spec.symmetric:
        top = torch.quantile(x.abs(), p / 100, dim=1, keepdim=True)
        return -top, top
    tail = (1 - p / 100) / 2
    return torch.quantile(x, tail, dim=1, keepdim=True), torch.quantile(x, 1 - tail, dim=1, keepdim=True)


def mse_range(x, spec, candidates=100):
    """The min-max range shrunk by the factor c = 1/100, 2/100, ..., 1 that gives the least squared error, for each row."""
    low, high = minmax_range(x, spec)
    best, keep = torch.full_like(low, torch.inf), torch.ones_like(low)
    for i in range(1, candidates + 1):
        c = i / candidates
        scale, zero = scale_zero(c * low, c * high, spec.bits, spec.symmetric, spec.full)
        error = (dequantize(quantize(x, scale, zero, *spec.codes), scale, zero) - x).square().sum(1, keepdim=True)
        better = error < best
        best, keep = torch.where(better, error, best), torch.where(better, c, keep)
    return keep * low, keep * high


RANGES = {"minmax": minmax_range, "percentile": percentile_range, "mse": mse_range}


# ------------------------------------------------------------------------------------------------ description and grid

@dataclass(frozen=True)
class Uniform:
    """bits 1..16; `clip` is a name in RANGES or a function (x [m, k], spec) -> (low, high), each [m, 1]."""

    bits: int
    symmetric: bool = True
    full: bool = False
    per: str = "tensor"
    group: int | None = None
    clip: str | Callable = "minmax"

    def __post_init__(self):
        least = 2 if self.symmetric and not self.full else 1
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not least <= self.bits <= 16:
            raise ValueError(f"bits must be an int from {least} to 16 for this grid, was {self.bits!r}")
        if self.per not in ("tensor", "channel", "group", "token"):
            raise ValueError(f"per must be tensor, channel, group or token, was {self.per!r}")
        if (self.per == "group") != (self.group is not None) or self.group is not None and (not isinstance(self.group, int) or self.group < 1):
            raise ValueError(f"group must be a positive int with per='group' and None otherwise, was {self.group!r} with per={self.per!r}")
        if self.full and not self.symmetric:
            raise ValueError("full=True is a choice of the symmetric grid; an affine grid always uses all 2^b codes")
        if not callable(self.clip) and self.clip not in RANGES:
            raise ValueError(f"clip must be one of {', '.join(RANGES)} or a function, was {self.clip!r}")

    @property
    def codes(self):
        return codes(self.bits, self.symmetric, self.full)

    def fit(self, r):
        """The Grid for the tensor r. NaN, infinite and empty tensors raise ValueError."""
        check_real(r)
        x = rows(r.detach(), self.per, self.group)
        low, high = (self.clip if callable(self.clip) else RANGES[self.clip])(x, self)
        return Grid(*scale_zero(low, high, self.bits, self.symmetric, self.full), self)

    def __call__(self, r):
        """Fit to r and fake-quantize it: a dynamic quantizer."""
        return self.fit(r)(r)


@dataclass(frozen=True)
class Grid:
    """scale and zero [m, 1], one for each row of `rows(r, spec.per, spec.group)`."""

    scale: torch.Tensor
    zero: torch.Tensor
    spec: Uniform

    def _rows(self, r):
        x = rows(r, self.spec.per, self.spec.group)
        if len(x) != len(self.scale):
            raise ValueError(f"r has {len(x)} rows of its own scale, the grid was fitted to {len(self.scale)}")
        return x

    def quantize(self, r):
        """Codes, int32, in r's shape."""
        check_real(r)
        return quantize(self._rows(r), self.scale, self.zero, *self.spec.codes).to(torch.int32).reshape(r.shape)

    def dequantize(self, q):
        return dequantize(self._rows(q).to(self.scale.dtype), self.scale, self.zero).reshape(q.shape)

    def __call__(self, r):
        """Fake-quantize r, with the straight-through gradient."""
        check_real(r)
        return StraightThrough.apply(self._rows(r), self.scale, self.zero, *self.spec.codes).reshape(r.shape)

    def bits_per_weight(self, r, scale_bits=16):
        """Storage of r on this grid, counted: codes, one scale a row, and a zero point of b bits a row if the grid is affine."""
        side = self.scale.numel() * (scale_bits + (0 if self.spec.symmetric else self.spec.bits))
        return self.spec.bits + side / r.numel()


def integer_matmul(qa, qb, za=0, zb=0):
    """(qa - za) @ (qb - zb) from the codes alone, int64: what an integer unit computes, then the zero points' cross terms.

    qa [m, k], qb [k, n]; za a number or [m, 1], zb a number or [1, n]. Multiply by S_a S_b to get the real product.
    """
    qa, qb = qa.long(), qb.long()
    za, zb = (z.long() if isinstance(z, torch.Tensor) else z for z in (za, zb))
    return qa @ qb - zb * qa.sum(1, keepdim=True) - za * qb.sum(0, keepdim=True) + qa.shape[1] * za * zb
