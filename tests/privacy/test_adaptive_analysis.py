"""Adaptive analysis: sensitivities by enumeration, noise against its law, the sparse vector test by quadrature, PMW against a plain loop, budgets that refuse, the analyst, bad input."""
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lib.privacy.adaptive_analysis import (NoisyAnswers, PrivateMultiplicativeWeights, SparseVector, Thresholdout, check_query, overfit, overfit_accuracy, update_bound)
from lib.privacy.mechanisms import Budget, gaussian_rho, pure_rho, sensitivity

MODULE = "lib/privacy/adaptive_analysis.py"
BREAKS = [
    ("the noise of a test is halved", MODULE, '"value": 4 * s', '"value": 2 * s'),
    ("weights move the wrong way", MODULE, "np.exp(self.eta *", "np.exp(-self.eta *"),
    ("the threshold has no noise of its own", MODULE, '"threshold": 2 * s', '"threshold": 1e-9 * s'),
    ("the line is kept after a success", MODULE, "self.left, self.line = self.left - 1, None", "self.left, self.line = self.left - 1, self.line"),
    ("a success pays for the test but not for the answer", MODULE, "self.budget.spend(2 * pure_rho(self.epsilon))", "self.budget.spend(pure_rho(self.epsilon))"),
    ("noise for one answer, not for m", MODULE, "gaussian(means, 1 / self.n, self.rho / self.m, self.rng)", "gaussian(means, 1 / self.n, self.rho, self.rng)"),
    ("the budget of noisy answers is not asked", MODULE, "self.budget.spend(means.size * self.rho / self.m)", "self.budget.left"),
    ("votes against the answers", MODULE, ">= 0.5, 1.0, -1.0", ">= 0.5, -1.0, 1.0"),
]

# A statistical check below fails by chance with at most this probability for each seed; seeds are fixed, so it either always passes or shows a real change.
FAILURE = 1e-6


def rng(seed=0):
    return np.random.default_rng(seed)


class Recorded(np.random.Generator):
    """A generator whose Laplace draws are kept, with their scales."""

    def __init__(self, seed=0):
        super().__init__(np.random.PCG64(seed))
        self.drawn = []

    def laplace(self, loc=0.0, scale=1.0, size=None):
        x = super().laplace(loc, scale, size)
        self.drawn.append((scale, x))
        return x


# --- noise on every answer

def test_a_mean_moves_by_one_over_n():
    for n in (1, 2, 4):
        for order in (1, 2):
            assert math.isclose(sensitivity(lambda s: np.mean(s), (0.0, 0.3, 1.0), n, order), 1 / n)


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_noise_has_the_law_that_rho_asks_for(kind):
    """m answers cost rho together: m Gaussians of gaussian_rho each, or m Laplace releases of pure_rho each. Kolmogorov-Smirnov over 20000 draws; 5% in scale would show."""
    n, m, rho = 50, 20_000, 0.7
    a = NoisyAnswers(n, m, rho, kind, rng=rng(1))
    noise = a.answer(np.full((n, m), 0.25)) - 0.25
    if kind == "gaussian":
        assert math.isclose(m * gaussian_rho(1 / n, a.sigma), rho)
        law = stats.norm(scale=a.sigma)
    else:
        law = stats.laplace(scale=a.sigma / math.sqrt(2))
        assert math.isclose(m * pure_rho(1 / n / law.kwds["scale"]), rho)
    assert stats.kstest(noise, law.cdf).pvalue > FAILURE
    assert math.isclose(a.budget.spent, rho)


def test_laplace_agrees_with_opendp():
    dp = pytest.importorskip("opendp.prelude")
    dp.enable_features("contrib")
    n, m, rho = 200, 30, 0.4
    a = NoisyAnswers(n, m, rho, "laplace", rng=rng())
    theirs = dp.m.make_laplace(dp.atom_domain(T=float, nan=False), dp.absolute_distance(T=float), scale=a.sigma / math.sqrt(2)).map(1 / n)
    assert m * theirs**2 / 2 == pytest.approx(rho, rel=1e-9)


