"""Toward Understanding Why Adam Converges Faster Than SGD for Transformers (2023), arXiv:2306.00204.

How far a step may go is decided by the curvature along it. The paper measures this, the directional sharpness, finds it
far higher for gradients than for Adam's steps, blames few coordinates, and cuts those to a threshold. Implemented: the local
quadratic model along any direction, by Hessian-vector products; the cut, as SGD (with momentum) and as Adam.

    symbol       name          shape
    v            directions    tensors as params
    v'Hv / v'v   sharpness     float        directional sharpness
    u            `direction`   as params    what the method would step along: gradient, momentum, or Adam's m / sqrt(v)
    k            fraction      float in [0, 1]   share of the coordinates that are cut
    c            threshold     float        the (1 - k) quantile of |u|, one number for the whole model
    eta          lr            float

*Reconstructed*: the paper's text that fixes the threshold was not at hand. Here c is the quantile over all entries that have
a gradient, in all groups, between order statistics by linear interpolation; entries are cut to +-c, never dropped; nothing is
rescaled afterwards unless `normalise` divides the cut vector by its norm. Decay is decoupled and not cut.

Deviations from the paper: none known beyond that; `skip_zeros` (the quantile of the entries that are not zero) is ours.

Cost: the buffers of the method underneath, one list of directions during a step (whatever the batches), two selections
in linear time over all entries, and two numbers read back from the device. A Hessian-vector product is one more backward pass.
"""
import copy
import math
from dataclasses import dataclass

import torch

from lib.optimizers.base import Batch, Optimizer, Tensors, average_, bias_correction, decay_, flag, _number


# -- the local model ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Local:
    """f(x + eta v) = f(x) + eta slope + eta^2 curvature / 2 + ..., and what follows from it for the step eta v."""

    slope: float      # grad f' v
    curvature: float  # v' H v
    squared: float    # |v|^2

    @property
    def sharpness(self) -> float:
        """Directional sharpness: curvature along v of length one. Negative where f bends down."""
        return self.curvature / self.squared

    @property
    def best_rate(self) -> float:
        """The eta at the bottom of the parabola; infinite (downhill) where it has none."""
        return -self.slope / self.curvature if self.curvature > 0 else math.copysign(math.inf, -self.slope)

    @property
    def best_decrease(self) -> float:
        """How far below f(x) that bottom is; infinite where it has none."""
        return self.slope**2 / (2 * self.curvature) if self.curvature > 0 else math.inf


def _dot(a: Tensors, b: Tensors) -> torch.Tensor:
    return sum(((x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)), start=torch.zeros((), dtype=torch.float64))


def along(loss: torch.Tensor, params: Tensors, directions: list[Tensors]) -> list[Local]:
    """The local model of a scalar loss (with its graph) along each direction, a list of tensors shaped as `params`.

    One Hessian-vector product a direction; the loss must be twice differentiable by autograd (attention: the math kernel).
    """
    params = list(params)
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(f"loss must be one number with a graph, got shape {tuple(loss.shape)} and requires_grad={loss.requires_grad}")
    for i, v in enumerate(directions):
        if [x.shape for x in v] != [p.shape for p in params]:
            raise ValueError(f"directions[{i}] must have the shapes of params, got {[tuple(x.shape) for x in v]}")
        if not 0.0 < _dot(v, v).item() < math.inf:
            raise ValueError(f"directions[{i}] must be finite and not zero, got a squared norm of {_dot(v, v).item()}")
    every = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    grads, result = torch.autograd.grad(loss, params, create_graph=True, **every), []
    for v in directions:
        v = [x.detach() for x in v]
        slope = _dot(grads, v)  # a scalar whose gradient is H v
        Hv = torch.autograd.grad(slope, params, **every) if slope.requires_grad else [torch.zeros_like(p) for p in params]
        result.append(Local(slope.item(), _dot(Hv, v).item(), _dot(v, v).item()))
    return result


def direction_of(optimizer: torch.optim.Optimizer) -> Tensors:
    """What the optimizer would add to the parameters for lr = 1, group by group; parameters and state stay as they are."""
    twin = copy.deepcopy(optimizer)
    groups = zip(twin.param_groups, optimizer.param_groups, strict=True)
    pairs = [pair for a, b in groups for pair in zip(a["params"], b["params"], strict=True)]
    for p, q in pairs:
        p.data, p.grad = torch.zeros_like(q), q.grad  # from zero, so that no digit is lost
    for group in twin.param_groups:
        group["lr"] = 1.0
    twin.step()
    return [p.detach() for p, _ in pairs]


# -- the cut -----------------------------------------------------------------------------------------------------------

