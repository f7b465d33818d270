"""GQSA: Group Quantization and Sparsity for Accelerating Large Language Model Inference (Zeng, Liu, Yang, Chen, Mei, Fu; 2024, arXiv:2412.17560).

Implemented: the format in which a group of weights is either stored with four bits or not at all; saliency of weights and groups; two schedules of the sparse product, whose kernels are in gqsa.cu; and the two stages of training: block by block, and end to end over scales and zeros alone.

| symbol | name | shape |
|---|---|---|
| stored groups: codes, $\\sigma$, $z$ | SparseGroups.codes, scale, zero | [nnz, g / 2] uint8, [nnz] float16, [nnz] uint8 |
| column of a group, first group of a row | col, row_start | [nnz] uint16, [M + 1] int32 |
| $H = X^T X + \\lambda I$ | hessian(X) | [K, K] |
| $\\rho_{mk} = w_{mk}^2 / [H^{-1}]_{kk}$ | weight_saliency(W, H) | [M, K] |
| $S$, $P$ | sparsity, workers | |

Deviations from the paper, of which we could read no more than abstract and introduction
- *Assumed*: the saliency (optimal brain surgeon, damped by 1 % of the mean diagonal; a group's is the mean of its weights'), groups of 16, ranges from minimum to maximum, Adam and its rates, the numbers of steps.
- *Reconstructed*: the format (block sparse rows, 16 bits for a group's column) and both schedules, from the description of an engine that splits work by tasks. Cut rows are joined by a second kernel in a fixed order instead of by atomic additions.
- Zeros stay integers of four bits while they are trained (rounded, with a straight-through gradient), so that the format does not grow; scales are rounded to float16 when codes are frozen and when weights are exported.

Cost: nnz groups a product, ceil(nnz / P) for the busiest of P workers; storage (1 - S)(4 + (16 + 4 + 16) / g) bits a weight, and 32 a row.
"""
import copy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lib.cuda import Module, launch
from lib.number_formats.uniform import Uniform

from .groups import pack, quantize, unpack


# ------------------------------------------------------------------------------------------------ what to keep
def hessian(X, damping=0.01):
    """H = X^T X + lambda I, lambda = damping times the mean of the diagonal. X: [n, K] real, n inputs of a layer. Raises ValueError where it would be singular."""
    X = np.asarray(X, dtype=np.float64)
    if X.ndim != 2 or not np.isfinite(X).all():
        raise ValueError(f"X: should be a finite matrix [n, K], has shape {X.shape}")
    H = X.T @ X
    if not damping > 0 or not H.any():
        raise ValueError(f"damping={damping!r}: should be positive, and X not all zero")
    return H + damping * np.diag(H).mean() * np.eye(len(H))


def weight_saliency(W, H):
    """rho = w^2 / [H^-1]_kk: by how much the loss rises when a weight is removed and the rest of its row refitted. W: [M, K]."""
    return W**2 / np.diag(np.linalg.inv(H))


