"""ALLOMFREE and its protocols: privacy by enumeration (one report, and several), laws against channels, exact variances, the authors' package, bad input."""
import math

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import bisect

from lib.privacy.allomfree import ALLOMFREE, LGRR, LOSUE, LOUE, LSUE, Panel, best_protocol, signal
from lib.privacy.oracles import GRR, OUE, SUE, worst_ratio

MODULE = "lib/privacy/allomfree.py"
BREAKS = [
    ("memoization forgotten: a fresh memo at every report", MODULE, "new = ~np.isin(keys, self._keys)", "self._memo, new = None, np.ones(len(keys), bool)"),
    ("round 2 is the mechanism at budget epsilon_1", MODULE, "self.p2 = (1 + signal(self.epsilon_1) / signal(self.epsilon_inf)) / 2", "self.p2 = (1 + signal(self.epsilon_1)) / 2"),
    ("the exact L-GRR forgets the third values", MODULE, "odds += (self.k - 2) * (e - 1)", "odds += 0 * (e - 1)"),
    ("budget of the sampled attribute split over the attributes", MODULE,
     "best_protocol(k, epsilon_inf, epsilon_1, exact) for k", "best_protocol(k, epsilon_inf / len(self.sizes), epsilon_1 / len(self.sizes), exact) for k"),
    ("a user draws another attribute at every report", MODULE,
     "columns = [check_values", "self.attribute = rng.permutation(self.attribute)\n        columns = [check_values"),
    ("the other root of the quadratic equation", MODULE, "2 * c / (b + math.sqrt", "2 * c / (b - math.sqrt"),
    ("the choice takes the larger variance", MODULE, "grr.variance(1) <= osue.variance(1)", "grr.variance(1) >= osue.variance(1)"),
    ("memos are not in the order of their keys", MODULE, "keys, memo = keys[order], memo[order]", "keys = keys[order]"),
]

# Statistical checks fail by chance with at most this probability a seed; seeds are fixed, so a failure shows a real change.
FAILURE = 1e-6
BUDGETS = [(2.0, 1.0), (1.0, 0.3), (4.0, 2.4), (0.5, 0.05)]
MAKERS = {"L-GRR": LGRR, "L-GRR, exact": lambda *a: LGRR(*a, exact=True), "L-SUE": LSUE, "L-OUE": LOUE, "L-OSUE": LOSUE}
every_protocol = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def bits_as_number(reports):
    return reports if reports.ndim == 1 else reports @ (1 << np.arange(reports.shape[1])[::-1])


# --- privacy, by enumeration of all inputs, memos and outputs

@every_protocol
@pytest.mark.parametrize("budgets", BUDGETS)
def test_one_report_costs_epsilon_1(make, budgets):
    """Exactly, but for the published L-GRR beyond two values, which costs less. Round-off only: quotients of sums of a few doubles."""
    for k in (2, 3, 5):
        oracle = make(k, *budgets)
        channel = oracle.channel()
        assert np.allclose(channel.sum(axis=1), 1, atol=1e-12)
        loss = math.log(worst_ratio(channel))
        assert math.isclose(loss, oracle.loss(), rel_tol=1e-9)
        if isinstance(oracle, LGRR) and not oracle.exact and k > 2:
            assert loss < budgets[1] * (1 - 1e-6)
        else:
            assert math.isclose(loss, budgets[1], rel_tol=1e-9)


@every_protocol
def test_many_reports_stay_below_epsilon_inf(make):
    """All sequences of up to six reports (four for unary encoding: 8^4 sequences) from three values; the loss grows and never reaches epsilon_inf."""
    for budgets in BUDGETS:
        oracle, before = make(3, *budgets), 0.0
        for reports in range(1, 7 if isinstance(oracle, LGRR) else 5):
            loss = math.log(worst_ratio(oracle.channel(reports)))
            assert math.isclose(loss, oracle.loss(reports), rel_tol=1e-9) and before < loss < budgets[0]
            before = loss
        assert math.isclose(oracle.loss(2000), budgets[0], rel_tol=1e-6)              # the limit: the memo is known


def test_fresh_noise_at_every_report_would_be_caught():
    """What memoization prevents: without it the loss of two reports is twice epsilon_1, here above epsilon_inf."""
    oracle = LOSUE(3, 1.2, 1.0)
    one = oracle.channel()
    twice = (one[:, :, None] * one[:, None, :]).reshape(3, -1)
    assert math.log(worst_ratio(twice)) > 1.2 > math.log(worst_ratio(oracle.channel(2)))


