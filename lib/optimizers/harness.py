"""Fair comparisons: a few test beds, and one grid of learning rates, seeds and steps for every method.

    beds = [quadratic(), digits("cnn"), language()]
    result = race(beds[0], {"AdamW": AdamW, "SGD": SGD}, rates={"AdamW": (1e-3, 1e-2), "SGD": (1e-2, 1e-1)}, seeds=range(5), steps=200)
    result["AdamW"].best.median, result["AdamW"].best.spread, result["AdamW"].bytes_per_parameter

A *bed* is a `Problem`: how to draw a model, the loss of a random batch, and the score of a trained model (lower is better).
A *method* is called as `method(named_parameters, lr=lr)` with a list of (name, tensor) pairs, as every `torch.optim`
class allows; one that treats tensors differently (embeddings, matrices) can choose its groups by name.

Every method sees, for the same seed, the same first weights and the same batches; a run that leaves the finite numbers
scores infinity, and its method keeps that run. The number of rates is equal for all methods, or `race` raises.
"""
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lib import models
from lib.optimizers.base import state_bytes


# -- test beds ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Problem:
    """A test bed; `score` is what a comparison reports, and says itself in words what that is."""

    name: str
    score: str
    init: Callable[[torch.Generator], nn.Module]
    loss: Callable[[nn.Module, torch.Generator], torch.Tensor]
    evaluate: Callable[[nn.Module], float]


class Weights(nn.Module):
    """A model that is nothing but one tensor of weights, `w`."""

    def __init__(self, w: torch.Tensor):
        super().__init__()
        self.w = nn.Parameter(w)


def draw_(model: nn.Module, generator: torch.Generator, gain: float) -> nn.Module:
    """Fresh weights: matrices N(0, gain / fan in), embeddings N(0, 0.02^2), vectors 1 in a norm and 0 elsewhere."""
    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                if p.dim() > 1:
                    std = 0.02 if isinstance(module, nn.Embedding) else math.sqrt(gain / p[0].numel())
                    p.normal_(0.0, std, generator=generator)
                else:
                    p.fill_(1.0 if name == "weight" else 0.0)
    return model


def fresh(make: Callable[[], nn.Module], generator: torch.Generator, gain: float) -> nn.Module:
    """`make()` with weights from `generator` alone: the global random state is neither read nor moved."""
    with torch.device("meta"):
        model = make()
    return draw_(model.to_empty(device="cpu"), generator, gain)


def quadratic(shape=(16, 16), condition=1e3, noise=0.01, rotate=True, seed=0) -> Problem:
    """f(w) = w'Hw / 2 with eigenvalues from 1 down to 1/condition, and gradients with noise of standard deviation `noise`.

    `rotate` turns the eigenvectors away from the coordinate axes (by a rotation drawn from `seed`, the same in all runs);
    without it, one rate a coordinate solves the problem. w has the given shape, so that methods for matrices can be tried.
    """
    if not condition >= 1.0:
        raise ValueError(f"condition must be >= 1, got {condition!r}")
    n = math.prod(shape)
    scales = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)  # [n]
    H = torch.diag(scales)
    if rotate:
        Q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        H = Q @ H @ Q.T
    H = H.float()  # [n, n]

    def energy(model):
        w = model.w.flatten()
        return 0.5 * torch.dot(w, H @ w)

    def loss(model, generator):
        xi = torch.randn(n, generator=generator)
        return energy(model) + noise * torch.dot(xi, model.w.flatten())

    return Problem(f"quadratic, condition {condition:g}" + ("" if rotate else ", along the axes"), "f(w)",
                   lambda g: Weights(torch.randn(shape, generator=g)), loss, lambda model: energy(model).item())


def digits(network="mlp", hidden=32, batch=64, split="test") -> Problem:
    """8x8 digits with `network` "mlp" (one hidden layer, for speed), "bn" (the same with batch norm) or "cnn" (three layers)."""
    if network not in ("mlp", "bn", "cnn"):
        raise ValueError(f"network must be 'mlp', 'bn' or 'cnn', got {network!r}")
    norm = [nn.BatchNorm1d] if network == "bn" else []

    def make():
        first = nn.Linear(64, hidden, bias=not norm)
        return nn.Sequential(nn.Flatten(), first, *(layer(hidden) for layer in norm), nn.ReLU(), nn.Linear(hidden, 10))

    def init(generator):
        if network == "cnn":
            return models.digits_cnn(generator)
        model = fresh(make, generator, 2.0)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.reset_running_stats()
        return model

    (x, y), (x_eval, y_eval) = models.digits_tensors("train"), models.digits_tensors(split)

    def loss(model, generator):
        pick = torch.randint(len(x), (batch,), generator=generator)
        return cross_entropy(model(x[pick]), y[pick])

    return Problem(f"digits, {network}", f"{split} cross-entropy (nats)", init, loss,
                   lambda model: cross_entropy(model(x_eval), y_eval).item())


