"""MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using Rank-1 Updates (2023), arXiv:2306.01685.

K-FAC multiplies the gradient of a linear layer by two inverse matrices; MKOR keeps the inverses themselves and updates
each with one vector a batch, in O(d^2). Implemented: the optimizer on top of momentum SGD, three readings of the rank-one
update, the stabilizer, the rescaling, the switch to first order (`MKORH`), and the baseline with full factors (`KFAC`).

    symbol       name               shape
    a, g         a, g               [n, d_in (+ 1 with a bias)], [n, d_out]   inputs; gradients of each sample's outputs
    a-, g-       mean vectors       [d_in (+ 1)], [d_out]   their averages over the batch
    A^-1, G^-1   A_inv, G_inv       [d, d]   state of a layer's weight
    gamma        gamma              float in (0, 1]; 1 keeps the factors at the identity
    zeta         zeta               float in (0, 1]: share that stays when the stabilizer acts
    epsilon      limit              float > 0: largest |entry| of a factor before it acts
    f            inv_freq           int > 0: steps from one update of the factors to the next
    lr, mu       lr, momentum       float, float in [0, 1)

Deviations from the paper: the printed update has a plus sign and is not the inverse of the decayed factor; the default
here, "exact", is. "printed" and "code" are the box and the official code. The norm in the stabilizer is taken to be
the largest entry, as in the code; its defaults are the code's. The code's half precision and clamping at 100 are left out.
The paper does not print the rule of the switch: `MKORH` compares two windows of losses.
The loss must be the mean over the batch. After a deep copy, `watch` has to be called for the copy's model.

Cost: d_in^2 + d_out^2 numbers a layer beside the momentum; O(d^2) an update of a factor, O(d_out d_in (d_out + d_in)) a
step for the preconditioning.
"""
from functools import partial

import torch
from torch import nn

from lib.optimizers.base import Batch, Optimizer, count, coupled, flag, fraction, positive


def share(name: str, value) -> None:
    """`ValueError` unless value lies in (0, 1]."""
    positive(name, value)
    if float(value) > 1.0:
        raise ValueError(f"{name} must lie in (0, 1], got {value!r}")


def known_rule(name: str, value) -> None:
    """`ValueError` unless value names one of the rank-one updates."""
    if value not in RULES:
        raise ValueError(f"{name} must be one of {', '.join(RULES)}, got {value!r}")


def exact(P: torch.Tensor, v: torch.Tensor, gamma: float) -> torch.Tensor:
    """(gamma P^-1 + (1 - gamma) v v^T)^-1 by Sherman and Morrison."""
    Pv = torch.mv(P, v)
    return (P - torch.outer(Pv, Pv) * ((1 - gamma) / (gamma + (1 - gamma) * torch.dot(v, Pv)))) / gamma


def printed(P: torch.Tensor, v: torch.Tensor, gamma: float) -> torch.Tensor:
    """Alg. 1 as printed: gamma P plus a multiple of (P v)(P v)^T."""
    Pv = torch.mv(P, v)
    scale = (1 - gamma) / (gamma**2 * (1 + gamma * (1 - gamma) * torch.dot(v, Pv)))
    return gamma * P + scale * torch.outer(Pv, Pv)


def code(P: torch.Tensor, v: torch.Tensor, gamma: float) -> torch.Tensor:
    """The official code: P' = gamma P + (1 - gamma) I, then (P'^-1 + v v^T)^-1; the factor itself does not decay."""
    P = gamma * P + (1 - gamma) * torch.eye(len(P), dtype=P.dtype, device=P.device)
    Pv = torch.mv(P, v)
    return P - torch.outer(Pv, Pv) / (1 + torch.dot(v, Pv))


RULES = {"exact": exact, "printed": printed, "code": code}


def stabilized(P: torch.Tensor, limit: float, zeta: float) -> torch.Tensor:
    """zeta P + (1 - zeta) I where an entry of P is beyond the limit, else P."""
    if P.abs().max() <= limit:
        return P
    return zeta * P + (1 - zeta) * torch.eye(len(P), dtype=P.dtype, device=P.device)


