"""Frequency oracles: each user perturbs a value of [k] once, the server counts supports and removes the bias.

Every oracle here is "pure": a report supports the user's own value with probability p and any other value with probability q, so with c_v supports of v among n reports

    f_v = (c_v / n - q) / (p - q)                                  unbiased
    Var f_v = (f_v p (1 - p) + (1 - f_v) q (1 - q)) / (n (p - q)^2)   exact, for fixed data

| symbol | name | shape |
|---|---|---|
| k, eps | `k`, `epsilon` | domain size, privacy budget |
| x | `values` | (n,) int in [k] |
| p, q | `p`, `q` | support probabilities |
| f | `estimate(...)` | (k,) |

GRR (Kairouz et al., 2016), SS (Wang et al., 2016; Ye and Barg, 2018), SUE (Erlingsson et al., 2014), OUE (Wang et al., 2017). Randomness: pass a generator to repeat an experiment; without one, ChaCha20 with a fresh
256-bit key of the operating system. numpy's own generators are no protection: from a few hundred outputs the next ones can be computed.
"""
import itertools
import math
import secrets

import numpy as np

from .subsets import Subsets, force, uniform_subsets


def check_epsilon(epsilon) -> float:
    """A finite epsilon > 0, as float. Raises ValueError."""
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float, np.number)) or not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon={epsilon!r}: expected a finite number > 0")
    return float(epsilon)


