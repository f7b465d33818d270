"""Private SpiderBoost: sensitivities by enumeration, the divergence between neighbours along a run, noise against its law, plain gradient descent as a limit, opendp's account, bad input."""
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lib.privacy.dp_stationary_points import GemanMcClure, anchor_sensitivity, private_spiderboost, releases, scales, variation_sensitivity
from lib.privacy.mechanisms import Budget, sensitivity, zcdp_epsilon

MODULE = "lib/privacy/dp_stationary_points.py"
BREAKS = [
    ("the noise of an anchor is halved", MODULE, "return 2 * L0 / b", "return L0 / b"),
    ("the noise of a variation is halved", MODULE, "return 2 * np.minimum(L1", "return np.minimum(L1"),
    ("the budget is split wrongly: each kind of release gets all of it", MODULE, "share * rho / anchors, (1 - share) * rho", "rho / anchors, rho"),
    ("the noise of a variation is capped at one gradient", MODULE, "2 * L0) / b", "L0) / b"),
    ("an anchor adds to the estimate", MODULE, "estimates.append(released if anchor else estimates[-1] + released)", "estimates.append(released if not estimates else estimates[-1] + released)"),
    ("a variation adds the two gradients", MODULE, "mean = mean - gradient(path[-2], batch)", "mean = mean + gradient(path[-2], batch)"),
    ("the step goes uphill", MODULE, "path[-1] - lr * estimates[-1]", "path[-1] + lr * estimates[-1]"),
    ("the last point may be the output", MODULE, "rng.integers(1, T + 1,", "rng.integers(1, T + 2,"),
]

# A statistical check below fails by chance with at most this probability for each seed; seeds are fixed, so it either always passes or shows a real change.
FAILURE = 1e-6
L0, L1 = GemanMcClure.L0, GemanMcClure.L1


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def loss():
    g = rng(1)
    X = g.normal(size=(60, 4))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    return GemanMcClure(X, X @ g.normal(size=4) + g.normal(0, 0.5, 60))


# --- the loss

def test_constants_of_the_loss_are_attained():
    """phi' and phi'' of s^2 / (2 (1 + s^2)) on a fine grid that has the maximizers 1/sqrt(3) and 0."""
    s = np.r_[np.linspace(-20, 20, 40_001), 1 / math.sqrt(3)]
    assert math.isclose(np.abs(s / (1 + s * s) ** 2).max(), L0, rel_tol=1e-12)
    assert math.isclose(np.abs((1 - 3 * s * s) / (1 + s * s) ** 3).max(), L1, rel_tol=1e-12)


def test_gradient_is_the_derivative_of_the_value(loss):
    """Central differences with h = 1e-5: error h^2 times a third derivative of at most 5, and round-off 1e-16 / h."""
    w, h = rng(2).normal(size=(3, 4)), 1e-5
    numeric = np.stack([(loss.value(w + h * e) - loss.value(w - h * e)) / (2 * h) for e in np.eye(4)], axis=-1)
    assert np.abs(loss.gradient(w) - numeric).max() < 1e-9
    batch = np.array([3, 11, 40])
    plain = np.mean([(x @ w[0] - t) / (1 + (x @ w[0] - t) ** 2) ** 2 * x for x, t in zip(loss.X[batch], loss.y[batch])], axis=0)
    assert np.allclose(loss.gradient(w[0], batch), plain, atol=1e-15)


# --- privacy: sensitivity, noise, account

DOMAIN = [(1.0, -1 / math.sqrt(3)), (-1.0, -1 / math.sqrt(3)), (1.0, 0.0), (-1.0, 1.0), (0.5, 3.0)]           # (x, y): at w = 0, s = -y


def mean_gradient(records, w):
    return GemanMcClure(np.array([[x] for x, _ in records]), np.array([y for _, y in records])).gradient(np.array([w]))


def test_anchor_sensitivity_is_that_of_all_neighbours():
    """All data sets of three records out of five, and all their neighbours: the bound holds at every w, and is attained at w = 0."""
    exact = {w: sensitivity(lambda s: mean_gradient(s, w), DOMAIN, 3, order=2) for w in (-1.0, 0.0, 0.4)}
    assert max(exact.values()) <= anchor_sensitivity(L0, 3) * (1 + 1e-12)
    assert math.isclose(exact[0.0], anchor_sensitivity(L0, 3), rel_tol=1e-12)


