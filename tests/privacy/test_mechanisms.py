"""The chapter's noise and its account: laws of the noise, sensitivities by enumeration, parity with opendp, budgets that refuse."""
import itertools
import math

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import quad

from lib.privacy import mechanisms as m
from lib.privacy.oracles import check_rng

# Fixed seeds make the statistical tests repeatable; each p-value is compared with 1e-4, so a new seed would fail with that probability.
ALPHA = 1e-4


def rng(seed=0):
    return np.random.default_rng(seed)


# --- the law of the noise

@pytest.mark.parametrize("d, eps", [(1.0, 1.0), (3.0, 0.5), (0.1, 4.0)])
def test_laplace_noise_has_the_scale_of_the_sensitivity(d, eps):
    noise = m.laplace(np.full(20_000, 7.0), d, eps, rng()) - 7.0
    assert stats.kstest(noise, stats.laplace(scale=d / eps).cdf).pvalue > ALPHA
    assert stats.kstest(noise, stats.laplace(scale=d / eps / 2).cdf).pvalue < ALPHA          # half the noise is another law: the test has power


def test_laplace_on_a_grid_is_a_two_sided_geometric():
    d, eps, grid = 1.0, 1.0, 0.25
    out = m.laplace(np.full((4000, 5), 0.3), d, eps, rng(), grid=grid)                        # one release of 20000 coordinates
    ticks = out / grid
    assert np.array_equal(ticks, np.rint(ticks)), "multiples of the grid, exactly"
    alpha = math.exp(-eps / (d / grid + out.size))
    z = ticks.ravel() - 1                                                                     # 0.3 lies nearest to 1 tick
    assert stats.kstest(np.abs(z) + rng(1).random(z.size), lambda x: 1 - np.where(x < 1, 1 - x * (1 - alpha) / (1 + alpha),
                        2 * alpha ** np.floor(x) / (1 + alpha) * (1 - (x - np.floor(x)) * (1 - alpha)))).pvalue > ALPHA
    assert abs(np.sign(z).mean()) < 4 / math.sqrt(z.size)                                     # 4 sd: symmetric