def language(d=32, layers=2, heads=2, hidden=64, batch=8, t=32, windows=32) -> Problem:
    """Shakespeare by a small decoder, next token among 512; d=128, layers=4, heads=4, hidden=384 is the book's own model."""
    tokens = models.lm_tokens("valid")
    start = torch.linspace(0, len(tokens) - t - 1, windows).long()
    held_out = tokens[start[:, None] + torch.arange(t + 1)]  # [windows, t + 1]

    def nats(model, x, target):
        return cross_entropy(model(x).flatten(0, 1), target.flatten())

    return Problem(f"language, width {d}", "validation loss (nats a token)",
                   lambda g: fresh(lambda: models.ShakespeareLM(d, layers, heads, hidden), g, 1.0),
                   lambda model, g: nats(model, *models.lm_batch("train", batch, g, t)),
                   lambda model: nats(model, held_out[:, :-1], held_out[:, 1:]).item())


# -- the harness -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class AtRate:
    """One method at one learning rate: the final score of each seed."""

    lr: float
    scores: tuple[float, ...]
    curves: tuple[tuple[float, ...], ...] = field(repr=False, default=())  # batch losses [seed][step]

    @property
    def median(self) -> float:
        return statistics.median(self.scores)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest score."""
        return min(self.scores), max(self.scores)


@dataclass(frozen=True)
class Runs:
    """One method on one bed: all rates, and the optimizer's state counted after the last step."""

    method: str
    rates: tuple[AtRate, ...]
    bytes_per_parameter: float

    @property
    def best(self) -> AtRate:
        """The rate with the smallest median."""
        return min(self.rates, key=lambda r: r.median)

    @property
    def best_is_inside(self) -> bool:
        """Whether the best rate has neighbours on both sides; at the edge of the grid, a wider grid may beat it."""
        return self.best is not self.rates[0] and self.best is not self.rates[-1]


def constant_rate(progress: float) -> float:
    """The schedule that leaves the rate alone."""
    return 1.0


def linear_decay(progress: float) -> float:
    """1 in the first step, falling in a line towards 0 after the last."""
    return 1.0 - progress


def run_once(problem: Problem, method, lr: float, seed: int, steps: int, schedule=constant_rate) -> tuple[float, list[float], float]:
    """One run: final score, loss of every batch, bytes of optimizer state per parameter."""
    model = problem.init(torch.Generator().manual_seed(2 * seed))
    batches = torch.Generator().manual_seed(2 * seed + 1)
    optimizer, losses = method(list(model.named_parameters()), lr=lr), []
    if hasattr(optimizer, "watch"):  # MKOR looks at the inputs of layers, so it is shown the model
        optimizer.watch(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    for t in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(t / steps)
        optimizer.zero_grad()
        loss = problem.loss(model, batches)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        try:
            optimizer.step()
        except FloatingPointError:  # a method that notices by itself that its state is no longer finite
            losses.append(math.inf)
            break
    model.eval()
    with torch.no_grad():
        score = problem.evaluate(model) if math.isfinite(losses[-1]) else math.inf
    n = sum(p.numel() for p in model.parameters())
    return score if math.isfinite(score) else math.inf, losses, state_bytes(optimizer) / n


def race(problem: Problem, methods: Mapping[str, Callable], rates, seeds: Iterable[int], steps: int,
         schedule=constant_rate) -> dict[str, Runs]:
    """Train every method at every rate with every seed; `rates` is one grid for all, or one of equal size for each method."""
    grids = {name: tuple(rates[name] if isinstance(rates, Mapping) else rates) for name in methods}
    seeds = tuple(seeds)
    if not methods or len({len(grid) for grid in grids.values()}) != 1 or not all(grids.values()):
        raise ValueError(f"rates must give each method equally many learning rates, got {grids!r}")
    if not seeds or steps < 1:
        raise ValueError(f"seeds must not be empty and steps must be >= 1, got {seeds!r} and {steps!r}")
    results = {}
    for name, method in methods.items():
        cells = [[run_once(problem, method, lr, seed, steps, schedule) for seed in seeds] for lr in grids[name]]
        at = [AtRate(lr, tuple(s for s, _, _ in runs), tuple(tuple(c) for _, c, _ in runs)) for lr, runs in zip(grids[name], cells, strict=True)]
        results[name] = Runs(name, tuple(at), max(b for runs in cells for _, _, b in runs))
    return results


def step_seconds(methods: Mapping[str, Callable], model: nn.Module, lr=1e-3, repeats=15, generator=None) -> dict[str, float]:
    """Median wall time of one step of each method on its own copy of `model`, taken in turns so that all meet the same machine."""
    grads = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
    optimizers = {}
    for name, method in methods.items():
        twin = copy.deepcopy(model)
        for p, g in zip(twin.parameters(), grads, strict=True):
            p.grad = g.to(p).clone()
        optimizers[name] = method(list(twin.named_parameters()), lr=lr)
    times = {name: [] for name in methods}
    for turn in range(repeats + 2):  # the first two turns allocate the state and warm the caches
        for name, optimizer in optimizers.items():
            begin = time.perf_counter()
            optimizer.step()
            if turn > 1:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(t) for name, t in times.items()}
