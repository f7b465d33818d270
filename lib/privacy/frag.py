"""FRAG: Toward Federated Vector Database Management for Collaborative and Secure Retrieval-Augmented Generation (2024, arXiv:2410.13272).

k nearest neighbours of an encrypted query in vectors that several parties hold. One key serves all parties. Encryption is made cheap by caching: a number is a multiple of one cached
ciphertext, made random again by an encryption of zero.

| symbol | name | shape |
|---|---|---|
| f | `bits` | binary places; x becomes the integer round(x 2^f) |
| a | `fixed(x, bits)` | integers of x's shape |
| C = Enc(1) | `ScalarCache` | one ciphertext, and its inverse |
| C_i = Enc(r^i) | `RadixCache` | one ciphertext a digit, and their inverses |
| z | `zero` | an encryption of 0, for one use |
| Enc(q_j), Enc(\\|q\\|^2) | `Query` | (d,), scalar |
| v | `shard` | (m, d) one party's vectors, known to that party |

Deviations from the paper: *reconstructed*. Its scheme and the formula of its multiplicative cache were not available to us; we take Paillier's scheme, the cache that the author's earlier work
describes (scalar multiples of one ciphertext, then fresh randomness), and a protocol in which each party knows its own vectors, computes on the encrypted query, and the querier decrypts. Distances
between two encrypted vectors would need a scheme that multiplies ciphertexts. No approximate index: all vectors of a shard are candidates.
Cost: counted in products modulo n^2 (`PublicKey.work`).
"""
import math
from dataclasses import dataclass

import numpy as np

from .oracles import check_rng
from .paillier import PublicKey, SecretKey, is_integer


def fixed(x, bits) -> np.ndarray:
    """round(x 2^bits) as int64, ties to even; |x| 2^bits must stay below 2^52, where doubles are exact. Raises TypeError or ValueError."""
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)) or not 0 <= bits <= 40:
        raise ValueError(f"bits={bits!r}: expected an integer from 0 to 40")
    x = np.asarray(x)
    if x.dtype.kind not in "iuf":
        raise TypeError(f"x has dtype {x.dtype}: expected real numbers")
    if not np.isfinite(x).all() or (np.abs(x) * 2.0**bits >= 2**52).any():
        raise ValueError(f"x holds {x[~(np.abs(x) * 2.0**bits < 2**52)].flat[0]}: expected finite numbers below 2^{52 - bits}")
    return np.rint(x * 2.0**bits).astype(np.int64)


# --- encryption, with and without a cache.  encrypt(a, zero): zero is a fresh Enc(0); 1 in its place means no randomness, which is not secure.

class NoCache:
    """(1 + a n) z: with g = n + 1 the message itself costs one product."""

    def __init__(self, public: PublicKey):
        self.public = public

    def encrypt(self, a: int, zero: int) -> int:
        """Enc(a), made random by `zero`."""
        return self.public.product(self.public.known(a), zero)


class ScalarCache:
    """C^a z with C = Enc(1), and 1/C for negative a: what we take the paper's multiplicative cache to be."""

    def __init__(self, public: PublicKey, rng=None):
        self.public, self.one = public, public.encrypt(1, rng)
        self.minus_one = public.inverse(self.one)

    def encrypt(self, a: int, zero: int) -> int:
        """Enc(a), made random by `zero`."""
        base = self.one if self.public.check_message(a) >= 0 else self.minus_one
        return self.public.product(self.public.power(base, abs(a)), zero)


class RadixCache:
    """prod_i C_i^(a_i) z with the digits a_i of a in base r: the earlier, additive cache. radix >= 2; digits: how many are cached."""

    def __init__(self, public: PublicKey, radix=2, digits=64, rng=None):
        if not is_integer(radix) or radix < 2 or not is_integer(digits) or digits < 1:
            raise ValueError(f"radix={radix!r}, digits={digits!r}: expected ints >= 2 and >= 1")
        self.public, self.radix = public, radix
        self.plus = [public.encrypt(radix**i, rng) for i in range(digits)]
        self.minus = [public.inverse(c) for c in self.plus]

    def encrypt(self, a: int, zero: int) -> int:
        """Enc(a), made random by `zero`. Raises ValueError if a has more digits than are cached."""
        if abs(self.public.check_message(a)) >= self.radix ** len(self.plus):
            raise ValueError(f"a={a}: expected at most {len(self.plus)} digits in base {self.radix}")
        out, rest, bases = zero, abs(a), self.plus if a >= 0 else self.minus
        for base in bases:
            rest, digit = divmod(rest, self.radix)
            if digit:
                out = self.public.product(out, self.public.power(base, digit))
        return out


# --- distances on the encrypted query

@dataclass(frozen=True)
class Query:
    """Enc(q_j) for all coordinates, Enc(|q|^2), the binary places, and a bound on the integers |q_j|."""
    coordinates: tuple
    square: int
    bits: int
    bound: int


def encrypt_query(cache, q, bits, zeros) -> Query:
    """q: (d,). zeros: d + 1 fresh encryptions of zero, each used once. bound is a power of two, so that it tells the range of q and no more."""
    a = _vector(q, bits)
    zeros = _distinct(zeros, len(a) + 1)
    coordinates = tuple(cache.encrypt(x, z) for x, z in zip(a, zeros))
    return Query(coordinates, cache.encrypt(sum(x * x for x in a), zeros[-1]), int(bits), 1 << max(map(abs, a)).bit_length())


