"""The Price of Differential Privacy under Continual Observation (2021, arXiv:2112.00828).

People arrive one by one, each with d bits, and after every arrival a private answer is due: the largest of the d running sums (MaxSum), or its coordinate (SumSelect).
Two mechanisms, both private for streams that are chosen in answer to their outputs: a counter of noisy tree nodes, and the batch answer again after every r arrivals.

| symbol | name | shape |
|---|---|---|
| T, d, rho | `T`, `d`, `rho` | arrivals, bits of each, zCDP of the whole run for one person replaced |
| x_1..x_T | `x` | (T, d) 0/1, in pieces (m, d) of any length |
| node t | `tree_nodes(x)[t-1]` | (T, d): the sum of x over (t - lowest bit of t, t] |
| sigma | `sigma` | standard deviation of the noise on a node, or on a batch answer |
| r, K | `r`, `K` | arrivals between two batch answers, K = floor(T / r) of these |

Deviations from the paper: its text was not readable beyond the abstract. Both mechanisms are standard and are derived here: their constants are ours, not the paper's. A tree has two nodes an
arrival. Prefixes use the left ones only, one an arrival, and only these get noise. For T that is no power of two that is floor(log2 T) + 1 nodes a person at most, not ceil(log2 T) + 1.
Cost: d numbers drawn and 2 d additions an arrival, d log2 T numbers kept; a batch answer costs d.
"""
import math

import numpy as np

from .mechanisms import Budget, check_positive, exponential_mechanism, gaussian, gaussian_sigma
from .oracles import check_rng


def _integer(name, value, low, high=math.inf):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={value!r}: expected an integer")
    if not low <= value <= high:
        raise ValueError(f"{name}={value!r}: expected {low} <= {name} <= {high}")
    return int(value)


def check_bits(x, d=None) -> np.ndarray:
    """x as (m, d) floats that are 0 or 1, m >= 1. Raises ValueError, also for NaN."""
    x = np.asarray(x)
    if x.ndim != 2 or 0 in x.shape or d not in (None, x.shape[1]):
        raise ValueError(f"x has shape {x.shape}: expected (m, {'d' if d is None else d}) with m >= 1")
    wrong = ~((x == 0) | (x == 1))
    if wrong.any():
        raise ValueError(f"x contains {x[wrong][0]}: expected 0 or 1")
    return x.astype(float)


# --- the tree

def tree_nodes(x) -> np.ndarray:
    """The sums that a prefix is made of, (T, d) -> (T, d). Node t covers the last 2^h arrivals before and with t, where 2^h is the lowest bit of t."""
    x = check_bits(x)
    prefix = np.vstack([np.zeros_like(x[:1]), np.cumsum(x, axis=0)])
    t = np.arange(1, len(prefix))
    return prefix[t] - prefix[t & (t - 1)]                                     # t & (t - 1): t without its lowest bit


def path_sensitivity(T, d) -> float:
    """l2 norm of the change of all T nodes when one person is replaced: person 1 is in nodes 1, 2, 4, ... <= T, others in no more, each bit may flip."""
    return math.sqrt(_integer("d", d, 1) * _integer("T", T, 1).bit_length())


class _Stream:
    """T arrivals of d bits, the running sums, and what may be asked of both."""

    def __init__(self, T, d, rho, budget, rng):
        self.T, self.d, self.rho = _integer("T", T, 1), _integer("d", d, 1), check_positive("rho", rho)
        if budget is not None and not isinstance(budget, Budget):
            raise TypeError(f"budget={budget!r}: expected a Budget or None")
        self.budget, self.rng = budget or Budget(self.rho), check_rng(rng)
        self.t, self.sums = 0, np.zeros(self.d)

    def _prefixes(self, x):
        """The exact running sums after each of the new arrivals, (m, d)."""
        x = check_bits(x, self.d)
        if self.t + len(x) > self.T:
            raise ValueError(f"x has {len(x)} arrivals: the budget is for T={self.T}, of which {self.T - self.t} are left")
        return self.sums + np.cumsum(x, axis=0)


class TreeCounter(_Stream):
    """All d running sums after every arrival, rho-zCDP in all; `maxsum` and `sumselect` of them cost nothing more.

    T, d: integers >= 1; rho > 0, spent at once from `budget` if one is given. Raises ValueError/TypeError, and spends nothing then.
    """

    def __init__(self, T, d, rho, budget=None, rng=None):
        super().__init__(T, d, rho, budget, rng)
        self.sigma = gaussian_sigma(path_sensitivity(self.T, self.d), self.rho)
        self.path = np.zeros((self.T.bit_length(), self.d))                    # path[h]: noise of the prefix of length t, with the last h bits of t set to 0
        self.budget.spend(self.rho)

    def observe(self, x) -> np.ndarray:
        """Noisy sums after each new arrival: (m, d) bits -> (m, d).

        Raises ValueError for bad bits or more than T arrivals; nothing is drawn or counted then.
        """
        prefixes = self._prefixes(x)
        m, noise = len(prefixes), np.empty_like(prefixes)
        z = self.rng.normal(0.0, self.sigma, (m, self.d))        # a node closes at each arrival
        for h in reversed(range(len(self.path))):
            step = 1 << h
            rows = np.arange((step - self.t - 1) % (2 * step), m, 2 * step)  # lowest bit of t: 2^h
            if len(rows):
                before = noise[(rows - step).clip(0)]            # the prefix before the node
                if rows[0] < step:
                    before[0] = self.path[h]                 # ... of an earlier call
                noise[rows] = before + z[rows]
        for h in range(len(self.path)):
            row = ((self.t + m) >> h << h) - self.t - 1
            if row >= 0:
                self.path[h] = noise[row]
        self.t, self.sums = self.t + m, prefixes[-1]
        return prefixes + noise