def test_noisy_answers_refuse_the_query_after_the_last():
    g = rng(2)
    a = NoisyAnswers(4, 3, 0.5, rng=g)
    assert np.ndim(a.answer([0, 1, 1, 0])) == 0 and a.answer(np.ones((4, 2))).shape == (2,)
    state, spent = g.bit_generator.state, a.budget.spent
    with pytest.raises(ValueError, match="exhausted"):
        a.answer([0, 1, 1, 0])
    assert g.bit_generator.state == state and a.budget.spent == spent
    b = NoisyAnswers(4, 3, 0.5, rng=g)
    with pytest.raises(ValueError, match="exhausted"):
        b.answer(np.ones((4, 4)))                                              # four at once are refused, all of them
    assert b.budget.spent == 0


def test_a_large_budget_is_exact():
    values = rng(3).random((30, 5))
    assert np.abs(NoisyAnswers(30, 5, 1e12, rng=rng()).answer(values) - values.mean(axis=0)).max() < 1e-5


# --- the sparse vector technique

def outcome(scales, threshold, below, last):
    """P(tests with these values all fail, then one with `last` succeeds), by quadrature over the noise of the threshold."""
    z = np.linspace(-200, 200, 80_001)
    p = stats.laplace.pdf(z, scale=scales["threshold"]) * (1 - stats.laplace.cdf(threshold + z - last, scale=scales["value"]))
    for v, k in below:
        p = p * stats.laplace.cdf(threshold + z - v, scale=scales["value"]) ** k
    return np.trapezoid(p, z)


def largest_loss(scales, threshold=10.0):
    worst = 0.0
    for v, w in itertools.product((0, 10, 20), repeat=2):
        for a, b in itertools.product((-1, 0, 1), repeat=2):
            worst = max(worst, abs(math.log(outcome(scales, threshold, [(v, 30)], w) / outcome(scales, threshold, [(v + a, 30)], w + b))))
    return worst


def test_a_test_until_success_costs_epsilon_and_no_more():
    """Thirty failures and a success, values moved by the sensitivity: e^epsilon is reached. Half of either noise goes beyond it."""
    scales = SparseVector(1.0, 1.0, 10.0, 1, rng=rng()).scales
    assert largest_loss(scales) == pytest.approx(1.0, abs=1e-3)                # the quadrature's own error
    for name in ("threshold", "value"):
        assert largest_loss(scales | {name: scales[name] / 2}) > 1.4
    assert scales["answer"] == 1.0                                             # Lap(sensitivity / epsilon) on the answer: epsilon
    assert SparseVector(0.5, 4.0, 1.0, 1, rng=rng()).scales == {"threshold": 0.25, "value": 0.5, "answer": 0.125}


def test_draws_follow_the_scales_and_are_fresh():
    g = Recorded()
    sv = SparseVector(1.0, 0.5, 100.0, 2, rng=g)
    assert [s for s, _ in g.drawn] == [4.0]
    outcomes = [sv.above(v) for v in (0.0, 0.0, 1e6)]
    assert outcomes == [False, False, True] and [s for s, _ in g.drawn] == [4.0, 8.0, 8.0, 8.0]
    assert sv.release(3.0) == 3.0 + g.drawn[-1][1] and g.drawn[-1][0] == 2.0
    sv.above(0.0)
    assert [s for s, _ in g.drawn[5:]] == [4.0, 8.0]                           # a new line after each success
    assert len({x for _, x in g.drawn}) == len(g.drawn)


def test_the_test_compares_with_the_noisy_line():
    """Against the formula with the very draws."""
    for seed in range(200):
        g = Recorded(seed)
        sv = SparseVector(1.0, 1.0, 3.0, 1, rng=g)
        result = sv.above(3.0)
        (_, gamma), (_, nu) = g.drawn
        assert result == (3.0 + nu >= 3.0 + gamma)


def test_draws_have_the_laplace_law():
    g = Recorded(4)
    for _ in range(3000):
        sv = SparseVector(1.0, 1.0, 50.0, 1, rng=g)
        sv.above(0.0), sv.release(0.0)
    for scale in (2.0, 4.0, 1.0):
        assert stats.kstest([x for s, x in g.drawn if s == scale], stats.laplace(scale=scale).cdf).pvalue > FAILURE


