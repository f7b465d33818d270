"""A Survey of Quantization Methods for Efficient Neural Network Inference (2021, arXiv 2103.13630).

The survey's toolbox. The uniform quantizer, its granularities and its min-max, percentile and MSE ranges are in `uniform.py`, because
the whole book needs them. Here is the rest: calibration by KL divergence, the two non-uniform quantizers, dyadic rescaling, the
error measures, and the three ways to quantize a network (weights after training, inputs statically or dynamically, weights during training).

    symbol         name              shape
    r              r                 any, float      the real values
    q, S, Z        see uniform.py
    r^             rounded           as r            the values that the codes stand for
    X_i            codebook          [levels]        quantization levels of a non-uniform quantizer, ascending
    m / 2^n        m, n              int, int        a dyadic number

Deviations from the paper: the zero point carries the opposite sign, q = round(r/S) + Z, as in PyTorch. The straight-through gradient stops
where the code does not exist, so it still passes up to S/2 beyond the range (PyTorch's rule; the survey draws the edge at the range).
KL calibration follows the recipe common in practice (2048 bins, the clipped mass folded into the last kept bin); the survey only names it.
Cost: O(n) everywhere, but Lloyd-Max O(n log levels) an iteration and KL O(bins) a threshold.
"""

import copy
import math

import torch
from torch import nn
from torch.nn.utils import parametrize

from lib.number_formats.uniform import Grid, Uniform, check_real


# ------------------------------------------------------------------------------------------------ how wrong is it

def sqnr_db(r, rounded):
    """Signal to quantization noise in decibels: 10 log10(sum (r - mean)^2 / sum (r - r^)^2); inf for an exact copy."""
    noise = (r - rounded).double().square().sum()
    return (10 * torch.log10((r - r.mean()).double().square().sum() / noise)).item()


def error_split(r, grid):
    """Mean squared error of r on `grid`, as (rounding, clipping): what falls on the grid's span, and what falls beyond it."""
    lowest, highest = ((c - grid.zero) * grid.scale for c in grid.spec.codes)
    x = grid._rows(r)
    inside = (x >= lowest) & (x <= highest)
    squared = (x - grid._rows(grid(r))).double().square()
    return (squared * inside).mean().item(), (squared * ~inside).mean().item()


# ------------------------------------------------------------------------------------------------ range by KL divergence

def kl_range(x, spec, bins=2048, step=16):
    """The threshold t on |x| whose clipped and quantized histogram is nearest to the histogram in KL divergence; x is [1, n].

    Candidates are every `step` bins. Pass it as `Uniform(..., clip=kl_range)`; it needs a sample of thousands, so one tensor at a time.
    """
    if len(x) != 1:
        raise ValueError(f"kl_range calibrates one tensor at a time, but spec.per={spec.per!r} gives {len(x)} rows")
    top = x.abs().max().item()
    if top == 0:
        return x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    counts = torch.histc(x.abs().double(), bins, 0, top)           # [bins]
    levels = 2 ** (spec.bits - 1) if spec.symmetric else 2**spec.bits
    best, kept = math.inf, bins
    for edge in range(max(step, min(levels, bins)), bins + 1, step):
        part = counts[:edge]
        p = part.clone()
        p[-1] += counts[edge:].sum()                               # clipped mass sits at the threshold
        cell = torch.arange(edge) * levels // edge                 # which level each bin falls to
        filled = (part > 0).double()
        mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, cell, part)
        width = torch.zeros(levels, dtype=torch.float64).index_add_(0, cell, filled)
        q = filled * (mass / width.clamp(min=1))[cell]             # each level's mass, spread over its filled bins
        p, q = p / p.sum(), (q + 1e-9 * part.sum()) / (q + 1e-9 * part.sum()).sum()
        divergence = torch.special.xlogy(p, p / q).sum().item()
        if divergence < best:
            best, kept = divergence, edge
    t = top * kept / bins
    return x.amin(1, keepdim=True).clamp(min=-t), x.amax(1, keepdim=True).clamp(max=t)