def rescaled(D: list[torch.Tensor], grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """D times (sum of the norms of grads) / (sum of the norms of D); a zero stays zero."""
    before, after = (sum(torch.linalg.vector_norm(x) for x in xs) for xs in (grads, D))
    return [d * (before / after) if after > 0 else d for d in D]


class MKOR(Optimizer):
    """Momentum SGD on preconditioned gradients: `MKOR(model.parameters(), lr=0.1).watch(model)`.

    Parameters of layers that are not watched get plain momentum SGD. Raises naming a bad option.
    """

    checks = {"gamma": share, "zeta": share, "limit": positive, "rule": known_rule, "inv_freq": count, "second_order": flag,
              "damping": positive, "window": count, "rate": fraction}

    def __init__(self, params, lr=1e-3, momentum=0.9, weight_decay=0.0, gamma=0.95, *, rule="exact", inv_freq=10, limit=2.0,
                 zeta=0.9, maximize=False, **more):
        self.layers, self.hooks = {}, []  # weight -> (index of its group, its layer, statistics since the last step)
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, gamma=gamma, rule=rule, inv_freq=inv_freq,
                         limit=limit, zeta=zeta, second_order=True, maximize=maximize, **more)

    def __setstate__(self, state):
        super().__setstate__(state)
        if "layers" not in self.__dict__:  # a copy: hooks belong to the model that was watched
            self.layers, self.hooks = {}, []

    def check(self, group):
        for name in ("inv_freq", "window"):
            if group.get(name) == 0:
                raise ValueError(f"{name} must be at least 1, got 0")

    # -- gathering what a batch says about a layer

    def watch(self, model: nn.Module) -> "MKOR":
        """Precondition every `nn.Linear` of the model whose weight is a parameter here; returns the optimizer."""
        own = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight in own]
        for m in layers:
            if m.bias is not None and own.get(m.bias) != own[m.weight]:
                raise ValueError("weight and bias of a layer must be in one parameter group")
        for m in layers:
            self.layers[m.weight] = (own[m.weight], m, [])
            self.hooks.append(m.register_forward_hook(self._see))
        return self

    def _see(self, layer, inputs, output):
        group = self.param_groups[self.layers[layer.weight][0]]
        steps = self.state[layer.weight]["step"] if layer.weight in self.state else 0
        if output.requires_grad and group["second_order"] and steps % group["inv_freq"] == 0:
            a = inputs[0].detach().flatten(0, -2)  # [n, d_in]
            output.register_hook(partial(self._gather, layer, a))

    def _gather(self, layer, a, grad):
        a, g = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, grad.detach().flatten(0, -2)))
        a = torch.cat([a, a.new_ones(len(a), 1)], 1) if layer.bias is not None else a
        self.layers[layer.weight][2].append(self.statistic(a, g * len(g)))  # the loss has divided by n

    def statistic(self, a, g):
        """What is kept of a batch: the two mean vectors."""
        return a.mean(0), g.mean(0)

    # -- the factors

    def refresh(self, state, statistics, group) -> None:
        """Bring A_inv and G_inv up to date with the batch."""
        for name, vectors in zip(("A_inv", "G_inv"), zip(*statistics, strict=True), strict=True):
            v = sum(vectors) / len(vectors)
            P = state.get(name, torch.eye(len(v), dtype=v.dtype, device=v.device))
            P = RULES[group["rule"]](stabilized(P, group["limit"], group["zeta"]), v, group["gamma"])
            if not torch.isfinite(P).all():
                raise FloatingPointError(f"{name} of a layer is no longer finite: rule={group['rule']!r} diverges, or a gradient is not finite")
            state[name] = P

    def _batches(self, group):
        turned = {}
        for p in group["params"] if group["second_order"] else ():
            _, layer, statistics = self.layers.get(p, (None, None, None))
            if layer is None or p.grad is None:
                continue
            if statistics:
                self.refresh(self.state[p], statistics, group)
                statistics.clear()
            if "A_inv" in self.state[p]:
                pair = [q for q in (p, layer.bias) if q is not None]
                turned |= dict(zip(pair, self._precondition(pair, self.state[p], group), strict=True))
        for batch in super()._batches(group):
            grads = [turned.get(p, g) for p, g in zip(batch.params, batch.grads, strict=True)]
            yield Batch(batch.params, grads, batch.state, batch.step)

    def _precondition(self, pair, state, group):
        grads = [-p.grad if group["maximize"] else p.grad for p in pair]
        grad = torch.cat([g.reshape(len(grads[0]), -1) for g in grads], 1)  # [d_out, d_in (+ 1)]
        D = (state["G_inv"] @ grad.to(state["G_inv"].dtype) @ state["A_inv"]).to(grad.dtype)  # G^-1 grad A^-1
        split = [grads[0].shape[1], 1][: len(pair)]
        return rescaled([d.reshape(g.shape).contiguous() for d, g in zip(D.split(split, 1), grads, strict=True)], grads)

    # -- momentum SGD

    def buffers(self, group):
        return ("momentum_buffer",)

    def update(self, batch: Batch, group: dict) -> None:
        velocity = batch.state["momentum_buffer"]
        torch._foreach_mul_(velocity, group["momentum"])
        torch._foreach_add_(velocity, coupled(batch.params, batch.grads, group["weight_decay"]))
        torch._foreach_add_(batch.params, velocity, alpha=-group["lr"])