def test_successes_are_paid_in_advance_and_run_out():
    budget, g = Budget(1.0), rng(5)
    sv = SparseVector(1.0, 0.5, 1.0, 3, budget, g)
    each = 2 * pure_rho(0.5)
    assert budget.spent == each == 0.25
    assert sv.above(1e6) and budget.spent == each                              # the next test is paid for when it begins
    assert sv.above(1e6) and math.isclose(budget.spent, 2 * each)
    assert not sv.above(-1e6) and math.isclose(budget.spent, 3 * each)         # failing costs nothing more
    assert not sv.above(-1e6) and math.isclose(budget.spent, 3 * each)
    assert sv.above(1e6) and sv.left == 0
    state = g.bit_generator.state
    for value in (1e6, -1e6):
        with pytest.raises(ValueError, match="exhausted"):
            sv.above(value)
    assert g.bit_generator.state == state and math.isclose(budget.spent, 3 * each)


def test_an_outer_budget_may_run_out_first():
    budget, g = Budget(0.3), rng(6)
    sv = SparseVector(1.0, 0.5, 1.0, 3, budget, g)
    assert sv.above(1e6)
    state = g.bit_generator.state
    with pytest.raises(ValueError, match="exhausted"):
        sv.above(1e6)
    assert g.bit_generator.state == state and sv.left == 2 and budget.spent == 0.25


# --- multiplicative weights

def counts(seed=0, size=16, n=500):
    return rng(seed).multinomial(n, rng(seed + 1).dirichlet(np.ones(size)))


def test_pmw_against_a_plain_loop():
    """The same draws, in plain Python: answers and weights after every query."""
    S, g = counts(7), Recorded(7)
    pmw = PrivateMultiplicativeWeights(S, 0.1, 40, 50.0, eta=0.3, rng=g)
    queries = rng(8).random((60, 16))
    s, D, draws = math.sqrt(40 / 50.0) / 500, [1 / 16] * 16, None
    answers, kept = [], []
    for phi in queries:
        answers.append(pmw.answer(phi))
        kept.append(pmw.D.copy())
    draws = iter(g.drawn)
    scale, gamma = next(draws)
    assert math.isclose(scale, 2 * s)
    done, fresh = 0, True
    for phi, a, weights in zip(queries, answers, kept):
        if not fresh:
            gamma, fresh = next(draws)[1], True
        guess, truth = sum(p * q for p, q in zip(phi, D)), sum(p * q for p, q in zip(phi, S / 500))
        scale, nu = next(draws)
        assert math.isclose(scale, 4 * s)
        if abs(guess - truth) + nu < 0.1 + gamma:
            assert math.isclose(a, guess, rel_tol=1e-12)
        else:
            scale, xi = next(draws)
            assert math.isclose(scale, s) and math.isclose(a, truth + xi, rel_tol=1e-12)
            D = [q * math.exp(0.3 * p if a > guess else -0.3 * p) for p, q in zip(phi, D)]
            D, done, fresh = [q / sum(D) for q in D], done + 1, False
        assert np.allclose(weights, D, rtol=1e-10)                             # sums of sixteen in another order
    assert next(draws, None) is None and done >= 3 and pmw.sparse.left == 40 - done


def test_each_update_lowers_the_divergence():
    pmw = PrivateMultiplicativeWeights(counts(9) + 1, 0.05, 300, 1e5, eta=0.2, rng=rng(9))
    S, g, gaps = pmw.sample, rng(10), []
    for _ in range(400):
        D, phi = pmw.D.copy(), g.random(16) * (g.random() < 0.5) if g.random() < 0.3 else (g.random(16) < 0.5).astype(float)
        if not phi.any():
            continue
        pmw.answer(phi)
        if (pmw.D != D).any():
            gaps.append(abs(phi @ (S - D)))
            assert (S * np.log(pmw.D / D)).sum() >= 0.2 * gaps[-1] - 0.2**2 / 8 - 1e-12
    assert 3 <= len(gaps) <= update_bound(16, 0.2, min(gaps))
    assert max(abs(phi @ (pmw.D - S)) for phi in (rng(11).random((200, 16)) < 0.5).astype(float)) < 0.1     # it has learned


def test_pmw_account_and_end():
    """c updates spend rho exactly; then nothing is answered."""
    S = np.array([100, 0])
    pmw = PrivateMultiplicativeWeights(S, 0.1, 4, 8000.0, eta=1e-6, rng=rng(12))              # never learns: every query is a surprise
    assert math.isclose(pmw.sparse.epsilon, math.sqrt(2000.0)) and math.isclose(pmw.sparse.scales["answer"], 1 / (100 * math.sqrt(2000.0)))
    for _ in range(4):
        assert abs(pmw.answer([1.0, 0.0]) - 1) < 0.01                          # scale 1/4472: 0.01 is 44 of it
    assert math.isclose(pmw.sparse.budget.spent, 8000.0)
    D = pmw.D.copy()
    with pytest.raises(ValueError, match="exhausted"):
        pmw.answer([1.0, 0.0])
    assert np.array_equal(pmw.D, D)


