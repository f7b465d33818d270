"""When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement (2023), arXiv:2310.07831.

How large should step t of T be, if only the last iterate counts? For convex functions a bound answers, and its minimum is
a schedule: linear decay if all gradients are equally long, and otherwise a *refined* schedule, read off the gradient
norms of an earlier run. Implemented: the bound of the theorem and its minimizing weights, the refinement with its median
filter, the bound for an arbitrary schedule and its numerical minimum, and a scheduler that replays the result.

    symbol      name           shape
    w_t         weights        [T]  positive
    eta_t       factors        [T]  step sizes, or a schedule whose largest entry is 1
    |g_t|       norms          [T]  norm of the gradient at x_t
    D           distance       float  |x_1 - x_*|
    tau         tau            float  width of the median filter as a share of T

Deviations from the paper: none in the bound; padding of the filter (the start repeats its first value, the end is
mirrored) follows the authors' code. For Adam-like methods use `power=1` and 1-norms; that exponent is theirs, not derived.
Cost: one logged norm a step; the refinement itself is one pass over T numbers.
"""
import numpy as np
import torch
from scipy.ndimage import median_filter
from scipy.optimize import minimize
from torch.optim.lr_scheduler import LRScheduler


def _positive(name, x, allow_zero=False):
    x = np.asarray(x, float)
    if x.ndim != 1 or x.size == 0 or not np.isfinite(x).all() or (x < 0).any() or (not allow_zero and (x == 0).any()):
        raise ValueError(f"{name} must be a sequence of finite numbers {'>= 0' if allow_zero else '> 0'}, got {x!r}")
    return x


def steps_from_weights(weights) -> np.ndarray:
    """eta_t = w_t sum_{p > t} w_p / sum_p w_p: the tail *after* t, so that the last step is 0."""  # Theorem 1
    w = _positive("weights", weights)
    tail = np.concatenate([np.cumsum(w[::-1])[-2::-1], [0.0]])
    return w * tail / w.sum()


def bound(weights, norms, distance) -> float:
    """(D^2 + sum w_t^2 |g_t|^2) / (2 sum w_t): no less than f(x_T) - f_* after the steps of these weights."""
    w, g = _positive("weights", weights), _positive("norms", norms, allow_zero=True)
    return float((distance ** 2 + (w ** 2 * g ** 2).sum()) / (2 * w.sum()))


def best_weights(norms, distance) -> np.ndarray:
    """The weights that minimize `bound`: D |g_t|^-2 / sqrt(sum_p |g_p|^-2)."""
    inverse = _positive("norms", norms) ** -2.0
    return distance * inverse / np.sqrt(inverse.sum())


def smooth(norms, tau=0.1) -> np.ndarray:
    """Running median over about tau T entries (an odd number of them)."""
    g = _positive("norms", norms)
    if not 0.0 <= tau < 1.0:
        raise ValueError(f"tau must lie in [0, 1), got {tau!r}")
    half = int(tau * len(g)) // 2
    if half == 0:
        return g
    padded = np.concatenate([np.full(half, g[0]), g, g[-2:-half - 2:-1]])
    return median_filter(padded, size=2 * half + 1)[half:-half]


def refine(norms, tau=0.1, power=2.0) -> np.ndarray:
    """The refined schedule [T], largest entry 1: weights are smoothed norms to the -power (2 for SGD, 1 for Adam-like)."""
    factors = steps_from_weights(smooth(norms, tau) ** -float(power))
    return factors / factors.max()


def linear_decay(T) -> np.ndarray:
    """1 - t/T over its largest entry: what constant norms give."""
    return refine(np.ones(T), tau=0.0)


def cosine(T) -> np.ndarray:
    """(1 + cos(pi t / T)) / 2 for t = 0, ..., T - 1."""
    return (1 + np.cos(np.pi * np.arange(T) / T)) / 2


def _bound_any(eta, g2, D):
    """The bound for any schedule, as a torch scalar.  eta, g2: [T]"""
    S, q = eta.flip(0).cumsum(0).flip(0), (eta ** 2 * g2).flip(0).cumsum(0).flip(0)
    return (D ** 2 + q[0]) / (2 * S[0]) + 0.5 * (eta[:-1] * q[:-1] / (S[:-1] * S[1:])).sum()


def bound_any(factors, norms, distance) -> float:
    """The bound for step sizes of any shape (all positive, the last one too)."""  # Theorem 2
    eta, g = _positive("factors", factors), _positive("norms", norms, allow_zero=True)
    return float(_bound_any(torch.from_numpy(eta), torch.from_numpy(g ** 2), distance))


def refine_any(norms, distance) -> np.ndarray:
    """Step sizes [T] that minimize `bound_any`, by L-BFGS from D / (|g| sqrt(T))."""
    g = _positive("norms", norms)
    g2, floor = torch.from_numpy(g ** 2), 1e-8

    def objective(eta):
        x = torch.from_numpy(eta).requires_grad_()
        value = _bound_any(x, g2, distance)
        return value.item(), torch.autograd.grad(value, x)[0].numpy()
    start = np.full(len(g), distance / (np.sqrt(np.mean(g ** 2)) * np.sqrt(len(g))))
    return minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(floor, None)] * len(g), options={"maxiter": 5000, "maxfun": 10_000}).x


def log_norms(optimizer, p=2.0) -> list:
    """Start to log the p-norm of the whole gradient before every step of a torch optimizer; returns the growing list."""
    norms = []

    def hook(opt, args, kwargs):
        grads = [x.grad for group in opt.param_groups for x in group["params"] if x.grad is not None]
        norms.append(torch.stack([torch.linalg.vector_norm(x, p) for x in grads]).norm(p).item())
    optimizer.register_step_pre_hook(hook)
    return norms


class Replay(LRScheduler):
    """Multiplies the learning rate of step t by factors[t]; after the last factor the rate is 0."""

    def __init__(self, optimizer, factors, last_epoch=-1):
        self.factors = _positive("factors", factors, allow_zero=True).tolist()
        super().__init__(optimizer, last_epoch)

    def get_lr(self):
        factor = self.factors[self.last_epoch] if self.last_epoch < len(self.factors) else 0.0
        return [base * factor for base in self.base_lrs]