@every_protocol
def test_panel_follows_the_channel_of_several_reports(make):
    """The joint law of three reports of the same users, by chi-square: a forgotten or shared memo, or a wrong round, shows."""
    oracle, rng, n, k = make(3, 2.0, 1.0), np.random.default_rng(0), 40_000, 3
    for reports in ((2,) if isinstance(oracle, LGRR) else (1, 2)):
        channel = oracle.channel(reports)
        for x in range(k):
            panel, got, size = Panel(oracle, n), 0, oracle.channel().shape[1]
            for _ in range(reports):
                got = got * size + bits_as_number(panel.report(np.full(n, x), rng))
            assert stats.chisquare(np.bincount(got, minlength=channel.shape[1]), n * channel[x]).pvalue > FAILURE
            assert (panel.memos == 1).all()


def test_averaging_reports_finds_the_memo_and_no_more():
    """After 400 reports the most frequent one is the memo, which is the value with probability p_1."""
    n, k, rng = 3000, 8, np.random.default_rng(1)
    oracle = LGRR(k, 2.0, 1.0)
    values = rng.integers(0, k, n)
    panel, seen = Panel(oracle, n), np.zeros((n, k), int)
    for _ in range(400):
        seen[np.arange(n), panel.report(values, rng)] += 1
    hits, p1 = (seen.argmax(axis=1) == values).sum(), oracle.first.p
    assert abs(hits - n * p1) < stats.norm.isf(FAILURE / 2) * math.sqrt(n * p1 * (1 - p1))


def test_values_that_change_get_memos_of_their_own():
    """A second value is sanitised afresh, the first one is remembered, and the count of memos (times epsilon_inf) is the bill."""
    oracle, rng, n = LGRR(4, 30.0, 29.0), np.random.default_rng(2), 500          # budgets at which a report is the value
    a, b = rng.integers(0, 4, n), rng.integers(0, 4, n)
    panel = Panel(oracle, n)
    for day in (a, b, a, b):
        assert np.array_equal(panel.report(day, rng), day)
    assert np.array_equal(panel.memos, 1 + (a != b))
    noisy, seen = Panel(LGRR(4, 1.0, 0.999999), n), []                           # here round 2 does nothing: a report is the memo
    for day in (a, b, a, b):
        seen.append(noisy.report(day, rng))
    assert (seen[0] == seen[2]).mean() > 0.99 and (seen[1] == seen[3]).mean() > 0.99 and (seen[0] != a).any()
    unary = Panel(LOSUE(4, 30.0, 29.0), n)                                       # p_1 = 1/2 whatever the budget: a memo differs, but only in the value's bit
    first, _, again = (unary.report(day, rng) for day in (a, b, a))
    assert np.array_equal(first, again) and not (first & (np.arange(4) != a[:, None])).any()


# --- the estimator

@every_protocol
def test_unbiased_with_the_exact_variance(make):
    """400 collections from the same users through both rounds; and the aggregate shortcut has the same law."""
    oracle, rng, n, trials = make(6, 2.0, 1.0), np.random.default_rng(3), 2000, 400
    values = np.repeat([0, 1, 2], [1200, 600, 200])
    f = np.bincount(values, minlength=6) / n
    sd, z = np.sqrt(oracle.variance(n, f)), stats.norm.isf(FAILURE / 12)
    for draw in (lambda: oracle.estimate(oracle.privatize(values, rng)), lambda: oracle.debias(*oracle.sample_supports(np.bincount(values, minlength=6), rng))[0]):
        got = np.array([draw() for _ in range(trials)])
        assert np.abs((got.mean(axis=0) - f) / sd).max() < z / math.sqrt(trials)
        # each ratio is chi-square with 399 degrees of freedom (counts are sums of thousands of bits); union bound over six values
        ratio = got.var(axis=0, ddof=1) / sd ** 2
        low, high = stats.chi2.isf([1 - FAILURE / 12, FAILURE / 12], trials - 1) / (trials - 1)
        assert low < ratio.min() and ratio.max() < high


