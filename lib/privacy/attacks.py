"""What one report gives away: the best guess of a user's value from a single report of a frequency oracle.

In every oracle of this chapter a report y is a set of supported values (one value, a subset, the ones of a bit vector, the values with a residue in a subset), and the likelihood takes two values only:
P(y | x) is e^eps times larger for x in y than for x not in y. So with a prior f the posterior is proportional to

    f(x) e^(eps [x in y])

and the best guess is its largest entry, ties broken at random. With a uniform prior the chance of success is sum_y max_x P(y | x) / k, which no eps-LDP mechanism can push beyond e^eps / (e^eps + k - 1).

| symbol | name | shape |
|---|---|---|
| y | `supported(oracle, reports)` | (n, k) bool |
| f | `prior` | (k,), None for a uniform one |
"""
import math

import numpy as np

from .modular_subset_selection import ModularSubsetSelection
from .oracles import GRR, SS, UnaryEncoding, check_bits, check_domain, check_epsilon, check_rng, check_values


def supported(oracle, reports) -> np.ndarray:
    """Which values each report supports, (n, k) bool. Raises TypeError for an unknown oracle."""
    if isinstance(oracle, GRR):
        return check_values(reports, oracle.k)[:, None] == np.arange(oracle.k)
    if isinstance(oracle, SS):
        return reports.mask()
    if isinstance(oracle, UnaryEncoding):
        return check_bits(reports, oracle.k)
    if isinstance(oracle, ModularSubsetSelection):
        out = np.zeros((len(reports), oracle.k), bool)
        for users, subsets, m in zip(reports.users, reports.subsets, oracle.moduli):
            out[users] = subsets.mask()[:, np.arange(oracle.k) % m]
        return out
    raise TypeError(f"oracle={oracle!r}: expected GRR, SS, a unary encoding or ModularSubsetSelection")


def guess(oracle, reports, prior=None, rng=None) -> np.ndarray:
    """The most probable value of each user given the report and a prior, (n,); ties are broken at random. Raises ValueError for a bad prior."""
    mask, rng = supported(oracle, reports), check_rng(rng)
    weight = np.ones(oracle.k) if prior is None else np.asarray(prior, dtype=float)
    if weight.shape != (oracle.k,) or not (weight >= 0).all() or not 0 < weight.sum() < math.inf:
        raise ValueError(f"prior has shape {weight.shape} and sum {weight.sum()}: expected ({oracle.k},) numbers >= 0, not all of them 0")
    posterior = np.where(mask, 1.0, math.exp(-oracle.epsilon)) * weight
    best = posterior >= posterior.max(axis=1, keepdims=True) * (1 - 1e-12)          # equal up to rounding
    return np.where(best, rng.random(best.shape), -1.0).argmax(axis=1)


def success(oracle) -> float:
    """The chance that a guess from one report is right when all values are equally frequent, in closed form."""
    if isinstance(oracle, GRR):
        return oracle.p
    if isinstance(oracle, SS):
        return oracle.p / oracle.omega
    if isinstance(oracle, UnaryEncoding):           # one of the ones at random; any value if there is none
        p, q, k = oracle.p, oracle.q, oracle.k
        return p * -math.expm1(k * math.log1p(-q)) / (k * q) + (1 - p) * (1 - q) ** (k - 1) / k
    if isinstance(oracle, ModularSubsetSelection):
        return oracle.attack_success()[1]
    raise TypeError(f"oracle={oracle!r}: expected GRR, SS, a unary encoding or ModularSubsetSelection")


def most(k, epsilon) -> float:
    """What no eps-LDP mechanism on k equally frequent values can exceed: e^eps / (e^eps + k - 1)."""
    return 1 / (1 + (check_domain(k) - 1) * math.exp(-check_epsilon(epsilon)))


def message_bits(oracle) -> float:
    """Bits of one report, in the shortest code of a fixed length for its kind (expected over the modulus for ModularSubsetSelection)."""
    if isinstance(oracle, GRR):
        return math.ceil(math.log2(oracle.k))
    if isinstance(oracle, UnaryEncoding):
        return oracle.k
    if isinstance(oracle, SS):
        return oracle.message_bits()
    if isinstance(oracle, ModularSubsetSelection):
        return oracle.message_bits()[0]
    raise TypeError(f"oracle={oracle!r}: expected GRR, SS, a unary encoding or ModularSubsetSelection")