def group_saliency(W, H, g, exact=False):
    """[M, K / g]: the mean of rho over a group, or, exact, w_G^T ([H^-1]_GG)^-1 w_G: the rise when the whole group is removed and the rest refitted."""
    M, K = W.shape
    if not isinstance(g, (int, np.integer)) or g < 1 or K % g:
        raise ValueError(f"g={g!r}: should divide the {K} weights of a row")
    if not exact:
        return weight_saliency(W, H).reshape(M, -1, g).mean(-1)
    blocks = np.linalg.inv(H).reshape(K // g, g, K // g, g)[np.arange(K // g), :, np.arange(K // g)]      # [K / g, g, g]
    groups = W.reshape(M, -1, g)
    return np.einsum("mni,nij,mnj->mn", groups, np.linalg.inv(blocks), groups)


def keep(score, sparsity, per="matrix"):
    """The groups to keep, bool like score [M, K / g]: all but the share `sparsity` of least score, in the whole matrix or in each row ("row")."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity!r}: should be at least 0 and below 1")
    if per not in ("matrix", "row"):
        raise ValueError(f"per={per!r}: should be matrix or row")
    if not np.isfinite(score).all():
        raise ValueError("score: should be finite, has NaN or infinity")
    rows = score.reshape(1, -1) if per == "matrix" else score
    kept = np.ones(rows.shape, bool)
    np.put_along_axis(kept, np.argsort(rows, axis=1, kind="stable")[:, :round(sparsity * rows.shape[1])], False, axis=1)
    return kept.reshape(score.shape)


def two_of_four(score):
    """The baseline "2:4": bool like score [M, K], the two greater ones of each four neighbours in a row. Raises ValueError where K is no multiple of four."""
    M, K = score.shape
    if K % 4:
        raise ValueError(f"score: rows should hold a multiple of four, hold {K}")
    return (score.reshape(M, -1, 4).argsort(axis=2, kind="stable").argsort(axis=2) >= 2).reshape(M, K)


def output_error(V, W, H):
    """|(V - W) X^T| / |W X^T| (Frobenius) from H = X^T X: how far outputs of a layer are off when V [M, K] stands for W."""
    D = V - W
    return float(np.sqrt(np.sum(D @ H * D) / np.sum(W @ H * W)))


# ------------------------------------------------------------------------------------------------ the format
@dataclass(frozen=True)
class SparseGroups:
    """A matrix [M, K] of which only some groups of g are stored, row by row. Shapes as in the module's table. Raises TypeError and ValueError for parts that do not fit."""
    row_start: np.ndarray
    col: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    K: int
    g: int

    def __post_init__(self):
        if not isinstance(self.g, (int, np.integer)) or self.g < 2 or self.g % 2 or self.K % self.g:
            raise ValueError(f"g={self.g!r}: should be even and divide the {self.K} weights of a row")
        nnz, start = len(self.col), self.row_start
        for name, shape, dtype in (("row_start", start.shape[:1], np.int32), ("col", (nnz,), np.uint16), ("codes", (nnz, self.g // 2), np.uint8), ("scale", (nnz,), np.float16), ("zero", (nnz,), np.uint8)):
            part = getattr(self, name)
            if part.dtype != dtype:
                raise TypeError(f"{name}: should be an array of {np.dtype(dtype)}, was {part.dtype}")
            if part.shape != shape or not part.flags.c_contiguous or 0 in shape:
                raise ValueError(f"{name}: should be C-contiguous and have shape {shape}, has {part.shape}")
        if int(start[0]) or int(start[-1]) != nnz or bool((start[1:] < start[:-1]).any()):
            raise ValueError(f"row_start: should rise from 0 to the {nnz} groups stored")
        if int(self.col.max()) >= self.K // self.g or int(self.zero.max()) > 15 or not bool(np.isfinite(self.scale).all()):
            raise ValueError(f"col, zero, scale: should be below {self.K // self.g}, at most 15, and finite")

    @property
    def M(self):
        return len(self.row_start) - 1

    @property
    def nnz(self):
        return len(self.col)

    @property
    def bits_per_weight(self):
        """Codes, scale, zero and column of the stored groups; `row_start` adds 32 (M + 1) / (M K)."""
        return self.nnz * (4 * self.g + 16 + 4 + 16) / (self.M * self.K)

    def values(self):
        """The whole matrix, zeros where nothing is stored: [M, K] float64."""
        dense = np.zeros((self.M, self.K // self.g, self.g))
        rows = np.repeat(np.arange(self.M), np.diff(self.row_start))
        dense[rows, self.col] = self.scale[:, None].astype(np.float64) * (unpack(self.codes) - self.zero[:, None].astype(np.float64))
        return dense.reshape(self.M, self.K)

    def on(self, xp):
        """The same with the arrays of `xp` (numpy or cupy)."""
        return replace(self, **{name: xp.asarray(getattr(self, name)) for name in ("row_start", "col", "codes", "scale", "zero")})


def compress(W, kept, g):
    """SparseGroups of W [M, K]: groups with kept [M, K / g] are quantized to four bits by minimum and maximum, the others dropped. Raises ValueError."""
    W, kept = np.asarray(W, dtype=np.float64), np.asarray(kept)
    if W.ndim != 2 or W.shape[1] % g or kept.shape != (len(W), W.shape[1] // g) or kept.dtype != bool:
        raise ValueError(f"kept: should be bool [M, K / g] for W {W.shape} and g={g}, is {kept.dtype} {kept.shape}")
    if not kept.any():
        raise ValueError("kept: no group is left")
    q = quantize(W.reshape(*kept.shape, g)[kept], g)
    return _stored(kept, W.shape[1], g, q.codes, q.scale.ravel(), q.zero.ravel())


def _stored(kept, K, g, codes, scale, zero):
    if K // g > 2**16:
        raise ValueError(f"g={g}: a row of {K} has more groups than 16 bits can name")
    start = np.concatenate(([0], kept.sum(1).cumsum())).astype(np.int32)
    return SparseGroups(start, np.nonzero(kept)[1].astype(np.uint16), codes, scale, zero, K, g)


# ------------------------------------------------------------------------------------------------ the product and its schedules
@dataclass(frozen=True)
class Product:
    """Y: [M, N] float32. Counted by the kernels, if asked to: groups of each worker [workers] for one row of X, bytes of groups loaded for all rows, parts of rows that were joined for one."""
    Y: np.ndarray
    load: np.ndarray | None = None
    bytes: int | None = None
    joined: int | None = None


def multiply(W, X, schedule="groups", workers=64, count=False):
    """Y = W X^T for few rows of X. W: SparseGroups; X: [N, K] float16; schedule: deal out "rows" or equal shares of "groups" to that many warps."""
    if not isinstance(W, SparseGroups):
        raise TypeError(f"W: should be SparseGroups, see compress(); was {type(W).__name__}")
    if getattr(X, "dtype", None) != np.float16:
        raise TypeError(f"X: should be an array of float16, was {getattr(X, 'dtype', type(X).__name__)}")
    if X.ndim != 2 or X.shape[1] != W.K or not len(X) or not X.flags.c_contiguous:
        raise ValueError(f"X: should be a C-contiguous matrix [N, {W.K}], has shape {X.shape} and strides {X.strides}")
    if not bool(np.isfinite(X).all()):
        raise ValueError("X: should be finite, has NaN or infinity")
    if schedule not in ("rows", "groups"):
        raise ValueError(f"schedule={schedule!r}: should be rows or groups")
    if not isinstance(workers, (int, np.integer)) or workers < 1:
        raise ValueError(f"workers={workers!r}: should be a positive number of warps")
    M, N, kernels = W.M, len(X), _kernels(count)
    new = lambda dtype, *shape: np.zeros_like(X, dtype=dtype, shape=shape)
    Y, load, counts = new(np.float32, M, N), new(np.uint32, workers), new(np.uint64, 2)
    grid, block = (-(-workers // 8), N), (32, 8)
    stored = W.row_start, W.col, W.codes, W.scale, W.zero, X, Y
    if schedule == "rows":
        launch(kernels["by_rows"], grid, block, (*stored, M, N, W.K, W.g, workers, load, counts))
    else:
        carry, carry_row = new(np.float32, workers, N), new(np.int32, workers)
        launch(kernels["by_groups"], grid, block, (*stored, carry, carry_row, M, N, W.K, W.g, workers, load, counts))
        launch(kernels["join"], (-(-workers // 128), N), 128, (carry, carry_row, Y, N, workers, counts))
    return Product(Y, load, *map(int, counts)) if count else Product(Y)


def makespan(groups, workers, schedule):
    """Groups of the busiest worker. groups: [M], those of each row; "rows": row m goes to worker m mod workers; "groups": equal shares."""
    if schedule == "groups":
        return int(-(-groups.sum() // workers))
    return int(np.bincount(np.arange(len(groups)) % workers, weights=groups).max())


# ------------------------------------------------------------------------------------------------ the two stages
class GroupLinear(nn.Module):
    """A linear layer x -> x W^T + bias with trainable quantized weights: W [M, K] in groups of g, `bits` each; mask [M, K] bool says which weights exist.

    weight [M, K], scale and zero [M K / g, 1] are its parameters; after `freeze` the codes stay what they are, and only scale and zero can learn."""

    def __init__(self, W, mask, g, bits=4, bias=None):
        super().__init__()
        self.bits, self.g, self.bias, self.codes = bits, g, bias, None
        grid = Uniform(bits=bits, symmetric=False, per="group", group=g).fit(W * mask)
        self.weight = nn.Parameter(W.detach().clone())
        self.scale, self.zero = nn.Parameter(grid.scale.clone()), nn.Parameter(grid.zero.clone())
        self.register_buffer("mask", mask.to(W.dtype))

    def _zero(self):
        return _rounded(self.zero).clamp(0, 2**self.bits - 1)

    def _codes(self):
        return (_rounded(self.weight.reshape(-1, self.g) / self.scale) + self._zero()).clamp(0, 2**self.bits - 1)

    def dequantized(self):
        """sigma (u - z) where a weight exists, else 0: [M, K], with gradients by straight-through rounding."""
        codes = self._codes() if self.codes is None else self.codes
        return (self.scale * (codes - self._zero())).reshape(self.weight.shape) * self.mask

    def forward(self, x):
        return F.linear(x, self.dequantized(), self.bias)

    @torch.no_grad()
    def freeze(self):
        """Fix the codes, for scales as they will be stored."""
        self.scale.copy_(self.scale.half())
        self.codes = self._codes()
        self.weight.requires_grad_(False)

    def export(self):
        """SparseGroups with the frozen codes. Raises ValueError where the format can't hold the layer."""
        M, K = self.weight.shape
        exists = self.mask.reshape(M, -1, self.g).bool()
        if self.codes is None or self.bits != 4 or (exists != exists[..., :1]).any():
            raise ValueError("export: needs frozen codes of four bits, and groups that are kept or dropped as a whole")
        kept = exists[..., 0].numpy()
        parts = (part.detach()[kept.ravel()].numpy() for part in (self.codes, self.scale, self._zero()))
        codes, scale, zero = (part.astype(dtype) for part, dtype in zip(parts, (np.uint8, np.float16, np.uint8)))
        return _stored(kept, K, self.g, pack(codes), scale.ravel(), zero.ravel())


def convert(model, masks, g, bits=4):
    """A copy of `model` in which each nn.Linear named in masks, {name: bool [M, K]}, is a GroupLinear with its weights."""
    model = copy.deepcopy(model)
    for name, mask in masks.items():
        layer, (parent, _, child) = model.get_submodule(name), name.rpartition(".")
        if not isinstance(layer, nn.Linear) or mask.shape != layer.weight.shape:
            raise ValueError(f"masks: {name} should name a linear layer with a mask of its shape, is {type(layer).__name__} with {tuple(mask.shape)}")
        setattr(model.get_submodule(parent), child, GroupLinear(layer.weight.detach(), torch.as_tensor(mask), g, bits, layer.bias))
    return model


def bqpo(forward, block, X, Y, steps, generator, batch=8, lr=1e-3, lr_grid=1e-4):
    """Stage 1, block-wise quantization-pruning optimization: Adam on mean |forward(X) - Y|^2 over weights, scales and zeros of the GroupLinear layers in `block`.

    X, Y: [n, ...], inputs of a block and the full-precision block's outputs; batch: examples a step, drawn from `generator`. The masks do not change. Returns the losses."""
    layers = [layer for layer in block.modules() if isinstance(layer, GroupLinear)]
    return _descend([{"params": [layer.weight for layer in layers], "lr": lr}, {"params": _grids(layers), "lr": lr_grid}], steps,
                    lambda pick: F.mse_loss(forward(X[pick]), Y[pick]), lambda: torch.randint(len(X), (batch,), generator=generator))


def e2e_oqp(model, loss, draw, steps, lr=1e-3):
    """Stage 2, end-to-end optimized quantization-pruning: codes and masks frozen, Adam on loss(batch), batch = draw(), over all scales and zeros. Returns the losses."""
    layers = [layer for layer in model.modules() if isinstance(layer, GroupLinear)]
    for layer in layers:
        layer.freeze()
    return _descend([{"params": _grids(layers), "lr": lr}], steps, loss, draw)


def _grids(layers):
    return [p for layer in layers for p in (layer.scale, layer.zero)]


def _descend(groups, steps, loss, draw):
    optimizer, losses = torch.optim.Adam(groups), []
    for _ in range(steps):
        value = loss(draw())
        if not torch.isfinite(value):
            raise ValueError(f"the loss became {value.item()} after {len(losses)} steps: a smaller lr may help")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def _rounded(x):
    """round(x), with the gradient of x."""
    return x + (x.round() - x).detach()


@cache
def _kernels(count):
    module = Module.from_file(Path(__file__).with_suffix(".cu"))
    return Module('#define COUNT_WORK\n#line 1 "gqsa.cu"\n' + module.source, module.filename) if count else module