@pytest.mark.parametrize("grid", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("size", [1, 2])
def test_the_grid_keeps_epsilon_for_all_pairs_at_the_sensitivity(grid, size):
    """Enumerated: rounded neighbours are at most d / g + size ticks apart, so the ratio of two-sided geometrics is at most e^eps."""
    d, eps, worst = 1.0, 0.7, 0
    for a in itertools.product(np.linspace(0, 2, 21), repeat=size):
        for share in np.linspace(-1, 1, 9):
            step = np.array([share * d, (1 - abs(share)) * d])[:size]
            worst = max(worst, np.abs(np.rint((np.array(a) + step) / grid) - np.rint(np.array(a) / grid)).sum())
    ratio = math.exp(worst * eps / (d / grid + size))
    assert ratio <= math.exp(eps) * (1 + 1e-12)


def test_gaussian_noise_costs_what_it_says():
    for d, rho in [(1.0, 0.5), (2.0, 0.1)]:
        noise = m.gaussian(np.zeros(20_000), d, rho, rng(3))
        assert stats.kstest(noise, stats.norm(scale=d / math.sqrt(2 * rho)).cdf).pvalue > ALPHA
        assert m.gaussian_rho(d, m.gaussian_sigma(d, rho)) == pytest.approx(rho, rel=1e-14)
    # zCDP by its definition: the Renyi divergence of order a between neighbours is a * rho, here by quadrature
    sigma, d = 1.7, 1.3
    for a in (1.5, 2.0, 8.0):
        logs = quad(lambda x: math.exp(a * stats.norm.logpdf(x, 0, sigma) + (1 - a) * stats.norm.logpdf(x, d, sigma)), -60, 60, limit=500)[0]
        assert math.log(logs) / (a - 1) == pytest.approx(a * m.gaussian_rho(d, sigma), rel=1e-7)


def test_exponential_mechanism_draws_its_law():
    scores = np.array([0.0, 1.0, 1.5, -2.0])
    p = m.exponential_probabilities(scores, 1.0, 2.0)
    assert p == pytest.approx(np.exp(scores) / np.exp(scores).sum(), rel=1e-14)
    counts = np.bincount(m.exponential_mechanism(np.tile(scores, (20_000, 1)), 1.0, 2.0, rng(5)), minlength=4)
    assert stats.chisquare(counts, 20_000 * p).pvalue > ALPHA
    assert m.exponential_mechanism(np.array([0.0, 1e6]), 1.0, 1.0, rng()) == 1                 # no overflow
    assert m.exponential_probabilities(np.array([0.0, 1e6]), 1.0, 1.0).tolist() == [0.0, 1.0]


def test_pure_privacy_in_zcdp():
    """Randomized response is the worst eps-DP mechanism: its Renyi divergence of order a stays below a * rho, and comes near for a small epsilon."""
    for eps in (0.05, 1.0, 3.0):
        p = np.array([math.exp(eps), 1]) / (math.exp(eps) + 1)
        each = [math.log((p ** a * p[::-1] ** (1 - a)).sum()) / (a - 1) / a for a in (1.001, 2.0, 10.0)]
        assert max(each) <= m.pure_rho(eps)
        if eps < 0.1:
            assert max(each) == pytest.approx(m.pure_rho(eps), rel=0.01)                       # the next term is eps^2 smaller


def test_exponential_mechanism_is_private_and_within_its_zcdp():
    """All score vectors on a small grid and all changes by at most the sensitivity."""
    eps, d, grid = 1.1, 1.0, [0.0, 0.5, 1.0]
    worst, renyi = 0.0, 0.0
    for s in itertools.product(grid, repeat=3):
        for t in itertools.product(grid, repeat=3):
            if np.abs(np.subtract(s, t)).max() <= d:
                p, q = (m.exponential_probabilities(np.array(v), d, eps) for v in (s, t))
                worst = max(worst, np.log(p / q).max())
                renyi = max(renyi, *(math.log((p ** a * q ** (1 - a)).sum()) / (a - 1) / a for a in (1.01, 2.0, 5.0, 20.0)))
    assert worst <= eps + 1e-12 and worst > 0.6 * eps, "a factor of two in the exponent would go over or stay far below"
    assert renyi <= m.exponential_rho(eps) + 1e-12 < m.pure_rho(eps)


# --- sensitivity, by enumeration

def test_sensitivity_of_known_queries():
    count = lambda s: np.bincount(s, minlength=3) if len(s) else np.zeros(3)
    assert m.sensitivity(count, range(3), 3) == 2 and m.sensitivity(count, range(3), 3, order=2) == pytest.approx(math.sqrt(2))
    assert m.sensitivity(count, range(3), 3, relation="add") == 1
    assert m.sensitivity(lambda s: np.mean(s), [0.0, 1.0], 4) == pytest.approx(1 / 4)
    assert m.sensitivity(lambda s: max(s), [0.0, 2.0, 5.0], 3) == 5
    with pytest.raises(ValueError, match="relation='swap'"):
        m.sensitivity(count, range(3), 2, relation="swap")


@pytest.mark.parametrize("eps", [0.3, 2.0])
def test_noise_derived_from_the_enumerated_sensitivity_is_private_and_half_of_it_is_not(eps):
    """Log density ratio of Laplace noise between all neighbours, at all corners where it can be largest (the two answers)."""
    query, domain, n = (lambda s: np.array([sum(s), max(s)], dtype=float)), (0, 1, 2), 3
    d = m.sensitivity(query, domain, n)
    def loss(scale):
        worst = 0.0
        for s in itertools.product(domain, repeat=n):
            for i, v in itertools.product(range(n), domain):
                a, b = query(s), query(s[:i] + (v,) + s[i + 1:])
                worst = max(worst, np.abs(a - b).sum() / scale)
        return worst
    assert loss(d / eps) == pytest.approx(eps) and loss(d / eps / 2) == pytest.approx(2 * eps)


# --- the account

@pytest.mark.parametrize("rho, delta", [(0.01, 1e-6), (0.125, 1e-6), (0.5, 1e-5), (3.0, 1e-9), (40.0, 1e-3), (1e-4, 0.4)])
def test_epsilon_of_rho_against_a_grid_of_orders(rho, delta):
    a = 1 + np.logspace(-5, 6, 400_001)
    brute = max(0.0, (a * rho + (math.log(1 / delta) + (a - 1) * np.log1p(-1 / a) - np.log(a)) / (a - 1)).min())
    eps = m.zcdp_epsilon(rho, delta)
    assert eps == pytest.approx(brute, rel=1e-6, abs=1e-9)                                    # the grid's own resolution
    assert eps <= rho + 2 * math.sqrt(rho * math.log(1 / delta))                               # the older, looser bound
    if eps > 0:                                                                                # sound: one Gaussian release really has this delta or less
        assert m.gaussian_delta(1 / math.sqrt(2 * rho), eps) <= delta


@pytest.mark.parametrize("scale, d, delta", [(2.0, 1.0, 1e-6), (0.7, 1.0, 1e-5), (10.0, 3.0, 1e-8)])
def test_account_agrees_with_opendp(scale, d, delta):
    dp = pytest.importorskip("opendp.prelude")
    dp.enable_features("contrib")
    noisy = dp.m.make_gaussian(dp.atom_domain(T=float, nan=False), dp.absolute_distance(T=float), scale=scale)
    assert m.gaussian_rho(d, scale) == pytest.approx(noisy.map(d), rel=1e-9)
    theirs = dp.c.make_zCDP_to_approxDP(noisy).map(d).epsilon(delta)
    assert m.zcdp_epsilon(m.gaussian_rho(d, scale), delta) == pytest.approx(theirs, rel=1e-4)  # both minimize over the order, by search
    laplace = dp.m.make_laplace(dp.atom_domain(T=float, nan=False), dp.absolute_distance(T=float), scale=scale)
    assert d / scale == pytest.approx(laplace.map(d), rel=1e-9)


@pytest.mark.parametrize("eps, delta", [(0.05, 1e-6), (1.0, 1e-6), (8.0, 1e-3), (30.0, 1e-9)])
def test_rho_is_the_inverse_and_never_above(eps, delta):
    rho = m.zcdp_rho(eps, delta)
    assert m.zcdp_epsilon(rho, delta) <= eps and m.zcdp_epsilon(rho, delta) == pytest.approx(eps, rel=1e-6)


def test_exact_delta_of_a_gaussian():
    """delta = max over events = the integral of (p - e^eps q)_+, here by quadrature."""
    for mult, eps in [(1.0, 1.0), (3.0, 0.2), (0.5, 2.0)]:
        p, q = stats.norm(0, mult), stats.norm(1, mult)
        brute = quad(lambda x: max(p.pdf(x) - math.exp(eps) * q.pdf(x), 0), -12 * mult, 12 * mult, limit=1000)[0]
        assert m.gaussian_delta(mult, eps) == pytest.approx(brute, abs=1e-8)


def test_budget_books_and_refuses():
    b = m.Budget(1.0)
    assert b.epsilon(1e-6) == 0.0
    for _ in range(10):
        b.spend(0.1)                                                                           # ten times a tenth is not 1 in floating point: allowed
    assert b.left == pytest.approx(0, abs=1e-12) and b.epsilon(1e-6) == pytest.approx(m.zcdp_epsilon(1.0, 1e-6))
    before = b.spent
    with pytest.raises(ValueError, match="exhausted"):
        b.spend(1e-6)
    assert b.spent == before
    for bad in (0, -1, math.nan, math.inf, "1"):
        with pytest.raises(ValueError, match="rho="):
            b.spend(bad)
    assert b.spent == before


# --- bad input

@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, True, "1", None])
def test_bad_numbers_are_named(bad):
    g = rng()
    state = g.bit_generator.state
    for call, name in [(lambda: m.laplace([1.0], 1.0, bad, g), "epsilon"), (lambda: m.laplace([1.0], bad, 1.0, g), "sensitivity"), (lambda: m.gaussian([1.0], bad, 1.0, g), "sensitivity"),
                       (lambda: m.gaussian([1.0], 1.0, bad, g), "rho"), (lambda: m.exponential_mechanism([1.0, 2.0], 1.0, bad, g), "epsilon"),
                       (lambda: m.exponential_mechanism([1.0, 2.0], bad, 1.0, g), "sensitivity"), (lambda: m.zcdp_epsilon(bad, 1e-5), "rho"), (lambda: m.zcdp_rho(bad, 1e-5), "epsilon"),
                       (lambda: m.zcdp_epsilon(1.0, bad), "delta"), (lambda: m.gaussian_rho(1.0, bad), "sigma"), (lambda: m.gaussian_delta(bad, 1.0), "noise_multiplier"), (lambda: m.Budget(bad), "rho")]:
        with pytest.raises(ValueError, match=f"{name}="):
            call()
    if bad is not None:
        with pytest.raises(ValueError, match="grid="):
            m.laplace([1.0], 1.0, 1.0, g, grid=bad)
    assert g.bit_generator.state == state, "nothing was drawn"