def share(name: str, value) -> None:
    """`ValueError` unless value is a number in [0, 1]."""
    if not 0.0 <= _number(name, value) <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")


def threshold(directions: Tensors, fraction: float, skip_zeros: bool = False) -> float:
    """c: the (1 - fraction) quantile of the absolute entries of all tensors together; infinite for nothing to cut."""
    share("fraction", fraction)
    if fraction == 0.0 or not directions:
        return math.inf
    u = torch.cat([x.detach().abs().flatten().to(directions[0].device) for x in directions])
    u = u[u != 0] if skip_zeros else u
    if u.numel() == 0:
        return math.inf
    place = (1.0 - fraction) * (u.numel() - 1)  # counted from 0, between order statistics
    low = math.floor(place)
    below = u.kthvalue(low + 1).values.item()
    if place == low:
        return below
    return below + (place - low) * (u.kthvalue(low + 2).values.item() - below)


def clip(directions: Tensors, c: float) -> Tensors:
    """sign(u) min(|u|, c) for every entry, as new tensors (the same ones for c = inf)."""
    if c == math.inf:
        return directions
    cut = torch._foreach_clamp_max(directions, c)
    torch._foreach_clamp_min_(cut, -c)
    return cut


# -- the optimizers ----------------------------------------------------------------------------------------------------

class SGDClip(Optimizer):
    """SGD with coordinate-wise clipping; raises `ValueError` or `TypeError` naming a bad option.

    Without `fraction` it is `torch.optim.SGD`. Momentum comes before the cut. Each group may have its own fraction: it
    reads another quantile of the same entries, those of the whole model.
    """

    checks = {"fraction": share, "skip_zeros": flag, "normalise": flag}

    def __init__(self, params, lr=1e-2, momentum=0.0, weight_decay=0.0, *, fraction=0.1, skip_zeros=False, normalise=False,
                 maximize=False):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, fraction=fraction, skip_zeros=skip_zeros,
                         normalise=normalise, maximize=maximize)

    def buffers(self, group):
        return ("m",) if group["momentum"] != 0.0 else ()

    def direction(self, batch: Batch, group: dict) -> Tensors:
        """u: the gradient, or m <- momentum * m + gradient as in `torch.optim.SGD`."""
        if group["momentum"] == 0.0:
            return batch.grads
        torch._foreach_mul_(batch.state["m"], group["momentum"])
        torch._foreach_add_(batch.state["m"], batch.grads)
        return batch.state["m"]

    def update(self, batch: Batch, group: dict) -> None:
        self._waiting.append((batch.params, self.direction(batch, group), group))  # nothing moves before c is known

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns what `closure` returns, or None."""
        self._waiting = []
        loss = super().step(closure)
        moves, self._waiting = self._waiting, []
        entries = [u for _, us, _ in moves for u in us]
        rules = {(float(group["fraction"]), group["skip_zeros"]) for _, _, group in moves}
        c = {rule: threshold(entries, *rule) for rule in rules}
        cuts = [clip(us, c[float(group["fraction"]), group["skip_zeros"]]) for _, us, group in moves]
        length = None
        if any(group["normalise"] for _, _, group in moves):
            length = math.sqrt(sum(_dot(cut, cut).item() for cut in cuts))
        for (params, _, group), cut in zip(moves, cuts, strict=True):
            lr = group["lr"]
            decay_(params, lr, group["weight_decay"])
            torch._foreach_add_(params, cut, alpha=-lr / length if group["normalise"] and length else -lr)
        return loss


class AdamClip(SGDClip):
    """Adam (decoupled decay) whose direction is cut before the step; without `fraction` it is AdamW."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, fraction=0.1, skip_zeros=False,
                 normalise=False, maximize=False):
        Optimizer.__init__(self, params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fraction=fraction,
                           skip_zeros=skip_zeros, normalise=normalise, maximize=maximize)

    def buffers(self, group):
        return ("m", "v")

    def direction(self, batch: Batch, group: dict) -> Tensors:
        """u = m / (sqrt(v) + eps), both corrected for their start at zero."""
        (beta1, beta2), m, v = group["betas"], batch.state["m"], batch.state["v"]
        average_(m, batch.grads, beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, batch.grads, batch.grads, value=1.0 - beta2)
        u, size = torch._foreach_div(m, bias_correction(beta1, batch.step)), torch._foreach_sqrt(v)
        torch._foreach_div_(size, math.sqrt(bias_correction(beta2, batch.step)))
        torch._foreach_add_(size, float(group["eps"]))
        torch._foreach_div_(u, size)
        return u
