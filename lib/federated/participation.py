"""Who takes part in which round: clients that come and go with their own, possibly unknown, probabilities.

A model holds one long-run probability p_n per client and draws a table of rounds x clients, True where the client is
present. Probabilities may be tied to what the clients hold (`tied_probabilities`), which is what makes absence harmful.
"""
import numpy as np


def checked_probabilities(p) -> np.ndarray:
    """`p` as a float array of shape (n_clients,); ValueError unless there is a client and every p lies in (0, 1]."""
    p = np.asarray(p, dtype=float)
    if p.ndim != 1 or p.size == 0:
        raise ValueError(f"p must hold one probability for each of at least one client, got shape {p.shape}")
    if not ((p > 0) & (p <= 1)).all():  # a NaN compares false
        raise ValueError(f"p must lie in (0, 1], got {p[~((p > 0) & (p <= 1))][0]} for one client")
    return p


def _rounds(rounds) -> int:
    if isinstance(rounds, bool) or not isinstance(rounds, (int, np.integer)) or rounds < 0:
        raise ValueError(f"rounds must be an integer >= 0, got {rounds!r}")
    return int(rounds)


class Bernoulli:
    """Each client tosses its own coin in each round: intervals between visits are geometric with mean 1/p."""

    def __init__(self, p):
        self.p = checked_probabilities(p)

    def sample(self, rounds: int, rng: np.random.Generator) -> np.ndarray:
        return rng.random((_rounds(rounds), self.p.size)) < self.p  # (rounds, n_clients)


class Markov:
    """Each client switches on and off; started in its stationary law, it is present with probability p in any round.

    An absent client returns with probability `wake`, a present one leaves with `wake` (1/p - 1). Where that exceeds 1,
    both are scaled down so that it is 1 (the client then never stays for two rounds).
    """

    def __init__(self, p, wake: float = 0.05):
        self.p = checked_probabilities(p)
        if not 0.0 < wake <= 1.0:
            raise ValueError(f"wake must lie in (0, 1], got {wake!r}")
        leave = wake * (1.0 / self.p - 1.0)
        self.wake, self.leave = wake / np.maximum(leave, 1.0), np.minimum(leave, 1.0)

    def sample(self, rounds: int, rng: np.random.Generator) -> np.ndarray:
        present = np.empty((_rounds(rounds), self.p.size), dtype=bool)
        on = rng.random(self.p.size) < self.p
        for row, u in zip(present, rng.random(present.shape), strict=True):
            row[:] = on
            on = np.where(on, u >= self.leave, u < self.wake)
        return present


class Cyclic:
    """Each client is present in one block of every `cycle` rounds, with a phase of its own; nothing else is random.

    The block has round(p * cycle) rounds, at least one, so that the long-run rate is `rate`, not exactly p.
    """

    def __init__(self, p, cycle: int = 100):
        self.p = checked_probabilities(p)
        if isinstance(cycle, bool) or not isinstance(cycle, (int, np.integer)) or cycle < 1:
            raise ValueError(f"cycle must be an integer >= 1, got {cycle!r}")
        self.cycle = int(cycle)
        self.block = np.maximum(1, np.rint(self.p * cycle).astype(int))
        self.rate = self.block / cycle

    def sample(self, rounds: int, rng: np.random.Generator) -> np.ndarray:
        phase = rng.integers(self.cycle, size=self.p.size)
        return (np.arange(_rounds(rounds))[:, None] + phase) % self.cycle < self.block


def tied_probabilities(score, mean: float, floor: float) -> np.ndarray:
    """Probabilities proportional to a nonnegative score of the clients' data: scaled to `mean`, then held in [floor, 1].

    score: (n_clients,), for example each client's share of a label that people who are often online write.
    """
    score = np.asarray(score, dtype=float)
    if score.ndim != 1 or not (np.isfinite(score).all() and (score >= 0).all() and score.sum() > 0):
        raise ValueError(f"score must hold one finite number >= 0 per client, not all 0, got {score}")
    if not 0.0 < floor <= mean <= 1.0:
        raise ValueError(f"floor and mean must satisfy 0 < floor <= mean <= 1, got floor={floor!r}, mean={mean!r}")
    return np.clip(score * (mean / score.mean()), floor, 1.0)
