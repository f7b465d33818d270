"""FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training (2024), arXiv:2411.07837.

Adam's state is kept for a small subspace of each matrix, and the rest of the gradient, which methods like GaLore throw
away, still moves the weights: by its sign, which needs no state. Every `gap` steps a new subspace is chosen, and the
state starts again.

    symbol     name              shape
    theta      params            any; a tensor of two or more axes is treated as a matrix [rows, the rest]
    rho        density           float in [0, 1]: the share of the gradient that has state
    P          where             chosen columns, rows or entries (indices), or an orthonormal basis [n, r] or [m, r]
    g^f        low               P g, the state-full part: [m, k], [k, n], [k], [m, r] or [r, n]
    m, v       m, v              as low     the averages of Adam
    g^r        residual          g - P'P g, the state-free part
    T          gap               int, steps between two choices
    s          state_free_scale  float, rate of the state-free part over the rate

Deviations from the paper: tensors with fewer than two axes always have full state (as norms and biases have in the
paper; embeddings and the output layer want a group of their own with subspace="full"). A residual below 1e-5 of the
largest gradient counts as zero where P is a rotation: there an exact zero is rounding noise, and its sign is not noise.

Cost: 2 rho floats a weight, plus one index for each chosen column, row or entry, or the basis; with "svd" one
decomposition a matrix every `gap` steps. Two matrix products a step for a basis, none for the others.
"""
import math
from collections.abc import Iterator

import torch

from lib.optimizers.base import Batch, Optimizer, bias_correction, decay_, nonnegative

SUBSPACES = ("blocks", "columns", "rows", "entries", "svd", "random", "full")
STATE_FREE = ("sign", "sgd", "none")


def one_of(*choices: str):
    """The check for an option that is one of some words."""
    def check(name, value):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return check


def _density(name, value):
    nonnegative(name, value)
    if value > 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")


