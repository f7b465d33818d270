"""Evolving secret sharing: codes against their textbook words, arithmetic against numpy, secrecy by enumeration and by rank, reconstruction against linear algebra and shamirs."""
import dataclasses
import itertools
import math
import secrets
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import shamirs

from lib.privacy.evolving_secret_sharing import (CODES, Dealer, Share, codeword, divided_difference, inverse, learned_bits, multiply, rank, reconstruct, share_bits,
                                                 share_value)

MODULE = "lib/privacy/evolving_secret_sharing.py"
BREAKS = [
    ("the secret stands at Y^0", MODULE, "insert(len(coefficients) if place is None else place, s)", "insert(0 if place is None else place, s)"),
    ("random coefficients are drawn again", MODULE, "old | self._draw(n - self._known) << self._known for old", "self._draw(n) for old"),
    ("only the missing coefficients of the first series are random", MODULE, "self._a = [old | self._draw(n - self._known) << self._known for old in self._a]",
     "self._a[0] |= self._draw(n - self._known) << self._known"),
    ("a share is one bit too short", MODULE, "* (codeword(t, code)[1] - 1) + _integer(", "* (codeword(t, code)[1] - 1) - 1 + _integer("),
    ("codewords carry the high bit last", MODULE, "return head | int(bin(t)[:1:-1], 2) >> 1 << length, length + n", "return head | (t ^ 1 << n) << length, length + n"),
    ("Newton's iteration stops one step early", MODULE, "while known < n:", "while 2 * known < n:"),
    ("negative powers are dropped silently", MODULE, "if total & (1 << most) - 1:", "if total < 0:"),
    ("further shares are not compared", MODULE, "if len(found) > 1:\n        raise ValueError(\"shares contradict", "if len(found) > 99:\n        raise ValueError(\"shares contradict"),
]


def word(t, code):
    c, length = codeword(t, code)
    return f"{c:0{length}b}"[::-1]


def bits_of(p, n):
    return np.array([p >> i & 1 for i in range(n)])


def some_sharing(rng, most=2**60):
    k, n, code = int(rng.integers(2, 6)), int(rng.integers(1, 65)), str(rng.choice(["gamma", "delta"]))
    s, group = int.from_bytes(rng.bytes(8), "big") >> 64 - n, set()
    while len(group) < k + 2:
        group.add(int(2 ** rng.uniform(0, rng.choice([4, math.log2(most)]))))
    return s, k, n, code, list(rng.permutation(list(group)))


# --- codes

def test_words_are_the_textbook_s():
    """Elias' tables, first bit first."""
    assert [word(t, "unary") for t in (1, 2, 5)] == ["1", "01", "00001"]
    assert [word(t, "gamma") for t in (1, 2, 3, 4, 5, 10)] == ["1", "010", "011", "00100", "00101", "0001010"]
    assert [word(t, "delta") for t in (1, 2, 3, 4, 6, 8, 10, 17)] == ["1", "0100", "0101", "01100", "01110", "00100000", "00100010", "001010001"]


@pytest.mark.parametrize("code", CODES)
def test_no_word_is_the_beginning_of_another(code):
    words = sorted(word(t, code) for t in range(1, 600))
    assert not any(b.startswith(a) for a, b in zip(words, words[1:]))        # sorted: a prefix stands directly before a word that it begins
    assert sum(Fraction(1, 2 ** len(w)) for w in words) <= 1


# --- arithmetic

def test_products_and_inverses():
    rng = np.random.default_rng(0)
    for _ in range(60):
        p, q = (int.from_bytes(rng.bytes(9), "big") >> int(rng.integers(0, 60)) for _ in range(2))
        assert np.array_equal(bits_of(multiply(p, q), 149), np.convolve(bits_of(p, 75), bits_of(q, 75)) % 2)
        n = int(rng.integers(1, 150))
        assert multiply(p | 1, inverse(p | 1, n)) & (1 << n) - 1 == 1
        assert inverse(p | 1, n) >> n == 0
    with pytest.raises(ZeroDivisionError, match="no inverse"):
        inverse(6, 5)


def test_share_is_the_polynomial_at_the_codeword():
    """Powers of c by numpy's convolution, summed, cut off."""
    rng = np.random.default_rng(1)
    for _ in range(40):
        k, n = int(rng.integers(2, 6)), int(rng.integers(1, 60))
        coefficients = [int.from_bytes(rng.bytes(8), "big") >> 4 for _ in range(k)]
        c, _ = codeword(int(rng.integers(1, 5000)), "delta")
        power, total = np.eye(1, n, dtype=np.int64)[0], np.zeros(n, np.int64)
        for f in coefficients:
            total += np.convolve(power, bits_of(f, n))[:n]
            power = np.convolve(power, bits_of(c, n))[:n] % 2
        assert np.array_equal(bits_of(share_value(coefficients[:-1], coefficients[-1], c, n), n), total % 2)


