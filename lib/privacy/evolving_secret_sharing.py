"""A Construction of Evolving k-threshold Secret Sharing Scheme over A Polynomial Ring (2024, arXiv:2402.01144).

A dealer shares an l-bit secret with parties 1, 2, 3, ... whose number nobody knows. Party t stands at the point c_t of GF(2)[x], the t-th word of a prefix code;
k parties interpolate the secret, k - 1 learn nothing. A bit string is a Python integer: its first bit is bit 0, the coefficient of x^0.

| symbol | name | shape |
|---|---|---|
| t, k, l | `party`, `k`, `secret_bits` | integers >= 1, >= 2, >= 1 |
| c_t, l_t | `codeword(t, code)` | (polynomial of degree < l_t, length in bits) |
| a_0..a_{k-2} | `a` | random power series; as many coefficients as were needed so far |
| s | `secret` | polynomial of degree < l |
| f(Y) = a_0 + a_1 Y + ... + s Y^(k-1) | `share_value(a, s, c, n)` | f(c) mod x^n |
| N_t = (k - 1)(l_t - 1) + l | `share_bits(t, k, l, code)` | bits of party t's share |

Deviations from the paper: the scheme is a reconstruction from the abstract (points from a prefix code, Shamir's polynomial over the ring, the size N_t); the place of the
secret, the precision of a share and the Laurent-series interpolation are ours, and proved on the page. GF(2) only. Arithmetic on Python integers takes a time that depends on the values.
Cost: k products of N_t bits a share; about k^2 products and k Newton inversions a reconstruction; (k - 1) max N_t random bits in all.
"""
import secrets
from dataclasses import dataclass

import numpy as np


# --- power series over GF(2): a bit of an integer is a coefficient

def multiply(p, q) -> int:
    """Product of two polynomials over GF(2): shifts and exclusive-ors, no carries."""
    p, q = (p, q) if p.bit_count() >= q.bit_count() else (q, p)
    out = 0
    while q:
        low = q & -q
        out ^= p << low.bit_length() - 1
        q ^= low
    return out


def inverse(u, n) -> int:
    """1 / u mod x^n by Newton's iteration g <- u g^2; u has constant term 1. Raises ZeroDivisionError otherwise."""
    if not u & 1:
        raise ZeroDivisionError(f"u={u}: a power series without constant term has no inverse")
    g, known = 1, 1
    while known < n:
        known = min(2 * known, n)
        mask = (1 << known) - 1
        g = multiply(u & mask, multiply(g, g) & mask) & mask
    return g & (1 << n) - 1


# --- prefix codes: (codeword, length), first bit = bit 0

def unary(t):
    """t - 1 zeros and a one."""
    return 1 << t - 1, t


def gamma(t):
    """Elias gamma: as many zeros as t has bits after its first, then t in binary, highest bit first."""
    n = t.bit_length() - 1
    return int(bin(t)[:1:-1], 2) << n, 2 * n + 1


def delta(t):
    """Elias delta: gamma of the number of bits of t, then these bits without the first."""
    n = t.bit_length() - 1
    head, length = gamma(n + 1)
    return head | int(bin(t)[:1:-1], 2) >> 1 << length, length + n


CODES = {"unary": unary, "gamma": gamma, "delta": delta}


def _integer(name, value, low):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={value!r}: expected an integer >= {low}")
    if value < low:
        raise ValueError(f"{name}={value!r}: expected an integer >= {low}")
    return int(value)


def codeword(t, code="delta"):
    """(c_t, l_t) of party t >= 1; code: "delta", "gamma" or "unary". Raises ValueError/TypeError."""
    if not isinstance(code, str) or code not in CODES:
        raise ValueError(f"code={code!r}: expected one of {', '.join(CODES)}")
    return CODES[code](_integer("party", t, 1))


def share_bits(t, k, secret_bits, code="delta") -> int:
    """N_t = (k - 1)(l_t - 1) + l, the exact number of bits of party t's share."""
    return (_integer("k", k, 2) - 1) * (codeword(t, code)[1] - 1) + _integer("secret_bits", secret_bits, 1)


def share_value(a, s, c, n, place=None) -> int:
    """f(c) mod x^n by Horner's rule. place: the power of Y that carries s; the scheme's, len(a) = k - 1, by default - any other is for study."""
    coefficients = list(a)
    coefficients.insert(len(coefficients) if place is None else place, s)
    out, mask = 0, (1 << n) - 1
    for coefficient in reversed(coefficients):
        out = (multiply(out, c) ^ coefficient) & mask
    return out


@dataclass(frozen=True)
class Share:
    """What party t holds. bits: str of N_t characters 0 and 1, first bit first; dealer: public name of the sharing. Raises ValueError/TypeError if it cannot be a share."""
    party: int
    bits: str
    k: int
    secret_bits: int
    code: str
    dealer: str

    def __post_init__(self):
        want = share_bits(self.party, self.k, self.secret_bits, self.code)
        if not isinstance(self.bits, str) or set(self.bits) - {"0", "1"}:
            raise TypeError(f"bits of party {self.party}: expected a string of the characters 0 and 1")
        if len(self.bits) != want:
            raise ValueError(f"bits of party {self.party} has length {len(self.bits)}: expected {want} for k={self.k}, secret_bits={self.secret_bits}, code={self.code!r}")

    @property
    def value(self) -> int:
        """The share as a polynomial."""
        return int(self.bits[::-1], 2)