class MKORH(MKOR):
    """MKOR that becomes momentum SGD for good when the loss falls too slowly; give every loss to `observe`, or a closure."""

    def __init__(self, params, lr=1e-3, momentum=0.9, weight_decay=0.0, gamma=0.95, *, window=20, rate=0.05, **more):
        super().__init__(params, lr, momentum, weight_decay, gamma, window=window, rate=rate, losses=[], **more)

    def observe(self, loss: float) -> None:
        """Switch when the last `window` losses are on average less than the share `rate` below the window before."""
        for group in self.param_groups:
            n = group["window"]
            group["losses"] = [*group["losses"], float(loss)][-2 * n:]
            older, newer = sum(group["losses"][:n]), sum(group["losses"][n:])
            if len(group["losses"]) == 2 * n and newer > (1 - group["rate"]) * older:
                group["second_order"] = False

    def step(self, closure=None):
        """As in the base, and a closure's loss is observed."""
        loss = super().step(closure)
        if loss is not None:
            self.observe(loss.detach() if isinstance(loss, torch.Tensor) else loss)
        return loss


class KFAC(MKOR):
    """The baseline: averages of the full moments E[a a^T] and E[g g^T], inverted with `damping` times their mean eigenvalue.

    The rescaling is MKOR's, so that the two differ in nothing but the factors.
    """

    def __init__(self, params, lr=1e-3, momentum=0.9, weight_decay=0.0, gamma=0.95, *, damping=0.1, **more):
        super().__init__(params, lr, momentum, weight_decay, gamma, damping=damping, **more)

    def statistic(self, a, g):
        """The two second moments of the batch."""
        return a.mT @ a / len(a), g.mT @ g / len(g)

    def refresh(self, state, statistics, group):
        """Average the moments and invert them: O(d^3)."""
        for name, moments in zip("AG", zip(*statistics, strict=True), strict=True):
            M = sum(moments) / len(moments)
            state[name] = torch.lerp(M, state[name], group["gamma"]) if name in state else M
            eye = torch.eye(len(M), dtype=M.dtype, device=M.device)
            scale = state[name].trace().clamp_min(torch.finfo(M.dtype).tiny) / len(M)
            state[name + "_inv"] = torch.linalg.inv(state[name] / scale + group["damping"] * eye)