# --- sizes and randomness

def test_sizes_are_exact():
    for t, k, n in itertools.product((1, 2, 3, 7, 8, 15, 16, 1000, 10**6), (2, 3, 5), (1, 7)):
        lg = math.floor(math.log2(t))
        want = {"unary": t - 1, "gamma": 2 * lg, "delta": lg + 2 * math.floor(math.log2(lg + 1))}
        for code in CODES if t <= 1000 else ("gamma", "delta"):
            assert share_bits(t, k, n, code) == (k - 1) * want[code] + n == len(Dealer(1, k, n, code).share(t).bits)


def test_earlier_shares_never_change_and_randomness_is_counted():
    d = Dealer(5, 3, 4, rng=np.random.default_rng(2))
    assert d.random_bits == 0
    before = [d.join() for _ in range(20)]
    assert [s.party for s in before] == list(range(1, 21))
    assert d.random_bits == 2 * max(len(s.bits) for s in before)
    far = d.share(10**9)
    assert d.random_bits == 2 * len(far.bits)
    assert [d.share(t) for t in range(1, 21)] == before and d.random_bits == 2 * len(far.bits)
    assert reconstruct([before[0], far, before[19]]) == 5


def test_all_coefficients_of_all_series_are_fair_and_independent_coins():
    """4000 dealers that grew twice: each of 2 x 9 coefficients, and each pair of them, within six standard deviations (153 + 18 tests: below 4e-7)."""
    rng, n = np.random.default_rng(3), 4000
    coins = []
    for _ in range(n):
        d = Dealer(1, 3, 1, rng=rng)
        d.share(1), d.share(2), d.share(3), d.share(4)
        coins.append(np.concatenate([bits_of(a, 9) for a in d._a]))
    signs = 1 - 2 * np.array(coins)
    assert np.abs(signs.mean(axis=0)).max() < 6 / math.sqrt(n)
    assert np.abs(signs.T @ signs / n - np.eye(18)).max() < 6 / math.sqrt(n)


def test_without_a_generator_the_operating_system_is_asked(monkeypatch):
    asked, real = [], secrets.randbits
    monkeypatch.setattr(secrets, "randbits", lambda n: asked.append(n) or real(n))
    d = Dealer(1, 4, 3)
    share = d.share(9)
    assert sum(asked) == 64 + 3 * len(share.bits)                            # the sharing's name, and the series
    assert Dealer(1, 4, 3).share(9).bits != share.bits                       # equal by chance with probability 2^-27


def test_a_passed_generator_repeats():
    a, b = (Dealer(9, 3, 8, rng=np.random.default_rng(4)) for _ in range(2))
    assert [a.share(t) for t in (5, 70)] == [b.share(t) for t in (5, 70)]


def test_a_dealer_does_not_print_its_secret():
    assert str(7**40) not in repr(Dealer(7**40, 2, 120))


# --- secrecy and correctness

@pytest.mark.parametrize("k, n, code", [(2, 2, "gamma"), (3, 1, "gamma"), (2, 1, "delta"), (3, 1, "unary")])
def test_by_enumeration(k, n, code):
    """All random series: k - 1 shares have one law for all secrets, the laws of k shares have disjoint supports."""
    for size in (k - 1, k):
        for group in itertools.combinations((1, 2, 3), size):
            N = [share_bits(t, k, n, code) for t in group]
            laws = [Counter(tuple(share_value(a, s, codeword(t, code)[0], m) for t, m in zip(group, N))
                            for a in itertools.product(range(2 ** max(N)), repeat=k - 1)) for s in range(2**n)]
            for one, other in itertools.combinations(laws, 2):
                assert one == other if size < k else not set(one) & set(other)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("k", [2, 3, 4])
def test_by_rank(k, code):
    points = [codeword(t, code) for t in range(1, 9)]
    for size, want in ((k - 1, 0), (k, 4)):
        assert {learned_bits(p, k, 4) for p in itertools.combinations(points, size)} == {want}


