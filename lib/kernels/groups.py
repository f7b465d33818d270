"""Weights in 4-bit groups: what the chapter's weight-only kernels load.

    W = quantize(matrix, g)            a Groups: packed codes, and a scale and a zero point for each g neighbours along K
    W.values()                         the numbers that it stands for, sigma (u - z), as float64
    pack(u), unpack(bytes)             two codes a byte, the first one in the low half
    with_product(model, make)          a copy of a torch model whose linear layers multiply with a function of ours

| symbol | name | shape |
|---|---|---|
| $u \\in 0..15$ | codes, packed | [M, K / 2], uint8 |
| $\\sigma$, $z$ | scale, zero | [M, K / g], float16 and uint8 |
| $w = \\sigma(u - z)$ | values() | [M, K], float64 |

The range of a group is that of the affine grid of `lib.number_formats.uniform`, widened to hold 0. The scale is rounded to float16, as it is stored, *before* the codes are chosen, so that codes and scale belong together.
Arrays are NumPy's or CuPy's (`W.on(cupy)`). Storage: 4 + (16 + 4) / g bits a weight; `zero` takes a byte in memory here, four bits in that account.
"""
import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from lib.number_formats.uniform import Uniform


@dataclass(frozen=True)
class Groups:
    """A matrix [M, K] in groups of g along K. codes: [M, K / 2] uint8; scale: [M, K / g] float16; zero: [M, K / g] uint8, 0..15. Raises TypeError and ValueError for parts that do not fit."""
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    g: int

    def __post_init__(self):
        _group(self.g)
        for name, part, dtype in (("codes", self.codes, np.uint8), ("scale", self.scale, np.float16), ("zero", self.zero, np.uint8)):
            if getattr(part, "dtype", None) != dtype:
                raise TypeError(f"{name}: should be an array of {np.dtype(dtype)}, was {getattr(part, 'dtype', type(part).__name__)}")
            if part.ndim != 2 or 0 in part.shape:
                raise ValueError(f"{name}: should be a matrix, has shape {part.shape}")
            if not part.flags.c_contiguous:
                raise ValueError(f"{name}: should be C-contiguous, has strides {part.strides}")
        if self.K % self.g:
            raise ValueError(f"g={self.g}: should divide the {self.K} weights of a row")
        for name, part in (("scale", self.scale), ("zero", self.zero)):
            if part.shape != (self.M, self.K // self.g):
                raise ValueError(f"{name}: should have shape {(self.M, self.K // self.g)}, has {part.shape}")
        if int(self.zero.max()) > 15:
            raise ValueError(f"zero: should be at most 15, the largest is {int(self.zero.max())}")
        if not bool(np.isfinite(self.scale).all()):               # NumPy hands the call on to CuPy for CuPy's arrays
            raise ValueError("scale: should be finite, has NaN or infinity")

    @property
    def M(self):
        return self.codes.shape[0]

    @property
    def K(self):
        return 2 * self.codes.shape[1]

    @property
    def bits_per_weight(self):
        """Storage: four bits a code, and 16 + 4 a group."""
        return 4 + 20 / self.g

    def values(self):
        """sigma (u - z), exactly: [M, K] float64."""
        u = unpack(self.codes).reshape(self.M, -1, self.g).astype(np.float64)
        return (self.scale[..., None].astype(np.float64) * (u - self.zero[..., None])).reshape(self.M, self.K)

    def on(self, xp):
        """The same with the arrays of `xp` (numpy or cupy)."""
        return replace(self, codes=xp.asarray(self.codes), scale=xp.asarray(self.scale), zero=xp.asarray(self.zero))


def pack(u):
    """Codes [..., K] uint8 below 16, K even -> [..., K / 2]: code 2i in the low half of byte i, code 2i + 1 in the high half."""
    if getattr(u, "dtype", None) != np.uint8:
        raise TypeError(f"u: should be an array of uint8, was {getattr(u, 'dtype', type(u).__name__)}")
    if u.ndim == 0 or u.shape[-1] % 2 or 0 in u.shape:
        raise ValueError(f"u: the last axis should have an even length, has shape {u.shape}")
    if int(u.max()) > 15:
        raise ValueError(f"u: codes of four bits should be below 16, the largest is {int(u.max())}")
    return u[..., 0::2] | u[..., 1::2] << np.uint8(4)


def unpack(packed):
    """The inverse of `pack`: [..., n] bytes -> [..., 2n] codes."""
    if getattr(packed, "dtype", None) != np.uint8:
        raise TypeError(f"packed: should be an array of uint8, was {getattr(packed, 'dtype', type(packed).__name__)}")
    u = np.zeros_like(packed, shape=(*packed.shape[:-1], 2 * packed.shape[-1]))
    u[..., 0::2], u[..., 1::2] = packed & np.uint8(15), packed >> np.uint8(4)
    return u


def quantize(W, g, clip="minmax"):
    """Groups of a real matrix W [M, K] (NumPy or torch). g: even, divides K; clip: how a group's range is chosen, see `Uniform`. NaN, infinity and scales beyond float16 raise ValueError."""
    W = torch.as_tensor(W, dtype=torch.float64)
    if W.ndim != 2:
        raise ValueError(f"W: should be a matrix [M, K], has shape {tuple(W.shape)}")
    grid = Uniform(bits=4, symmetric=False, per="group", group=_group(g), clip=clip).fit(W)
    scale = grid.scale.half().double()
    if not torch.isfinite(scale).all():
        raise ValueError(f"W: a scale of {grid.scale.max().item():.3g} is beyond float16")
    grid = replace(grid, scale=torch.where(scale > 0, scale, 1.0))    # weights below float16's smallest scale become zero
    shape = len(W), -1
    return Groups(pack(grid.quantize(W).numpy().astype(np.uint8)), grid.scale.reshape(shape).numpy().astype(np.float16), grid.zero.reshape(shape).numpy().astype(np.uint8), g)


class ProductLinear(nn.Module):
    """A linear layer whose product is a function: X [N, K] float32 -> Y [M, N], both NumPy arrays. bias: [M] or None."""

    def __init__(self, product, bias=None):
        super().__init__()
        self.product, self.bias = product, bias

    def forward(self, x):                                          # [..., K] -> [..., M]
        X = np.ascontiguousarray(x.detach().flatten(0, -2).numpy(), dtype=np.float32)
        y = torch.from_numpy(np.ascontiguousarray(np.asarray(self.product(X), dtype=np.float32).T)).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def with_product(model, make):
    """A copy of `model` in which every nn.Linear for which make(name, W) returns a function uses it as its product. W: [M, K] float64; None leaves the layer as it is."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            product = make(name, layer.weight.detach().double().numpy())
            if product is not None:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, ProductLinear(product, layer.bias))
    return model


def _group(g):
    if not isinstance(g, (int, np.integer)) or isinstance(g, bool) or g < 2 or g % 2:
        raise ValueError(f"g={g!r}: should be an even number of weights, at least 2")
    return int(g)
