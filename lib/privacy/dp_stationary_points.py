"""Faster Rates of Convergence to Stationary Points in Differentially Private Optimization (2022, arXiv:2206.00846).

Private SpiderBoost: a noisy gradient is taken seldom (an *anchor*); in between, the estimate is carried on by noisy gradient *differences* (variations). A difference between
two near points changes little when one record is replaced, so it needs noise in proportion to the step only. With q = 1 there are only anchors: noisy gradient descent.

| symbol | name | shape |
|---|---|---|
| w_t | `w0`, `path` | (..., d): the leading axes are independent runs, each of which costs `rho` |
| n; b1, b2 | `n`, `b1`, `b2` | records; batch of an anchor and of a variation |
| L0, L1 | `L0`, `L1` | scalars: every f(.; x) is L0-Lipschitz with an L1-Lipschitz gradient |
| T, q | `T`, `q` | the loop runs over t = 0, ..., T; an anchor at every q-th t |
| eta | `lr` | step size, 1 / (2 L1) by default |
| nabla_t | `estimates` | (T + 1, ..., d) |
| sigma_1, sigma_2, hat sigma_2 | `scales(...)` | the paper's calibration, up to a constant c |
| rho | `rho` | zCDP of the whole run; a share `anchor_share` of it is for the anchors |

Deviations from the paper: noise is set from a zCDP account with explicit constants (neighbours: one record replaced; an exact sum, no amplification by sampling) in place of an
unnamed constant; half of rho goes to the anchors, which has the proportions of the paper's scales for full batches; the noise of a variation is capped where a difference of two
gradients is (2 L0), so that one cost covers every step. L0 and L1 are taken on trust, as in the paper: nothing is clipped. The variants with trees, for convex losses, and for
generalized linear models are not here.
Cost: b1 gradients of one record for an anchor, 2 b2 for a variation.
"""
import math
from dataclasses import dataclass

import numpy as np

from .mechanisms import Budget, check_delta, check_finite, check_positive, gaussian
from .oracles import check_epsilon, check_rng


class GemanMcClure:
    """Robust, non-convex regression: the mean over records of s^2 / (2 (1 + s^2)), s = <w, x> - y. Every record of norm |x| <= 1 keeps the constants L0 and L1, which are attained.

    X: (n, d), rows of norm <= 1; y: (n,). Raises ValueError for a longer row (with it the constants and the privacy would be wrong), another shape or NaN.
    """
    L0, L1 = 3 * math.sqrt(3) / 16, 1.0                                    # at s = 1 / sqrt(3), and at s = 0

    def __init__(self, X, y):
        self.X, self.y = check_finite("X", X), check_finite("y", y)
        if self.X.ndim != 2 or self.y.shape != self.X.shape[:1]:
            raise ValueError(f"X has shape {self.X.shape}, y {self.y.shape}: expected (n, d) and (n,)")
        longest = np.linalg.norm(self.X, axis=1).max()
        if longest > 1 + 1e-9:
            raise ValueError(f"X has a row of norm {longest:.4g}: expected at most 1")

    def gradient(self, w, batch=slice(None)) -> np.ndarray:
        """Mean gradient (..., d) over a batch at w (..., d)."""
        X = self.X[batch]
        s = w @ X.T - self.y[batch]                                        # (..., b)
        return (s / (1 + s * s) ** 2) @ X / len(X)

    def value(self, w) -> np.ndarray:
        """F(w), (...)."""
        s = w @ self.X.T - self.y
        return (s * s / (2 + 2 * s * s)).mean(axis=-1)


def anchor_sensitivity(L0, b) -> float:
    """How far the mean of b gradients moves when one record is replaced, at most."""
    return 2 * L0 / b


def variation_sensitivity(L0, L1, step, b) -> np.ndarray:
    """The same for the mean of b differences of gradients at two points that are `step` apart: (...) -> (...). Two gradients differ by 2 L0 at most, however far the points."""
    return 2 * np.minimum(L1 * np.asarray(step), 2 * L0) / b