@every_protocol
def test_variance_of_a_mean_over_reports(make):
    """The memo's share stays: five reports of the same users, by the aggregate shortcut."""
    oracle, rng, n, trials, tau = make(4, 2.0, 1.0), np.random.default_rng(4), 1000, 600, 5
    counts = np.array([700, 200, 100, 0])
    f = counts / n
    got = np.array([oracle.debias(*oracle.sample_supports(counts, rng, reports=tau)).mean(axis=0) for _ in range(trials)])
    ratio = got.var(axis=0, ddof=1) / oracle.average_variance(n, tau, f)
    low, high = stats.chi2.isf([1 - FAILURE / 8, FAILURE / 8], trials - 1) / (trials - 1)
    assert low < ratio.min() and ratio.max() < high
    assert math.isclose(oracle.average_variance(n, 1, 0.3), oracle.variance(n, 0.3)) and math.isclose(oracle.average_variance(n, 10**9, 0.3), oracle.first.variance(n, 0.3), rel_tol=1e-6)


# --- what the chain is

@pytest.mark.parametrize("k", [2, 3, 17, 1000])
@pytest.mark.parametrize("budgets", BUDGETS)
def test_one_report_is_a_mechanism_that_one_knows(k, budgets):
    for oracle, same in ((LOSUE(k, *budgets), OUE(k, budgets[1])), (LSUE(k, *budgets), SUE(k, budgets[1])), (LGRR(k, *budgets, exact=True), GRR(k, budgets[1]))):
        assert np.allclose([oracle.p, oracle.q], [same.p, same.q], rtol=1e-9)
    loue = LOUE(k, *budgets)
    assert math.isclose(math.log(loue.p * (1 - loue.q) / (loue.q * (1 - loue.p))), budgets[1], rel_tol=1e-9)


@pytest.mark.parametrize("budgets", BUDGETS)
def test_round_two_against_the_published_formulas(budgets):
    """The p_2 of the paper as printed, and the conditions behind L-SUE and L-OUE solved by bisection."""
    inf, one = budgets
    E, A = math.exp(one), math.exp(inf)
    assert math.isclose(LOSUE(9, inf, one).p2, (1 - E * A) / (E - A - E * A + 1), rel_tol=1e-9)
    for k in (2, 9):
        p1, q1 = A / (A + k - 1), 1 / (A + k - 1)
        assert math.isclose(LGRR(k, inf, one).p2, (q1 - E * p1) / (-p1 * E + k * q1 * E - q1 * E - p1 * (k - 1) + q1), rel_tol=1e-9)

    def odds(p1, q1, p2, q2):
        p, q = p1 * p2 + (1 - p1) * q2, q1 * p2 + (1 - q1) * q2
        return p * (1 - q) / (q * (1 - p))
    q1 = 1 / (A + 1)
    assert math.isclose(LOUE(9, inf, one).q2, bisect(lambda x: odds(0.5, q1, 0.5, x) - E, 0, 0.5, xtol=1e-14), rel_tol=1e-6, abs_tol=1e-12)
    p1 = math.sqrt(A) / (math.sqrt(A) + 1)
    assert math.isclose(LSUE(9, inf, one).p2, bisect(lambda x: odds(p1, 1 - p1, x, 1 - x) - E, 0.5, 1, xtol=1e-14), rel_tol=1e-6)


def test_published_lgrr_does_not_see_k_and_costs_less():
    """p_2 / q_2 is the same for all k; the losses are those of the formula worked by hand for three cases, to its three digits."""
    assert len({round(LGRR(k, 2.0, 1.0).p2 / LGRR(k, 2.0, 1.0).q2, 9) for k in (2, 3, 10, 300)}) == 1
    for (k, inf, one), loss in (((10, 2, 1), 0.699), ((50, 4, 1), 0.661), ((50, 2, 0.6), 0.129)):
        assert math.isclose(LGRR(k, inf, one).loss(), loss, abs_tol=5e-4)
    for k in range(3, 60, 7):
        assert LGRR(k, 2.0, 1.0).variance(1) > LGRR(k, 2.0, 1.0, exact=True).variance(1)
    assert math.isclose(LGRR(2, 2.0, 1.0).p2, LGRR(2, 2.0, 1.0, exact=True).p2)


@pytest.mark.parametrize("inf, one, published, exact", [(2.0, 1.2, 6, 11), (4.0, 2.4, 20, 35)])
def test_crossover(inf, one, published, exact):
    for flag, last in ((False, published), (True, exact)):
        chosen = [isinstance(best_protocol(k, inf, one, flag), LGRR) for k in range(2, 60)]
        assert chosen == [k <= last for k in range(2, 60)]