# ------------------------------------------------------------------------------------------------ non-uniform levels

def nearest(r, codebook):
    """Index of the nearest level for each value; a value half-way between two goes to the lower."""
    return torch.bucketize(r, (codebook[1:] + codebook[:-1]) / 2)


def lloyd_max(r, codebook, iterations=100):
    """Levels with least squared error, by turns: values to their nearest level, levels to the mean of their values.

    Starts from `codebook`, stops when no value changes its level, never makes the error larger. An empty level stays where it is.
    """
    check_real(r)
    x, levels = r.detach().flatten().double(), codebook.double().sort().values
    at = None
    for _ in range(iterations):
        new = nearest(x, levels)
        if at is not None and torch.equal(new, at):
            break
        at = new
        total = torch.zeros_like(levels).index_add_(0, at, x)
        count = torch.bincount(at, minlength=len(levels))
        levels = torch.where(count > 0, total / count.clamp(min=1), levels).sort().values
    return levels.to(r.dtype)


def powers_of_two(r, bits):
    """Logarithmic levels: 0 and +-2^e for the 2^(bits-1) - 1 exponents e up to round(log2 max|r|); ascending."""
    check_real(r)
    if bits < 2:
        raise ValueError(f"bits must be at least 2 (a sign and one exponent), was {bits}")
    top = r.abs().max().clamp(min=torch.finfo(r.dtype).tiny).log2().round()
    e = top - torch.arange(2 ** (bits - 1) - 1, dtype=r.dtype)
    return torch.cat((-(2**e), torch.zeros(1, dtype=r.dtype), (2**e).flip(0)))


# ------------------------------------------------------------------------------------------------ integer-only inference

def dyadic(x, bits=15):
    """The number m / 2^n nearest to x > 0 with 2^(bits-1) <= m <= 2^bits: a multiplication and a shift in place of a float."""
    if not (math.isfinite(x) and x > 0):
        raise ValueError(f"x must be a positive finite number, was {x}")
    n = bits - math.frexp(x)[1]
    return round(math.ldexp(x, n)), n


# ------------------------------------------------------------------------------------------------ whole networks

def _layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


@torch.no_grad()
def quantize_weights(model, spec):
    """Post-training quantization: a copy of `model` whose linear and convolution weights lie on the grids of `spec`."""
    model = copy.deepcopy(model)
    for layer in _layers(model).values():
        layer.weight.copy_(spec(layer.weight))
    return model


def quantize_inputs(model, how):
    """A copy of `model` that also quantizes what enters its layers.

    `how`: a Uniform, fitted to each batch as it comes (dynamic), or {layer name: Grid}, fitted beforehand (static).
    """
    model = copy.deepcopy(model)
    layers = _layers(model)
    if not isinstance(how, Uniform) and set(how) - set(layers):
        raise ValueError(f"how: no linear or convolution layer called {', '.join(sorted(set(how) - set(layers)))}")
    for name, layer in layers.items():
        quantizer = how if isinstance(how, Uniform) else how.get(name)
        if quantizer is not None:
            layer.register_forward_pre_hook(lambda _, args, quantizer=quantizer: (quantizer(args[0]),))
    return model


class OnGrid(nn.Module):
    """Parametrization of a weight: the layer sees it on the grid, the optimizer moves the real-valued shadow behind it."""

    def __init__(self, spec):
        super().__init__()
        self.spec = spec

    def forward(self, weight):
        return self.spec(weight)                                   # range fitted anew at each step; straight-through gradient


def train_on_grid(model, spec):
    """Quantization-aware training: a copy of `model`, to be trained as usual, whose weights are quantized at every forward pass."""
    model = copy.deepcopy(model)
    for layer in _layers(model).values():
        parametrize.register_parametrization(layer, "weight", OnGrid(spec))
    return model