def check_domain(k) -> int:
    """A domain of at least two values. Raises ValueError."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 2:
        raise ValueError(f"k={k!r}: expected an integer >= 2")
    return int(k)


def check_values(values, k) -> np.ndarray:
    """(n,) integers in [k], n >= 1. Raises TypeError or ValueError; nothing is released."""
    values = np.asarray(values)
    if values.dtype.kind not in "iu":
        raise TypeError(f"values has dtype {values.dtype}: expected integers")
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"values has shape {values.shape}: expected (n,) with n >= 1")
    if values.min() < 0 or values.max() >= k:
        bad = values[(values < 0) | (values >= k)][0]
        raise ValueError(f"values contains {bad}: expected 0 <= value < {k}")
    return values.astype(np.int64)


def check_counts(counts, k) -> np.ndarray:
    """(k,) integers >= 0 with a positive sum. Raises TypeError or ValueError."""
    counts = np.asarray(counts)
    if counts.dtype.kind not in "iu":
        raise TypeError(f"counts has dtype {counts.dtype}: expected integers")
    if counts.shape != (k,) or counts.min() < 0 or counts.sum() == 0:
        raise ValueError(f"counts={counts!r}: expected ({k},) integers >= 0, not all of them 0")
    return counts.astype(np.int64)


def check_bits(bits, k) -> np.ndarray:
    """(n, k) bool, n >= 1. Raises TypeError or ValueError."""
    bits = np.asarray(bits)
    if bits.dtype != bool:
        raise TypeError(f"reports has dtype {bits.dtype}: expected bool")
    if bits.ndim != 2 or bits.shape[1] != k or len(bits) == 0:
        raise ValueError(f"reports has shape {bits.shape}: expected (n, {k}) with n >= 1")
    return bits


def check_rng(rng) -> np.random.Generator:
    """The generator that was passed, or a fresh cryptographic one: ChaCha20 with a key from the operating system."""
    if rng is None:
        from randomgen import ChaCha                        # only where people are protected: a passed generator needs no package
        return np.random.Generator(ChaCha(key=secrets.randbits(256), rounds=20))
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng={rng!r}: expected a numpy.random.Generator or None")
    return rng


class FrequencyOracle:
    """Counts and debiasing, shared by all pure oracles; a subclass sets p and q and brings `privatize`, `supports` and `channel`."""

    def __init__(self, k, epsilon):
        self.k, self.epsilon = check_domain(k), check_epsilon(epsilon)

    def estimate(self, reports) -> np.ndarray:
        """Unbiased frequencies, (k,); they may be negative and need not sum to one."""
        return self.debias(*self.supports(reports))

    def debias(self, counts, n) -> np.ndarray:
        """The same from supports among n reports, (..., k)."""
        return (np.asarray(counts) / n - self.q) / (self.p - self.q)

    def collect(self, values, rng=None, batch=4096) -> np.ndarray:
        """`estimate(privatize(values))` for many users: a batch of reports is counted before the next is drawn, so that memory does not grow with n."""
        values, rng = check_values(values, self.k), check_rng(rng)
        batches = (values[start:start + batch] for start in range(0, len(values), batch))
        return self.debias(sum(self.supports(self.privatize(x, rng))[0] for x in batches), len(values))

    def variance(self, n, f=0.0):
        """Exact variance of the estimate of a value with frequency f among n users."""
        return (f * self.p * (1 - self.p) + (1 - f) * self.q * (1 - self.q)) / (n * (self.p - self.q) ** 2)


class GRR(FrequencyOracle):
    """Generalized randomized response: the true value with probability p, else a uniform other one."""

    def __init__(self, k, epsilon):
        super().__init__(k, epsilon)
        lie = math.exp(-self.epsilon)                       # no overflow, however large epsilon is
        self.p = 1 / (1 + (self.k - 1) * lie)
        self.q = lie * self.p

    def privatize(self, values, rng=None):
        """(n,) values -> (n,) reported values."""
        values, rng = check_values(values, self.k), check_rng(rng)
        shift = rng.integers(1, self.k, len(values))
        return np.where(rng.random(len(values)) < self.p, values, (values + shift) % self.k)

    def supports(self, reports):
        """(counts of each value (k,), number of reports)"""
        return np.bincount(check_values(reports, self.k), minlength=self.k), len(reports)

    def sample_supports(self, true_counts, rng=None):
        """The law of `supports` for users with these true counts, without a report each: a multinomial draw a value."""
        true_counts, rng = check_counts(true_counts, self.k), check_rng(rng)
        return rng.multinomial(true_counts, self.channel()).sum(axis=0), int(true_counts.sum())

    def channel(self):
        """Probability of each report given each value, (k, k)."""
        return np.full((self.k, self.k), self.q) + np.eye(self.k) * (self.p - self.q)


def subset_size(m, epsilon) -> int:
    """omega = m / (e^eps + 1) rounded to an integer, at least 1."""
    return max(1, round(m * math.exp(-epsilon) / (1 + math.exp(-epsilon))))


def subset_probabilities(m, omega, epsilon):
    """(p, q): inclusion of the true element, and of any other one."""
    without = (m - omega) * math.exp(-epsilon)
    p, miss = omega / (omega + without), without / (omega + without)
    return p, (p * (omega - 1) + miss * omega) / (m - 1)


class SS(FrequencyOracle):
    """Subset selection: a subset of omega values that holds the true one with probability p, uniform given that."""

    def __init__(self, k, epsilon):
        super().__init__(k, epsilon)
        self.omega = subset_size(self.k, self.epsilon)
        self.p, self.q = subset_probabilities(self.k, self.omega, self.epsilon)

    def privatize(self, values, rng=None) -> Subsets:
        """(n,) values -> n subsets."""
        values, rng = check_values(values, self.k), check_rng(rng)
        n = len(values)
        return force(rng, uniform_subsets(rng, n, self.k, self.omega), values, rng.random(n) < self.p)

    def supports(self, reports: Subsets):
        """(counts of each value (k,), number of reports)"""
        return reports.counts(), len(reports)

    def channel(self):
        """Probability of each subset given each value, (k, C(k, omega)); for small domains."""
        subsets = list(itertools.combinations(range(self.k), self.omega))
        holds = np.array([[x in s for s in subsets] for x in range(self.k)])
        return np.where(holds, self.p / math.comb(self.k - 1, self.omega - 1), (1 - self.p) / math.comb(self.k - 1, self.omega))

    def message_bits(self) -> int:
        """Bits of one report: the rank of the subset among all of its size."""
        return math.ceil(math.log2(math.comb(self.k, self.omega)))


def flip_bits(rng, bits, p, q, out=None):
    """A 1 stays 1 with probability p, a 0 becomes 1 with probability q, independently.  bits: (n, k) bool -> (n, k) bool, in `out` if given

    One random byte decides a bit; only where it equals the first eight binary digits of the probability does a double decide the rest. That is as fast as single precision,
    and right to 2^-61 instead of 2^-24.
    """
    out = np.empty_like(bits) if out is None else out
    high_p, high_q = (min(int(256 * x), 255) for x in (p, q))           # p = 1 is byte 255 and a double that is always smaller
    low_p, low_q = 256 * p - high_p, 256 * q - high_q
    for start in range(0, len(bits), 256):                              # stay in the processor's cache
        block = bits[start:start + 256].ravel()
        byte = rng.integers(0, 2**64, -(-block.size // 8), dtype=np.uint64).view(np.uint8)[:block.size]
        threshold = block.view(np.uint8) * np.uint8((high_p - high_q) % 256) + np.uint8(high_q)
        one = byte < threshold
        tie = np.flatnonzero(byte == threshold)
        one[tie] = rng.random(len(tie)) < np.where(block[tie], low_p, low_q)
        out[start:start + 256] = one.reshape(-1, bits.shape[1])
    return out


def count_bits(bits):
    """Ones in each column.  (n, k) bool -> (k,) int64"""
    total = np.zeros(bits.shape[1], np.int64)
    for start in range(0, len(bits), 255):                              # sums of up to 255 ones fit a byte
        total += np.add.reduce(bits[start:start + 255].view(np.uint8), axis=0, dtype=np.uint8)
    return total


class UnaryEncoding(FrequencyOracle):
    """One bit a value: the user's own bit is reported as 1 with probability p, each other bit with probability q. A subclass sets p and q."""

    def privatize(self, values, rng=None):
        """(n,) values -> (n, k) bool."""
        values, rng = check_values(values, self.k), check_rng(rng)
        bits = np.zeros((len(values), self.k), bool)
        bits[np.arange(len(values)), values] = True
        return flip_bits(rng, bits, self.p, self.q, out=bits)

    def supports(self, reports):
        """(counts of each value (k,), number of reports)"""
        return count_bits(check_bits(reports, self.k)), len(reports)

    def sample_supports(self, true_counts, rng=None):
        """The law of `supports` for users with these true counts, without a report each: bits are independent, so sums are binomial."""
        true_counts, rng = check_counts(true_counts, self.k), check_rng(rng)
        n = int(true_counts.sum())
        return rng.binomial(true_counts, self.p) + rng.binomial(n - true_counts, self.q), n

    def channel(self):
        """Probability of each bit vector given each value, (k, 2^k); for small domains."""
        vectors = np.array(list(itertools.product([0, 1], repeat=self.k)))
        ones = np.where(np.eye(self.k, dtype=bool), self.p, self.q)[:, None, :]        # P(bit = 1 | value)
        return np.where(vectors[None], ones, 1 - ones).prod(axis=2)


class SUE(UnaryEncoding):
    """Symmetric unary encoding, one round of RAPPOR: every bit tells the truth with probability e^(eps/2) / (e^(eps/2) + 1)."""

    def __init__(self, k, epsilon):
        super().__init__(k, epsilon)
        self.p = 1 / (1 + math.exp(-self.epsilon / 2))
        self.q = self.p * math.exp(-self.epsilon / 2)


class OUE(UnaryEncoding):
    """Optimized unary encoding: 1 kept with probability 1/2, 0 turned into 1 with probability 1/(e^eps + 1)."""

    def __init__(self, k, epsilon):
        super().__init__(k, epsilon)
        self.p, self.q = 0.5, math.exp(-self.epsilon) / (1 + math.exp(-self.epsilon))


def worst_ratio(channel) -> float:
    """Largest likelihood ratio of one report under two values; epsilon-LDP means at most e^epsilon.  channel: (k, reports)"""
    return float((channel.max(axis=0) / channel.min(axis=0)).max())
