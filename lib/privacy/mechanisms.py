"""Noise that protects people, and the account of what it costs.

A query with sensitivity D (the most that one person can change it: in l1 norm for Laplace, in l2 norm for Gaussian noise) is published with noise in proportion to D:

    Laplace(D / eps)                            eps-DP                         (Dwork et al., 2006)
    N(0, sigma^2),   rho = D^2 / (2 sigma^2)    rho-zCDP                       (Bun and Steinke, 2016)
    exponential mechanism, e^(eps q / 2 D)      eps-DP, and eps^2/8-zCDP       (McSherry and Talwar, 2007; Cesar and Rogers, 2021)

zCDP adds up: k releases of rho each cost k rho. At the end rho is turned into (eps, delta) by the bound of Canonne, Kamath and Steinke (2020).

| symbol | name | shape |
|---|---|---|
| D | `sensitivity` | scalar, in units of the query |
| eps, delta | `epsilon`, `delta` | scalars |
| rho | `rho` | scalar, zCDP |
| g | `grid` | scalar, in units of the query |

*Floating point.* Noise made by an inverse transform in floating point reaches only some numbers, and which ones depends on the value underneath: a reader of the last bits learns the value (Mironov, 2012). `laplace` with a `grid` rounds
the value to multiples of g first and adds a whole number of ticks (two-sided geometric); rounding can move two neighbours one tick further apart a coordinate, so the scale is widened for that. Without `grid`, and for `gaussian`, the
hazard remains: fit for teaching and for simulations. *Clamp before noise, never after debiasing*: clamping a released estimate is harmless to privacy but biases it.

Randomness: a generator that is passed repeats an experiment; without one, ChaCha20 with a fresh 256-bit key of the operating system.
"""
import itertools
import math

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import log_ndtr

from .oracles import check_epsilon, check_rng


def check_positive(name, x) -> float:
    """A finite number > 0, as float. Raises ValueError that names the argument."""
    if isinstance(x, bool) or not isinstance(x, (int, float, np.number)) or not (math.isfinite(x) and x > 0):
        raise ValueError(f"{name}={x!r}: expected a finite number > 0")
    return float(x)


def check_delta(delta) -> float:
    """0 < delta < 1, as float. Raises ValueError."""
    if isinstance(delta, bool) or not isinstance(delta, (int, float, np.number)) or not 0 < delta < 1:
        raise ValueError(f"delta={delta!r}: expected 0 < delta < 1")
    return float(delta)


def check_finite(name, x) -> np.ndarray:
    """x as a float array without NaN or infinity. Raises ValueError."""
    x = np.asarray(x, dtype=float)
    if not np.isfinite(x).all():
        raise ValueError(f"{name} contains {x[~np.isfinite(x)].flat[0]}: expected finite numbers")
    return x


# --- mechanisms

def laplace(values, sensitivity, epsilon, rng=None, grid=None) -> np.ndarray:
    """values + Laplace noise of scale `sensitivity / epsilon`: eps-DP for an l1 sensitivity. With `grid`: multiples of it, safe to the last bit.

    values: any shape. Rounding costs a factor of 1 + grid * (number of values) / sensitivity in scale: take a fine grid, a power of two such as 2**-10. Raises ValueError for a bad sensitivity, epsilon, grid or value.
    """
    values, d, eps, rng = check_finite("values", values), check_positive("sensitivity", sensitivity), check_epsilon(epsilon), check_rng(rng)
    if grid is None:
        return values + rng.laplace(0.0, d / eps, values.shape)
    grid = check_positive("grid", grid)
    ticks = d / grid + values.size                                             # rounding adds up to half a tick at each end of each coordinate
    stop = -math.expm1(-eps / ticks)                                           # P(noise = z) ~ e^(-eps |z| / ticks): a difference of two geometrics
    noise = rng.geometric(stop, values.shape) - rng.geometric(stop, values.shape)
    return (np.rint(values / grid) + noise) * grid


def gaussian(values, sensitivity, rho, rng=None) -> np.ndarray:
    """values + N(0, sensitivity^2 / (2 rho)): rho-zCDP for an l2 sensitivity. values: any shape. Raises as `laplace` does."""
    values, sigma, rng = check_finite("values", values), gaussian_sigma(sensitivity, rho), check_rng(rng)
    return values + rng.normal(0.0, sigma, values.shape)