def test_signals_multiply():
    for k in (2, 7):
        assert math.isclose(signal(1.3, k), GRR(k, 1.3).p - GRR(k, 1.3).q)
    o = LSUE(5, 2.0, 1.0)
    assert math.isclose(o.p - o.q, (o.first.p - o.first.q) * (o.p2 - o.q2)) and math.isclose(signal(800.0), 1.0)


# --- several attributes

def test_allomfree_spends_everything_on_one_attribute():
    sizes = (2, 5, 20, 100)
    scheme = ALLOMFREE(sizes, 2.0, 1.2)
    assert [type(p) for p in scheme.protocols] == [LGRR, LGRR, LOSUE, LOSUE]
    assert all((p.epsilon_inf, p.epsilon_1) == (2.0, 1.2) for p in scheme.protocols)
    assert [type(p) for p in ALLOMFREE((10, 12), 2.0, 1.2, exact=True).protocols] == [LGRR, LOSUE]


def test_population_keeps_its_attributes_and_is_unbiased():
    rng, n = np.random.default_rng(5), 4000
    scheme = ALLOMFREE((3, 30), 3.0, 1.5)
    values = np.column_stack([np.arange(n) % 3, np.arange(n) % 5])
    population = scheme.enroll(n, rng)
    drawn = population.attribute.copy()
    for _ in range(3):
        reports = population.report(values, rng)
    assert np.array_equal(population.attribute, drawn) and all((panel.memos == 1).all() for panel in population.panels)
    assert abs((drawn == 0).sum() - n / 2) < stats.norm.isf(FAILURE / 2) * math.sqrt(n / 4)
    for j, estimate in enumerate(scheme.estimate(reports)):
        mine = values[drawn == j, j]
        f = np.bincount(mine, minlength=scheme.sizes[j]) / len(mine)
        assert np.abs((estimate - f) / np.sqrt(scheme.protocols[j].variance(len(mine), f))).max() < stats.norm.isf(FAILURE / 60)


def test_an_attribute_that_nobody_drew_has_no_estimate():
    scheme = ALLOMFREE((2,) * 40, 2.0, 1.0)
    estimates = scheme.estimate(scheme.enroll(3, np.random.default_rng(6)).report(np.zeros((3, 40), int), np.random.default_rng(7)))
    assert sum(np.isnan(e).all() for e in estimates) >= 37 and sum(np.isfinite(e).all() for e in estimates) >= 1


# --- the authors' package

@pytest.fixture(scope="module")
def peer():
    """multi-freq-ldpy, uncompiled: its functions are called a few thousand times, and compiling them takes longer."""
    numba = pytest.importorskip("numba")
    before, numba.config.DISABLE_JIT = numba.config.DISABLE_JIT, True
    from multi_freq_ldpy.long_freq_est import L_GRR, L_OSUE, L_OUE, L_SUE, Variance_LONG_PURE
    numba.config.DISABLE_JIT = before
    return {"L-GRR": (L_GRR.L_GRR_Client, L_GRR.L_GRR_Aggregator_MI), "L-SUE": (L_SUE.L_SUE_Client, L_SUE.L_SUE_Aggregator_MI), "L-OUE": (L_OUE.L_OUE_Client, L_OUE.L_OUE_Aggregator_MI),
            "L-OSUE": (L_OSUE.L_OSUE_Client, L_OSUE.L_OSUE_Aggregator_MI), "variance": Variance_LONG_PURE.VAR_Long_Pure}


@pytest.mark.parametrize("name", ["L-GRR", "L-SUE", "L-OUE", "L-OSUE"])
def test_parity_with_the_package(peer, name):
    """Its clients follow our channel; its estimate is ours where it clips nothing, up to its normalization; its approximate variance is ours at frequency 0."""
    k, inf, one, n = 3, 2.0, 1.0, 4000
    oracle, (client, aggregate) = MAKERS[name](k, inf, one), peer[name]
    assert math.isclose(peer["variance"](oracle.first.p, oracle.first.q, oracle.p2, oracle.q2), oracle.variance(1), rel_tol=1e-9)
    np.random.seed(0)                                                        # the package draws from numpy's global generator
    theirs = np.array([client(1, k, inf, one) for _ in range(n)]).astype(int)
    observed = np.bincount(bits_as_number(theirs), minlength=oracle.channel().shape[1])
    assert stats.chisquare(observed, n * oracle.channel()[1]).pvalue > FAILURE
    reports = oracle.privatize(np.arange(n) % k, np.random.default_rng(8))
    ours = oracle.estimate(reports)
    assert ours.min() > 0                                                    # so that it clips nothing
    args = (reports, k, inf, one) if name == "L-GRR" else (reports.astype(float), inf, one)
    assert np.allclose(aggregate(*args), ours / ours.sum(), rtol=1e-9)


