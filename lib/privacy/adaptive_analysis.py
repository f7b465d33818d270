"""Preserving Statistical Validity in Adaptive Data Analysis (2014, arXiv:1411.2664).

An analyst asks for the means of functions phi with values in [0, 1], each chosen after the answers to earlier ones. A sample of n that answers with its own means is soon fitted. Answers
that keep the sample private stay near the population's means: noise on every answer, or private multiplicative weights (PMW), which pays only for answers that it could not guess.
`Thresholdout`, from the companion paper (Generalization in Adaptive Data Analysis and Holdout Reuse, 2015, arXiv:1506.02629), is PMW's test with a training set in the place of the guess.

| symbol | name | shape |
|---|---|---|
| n, m | `n`, `m` | sample size, number of queries |
| phi(x_1)..phi(x_n) | `values` | (n,) or (n, k) in [0, 1], k queries at once |
| a_j | `answer(...)` | scalar or (k,) |
| S, D_t | `sample`, `D` | (N,) distributions over the N elements of a universe |
| T, eta, c | `threshold`, `eta`, `updates` | scalars; c updates are paid for |
| rho | `rho` | zCDP of all answers together, for one of the n elements replaced |

Deviations from the paper: its text was not readable beyond the first page. zCDP takes the place of strong composition. The test's noise is not used again in the answer, which would not be covered
by the proof of the sparse vector technique: a threshold noise Lap(2 s), a fresh Lap(4 s) at each query and a fresh Lap(s) on an answer, s = 1 / (n epsilon), cost 2 epsilon until the test succeeds.
Cost: n a query; PMW N a query.
"""
import math

import numpy as np
from scipy.special import ndtr

from .mechanisms import Budget, check_positive, gaussian, laplace, pure_rho
from .oracles import check_epsilon, check_rng


def _integer(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={value!r}: expected an integer")
    if value < 1:
        raise ValueError(f"{name}={value!r}: expected an integer >= 1")
    return int(value)


def check_query(name, values, rows) -> np.ndarray:
    """Values of queries, (rows,) or (rows, k), as floats in [0, 1]. Raises ValueError, also for NaN."""
    values = np.asarray(values, dtype=float)
    if values.ndim not in (1, 2) or values.shape[0] != rows or values.size == 0:
        raise ValueError(f"{name} has shape {values.shape}: expected ({rows},) or ({rows}, k)")
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"{name} lies in [{values.min():g}, {values.max():g}]: expected numbers in [0, 1]")
    return values


def _budget(budget, rho):
    if budget is not None and not isinstance(budget, Budget):
        raise TypeError(f"budget={budget!r}: expected a Budget or None")
    return Budget(rho) if budget is None else budget


# --- noise on every answer

