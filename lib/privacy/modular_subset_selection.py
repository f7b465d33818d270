"""Private Frequency Estimation Via Residue Number Systems (2025, arXiv:2511.11569).

ModularSubsetSelection: a user draws one of l pairwise coprime moduli, takes the residue of the value, and reports that residue by subset selection with the whole
budget. The server debiases the residue frequencies of each modulus and solves one weighted least-squares problem for the frequencies of all k values.

| symbol | name | shape |
|---|---|---|
| k, n | `k`, `n` | domain size, users |
| m_0..m_{l-1} | `moduli` | l pairwise coprime integers >= 2 |
| omega_j, p_j, q_j | `omega`, `p`, `q` | (l,) subset sizes, true- and false-inclusion probabilities |
| (J, Z) | `Reports` | modulus and subset of each user |
| A | `rows` | (T, k) 0/1, T = sum m_j; kept as the index of the one row of each block that is 1: (l, k) |
| s | `residue_frequencies(...)` | (T,) |
| W | `weights(...)` | (l,) 1/Var of a block's entries |

Deviations from the paper: the search over moduli is reconstructed (candidate range, number of trials); the default ridge is 0, for which the estimate is unbiased.
Cost: n m/64 words to perturb and to count, O(k l) an iteration of LSMR.
"""
import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy.sparse.linalg import LinearOperator, lsmr

from .oracles import check_domain, check_epsilon, check_rng, check_values, subset_probabilities, subset_size
from .subsets import Subsets, force, uniform_subsets


@dataclass(frozen=True)
class Reports:
    """What n users sent. Block j: the users who drew modulus j, `users[j]`, and their subsets of [m_j], `subsets[j]`."""
    users: tuple[np.ndarray, ...]
    subsets: tuple[Subsets, ...]

    def __len__(self):
        return sum(map(len, self.users))


def check_moduli(k, moduli) -> tuple[int, ...]:
    """Pairwise coprime integers >= 2 whose residues tell the k values apart (Chinese remainder theorem). Raises ValueError."""
    given = tuple(moduli)
    if not given or any(isinstance(m, bool) or not isinstance(m, (int, np.integer)) or m < 2 for m in given):
        raise ValueError(f"moduli={given!r}: expected one or more integers >= 2")
    for a, b in itertools.combinations(given, 2):
        if math.gcd(a, b) > 1:
            raise ValueError(f"moduli={given}: {a} and {b} share the factor {math.gcd(a, b)}; expected pairwise coprime integers")
    if math.prod(map(int, given)) < k:
        raise ValueError(f"moduli={given}: their product {math.prod(map(int, given))} is smaller than k={k}, so residues do not identify a value")
    return tuple(int(m) for m in given)


