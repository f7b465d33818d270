"""Sparse regression under local privacy: sensitivities over a grid, exact density ratios, unbiasedness by quadrature and by draws, aggregates against single reports, lasso and OLS as limits, bad input."""
import itertools
import math

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import quad
from sklearn.linear_model import Lasso, LinearRegression

from lib.privacy.ldp_regression import (L2Randomizer, Moments, NonInteractive, covariance_sensitivity, cross_sensitivity, groups, hard_threshold, ldp_iht, plug_in,
                                        sparse_estimate)
from lib.privacy.mechanisms import gaussian_rho, sensitivity, zcdp_epsilon

MODULE = "lib/privacy/ldp_regression.py"
BREAKS = [
    ("the noise fits corners only, which are not the worst case in l1", MODULE, "1: d * (d + 1) / 2, 2: d}", "1: 2 * (d // 2) * ((d + 1) // 2), 2: d / 2}"),
    ("the randomizer tells the truth too often", MODULE, "1 / (1 + math.exp(-self.epsilon))", "1 / (1 + math.exp(-2 * self.epsilon))"),
    ("the randomizer turns away from the vector", MODULE, "np.where(plus == near, 1.0, -1.0)", "np.where(plus == near, -1.0, 1.0)"),
    ("all rounds ask the same people", MODULE, "[slice(a, b) for a, b in", "[slice(0, n) for a, b in"),
    ("the sum of noises has the variance of one", MODULE, "rng.normal(0.0, sd * math.sqrt(n), shape)", "rng.normal(0.0, sd, shape)"),
    ("y is not clipped before it is used in a gradient", MODULE, "x @ theta - np.clip(y[part], -r_y, r_y)", "x @ theta - y[part]"),
    ("the noise matrix is not symmetric", MODULE, "noise = np.triu(noise) + np.triu(noise, 1).T", "noise = np.triu(noise)"),
    ("the gradient step goes uphill", MODULE, "theta - lr * total", "theta + lr * total"),
]

# A statistical check below fails by chance with at most this probability for each seed; seeds are fixed, so it either always passes or shows a real change.
FAILURE = 1e-6


def rng(seed=0):
    return np.random.default_rng(seed)


def people(n, d, k, g, noise=0.5):
    theta = np.zeros(d)
    theta[g.permutation(d)[:k]] = g.choice([-1, 1], k) / math.sqrt(k)
    X = g.integers(0, 2, (n, d)) * 2 - 1
    return X, X @ theta + noise * g.normal(size=n), theta


# --- sensitivities

@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("order", [1, 2])
def test_sensitivities_over_all_pairs_of_a_grid(d, order):
    """All pairs of x in {-r, -r/2, 0, r/2, r}^d: the bound holds, and is attained (l2 of x x^T: for even d, where two sign vectors can be orthogonal)."""
    r, r_y, upper = 1.5, 0.8, np.triu_indices(d)
    grid = list(itertools.product(np.linspace(-r, r, 5), repeat=d))
    exact = sensitivity(lambda s: np.outer(s[0], s[0])[upper], grid, 1, order)
    bound = covariance_sensitivity(d, r, order)
    assert exact <= bound * (1 + 1e-12)
    if order == 1 or d == 2:
        assert math.isclose(exact, bound, rel_tol=1e-12)
    corners = [(*x, y) for x in itertools.product((-r, r), repeat=d) for y in (-r_y, r_y)]
    cross = sensitivity(lambda s: np.array(s[0][:d]) * s[0][d], corners, 1, order)
    assert math.isclose(cross, cross_sensitivity(d, r, r_y, order), rel_tol=1e-12)
    inside = [(*x, y) for x in itertools.product((-r, 0, r), repeat=d) for y in (-r_y, 0.3, r_y)]
    assert sensitivity(lambda s: np.array(s[0][:d]) * s[0][d], inside, 1, order) <= cross_sensitivity(d, r, r_y, order) * (1 + 1e-12)


