"""CLASSP: a Biologically-Inspired Approach to Continual Learning through Adjustment Suppression and Sparsity Promotion (2024), arXiv:2405.09637.

AdaGrad for a sequence of tasks: a weight moves only where its squared gradient exceeds a threshold, and the sum of its
past gradients, never reset between tasks, divides the step. Beside it the baseline, elastic weight consolidation
(Kirkpatrick and others, 2017, arXiv:1612.00796): a quadratic pull towards the old weights, weighted by the Fisher diagonal.

    symbol    name           shape
    w         params         any
    g_t       grads          as params
    tau       threshold      float >= 0        in units of a squared gradient
    S_t       S              as params         sum of |g|^p over the gradients that passed
    p         power          float > 0
    alpha     lr             float
    eps       eps            float > 0         inside the root, added once
    F, w*     fisher, anchor lists as params   of a finished task (EWC)

Deviations from the paper: the printed formula divides by the sum over *earlier* gradients, passed or not, so that the first
step is alpha g / eps^(1/p). The default here is the order of the released code, current gradient included and passed
gradients only; `lag=True, all_gradients=True` is the formula. The threshold acts on each weight, as in the paper; in the
released file it is compared with one boolean a tensor.

Cost: one buffer, whatever the number of tasks; about six element-wise passes a step. EWC keeps two vectors a task.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from lib.optimizers.base import Batch, Optimizer, flag, nonnegative, positive


# -- CLASSP ------------------------------------------------------------------------------------------------------------

def passed(grad: torch.Tensor, threshold: float) -> torch.Tensor:
    """The gradient where its square exceeds the threshold, and zero elsewhere (NaN passes, and shows)."""
    return grad.masked_fill(grad.square() <= threshold, 0.0)


class CLASSP(Optimizer):
    """CLASSP as a drop-in `torch.optim.Optimizer`; raises `ValueError` or `TypeError` naming a bad option.

    Use one optimizer, with its state, for all tasks. `gate` is the rule that lets gradients through; a subclass can try another.
    """

    checks = {"eps": positive, "threshold": nonnegative, "power": positive, "lag": flag, "all_gradients": flag}
    gate = staticmethod(passed)

    def __init__(self, params, lr=0.2, threshold=0.5, power=1.0, eps=1e-5, *, lag=False, all_gradients=False, maximize=False):
        super().__init__(params, lr=lr, threshold=threshold, power=power, eps=eps, lag=lag, all_gradients=all_gradients, maximize=maximize)

    def buffers(self, group):
        return ("S",)

    def update(self, batch: Batch, group: dict) -> None:
        S, power = batch.state["S"], float(group["power"])
        through = [type(self).gate(g, float(group["threshold"])) for g in batch.grads]
        new = torch._foreach_abs(batch.grads if group["all_gradients"] else through)
        torch._foreach_pow_(new, power)  # |g|^p
        if not group["lag"]:
            torch._foreach_add_(S, new)
        root = torch._foreach_add(S, float(group["eps"]))
        torch._foreach_pow_(root, 1.0 / power)  # (eps + S)^(1/p)
        torch._foreach_addcdiv_(batch.params, through, root, value=-group["lr"])
        if group["lag"]:
            torch._foreach_add_(S, new)


# -- the baseline: elastic weight consolidation ------------------------------------------------------------------------

def fisher_diagonal(model: torch.nn.Module, x: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
    """Mean over the examples of (d log p(y | x) / dw)^2, with one label y for each example drawn from the model's own softmax.

    x: [n, ...] -> logits [..., n, classes]; leading axes are independent networks. Returns one tensor for each parameter;
    raises `ValueError` without examples, or when a logit is not finite.
    """
    if len(x) == 0:
        raise ValueError(f"x must hold at least one example, got shape {tuple(x.shape)}")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        probability = model(x).softmax(-1)  # [..., n, classes]
    if not bool(torch.isfinite(probability).all()):
        raise ValueError("model must give finite logits for every example of x, got NaN or infinity")
    drawn = torch.multinomial(probability.flatten(0, -2), 1, generator=generator)
    y = drawn.view(*probability.shape[:-1], 1).movedim(-2, 0)  # [n, ..., 1]

    def log_likelihood(weights, x_i, y_i):
        logits = torch.func.functional_call(model, weights, (x_i[None],))  # [..., 1, classes]
        return logits.log_softmax(-1).gather(-1, y_i.unsqueeze(-2)).sum()

    grads = torch.func.vmap(torch.func.grad(log_likelihood), in_dims=(None, 0, 0))(weights, x, y)
    return [g.square().mean(0) for g in grads.values()]


@dataclass(frozen=True)
class EWC:
    """What EWC keeps of a finished task; `EWC.after(model, x, generator)` makes it, `penalty` joins the next task's loss."""

    anchor: Sequence[torch.Tensor]
    fisher: Sequence[torch.Tensor]

    @classmethod
    def after(cls, model: torch.nn.Module, x: torch.Tensor, generator: torch.Generator) -> "EWC":
        """Weights and Fisher diagonal of a model that has learned a task with inputs x."""
        return cls([p.detach().clone() for p in model.parameters()], fisher_diagonal(model, x, generator))

    def penalty(self, model: torch.nn.Module, strength: float) -> torch.Tensor:
        """strength / 2 * sum F (w - w*)^2; raises `ValueError` for a negative or NaN strength, or a model of other shapes."""
        nonnegative("strength", strength)
        params = list(model.parameters())
        if [p.shape for p in params] != [a.shape for a in self.anchor]:
            raise ValueError(f"model must have parameters of shapes {[tuple(a.shape) for a in self.anchor]}, got {[tuple(p.shape) for p in params]}")
        return 0.5 * strength * sum((f * (p - a).square()).sum() for p, a, f in zip(params, self.anchor, self.fisher, strict=True))

    @property
    def floats(self) -> int:
        """Numbers kept."""
        return sum(t.numel() for t in (*self.anchor, *self.fisher))