class Dealer:
    """Hands out shares for as long as parties come: `share(t)` for any t >= 1, in any order, or `join()` for the next one.

    secret: integer in [0, 2^secret_bits); k: parties needed, >= 2; code: see `codeword`. rng: a numpy Generator to repeat an experiment;
    without one, randomness comes from the operating system (`secrets`). Raises ValueError/TypeError before anything is drawn.
    """

    def __init__(self, secret, k, secret_bits, code="delta", rng=None):
        share_bits(1, k, secret_bits, code)
        if _integer("secret", secret, 0) >> secret_bits:
            raise ValueError(f"secret has {int(secret).bit_length()} bits: expected at most secret_bits={secret_bits}")
        if rng is not None and not isinstance(rng, np.random.Generator):
            raise TypeError(f"rng={rng!r}: expected a numpy.random.Generator or None")
        self.k, self.secret_bits, self.code, self.joined = int(k), int(secret_bits), code, 0
        self._secret, self._rng, self._a, self._known = int(secret), rng, [0] * (self.k - 1), 0
        self.name = f"{self._draw(64):016x}"

    def _draw(self, n):
        """n random bits as an integer."""
        if self._rng is None:
            return secrets.randbits(n)
        return int.from_bytes(self._rng.bytes((n + 7) // 8), "little") & (1 << n) - 1

    @property
    def random_bits(self) -> int:
        """Coefficients drawn so far, of all k - 1 series."""
        return (self.k - 1) * self._known

    def share(self, party) -> Share:
        """Party t's share. Series grow at their end only, so that earlier shares stay what they were."""
        c, _ = codeword(party, self.code)
        n = share_bits(party, self.k, self.secret_bits, self.code)
        if n > self._known:
            self._a = [old | self._draw(n - self._known) << self._known for old in self._a]
            self._known = n
        bits = f"{share_value(self._a, self._secret, c, n):0{n}b}"[::-1]
        return Share(int(party), bits, self.k, self.secret_bits, self.code, self.name)

    def join(self) -> Share:
        """The share of the next party: 1, 2, 3, ..."""
        self.joined += 1
        return self.share(self.joined)


# --- reconstruction and what a coalition knows

def divided_difference(points, values, n) -> int:
    """f[c_1..c_k] mod x^n as a Laurent series: the sum of f(c_i) / prod (c_i - c_j).

    Raises ValueError where its negative powers do not cancel, or points coincide.
    """
    if len(set(points)) < len(points):
        raise ValueError(f"points={points!r}: expected different polynomials")
    terms = []
    for i, (c, y) in enumerate(zip(points, values)):
        v, u = 0, 1                                  # the denominator: x^v u, u(0) = 1
        for d in (c ^ other for j, other in enumerate(points) if j != i):
            zeros = (d & -d).bit_length() - 1
            v, u = v + zeros, multiply(u, d >> zeros)
        terms.append((v, multiply(y, inverse(u, v + n)) & (1 << v + n) - 1))
    most = max(v for v, _ in terms)
    total = 0
    for v, y in terms:
        total ^= y << most - v                       # y / x^v, over the common x^most
    if total & (1 << most) - 1:
        raise ValueError("shares contradict each other (negative powers of x do not cancel)")
    return total >> most


def reconstruct(shares) -> int:
    """The secret from at least k shares of one dealer, in any order; shares beyond k are compared with the first ones.

    Raises ValueError/TypeError for too few shares, a party that comes twice, shares of several dealers or parameters, and for shares that contradict each other.
    k shares that were changed consistently cannot be told from true ones.
    """
    shares = list(shares)
    if not shares or not all(isinstance(s, Share) for s in shares):
        raise TypeError(f"shares={shares!r}: expected one or more Share objects")
    for name in ("dealer", "k", "secret_bits", "code"):
        found = {getattr(s, name) for s in shares}
        if len(found) > 1:
            raise ValueError(f"shares differ in {name} ({', '.join(sorted(map(str, found)))}): expected shares of one dealer")
    parties = [s.party for s in shares]
    if len(set(parties)) < len(parties):
        raise ValueError(f"shares hold party {next(t for t in parties if parties.count(t) > 1)} more than once: expected different parties")
    k, n, code = shares[0].k, shares[0].secret_bits, shares[0].code
    if len(shares) < k:
        raise ValueError(f"{len(shares)} shares: expected at least k={k}")
    points, values = [codeword(t, code)[0] for t in parties], [s.value for s in shares]
    found = {divided_difference(points[:k - 1] + [c], values[:k - 1] + [y], n) for c, y in zip(points[k - 1:], values[k - 1:])}
    if len(found) > 1:
        raise ValueError("shares contradict each other (different secrets): at least one was changed")
    return found.pop()


def rank(vectors) -> int:
    """Rank over GF(2) of integers read as bit vectors."""
    pivots = {}
    for v in vectors:
        while v and v.bit_length() in pivots:
            v ^= pivots[v.bit_length()]
        if v:
            pivots[v.bit_length()] = v
    return len(pivots)


def learned_bits(points, k, secret_bits, place=None) -> int:
    """Exact information of a coalition about a uniform secret, in bits: rank [A S] - rank A, for shares = A a + S s over GF(2).

    points: (c_t, l_t) of its members - words of any code, so that codes without the prefix property can be studied too; place: see `share_value`.
    """
    sizes = [(k - 1) * (length - 1) + secret_bits for _, length in points]

    def column(a, s):
        out = 0
        for (c, _), n in zip(points, sizes):
            out = out << n | share_value(a, s, c, n, place)
        return out
    noise = [column([(i == j) << m for i in range(k - 1)], 0) for j in range(k - 1) for m in range(max(sizes))]
    return rank(noise + [column([0] * (k - 1), 1 << m) for m in range(secret_bits)]) - rank(noise)
