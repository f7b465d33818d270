"""The attack on one report, against enumeration; the bound that none passes; and the sentences of "The price of privacy" against the formulas."""
import math

import numpy as np
import pytest

from lib.datasets import table
from lib.privacy import attacks
from lib.privacy.modular_subset_selection import ModularSubsetSelection
from lib.privacy.oracles import GRR, OUE, SS, SUE, worst_ratio

KINDS = (GRR, SUE, OUE, SS)
SMALL = [(kind, k, eps) for kind in KINDS for k in (2, 3, 6) for eps in (0.5, 1.0, 3.0)]


def channel_success(oracle):
    """sum_y max_x P(y | x) / k, by enumeration of all reports."""
    return float(oracle.channel().max(axis=0).sum() / oracle.k)


@pytest.mark.parametrize("kind, k, eps", SMALL)
def test_success_is_that_of_the_best_guess(kind, k, eps):
    oracle = kind(k, eps)
    assert attacks.success(oracle) == pytest.approx(channel_success(oracle), rel=1e-12)
    assert attacks.success(oracle) <= attacks.most(k, eps) * (1 + 1e-12)
    assert worst_ratio(oracle.channel()) <= math.exp(eps) * (1 + 1e-12)


@pytest.mark.parametrize("moduli, k", [((2, 3), 4), ((3, 4), 6), ((5, 7), 9)])
def test_success_of_residues(moduli, k):
    oracle = ModularSubsetSelection(k, 1.0, moduli)
    assert attacks.success(oracle) == pytest.approx(channel_success(oracle), rel=1e-12)
    assert attacks.success(oracle) <= attacks.most(k, 1.0)


def test_randomized_response_gives_away_the_most_that_epsilon_allows():
    for k, eps in [(2, 0.1), (50, 1.0), (1024, 5.0)]:
        assert attacks.success(GRR(k, eps)) == pytest.approx(attacks.most(k, eps), rel=1e-14)


