"""FRAG: Paillier by enumeration and against plain integers, counted work against a multiplication at a time, distances against numpy and BFV (SEAL, through tenseal), the attacks, bad input."""
import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import sympy
from scipy import stats

from lib.privacy.frag import NoCache, RadixCache, ScalarCache, distances, encrypt_query, fixed, ind_cpa, search, triangulate
from lib.privacy.paillier import PublicKey, SecretKey, Work, generate_key, is_prime, random_below, random_prime

BREAKS = [
    ("the sign of a coordinate is lost", "lib/privacy/frag.py", "down if x > 0 else up", "up"),
    ("the cross term misses its factor 2", "lib/privacy/frag.py", "2 * abs(x)))", "abs(x)))"),
    ("negative numbers use the cached 1", "lib/privacy/frag.py", "self.public.check_message(a) >= 0 else self.minus_one", "self.public.check_message(a) <= 0 else self.minus_one"),
    ("the cached digits start at r", "lib/privacy/frag.py", "radix**i, rng)", "radix**(i + 1), rng)"),
    ("squarings are not counted", "lib/privacy/paillier.py", "max(k.bit_length() + k.bit_count() - 2, 0)", "max(k.bit_count() - 1, 0)"),
    ("a zero may be used twice", "lib/privacy/frag.py", "or len(set(zeros)) < needed", ""),
    ("negative messages come out as large ones", "lib/privacy/paillier.py", "return m - n if 2 * m > n else m", "return m"),
    ("distances come in the scale of vectors", "lib/privacy/frag.py", "/ 4.0**bits, work", "/ 2.0**bits, work"),
]

KEY = generate_key(128, np.random.default_rng(0))            # short, for speed; nothing below depends on the length but where it says so
PUBLIC = KEY.public
FAILURE = 1e-6                                                # of a statistical check, for a fixed seed


def zeros(count, seed=1, public=PUBLIC):
    rng = np.random.default_rng(seed)
    return [public.zero(rng) for _ in range(count)]


def one_at_a_time(base, k, modulus):
    """(base^k, products): left to right, one square or multiplication after the other."""
    if k == 0:
        return 1, 0
    x, products = base, 0
    for bit in bin(k)[3:]:
        x, products = x * x % modulus, products + 1
        if bit == "1":
            x, products = x * base % modulus, products + 1
    return x, products


# --- Paillier

def test_all_of_the_smallest_cryptosystem():
    """n = 35: every message under every randomness is its own ciphertext, together they are all units modulo n^2, and every one decrypts."""
    key = SecretKey(5, 7)
    units = [r for r in range(1, 35) if math.gcd(r, 35) == 1]
    seen = {}
    for m, r in itertools.product(range(-17, 18), units):
        c = key.public.product(key.public.known(m), key.public.power(r, 35))
        assert key.decrypt(c) == m and key.public.check(c) == c
        seen[c] = m
    assert len(seen) == 35 * len(units) == sum(math.gcd(c, 35) == 1 for c in range(35**2))
    for (a, m), (b, k) in itertools.product(itertools.islice(seen.items(), 0, None, 37), repeat=2):
        assert (key.decrypt(key.public.product(a, b)) - m - k) % 35 == 0
        assert (key.decrypt(key.public.power(a, 3)) - 3 * m) % 35 == 0 and (key.decrypt(key.public.inverse(a)) + m) % 35 == 0


def test_a_cached_ciphertext_with_a_fresh_zero_is_as_random_as_a_fresh_one():
    """Enumeration, n = 35: over all z = r^n, C^a z takes every encryption of a equally often, whatever C is. Without z it takes one value."""
    public = SecretKey(5, 7).public
    units = [r for r in range(1, 35) if math.gcd(r, 35) == 1]
    for r_c, a in itertools.product(units[:5], range(0, 18)):
        cache = ScalarCache.__new__(ScalarCache)
        cache.public, cache.one = public, public.known(1) * pow(r_c, 35, 35**2) % 35**2
        cached = sorted(cache.encrypt(a, pow(r, 35, 35**2)) for r in units)
        assert cached == sorted(NoCache(public).encrypt(a, pow(r, 35, 35**2)) for r in units)
        assert len({cache.encrypt(a, 1) for _ in units}) == 1