def test_default_step():
    assert PrivateMultiplicativeWeights([1, 2], 0.3, 2, 1.0, rng=rng()).eta == 0.6


def test_update_bound():
    assert update_bound(64, 0.4, 0.1) == pytest.approx(math.log(64) / (2 * 0.1**2))           # eta = 4 alpha
    with pytest.raises(ValueError, match="eta=0.8"):
        update_bound(64, 0.8, 0.1)


# --- Thresholdout

def test_thresholdout_answers_from_the_right_set():
    """sigma = 1e-6: noise is nothing. Near means: the training set's, exactly; far ones: the holdout's, with noise."""
    t = Thresholdout(4, 0.3, 1e-6, 2, rng=rng(13))
    assert t.answer([1, 1, 0, 0, 1], [1, 1, 0, 0]) == 0.6
    far = t.answer([1, 1], [0, 0, 1, 0])
    assert far != 0.25 and abs(far - 0.25) < 1e-4 and t.sparse.left == 1
    assert math.isclose(t.sparse.epsilon, 1 / (4 * 1e-6)) and math.isclose(t.sparse.scales["answer"], 1e-6)
    t.answer([1, 1], [0, 0, 1, 0])
    with pytest.raises(ValueError, match="exhausted"):
        t.answer([1, 1, 0, 0], [1, 1, 0, 0])


# --- the analyst

def coins(n, m, seed):
    return rng(seed).integers(0, 2, (n, m))


def test_the_attack_against_a_plain_loop():
    agree = coins(20, 5, 14)
    asked = []
    def answer(values):
        asked.append(np.asarray(values))
        return values.mean(axis=0)
    last, accuracy, signs = overfit(agree, answer)
    assert [1.0 if sum(agree[:, j]) >= 10 else -1.0 for j in range(5)] == signs.tolist()
    right = [sum(s if a else -s for a, s in zip(row, signs)) > 0 for row in agree]
    assert accuracy == last == sum(right) / 20 and np.array_equal(asked[1], right) and len(asked) == 2
    only = overfit(np.array([[1], [1], [0]]), lambda v: v.mean(axis=0))
    assert only[1] == pytest.approx(2 / 3)


@pytest.mark.parametrize("sigma", [0.0, 0.03])
def test_accuracy_of_the_vote_has_its_formula(sigma):
    """Mean of 60 runs, five standard errors of 0.016 / sqrt(60), and 0.006 for n and m that are finite."""
    n, m, g = 1000, 801, rng(15)
    got = np.mean([overfit(coins(n, m, 100 + i), lambda v: v.mean(axis=0) + g.normal(0, sigma, v.shape[1:]))[1] for i in range(60)])
    assert abs(got - overfit_accuracy(m, n, sigma)) < 0.017
    assert abs(overfit_accuracy(1000, 1000) - 0.5 - stats.norm.cdf(math.sqrt(2 / math.pi)) + 0.5) < 1e-12


def test_noise_keeps_the_bias_below_its_bound():
    n, m, rho = 300, 901, 0.02
    got = np.mean([overfit(coins(n, m, 200 + i), NoisyAnswers(n, m + 1, rho, rng=rng(i)).answer)[1] for i in range(40)]) - 0.5
    assert got < math.sqrt(rho / 2) < overfit_accuracy(m, n) - 0.5             # and without noise it is beyond


# --- bad input: an error, and nothing released

BAD = [(math.nan, "nan"), (1.5, "1.5"), (-0.1, "-0.1")]