# --- bad input

class Untouchable(np.random.Generator):
    """A generator that must not be used: nothing may be drawn, and so nothing released, for bad input."""

    def __init__(self):
        super().__init__(np.random.PCG64(0))

    def integers(self, *a, **k):
        raise AssertionError("drew randomness")
    random = binomial = multinomial = integers


@every_protocol
@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, None, "1", True])
def test_bad_budgets(make, bad):
    with pytest.raises(ValueError, match="epsilon_inf="):
        make(4, bad, 0.5)
    with pytest.raises(ValueError, match="epsilon_1="):
        make(4, 2.0, bad)
    with pytest.raises(ValueError, match="epsilon_inf="):
        ALLOMFREE((4, 5), bad, 0.5)


@every_protocol
def test_one_report_must_cost_less_than_all(make):
    for one in (1.0, 1.5):
        with pytest.raises(ValueError, match="less than epsilon_inf"):
            make(4, 1.0, one)


def test_loue_names_its_limit():
    with pytest.raises(ValueError, match="above 0.7634 for epsilon_inf=1.0"):
        LOUE(4, 1.0, 0.77)
    assert LOUE(4, 1.0, 0.7633).q2 < 1e-3


@every_protocol
@pytest.mark.parametrize("k", [1, 0, -3, 2.0, True, None])
def test_bad_domain(make, k):
    with pytest.raises(ValueError, match="k="):
        make(k, 2.0, 1.0)


@every_protocol
@pytest.mark.parametrize("values, error, message", [([0, 9], ValueError, "contains 9"), ([-1, 0], ValueError, "contains -1"), ([0.5, 1], TypeError, "integers"), ([], (ValueError, TypeError), "values"),
                                                    ([[1, 2]], ValueError, "shape"), ([np.nan, 1], TypeError, "integers")])
def test_bad_values_release_nothing(make, values, error, message):
    oracle = make(9, 2.0, 1.0)
    panel = Panel(oracle, 2)
    for call in (oracle.privatize, oracle.memoize, panel.report):
        with pytest.raises(error, match=message):
            call(values, Untouchable())
    assert (panel.memos == 0).all()


def test_bad_calls_of_panels_and_populations():
    oracle = LOSUE(4, 2.0, 1.0)
    with pytest.raises(ValueError, match="one for each of 3 users"):
        Panel(oracle, 3).report([1, 2], Untouchable())
    for reports in (0, -1, 1.5, math.nan, None, True):
        for call in (oracle.loss, oracle.channel, lambda r: oracle.average_variance(10, r), lambda r: oracle.sample_supports([1, 2, 3, 4], np.random.default_rng(0), r)):
            with pytest.raises(ValueError, match="reports="):
                call(reports)
    for n in (0, -1, 1.5):
        for make in (lambda: Panel(oracle, n), lambda: ALLOMFREE((4, 5), 2.0, 1.0).enroll(n)):
            with pytest.raises(ValueError, match="n="):
                make()
    with pytest.raises(TypeError, match="rng="):
        oracle.privatize([1], rng=0)
    with pytest.raises(ValueError, match="sizes is empty"):
        ALLOMFREE((), 2.0, 1.0)
    with pytest.raises(ValueError, match="k=1"):
        ALLOMFREE((4, 1), 2.0, 1.0)
    population = ALLOMFREE((4, 5), 2.0, 1.0).enroll(10, np.random.default_rng(0))
    for values, message in ((np.zeros((10, 3), int), "shape"), (np.zeros((9, 2), int), "shape"), (np.full((10, 2), 4), "contains 4"), (np.column_stack([np.zeros(10, int), np.full(10, 5)]), "contains 5")):
        with pytest.raises(ValueError, match=message):
            population.report(values, Untouchable())
    assert all((panel.memos == 0).all() for panel in population.panels)


def test_two_panels_without_a_generator_differ():
    oracle, values = LGRR(50, 1.0, 0.5), np.arange(200) % 50
    assert not np.array_equal(Panel(oracle, 200).report(values), Panel(oracle, 200).report(values))