@pytest.mark.parametrize("a, b", [(0.0, 1e-3), (0.0, 0.3), (-0.6, 0.5), (-3.0, 3.0)])
def test_variation_sensitivity_is_that_of_all_neighbours(a, b):
    exact = sensitivity(lambda s: mean_gradient(s, b) - mean_gradient(s, a), DOMAIN, 3, order=2)
    bound = variation_sensitivity(L0, L1, abs(b - a), 3)
    assert exact <= bound * (1 + 1e-12)
    if abs(b - a) < 0.01:
        assert math.isclose(exact, 5 / 8 * bound, rel_tol=1e-3)                                              # curvatures of this loss go from -1/4 (s = 1) to 1 (s = 0), not from -1


def clipped(records, w):
    """The worst loss with these constants: its gradient runs from -L0 to L0 with slope L1."""
    return np.mean(records) * np.clip(L1 * w, -L0, L0)


@pytest.mark.parametrize("step", [0.1, L0 / L1, 1.5 * L0 / L1, 2 * L0 / L1, 5.0])
def test_sensitivity_is_attained_for_every_step(step):
    exact = sensitivity(lambda s: clipped(s, step / 2) - clipped(s, -step / 2), [-1.0, 1.0], 3, order=2)
    assert math.isclose(exact, variation_sensitivity(L0, L1, step, 3), rel_tol=1e-12)
    assert math.isclose(sensitivity(lambda s: clipped(s, 9.0), [-1.0, 1.0], 3, order=2), anchor_sensitivity(L0, 3), rel_tol=1e-12)


def test_random_neighbours_stay_below_the_bounds(loss):
    g = rng(3)
    for _ in range(200):
        i, x = g.integers(60), g.normal(size=4)
        X, y = loss.X.copy(), loss.y.copy()
        X[i], y[i] = x / np.linalg.norm(x), g.normal(0, 2)
        other, w = GemanMcClure(X, y), g.normal(size=(2, 4))
        w[1] = w[0] + g.normal(size=4) * 10 ** g.uniform(-3, 1)
        a, b = (m.gradient(w) for m in (loss, other))
        assert np.linalg.norm(a[0] - b[0]) <= anchor_sensitivity(L0, 60)
        assert np.linalg.norm((a[1] - a[0]) - (b[1] - b[0])) <= variation_sensitivity(L0, L1, np.linalg.norm(w[1] - w[0]), 60)


def divergence(one, other, w0, n, rho, T, q, share, lr=1.0, constants=(L0, L1)):
    """zCDP that a run on `one` costs against `other`: sum of |shift|^2 / (2 sigma^2), given everything released before. Split into anchors and variations."""
    run = private_spiderboost(one, w0, n, *constants, rho, T, q, lr=lr, anchor_share=share, rng=rng(4))
    total = [0.0, 0.0]
    for t in range(T + 1):
        now, before = run.path[t], run.path[t - 1]
        shift = other(now) - one(now) if t % q == 0 else (other(now) - other(before)) - (one(now) - one(before))
        total[t % q != 0] += np.linalg.norm(shift) ** 2 / (2 * run.sigma[t] ** 2)
    return total


@pytest.mark.parametrize("T, q, share", [(11, 4, 0.5), (9, 3, 0.2), (6, 100, 0.7)])
def test_the_whole_run_costs_rho_and_not_more(T, q, share):
    """Losses on which the bounds are attained, one for anchors (linear) and one for variations (quadratic, within its range): the divergence is exactly the share of rho."""
    n, rho, plus = 5, 0.8, np.array([1.0, 1, 1, 1, 1])
    minus = np.array([-1.0, 1, 1, 1, 1])
    linear = [lambda w, _=None, s=s: s.mean() * L0 * np.ones(1) for s in (plus, minus)]
    assert divergence(*linear, np.zeros(1), n, rho, T, q, share) == pytest.approx([share * rho, 0.0], rel=1e-9)
    quadratic = [lambda w, _=None, s=s: s.mean() * w for s in (plus, minus)]                                   # L1 = 1; L0 = 100 covers the range
    spent = divergence(*quadratic, np.ones(1), n, rho, T, q, share, lr=1e-3, constants=(100.0, 1.0))
    assert spent[1] == pytest.approx((1 - share) * rho, rel=1e-9) and spent[0] < 1e-2 * rho


def test_neighbours_of_real_data_cost_at_most_rho(loss):
    for i in range(0, 60, 7):
        X, y = loss.X.copy(), loss.y.copy()
        X[i], y[i] = -X[i], -y[i] + 1
        assert 0 < sum(divergence(loss.gradient, GemanMcClure(X, y).gradient, np.zeros(4), 60, 1.0, 20, 5, 0.5)) <= 1.0


