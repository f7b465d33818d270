"""AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights (2020), arXiv:2006.08217.

A weight before a normalization layer matters by its direction alone. Its gradient is orthogonal to it, so each step makes
it longer, and a longer weight turns less; momentum multiplies that growth. SGDP and AdamP take the radial part out of
the update wherever the gradient's angle shows that a weight is scale-invariant.

    symbol    name          shape
    w         params        any; tensors of two or more axes are tested, a row per output channel
    g_t       grads         as params
    p_t       p             as params    momentum of SGDP, p = momentum * p + g
    m_t, v_t  m, v          as params    the averages of Adam
    delta     delta         float        the angle test: |cos(w, g)| < delta / sqrt(entries)
    r         wd_ratio      float        share of the weight decay that a projected weight gets

Deviations from the paper: none in the rule. Its momentum stays whole, as in the algorithm box: the authors' SGDP without
Nesterov projects its buffer in place. Decay of SGDP is divided by 1 - momentum, as in the authors' code.

Cost: AdamP two buffers, SGDP one (none without momentum). Each tensor of two or more axes is read three times more for
the test (and waits for its answer), and read once and written once more if it is projected.
"""
import math

import torch

from lib.optimizers.base import Batch, Optimizer, Tensors, average_, bias_correction, decay_, flag, nonnegative


def invariant_rows(weight: torch.Tensor, grad: torch.Tensor, delta: float, eps: float) -> int | None:
    """Rows of the first view whose gradients all pass the angle test: one for each channel, or 1 for the layer; None if neither."""
    if weight.dim() < 2 or weight.numel() == 0 or delta == 0.0:
        return None
    W, G = weight.reshape(len(weight), -1), grad.reshape(len(grad), -1)  # [channels, entries]
    dot, w_norm, g_norm = torch.linalg.vecdot(W, G), torch.linalg.vector_norm(W, dim=1), torch.linalg.vector_norm(G, dim=1)
    cosine = dot.abs() / (w_norm.clamp(min=eps) * g_norm.clamp(min=eps))
    if cosine.max() < delta / math.sqrt(W.shape[1]):
        return len(W)
    cosine = dot.sum().abs() / (w_norm.norm().clamp(min=eps) * g_norm.norm().clamp(min=eps))
    return 1 if cosine < delta / math.sqrt(W.numel()) else None


def tangent_(update: torch.Tensor, weight: torch.Tensor, rows: int, eps: float) -> None:
    """update <- update - (w^ . update) w^ in place, with a unit vector w^ for each row of the view."""
    W, U = weight.reshape(rows, -1), update.reshape(rows, -1)
    radial = torch.linalg.vecdot(W, U) / (torch.linalg.vector_norm(W, dim=1) + eps) ** 2  # [rows]
    update.addcmul_(weight, radial.reshape(-1, *[1] * (weight.dim() - 1)), value=-1.0)


def project_and_decay_(updates: Tensors, batch: Batch, group: dict, decay_scale: float = 1.0) -> None:
    """Project the updates of scale-invariant weights (in place), then decay all weights, those by `wd_ratio` of it."""
    free, projected = [], []
    for update, weight, grad in zip(updates, batch.params, batch.grads, strict=True):
        rows = invariant_rows(weight, grad, group["delta"], group["eps"])
        if rows is not None:
            tangent_(update, weight, rows, group["eps"])
        (free if rows is None else projected).append(weight)
    for weights, ratio in ((free, 1.0), (projected, group["wd_ratio"])):
        if weights:
            decay_(weights, group["lr"], group["weight_decay"] * ratio * decay_scale)


class SGDP(Optimizer):
    """Momentum SGD with projection, as a drop-in `torch.optim.Optimizer`; raises `ValueError` or `TypeError` naming a bad option."""

    checks = {"delta": nonnegative, "wd_ratio": nonnegative}

    def __init__(self, params, lr=0.1, momentum=0.9, weight_decay=0.0, *, nesterov=False, delta=0.1, wd_ratio=0.1, eps=1e-8,
                 maximize=False):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, delta=delta,
                         wd_ratio=wd_ratio, eps=eps, maximize=maximize)

    def buffers(self, group):
        return ("p",) if group["momentum"] != 0.0 else ()

    def update(self, batch: Batch, group: dict) -> None:
        beta = group["momentum"]
        if beta == 0.0:
            updates = [g.clone() for g in batch.grads]
        else:
            p = batch.state["p"]
            torch._foreach_mul_(p, beta)
            torch._foreach_add_(p, batch.grads)  # p_t = beta p_{t-1} + g_t
            updates = torch._foreach_add(batch.grads, p, alpha=beta) if group["nesterov"] else [b.clone() for b in p]
        project_and_decay_(updates, batch, group, decay_scale=1.0 / (1.0 - beta))
        torch._foreach_add_(batch.params, updates, alpha=-group["lr"])  # w_{t+1} = w_t - eta q_t


class AdamP(Optimizer):
    """AdamW with projection, as a drop-in `torch.optim.Optimizer`; raises `ValueError` or `TypeError` naming a bad option."""

    checks = {"delta": nonnegative, "wd_ratio": nonnegative, "nesterov": flag}

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, nesterov=False, delta=0.1, wd_ratio=0.1,
                 maximize=False):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, nesterov=nesterov, delta=delta,
                         wd_ratio=wd_ratio, maximize=maximize)

    def buffers(self, group):
        return ("m", "v")

    def update(self, batch: Batch, group: dict) -> None:
        beta1, beta2 = group["betas"]
        grads, m, v = batch.grads, batch.state["m"], batch.state["v"]
        average_(m, grads, beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1.0 - beta2)

        root = math.sqrt(bias_correction(beta2, batch.step))
        scale = torch._foreach_sqrt(v)
        torch._foreach_add_(scale, group["eps"] * root)
        ahead = torch._foreach_lerp(m, grads, 1.0 - beta1) if group["nesterov"] else m
        updates = torch._foreach_div(ahead, scale)  # p_t, without the bias corrections: a projection does not mind a factor
        project_and_decay_(updates, batch, group)
        torch._foreach_add_(batch.params, updates, alpha=-group["lr"] * root / bias_correction(beta1, batch.step))