@pytest.mark.parametrize("oracle", [GRR(5, 1.2), SUE(5, 1.2), OUE(5, 1.2), SS(5, 1.2), SS(7, 0.4), ModularSubsetSelection(5, 1.2, (3, 4))], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("prior", [None, [0.5, 0.3, 0.15, 0.05, 0.0]])
def test_guesses_are_the_best_ones(oracle, prior):
    """Measured success against the optimum sum_y max_x f(x) P(y | x), by enumeration; 5 standard deviations of 40000 trials."""
    rng, n = np.random.default_rng(0), 40_000
    f = np.full(oracle.k, 1 / oracle.k) if prior is None else np.pad(np.array(prior), (0, oracle.k - len(prior)))
    values = rng.choice(oracle.k, n, p=f)
    hits = (attacks.guess(oracle, oracle.privatize(values, rng), None if prior is None else f, rng) == values).mean()
    optimum = float((f[:, None] * oracle.channel()).max(axis=0).sum())
    assert abs(hits - optimum) < 5 * math.sqrt(optimum * (1 - optimum) / n)
    assert optimum <= math.exp(oracle.epsilon) * f.max() + 1e-12


def test_supported_values():
    rng = np.random.default_rng(1)
    values = np.arange(6)
    assert np.array_equal(attacks.supported(GRR(6, 50.0), values), np.eye(6, dtype=bool))
    for oracle in (SS(6, 50.0), SUE(6, 90.0)):                                # so large an epsilon that nothing is changed but by a coin (SS: one of one)
        assert np.array_equal(attacks.supported(oracle, oracle.privatize(values, rng)), np.eye(6, dtype=bool))
    mss = ModularSubsetSelection(6, 50.0, (3, 4))
    mask = attacks.supported(mss, mss.privatize(values, rng))
    for x, row in enumerate(mask):
        assert any(np.array_equal(row, np.arange(6) % m == x % m) for m in (3, 4))


def test_ties_are_broken_evenly():
    got = attacks.guess(OUE(4, 1.0), np.tile([False, True, True, False], (8000, 1)), rng=np.random.default_rng(2))
    counts = np.bincount(got, minlength=4)
    assert counts[[0, 3]].sum() == 0 and abs(counts[1] - 4000) < 5 * math.sqrt(2000)          # 5 sd of a fair coin


def test_message_bits():
    assert [attacks.message_bits(kind(78, 1.0)) for kind in (GRR, SUE, OUE)] == [7, 78, 78]
    assert attacks.message_bits(SS(78, 1.0)) == math.ceil(math.log2(math.comb(78, 21)))
    assert attacks.message_bits(SS(78, 5.0)) == attacks.message_bits(GRR(78, 5.0))
    mss = ModularSubsetSelection(78, 1.0, (53, 61))
    assert attacks.message_bits(mss) == pytest.approx(1 + np.mean([math.ceil(math.log2(math.comb(53, 14))), math.ceil(math.log2(math.comb(61, 16)))]))


def test_bad_input():
    oracle = GRR(3, 1.0)
    for bad in ([1.0, 2.0], [0.0, 0.0, 0.0], [1.0, -1.0, 1.0], [1.0, math.nan, 1.0], [1.0, math.inf, 1.0]):
        with pytest.raises(ValueError, match="prior has shape"):
            attacks.guess(oracle, np.array([0, 1]), bad)
    for call in (attacks.success, attacks.message_bits, lambda o: attacks.supported(o, None)):
        with pytest.raises(TypeError, match="oracle="):
            call("GRR")
    with pytest.raises(ValueError, match="k=1"):
        attacks.most(1, 1.0)
    with pytest.raises(ValueError, match="epsilon=0"):
        attacks.most(2, 0)


# --- the sentences of the page, for all domains and budgets that it speaks of

GRID = [(k, eps) for k in (2, 4, 8, 16, 32, 78, 256, 1024) for eps in (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0)]


def test_randomized_response_beats_unary_encoding_up_to_3_e_eps_plus_2_values():
    for k, eps in GRID:
        assert (GRR(k, eps).variance(1) < OUE(k, eps).variance(1)) == (k < 3 * math.exp(eps) + 2), (k, eps)


def test_subset_selection_is_never_worse_than_the_others_and_optimized_encoding_never_than_symmetric():
    for k, eps in GRID:
        ss = SS(k, eps).variance(1, 1 / k)                                     # the mean squared error over all values of a domain is smallest where values are even
        assert ss <= min(kind(k, eps).variance(1, 1 / k) for kind in (GRR, SUE, OUE)) * (1 + 1e-12), (k, eps)
        assert OUE(k, eps).variance(1) <= SUE(k, eps).variance(1) * (1 + 1e-12), (k, eps)


def test_sets_of_values_hide_a_person_better_than_one_value():
    for k, eps in GRID:
        if k >= 8:
            assert attacks.success(SS(k, eps)) <= attacks.success(GRR(k, eps)) * (1 + 1e-12) and attacks.success(OUE(k, eps)) < attacks.success(GRR(k, eps)), (k, eps)


def test_the_informed_attacker_turns_the_order_around():
    """On the page's data: who knows the histogram learns least from randomized response, up to epsilon = 3. Exact for GRR; the others 5 standard deviations above it."""
    visits = table("randhie").y.astype(int)
    k, n, rng = int(visits.max()) + 1, len(visits), np.random.default_rng(3)
    f = np.bincount(visits, minlength=k) / n
    for eps in (1.0, 2.0, 3.0):
        grr = float((f[:, None] * GRR(k, eps).channel()).max(axis=0).sum())
        for oracle in (SUE(k, eps), OUE(k, eps), SS(k, eps)):
            hits = np.mean(attacks.guess(oracle, oracle.privatize(visits, rng), f, rng) == visits)
            assert hits > grr + 5 * math.sqrt(hits * (1 - hits) / n), (eps, oracle)
            assert attacks.success(oracle) < attacks.success(GRR(k, eps)), "and a stranger learns most from it"


@pytest.mark.parametrize("kind", KINDS)
def test_a_huge_budget_is_no_overflow(kind):
    """e^800 is beyond a double: the oracle then tells the truth, but for a coin where its bits or subsets need one."""
    oracle, values = kind(5, 800.0), np.arange(5)
    assert oracle.q < 1e-170 and oracle.p in (0.5, 1.0)                     # SUE spends half of it on each bit
    assert attacks.success(GRR(5, 800.0)) == 1 and math.isfinite(oracle.variance(10))
    assert (attacks.supported(oracle, oracle.privatize(values, np.random.default_rng(0))) <= np.eye(5, dtype=bool)).all()
