"""Improving the utility of locally differentially private protocols for longitudinal and multidimensional frequency estimates (2021, arXiv:2111.04636).

Two rounds of noise. A user sanitises a value once and keeps the result for ever (round 1, the memo); every report is the memo with fresh noise on it (round 2). One report costs
epsilon_1, all reports together never more than epsilon_inf. L-GRR, L-SUE, L-OUE, L-OSUE, and ALLOMFREE: each user draws one of d attributes for ever, and each attribute takes whichever
of L-GRR and L-OSUE has the smaller variance.

| symbol | name | shape |
|---|---|---|
| eps_inf, eps_1 | `epsilon_inf`, `epsilon_1` | budgets of all reports and of one, 0 < eps_1 < eps_inf |
| p_1, q_1 | `first.p`, `first.q` | round 1 |
| p_2, q_2 | `p2`, `q2` | round 2 |
| p_s, q_s | `p`, `q` | the two rounds chained: what the server sees, and removes the bias with |
| k_j | `sizes` | (d,) sizes of the attributes' domains |
| memo | `memo` | (n,) values or (n, k) bits |

Deviations from the paper: L-OUE's q_2 and L-SUE's p_2 are written in closed form (the paper's conditions, solved); L-GRR has, beside the published p_2 (the default), the exact one.
A user whose value changes gets a memo for each value, as in RAPPOR, and pays eps_inf for each; the paper treats values that stay. The estimate is not clipped.
Cost: O(n) for L-GRR, O(n k) bits for the others; `sample_supports` costs O(k^2) and O(k), whatever n.
"""
import math

import numpy as np

from .oracles import GRR, OUE, SUE, FrequencyOracle, check_counts, check_domain, check_epsilon, check_rng, check_values, flip_bits


def signal(epsilon, k=2) -> float:
    """p - q of randomized response on k values: (e^eps - 1) / (e^eps + k - 1).  Chained rounds multiply their signals."""
    return -math.expm1(-epsilon) / (1 + (k - 1) * math.exp(-epsilon))


class Longitudinal(FrequencyOracle):
    """Two rounds on one attribute. A subclass brings `first`, p2 and q2 (`_rounds`), `report`, and the channel of round 2.

    k: domain size >= 2; 0 < epsilon_1 < epsilon_inf, finite. Raises ValueError otherwise, or where the protocol has no second round for the two budgets.
    """

    def __init__(self, k, epsilon_inf, epsilon_1):
        self.epsilon_inf, self.epsilon_1 = _budgets(epsilon_inf, epsilon_1)
        super().__init__(k, epsilon_1)
        self._rounds()
        self.q = self.first.q * (self.p2 - self.q2) + self.q2                     # P(report | not v) = P(memo | not v) (p2 - q2) + q2
        self.p = self.first.p * (self.p2 - self.q2) + self.q2

    def memoize(self, values, rng=None):
        """Round 1, once in a user's life: (n,) values -> memo."""
        return self.first.privatize(values, rng)

    def privatize(self, values, rng=None):
        """The first report of new users. Later reports need their memo: see `Panel`."""
        rng = check_rng(rng)
        return self.report(self.memoize(values, rng), rng)

    def supports(self, reports):
        """(counts of each value (k,), number of reports)"""
        return self.first.supports(reports)

    def sample_supports(self, true_counts, rng=None, reports=1):
        """Counts of `reports` successive reports of the same users, (reports, k), and n: one draw of memos, then fresh second rounds. The law of `supports`."""
        rng, n = check_rng(rng), int(check_counts(true_counts, self.k).sum())
        memo = self.first.sample_supports(true_counts, rng)[0]
        return np.array([self._second_supports(memo, n, rng) for _ in range(_count(reports))]), n

    def average_variance(self, n, reports, f=0.0):
        """Exact variance of the mean of the estimates from `reports` reports of the same n users: the memo's noise never averages out."""
        memo = self.first.variance(n, f)
        return memo + (self.variance(n, f) - memo) / _count(reports)

    def channel(self, reports=1):
        """Probability of each sequence of reports given each value, (k, R^reports) with R possible reports; for small domains."""
        second = self._second_channel()
        sequence = second
        for _ in range(_count(reports) - 1):
            sequence = (sequence[:, :, None] * second[:, None, :]).reshape(len(second), -1)
        return self.first.channel() @ sequence                                    # sum over memos: all reports share one

    def loss(self, reports=1) -> float:
        """Exact privacy loss of so many reports of one value: the largest log-likelihood ratio, reached when all reports support v and the other value is not v."""
        p, q, miss = self.first.p, self.first.q, (self.q2 / self.p2) ** _count(reports)
        return math.log((p + (1 - p) * miss) / (q + (1 - q) * miss))