def test_noise_has_the_law_that_is_booked(loss):
    """Released minus true, in units of the stated deviation, is standard normal: 61 releases of 50 runs and 4 coordinates."""
    run = private_spiderboost(loss.gradient, np.zeros((50, 4)), 60, L0, L1, 2.0, 60, 7, rng=rng(5))
    z = []
    for t in range(61):
        true = loss.gradient(run.path[t]) - (loss.gradient(run.path[t - 1]) if t % 7 else 0)
        released = run.estimates[t] - (run.estimates[t - 1] if t % 7 else 0)
        z.append((released - true) / run.sigma[t][:, None])
        step = np.linalg.norm(run.path[t] - run.path[t - 1], axis=1) if t % 7 else None
        cost = 1.0 / 9 if t % 7 == 0 else 1.0 / 52                                                             # half of rho for 9 anchors, half for 52 variations
        reach = 2 * L0 / 60 if t % 7 == 0 else 2 * np.minimum(L1 * step, 2 * L0) / 60
        assert np.allclose(run.sigma[t], reach / math.sqrt(2 * cost), rtol=1e-12)
    z = np.array(z)
    assert stats.kstest(z.ravel(), stats.norm.cdf).pvalue > FAILURE
    assert stats.kstest(z.ravel(), stats.norm(scale=1.1).cdf).pvalue < FAILURE                                 # the test has power
    lag, across = (z[1:] * z[:-1]).mean(), (z[:, 1:] * z[:, :-1]).mean()                                       # fresh noise at every step and in every run
    assert max(abs(lag), abs(across)) < stats.norm.isf(FAILURE / 4) / math.sqrt(z.size * 0.9)


def test_account_agrees_with_opendp(loss):
    dp = pytest.importorskip("opendp.prelude")
    dp.enable_features("contrib")
    run = private_spiderboost(loss.gradient, np.zeros(4), 60, L0, L1, 0.7, 12, 5, rng=rng(6))
    costs = []
    for t, scale in enumerate(run.sigma):
        noisy = dp.m.make_gaussian(dp.vector_domain(dp.atom_domain(T=float, nan=False)), dp.l2_distance(T=float), scale=float(scale))
        costs.append(noisy.map(anchor_sensitivity(L0, 60) if t % 5 == 0 else float(variation_sensitivity(L0, L1, np.linalg.norm(run.path[t] - run.path[t - 1]), 60))))
    assert sum(costs) == pytest.approx(run.rho, rel=1e-9) and run.rho == pytest.approx(0.7, rel=1e-12)
    one = dp.m.make_gaussian(dp.atom_domain(T=float, nan=False), dp.absolute_distance(T=float), scale=1 / math.sqrt(2 * sum(costs)))
    assert zcdp_epsilon(run.rho, 1e-5) == pytest.approx(dp.c.make_zCDP_to_approxDP(one).map(1.0).epsilon(1e-5), rel=1e-4)      # both minimize over the order, by search


def test_noise_and_payment_come_before_the_data():
    """The first gradient is asked for when the noise is drawn and booked; the same generator adds the same noise to other data."""
    g, budget, seen = rng(7), Budget(1.0), []
    start = g.bit_generator.state
    def look(w, batch):
        seen.append((g.bit_generator.state != start, budget.spent > 0))
        raise KeyError("no data")
    with pytest.raises(KeyError):
        private_spiderboost(look, np.zeros(2), 10, 1.0, 1.0, 1.0, 3, 2, budget=budget, rng=g)
    assert seen == [(True, True)]
    a, b = (private_spiderboost(lambda w, _: np.full(2, c), np.zeros(2), 10, 1.0, 1.0, 1.0, 3, 2, rng=rng(8)).estimates[0] - c for c in (0.0, 0.5))
    assert np.allclose(a, b, atol=1e-15)


def test_a_budget_pays_or_nothing_happens(loss):
    budget, g = Budget(1.0), rng(9)
    private_spiderboost(loss.gradient, np.zeros(4), 60, L0, L1, 0.6, 5, 2, budget=budget, rng=g)
    assert budget.spent == pytest.approx(0.6)
    state, before = g.bit_generator.state, budget.spent
    with pytest.raises(ValueError, match="exhausted"):
        private_spiderboost(lambda *a: pytest.fail("looked"), np.zeros(4), 60, L0, L1, 0.6, 5, 2, budget=budget, rng=g)
    assert g.bit_generator.state == state and budget.spent == before


# --- limits and counts