def exponential_probabilities(scores, sensitivity, epsilon) -> np.ndarray:
    """Law of the exponential mechanism over the last axis: softmax(eps scores / (2 sensitivity)). scores: (..., m)"""
    z = check_epsilon(epsilon) * check_finite("scores", scores) / (2 * check_positive("sensitivity", sensitivity))
    weights = np.exp(z - z.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def exponential_mechanism(scores, sensitivity, epsilon, rng=None) -> np.ndarray:
    """An index of the last axis drawn from `exponential_probabilities`: the largest score after Gumbel noise. scores: (..., m) -> (...)"""
    z = check_epsilon(epsilon) * check_finite("scores", scores) / (2 * check_positive("sensitivity", sensitivity))
    return (z + check_rng(rng).gumbel(size=z.shape)).argmax(axis=-1)


# --- the account

def gaussian_sigma(sensitivity, rho) -> float:
    """Standard deviation that makes a release of this l2 sensitivity cost rho."""
    return check_positive("sensitivity", sensitivity) / math.sqrt(2 * check_positive("rho", rho))


def gaussian_rho(sensitivity, sigma) -> float:
    """zCDP cost of Gaussian noise with this standard deviation."""
    return check_positive("sensitivity", sensitivity) ** 2 / (2 * check_positive("sigma", sigma) ** 2)


def pure_rho(epsilon) -> float:
    """zCDP cost of an eps-DP release: eps^2 / 2 (Bun and Steinke, 2016, Prop. 1.4)."""
    return check_epsilon(epsilon) ** 2 / 2


def exponential_rho(epsilon) -> float:
    """zCDP cost of the exponential mechanism, whose loss has a bounded range: eps^2 / 8 (Cesar and Rogers, 2021)."""
    return check_epsilon(epsilon) ** 2 / 8


def zcdp_epsilon(rho, delta) -> float:
    """The epsilon of a rho-zCDP release at this delta, by the best Renyi order a > 1 (Canonne, Kamath and Steinke, 2020, Cor. 13):

        eps = a rho + (ln(1/delta) + (a - 1) ln(1 - 1/a) - ln a) / (a - 1),   at least 0
    """
    rho, log = check_positive("rho", rho), -math.log(check_delta(delta))
    def at(t):                                                                 # a = 1 + e^t
        less = math.exp(t)
        a = 1 + less
        return a * rho + (log + less * math.log(less / a) - math.log(a)) / less
    middle = 0.5 * math.log(log / rho)                                         # the minimum without the two small terms
    return max(0.0, minimize_scalar(at, bounds=(middle - 8, middle + 8), method="bounded", options={"xatol": 1e-10}).fun)


def zcdp_rho(epsilon, delta) -> float:
    """The largest rho whose `zcdp_epsilon` at this delta is not above epsilon."""
    epsilon, delta = check_epsilon(epsilon), check_delta(delta)
    high = epsilon + 1.0                                                       # eps >= rho once rho >= 1: the bracket holds the answer
    while zcdp_epsilon(high, delta) < epsilon:
        high *= 2
    low = 1e-12 * high
    return brentq(lambda r: zcdp_epsilon(r, delta) - epsilon, low, high, xtol=1e-15, rtol=1e-12) * (1 - 1e-10)      # never above


def gaussian_delta(noise_multiplier, epsilon) -> float:
    """Exact delta of one Gaussian release with sigma = noise_multiplier * sensitivity (Balle and Wang, 2018, Thm. 8)."""
    m, eps = check_positive("noise_multiplier", noise_multiplier), check_epsilon(epsilon)
    a, b = 1 / (2 * m) - eps * m, -1 / (2 * m) - eps * m
    return math.exp(log_ndtr(a)) - math.exp(eps + log_ndtr(b))


class Budget:
    """An account of zCDP: `spend` before each release, and no more than `rho` in all."""

    def __init__(self, rho):
        self.rho, self.spent = check_positive("rho", rho), 0.0

    @property
    def left(self) -> float:
        """What may still be spent."""
        return max(0.0, self.rho - self.spent)

    def spend(self, rho) -> float:
        """Books rho and returns it. Raises ValueError, and books nothing, if less than that is left (beyond rounding: 1e-9 of the whole)."""
        rho = check_positive("rho", rho)
        if self.spent + rho > self.rho * (1 + 1e-9):
            raise ValueError(f"rho={rho!r}: the budget is exhausted, {self.left:.4g} of {self.rho:.4g} is left")
        self.spent += rho
        return rho

    def epsilon(self, delta) -> float:
        """What has been spent so far, as epsilon at this delta."""
        return zcdp_epsilon(self.spent, delta) if self.spent else 0.0


def sensitivity(query, domain, n, order=1, relation="replace") -> float:
    """The exact sensitivity of `query` by enumeration of all neighbouring data sets of n records; for small domains.

    query: list of records -> array; domain: the records there are; order: 1 or 2, the norm; relation: "replace" one record, or "add" one to n.
    The query is asked for len(domain)^n data sets (and domain times as many for "add"). Raises ValueError for another order or relation.
    """
    if order not in (1, 2) or relation not in ("replace", "add"):
        raise ValueError(f"order={order!r}, relation={relation!r}: expected 1 or 2, 'replace' or 'add'")
    domain = list(domain)
    answers = {s: np.atleast_1d(np.asarray(query([domain[i] for i in s]), dtype=float)).ravel() for s in itertools.product(range(len(domain)), repeat=n)}
    worst = 0.0
    for s, a in answers.items():
        for i, new in itertools.product(range(n) if relation == "replace" else [n], range(len(domain))):
            other = s[:i] + (new,) + s[i + 1:]
            b = answers[other] if relation == "replace" else np.atleast_1d(np.asarray(query([domain[j] for j in other]), dtype=float)).ravel()
            worst = max(worst, float(np.linalg.norm(a - b, order)))
    return worst


# --- what estimators of noisy quantities share

def soft_threshold(x, threshold) -> np.ndarray:
    """sign(x) max(|x| - threshold, 0), element by element: the proximal map of threshold * ||x||_1. Raises ValueError for a threshold < 0."""
    x, threshold = np.asarray(x, dtype=float), np.asarray(threshold, dtype=float)
    if not (threshold >= 0).all():
        raise ValueError(f"threshold={threshold!r}: expected numbers >= 0")
    return np.sign(x) * np.maximum(np.abs(x) - threshold, 0.0)
