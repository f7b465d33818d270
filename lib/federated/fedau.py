"""A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging (2023), arXiv:2306.03401.

FedAU: a client that shows up with an unknown probability p_n should count 1/p_n times. The mean number of rounds between
its visits estimates 1/p_n, and each client can keep that mean by itself. Implemented: the interval estimator with its
cut-off, and the server rule.

    symbol       name            shape
    N, d         n_clients, dim  int, int
    K            cutoff          int >= 1, or math.inf
    S_n          waited          (n_clients,)   rounds since the client's last interval ended
    M_n          records         (n_clients,)   intervals recorded
    M_n omega_n  total           (n_clients,)   their sum
    omega_n      weights         (n_clients,)   their mean, 1 before the first
    Delta_n      deltas          (n_present, d)

Deviations from the paper: none known. As in the authors' code, an interval that the cut-off ends is a record like any other,
and a round's weight knows only intervals that ended before it. The sum of the intervals is kept instead of their mean:
integers, so that no rounding gathers.

Cost: three numbers a client, whatever the size of the model, and nothing sent beyond the update: a client can scale its own.
"""
import math

import numpy as np

from lib.federated.simulator import Aggregator


def end_intervals(waited, records, total, present, cutoff):
    """One round of the interval estimator, for all clients at once: the new (waited, records, total)."""
    waited = waited + 1
    ended = present | (waited >= cutoff)  # a visit, or the cut-off
    return np.where(ended, 0, waited), records + ended, total + np.where(ended, waited, 0)


def mean_interval(records, total):
    """omega: the mean of the recorded intervals, 1 where there is none yet."""
    return np.where(records > 0, total / np.maximum(records, 1), 1.0)


def expected_weight(p, cutoff=math.inf, rounds=None):
    """E[omega] after `rounds` Bernoulli(p) rounds: E[X; X <= rounds] + P(X > rounds) with X = min(Geometric(p), cutoff).

    rounds=None: the limit E[X] = (1 - (1 - p)^cutoff) / p, reached exactly after `cutoff` rounds.
    """
    p = np.asarray(p, dtype=float)
    if rounds is None or rounds >= cutoff:
        return (1.0 - (1.0 - p) ** cutoff) / p
    gone = (1.0 - p) ** rounds  # P(X > rounds)
    return (1.0 - gone) / p - rounds * gone + gone


class FedAU(Aggregator):
    """Federated averaging with adaptive weights: x moves by the sum of omega_n * Delta_n over those who came, divided by N.

    Raises ValueError unless cutoff is an integer >= 1 or math.inf (no cut-off).
    """

    def __init__(self, n_clients: int, dim: int, cutoff=100_000):
        super().__init__(n_clients, dim)
        number = isinstance(cutoff, (int, float, np.integer, np.floating)) and not isinstance(cutoff, bool)
        if not number or not cutoff >= 1 or (cutoff != math.inf and cutoff != int(cutoff)):
            raise ValueError(f"cutoff must be an integer >= 1 or math.inf, got {cutoff!r}")
        self.cutoff = cutoff
        self.waited, self.records, self.total = (np.zeros(self.n_clients, dtype=np.int64) for _ in range(3))

    @property
    def weights(self) -> np.ndarray:
        return mean_interval(self.records, self.total)

    @property
    def memory_floats(self) -> int:
        return 3 * self.n_clients

    def combine(self, deltas, clients):
        weights = self.weights  # before this round's intervals end
        present = np.zeros(self.n_clients, dtype=bool)
        present[clients] = True
        self.waited, self.records, self.total = end_intervals(self.waited, self.records, self.total, present, self.cutoff)
        return weights[clients] @ deltas / self.n_clients  # N, not the number of those who came