def test_without_noise_the_estimate_is_the_gradient(loss):
    """rho = 1e26: the noise is about 1e-14; differences telescope, and the run is gradient descent."""
    run = private_spiderboost(loss.gradient, np.zeros(4), 60, L0, L1, 1e26, 30, 7, lr=0.9, rng=rng(10))
    w = np.zeros(4)
    for t in range(31):
        assert np.abs(run.path[t] - w).max() < 1e-11 and np.abs(run.estimates[t] - loss.gradient(w)).max() < 1e-11
        w = w - 0.9 * loss.gradient(w)
    assert loss.value(run.path[-1]) < loss.value(run.path[0])


def test_q_of_one_is_noisy_gradient_descent(loss):
    """The loop of DP-GD, with the same generator: all of rho is for the T + 1 anchors."""
    run = private_spiderboost(loss.gradient, np.zeros(4), 60, L0, L1, 0.5, 9, 1, rng=rng(11))
    g, w = rng(11), np.zeros(4)
    sigma = 2 * L0 / 60 * math.sqrt(10 / (2 * 0.5))
    for t in range(10):
        assert np.allclose(run.path[t], w, atol=1e-14)
        w = w - 0.5 * (loss.gradient(w) + sigma * g.normal(size=4))
    assert np.allclose(run.sigma, sigma, rtol=1e-12) and run.anchors == 10


def test_releases_are_counted():
    for T, q in itertools.product(range(1, 30), range(1, 35)):
        assert releases(T, q) == (sum(t % q == 0 for t in range(T + 1)), sum(t % q != 0 for t in range(T + 1)))


def test_batches_and_work():
    """An anchor asks once for b1 records, a variation twice for the same b2 records, now and one step before; none is repeated within a batch."""
    calls = []
    def watch(w, batch):
        calls.append((w, batch))
        return 0.1 * w
    run = private_spiderboost(watch, np.ones(3), 40, 1.0, 1.0, 5.0, 8, 3, b1=20, b2=6, rng=rng(12))
    assert run.anchors == 3 and run.gradients == 3 * 20 + 6 * 2 * 6
    sizes = [len(b) for _, b in calls]
    assert sizes == [20, 6, 6, 6, 6] * 3
    at, batches = 0, []
    for t in range(9):
        w, batch = calls[at]
        assert np.array_equal(w, run.path[t]) and len(set(batch.tolist())) == len(batch) and 0 <= batch.min() and batch.max() < 40
        if t % 3:
            w, same = calls[at + 1]
            assert np.array_equal(w, run.path[t - 1]) and np.array_equal(same, batch)
            assert math.isclose(run.sigma[t], 2 * np.linalg.norm(run.path[t] - run.path[t - 1]) / 6 / math.sqrt(2 * 2.5 / 6), rel_tol=1e-12)
        else:
            assert math.isclose(run.sigma[t], 2 / 20 / math.sqrt(2 * 2.5 / 3), rel_tol=1e-12)
        batches.append(tuple(sorted(batch.tolist())))
        at += 1 + (t % 3 > 0)
    assert len(set(batches)) == 9                                                                             # drawn anew


def test_the_output_is_uniform_among_w1_to_wT():
    run = private_spiderboost(lambda w, _: np.zeros_like(w), np.zeros((8000, 1)), 10, 1.0, 1.0, 1.0, 4, 2, rng=rng(13))
    chosen = (run.path[:, :, 0] == run.w[:, 0]).argmax(axis=0)
    counts = np.bincount(chosen, minlength=6)
    assert counts[0] == counts[5] == 0 and stats.chisquare(counts[1:5]).pvalue > FAILURE


def test_a_step_of_zero_releases_zero():
    """If two points coincide nothing is added and nothing told: the difference is zero whatever the records are."""
    run = private_spiderboost(lambda w, _: np.ones(2), np.zeros(2), 10, 1.0, 1.0, 1.0, 3, 4, lr=1e-320, rng=rng(14))
    assert np.array_equal(run.sigma[1:], np.zeros(3)) and np.array_equal(run.estimates[1:], run.estimates[[0, 0, 0]])


def test_scales_of_the_paper():
    """Small batches: 1/b; large ones: sqrt(T)/n, and sqrt(T/q)/n for anchors."""
    unit = 3 * math.sqrt(math.log(1e5)) / 2
    assert scales(1000, 100, 4, 10, 20, 0.5, 2.0, 2.0, 1e-5, c=3) == pytest.approx((unit * 0.5 / 10, unit * 2 / 20, unit * 0.5 / 20))
    assert scales(1000, 100, 4, 1000, 1000, 0.5, 2.0, 2.0, 1e-5, c=3) == pytest.approx((unit * 0.5 * 5 / 1000, unit * 2 * 10 / 1000, unit * 0.5 * 10 / 1000))