def test_rank_counts_what_enumeration_finds():
    """Mutual information of a uniform secret and the shares, from the enumerated joint law, for the scheme, the wrong place, and a code that is not prefix-free."""
    def information(points, k, n, place):
        N = [(k - 1) * (length - 1) + n for _, length in points]
        joint = Counter((s, tuple(share_value(a, s, c, m, place) for (c, _), m in zip(points, N)))
                        for s in range(2**n) for a in itertools.product(range(2 ** max(N)), repeat=k - 1))
        total, y = sum(joint.values()), Counter()
        for (_, shares), count in joint.items():
            y[shares] += count
        return sum(count / total * math.log2(count * 2**n / y[shares]) for (_, shares), count in joint.items())
    binary = [(t, t.bit_length()) for t in range(1, 6)]
    seen = set()
    for points, k, n, place in ((binary[:1], 2, 2, None), ((binary[0], binary[2]), 2, 2, None), (binary[3:5], 2, 2, None), ([codeword(3, "gamma")], 2, 2, 0),
                                ([codeword(2, "gamma"), codeword(1)], 3, 1, 0), ([codeword(2, "gamma"), codeword(3, "gamma")], 2, 2, None)):
        exact = learned_bits(points, k, n, place)
        assert math.isclose(information(points, k, n, place), exact, abs_tol=1e-9)       # sums of a few thousand doubles
        seen.add(exact)
    assert seen == {0, 1, 2}


def test_rank_against_all_combinations():
    rng = np.random.default_rng(5)
    for _ in range(30):
        vectors = [int(v) for v in rng.integers(0, 64, 5)]
        span = {0}
        for v in vectors:
            span |= {v ^ w for w in span}
        assert 2 ** rank(vectors) == len(span)


def test_k_parties_and_more_recover_the_secret():
    rng = np.random.default_rng(6)
    for _ in range(200):
        s, k, n, code, group = some_sharing(rng)
        d = Dealer(s, k, n, code, rng)
        shares = [d.share(t) for t in group]
        assert reconstruct(shares[:k]) == reconstruct(shares) == s
        assert reconstruct(iter(shares[2:])) == s


def test_neighbours_with_the_longest_common_beginnings():
    """2^m and its neighbours agree as far as codewords can: precision is just enough, with unary for all of them."""
    for code, group in (("delta", (2**20, 2**20 + 1, 2**20 + 2, 2**20 + 3)), ("gamma", (4, 5, 6, 7)), ("unary", (20, 21, 22, 23))):
        d = Dealer(0xBEEF, 4, 16, code, np.random.default_rng(7))
        assert reconstruct([d.share(t) for t in group]) == 0xBEEF


def test_against_linear_algebra():
    """An oracle that knows nothing of divided differences: solve share = A a + S s over GF(2) for s."""
    rng = np.random.default_rng(8)
    for _ in range(6):
        s, k, n, code, group = some_sharing(rng, most=200)
        k, group = min(k, 3), group[:min(k, 3)]
        n = min(n, 6)
        d = Dealer(s % 2**n, k, n, code, rng)
        shares = [d.share(t) for t in group]
        N = max(len(h.bits) for h in shares)
        def column(a, secret):
            return np.concatenate([bits_of(share_value(a, secret, codeword(h.party, code)[0], len(h.bits)), len(h.bits)) for h in shares])
        M = np.column_stack([column([(i == j) << m for i in range(k - 1)], 0) for j in range(k - 1) for m in range(N)]
                            + [column([0] * (k - 1), 1 << m) for m in range(n)] + [np.concatenate([bits_of(h.value, len(h.bits)) for h in shares])])
        row, pivots = 0, {}
        for col in range(M.shape[1] - 1):                                    # Gauss and Jordan; the secret's columns are the last ones
            hits = np.flatnonzero(M[row:, col]) + row
            if len(hits):
                M[[row, hits[0]]] = M[[hits[0], row]]
                M[[r for r in np.flatnonzero(M[:, col]) if r != row]] ^= M[row]
                pivots[col], row = row, row + 1
        found = sum(int(M[pivots[(k - 1) * N + m], -1]) << m for m in range(n))
        assert found == reconstruct(shares) == s % 2**n


def test_two_parties_one_bit_is_a_prefix_of_one_series():
    for t, code, s in itertools.product(range(1, 30), CODES, (0, 1)):
        d = Dealer(s, 2, 1, code, np.random.default_rng(9))
        c, length = codeword(t, code)
        assert d.share(t).value == (d._a[0] ^ s * c) % 2**length and len(d.share(t).bits) == length


def test_parity_with_fixed_n():
    """shamirs, for n = 9 known in advance, on the same secrets: both return them from any k; with k - 1 shares ours refuses."""
    rng, n = np.random.default_rng(10), 9
    for k in (2, 3, 5):
        s = int(rng.integers(0, 2**31))
        fixed, d = shamirs.shares(s, n, modulus=2**61 - 1, threshold=k), Dealer(s, k, 31, rng=rng)
        for pick in itertools.islice(itertools.combinations(range(n), k), 30):
            assert shamirs.interpolate([fixed[i] for i in pick], threshold=k) == reconstruct([d.share(i + 1) for i in pick]) == s
        with pytest.raises(ValueError, match=f"{k - 1} shares: expected at least k={k}"):
            reconstruct([d.share(i + 1) for i in range(k - 1)])