class ModularSubsetSelection:
    """epsilon-LDP frequency oracle over [k] by residues.

    k: domain size >= 2; epsilon: finite, > 0; moduli: pairwise coprime, product >= k. Raises ValueError otherwise.
    `identifiable` says whether least squares has a unique answer; see `search_moduli` for good moduli.
    """

    def __init__(self, k, epsilon, moduli):
        self.k, self.epsilon = check_domain(k), check_epsilon(epsilon)
        self.moduli = check_moduli(self.k, moduli)
        self.m = np.array(self.moduli)
        self.omega = np.array([subset_size(m, self.epsilon) for m in self.moduli])
        # the whole budget for the one residue that is sent: only one block is ever reported
        self.p, self.q = np.array([subset_probabilities(m, w, self.epsilon) for m, w in zip(self.moduli, self.omega)]).T
        self.offsets = np.concatenate([[0], np.cumsum(self.m)[:-1]])
        self.rows = self.offsets[:, None] + np.arange(self.k) % self.m[:, None]           # (l, k): A[rows[j, x], x] = 1

    @property
    def identifiable(self) -> bool:
        """Full column rank. Each block's rows sum to one, so rank A = min(k, T - l + 1)."""
        return int(self.m.sum()) - len(self.m) + 1 >= self.k

    # --- client

    def privatize(self, values, rng=None) -> Reports:
        """(n,) values in [k] -> reports (J, Z). Raises ValueError/TypeError before anything is released."""
        values, rng = check_values(values, self.k), check_rng(rng)
        block = rng.integers(0, len(self.m), len(values))                                 # J ~ U[l]
        users, subsets = [], []
        for j, m in enumerate(self.moduli):
            mine = np.flatnonzero(block == j)
            residue = values[mine] % m
            keep = rng.random(len(mine)) < self.p[j]
            subsets.append(force(rng, uniform_subsets(rng, len(mine), m, int(self.omega[j])), residue, keep))
            users.append(mine)
        return Reports(tuple(users), tuple(subsets))

    def message_bits(self):
        """Bits of a report that names a modulus and a full subset; (expected bits, bits if one residue were sent as the abstract counts it)."""
        name = math.ceil(math.log2(len(self.m))) if len(self.m) > 1 else 0
        full = [math.ceil(math.log2(math.comb(m, int(w)))) for m, w in zip(self.moduli, self.omega)]
        single = [math.ceil(math.log2(m)) for m in self.moduli]
        return name + float(np.mean(full)), name + float(np.mean(single))

    def channel(self):
        """Probability of each report (J, Z) given each value, (k, reports); for small moduli."""
        blocks = []
        for m, w, p in zip(self.moduli, self.omega, self.p):
            subsets = list(itertools.combinations(range(m), int(w)))
            holds = np.array([[x % m in s for s in subsets] for x in range(self.k)])
            blocks.append(np.where(holds, p / math.comb(m - 1, int(w) - 1), (1 - p) / math.comb(m - 1, int(w))) / len(self.m))
        return np.concatenate(blocks, axis=1)

    # --- server

    def residue_frequencies(self, reports: Reports):
        """(s (T,), n_j (l,)): debiased residue frequencies, unbiased for A f; blocks that nobody drew are 0."""
        sizes = np.array([len(u) for u in reports.users])
        s = [(z.counts() / max(n, 1) - q) / (p - q) if n else np.zeros(z.m) for z, n, p, q in zip(reports.subsets, sizes, self.p, self.q)]
        return np.concatenate(s), sizes

    def weights(self, sizes):
        """1 / Var of a block's entries at frequency 0: n_j (p_j - q_j)^2 / (q_j (1 - q_j)).  (l,)"""
        return np.asarray(sizes) * (self.p - self.q) ** 2 / (self.q * (1 - self.q))

    def estimate(self, reports: Reports, ridge=0.0, tol=1e-10) -> np.ndarray:
        """argmin_z ||W^(1/2) (A z - s)||^2 + ridge ||z||^2, by LSMR with a matrix-free A.  (k,)

        Unbiased for ridge=0 if `identifiable`; raises ValueError if not identifiable and ridge=0, or if there is no report.
        """
        if len(reports) == 0:
            raise ValueError("reports is empty: expected at least one report")
        if not (math.isfinite(ridge) and ridge >= 0):
            raise ValueError(f"ridge={ridge!r}: expected a finite number >= 0")
        if ridge == 0 and not self.identifiable:
            raise ValueError(f"moduli={self.moduli}: sum - l + 1 = {int(self.m.sum()) - len(self.m) + 1} < k={self.k}, least squares has no unique answer; "
                             "take larger moduli or ridge > 0")
        s, sizes = self.residue_frequencies(reports)
        root = np.sqrt(self.weights(sizes))
        scale = np.repeat(root, self.m)                                                   # W^(1/2), (T,)
        A = LinearOperator((len(s), self.k), dtype=float,
                           matvec=lambda z: scale * np.bincount(self.rows.ravel(), np.tile(z.ravel(), len(self.m)), len(s)),
                           rmatvec=lambda u: (scale * u.ravel())[self.rows].sum(axis=0))
        return lsmr(A, scale * s, damp=math.sqrt(ridge), atol=tol, btol=tol, conlim=0, maxiter=20 * self.k)[0]

    # --- theory

    def normal_matrix(self, n):
        """A' W A for n users spread evenly over the blocks, (k, k)."""
        w = self.weights(np.full(len(self.m), n / len(self.m)))
        x = np.arange(self.k)
        gap = np.abs(x[:, None] - x)
        return sum(wj * (gap % m == 0) for wj, m in zip(w, self.moduli))

    def predicted_mse(self, n) -> float:
        """tr((A' W A)^-1) / k: mean squared error of the estimate where correlations inside a block and true frequencies are ignored."""
        return float(np.trace(np.linalg.inv(self.normal_matrix(n)))) / self.k

    def condition(self) -> float:
        """Condition number of W^(1/2) A; that of A' W A is its square."""
        eigenvalues = np.linalg.eigvalsh(self.normal_matrix(1.0))
        return math.sqrt(eigenvalues[-1] / eigenvalues[0]) if eigenvalues[0] > 1e-12 * eigenvalues[-1] else math.inf

    def attack_success(self):
        """Chance that a guess from one report is right: (the paper's formula, the exact value for uniform values).

        The attacker picks a residue of Z, then a value with that residue, both uniformly.
        """
        hit = self.p / self.omega
        classes = np.array([np.bincount(np.arange(self.k) % m, minlength=m) for m in self.moduli], dtype=object)
        exact = [h * np.count_nonzero(c) / self.k for h, c in zip(hit, classes)]           # mean over x of 1 / (size of its class)
        return float(np.mean(hit / np.ceil(self.k / self.m))), float(np.mean(exact))


def _primes(low, high):
    sieve = np.ones(high + 1, bool)
    sieve[:2] = False
    for i in range(2, math.isqrt(high) + 1):
        if sieve[i]:
            sieve[i * i::i] = False
    return [int(x) for x in np.flatnonzero(sieve) if x >= low]


def search_moduli(k, epsilon, n_moduli, rng, trials=20, beta=4.0, max_condition=10.0) -> tuple[int, ...]:
    """Random search for good moduli: primes in [k/(beta l), beta k/l], full rank, condition at most `max_condition`, smallest predicted error.

    Raises ValueError if no trial qualifies; the message says how close the best one came.
    """
    check_domain(k), check_epsilon(epsilon), check_rng(rng)
    primes = _primes(max(2, math.ceil(k / (beta * n_moduli))), math.floor(beta * k / n_moduli))
    if n_moduli < 1 or len(primes) < n_moduli:
        raise ValueError(f"n_moduli={n_moduli!r}: the range for k={k}, beta={beta} holds {len(primes)} primes; expected 1 <= n_moduli <= that")
    best, closest = None, math.inf
    for _ in range(trials):
        moduli = tuple(sorted(int(x) for x in rng.choice(primes, n_moduli, replace=False)))
        if math.prod(moduli) < k:
            continue
        candidate = ModularSubsetSelection(k, epsilon, moduli)
        if not candidate.identifiable:
            continue
        condition = candidate.condition()
        closest = min(closest, condition)
        if condition <= max_condition:
            error = candidate.predicted_mse(1.0)
            if best is None or error < best[0]:
                best = error, moduli
    if best is None:
        raise ValueError(f"no moduli with condition <= {max_condition} in {trials} trials for k={k}, n_moduli={n_moduli}, beta={beta}; the best had {closest:.1f}")
    return best[1]