class NoisyAnswers:
    """Means of a sample of n with noise for m queries in all, rho-zCDP together.

    noise: "gaussian", sigma = sqrt(m / (2 rho)) / n; or "laplace", epsilon_0 = sqrt(2 rho / m) a query. Raises ValueError/TypeError.
    """

    def __init__(self, n, m, rho, noise="gaussian", budget=None, rng=None):
        self.n, self.m, self.rho = _integer("n", n), _integer("m", m), check_positive("rho", rho)
        if noise not in ("gaussian", "laplace"):
            raise ValueError(f"noise={noise!r}: expected 'gaussian' or 'laplace'")
        self.noise, self.rng, self.budget = noise, check_rng(rng), _budget(budget, self.rho)

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise: the same for both kinds up to sqrt(2)."""
        return math.sqrt(self.m / (2 * self.rho)) / self.n * (1.0 if self.noise == "gaussian" else math.sqrt(2))

    def answer(self, values):
        """Noisy means over the sample: (n,) -> scalar, (n, k) -> (k,). Raises ValueError for bad values or an exhausted budget; nothing is released then."""
        means = check_query("values", values, self.n).mean(axis=0)
        self.budget.spend(means.size * self.rho / self.m)
        if self.noise == "gaussian":
            return gaussian(means, 1 / self.n, self.rho / self.m, self.rng)
        return laplace(means, 1 / self.n, math.sqrt(2 * self.rho / self.m), self.rng)


# --- noise where a guess was wrong

class SparseVector:
    """Says which of many values lie above a threshold, `count` times, and releases a noisy answer each time.

    sensitivity: of the values; epsilon: of a test that runs until it succeeds, and of an answer. Each success costs 2 pure_rho(epsilon), paid in advance. Raises ValueError/TypeError.
    """

    def __init__(self, sensitivity, epsilon, threshold, count, budget=None, rng=None):
        self.epsilon, self.threshold, self.left = check_epsilon(epsilon), check_positive("threshold", threshold), _integer("count", count)
        s = check_positive("sensitivity", sensitivity) / self.epsilon
        self.scales = {"threshold": 2 * s, "value": 4 * s, "answer": s}
        self.rng, self.budget = check_rng(rng), _budget(budget, 2 * self.left * pure_rho(self.epsilon))
        self._start()

    def _start(self):
        self.budget.spend(2 * pure_rho(self.epsilon))
        self.line = self.threshold + self.rng.laplace(0.0, self.scales["threshold"])

    def above(self, value) -> bool:
        """Whether the value, with noise, reaches the noisy threshold. Raises ValueError when `count` successes are used up; nothing is released then."""
        if self.left and self.line is None:
            self._start()
        if not self.left:
            raise ValueError("count=0: the budget is exhausted, expected no further query")
        if value + self.rng.laplace(0.0, self.scales["value"]) < self.line:
            return False
        self.left, self.line = self.left - 1, None                             # the next test, if any, takes a new line
        return True

    def release(self, answer) -> float:
        """A noisy answer, once after each success."""
        return answer + self.rng.laplace(0.0, self.scales["answer"])


class PrivateMultiplicativeWeights:
    """Guesses from a distribution D over a universe of N elements, and corrects D where the sample disagrees.

    counts: (N,) how often each element is in the sample; threshold T; eta, 2 T by default: 4 alpha, where alpha = T / 2 is left when noise has taken T / 2;
    updates: how many corrections are paid for; rho: zCDP of everything. Raises ValueError/TypeError.
    """

    def __init__(self, counts, threshold, updates, rho, eta=None, budget=None, rng=None):
        counts = np.asarray(counts, dtype=float)
        if counts.ndim != 1 or counts.size < 2 or not (np.isfinite(counts).all() and (counts >= 0).all() and (counts == np.floor(counts)).all() and counts.sum() > 0):
            raise ValueError(f"counts={counts!r}: expected (N,) whole numbers >= 0, not all 0, N >= 2")
        self.sample, self.D = counts / counts.sum(), np.full(counts.size, 1 / counts.size)
        self.eta = 2 * check_positive("threshold", threshold) if eta is None else check_positive("eta", eta)
        epsilon = math.sqrt(check_positive("rho", rho) / _integer("updates", updates))       # c (epsilon^2 / 2 + epsilon^2 / 2) = rho
        self.sparse = SparseVector(1 / counts.sum(), epsilon, threshold, updates, _budget(budget, rho), rng)

    def answer(self, phi) -> float:
        """phi: (N,) in [0, 1], a query as a function on the universe. Raises ValueError for a bad query or an exhausted budget; nothing is released then."""
        phi = check_query("phi", phi, len(self.D))
        guess, truth = phi @ self.D, phi @ self.sample
        if not self.sparse.above(abs(guess - truth)):
            return guess
        h = self.sparse.release(truth)
        self.D *= np.exp(self.eta * np.sign(h - guess) * phi)
        self.D /= self.D.sum()
        return h


class Thresholdout:
    """The companion's reusable holdout: answers from the training set where the holdout agrees, and from the holdout, with noise, where not.

    n: size of the holdout; sigma: scale of the noise; B: how often it may disagree, each time at the price of 2 epsilon, epsilon = 1 / (n sigma). Raises ValueError/TypeError.
    """

    def __init__(self, n, threshold, sigma, B, budget=None, rng=None):
        self.n = _integer("n", n)
        self.sparse = SparseVector(1 / self.n, 1 / (self.n * check_positive("sigma", sigma)), threshold, B, budget, rng)

    def answer(self, train, holdout) -> float:
        """train: (n_train,), holdout: (n,): the query's values in [0, 1]. Raises ValueError for bad values or an exhausted budget; nothing is released then."""
        guess, truth = check_query("train", train, len(train)).mean(axis=0), check_query("holdout", holdout, self.n).mean(axis=0)
        return self.sparse.release(truth) if self.sparse.above(abs(guess - truth)) else guess


def update_bound(size, eta, alpha) -> float:
    """Most updates of PMW over `size` elements if each happens at a true gap of alpha at least: ln N / (eta alpha - eta^2 / 8). Raises ValueError."""
    drop = check_positive("eta", eta) * check_positive("alpha", alpha) - eta**2 / 8
    if drop <= 0:
        raise ValueError(f"eta={eta!r}: expected eta < 8 alpha = {8 * alpha:g}")
    return math.log(_integer("size", size)) / drop


# --- the analyst

def overfit(agree, answer):
    """Asks how often each feature agrees with the label, lets the features vote with the signs of the answers, and asks how often that vote is right.

    agree: (n, m) 0/1, m odd so that no vote is tied; answer: values (n,) or (n, k) -> means. Returns (the last answer, the vote's accuracy on the sample, the signs (m,)).
    Where labels are fair coins, independent of the features, the population's accuracy is 1/2, whatever the signs. Raises ValueError.
    """
    agree = np.asarray(agree)
    if agree.ndim != 2 or agree.shape[0] == 0 or agree.shape[1] % 2 == 0 or not ((agree == 0) | (agree == 1)).all():
        raise ValueError(f"agree has shape {agree.shape}: expected (n, m) zeros and ones, n >= 1, m odd")
    signs = np.where(np.asarray(answer(agree)) >= 0.5, 1.0, -1.0).astype(np.float32)
    right = (2 * (agree.astype(np.float32) @ signs) > signs.sum()).astype(float)
    return float(answer(right)), float(right.mean()), signs


def overfit_accuracy(m, n, sigma=0.0):
    """Expected accuracy on the sample of the vote of m features, for answers with noise of standard deviation sigma: Phi(sqrt(2 m / (pi n (1 + 4 n sigma^2)))), for large n and m."""
    return ndtr(np.sqrt(2 * np.asarray(m) / (math.pi * n * (1 + 4 * n * np.square(sigma)))))
