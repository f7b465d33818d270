"""Paillier's cryptosystem in Python integers, with every multiplication modulo n^2 counted. For teaching: the page's moduli are far too short to protect anything.

P. Paillier, Public-key cryptosystems based on composite degree residuosity classes, EUROCRYPT 1999, with g = n + 1, so that g^m = 1 + m n modulo n^2.

| symbol | name | shape |
|---|---|---|
| n = p q, n^2 | `PublicKey.n`, `PublicKey.n2` | integers |
| lambda, mu | `SecretKey` | lcm(p - 1, q - 1), its inverse modulo n |
| Enc(m; r) = (1 + m n) r^n | `PublicKey.encrypt` | integer below n^2; \\|m\\| < n / 2 |
| Enc(0; r) = r^n | `PublicKey.zero` | what makes a ciphertext random |

Enc(a) Enc(b) = Enc(a + b) and Enc(a)^k = Enc(k a), modulo n^2. Negative numbers are stored as n - |m| and read back as negative.
Work: an exponentiation is counted as its squarings and multiplications when the exponent's bits are read from the left, bits - 1 and ones - 1. Python's pow returns the same number by a somewhat
shorter chain. Inverses modulo n^2 are counted by themselves. Secrets come from the operating system unless a numpy generator is passed to repeat an experiment.
Not constant time: how long an exponentiation takes tells about its exponent.
"""
import math
import secrets
from dataclasses import dataclass

from .oracles import check_rng


@dataclass
class Work:
    """Operations modulo n^2 so far."""
    products: int = 0
    inverses: int = 0


def is_integer(x) -> bool:
    """An int and no bool: numpy's integers overflow, so they are none here."""
    return isinstance(x, int) and not isinstance(x, bool)


def random_below(n, rng=None) -> int:
    """A uniform integer in [0, n), of any length; by rejection."""
    if not is_integer(n) or n < 1:
        raise ValueError(f"n={n!r}: expected an int >= 1")
    if rng is None:
        return secrets.randbelow(n)
    check_rng(rng)
    bits = n.bit_length()
    while True:
        x = int.from_bytes(rng.bytes((bits + 7) // 8), "little") >> (-bits % 8)
        if x < n:
            return x


SMALL_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def is_prime(n, rng=None, rounds=40) -> bool:
    """Miller-Rabin: a composite number passes with probability at most 4^-rounds over the bases drawn."""
    if n < 2 or any(n % p == 0 for p in SMALL_PRIMES):
        return n in SMALL_PRIMES
    twos = ((n - 1) & (1 - n)).bit_length() - 1                         # n - 1 = odd 2^twos
    odd = (n - 1) >> twos
    for _ in range(rounds):
        x = pow(2 + random_below(n - 3, rng), odd, n)
        if x not in (1, n - 1) and not any((x := x * x % n) == n - 1 for _ in range(twos - 1)):
            return False
    return True


def random_prime(bits, rng=None) -> int:
    """A prime of exactly that many bits, the two highest of them ones, so that two such primes have a product of twice as many."""
    if not is_integer(bits) or bits < 8:
        raise ValueError(f"bits={bits!r}: expected an int >= 8")
    while True:
        candidate = random_below(1 << (bits - 2), rng) | 3 << (bits - 2) | 1
        if is_prime(candidate, rng):
            return candidate


class PublicKey:
    """Encrypts, adds, and multiplies by known integers; `work` counts. n: odd composite modulus (not checked for its factors)."""

    def __init__(self, n):
        if not is_integer(n) or n < 35 or n % 2 == 0:
            raise ValueError(f"n={n!r}: expected an odd int >= 35")
        self.n, self.n2, self.work = n, n * n, Work()

    def check_message(self, m) -> int:
        """An int with |m| < n / 2. Raises TypeError or ValueError."""
        if not is_integer(m):
            raise TypeError(f"m={m!r}: expected an int")
        if 2 * abs(m) >= self.n:
            raise ValueError(f"m={m}: expected |m| < n / 2, n has {self.n.bit_length()} bits")
        return m

    def check(self, c) -> int:
        """A unit modulo n^2. Raises TypeError or ValueError: what is no ciphertext of this key is refused."""
        if not is_integer(c):
            raise TypeError(f"c={c!r}: expected an int")
        if not 0 < c < self.n2 or math.gcd(c, self.n) != 1:
            raise ValueError(f"c={c}: expected a unit modulo n^2")
        return c

    def product(self, a, b) -> int:
        """a b modulo n^2: one product. Of ciphertexts: adds the messages."""
        self.work.products += 1
        return a * b % self.n2

    def power(self, c, k) -> int:
        """c^k modulo n^2 for k >= 0. Of a ciphertext: multiplies the message by k."""
        if not is_integer(k) or k < 0:
            raise ValueError(f"k={k!r}: expected an int >= 0")
        self.work.products += max(k.bit_length() + k.bit_count() - 2, 0)
        return pow(c, k, self.n2)

    def inverse(self, c) -> int:
        """1 / c modulo n^2. Of a ciphertext: negates the message."""
        self.work.inverses += 1
        return pow(self.check(c), -1, self.n2)

    def known(self, m) -> int:
        """(n + 1)^m = 1 + m n: the message m, open to all. No product modulo n^2."""
        return 1 + self.check_message(m) % self.n * self.n

    def zero(self, rng=None) -> int:
        """A fresh encryption of 0, r^n with r a random unit modulo n."""
        while math.gcd(r := random_below(self.n, rng), self.n) != 1:
            pass
        return self.power(r, self.n)

    def encrypt(self, m, rng=None) -> int:
        """Enc(m; r): a fresh zero, and one product."""
        return self.product(self.known(m), self.zero(rng))


class SecretKey:
    """The two primes. `public` is what others may have. Raises ValueError for what are not two different primes of one length."""

    def __init__(self, p, q):
        for x in (p, q):
            if not is_integer(x) or not is_prime(x):
                raise ValueError(f"p, q: expected two primes, and {x!r} is none")
        if p == q or p.bit_length() != q.bit_length():
            raise ValueError(f"p={p}, q={q}: expected two different primes of one length")
        self.public, self._lambda = PublicKey(p * q), math.lcm(p - 1, q - 1)
        self._mu = pow(self._lambda, -1, p * q)

    def decrypt(self, c) -> int:
        """The message, between -n/2 and n/2. Raises for what is no ciphertext."""
        n = self.public.n
        m = (self.public.power(self.public.check(c), self._lambda) - 1) // n * self._mu % n
        return m - n if 2 * m > n else m


def generate_key(bits=512, rng=None) -> SecretKey:
    """A key whose modulus n has `bits` bits (even, >= 16); a real one has 3072 and more."""
    if not is_integer(bits) or bits < 16 or bits % 2:
        raise ValueError(f"bits={bits!r}: expected an even int >= 16")
    p = random_prime(bits // 2, rng)
    while (q := random_prime(bits // 2, rng)) == p:
        pass
    return SecretKey(p, q)
