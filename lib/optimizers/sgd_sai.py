"""No More Adam: Learning Rate Scaling at Initialization is All You Need (2024), arXiv:2412.11768.

SGD with momentum whose learning rate differs from tensor to tensor: each tensor's factor is the g-SNR of its first
gradient, |g| / std(g), and stays for the whole run. With the sample deviation and the mean of the entries,
|g|^2 = (d - 1) std^2 + d mean^2, so the factor is sqrt(d - 1) for every gradient whose entries average to zero: the root
of the tensor's size, whatever the noise.

    symbol    name          shape
    theta_i   params        any          tensor i, with d_i entries
    G_i       g_snr         float        of the first gradient, one number a tensor
    max_k G_k largest       float        over all tensors that have started; the paper's divisor
    m_t       m             as params    m_1 = g_1, then the moving average
    alpha     lr            float
    mu        momentum      float in [0, 1)
    lambda    weight_decay  float        decoupled, not scaled by the factor

Deviations from the paper: a tensor whose entries are all equal (one entry; a first gradient of zero, as behind a layer
that starts at zero) has no deviation to divide by; its factor is sqrt(d). The authors' code gives |g| / eps there: no
step ever for a zero gradient, one 1e8 times too long for a single entry. That code also omits the paper's division by
the largest factor: `normalise=False`. A tensor that starts later divides by the largest factor so far.

Cost: one buffer (none without momentum) and two numbers a tensor; three element-wise passes a step.
"""
import math

import torch

from lib.optimizers.base import Batch, Optimizer, average_, decay_, flag


def g_snr(grad: torch.Tensor, eps: float = 1e-8) -> float:
    """|g| / (std(g) + eps) over the entries (sample deviation); sqrt(d) where they are all equal, and 1 without entries."""
    d = grad.numel()
    if d < 2 or bool((grad == grad.flatten()[0]).all()):
        return math.sqrt(max(d, 1))
    g = grad.detach().double()
    return g.norm().item() / (g.std().item() + eps)


class SGDSaI(Optimizer):
    """SGD-SaI as a drop-in `torch.optim.Optimizer`; raises `ValueError` or `TypeError` naming a bad option.

    `ratio` is the rule that gives a tensor its factor; a subclass can try another one.
    """

    checks = {"normalise": flag}
    ratio = staticmethod(g_snr)

    def __init__(self, params, lr=1e-2, momentum=0.9, eps=1e-8, weight_decay=1e-2, *, normalise=True, maximize=False):
        super().__init__(params, lr=lr, momentum=momentum, eps=eps, weight_decay=weight_decay, normalise=normalise, maximize=maximize)

    def buffers(self, group):
        return ("m", "largest") if group["momentum"] != 0.0 else ("largest",)

    def start(self, name, param, grad, group):
        if name == "largest":
            return self._measure(param)
        return super().start(name, param, grad, group)

    def _measure(self, param) -> float:
        """Give every tensor that starts in this step its factor, and all of them the largest factor so far (Alg. 1, l. 4-8)."""
        new = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None and "g_snr" not in self.state[p]]
        for p, group in new:
            self.state[p]["g_snr"] = float(type(self).ratio(p.grad, float(group["eps"])))
        largest = max(state["g_snr"] for state in self.state.values() if "g_snr" in state)
        for p, _ in new:
            self.state[p]["largest"] = largest
        return self.state[param]["largest"]

    def update(self, batch: Batch, group: dict) -> None:
        lr, mu = group["lr"], group["momentum"]
        decay_(batch.params, lr, group["weight_decay"])
        m = batch.grads
        if mu != 0.0:
            m = batch.state["m"]
            average_(m, batch.grads, mu if batch.step > 1 else 0.0)  # m_1 = g_1: an average that starts full
        for p, m_i in zip(batch.params, m, strict=True):  # torch adds lists with one factor for all; here each has its own
            state = self.state[p]
            p.add_(m_i, alpha=-lr * state["g_snr"] / (state["largest"] if group["normalise"] else 1.0))
