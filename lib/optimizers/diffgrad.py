"""diffGrad: An Optimization Method for Convolutional Neural Networks (2019), arXiv:1909.11015.

Adam with friction: each step is multiplied by xi = sigmoid(|g_{t-1} - g_t|), a number between 1/2 (the gradient does not
change) and 1 (it changes a lot). Implemented: the method with coupled decay as in the paper's code, decoupled decay, the
AMSGrad maximum, and `aliased`, the slip of the first public code, kept to be measured.

    symbol     name          shape
    theta      params        any
    g_t        grads         as params
    m_t        m             as params    moving average of g
    v_t        v             as params    moving average of g^2
    g_{t-1}    previous      as params    0 before the first step, so that xi_1 = sigmoid(|g_1|)
    xi_t       xi            as params    in [1/2, 1); not kept
    alpha      lr            float
    lambda     weight_decay  float; joins the gradient before anything else sees it

Deviations from the paper: none. eps stands beside the root of the corrected v, as printed; the authors' code has it
beside the uncorrected one. With `aliased` the stored gradient is the present one from step two on, so xi = 1/2: this is
what storing a reference does where gradients are refilled in place.

Cost: three buffers (Adam two) and about twelve element-wise passes a step.
"""
import math

import torch

from lib.optimizers.base import Batch, Optimizer, average_, bias_correction, coupled, decay_, flag


def friction(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """xi = sigmoid(|before - now|), entry by entry."""
    return torch.sigmoid((before - now).abs())


class DiffGrad(Optimizer):
    """diffGrad as a drop-in `torch.optim.Optimizer`; raises `ValueError` or `TypeError` naming a bad option."""

    checks = {"weight_decouple": flag, "aliased": flag}

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *,
                 weight_decouple=False, amsgrad=False, aliased=False, maximize=False):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, weight_decouple=weight_decouple,
                         amsgrad=amsgrad, aliased=aliased, maximize=maximize)

    def buffers(self, group):
        return ("m", "v", "previous", "v_max") if group["amsgrad"] else ("m", "v", "previous")

    def update(self, batch: Batch, group: dict) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        params, grads, m, v, previous = batch.params, batch.grads, *(batch.state[k] for k in ("m", "v", "previous"))
        if group["weight_decouple"]:
            decay_(params, lr, group["weight_decay"])
        else:
            grads = coupled(params, grads, group["weight_decay"])

        average_(m, grads, beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1.0 - beta2)
        if group["amsgrad"]:
            torch._foreach_maximum_(batch.state["v_max"], v)
            v = batch.state["v_max"]

        if group["aliased"] and batch.step > 1:
            torch._foreach_copy_(previous, grads)
        step = previous  # from here on the buffer holds the step; g_t is stored in it at the end
        torch._foreach_sub_(step, grads)
        torch._foreach_abs_(step)
        torch._foreach_sigmoid_(step)  # xi_t
        torch._foreach_mul_(step, m)
        root = math.sqrt(bias_correction(beta2, batch.step))
        scale = torch._foreach_sqrt(v)
        torch._foreach_add_(scale, group["eps"] * root)  # m / (sqrt(v) / root + eps) = root m / (sqrt(v) + root eps)
        torch._foreach_addcdiv_(params, step, scale, -lr * root / bias_correction(beta1, batch.step))
        torch._foreach_copy_(previous, grads)