def maxsum(sums) -> np.ndarray:
    """The largest coordinate, (m, d) -> (m,)"""
    return np.max(sums, axis=1)


def sumselect(sums) -> np.ndarray:
    """The first of the largest coordinates, (m, d) -> (m,) integers"""
    return np.argmax(sums, axis=1)


# --- the batch answer, again and again

def block_length(T, rho) -> int:
    """(T / rho)^(1/3), rounded: where waiting (r) and noise (sqrt(T / (r rho))) are of one size."""
    return max(1, min(_integer("T", T, 1), round((T / check_positive("rho", rho)) ** (1 / 3))))


class Recompute(_Stream):
    """The batch answer about *all* arrivals so far at t = r, 2r, ..., held in between; 0 before the first. rho-zCDP in all.

    problem: "max" (Gaussian noise) or "select" (exponential mechanism); r: 1..T, `block_length(T, rho)` by default; each answer spends rho / K of `budget`. Raises ValueError/TypeError.
    """

    def __init__(self, T, d, rho, r=None, problem="max", budget=None, rng=None):
        super().__init__(T, d, rho, budget, rng)
        if problem not in ("max", "select"):
            raise ValueError(f"problem={problem!r}: expected 'max' or 'select'")
        self.problem, self.r = problem, block_length(T, rho) if r is None else _integer("r", r, 1, self.T)
        self.K = self.T // self.r
        self.sigma = gaussian_sigma(1.0, self.rho / self.K)                    # one person changes each sum by at most 1, and so the largest
        self.epsilon = math.sqrt(8 * self.rho / self.K)                        # an exponential mechanism of epsilon is epsilon^2/8-zCDP
        self.held = 0

    def observe(self, x) -> np.ndarray:
        """Answers after each new arrival: (m, d) bits -> (m,).

        Raises ValueError for bad bits, more than T arrivals or an exhausted budget; nothing changes then.
        """
        prefixes = self._prefixes(x)
        due = prefixes[self.r - 1 - self.t % self.r::self.r]                   # sums at the multiples of r
        held = np.array([self.held])
        if len(due):
            self.budget.spend(len(due) * self.rho / self.K)
            if self.problem == "max":
                fresh = gaussian(maxsum(due), 1.0, self.rho / self.K, self.rng)
            else:
                fresh = exponential_mechanism(due, 1.0, self.epsilon, self.rng)
            held = np.concatenate([held, fresh])
        age = (self.t % self.r + 1 + np.arange(len(prefixes))) // self.r       # how many of this call's answers are out
        self.t, self.sums, self.held = self.t + len(prefixes), prefixes[-1], held[-1]
        return held[age]


# --- how wrong

def max_error(answers, x) -> float:
    """MaxSum: the largest difference to the truth over all times. answers: (T,); x: (T, d)"""
    return float(np.abs(answers - maxsum(np.cumsum(check_bits(x), axis=0))).max())


def select_error(choices, x) -> float:
    """SumSelect: the most by which the chosen sum is below the largest one, over all times. choices: (T,) integers; x: (T, d)"""
    sums = np.cumsum(check_bits(x), axis=0)
    return float((maxsum(sums) - np.take_along_axis(sums, np.asarray(choices)[:, None], axis=1)[:, 0]).max())


# --- behind the lower bound

def encode_marginals(y) -> np.ndarray:
    """(n, d) records -> a stream of n (2d + 1) arrivals whose MaxSum shows every column sum of y: the records, then for each j n times e_j and n times 1 - e_j."""
    y = check_bits(y)
    n, unit = len(y), np.eye(y.shape[1])
    return np.concatenate([y, np.repeat(np.stack([unit, 1 - unit], axis=1).reshape(-1, y.shape[1]), n, axis=0)])


def decode_marginals(answers, n, d) -> np.ndarray:
    """The column sums of y from MaxSum answers on `encode_marginals(y)`, (d,): after the n-th e_j coordinate j leads, with j n on top of its sum in y (j = 1..d)."""
    j = np.arange(1, _integer("d", d, 1) + 1)
    return np.asarray(answers)[2 * j * _integer("n", n, 1) - 1] - j * n
