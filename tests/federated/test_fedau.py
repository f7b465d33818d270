"""FedAU by brute force: every participation pattern of a client, weighed by its probability."""
import itertools
import math

import numpy as np
import pytest

from lib.federated.fedau import FedAU, end_intervals, expected_weight, mean_interval
from lib.federated.participation import Bernoulli, Cyclic, Markov, tied_probabilities
from lib.federated.problems import Quadratics
from lib.federated.simulator import AverageAll, AverageParticipating, LocalSGD, run

MODULE, ROUND = "lib/federated/fedau.py", "lib/federated/simulator.py"
BREAKS = [
    ("a cut-off does not end an interval", MODULE, "present | (waited >= cutoff)", "present"),
    ("weight knows the interval of its own round", MODULE, "return weights[clients]", "return self.weights[clients]"),
    ("divided by those who came", MODULE, "@ deltas / self.n_clients", "@ deltas / max(len(clients), 1)"),
    ("the cut-off is no record", MODULE, "records + ended", "records + present"),
    ("interval counted from 0", MODULE, "    waited = waited + 1\n", ""),
    ("no weight before the first record", MODULE, "total / np.maximum(records, 1), 1.0)", "total / np.maximum(records, 1), 0.0)"),
    ("counter not reset", MODULE, "np.where(ended, 0, waited), records", "waited, records"),
    ("cut-off one round late", MODULE, "waited >= cutoff", "waited > cutoff"),
    ("the weight is the rate", MODULE, "total / np.maximum(records, 1), 1.0)", "records / np.maximum(total, 1), 1.0)"),
    ("NaN updates pass", ROUND, "if not np.isfinite(deltas).all():", "if False:"),
    ("repeated clients pass", ROUND, "clients.ndim != 1 or len(np.unique(clients)) != len(clients)", "clients.ndim != 1"),
    ("local steps go uphill", ROUND, "y -= self.lr", "y += self.lr"),
    ("p = 0 passes", "lib/federated/participation.py", "if not ((p > 0) & (p <= 1)).all():", "if not (p <= 1).all():"),
]


def rng(seed=0):
    return np.random.default_rng(seed)


def every_pattern(rounds):
    return np.array(list(itertools.product([False, True], repeat=rounds)))  # (2^rounds, rounds)


def after(patterns, cutoff):
    """A FedAU whose clients live through the patterns, one client a row."""
    server = FedAU(len(patterns), 1, cutoff)
    for present in patterns.T:
        clients = np.flatnonzero(present)
        server.aggregate(np.ones((len(clients), 1)), clients)
    return server


def naive_weight(pattern, cutoff):
    """One client, one list of intervals, in the words of the algorithm."""
    intervals, waited = [], 0
    for present in pattern:
        waited += 1
        if present or waited == cutoff:
            intervals.append(waited)
            waited = 0
    return sum(intervals) / len(intervals) if intervals else 1.0


# -- the estimator -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cutoff", [1, 2, 3, 5, 9, 100_000, math.inf])
def test_weights_as_a_list_of_intervals_gives(cutoff):
    patterns = every_pattern(9)
    np.testing.assert_allclose(after(patterns, cutoff).weights, [naive_weight(p, cutoff) for p in patterns], rtol=1e-15)


@pytest.mark.parametrize("p", [0.1, 0.35, 0.9, 1.0])
@pytest.mark.parametrize(("rounds", "cutoff"), [(10, 4), (10, 10), (12, 1), (6, 9), (10, math.inf), (1, 5), (0, 3)])
def test_expectation_over_all_patterns(p, rounds, cutoff):
    patterns = every_pattern(rounds)
    weight = np.where(patterns, p, 1 - p).prod(axis=1)
    assert weight @ after(patterns, cutoff).weights == pytest.approx(expected_weight(p, cutoff, rounds), rel=1e-12)


def test_expected_weight_in_closed_form():
    p = np.array([0.05, 0.3, 1.0])
    np.testing.assert_allclose(expected_weight(p), 1 / p)
    np.testing.assert_allclose(expected_weight(p, 20), (1 - (1 - p) ** 20) / p)
    np.testing.assert_allclose(expected_weight(p, 20, 20), expected_weight(p, 20))
    np.testing.assert_allclose(expected_weight(p, 1), 1.0)
    x = np.arange(1, 8)
    truncated = (x * 0.3 * 0.7 ** (x - 1)).sum() + 0.7**7  # E[X; X <= 7] + P(X > 7) as the sum it stands for
    assert expected_weight(0.3, math.inf, 7) == pytest.approx(truncated, rel=1e-12)
    assert (expected_weight(p[:2], math.inf, 50) < 1 / p[:2]).all()


def test_a_client_cut_off_before_its_first_visit_enters_with_the_cutoff():
    server = FedAU(1, 1, cutoff=5)
    for _ in range(5):
        server.aggregate(np.empty((0, 1)), [])
    assert server.weights == [5.0] and server.waited == [0]
    assert server.aggregate([[1.0]], [0]) == 5.0


def test_weight_excludes_the_interval_that_ends_now():
    server = FedAU(2, 1)
    for _ in range(3):
        server.aggregate([[0.0]], [1])
    assert server.aggregate([[1.0]], [0]) == 0.5  # the first visit counts once, over N = 2
    assert server.aggregate([[1.0]], [0]) == 2.0  # the second with the interval of 4 rounds
    assert server.aggregate([[1.0]], [0]) == 1.25  # then with the mean of 4 and 1