@pytest.mark.parametrize("bad, shown", BAD)
def test_bad_queries_release_nothing(bad, shown):
    g = rng(16)
    a, p, t = NoisyAnswers(3, 5, 1.0, rng=g), PrivateMultiplicativeWeights([1, 1, 1], 0.1, 5, 1.0, rng=g), Thresholdout(3, 0.1, 0.1, 5, rng=g)
    state, D = g.bit_generator.state, p.D.copy()
    for call, name in ((lambda: a.answer([0, bad, 1]), "values"), (lambda: p.answer([0, bad, 1]), "phi"), (lambda: t.answer([0, bad, 1], [0, 0, 1]), "train"),
                       (lambda: t.answer([0, 0, 1], [0, bad, 1]), "holdout")):
        with pytest.raises(ValueError, match=f"{name} lies in .*{shown}"):
            call()
    for call, name in ((lambda: a.answer([0, 1]), "values"), (lambda: p.answer([[0], [1]]), "phi"), (lambda: t.answer([0, 1], [0, 1]), "holdout"), (lambda: a.answer(np.ones((3, 0))), "values")):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            call()
    assert g.bit_generator.state == state and a.budget.spent == 0 and np.array_equal(p.D, D) and p.sparse.left == t.sparse.left == 5


@pytest.mark.parametrize("make, name, error", [
    (lambda: NoisyAnswers(0, 1, 1.0), "n", ValueError), (lambda: NoisyAnswers(2.0, 1, 1.0), "n", TypeError), (lambda: NoisyAnswers(2, True, 1.0), "m", TypeError),
    (lambda: NoisyAnswers(2, 1, 0), "rho", ValueError), (lambda: NoisyAnswers(2, 1, math.nan), "rho", ValueError), (lambda: NoisyAnswers(2, 1, 1.0, "cauchy"), "noise", ValueError),
    (lambda: NoisyAnswers(2, 1, 1.0, budget=1.0), "budget", TypeError), (lambda: NoisyAnswers(2, 1, 1.0, rng=1), "rng", TypeError),
    (lambda: SparseVector(0, 1.0, 1.0, 1), "sensitivity", ValueError), (lambda: SparseVector(1.0, math.inf, 1.0, 1), "epsilon", ValueError),
    (lambda: SparseVector(1.0, 1.0, -1.0, 1), "threshold", ValueError), (lambda: SparseVector(1.0, 1.0, 1.0, 0), "count", ValueError),
    (lambda: PrivateMultiplicativeWeights([1], 0.1, 1, 1.0), "counts", ValueError), (lambda: PrivateMultiplicativeWeights([1, -1], 0.1, 1, 1.0), "counts", ValueError),
    (lambda: PrivateMultiplicativeWeights([1, 0.5], 0.1, 1, 1.0), "counts", ValueError), (lambda: PrivateMultiplicativeWeights([0, 0], 0.1, 1, 1.0), "counts", ValueError),
    (lambda: PrivateMultiplicativeWeights([1, math.nan], 0.1, 1, 1.0), "counts", ValueError), (lambda: PrivateMultiplicativeWeights([1, 1], 0, 1, 1.0), "threshold", ValueError),
    (lambda: PrivateMultiplicativeWeights([1, 1], 0.1, 0, 1.0), "updates", ValueError), (lambda: PrivateMultiplicativeWeights([1, 1], 0.1, 1, -1.0), "rho", ValueError),
    (lambda: PrivateMultiplicativeWeights([1, 1], 0.1, 1, 1.0, eta=math.nan), "eta", ValueError), (lambda: Thresholdout(2, 0.1, 0, 1), "sigma", ValueError),
    (lambda: Thresholdout(2, math.nan, 0.1, 1), "threshold", ValueError), (lambda: Thresholdout(0, 0.1, 0.1, 1), "n", ValueError), (lambda: update_bound(0, 0.1, 0.1), "size", ValueError)])
def test_bad_arguments(make, name, error):
    with pytest.raises(error, match=f"{name}="):
        make()


@pytest.mark.parametrize("agree", [coins(4, 2, 0), np.full((3, 3), 0.5), np.full((3, 1), math.nan), [1, 0, 1], np.zeros((0, 3))])
def test_the_analyst_wants_an_odd_number_of_zeros_and_ones(agree):
    with pytest.raises(ValueError, match="m odd"):
        overfit(agree, lambda values: pytest.fail("asked"))


def test_check_query_keeps_shape():
    assert check_query("phi", [True, False], 2).tolist() == [1.0, 0.0] and check_query("phi", np.ones((2, 3)), 2).shape == (2, 3)


def test_without_a_generator_runs_differ():
    assert NoisyAnswers(5, 1, 1.0).answer(np.ones(5)) != NoisyAnswers(5, 1, 1.0).answer(np.ones(5))