def _steps(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def choose(G: torch.Tensor, subspace: str, density: float, generator: torch.Generator) -> torch.Tensor:
    """P for a gradient G [m, n]: sorted indices, or an orthonormal basis of the shorter side ([n, r] if m >= n, else [m, r])."""
    m, n = G.shape
    if subspace in ("columns", "rows", "entries"):
        count = {"columns": n, "rows": m, "entries": m * n}[subspace]
        return torch.randperm(count, generator=generator)[:math.floor(density * count)].sort().values.to(G.device)
    short = min(m, n)
    r, work = round(density * short), G.double() if G.dtype == torch.float64 else G.float()
    if subspace == "svd":
        U, _, Vh = torch.linalg.svd(work, full_matrices=False)
        basis = Vh[:r].T if m >= n else U[:, :r]
    else:
        basis = torch.linalg.qr(torch.randn(short, r, generator=generator, dtype=torch.float64))[0]
    return basis.contiguous().to(G)


def down(G: torch.Tensor, subspace: str, P: torch.Tensor) -> torch.Tensor:
    """The state-full part of G in its own coordinates."""
    if subspace == "entries":
        return G.reshape(-1)[P]
    if subspace in ("columns", "rows"):
        return G.index_select(1 if subspace == "columns" else 0, P)
    return G @ P if len(G) >= G.shape[1] else P.T @ G


def up(low: torch.Tensor, free: torch.Tensor, subspace: str, P: torch.Tensor) -> torch.Tensor:
    """P'low + free, where `free` (overwritten) is the state-free step of the whole matrix."""
    if subspace == "entries":
        free.view(-1)[P] = low
    elif subspace in ("columns", "rows"):
        free.index_copy_(1 if subspace == "columns" else 0, P, low)
    else:
        free.add_(low @ P.T if len(free) >= free.shape[1] else P @ low)
    return free


def residual(G: torch.Tensor, low: torch.Tensor, subspace: str, P: torch.Tensor) -> torch.Tensor:
    """G - P'P G, with exact zeros where a rotation leaves rounding noise. Coordinates are overwritten later (`up`)."""
    if subspace in ("columns", "rows", "entries"):
        return G
    rest = G - up(low, torch.zeros_like(G), subspace, P)
    return torch.where(rest.abs() > 1e-5 * G.abs().max(), rest, 0.0)


class FRUGAL(Optimizer):
    """FRUGAL as a drop-in `torch.optim.Optimizer`; raises `ValueError` or `TypeError` naming a bad option.

    subspace: "blocks" (whole tensors in turn), "columns", "rows", "entries" (random coordinates), "svd" (top singular
    vectors of the gradient, as GaLore), "random" (a random rotation), "full" (AdamW, never reset).
    state_free: what moves the rest: "sign", "sgd" or "none" (with "svd" that is GaLore with resets).
    generator: draws the seed of all choices; None is seed 0.
    """

    checks = {"density": _density, "gap": _steps, "subspace": one_of(*SUBSPACES), "state_free": one_of(*STATE_FREE),
              "state_free_scale": nonnegative}

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, density=0.25, gap=200, subspace="blocks",
                 state_free="sign", state_free_scale=1.0, generator=None, maximize=False):
        seed = 0 if generator is None else int(torch.randint(2**31, (), generator=generator))
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, density=density, gap=gap, subspace=subspace,
                         state_free=state_free, state_free_scale=state_free_scale, seed=seed, maximize=maximize)

    def buffers(self, group):
        return ()

    def check(self, group):
        if group["subspace"] == "svd":
            for p in self._due(group):
                if p.grad.layout == torch.strided and not torch.isfinite(p.grad).all():
                    raise ValueError(f"gradients must be finite where subspace='svd' decomposes them, got NaN or inf for shape {tuple(p.shape)}")

    def _due(self, group) -> list[torch.Tensor]:
        """Matrices whose subspace is to be chosen in this step."""
        split = [p for p in group["params"] if p.grad is not None and p.dim() > 1 and p.numel() and group["subspace"] != "full"]
        states = [(p, self.state.get(p, {})) for p in split]
        return [p for p, s in states if "since" not in s or s["step"] - s["since"] >= group["gap"]]

    def _batches(self, group: dict) -> Iterator[Batch]:
        """Choose subspaces from the current gradients and drop the old state, then go on as every optimizer."""
        for i, p in enumerate(due := self._due(group)):
            state = self.state[p]
            step = state.get("step", 0)
            state.clear()
            state.update(step=step, since=step)
            if i == 0:
                generator = torch.Generator().manual_seed(group["seed"] + 1_000_003 * step)
                active = set(torch.randperm(len(due), generator=generator)[:round(group["density"] * len(due))].tolist())
            if group["subspace"] == "blocks":
                state["active"] = i in active
            else:
                state["where"] = choose(p.grad.flatten(1), group["subspace"], float(group["density"]), generator)
        yield from super()._batches(group)

    def update(self, batch: Batch, group: dict) -> None:
        decay_(batch.params, group["lr"], group["weight_decay"])
        free_scale = group["state_free_scale"]
        for p, g in zip(batch.params, batch.grads, strict=True):
            state = self.state[p]
            if "where" not in state:  # a whole tensor: with state, or without
                step = self._adam(state, g, group) if state.get("active", True) else _free(g, group["state_free"]).mul_(free_scale)
            else:
                G, subspace, P = g.flatten(1), group["subspace"], state["where"]
                low = down(G, subspace, P)
                free = _free(residual(G, low, subspace, P), group["state_free"]).mul_(free_scale).contiguous()
                step = up(self._adam(state, low, group), free, subspace, P).reshape(p.shape)
            p.add_(step, alpha=-group["lr"])

    @staticmethod
    def _adam(state: dict, g: torch.Tensor, group: dict) -> torch.Tensor:
        """m^ / (sqrt(v^) + eps), with the averages and their step count since the subspace was chosen."""
        (beta1, beta2), t = group["betas"], state["step"] - state.get("since", 0)
        for name in ("m", "v"):
            if name not in state:
                state[name] = torch.zeros_like(g)
        state["m"].lerp_(g, 1.0 - beta1)
        state["v"].mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        root = math.sqrt(bias_correction(beta2, t))
        scale = state["v"].sqrt().add_(group["eps"] * root)
        return torch.div(state["m"], scale, out=scale).mul_(root / bias_correction(beta1, t))


def _free(g: torch.Tensor, rule: str) -> torch.Tensor:
    """The state-free step, as a new tensor."""
    return torch.sign(g) if rule == "sign" else g.clone() if rule == "sgd" else torch.zeros_like(g)