def test_half_of_rho_has_the_proportions_of_the_paper():
    """Where sqrt(T)/n rules: sigma_2 step / sigma_1 = sqrt(q) L1 step / L0, here with T + 1 = 12 releases, up to the ratio of 9 variations to 12."""
    run = private_spiderboost(lambda w, _: 0.1 * w, np.ones(2), 50, 1.0, 0.7, 4.0, 11, 4, rng=rng(15))
    one, two, _ = scales(50, 12, 4, 50, 50, 1.0, 0.7, 1.0, 1e-5)
    steps = np.linalg.norm(np.diff(run.path, axis=0), axis=1)[:-1]
    for t in (1, 2, 3, 5):
        assert run.sigma[t] / run.sigma[0] == pytest.approx(two * steps[t - 1] / one * math.sqrt(9 / 12), rel=1e-12)


# --- bad input

@pytest.mark.parametrize("change, error, message", [
    (dict(n=0), ValueError, "n=0"), (dict(n=10.0), TypeError, "n=10.0"), (dict(T=0), ValueError, "T=0"), (dict(T=True), TypeError, "T=True"), (dict(q=0), ValueError, "q=0"),
    (dict(q=1.5), TypeError, "q=1.5"), (dict(rho=0), ValueError, "rho=0"), (dict(rho=math.nan), ValueError, "rho=nan"), (dict(rho=math.inf), ValueError, "rho=inf"),
    (dict(L0=-1.0), ValueError, "L0=-1.0"), (dict(L1=math.nan), ValueError, "L1=nan"), (dict(lr=0), ValueError, "lr=0"), (dict(b1=61), ValueError, "b1=61"),
    (dict(b2=0), ValueError, "b2=0"), (dict(anchor_share=1.0), ValueError, "anchor_share=1.0"), (dict(anchor_share=0), ValueError, "anchor_share=0"),
    (dict(anchor_share=math.nan), ValueError, "anchor_share=nan"), (dict(w0=np.array([np.nan])), ValueError, "w0 contains nan"), (dict(w0=1.0), ValueError, "w0 has shape"),
    (dict(budget=Budget(0.5)), ValueError, "exhausted"), (dict(gradient=None), TypeError, "gradient=None"), (dict(budget=1.0), TypeError, "budget=1.0")])
def test_bad_input_draws_and_spends_nothing(change, error, message):
    g = rng(16)
    state = g.bit_generator.state
    arguments = dict(gradient=lambda *a: pytest.fail("looked"), w0=np.zeros(2), n=60, L0=1.0, L1=1.0, rho=1.0, T=4, q=2, rng=g) | change
    with pytest.raises(error, match=message):
        private_spiderboost(**arguments)
    assert g.bit_generator.state == state and getattr(arguments.get("budget"), "spent", 0.0) == 0.0


def test_bad_rng_gradients_and_data():
    with pytest.raises(TypeError, match="rng=3"):
        private_spiderboost(lambda w, _: w, np.zeros(2), 5, 1.0, 1.0, 1.0, 4, 2, rng=3)
    for bad, message in ((np.full(2, np.nan), "gradient contains nan"), (np.zeros(3), "gradient has shape")):
        with pytest.raises(ValueError, match=message):
            private_spiderboost(lambda w, _: bad, np.zeros(2), 5, 1.0, 1.0, 1.0, 4, 2, rng=rng())
    for X, y, message in (([[1.0, 0.1]], [0.0], "row of norm"), ([[1.0]], [0.0, 1.0], "X has shape"), ([1.0], [0.0], "X has shape"), ([[np.nan]], [0.0], "X contains nan"),
                          ([[1.0]], [np.inf], "y contains inf")):
        with pytest.raises(ValueError, match=message):
            GemanMcClure(X, y)
    for epsilon, delta, message in ((0, 1e-5, "epsilon=0"), (1.0, 0, "delta=0"), (1.0, 1.0, "delta=1.0"), (math.nan, 1e-5, "epsilon=nan")):
        with pytest.raises(ValueError, match=message):
            scales(10, 4, 2, 10, 10, 1.0, 1.0, epsilon, delta)


def test_without_a_generator_runs_differ():
    a, b = (private_spiderboost(lambda w, _: w, np.zeros(2), 5, 1.0, 1.0, 1.0, 2, 2) for _ in range(2))
    assert not np.array_equal(a.estimates, b.estimates)
