"""Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models (2022), arXiv:2208.06677.

Nesterov's momentum looks at the gradient ahead of the parameters. Adan looks there without going there: it extrapolates
the gradient by its last change, g_t + b2 (g_t - g_{t-1}), and feeds Adam with that. Implemented: the optimizer, and the
two momentum methods without adaptive step (`nesterov`, `nesterov_by_differences`) whose equivalence justifies it.

    symbol      name          shape
    theta       params        any
    g_t         grads         as params
    m_t         m             as params    moving average of g
    v_t         v             as params    moving average of g_t - g_{t-1}
    n_t         n             as params    moving average of (g_t + b2 (g_t - g_{t-1}))^2
    g_{t-1}     previous      as params    g_1 in the first step, so that the first difference is 0
    eta         lr            float
    b_i         betas         three floats in [0, 1): the weight of the old average; the paper's beta_i is 1 - b_i
    lambda      weight_decay  float

Deviations from the paper: averages start at 0 and are bias-corrected, and eps stands beside the root (the authors' code;
the paper's box starts m at g_1 and n at g_1^2 and corrects nothing). Restart and clipping are not options: forgetting
`optimizer.state` is the restart, `torch.nn.utils.clip_grad_norm_` before `step` the clipping (g_{t-1} is then the
clipped one, as it must be).

Cost: four buffers (Adam two), one gradient and about eleven element-wise passes a step.
"""
import math
from collections.abc import Callable

import torch

from lib.optimizers.base import Batch, Optimizer, average_, bias_correction, decay_, flag, fractions


def nesterov(gradient: Callable, start, lr: float, momentum: float, steps: int) -> list:
    """The points theta_k - lr a m at which Nesterov's method asks for its gradients; `gradient` is called `steps` times."""
    theta, m, asked = start, 0.0 * start, []
    for _ in range(steps):
        asked.append(theta - lr * momentum * m)
        m = momentum * m + gradient(asked[-1])
        theta = theta - lr * m
    return asked


def nesterov_by_differences(gradient: Callable, start, lr: float, momentum: float, steps: int, first=None) -> list:
    """The iterates of the rewritten method: gradients at the iterates only. `first` is g_0 (zero makes it Nesterov's)."""
    theta, m, previous, asked = start, 0.0 * start, 0.0 * start if first is None else first, []
    for _ in range(steps):
        asked.append(theta)
        g = gradient(theta)
        m = momentum * m + g + momentum * (g - previous)
        theta, previous = theta - lr * m, g
    return asked


class Adan(Optimizer):
    """Adan as a drop-in `torch.optim.Optimizer`; raises `ValueError` or `TypeError` naming a bad option.

    With `proximal` the decay divides by 1 + lr * weight_decay after the step; without, it multiplies before (AdamW).
    """

    checks = {"betas": fractions(3), "proximal": flag}

    def __init__(self, params, lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0, *, proximal=True, maximize=False):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, proximal=proximal, maximize=maximize)

    def buffers(self, group):
        return "m", "v", "n", "previous"

    def start(self, name, param, grad, group):
        if name != "previous":
            return super().start(name, param, grad, group)
        return -grad if group["maximize"] else grad.clone()

    def update(self, batch: Batch, group: dict) -> None:
        lr, decay, (b1, b2, b3) = group["lr"], group["weight_decay"], group["betas"]
        params, grads, (m, v, n, previous) = batch.params, batch.grads, (batch.state[k] for k in self.buffers(group))

        change = torch._foreach_sub(grads, previous)  # g_t - g_{t-1}
        torch._foreach_copy_(previous, grads)
        average_(m, grads, b1)
        average_(v, change, b2)
        ahead = torch._foreach_add(grads, change, alpha=b2)  # the gradient seen ahead
        torch._foreach_mul_(n, b3)
        torch._foreach_addcmul_(n, ahead, ahead, 1.0 - b3)

        if not group["proximal"]:
            decay_(params, lr, decay)
        c1, c2, root = bias_correction(b1, batch.step), bias_correction(b2, batch.step), math.sqrt(bias_correction(b3, batch.step))
        scale = torch._foreach_sqrt(n)
        torch._foreach_add_(scale, group["eps"] * root)  # m / (sqrt(n) / root + eps) = root m / (sqrt(n) + root eps)
        torch._foreach_addcdiv_(params, m, scale, -lr * root / c1)
        torch._foreach_addcdiv_(params, v, scale, -lr * root * b2 / c2)
        if group["proximal"] and decay != 0.0:
            torch._foreach_div_(params, 1.0 + lr * decay)