def releases(T, q) -> tuple[int, int]:
    """(anchors, variations) of the loop t = 0, ..., T."""
    anchors = -(-(T + 1) // q)
    return anchors, T + 1 - anchors


def scales(n, T, q, b1, b2, L0, L1, epsilon, delta, c=1.0) -> tuple[float, float, float]:
    """(sigma_1, sigma_2, hat sigma_2) of the paper: an anchor gets sigma_1, a variation min(sigma_2 step, hat sigma_2). c stands for the constant that the paper leaves open."""
    unit = c * math.sqrt(math.log(1 / check_delta(delta))) / check_epsilon(epsilon)
    seldom, often = max(1 / b1, math.sqrt(T / q) / n), max(1 / b2, math.sqrt(T) / n)
    return unit * L0 * seldom, unit * L1 * often, unit * L0 * often


@dataclass(frozen=True)
class Run:
    """What a run publishes (all of it is private at the cost of `rho`), and what it took."""
    w: np.ndarray                  # (..., d), uniform among w_1, ..., w_T
    path: np.ndarray               # (T + 2, ..., d): w_0, ..., w_{T+1}; the last one carries no guarantee of the paper
    estimates: np.ndarray          # (T + 1, ..., d)
    sigma: np.ndarray              # (T + 1, ...): standard deviation of the noise that was added at t
    rho: float                     # spent
    anchors: int
    gradients: int                 # of one record at one point


def _integer(name, value, low, high) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={value!r}: expected an integer")
    if not low <= value <= high:
        raise ValueError(f"{name}={value!r}: expected {low} <= {name} <= {high}")
    return int(value)


def _checked(mean, shape) -> np.ndarray:
    mean = check_finite("gradient", mean)
    if mean.shape != shape:
        raise ValueError(f"gradient has shape {mean.shape}: expected that of w0, {shape}")
    return mean


def private_spiderboost(gradient, w0, n, L0, L1, rho, T, q, lr=None, b1=None, b2=None, anchor_share=0.5, budget=None, rng=None) -> Run:
    """Algorithm 2 of the paper, rho-zCDP for replaced records.

    gradient(w, batch): mean gradient (..., d) at w (..., d) over the records `batch` (a slice, or an array of indices without repetition).
    n: number of records; L0, L1: constants of the loss of *every possible* record, not estimated from these (a public term may be added to the gradient: it is the same for all
    records and cannot give one away); T >= 1; 1 <= q; b1, b2: 1 to n, all records by default;
    anchor_share: share of rho for the anchors, 0 < share < 1 (ignored where there are only anchors, as for q = 1); budget: a `Budget` that pays, or None.
    Runs in leading axes share their batches. Raises ValueError/TypeError before anything is drawn or spent; also if a gradient is not finite.
    """
    n, T = _integer("n", n, 1, math.inf), _integer("T", T, 1, math.inf)
    q, w = _integer("q", q, 1, math.inf), check_finite("w0", w0)
    b1, b2 = (n if b is None else _integer(name, b, 1, n) for name, b in (("b1", b1), ("b2", b2)))
    L0, L1, rho = check_positive("L0", L0), check_positive("L1", L1), check_positive("rho", rho)
    lr, rng = 1 / (2 * L1) if lr is None else check_positive("lr", lr), check_rng(rng)
    if not 0 < anchor_share < 1:
        raise ValueError(f"anchor_share={anchor_share!r}: expected 0 < anchor_share < 1")
    if w.ndim < 1:
        raise ValueError(f"w0 has shape {w.shape}: expected (..., d)")
    if not callable(gradient):
        raise TypeError(f"gradient={gradient!r}: expected a function of w and batch")
    budget = Budget(rho) if budget is None else budget
    if not isinstance(budget, Budget):
        raise TypeError(f"budget={budget!r}: expected a Budget or None")
    if rho > budget.left * (1 + 1e-9):
        raise ValueError(f"rho={rho!r}: the budget is exhausted, {budget.left:.4g} is left")
    anchors, variations = releases(T, q)
    share = anchor_share if variations else 1.0
    rho_anchor, rho_variation = share * rho / anchors, (1 - share) * rho / max(variations, 1)

    path, estimates, sigma, spent, work = [w], [], [], 0.0, 0
    for t in range(T + 1):
        anchor = t % q == 0
        b, cost = (b1, rho_anchor) if anchor else (b2, rho_variation)
        if anchor:
            reach = np.full(w.shape[:-1], anchor_sensitivity(L0, b))
        else:
            step = np.linalg.norm(path[-1] - path[-2], axis=-1)            # (...)
            reach = variation_sensitivity(L0, L1, step, b)
        # the scale of the noise is settled; it is paid for and drawn
        spent += budget.spend(cost)
        noise = reach[..., None] * gaussian(np.zeros(w.shape), 1.0, cost, rng)
        # and only now the records are read, twice the same for a variation
        batch = slice(None) if b == n else rng.choice(n, b, replace=False)
        mean = _checked(gradient(path[-1], batch), w.shape)
        if not anchor:
            mean = mean - gradient(path[-2], batch)
        released = mean + noise
        estimates.append(released if anchor else estimates[-1] + released)
        path.append(path[-1] - lr * estimates[-1])
        sigma.append(reach / math.sqrt(2 * cost))
        work += b if anchor else 2 * b
    path = np.array(path)
    chosen = rng.integers(1, T + 1, w.shape[:-1])                          # not the last one, and w_0 neither
    out = np.take_along_axis(path, chosen[None, ..., None], axis=0)[0]
    return Run(out, path, np.array(estimates), np.array(sigma), spent, anchors, work)
