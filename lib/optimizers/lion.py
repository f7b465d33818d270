"""Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts (2023), arXiv:2310.05898.

Lion steps by the sign of a mixture of momentum and gradient, and decays the weights. The paper finds what this
minimizes: the loss inside the box |theta|_inf <= 1/lambda; and puts any convex K in the place of the l1 norm, whose
gradient is the sign. Implemented: the optimizer for five functions K, with the explicit decay of Lion and the implicit one
of the paper; the functions themselves with their conjugates K*; the paper's Lyapunov function and its flow.

    symbol     name          shape
    x          params        any
    m_t        m             as params     moving average of gradients (the paper's m is its negative)
    eps        lr            float
    lambda     weight_decay  float
    beta_1,2   betas         two floats in [0, 1): weight of m in the step; weight of m in the average
    K, K*      kappa         a name of `KAPPAS`: value, gradient and conjugate
    (alpha, gamma, epsilon)  of the flow: alpha = gamma for equal weights, epsilon * gamma <= 1

Deviations from the paper: m averages +gradient, as Lion's code does; K must be even, so that the step is -grad K(c).
`group` takes the norm of a whole tensor, one group a tensor.

Cost: one buffer (Adam two) and five element-wise passes a step.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lib.optimizers.base import Batch, Optimizer, Tensors, average_, decay_, flag

RADIUS = 1.0  # where `huber` turns linear, and below which `truncated` is zero


@dataclass(frozen=True)
class Kappa:
    """A convex even function of a tensor: its value, its gradient (in place, on a list) and its conjugate K*."""

    value: Callable[[torch.Tensor], torch.Tensor]
    gradient_: Callable[[Tensors], None]
    conjugate: Callable[[torch.Tensor], torch.Tensor]


def _outside(distance: torch.Tensor) -> torch.Tensor:
    """0 where the distance to a set is 0, infinity elsewhere; a rounding of 1e-12 counts as inside."""
    return torch.where(distance > 1e-12, math.inf, 0.0).sum()


def _unit_(xs: Tensors) -> None:
    for x, norm in zip(xs, torch._foreach_norm(xs), strict=True):
        x.div_(torch.where(norm > 0, norm, 1.0))


def _truncated_(xs: Tensors) -> None:
    for x in xs:
        x.copy_(torch.where(x.abs() > RADIUS, x.sign(), 0.0))


KAPPAS = {
    "l1": Kappa(lambda x: x.abs().sum(), torch._foreach_sign_, lambda x: _outside((x.abs() - 1).clamp(min=0))),
    "square": Kappa(lambda x: x.square().sum() / 2, lambda xs: None, lambda x: x.square().sum() / 2),
    "group": Kappa(lambda x: x.norm(), _unit_, lambda x: _outside((x.norm() - 1).clamp(min=0))),
    "huber": Kappa(lambda x: torch.where(x.abs() < RADIUS, x.square() / (2 * RADIUS), x.abs() - RADIUS / 2).sum(),
                   lambda xs: [x.div_(RADIUS).clamp_(-1, 1) for x in xs],
                   lambda x: RADIUS * x.square().sum() / 2 + _outside((x.abs() - 1).clamp(min=0))),
    "truncated": Kappa(lambda x: (x.abs() - RADIUS).clamp(min=0).sum(), _truncated_,
                       lambda x: RADIUS * x.abs().sum() + _outside((x.abs() - 1).clamp(min=0))),
}


def _kappa(name, value):
    if value not in KAPPAS:
        raise ValueError(f"{name} must be one of {', '.join(KAPPAS)}, got {value!r}")


class Lion(Optimizer):
    """Lion-K as a drop-in `torch.optim.Optimizer`, Lion by default; raises `ValueError` or `TypeError` naming a bad option.

    With `implicit` the decay acts on the new parameters: (x - lr * step) / (1 + lr * weight_decay).
    """

    checks = {"kappa": _kappa, "implicit": flag}

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, kappa="l1", implicit=False, maximize=False):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, kappa=kappa, implicit=implicit, maximize=maximize)

    def buffers(self, group):
        return ("m",)

    def update(self, batch: Batch, group: dict) -> None:
        lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
        params, grads, m = batch.params, batch.grads, batch.state["m"]
        step = torch._foreach_lerp(m, grads, 1.0 - beta1)  # beta_1 m_{t-1} + (1 - beta_1) g_t, with the old m
        KAPPAS[group["kappa"]].gradient_(step)
        if not group["implicit"]:
            decay_(params, lr, decay)
        torch._foreach_add_(params, step, alpha=-lr)
        if group["implicit"]:
            torch._foreach_div_(params, 1.0 + lr * decay)
        average_(m, grads, beta2)  # only now


def lyapunov(loss, x, m, kappa: str, *, alpha: float, gamma: float, epsilon: float, weight_decay: float) -> torch.Tensor:
    """H(x, m) of the flow, for m in the sign convention of this module; infinite outside the domain of K*."""
    K = KAPPAS[kappa]
    inside, lagging = K.conjugate(weight_decay * x), K.value(m) + weight_decay * (m * x).sum()  # -lambda <-m, x>
    share = (1 - epsilon * gamma) / (1 + epsilon * weight_decay)
    return alpha * loss + gamma / weight_decay * inside + share * (inside + lagging)


def flow(gradient: Callable, x, m, kappa: str, *, alpha: float, gamma: float, epsilon: float, weight_decay: float, dt: float):
    """One Euler step of the flow: x' = -grad K(m + epsilon m') - lambda x, m' = alpha grad f - gamma m."""
    change = alpha * gradient(x) - gamma * m
    step = m + epsilon * change
    KAPPAS[kappa].gradient_([step])
    return x - dt * (step + weight_decay * x), m + dt * change