# -- a sequence of tasks -----------------------------------------------------------------------------------------------

class SideBySide(torch.nn.Module):
    """k networks with one hidden layer of ReLUs, as one: x [n, inputs] or [k, n, inputs] -> logits [k, n, classes].

    All methods here act weight by weight, so k seeds cost little more than one.
    """

    def __init__(self, generator: torch.Generator, k=6, inputs=64, hidden=32, classes=10):
        super().__init__()
        draw = {"W1": (k, inputs, hidden, 2.0), "W2": (k, hidden, classes, 1.0)}
        for name, (*shape, gain) in draw.items():
            setattr(self, name, torch.nn.Parameter((gain / shape[1]) ** 0.5 * torch.randn(shape, generator=generator)))
        self.b1, self.b2 = (torch.nn.Parameter(torch.zeros(k, 1, m)) for m in (hidden, classes))

    def forward(self, x):
        return torch.relu(x @ self.W1 + self.b1) @ self.W2 + self.b2

    @torch.no_grad()
    def accuracy(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Fraction of examples that each network names rightly: [k]."""
        return (self(x).argmax(-1) == y).double().mean(-1)


@dataclass(frozen=True)
class Course:
    """What became of networks that learned tasks in turn."""

    curve: torch.Tensor  # [visits, tasks, k]: test accuracy on every task, at regular times
    ends: list[torch.Tensor]  # all weights, flat, before the first task and after each
    optimizer: torch.optim.Optimizer
    kept: EWC | None  # of the first task

    @property
    def moved(self) -> list[torch.Tensor]:
        """For each task, which weights it moved."""
        return [a != b for a, b in zip(self.ends, self.ends[1:], strict=False)]


def overlap(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Shares of the weights that moved in A only, B only, both, neither; Jaccard's index, and that of independent sets of these sizes."""
    shares = {name: m.double().mean().item() for name, m in {"A only": a & ~b, "B only": ~a & b, "both": a & b, "neither": ~a & ~b}.items()}
    one, two, union = shares["A only"] + shares["both"], shares["B only"] + shares["both"], 1.0 - shares["neither"]
    apart = one + two - one * two
    return shares | {"jaccard": shares["both"] / union if union else 0.0, "independent": one * two / apart if apart else 0.0}


def learn_in_turn(tasks: Sequence, make: Callable, generator: torch.Generator, steps=100, batch=16, strength=0.0, visits=1) -> Course:
    """Train one `SideBySide` on tasks (x, y, x_test, y_test), one after another, with the one optimizer `make(parameters)`.

    strength > 0: EWC's pull towards the end of the first task. Each network sees batches of its own; its gradient is that of its
    own mean loss. `visits` a task, evenly spaced, measure the accuracy. Raises `ValueError` when steps is no multiple of visits.
    """
    if visits < 1 or steps % visits:
        raise ValueError(f"steps must be a multiple of visits, got {steps!r} and {visits!r}")
    nets, curve, kept = SideBySide(generator), [], None
    optimizer, ends = make(nets.parameters()), []
    for x, y, *_ in tasks:
        ends.append(torch.cat([p.detach().flatten() for p in nets.parameters()]))
        if strength and len(ends) == 2:
            kept = EWC.after(nets, tasks[0][0][:200], generator)
        for t in range(1, steps + 1):
            pick = torch.randint(len(x), (len(nets.W1), batch), generator=generator)
            loss = len(pick) * cross_entropy(nets(x[pick]).flatten(0, 1), y[pick].flatten())
            optimizer.zero_grad()
            (loss if kept is None else loss + kept.penalty(nets, strength)).backward()
            optimizer.step()
            if t % (steps // visits) == 0:
                curve.append(torch.stack([nets.accuracy(*task[2:]) for task in tasks]))
    ends.append(torch.cat([p.detach().flatten() for p in nets.parameters()]))
    return Course(torch.stack(curve), ends, optimizer, kept)