def test_primes_are_sympys():
    assert [n for n in range(2000) if is_prime(n)] == list(sympy.primerange(2000))
    carmichael = [561, 41041, 825265, 321197185, 5394826801, 232250619601, 9746347772161]
    strong_to_base_2_3_5_7 = [3215031751, 3474749660383, 341550071728321]
    assert not any(map(is_prime, carmichael + strong_to_base_2_3_5_7))
    rng = np.random.default_rng(2)
    for bits in (8, 31, 64, 200):
        p = random_prime(bits, rng)
        assert p.bit_length() == bits and sympy.isprime(p) and p >> (bits - 2) == 3
        assert not is_prime(p * random_prime(bits, rng), rng)
    assert is_prime(2**127 - 1) and not is_prime(2**129 - 1)


def test_random_integers_are_uniform_and_reach_both_ends():
    rng = np.random.default_rng(3)
    for n in (1, 2, 5, 256, 257, 1000):
        x = [random_below(n, rng) for _ in range(40 * n + 2000)]
        observed = np.bincount(x, minlength=n)
        assert len(observed) == n and (n == 1 or stats.chisquare(observed).pvalue > FAILURE)
    assert len({random_below(2**64) for _ in range(20)}) == 20                                   # from the operating system
    assert random_below(2**200, np.random.default_rng(4)) == random_below(2**200, np.random.default_rng(4))


def test_key_has_the_length_that_was_asked_for_and_differs_each_time():
    keys = [generate_key(64).public.n for _ in range(3)]
    assert all(n.bit_length() == 64 for n in keys) and len(set(keys)) == 3
    assert generate_key(64, np.random.default_rng(5)).public.n == generate_key(64, np.random.default_rng(5)).public.n