def _vector(q, bits):
    a = fixed(q, bits)
    if a.ndim != 1 or len(a) == 0:
        raise ValueError(f"q has shape {a.shape}: expected (d,) with d >= 1")
    return a.tolist()


def _distinct(zeros, needed):
    zeros = list(zeros)
    if len(zeros) != needed or len(set(zeros)) < needed:
        raise ValueError(f"zeros: {len(zeros)} given, {len(set(zeros))} of them different; expected {needed} different ones, a zero may be used once only")
    return zeros


def distances(public: PublicKey, query: Query, shard, zeros) -> list[int]:
    """Enc(|q - v|^2 2^(2 bits)) for each row v of shard, (m, d), which the caller knows. zeros: m fresh encryptions of zero.

    prod_j Enc(q_j)^(-2 v_j) Enc(|q|^2) (1 + |v|^2 n) z: every term has the scale 2^(2 bits). Raises ValueError/TypeError before anything is computed.
    """
    v = fixed(shard, query.bits)
    if v.ndim != 2 or v.shape[1] != len(query.coordinates):
        raise ValueError(f"shard has shape {v.shape}: expected (m, {len(query.coordinates)})")
    zeros = _distinct(zeros, len(v))
    largest = query.bound + int(np.abs(v).max(initial=0))
    if 2 * len(query.coordinates) * largest**2 >= public.n:
        raise ValueError(f"bits={query.bits}: distances up to {len(query.coordinates)} * {largest}^2 do not fit below n / 2")
    plus = [public.check(c) for c in query.coordinates]
    minus, out = [public.inverse(c) for c in plus], []
    for row, zero in zip(v.tolist(), zeros):
        total = public.product(query.square, public.known(sum(x * x for x in row)))
        for x, up, down in zip(row, plus, minus):
            if x:
                total = public.product(total, public.power(down if x > 0 else up, 2 * abs(x)))
        out.append(public.product(total, zero))
    return out


@dataclass(frozen=True)
class Found:
    """The k nearest: party and row of each, squared distance, nearest first; products modulo n^2 for the query, for each party, for decrypting."""
    parties: np.ndarray
    rows: np.ndarray
    distances: np.ndarray
    work: dict


def search(secret: SecretKey, cache, shards, q, k, bits, rng=None) -> Found:
    """The whole protocol: the querier encrypts, each party computes on its shard, the querier decrypts all distances and keeps k. Ties go to the first party and row.

    The work of the zeros is counted apart, as "zeros": they can be made ahead.
    """
    public, d, shards = secret.public, len(_vector(q, bits)), [fixed(s, bits) / 2.0**bits for s in shards]
    if not shards or any(s.ndim != 2 or s.shape[1] != d for s in shards):
        raise ValueError(f"shards have shapes {[s.shape for s in shards]}: expected (m, {d}) each, and at least one")
    sizes = [len(s) for s in shards]
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= sum(sizes):
        raise ValueError(f"k={k!r}: expected an integer from 1 to {sum(sizes)}, the number of vectors")
    work, last = {}, public.work.products

    def spent(name):
        nonlocal last
        work[name], last = public.work.products - last, public.work.products

    pools = [[public.zero(rng) for _ in range(m)] for m in (d + 1, *sizes)]
    spent("zeros")
    query = encrypt_query(cache, q, bits, pools[0])
    spent("query")
    answers = []
    for party, (shard, zeros) in enumerate(zip(shards, pools[1:])):
        answers += [(c, party, row) for row, c in enumerate(distances(public, query, shard, zeros))]
        spent(f"party {party}")
    nearest = sorted((secret.decrypt(c), party, row) for c, party, row in answers)[:k]
    spent("decrypt")
    squared, parties, rows = zip(*nearest)
    return Found(np.array(parties), np.array(rows), np.array(squared, float) / 4.0**bits, work)


# --- attacks

def triangulate(known, squared) -> np.ndarray:
    """The point from its squared distances to known points, (m, d) and (m,), by least squares; needs rank d, so m > d."""
    known, squared = np.asarray(known, float), np.asarray(squared, float)
    if known.ndim != 2 or squared.shape != known.shape[:1] or not (np.isfinite(known).all() and np.isfinite(squared).all()):
        raise ValueError(f"known, squared have shapes {known.shape}, {squared.shape}: expected finite (m, d) and (m,)")
    A = 2 * (known[1:] - known[0])
    if np.linalg.matrix_rank(A) < known.shape[1]:
        raise ValueError(f"known: {len(known)} points do not span {known.shape[1]} dimensions")
    norms = (known**2).sum(axis=1)
    return np.linalg.lstsq(A, norms[1:] - norms[0] - squared[1:] + squared[0])[0]


def ind_cpa(encrypt, guess, pair, rounds, rng) -> float:
    """Share of rounds that an adversary wins: guess(encrypt, c) says which of the two messages of `pair` is in c = encrypt(pair[b]), b a fair coin; 1/2 is chance."""
    coins = check_rng(rng).integers(0, 2, rounds)
    return float(np.mean([guess(encrypt, encrypt(pair[b])) == b for b in coins]))
