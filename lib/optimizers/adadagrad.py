"""AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods (2024), arXiv:2402.11215.

Batches that grow when their gradient is too noisy for its size. After each step the gradients of the batch's examples are
tested against their mean; a failed test names the size that would have passed. The steps are AdaGrad's (`torch.optim.Adagrad`)
or those of AdaGrad-Norm, which divides by one number for all parameters.

    symbol        name                 shape
    grads         grads                [b, d]    gradients of the b >= 2 examples, all parameters side by side
    g             grads.mean(0)        [d]
    sigma^2       Spread.variance      float     sum over coordinates of the sample variance (b - 1 below)
    V_ip          Spread.inner         float     sample variance of <grad_i, g>
    V_o           Spread.orthogonal    float     summed sample variance of what is orthogonal to g
    eta           eta                  float > 0      norm test
    theta, nu     theta, nu            float > 0      inner-product test, and its augmentation
    b_k, b_max    size, largest        int
    v_k           group["v"]           float     AdaGrad-Norm's one accumulator; v_0 > 0

Deviations from the paper: none known in the tests. The accumulator is one float kept in every parameter group (so that
`state_dict` has it); the released optimizer keeps one for each output row, and one for each entry of a bias. A mean gradient
of exactly zero with spread asks for an infinite batch, which `next_size` caps.

Cost: b gradients instead of their mean: b * d numbers, and about three passes over them a test. AdaGrad-Norm keeps no buffer.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lib.optimizers.base import Batch, Optimizer, positive


# -- the gradients of single examples ----------------------------------------------------------------------------------

def example_gradients(model: torch.nn.Module, loss: Callable, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[b, d]: for each example, the gradient of loss(model(x_i), y_i), parameters side by side. No batch norm: it mixes examples."""
    if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise ValueError("model must not hold batch norm (the gradient of one example is then undefined), got one: use GroupNorm")
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def one(weights, x_i, y_i):
        return loss(torch.func.functional_call(model, weights, (x_i[None],)), y_i[None])

    grads = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(weights, x, y)
    return torch.cat([g.flatten(1) for g in grads.values()], dim=1)


@dataclass(frozen=True)
class Spread:
    """How far the gradients of a batch lie from their mean."""

    norm2: float  # |g|^2
    variance: float  # sigma^2 = inner / norm2 + orthogonal
    inner: float
    orthogonal: float
    coordinates: torch.Tensor  # [d]: variance over squared mean, coordinate by coordinate

    @classmethod
    def of(cls, grads: torch.Tensor) -> "Spread":
        """Raises `ValueError` unless grads is a finite [b, d] with b >= 2: one example has no variance."""
        if grads.dim() != 2 or len(grads) < 2:
            raise ValueError(f"grads must have shape [b, d] with b >= 2, got {tuple(grads.shape)}")
        if not bool(torch.isfinite(grads).all()):
            raise ValueError("grads must be finite, got NaN or infinity")
        mean, variance = grads.mean(0), grads.var(0)  # [d] each
        norm2, total = mean.square().sum().item(), variance.sum().item()
        inner = (grads @ mean).var().item()
        along = inner / norm2 if norm2 > 0.0 else 0.0  # o_i = grad_i - <grad_i, g> g / |g|^2 varies by the rest
        coordinates = torch.where(variance > 0.0, variance / mean.square(), 0.0)
        return cls(norm2, total, inner, max(total - along, 0.0), coordinates)


# -- the tests: the batch size that would pass -------------------------------------------------------------------------

def _ratio(spread: float, size: float) -> float:
    return 0.0 if spread == 0.0 else math.inf if size == 0.0 else spread / size


def norm_test(s: Spread, eta: float) -> float:
    """The b at which sigma^2 / b = eta^2 |g|^2."""
    positive("eta", eta)
    return _ratio(s.variance, eta**2 * s.norm2)


def inner_product_test(s: Spread, theta: float, nu: float | None = None) -> float:
    """The b at which V_ip / b = theta^2 |g|^4 and, with nu (augmented), also V_o / b <= nu^2 |g|^2."""
    positive("theta", theta)
    wanted = _ratio(s.inner, theta**2 * s.norm2**2)
    if nu is None:
        return wanted
    positive("nu", nu)
    return max(wanted, _ratio(s.orthogonal, nu**2 * s.norm2))


def coordinate_test(s: Spread, eta: float) -> float:
    """The b at which every coordinate passes a norm test of its own (for AdaGrad; a coordinate near zero asks for everything)."""
    positive("eta", eta)
    return s.coordinates.max().item() / eta**2


def next_size(size: int, wanted: float, largest: int) -> int:
    """The next batch: never smaller than this one, rounded up, at most `largest`."""
    if not 2 <= size <= largest:
        raise ValueError(f"size must lie between 2 and largest = {largest!r}, got {size!r}")
    if not wanted >= 0.0:
        raise ValueError(f"wanted must be >= 0, got {wanted!r}")
    return largest if wanted >= largest else max(size, math.ceil(wanted))


# -- the step ----------------------------------------------------------------------------------------------------------

class AdaGradNorm(Optimizer):
    """AdaGrad with one accumulator for all parameters of all groups; `v` is its value, v_0 at first.

    Raises `ValueError` or `TypeError` naming a bad option; also for a `v` that a NaN gradient has spoilt.
    """

    checks = {"v": positive}

    def __init__(self, params, lr=1.0, v=1e-2, *, maximize=False):
        super().__init__(params, lr=lr, v=v, maximize=maximize)

    def buffers(self, group):
        return ()

    def _batches(self, group):
        if group is self.param_groups[0]:  # all gradients have been checked, no tensor has moved
            grads = [p.grad for other in self.param_groups for p in other["params"] if p.grad is not None]
            v = group["v"] + sum(torch.linalg.vector_norm(g, dtype=torch.float64).item() ** 2 for g in grads)
            for other in self.param_groups:
                other["v"] = v  # v_k = v_{k-1} + |g|^2
        yield from super()._batches(group)

    def update(self, batch: Batch, group: dict) -> None:
        torch._foreach_add_(batch.params, batch.grads, alpha=-group["lr"] / math.sqrt(self.param_groups[0]["v"]))