@pytest.mark.parametrize("m", [0, 1, -1, 5, -(2**60), 2**60, (PUBLIC.n - 1) // 2, -(PUBLIC.n - 1) // 2])
def test_encrypts_what_it_decrypts(m):
    a, b = PUBLIC.encrypt(m), PUBLIC.encrypt(m)
    assert KEY.decrypt(a) == KEY.decrypt(b) == m and a != b
    assert KEY.decrypt(PUBLIC.known(m)) == m


def test_products_are_counted_one_by_one():
    public = PublicKey(PUBLIC.n)
    rng = np.random.default_rng(6)
    for k in (0, 1, 2, 3, 7, 8, 1000003, PUBLIC.n, random_below(PUBLIC.n, rng)):
        public.work.products = 0
        assert (public.power(12345, k), public.work.products) == one_at_a_time(12345, k, public.n2)
    public.work.products = 0
    public.encrypt(7)
    assert public.work == Work(one_at_a_time(2, public.n, public.n2)[1] + 1, 0)
    public.inverse(2)
    assert public.work.inverses == 1 and set(vars(Work()).values()) == {0}


# --- caches

@pytest.mark.parametrize("make", [NoCache, ScalarCache, RadixCache, lambda p: RadixCache(p, 16, 10), lambda p: RadixCache(p, 10, 14)], ids=["none", "scalar", "radix 2", "radix 16", "radix 10"])
def test_caches_encrypt_the_same_number(make):
    cache = make(PUBLIC)
    for a, z in zip((0, 1, -1, 2, 3, 15, 16, 17, -1000, 4095, 4096, 2**39, -(2**39) + 1), zeros(13)):
        c = cache.encrypt(a, z)
        assert KEY.decrypt(c) == a
        assert KEY.decrypt(cache.encrypt(a, 1)) == a and cache.encrypt(a, 1) == cache.encrypt(a, 1)      # the same every time: not secure


def test_cached_ciphertext_is_the_one_of_combined_randomness():
    """C^a z = Enc(a; r_C^a r_z), exactly."""
    n, n2 = PUBLIC.n, PUBLIC.n2
    rng = np.random.default_rng(7)
    for a in (0, 1, 77, 12345):
        r_c, r_z = random_below(n, rng), random_below(n, rng)
        cache = ScalarCache.__new__(ScalarCache)
        cache.public, cache.one = PUBLIC, (1 + n) * pow(r_c, n, n2) % n2
        assert cache.encrypt(a, pow(r_z, n, n2)) == (1 + a * n) * pow(pow(r_c, a, n) * r_z % n, n, n2) % n2


@pytest.mark.parametrize("a", [0, 1, -1, 5, -6, 1023, 1024, -4095])
def test_work_of_a_number(a):
    """One product without a cache; bits + ones - 1 by a scalar cache (and at least 1); the ones by a radix cache of base 2. The sign costs nothing."""
    def spent(cache):
        before = PUBLIC.work.products, PUBLIC.work.inverses
        cache.encrypt(a, 1)
        assert PUBLIC.work.inverses == before[1]
        return PUBLIC.work.products - before[0]
    ones, length = bin(a).count("1"), abs(a).bit_length()
    assert spent(NoCache(PUBLIC)) == 1
    assert spent(ScalarCache(PUBLIC)) == max(length + ones - 2, 0) + 1
    assert spent(RadixCache(PUBLIC)) == ones
    digits = [int(d, 16) for d in f"{abs(a):x}" if d != "0"]
    assert spent(RadixCache(PUBLIC, 16, 4)) == sum(1 + one_at_a_time(3, d, 100)[1] for d in digits)


# --- distances

def data(seed=8, d=5, sizes=(7, 4, 9), spread=1.5):
    rng = np.random.default_rng(seed)
    return [spread * rng.standard_normal((m, d)) for m in sizes], spread * rng.standard_normal(d)


@pytest.mark.parametrize("bits", [0, 3, 10, 20])
def test_distances_are_those_of_the_integers(bits):
    """Exactly; and those of the vectors up to rounding: |(a + e)^2 - a^2| <= 2 |a| |e| + e^2, |e| <= 2^-bits a coordinate."""
    shards, q = data()
    query = encrypt_query(ScalarCache(PUBLIC), q, bits, zeros(6))
    got = [KEY.decrypt(c) for c in distances(PUBLIC, query, shards[0], zeros(7, 2))]
    assert got == ((fixed(shards[0], bits) - fixed(q, bits)) ** 2).sum(axis=1).tolist()
    gap = np.abs(shards[0] - q)
    assert (np.abs(np.array(got) / 4.0**bits - (gap**2).sum(axis=1)) <= (2 * gap * 2.0**-bits + 4.0**-bits).sum(axis=1)).all()


@pytest.mark.parametrize("make", [NoCache, ScalarCache, RadixCache])
def test_search_is_a_plain_search(make):
    shards, q = data()
    found = search(KEY, make(PUBLIC), shards, q, 6, 16, np.random.default_rng(9))
    everything = sorted((((v - q) ** 2).sum(), p, i) for p, s in enumerate(shards) for i, v in enumerate(s))[:6]
    assert [(p, i) for _, p, i in everything] == list(zip(found.parties.tolist(), found.rows.tolist()))
    np.testing.assert_allclose(found.distances, [d for d, _, _ in everything], atol=1e-3)          # 5 coordinates, gaps below 10, 2^-16 each: 1.6e-3 at the very most
    assert (np.diff(found.distances) >= 0).all()


def test_ties_go_to_the_first_party_and_row():
    v = np.array([[1.0, 0.0], [0.0, 1.0]])
    found = search(KEY, ScalarCache(PUBLIC), [v, v], [0.0, 0.0], 3, 4)
    assert found.parties.tolist() == [0, 0, 1] and found.rows.tolist() == [0, 1, 0] and found.distances.tolist() == [1.0] * 3
    assert len(search(KEY, ScalarCache(PUBLIC), [v], [0.0, 0.0], 1, 4).rows) == 1


def test_work_of_a_search_is_the_sum_of_its_parts():
    shards, q = data()
    before = PUBLIC.work.products
    cache = ScalarCache(PUBLIC)
    made = PUBLIC.work.products - before
    found = search(KEY, cache, shards, q, 2, 10)
    assert sum(found.work.values()) == PUBLIC.work.products - before - made
    one_zero = one_at_a_time(2, PUBLIC.n, PUBLIC.n2)[1]
    assert found.work["zeros"] == (5 + 1 + 20) * one_zero
    for party, shard in enumerate(shards):
        powers = sum(1 + one_at_a_time(2, 2 * abs(x), 9)[1] for x in fixed(shard, 10).ravel().tolist() if x)
        assert found.work[f"party {party}"] == powers + 2 * len(shard)
    assert found.work["decrypt"] == 20 * one_at_a_time(2, KEY._lambda, 9)[1]
    # twice the vectors, twice the work of a party
    twice = search(KEY, cache, [np.concatenate([shards[0]] * 2)], q, 2, 10)
    assert twice.work["party 0"] == 2 * found.work["party 0"]


def test_equal_vectors_give_different_ciphertexts():
    shards, q = data()
    query = encrypt_query(ScalarCache(PUBLIC), np.ones(5), 8, zeros(6))
    assert len(set(query.coordinates)) == 5 and query.bound == 512
    a, b = distances(PUBLIC, query, np.ones((2, 5)), zeros(2, 3))
    assert a != b and KEY.decrypt(a) == KEY.decrypt(b) == 0


def test_each_zero_is_used_once():
    """Known randomness: every ciphertext of the query is its message times its own zero, and so is every answer but for that of the query."""
    q, z = np.array([3.0, -2.0, 0.0]), zeros(4)
    query = encrypt_query(NoCache(PUBLIC), q, 1, z)
    assert [*query.coordinates, query.square] == [PUBLIC.known(m) * x % PUBLIC.n2 for m, x in zip((6, -4, 0, 52), z)]
    y = zeros(2, 3)
    answers = distances(PUBLIC, query, np.zeros((2, 3)), y)
    assert answers == [query.square * x % PUBLIC.n2 for x in y]


def test_distances_fit_up_to_half_of_n():
    """A bound on the query between the largest that fits and that for a third of n: accepted. The next one above the limit: refused."""
    query = encrypt_query(NoCache(PUBLIC), np.ones(4), 0, zeros(5))
    limit = math.isqrt((PUBLIC.n - 1) // 8)                                           # 2 d bound^2 < n with d = 4
    assert distances(PUBLIC, replace(query, bound=limit), np.zeros((1, 4)), zeros(1, 3))
    with pytest.raises(ValueError, match="do not fit below n / 2"):
        distances(PUBLIC, replace(query, bound=limit + 1), np.zeros((1, 4)), zeros(1, 3))


def test_bfv_computes_the_same_integers_with_both_sides_encrypted():
    """SEAL's BFV multiplies ciphertexts: there the shard is encrypted too. Integers modulo 1032193, so few bits."""
    ts = pytest.importorskip("tenseal", reason="tenseal is not installed: distances are not compared with a scheme that multiplies ciphertexts")
    context = ts.context(ts.SCHEME_TYPE.BFV, poly_modulus_degree=4096, plain_modulus=1032193)
    shards, q = data()
    query = encrypt_query(ScalarCache(PUBLIC), q, 5, zeros(6))
    ours = [KEY.decrypt(c) for c in distances(PUBLIC, query, shards[0], zeros(7, 2))]
    encrypted = ts.bfv_vector(context, fixed(q, 5).tolist())
    for row, distance in zip(fixed(shards[0], 5), ours):
        gap = encrypted - ts.bfv_vector(context, row.tolist())
        assert sum(x * x for x in gap.decrypt()) == distance == sum((gap * gap).decrypt())


def test_ckks_computes_nearly_the_same():
    ts = pytest.importorskip("tenseal", reason="tenseal is not installed: distances are not compared with CKKS")
    context = ts.context(ts.SCHEME_TYPE.CKKS, poly_modulus_degree=8192, coeff_mod_bit_sizes=[60, 40, 40, 60])
    context.global_scale = 2.0**40
    context.generate_galois_keys()
    shards, q = data()
    found = search(KEY, NoCache(PUBLIC), shards[:1], q, 7, 18)
    encrypted = ts.ckks_vector(context, q.tolist())
    for row, distance in zip(found.rows, found.distances):
        gap = encrypted - ts.ckks_vector(context, shards[0][row].tolist())
        assert abs(gap.dot(gap).decrypt()[0] - distance) < 1e-3                                    # our rounding; CKKS adds about 1e-6


# --- attacks

def test_triangulation_finds_the_point():
    for seed in range(5):
        (v, _, _), q = data(seed, d=6, sizes=(7, 1, 1))
        np.testing.assert_allclose(triangulate(v, ((v - q) ** 2).sum(axis=1)), q, atol=1e-8)       # 6 equations, condition below 1e4
    with pytest.raises(ValueError, match="do not span 6 dimensions"):
        triangulate(v[:6], ((v[:6] - q) ** 2).sum(axis=1))
    for known, squared in ((v, np.ones(3)), (v[0], np.ones(6)), (v * np.nan, np.ones(7)), (v, np.full(7, np.inf))):
        with pytest.raises(ValueError, match="expected finite"):
            triangulate(known, squared)


def test_the_game():
    """Comparing wins all rounds without randomness and half of them with; a fair coin, 400 rounds."""
    cache, rng = ScalarCache(PUBLIC), np.random.default_rng(10)

    def compare(encrypt, c):
        return 0 if c == encrypt(3) else 1
    assert ind_cpa(lambda m: cache.encrypt(m, 1), compare, (3, 8), 100, rng) == 1.0
    assert ind_cpa(lambda m: cache.encrypt(m, 1), lambda e, c: 1 - compare(e, c), (3, 8), 100, rng) == 0.0
    wins = round(400 * ind_cpa(lambda m: cache.encrypt(m, PUBLIC.zero(rng)), compare, (3, 8), 400, rng))
    assert stats.binomtest(wins, 400).pvalue > FAILURE


# --- bad input

@pytest.mark.parametrize("x, bits, error, message", [
    ([math.nan], 4, ValueError, "nan"), ([math.inf], 4, ValueError, "inf"), ([2.0**49], 3, ValueError, "below 2^49"), (["a"], 4, TypeError, "real numbers"), ([1j], 4, TypeError, "complex"),
    ([1.0], -1, ValueError, "bits=-1"), ([1.0], 41, ValueError, "bits=41"), ([1.0], 2.0, ValueError, "bits=2.0"), ([1.0], True, ValueError, "bits=True"), (None, 4, TypeError, "object")])
def test_bad_numbers(x, bits, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fixed(x, bits)
    assert fixed([-0.5, 0.5, 1.5, -2.25], 0).tolist() == [0, 0, 2, -2] and fixed([0.3], 40).tolist() == [round(0.3 * 2**40)]
    assert fixed([2.0**49 - 1], 2).tolist() == [2**51 - 4]


def test_bad_keys_and_ciphertexts():
    for n in (0, 34, 33, 36, 35.0, True, None):
        with pytest.raises(ValueError, match="expected an odd int"):
            PublicKey(n)
    for p, q in ((5, 5), (5, 11), (5, 9), (4, 7), (5.0, 7), (None, 7)):
        with pytest.raises(ValueError, match="p"):
            SecretKey(p, q)
    for call, message in ((lambda: generate_key(15), "bits=15"), (lambda: generate_key(14), "bits=14"), (lambda: generate_key(64.0), "bits=64.0"), (lambda: random_prime(7), "bits=7"),
                          (lambda: random_prime("9"), "bits='9'"), (lambda: random_below(0), "n=0"), (lambda: random_below(2.0), "n=2.0"), (lambda: PUBLIC.power(3, -1), "k=-1"),
                          (lambda: PUBLIC.power(3, 1.0), "k=1.0"), (lambda: PUBLIC.encrypt(PUBLIC.n // 2 + 1), "n / 2"), (lambda: PUBLIC.encrypt(-(PUBLIC.n // 2) - 1), "n / 2")):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    for c in (0, -1, PUBLIC.n2, PUBLIC.n2 + 1, PUBLIC.n, 7 * PUBLIC.n):                             # multiples of n are no units
        with pytest.raises(ValueError, match="unit modulo"):
            KEY.decrypt(c)
        with pytest.raises(ValueError, match="unit modulo"):
            PUBLIC.inverse(c)
    for bad in (1.0, np.int64(3), True, "5", None):
        with pytest.raises(TypeError, match="expected an int"):
            PUBLIC.encrypt(bad)
        with pytest.raises(TypeError, match="expected an int"):
            KEY.decrypt(bad)
    with pytest.raises(TypeError, match="rng=3"):
        random_below(10, 3)


def test_bad_caches():
    for arguments in ((1, 4), (2, 0), (2.0, 4), (2, True)):
        with pytest.raises(ValueError, match="radix="):
            RadixCache(PUBLIC, *arguments)
    for a in (16, -16):
        with pytest.raises(ValueError, match="at most 4 digits in base 2"):
            RadixCache(PUBLIC, 2, 4).encrypt(a, 1)
    assert KEY.decrypt(RadixCache(PUBLIC, 2, 4).encrypt(-15, 1)) == -15 and KEY.decrypt(RadixCache(PUBLIC, 2, 1).encrypt(1, 1)) == 1
    for cache in (NoCache(PUBLIC), ScalarCache(PUBLIC), RadixCache(PUBLIC)):
        with pytest.raises(ValueError, match="n / 2"):
            cache.encrypt(PUBLIC.n, 1)


def test_bad_searches_do_no_work():
    shards, q = data()
    cache, z = ScalarCache(PUBLIC), zeros(8)
    query = encrypt_query(cache, q, 10, z[:6])
    forged = type(query)((*query.coordinates[:4], PUBLIC.n), query.square, query.bits, query.bound)
    before = PUBLIC.work.products
    for call, message in (
            (lambda: encrypt_query(cache, q, 10, z[:5]), "5 given, 5 of them different; expected 6"), (lambda: encrypt_query(cache, q, 10, [z[0]] * 6), "may be used once only"),
            (lambda: encrypt_query(cache, [], 10, z[:1]), "q has shape (0,)"), (lambda: encrypt_query(cache, np.ones((2, 2)), 10, z), "q has shape (2, 2)"),
            (lambda: encrypt_query(cache, q * np.nan, 10, z[:6]), "nan"), (lambda: distances(PUBLIC, query, shards[0][:, :4], z[:7]), "expected (m, 5)"),
            (lambda: distances(PUBLIC, query, shards[0][0], z[:7]), "shard has shape (5,)"), (lambda: distances(PUBLIC, query, shards[0], z[:6]), "expected 7 different"),
            (lambda: distances(PUBLIC, query, shards[0] * np.nan, z[:7]), "nan"), (lambda: distances(PUBLIC, forged, shards[0], z[:7]), "unit modulo"),
            (lambda: search(KEY, cache, shards, q, 0, 10), "k=0"), (lambda: search(KEY, cache, shards, q, 21, 10), "k=21: expected an integer from 1 to 20"),
            (lambda: search(KEY, cache, shards, q, 2.0, 10), "k=2.0"), (lambda: search(KEY, cache, [], q, 1, 10), "at least one"), (lambda: search(KEY, cache, [shards[0][:, :2]], q, 1, 10), "expected (m, 5)"),
            (lambda: search(KEY, cache, shards, q[None], 1, 10), "q has shape (1, 5)"), (lambda: search(KEY, cache, shards, q, 1, 99), "bits=99")):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    assert PUBLIC.work.products == before
    small = generate_key(32, np.random.default_rng(11))
    tight = encrypt_query(NoCache(small.public), q, 13, zeros(6, 4, small.public))
    with pytest.raises(ValueError, match="do not fit below n / 2"):
        distances(small.public, tight, shards[0], zeros(7, 5, small.public))
