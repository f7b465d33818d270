"""AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients (2020), arXiv:2010.07468.

Adam divides by the root of the average squared gradient; AdaBelief divides by the root of the average squared
*surprise*, the distance between a gradient and the moving average that predicted it. Implemented: the update, decoupled
and coupled decay, the AMSGrad maximum, and the rectified form (as in RAdam) that the authors' package offers.

    symbol      name          shape
    theta       params        any
    g_t         grads         as params
    m_t         m             as params    moving average of g
    s_t         s             as params    moving average of (g - m)^2, plus eps in every step
    alpha       lr            float
    beta_1,2    betas         two floats in [0, 1)
    epsilon     eps           float > 0
    lambda      weight_decay  float

Deviations from the paper: none in the plain update. `rectify` is off (the authors' package turns it on), and with
`amsgrad` the rectified form uses the maximum too (the authors' package then ignores it). `eps` must not vanish in the
dtype of a parameter: it is what keeps a parameter without surprises from dividing by zero.

Cost: two buffers (three with `amsgrad`) and about ten element-wise passes a step, as Adam.
"""
import math

import torch

from lib.optimizers.base import Batch, Optimizer, average_, bias_correction, coupled, decay_, flag, positive


def rectification(beta2: float, step: int) -> float | None:
    """RAdam's factor r_t for a variance estimated from few gradients; None while its length rho_t is below 5."""
    rho_max = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_max - 2.0 * step * beta2 ** step / bias_correction(beta2, step)
    if rho < 5.0:
        return None
    return math.sqrt((rho - 4) * (rho - 2) * rho_max / ((rho_max - 4) * (rho_max - 2) * rho))


class AdaBelief(Optimizer):
    """AdaBelief as a drop-in `torch.optim.Optimizer`; raises `ValueError` or `TypeError` naming a bad option.

    With `weight_decouple` the decay multiplies the parameters (AdamW); without, it joins the gradient (Adam).
    """

    checks = {"eps": positive, "weight_decouple": flag, "rectify": flag}

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-16, weight_decay=0.0, *,
                 weight_decouple=True, amsgrad=False, rectify=False, maximize=False):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, weight_decouple=weight_decouple,
                         amsgrad=amsgrad, rectify=rectify, maximize=maximize)

    def check(self, group):
        for dtype in {p.dtype for p in group["params"]}:
            if float(group["eps"]) < torch.finfo(dtype).tiny * torch.finfo(dtype).eps:
                raise ValueError(f"eps must not round to 0 in {dtype}, got {group['eps']!r}")

    def buffers(self, group):
        return ("m", "s", "s_max") if group["amsgrad"] else ("m", "s")

    def update(self, batch: Batch, group: dict) -> None:
        lr, eps, (beta1, beta2) = group["lr"], group["eps"], group["betas"]
        params, grads, m, s = batch.params, batch.grads, batch.state["m"], batch.state["s"]
        if group["weight_decouple"]:
            decay_(params, lr, group["weight_decay"])  # theta <- (1 - alpha lambda) theta
        else:
            grads = coupled(params, grads, group["weight_decay"])

        average_(m, grads, beta1)  # m_t
        surprise = torch._foreach_sub(grads, m)  # g_t - m_t, with the new m
        torch._foreach_mul_(s, beta2)
        torch._foreach_addcmul_(s, surprise, surprise, 1.0 - beta2)
        torch._foreach_add_(s, eps)  # s_t: eps enters the state, and stays
        if group["amsgrad"]:
            torch._foreach_maximum_(batch.state["s_max"], s)
            s = batch.state["s_max"]

        step_size, root = lr / bias_correction(beta1, batch.step), math.sqrt(bias_correction(beta2, batch.step))
        if group["rectify"]:
            factor = rectification(beta2, batch.step)
            if factor is None:  # too early to divide by s: a step of momentum
                torch._foreach_add_(params, m, alpha=-step_size)
                return
            step_size, root, outside = step_size * factor * root, None, eps  # the root of s itself plus eps
        else:
            step_size, outside = step_size * root, eps * root  # m / (sqrt(s) / c + eps) = c m / (sqrt(s) + c eps)
        scale = torch._foreach_sqrt(s)
        if math.sqrt(eps) >= torch.finfo(params[0].dtype).eps / 8:  # else s >= eps makes this sum round to its first term
            torch._foreach_add_(scale, outside)
        torch._foreach_addcdiv_(params, m, scale, -step_size)