# --- bad input

@pytest.mark.parametrize("change, error, message", [
    (dict(secret=-1), ValueError, "secret=-1"), (dict(secret=256), ValueError, "secret has 9 bits"), (dict(secret=1.0), TypeError, "secret=1.0"),
    (dict(secret=True), TypeError, "secret=True"), (dict(k=1), ValueError, "k=1"), (dict(k=math.nan), TypeError, "k=nan"), (dict(k="3"), TypeError, "k='3'"),
    (dict(secret_bits=0), ValueError, "secret_bits=0"), (dict(code="binary"), ValueError, "code='binary'"), (dict(code=None), ValueError, "code=None"),
    (dict(rng=0), TypeError, "rng=0")])
def test_bad_dealers(change, error, message, monkeypatch):
    monkeypatch.setattr(secrets, "randbits", lambda n: pytest.fail("drew randomness"))
    with pytest.raises(error, match=message):
        Dealer(**dict(secret=7, k=3, secret_bits=8) | change)


@pytest.mark.parametrize("party, error", [(0, ValueError), (-4, ValueError), (1.0, TypeError), (True, TypeError), (math.nan, TypeError), (None, TypeError)])
def test_bad_parties_draw_nothing(party, error):
    d = Dealer(7, 3, 8)
    d.share(5)
    before = d.random_bits
    with pytest.raises(error, match="party="):
        d.share(party)
    assert d.random_bits == before and d.joined == 0


def shares_of(k=3, parties=(1, 2, 3, 9), **kwargs):
    d = Dealer(7, k, 8, **kwargs)
    return [d.share(t) for t in parties]


def test_bad_shares_are_refused():
    a, b = shares_of(), shares_of()
    for bad, error, message in (([], TypeError, "one or more Share"), ([1, 2, 3], TypeError, "one or more Share"), (a[:2], ValueError, "2 shares: expected at least k=3"),
                                ([a[0], a[1], a[1]], ValueError, "party 2 more than once"), (a[:2] + b[2:3], ValueError, "differ in dealer")):
        with pytest.raises(error, match=message):
            reconstruct(bad)
    other = [dataclasses.replace(h, dealer=a[0].dealer) for h in shares_of(k=2)]
    with pytest.raises(ValueError, match="differ in k"):
        reconstruct(a[:2] + other[2:3])
    other = [dataclasses.replace(h, dealer=a[0].dealer) for h in shares_of(code="gamma")]
    with pytest.raises(ValueError, match="differ in code"):
        reconstruct(a[:2] + other[2:3])


@pytest.mark.parametrize("change, error, message", [(dict(bits="01"), ValueError, "has length 2: expected 14"), (dict(party=9), ValueError, "has length 14: expected 22"),
                                                    (dict(bits="2" * 14), TypeError, "characters 0 and 1"), (dict(bits=5), TypeError, "characters 0 and 1"),
                                                    (dict(party=0), ValueError, "party=0"), (dict(k=2), ValueError, "length"), (dict(secret_bits=9), ValueError, "length")])
def test_a_share_that_cannot_be_one(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(shares_of()[1], **change)


def flip(share, at):
    return dataclasses.replace(share, bits=share.bits[:at] + "10"[int(share.bits[at])] + share.bits[at + 1:])


def test_changed_shares():
    """A flip below x^v breaks the cancellation; from x^v on it gives another secret, which a further share contradicts; from x^(v+l) on it changes nothing."""
    a = shares_of(parties=(4, 5, 6, 7))
    c = [codeword(h.party)[0] for h in a]
    v = sum((d & -d).bit_length() - 1 for d in (c[0] ^ c[1], c[0] ^ c[2]))
    assert v > 0
    for at in range(len(a[0].bits)):
        changed = [flip(a[0], at), a[1], a[2]]
        if at < v:
            with pytest.raises(ValueError, match="negative powers"):
                reconstruct(changed)
        else:
            assert (reconstruct(changed) == 7) == (at >= v + 8)
        if v <= at < v + 8:
            with pytest.raises(ValueError, match="contradict"):
                reconstruct([a[1], a[2], a[3], flip(a[0], at)])
    with pytest.raises(ValueError, match="different polynomials"):
        divided_difference([1, 1], [0, 0], 4)


def test_numpy_integers_are_integers():
    d = Dealer(np.int64(7), np.int64(2), np.int64(8), rng=np.random.default_rng(0))
    assert reconstruct([d.share(np.int64(3)), d.share(4)]) == 7
    assert isinstance(d.share(np.int64(3)).party, int) and isinstance(d.share(4), Share)
