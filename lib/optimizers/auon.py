"""AuON: A Linear-time Alternative to Semi-Orthogonal Momentum Updates (2025), arXiv:2509.24320.

The Nesterov momentum of a weight matrix is divided by one number, the root mean square of the hyperbolic cosine of its
normalized entries. Implemented: AuON as in the author's repository and as in the draft kept there, Hybrid-AuON (the same
number after Newton-Schulz steps), and the baseline, Muon (Newton-Schulz alone).

    symbol     name            shape
    W          params          any; Muon and the hybrid read it as [first axis, all others]
    g_t        grads           as params
    m_t        m               as params    moving average of g
    g^         mixed           as params    (1 - mu) g_t + mu m_t
    u          unit            as params    g^ / (|g^|_F + 1e-7)
    R          brake           one number   sqrt(mean cosh^2(gamma u)) = sqrt(1 + mean sinh^2(gamma u))
    eta        lr              float
    mu         momentum        float in [0, 1)
    gamma      gamma           float >= 0; 0 makes R = 1
    lambda     weight_decay    float

Deviations from the paper: there are two rules under one name, and `form` chooses: "repository" divides the momentum
itself (the current code, gamma 1.5), "draft" divides its unit matrix (gamma 1 there). The draft prints the hybrid's number
once without its root; the root is taken here. The formula page's factor sqrt(max(1, m / n)) is the option `aspect`.

Cost: one buffer; AuON about ten passes, O(m n); Muon and the hybrid `ns_steps` times three matrix products,
O(min(m, n) m n).
"""
import math

import torch

from lib.optimizers.base import Batch, Optimizer, Tensors, average_, count, decay_, flag, nonnegative
from lib.optimizers.matrices import as_matrix, newton_schulz, on_matrices

TINY, TINIER = 1e-7, 1e-8  # the two constants of the author's code: beside the norm, beside R


def known_form(name: str, value) -> None:
    """`ValueError` unless value is "repository" or "draft"."""
    if value not in ("repository", "draft"):
        raise ValueError(f"{name} must be 'repository' or 'draft', got {value!r}")


def units(tensors: Tensors) -> Tensors:
    """u = X / (|X|_F + 1e-7) for each tensor, as new tensors in at least float32."""
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
    norms = torch._foreach_add(torch._foreach_norm(wide), TINY)
    return torch._foreach_div(wide, norms)


def brake(unit: Tensors, gamma: float) -> Tensors:
    """R for each tensor. cosh^2 = 1 + sinh^2: the excess over 1 keeps its digits, and gamma = 0 gives 1 exactly."""
    excess = torch._foreach_sinh(torch._foreach_mul(unit, gamma))
    return [torch.sqrt(1.0 + x.square().sum() / max(x.numel(), 1)) for x in excess]


def orthogonalized(tensors: Tensors, steps: int) -> Tensors:
    """Newton-Schulz steps on each tensor as a matrix, as new tensors in at least float32."""
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
    return on_matrices(lambda X: newton_schulz(X, steps, eps=TINY), wide)


def aspects(tensors: Tensors) -> list[float]:
    """sqrt(max(1, m / n)) for each tensor as a matrix."""
    shapes = [as_matrix(x).shape if x.numel() else (1, 1) for x in tensors]
    return [math.sqrt(max(1.0, m / n)) for m, n in shapes]


class _Nesterov(Optimizer):
    """Decoupled decay and Nesterov momentum; a subclass turns the mixed momentum into directions."""

    checks = {"gamma": nonnegative, "form": known_form, "ns_steps": count, "aspect": flag}

    def buffers(self, group):
        return ("m",)

    def directions(self, mixed: Tensors, group: dict) -> Tensors:
        raise NotImplementedError

    def update(self, batch: Batch, group: dict) -> None:
        params, m, mu = batch.params, batch.state["m"], group["momentum"]
        decay_(params, group["lr"], group["weight_decay"])  # W <- (1 - eta lambda) W
        average_(m, batch.grads, mu)  # m_t
        mixed = torch._foreach_lerp(batch.grads, m, mu)  # g^
        moves = self.directions(mixed, group)
        if group["aspect"]:
            moves = torch._foreach_mul(moves, aspects(params))
        moves = [d.to(p.dtype) for d, p in zip(moves, params, strict=True)]
        torch._foreach_add_(params, moves, alpha=-group["lr"])


class AuON(_Nesterov):
    """Momentum over R, as a drop-in `torch.optim.Optimizer`; raises `ValueError` or `TypeError` naming a bad option."""

    def __init__(self, params, lr=0.24, momentum=0.95, weight_decay=0.0, gamma=1.5, *, form="repository", aspect=False,
                 maximize=False):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, gamma=gamma, form=form,
                         aspect=aspect, maximize=maximize)

    def directions(self, mixed, group):
        unit = units(mixed)
        R = torch._foreach_add(brake(unit, group["gamma"]), TINIER)
        return torch._foreach_div(mixed if group["form"] == "repository" else unit, R)


class HybridAuON(_Nesterov):
    """Newton-Schulz, then over the R of the result: five steps in the author's repository, one in the draft."""

    def __init__(self, params, lr=0.24, momentum=0.95, weight_decay=0.0, gamma=1.5, *, ns_steps=5, aspect=False, maximize=False):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, gamma=gamma, ns_steps=ns_steps,
                         aspect=aspect, maximize=maximize)

    def directions(self, mixed, group):
        X = orthogonalized(mixed, group["ns_steps"])
        return torch._foreach_div(X, torch._foreach_add(brake(units(X), group["gamma"]), TINIER))


class Muon(_Nesterov):
    """The baseline: momentum with its singular values near 1, times sqrt(max(1, m / n)), as `torch.optim.Muon`."""

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.0, *, ns_steps=5, aspect=True, maximize=False):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, ns_steps=ns_steps, aspect=aspect,
                         maximize=maximize)

    def directions(self, mixed, group):
        return orthogonalized(mixed, group["ns_steps"])