def _budgets(epsilon_inf, epsilon_1):
    for name, value in (("epsilon_inf", epsilon_inf), ("epsilon_1", epsilon_1)):
        try:
            check_epsilon(value)
        except ValueError:
            raise ValueError(f"{name}={value!r}: expected a finite number > 0") from None
    if not epsilon_1 < epsilon_inf:
        raise ValueError(f"epsilon_1={epsilon_1!r}: expected less than epsilon_inf={epsilon_inf!r}; one report must cost less than all of them")
    return float(epsilon_inf), float(epsilon_1)


def _count(number, name="reports") -> int:
    if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 1:
        raise ValueError(f"{name}={number!r}: expected an integer >= 1")
    return int(number)


class LGRR(Longitudinal):
    """Randomized response twice. exact=False: the published p_2; exact=True: the p_2 for which one report costs exactly epsilon_1."""

    def __init__(self, k, epsilon_inf, epsilon_1, exact=False):
        self.exact = bool(exact)
        super().__init__(k, epsilon_inf, epsilon_1)

    def _rounds(self):
        self.first = GRR(self.k, self.epsilon_inf)
        p1, q1, e = self.first.p, self.first.q, math.exp(self.epsilon_1)
        # p_2 / q_2 from (p1 p2 + q1 q2) / (p1 q2 + q1 p2) = e^eps_1
        odds = (e * p1 - q1) / (p1 - e * q1)
        if self.exact:
            # the k - 2 memos that are neither value, left out above
            odds += (self.k - 2) * (e - 1) * q1 / (p1 - e * q1)
        self.second = GRR(self.k, math.log(odds))
        self.p2, self.q2 = self.second.p, self.second.q

    def report(self, memo, rng=None):
        """Round 2, fresh at every report: (n,) memo -> (n,) reported values."""
        return self.second.privatize(memo, rng)

    def _second_supports(self, memo_counts, n, rng):
        return self.second.sample_supports(memo_counts, rng)[0]

    def _second_channel(self):
        return self.second.channel()


class LUE(Longitudinal):
    """Unary encoding twice. A subclass says which."""

    def report(self, memo, rng=None):
        """Round 2, fresh at every report: (n, k) bool memo -> (n, k) bool."""
        return flip_bits(check_rng(rng), memo, self.p2, self.q2)

    def _second_supports(self, memo_counts, n, rng):
        return rng.binomial(memo_counts, self.p2) + rng.binomial(n - memo_counts, self.q2)

    def _second_channel(self):
        bit, channel = np.array([[1 - self.q2, self.q2], [1 - self.p2, self.p2]]), np.ones((1, 1))
        for _ in range(self.k):
            channel = np.kron(channel, bit)
        return channel

    def loss(self, reports=1) -> float:
        """Exact privacy loss of so many reports of one value: two values differ in two bits; all reports have the first one set and the second one not."""
        p, q, miss = self.first.p, self.first.q, ((1 - self.p2) / (1 - self.q2)) ** _count(reports)
        return super().loss(reports) + math.log((1 - q + q * miss) / (1 - p + p * miss))


class LSUE(LUE):
    """Symmetric twice: RAPPOR without its Bloom filter. One report is SUE(epsilon_1)."""

    def _rounds(self):
        self.first = SUE(self.k, self.epsilon_inf)
        self.p2 = (1 + signal(self.epsilon_1 / 2) / signal(self.epsilon_inf / 2)) / 2
        self.q2 = 1 - self.p2


class LOSUE(LUE):
    """Optimized, then symmetric: the paper's proposal. One report is OUE(epsilon_1)."""

    def _rounds(self):
        self.first = OUE(self.k, self.epsilon_inf)
        self.p2 = (1 + signal(self.epsilon_1) / signal(self.epsilon_inf)) / 2
        self.q2 = 1 - self.p2


class LOUE(LUE):
    """Optimized twice. No second round exists for epsilon_1 too close to epsilon_inf: ValueError."""

    def _rounds(self):
        self.first = OUE(self.k, self.epsilon_inf)
        q1, e = self.first.q, math.exp(self.epsilon_1)
        # p_s = 1/4 + x/2 and q_s = q1/2 + (1 - q1) x with x = q_2: the odds ratio e^eps_1 is a quadratic equation a x^2 - b x + c = 0
        a = (e - 1) * (1 - q1) / 2
        b = (e * (3 - 4 * q1) - 1) / 4
        c = (1 - q1 / 2) / 4 - e * 3 * q1 / 8
        if c < 0:
            limit = math.log((2 - q1) / (3 * q1))
            raise ValueError(f"epsilon_1={self.epsilon_1!r}: L-OUE has no second round above {limit:.4g} for epsilon_inf={self.epsilon_inf!r}")
        self.p2, self.q2 = 0.5, 2 * c / (b + math.sqrt(b * b - 4 * a * c))