def test_sensitivities_of_random_pairs_in_higher_dimension():
    """d = 4, 7, 12: random points of the cube and of its corners; orthogonal sign vectors attain d r^2 for d = 4 and 12."""
    g = rng(1)
    for d in (4, 7, 12):
        upper = np.triu_indices(d)
        for kind in range(400):
            a, b = g.uniform(-1, 1, (2, d)) if kind % 2 else np.sign(g.uniform(-1, 1, (2, d)))
            change = (np.outer(a, a) - np.outer(b, b))[upper]
            assert np.abs(change).sum() <= covariance_sensitivity(d, 1.0, 1) and np.linalg.norm(change) <= covariance_sensitivity(d, 1.0, 2) * (1 + 1e-12)
        if d % 2 == 0:
            a, b = np.ones(d), np.repeat([1.0, -1.0], d // 2)
            assert math.isclose(np.linalg.norm((np.outer(a, a) - np.outer(b, b))[upper]), covariance_sensitivity(d, 1.0, 2))


@pytest.mark.parametrize("delta", [None, 1e-5])
def test_noise_is_what_the_sensitivity_asks_for(delta):
    for d, eps, r, r_y in ((3, 0.7, 1.0, 2.0), (6, 3.0, 2.0, 1.0)):
        m = NonInteractive(d, eps, delta, r, r_y)
        order = 1 if delta is None else 2
        for sd, change in zip(m.sd, (covariance_sensitivity(d, r, order), cross_sensitivity(d, r, r_y, order))):
            if delta is None:
                assert math.isclose(change / (sd / math.sqrt(2)), eps, rel_tol=1e-12)                 # Laplace: l1 over scale
            else:
                assert zcdp_epsilon(gaussian_rho(change, sd), delta) == pytest.approx(eps, rel=1e-6)


# --- the randomizer

@pytest.mark.parametrize("d", [1, 2, 5, 20])
@pytest.mark.parametrize("eps", [0.1, 1.0, 4.0])
def test_density_ratio_is_at_most_e_to_the_epsilon_and_attained(d, eps):
    """Over vectors of all lengths up to the bound, among them opposite ones of full length, and directions on both sides of each."""
    g, R = rng(2), L2Randomizer(d, eps)
    V = g.normal(size=(40, d))
    V *= (g.choice([0.0, 0.5, 1.0], 40) * 2.0 / np.linalg.norm(V, axis=1))[:, None]
    V = np.concatenate([V, -V, [np.eye(d)[0] * 2.0, -np.eye(d)[0] * 2.0]])
    u = np.concatenate([g.normal(size=(200, d)), V[np.linalg.norm(V, axis=1) > 0]])
    density = R.density(u, V, 2.0)
    ratio = density.max(axis=0) / density.min(axis=0)
    assert ratio.max() <= math.exp(eps) * (1 + 1e-12) and math.isclose(ratio.max(), math.exp(eps), rel_tol=1e-12)
    uniform = g.normal(size=(40_000, d))                                                              # a density: its mean over the sphere is 1
    assert np.abs(R.density(uniform, V[:5], 2.0).mean(axis=1) - 1).max() < stats.norm.isf(FAILURE / 10) * 2 / 200


@pytest.mark.parametrize("d", [1, 3, 8])
def test_the_sampler_follows_the_density(d):
    """Reports lie on the sphere, on the side of v as often as the density says, and each half is uniform: the law of |<u, v>| is that of a uniform u."""
    eps, bound, n = 0.9, 1.7, 40_000
    R = L2Randomizer(d, eps)
    for share in (0.0, 0.4, 1.0):
        v = np.ones(d) / math.sqrt(d) * share * bound
        out = R.privatize(np.tile(v, (n, 1)), bound, rng(3))
        assert np.allclose(np.linalg.norm(out, axis=1), bound * R.stretch, rtol=1e-12)
        along = out @ np.ones(d) / math.sqrt(d) / (bound * R.stretch)
        p = R.density(np.ones((1, d)), v[None], bound)[0, 0] / 2 if share else 0.5
        assert abs((along > 0).sum() - n * p) < stats.norm.isf(FAILURE / 2) * math.sqrt(n * p * (1 - p))
        if d > 1:
            assert stats.kstest(np.abs(along) ** 2, stats.beta(0.5, (d - 1) / 2).cdf).pvalue > FAILURE


@pytest.mark.parametrize("d", [1, 2, 3, 10, 40])
def test_the_stretch_makes_it_unbiased_by_quadrature(d):
    """E |u_1| for a uniform u, from the density (1 - t^2)^((d - 3) / 2) integrated over t = sin a; the report is right with probability truth."""
    if d == 1:
        mean = 1.0
    else:
        top, all_ = (quad(lambda a, p=p: math.sin(a) ** p * math.cos(a) ** (d - 2), 0, math.pi / 2)[0] for p in (1, 0))
        mean = top / all_
    R = L2Randomizer(d, 1.3)
    assert math.isclose(R.truth / (1 - R.truth), math.exp(1.3), rel_tol=1e-12)
    assert math.isclose(R.stretch * mean * (2 * R.truth - 1), 1.0, rel_tol=1e-9)


def test_randomizer_is_unbiased_by_draws():
    """|z| of each coordinate's mean; the variance of a coordinate is known from the norm of the reports."""
    d, bound, n = 6, 3.0, 200_000
    R, v = L2Randomizer(d, 1.0), np.array([2.0, -1.0, 0.5, 0, 0, 0.3])
    out = R.privatize(np.tile(v, (n, 1)), bound, rng(4))
    z = (out.mean(axis=0) - v) / (out.std(axis=0) / math.sqrt(n))
    assert np.abs(z).max() < stats.norm.isf(FAILURE / (2 * d))


# --- the non-interactive protocol

@pytest.mark.parametrize("delta", [None, 1e-5])
def test_reports_are_unbiased_for_clipped_moments_with_the_stated_variance(delta):
    """One person's report, repeated: mean and variance of each entry. Laplace noise has kurtosis 6, so that a sample variance scatters by sqrt(5 / n)."""
    m, n = NonInteractive(3, 2.0, delta, r=1.0, r_y=0.5), 40_000
    X, y = np.tile([3.0, -0.4, 0.9], (2 * n, 1)), np.full(2 * n, -7.0)                               # 3.0 and -7.0 are beyond the clipping
    cov, cross = m.privatize(X, y, rng(5))
    x = np.array([1.0, -0.4, 0.9])
    for report, true, sd in ((cov, np.outer(x, x)[np.triu_indices(3)], m.sd[0]), (cross, x * -0.5, m.sd[1])):
        assert report.shape == (n, len(true))
        assert np.abs((report.mean(axis=0) - true) / (sd / math.sqrt(n))).max() < stats.norm.isf(FAILURE / 24)
        assert np.abs(report.var(axis=0) / sd**2 - 1).max() < stats.norm.isf(FAILURE / 24) * math.sqrt(5 / n)
        law = stats.laplace(scale=sd / math.sqrt(2)) if delta is None else stats.norm(scale=sd)
        assert stats.kstest((report - true).ravel()[::3], law.cdf).pvalue > FAILURE
    assert np.abs(np.corrcoef(cov.T) - np.eye(6)).max() < stats.norm.isf(FAILURE / 30) / math.sqrt(n)   # independent entries


@pytest.mark.parametrize("delta", [None, 1e-5])
def test_the_aggregate_has_the_law_of_the_mean_of_reports(delta):
    """Two-sample Kolmogorov-Smirnov of every entry: 1500 times the mean of 8 + 8 reports, and as many draws of the aggregate."""
    g, m = rng(6), NonInteractive(2, 1.0, delta, r=1.0, r_y=2.0)
    X, y, _ = people(16, 2, 1, g)
    M = m.moments(X, y)
    single = [m.mean(m.privatize(X, y, g)) for _ in range(1500)]
    at_once = [m.release(M, g) for _ in range(1500)]
    for a, b in ((np.array([s[0].ravel() for s in single]), np.array([s[0].ravel() for s in at_once])), (np.array([s[1] for s in single]), np.array([s[1] for s in at_once]))):
        assert min(stats.ks_2samp(u, v).pvalue for u, v in zip(a.T, b.T)) > FAILURE
    assert all(np.array_equal(s, s.T) for s, _ in single[:50] + at_once[:50])
    n = 2_000                                                                                        # and the exact mean and variance for many people, unequal groups
    big = Moments(np.eye(2) * n, np.ones(2) * 5 * n, n, 5 * n)
    draws = [m.release(big, g) for _ in range(4000)]
    sigma, b = np.array([s for s, _ in draws]) - np.eye(2), np.array([v for _, v in draws]) - 1
    for values, var in [(sigma[:, i, j], m.sd[0] ** 2 / n) for i, j in ((0, 0), (0, 1), (1, 1))] + [(v, m.sd[1] ** 2 / (5 * n)) for v in b.T]:
        assert abs(values.mean()) < stats.norm.isf(FAILURE / 10) * math.sqrt(var / 4000)
        assert abs(values.var() / var - 1) < stats.norm.isf(FAILURE / 10) * math.sqrt(2.2 / 4000)


def test_moments_of_chunks_add_up():
    m, g = NonInteractive(4, 1.0, 1e-5, r=0.7, r_y=0.5), rng(7)
    X, y = g.normal(size=(60, 4)), g.normal(size=60)
    M = m.moments(X[:20], y[:20]) + m.moments(X[20:], y[20:])
    x, t = np.clip(X, -0.7, 0.7), np.clip(y, -0.5, 0.5)
    first, second = np.r_[0:10, 20:40], np.r_[10:20, 40:60]
    assert np.allclose(M.covariance, x[first].T @ x[first]) and np.allclose(M.cross, x[second].T @ t[second]) and (M.n_covariance, M.n_cross) == (30, 30)
    assert m.moments(X[:5], y[:5]).n_covariance == 2 and m.moments(X[:5], y[:5]).n_cross == 3


def test_without_noise_the_plug_in_is_least_squares():
    """epsilon = 1e13: the noise is below 1e-12. Both halves hold the same people, so that their moments belong together."""
    g = rng(8)
    X, y = g.normal(size=(50, 4)), g.normal(size=50)
    m = NonInteractive(4, 1e13, None, r=9.0, r_y=9.0)
    sigma, b = m.mean(m.privatize(np.r_[X, X], np.r_[y, y], rng(9)))
    theta, low = plug_in(sigma, b)
    assert low == 0 and np.allclose(theta, LinearRegression(fit_intercept=False).fit(X, y).coef_, atol=1e-9)


def test_on_an_orthogonal_design_it_is_the_lasso():
    """scikit-learn minimizes |y - X theta|^2 / (2 n) + alpha |theta|_1; with X^T X = n I that is a soft threshold at alpha."""
    g = rng(10)
    X = np.linalg.qr(g.normal(size=(64, 6)))[0] * 8
    y = X @ np.array([1.0, -0.7, 0, 0, 0.3, 0]) + g.normal(0, 0.5, 64)
    ours = sparse_estimate(X.T @ X / 64, X.T @ y / 64, 0.25)
    assert np.allclose(ours, Lasso(alpha=0.25, fit_intercept=False, tol=1e-12).fit(X, y).coef_, atol=1e-8)
    assert (ours == 0).sum() >= 2


def test_eigenvalues_below_the_floor_are_raised_and_counted():
    q = np.linalg.qr(rng(11).normal(size=(3, 3)))[0]
    sigma, b = q @ np.diag([-1.0, 0.05, 2.0]) @ q.T, np.array([1.0, 2.0, 3.0])
    sigma = (sigma + sigma.T) / 2
    theta, low = plug_in(sigma, b, floor=0.1)
    assert low == 2 and np.allclose(theta, q @ np.diag([10, 10, 0.5]) @ q.T @ b)
    with pytest.raises(ValueError, match="eigenvalue of 0"):
        plug_in(sigma, b)                                                                             # floor 0: a negative one becomes 0, which has no inverse


def test_threshold_is_the_noise_level():
    """sqrt(2 ln d) times the deviation of an entry of Sigma^-1 b for an identity covariance and |theta| = 1: here by draws, within 5% (4000 draws: 1.1%, and n is large)."""
    g, n = rng(12), 10**8
    m, theta = NonInteractive(5, 1.0, 1e-5, r=1.0, r_y=2.0), np.array([1.0, 0, 0, 0, 0])
    M = Moments(np.eye(5) * n / 2, theta * n / 2, n // 2, n // 2)
    for public in (False, True):
        draws = []
        for _ in range(4000):
            sigma, b = m.release(M, g)
            draws.append(plug_in(np.eye(5) if public else sigma, b, 0.1)[0][1])
        assert m.threshold(n, 1.0, public) / math.sqrt(2 * math.log(5)) == pytest.approx(np.std(draws), rel=0.05)
    assert m.threshold(n, 3.0) == pytest.approx(3 * m.threshold(n)) and m.threshold(4 * n) == pytest.approx(m.threshold(n) / 2)


# --- the interactive protocol

def plain_iht(X, y, T, k, lr, r, r_y):
    """Without privacy, person by person."""
    theta, n, path = np.zeros(X.shape[1]), len(y), [np.zeros(X.shape[1])]
    for t in range(T):
        g = np.zeros(X.shape[1])
        for i in range(n * t // T, n * (t + 1) // T):
            x = np.minimum(np.maximum(X[i], -r), r)
            g += x * (x @ theta - min(max(y[i], -r_y), r_y))
        theta = theta - lr * g / (n * (t + 1) // T - n * t // T)
        small = sorted(range(len(theta)), key=lambda j: abs(theta[j]))[:len(theta) - k]
        theta[small] = 0
        path.append(theta.copy())
    return np.array(path)


def honest(monkeypatch, record):
    """Replaces the randomizer by the truth, and records what it was asked."""
    def privatize(self, V, bound, rng=None):
        record.append((V.copy(), bound))
        return V
    monkeypatch.setattr(L2Randomizer, "privatize", privatize)


def test_without_noise_it_is_iterative_hard_thresholding(monkeypatch):
    record, g = [], rng(13)
    honest(monkeypatch, record)
    X, y = g.normal(size=(90, 5)), g.normal(size=90)
    ours = ldp_iht(X, y, 1.0, k=2, rounds=4, r=1.2, r_y=0.9, lr=0.3, batch=7, rng=g)
    assert np.allclose(ours, plain_iht(X, y, 4, 2, 0.3, 1.2, 0.9), atol=1e-12) and (ours[1:] != 0).sum(axis=1).tolist() == [2] * 4


def test_every_person_is_asked_once_and_the_bound_holds(monkeypatch):
    """Each y is a number of its own, so that gradients tell who was asked; the bound must hold for the worst person (all entries at r, y at -r_y)."""
    record, n = [], 50
    honest(monkeypatch, record)
    X, y = np.ones((n, 3)), -np.arange(1.0, n + 1) / n
    path = ldp_iht(X, y, 1.0, k=2, rounds=6, r=1.0, r_y=1.0, lr=0.4, batch=4, rng=rng(14))
    rounds = groups(n, 6)
    asked = []
    for V, bound in record:
        t = next(t for t, s in enumerate(rounds) if len(asked) < s.stop)
        assert bound == pytest.approx(math.sqrt(3) * (np.abs(path[t]).sum() + 1.0)) and np.linalg.norm(V, axis=1).max() <= bound
        asked += ((path[t].sum() - V[:, 0]) * n).round().astype(int).tolist()
    assert sorted(-np.array(asked)) == list(range(1, n + 1))
    for T in (1, 3, 7, 50):
        flat = [i for s in groups(n, T) for i in range(n)[s]]
        assert flat == list(range(n)) and all(s.stop > s.start for s in groups(n, T)) and len(groups(n, T)) == T


def test_ball_and_real_randomizer():
    """With the projection theta stays in the ball; with 40000 people of 4 traits the answer is near (12 repetitions: mean error 0.09, deviation 0.03)."""
    X, y, theta = people(40_000, 4, 1, rng(15))
    path = ldp_iht(X, y, 2.0, k=2, rounds=3, r=1.0, r_y=2.0, radius=0.8, rng=rng(16))
    assert path.shape == (4, 4) and np.linalg.norm(path, axis=1).max() <= 0.8 * (1 + 1e-12) and not path[0].any()
    path = ldp_iht(X, y, 2.0, k=2, rounds=3, r=1.0, r_y=2.0, rng=rng(16))
    assert np.linalg.norm(path[-1] - theta) < 0.3


def test_integers_and_floats_are_the_same_people():
    X, y, _ = people(500, 3, 1, rng(17))
    a, b = (ldp_iht(x, y, 1.0, 1, 2, rng=rng(18)) for x in (X.astype(np.int8), X.astype(float)))
    assert np.array_equal(a, b)
    m = NonInteractive(3, 1.0)
    assert np.array_equal(m.moments(X.astype(np.int8), y).covariance, m.moments(X.astype(float), y).covariance)


def test_hard_threshold():
    x = np.array([0.5, -2.0, 1.0, -0.1, 2.0])
    assert hard_threshold(x, 2).tolist() == [0, -2.0, 0, 0, 2.0] and hard_threshold(x, 5).tolist() == x.tolist()
    for k in range(1, 6):
        best = min((np.where(np.isin(np.arange(5), c), x, 0) for c in itertools.combinations(range(5), k)), key=lambda v: ((v - x) ** 2).sum())
        assert np.array_equal(np.abs(hard_threshold(x, k)), np.abs(best))


# --- bad input

@pytest.mark.parametrize("change, error, message", [
    (dict(epsilon=0), ValueError, "epsilon=0"), (dict(epsilon=math.nan), ValueError, "epsilon=nan"), (dict(epsilon=math.inf), ValueError, "epsilon=inf"), (dict(delta=0), ValueError, "delta=0"),
    (dict(delta=1.0), ValueError, "delta=1.0"), (dict(delta=math.nan), ValueError, "delta=nan"), (dict(d=0), ValueError, "d=0"), (dict(d=2.0), TypeError, "d=2.0"),
    (dict(r=0), ValueError, "r=0"), (dict(r=math.inf), ValueError, "r=inf"), (dict(r_y=-1.0), ValueError, "r_y=-1.0")])
def test_bad_protocols(change, error, message):
    with pytest.raises(error, match=message):
        NonInteractive(**dict(d=3, epsilon=1.0, delta=1e-5) | change)


@pytest.mark.parametrize("X, y, message", [
    (np.ones(4), np.ones(4), "X has shape"), (np.ones((4, 3)), np.ones(3), "X has shape"), (np.ones((1, 3)), np.ones(1), "n >= 2"), (np.full((4, 3), np.nan), np.ones(4), "X contains nan"),
    (np.ones((4, 3)), np.full(4, np.inf), "y contains inf"), (np.ones((4, 2)), np.ones(4), "X has shape")])
def test_bad_people_release_nothing(X, y, message):
    g, m = rng(19), NonInteractive(3, 1.0, 1e-5)
    state = g.bit_generator.state
    calls = [lambda: m.privatize(X, y, g), lambda: m.moments(X, y)]
    if X.shape != (4, 2):                                                                             # IHT reads d off X
        calls.append(lambda: ldp_iht(X, y, 1.0, 1, 1, rng=g))
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    assert g.bit_generator.state == state


@pytest.mark.parametrize("change, error, message", [
    (dict(epsilon=-1.0), ValueError, "epsilon=-1.0"), (dict(k=0), ValueError, "k=0"), (dict(k=4), ValueError, "k=4"), (dict(k=1.0), TypeError, "k=1.0"), (dict(rounds=0), ValueError, "rounds=0"),
    (dict(rounds=11), ValueError, "rounds=11"), (dict(rounds=True), TypeError, "rounds=True"), (dict(lr=0), ValueError, "lr=0"), (dict(r=math.nan), ValueError, "r=nan"),
    (dict(r_y=0), ValueError, "r_y=0"), (dict(radius=0), ValueError, "radius=0"), (dict(radius=math.nan), ValueError, "radius=nan"), (dict(batch=0), ValueError, "batch=0")])
def test_bad_rounds_release_nothing(change, error, message):
    g = rng(20)
    state = g.bit_generator.state
    with pytest.raises(error, match=message):
        ldp_iht(np.ones((10, 3)), np.ones(10), **dict(epsilon=1.0, k=1, rounds=2, rng=g) | change)
    assert g.bit_generator.state == state


def test_other_bad_input():
    R, m, g = L2Randomizer(3, 1.0), NonInteractive(3, 1.0), rng(21)
    state = g.bit_generator.state
    for call, error, message in ((lambda: R.privatize(np.ones((2, 3)), 1.0, g), ValueError, "row of norm"), (lambda: R.privatize(np.ones((2, 2)), 9.0, g), ValueError, "V has shape"),
                                 (lambda: R.privatize(np.ones(3), 9.0, g), ValueError, "V has shape"), (lambda: R.privatize(np.full((1, 3), np.nan), 9.0, g), ValueError, "V contains nan"),
                                 (lambda: R.privatize(np.ones((2, 3)), 0, g), ValueError, "bound=0"), (lambda: L2Randomizer(3, 0), ValueError, "epsilon=0"),
                                 (lambda: m.release(np.eye(3), g), TypeError, "moments="), (lambda: m.mean((np.full((2, 6), np.nan), np.ones((2, 3)))), ValueError, "reports contains nan"),
                                 (lambda: plug_in(np.eye(2), np.ones(3)), ValueError, "sigma has shape"), (lambda: plug_in(np.array([[1.0, 2], [0, 1]]), np.ones(2)), ValueError, "symmetric"),
                                 (lambda: plug_in(np.eye(2), np.ones(2), -1), ValueError, "floor=-1"), (lambda: plug_in(np.eye(2) * np.nan, np.ones(2)), ValueError, "sigma contains nan"),
                                 (lambda: sparse_estimate(np.eye(2), np.ones(2), -0.1), ValueError, "threshold"), (lambda: hard_threshold(np.array([np.nan]), 1), ValueError, "theta contains nan"),
                                 (lambda: covariance_sensitivity(3, 1.0, 3), ValueError, "order=3"), (lambda: cross_sensitivity(3, 1.0, 1.0, 0), ValueError, "order=0"),
                                 (lambda: m.privatize(np.ones((4, 3)), np.ones(4), rng=3), TypeError, "rng=3"), (lambda: groups(3, 4), ValueError, "rounds=4")):
        with pytest.raises(error, match=message):
            call()
    assert g.bit_generator.state == state


def test_without_a_generator_reports_differ():
    m, X, y = NonInteractive(2, 1.0), np.ones((4, 2)), np.ones(4)
    assert not np.array_equal(m.privatize(X, y)[0], m.privatize(X, y)[0])
    assert not np.array_equal(ldp_iht(X, y, 1.0, 1, 1), ldp_iht(X, y, 1.0, 1, 1))