@pytest.mark.parametrize("model", [Bernoulli, Markov, lambda p: Cyclic(p, 50)])
def test_weights_reach_the_inverse_rate(model):
    p = np.array([0.1, 0.3, 0.5, 0.9])
    table = model(np.tile(p, 50)).sample(6000, rng())  # 50 clients of each kind
    w = after(table.T, math.inf).weights.reshape(50, 4)
    # at least 600 intervals a client, and 50 clients: the mean lies within 5 standard errors (t law with 49 degrees of freedom:
    # 1e-5 for each of 12 means), plus 1 % for the intervals cut at either end
    assert (np.abs(w.mean(axis=0) - 1 / p) <= 5 * w.std(axis=0, ddof=1) / np.sqrt(50) + 0.01 / p).all()


def test_pure_functions_leave_their_input():
    waited, records, total = np.array([2, 0]), np.array([1, 0]), np.array([3, 0])
    new = end_intervals(waited, records, total, np.array([True, False]), 4)
    np.testing.assert_array_equal(new, [[0, 1], [2, 0], [6, 0]])
    np.testing.assert_array_equal([waited, records, total], [[2, 0], [1, 0], [3, 0]])
    np.testing.assert_array_equal(mean_interval(new[1], new[2]), [3.0, 1.0])


# -- the rule ------------------------------------------------------------------------------------------------------------------

def tied(seed=0, n=12, d=2):
    r = rng(seed)
    problem = Quadratics(r.normal(size=(n, d)))
    return problem, tied_probabilities(np.exp(problem.centers[:, 0]), 0.4, 0.1), r


def test_fixed_weights_minimise_the_weighted_objective():
    """Over all subsets of 10 clients: at the minimiser of sum w_n p_n F_n the expected step vanishes, and only there."""
    problem, p, r = tied(n=10)
    w = r.uniform(0.5, 3.0, size=10)
    patterns = every_pattern(10)
    chance = np.where(patterns, p, 1 - p).prod(axis=1)

    def expected_step(x):
        deltas = LocalSGD(0.1)(problem, x, np.arange(10), r)
        server, steps = FedAU(10, 2), []
        for row in patterns:
            server.records[:], server.total = 1, w  # weights frozen at w
            steps.append(server.aggregate(deltas[row], np.flatnonzero(row)))
        return chance @ np.array(steps)

    np.testing.assert_allclose(expected_step(problem.optimum(w * p)), 0.0, atol=1e-14)
    assert np.linalg.norm(expected_step(problem.optimum())) > 1e-3


def test_cutoff_one_is_average_all():
    problem, p, r = tied()
    present = Bernoulli(p).sample(200, r)
    a, b = (run(problem, LocalSGD(0.1, 3), server, present, np.ones(2), rng(1)).x
            for server in (FedAU(12, 2, cutoff=1), AverageAll(12, 2)))
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)  # sums in another order


def test_everyone_present_is_fedavg():
    problem, _, _ = tied()
    present = np.ones((100, 12), dtype=bool)
    a, b = (run(problem, LocalSGD(0.1, 3), server, present, np.ones(2), rng(1)).x
            for server in (FedAU(12, 2), AverageParticipating(12, 2)))
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_ends_at_the_optimum_where_averaging_does_not():
    problem, p, r = tied(n=30)
    present = Bernoulli(p).sample(4000, r)
    gaps = [np.linalg.norm(run(problem, LocalSGD(0.02), server, present, np.zeros(2), r).x[2000:].mean(axis=0) - problem.optimum())
            for server in (FedAU(30, 2), AverageParticipating(30, 2))]
    assert gaps[0] < 0.1 < 0.25 < gaps[1]


def test_three_numbers_a_client():
    for dim in (1, 1000):
        server = FedAU(7, dim)
        assert server.memory_floats == 21 == server.waited.size + server.records.size + server.total.size


# -- bad input -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cutoff", [0, -3, 0.5, 2.5, float("nan"), -math.inf, "many", None, True])
def test_bad_cutoff(cutoff):
    with pytest.raises(ValueError, match="cutoff"):
        FedAU(3, 2, cutoff)


def test_no_clients():
    with pytest.raises(ValueError, match="n_clients"):
        FedAU(0, 2)
    with pytest.raises(ValueError, match="dim"):
        FedAU(2, 0)
    with pytest.raises(ValueError, match="p must"):
        Bernoulli([0.5, 0.0])


@pytest.mark.parametrize(("deltas", "clients", "name"), [
    (np.ones((2, 2)), [0, 0], "clients"), (np.ones((1, 2)), [3], "clients"), (np.ones((1, 2)), ["a"], "clients"),
    (np.ones((1, 3)), [0], "deltas"), (np.ones((2, 2)), [1], "deltas"), (np.array([[0.0, float("nan")]]), [2], "deltas.*client 2")])
def test_bad_updates_change_nothing(deltas, clients, name):
    server = FedAU(3, 2, cutoff=4)
    server.aggregate(np.ones((2, 2)), [0, 2])
    before = [np.copy(a) for a in (server.waited, server.records, server.total)]
    with pytest.raises((ValueError, TypeError), match=name):
        server.aggregate(deltas, clients)
    np.testing.assert_array_equal(before, [server.waited, server.records, server.total])


def test_a_round_without_clients_is_a_round():
    server = FedAU(3, 2)
    np.testing.assert_array_equal(server.aggregate(np.empty((0, 2)), []), [0.0, 0.0])
    np.testing.assert_array_equal(server.waited, [1, 1, 1])