class Panel:
    """n users who report again and again on one attribute. Each value that a user ever held is sanitised once; the memo is looked up from then on.

    `memos`: (n,) int, memos drawn for each user so far; together the reports of user i cost at most memos[i] * epsilon_inf.
    """

    def __init__(self, protocol, n):
        self.protocol, self.n = protocol, _count(n, "n")
        self.memos = np.zeros(self.n, np.int64)
        self._keys, self._memo = np.empty(0, np.int64), None                      # user * k + value, sorted; the memo of each

    def report(self, values, rng=None):
        """One report of every user: (n,) values, as they are today -> reports. Raises before anything is drawn or kept."""
        values, rng = check_values(values, self.protocol.k), check_rng(rng)
        if len(values) != self.n:
            raise ValueError(f"values has {len(values)} entries: expected one for each of {self.n} users")
        keys = np.arange(self.n) * self.protocol.k + values
        new = ~np.isin(keys, self._keys)
        if new.any():
            self._add(keys[new], self.protocol.memoize(values[new], rng))
            self.memos += new
        # one memo a user: they are in order, and nothing is to be looked up
        one_each = len(keys) == len(self._keys)
        memo = self._memo if one_each else self._memo[np.searchsorted(self._keys, keys)]
        return self.protocol.report(memo, rng)

    def _add(self, keys, memo):
        if self._memo is not None:
            keys, memo = np.concatenate([self._keys, keys]), np.concatenate([self._memo, memo])
            order = np.argsort(keys)
            keys, memo = keys[order], memo[order]
        self._keys, self._memo = keys, memo


def best_protocol(k, epsilon_inf, epsilon_1, exact=False):
    """L-GRR or L-OSUE on k values, whichever has the smaller variance at frequency 0 (a tie goes to L-GRR)."""
    grr, osue = LGRR(k, epsilon_inf, epsilon_1, exact), LOSUE(k, epsilon_inf, epsilon_1)
    return grr if grr.variance(1) <= osue.variance(1) else osue


class ALLOMFREE:
    """d attributes of n users: each user draws one attribute for ever and spends both budgets on it.

    sizes: (d,) domain sizes >= 2; budgets and `exact` as for the protocols, which are in `protocols`.
    """

    def __init__(self, sizes, epsilon_inf, epsilon_1, exact=False):
        self.sizes = tuple(check_domain(k) for k in sizes)
        if not self.sizes:
            raise ValueError("sizes is empty: expected one size or more")
        self.protocols = tuple(best_protocol(k, epsilon_inf, epsilon_1, exact) for k in self.sizes)

    def enroll(self, n, rng=None):
        """n users draw their attributes: a `Population`, which keeps attributes and memos."""
        return Population(self.protocols, n, rng)

    def estimate(self, reports) -> list:
        """Reports by attribute (None where nobody drew it) -> unbiased frequencies, a list of (k_j,) arrays; NaN where there is no report."""
        return [np.full(p.k, np.nan) if r is None else p.estimate(r) for p, r in zip(self.protocols, reports, strict=True)]


class Population:
    """The users of `ALLOMFREE`.  attribute: (n,) int, drawn here and never again"""

    def __init__(self, protocols, n, rng=None):
        self.protocols, n = protocols, _count(n, "n")
        self.attribute = check_rng(rng).integers(0, len(protocols), n)
        self.panels = [Panel(p, m) if m else None for p, m in zip(protocols, np.bincount(self.attribute, minlength=len(protocols)).tolist())]

    def report(self, values, rng=None) -> list:
        """(n, d) values -> for each attribute the reports of its users, or None. All columns are checked before anything is drawn."""
        values, rng = np.asarray(values), check_rng(rng)
        if values.shape != (len(self.attribute), len(self.protocols)):
            raise ValueError(f"values has shape {values.shape}: expected {(len(self.attribute), len(self.protocols))}")
        columns = [check_values(column, p.k) for column, p in zip(values.T, self.protocols)]
        return [panel and panel.report(column[self.attribute == j], rng) for j, (panel, column) in enumerate(zip(self.panels, columns))]