@pytest.mark.parametrize("delta", [1, 1.0, 2.0])
def test_delta_below_one(delta):
    with pytest.raises(ValueError, match="delta="):
        m.zcdp_epsilon(1.0, delta)


def test_nan_is_not_released():
    for f in (lambda x: m.laplace(x, 1.0, 1.0), lambda x: m.gaussian(x, 1.0, 1.0)):
        with pytest.raises(ValueError, match="values contains nan"):
            f([1.0, math.nan])
    with pytest.raises(ValueError, match="scores contains inf"):
        m.exponential_mechanism([1.0, math.inf], 1.0, 1.0)


def test_soft_threshold():
    x = np.array([-3.0, -1.0, -0.5, 0.0, 0.5, 2.0])
    assert m.soft_threshold(x, 1.0).tolist() == [-2.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    grid = np.linspace(-5, 5, 100_001)                                                         # the proximal map, by brute force
    for v in (-2.3, 0.2, 1.7):
        assert m.soft_threshold(v, 0.8) == pytest.approx(grid[(0.5 * (grid - v) ** 2 + 0.8 * np.abs(grid)).argmin()], abs=1e-4)
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="threshold"):
            m.soft_threshold(x, bad)


def test_without_a_generator_the_noise_is_cryptographic_and_fresh():
    g = check_rng(None)
    assert type(g.bit_generator).__name__ == "ChaCha"
    assert not np.array_equal(m.laplace(np.zeros(4), 1.0, 1.0), m.laplace(np.zeros(4), 1.0, 1.0))
    same = rng()
    assert check_rng(same) is same
    with pytest.raises(TypeError, match="rng=3"):
        m.laplace([0.0], 1.0, 1.0, rng=3)
