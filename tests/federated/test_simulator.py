"""The federated simulator: participation, problems, local steps and the server rules that need no page of their own."""
import itertools

import numpy as np
import pytest

from lib.federated.participation import Bernoulli, Cyclic, Markov, tied_probabilities
from lib.federated.problems import Quadratics, SoftmaxRegression, dirichlet_split, label_shares
from lib.federated.simulator import MIFA, AverageAll, AverageParticipating, FedVARP, KnownProbabilities, LocalSGD, run

ROUND, PEOPLE, PROBLEMS = "lib/federated/simulator.py", "lib/federated/participation.py", "lib/federated/problems.py"
BREAKS = [
    ("FedVARP forgets what it stored", ROUND, "(deltas - self.last[clients]).mean(axis=0)", "deltas.mean(axis=0)"),
    ("FedVARP adds the mean of after the round", ROUND,
     "        step = (deltas - self.last[clients]).mean(axis=0) + self.last.mean(axis=0)\n        self.last[clients] = deltas\n",
     "        step = (deltas - self.last[clients]).mean(axis=0)\n        self.last[clients] = deltas\n"
     "        step = step + self.last.mean(axis=0)\n"),
    ("MIFA averages those who came", ROUND, "return self.last.mean(axis=0)", "return self.last[clients].mean(axis=0)"),
    ("the oracle multiplies by p", ROUND, "(1.0 / self.p[clients])", "self.p[clients]"),
    ("absent clients are counted", ROUND, "int(present.sum())", "present.size"),
    ("local steps start from their own end", ROUND, "return y - x", "return y"),
    ("Markov starts asleep", PEOPLE, "on = rng.random(self.p.size) < self.p", "on = np.zeros(self.p.size, dtype=bool)"),
    ("Markov never rescales", PEOPLE, "wake / np.maximum(leave, 1.0)", "wake / np.ones_like(leave)"),
    ("NaN probabilities pass", PEOPLE, "if not ((p > 0) & (p <= 1)).all():", "if ((p <= 0) | (p > 1)).any():"),
    ("regularised twice", PROBLEMS, "self.l2 * w)", "2 * self.l2 * w)"),
    ("batches from everyone", PROBLEMS, "pick = self.order[self.first[clients, None] + pick]", "pick = self.order[pick]"),
    ("taste ignored", PROBLEMS, "np.full(len(kinds), alpha)", "np.full(len(kinds), 1.0)"),
    ("weights ignored", PROBLEMS, "return w @ self.centers / w.sum()", "return self.centers.mean(axis=0)"),
]
NAN = float("nan")
RULES = [AverageParticipating, AverageAll, MIFA, FedVARP, lambda n, d: KnownProbabilities(np.full(n, 0.5), d)]


def rng(seed=0):
    return np.random.default_rng(seed)


def every_pattern(n):
    return np.array(list(itertools.product([False, True], repeat=n)))


# -- participation -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model", [Bernoulli, Markov])
def test_rate_of_random_participation(model):
    p = np.array([0.02, 0.1, 0.5, 0.9, 1.0])
    runs = np.stack([model(p).sample(400, rng(seed)) for seed in range(50)])  # (runs, rounds, clients)
    mean = runs.mean(axis=1)
    # 50 independent runs, five clients: |mean - p| beyond 5 standard errors has probability below 1e-4 (t law, 49 degrees)
    assert (np.abs(mean.mean(axis=0) - p) <= 5 * mean.std(axis=0, ddof=1) / np.sqrt(50)).all()
    first = runs[:, 0].mean(axis=0)  # stationary from the first round on
    assert (np.abs(first - p) <= 5 * np.sqrt(p * (1 - p) / 50) + 1e-12).all()


def test_markov_switches_at_its_rates():
    p = np.array([0.5, 0.02])
    model = Markov(p, wake=0.05)
    np.testing.assert_allclose(model.leave, [0.05, 1.0])
    np.testing.assert_allclose(model.wake, [0.05, 0.05 / (0.05 * 49)])
    np.testing.assert_allclose(model.wake / (model.wake + model.leave), p)  # the stationary law
    present = model.sample(40_000, rng())
    left = (present[:-1, 0] & ~present[1:, 0]).sum() / present[:-1, 0].sum()
    assert abs(left - 0.05) < 5 * np.sqrt(0.05 * 0.95 / 10_000)  # at least 10 000 present rounds; 5 standard errors
    assert not (present[:-1, 1] & present[1:, 1]).any()  # leaves for sure


def test_cyclic_blocks():
    model = Cyclic([0.25, 0.001, 1.0], cycle=20)
    present = model.sample(60, rng())
    np.testing.assert_array_equal(present[:20], present[20:40])
    np.testing.assert_array_equal(present[:20].sum(axis=0), [5, 1, 20])
    np.testing.assert_allclose(model.rate, [0.25, 0.05, 1.0])
    starts = (~present[:-1] & present[1:]).sum(axis=0)
    assert starts[0] in (2, 3) and starts[2] == 0  # one block a cycle


def test_tied_probabilities():
    np.testing.assert_allclose(tied_probabilities([1, 2, 3], 0.2, 0.05), [0.1, 0.2, 0.3])
    np.testing.assert_allclose(tied_probabilities([0, 0, 30], 0.5, 0.1), [0.1, 0.1, 1.0])


@pytest.mark.parametrize("model", [Bernoulli, Markov, Cyclic])
@pytest.mark.parametrize("p", [[], [0.0], [1.1], [0.5, NAN], [-0.1], 0.5, [[0.5]]])
def test_bad_probabilities(model, p):
    with pytest.raises(ValueError, match="p must"):
        model(p)


@pytest.mark.parametrize(("call", "name"), [
    (lambda: Bernoulli([0.5]).sample(-1, rng()), "rounds"), (lambda: Bernoulli([0.5]).sample(1.5, rng()), "rounds"),
    (lambda: Markov([0.5], wake=0.0), "wake"), (lambda: Markov([0.5], wake=NAN), "wake"),
    (lambda: Cyclic([0.5], cycle=0), "cycle"), (lambda: tied_probabilities([1, -1], 0.1, 0.01), "score"),
    (lambda: tied_probabilities([], 0.1, 0.01), "score"), (lambda: tied_probabilities([1, NAN], 0.1, 0.01), "score"),
    (lambda: tied_probabilities([1, 2], 0.1, 0.2), "floor"), (lambda: tied_probabilities([1, 2], NAN, 0.01), "mean")])
def test_bad_participation(call, name):
    with pytest.raises(ValueError, match=name):
        call()


# -- problems --------------------------------------------------------------------------------------------------------------

def quadratics(n=4, d=3, noise=0.0, seed=0):
    r = rng(seed)
    half = r.normal(size=(n, d, d))
    return Quadratics(r.normal(size=(n, d)), half @ half.swapaxes(1, 2) + np.eye(d), noise)


def test_gradients_of_quadratics_and_their_optimum():
    problem = quadratics()
    x = rng(1).normal(size=(2, 3))
    clients = np.array([3, 1])
    expected = [problem.curvature[n] @ (row - problem.centers[n]) for n, row in zip(clients, x, strict=True)]
    np.testing.assert_allclose(problem.gradient(x, clients, rng()), expected, rtol=1e-12)
    everyone = np.arange(4)
    for w in (np.ones(4), np.array([0.1, 0.0, 2.0, 1.0])):
        at = np.tile(problem.optimum(w), (4, 1))
        np.testing.assert_allclose(w @ problem.gradient(at, everyone, rng()), 0.0, atol=1e-12)
    simple = Quadratics(problem.centers)
    np.testing.assert_allclose(simple.optimum(), problem.centers.mean(axis=0))
    np.testing.assert_allclose(simple.optimum([0, 1, 0, 3]), problem.centers[1] / 4 + 3 * problem.centers[3] / 4)
    assert problem.loss(problem.optimum()) < problem.loss(problem.optimum() + 0.1)


def test_softmax_gradient_is_that_of_its_loss():
    r = rng(2)
    features, labels, owner = r.normal(size=(12, 3)), r.integers(3, size=12), np.repeat([0, 1, 2], [1, 4, 7])
    problem = SoftmaxRegression(features, labels, owner, 3, 3, batch=5000, l2=0.01)
    x = r.normal(size=problem.dim)
    mean = problem.gradient(np.tile(x, (3, 1)), np.arange(3), r).mean(axis=0)
    h = 1e-6
    numeric = np.array([(problem.loss(x + h * e) - problem.loss(x - h * e)) / (2 * h) for e in np.eye(problem.dim)])
    # mini-batches of 5000 draws: each coordinate is an average of 15 000 terms of size about 1, so 0.06 is over 6 deviations
    np.testing.assert_allclose(mean, numeric, atol=0.06)
    assert np.abs(numeric).max() > 0.1
    exact = SoftmaxRegression(features[:1], labels[:1], [0], 1, 3, batch=2, l2=0.01)  # one sample: no randomness left
    numeric = np.array([(exact.loss(x + h * e) - exact.loss(x - h * e)) / (2 * h) for e in np.eye(exact.dim)])
    np.testing.assert_allclose(exact.gradient(x[None], np.array([0]), r)[0], numeric, atol=1e-8)


def test_mini_batches_come_from_the_client():
    features = np.array([[1.0], [2.0], [4.0], [8.0]])
    problem = SoftmaxRegression(features, [0, 0, 1, 1], [1, 0, 1, 0], 2, 2, batch=64, l2=0.0)
    g = problem.gradient(np.zeros((2, 4)), np.array([0, 1]), rng()).reshape(2, 2, 2)
    # at x = 0 a sample (a, y) adds a * (1/2 - [y = 0]) to the first class: client 0 owns (2, 0) and (8, 1), client 1 (1, 0) and (4, 1)
    for n, (low, high) in enumerate([(-1.0, 4.0), (-0.5, 2.0)]):
        share = 0.5 - g[n, 1, 0]  # of label 0 in the batch, from the gradient of the bias
        share = 0.5 + g[n, 1, 1] if share < 0 else share
        assert low < g[n, 0, 0] < high and g[n, 0, 0] == pytest.approx(share * low + (1 - share) * high)


@pytest.mark.parametrize("alpha", [0.05, 1.0, 1000.0])
def test_dirichlet_split(alpha):
    labels = np.repeat(np.arange(5), 60)
    owner = dirichlet_split(labels, 20, alpha, rng(), least=3)
    assert owner.shape == labels.shape and np.bincount(owner, minlength=20).min() >= 3
    shares = label_shares(labels, owner, 20)
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)
    largest = shares.max(axis=1).mean()  # one label alone gives 1, an even mixture 0.2 and a little
    assert {0.05: largest > 0.7, 1.0: 0.35 < largest < 0.75, 1000.0: largest < 0.45}[alpha]


@pytest.mark.parametrize(("call", "name"), [
    (lambda: Quadratics(np.zeros((0, 2))), "centers"), (lambda: Quadratics([[NAN]]), "centers"),
    (lambda: Quadratics([[0.0]], [[[-1.0]]]), "curvature"), (lambda: Quadratics([[0.0]], [[1.0]]), "curvature"),
    (lambda: Quadratics([[0.0]], noise=-1.0), "noise"), (lambda: quadratics().optimum([1, 2]), "weights"),
    (lambda: quadratics().optimum([0, 0, 0, 0]), "weights"), (lambda: dirichlet_split([0, 1], 0, 1.0, rng()), "n_clients"),
    (lambda: dirichlet_split([0, 1], 2, 0.0, rng()), "alpha"), (lambda: dirichlet_split([0, 1], 3, 1.0, rng()), "labels"),
    (lambda: SoftmaxRegression([[1.0]], [0], [0], 2, 2), "owner"), (lambda: SoftmaxRegression([[1.0]], [2], [0], 1, 2), "labels"),
    (lambda: SoftmaxRegression([[NAN]], [0], [0], 1, 2), "features"), (lambda: LocalSGD(0.0), "lr"),
    (lambda: LocalSGD(NAN), "lr"), (lambda: LocalSGD(0.1, 0), "steps"), (lambda: AverageAll(0, 2), "n_clients"),
    (lambda: FedVARP(3, 0), "dim"), (lambda: KnownProbabilities([], 2), "p must"), (lambda: KnownProbabilities([0.0], 2), "p must")])
def test_bad_parts(call, name):
    with pytest.raises(ValueError, match=name):
        call()


# -- the round ---------------------------------------------------------------------------------------------------------------

def test_local_sgd_as_one_client_at_a_time():
    problem, x, clients = quadratics(), np.ones(3), np.array([0, 2])
    deltas = LocalSGD(0.1, steps=4)(problem, x, clients, rng())
    for n, delta in zip(clients, deltas, strict=True):
        y = x.copy()
        for _ in range(4):
            y = y - 0.1 * problem.curvature[n] @ (y - problem.centers[n])
        np.testing.assert_allclose(delta, y - x, rtol=1e-12)


def test_all_rules_are_fedavg_when_everyone_comes():
    problem, present = quadratics(), np.ones((30, 4), dtype=bool)
    rules = [AverageParticipating(4, 3), AverageAll(4, 3), KnownProbabilities(np.ones(4), 3), MIFA(4, 3), FedVARP(4, 3)]
    paths = [run(problem, LocalSGD(0.05, 3), r, present, np.ones(3), rng()).x for r in rules]
    for path in paths[1:]:
        np.testing.assert_allclose(path, paths[0], rtol=1e-10, atol=1e-12)


def test_expected_steps_over_all_subsets():
    """Every set of four clients, weighed by its probability: the oracle is unbiased, average-all sees p_n Delta_n."""
    p, deltas = np.array([0.1, 0.5, 0.8, 1.0]), rng(3).normal(size=(4, 2))
    patterns = every_pattern(4)
    weight = np.where(patterns, p, 1 - p).prod(axis=1)

    def expected(rule):
        return sum(w * rule.aggregate(deltas[row], np.flatnonzero(row)) for w, row in zip(weight, patterns, strict=True))

    np.testing.assert_allclose(expected(KnownProbabilities(p, 2)), deltas.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(expected(AverageAll(4, 2)), p @ deltas / 4, rtol=1e-12)


def test_mifa_and_fedvarp_by_hand():
    a, b = np.array([[1.0], [10.0]]), np.array([[3.0]])
    mifa, fedvarp = MIFA(3, 1), FedVARP(3, 1)
    assert mifa.aggregate(a, [0, 2]) == pytest.approx(11 / 3)
    assert mifa.aggregate(b, [0]) == pytest.approx(13 / 3)
    assert mifa.aggregate(np.empty((0, 1)), []) == pytest.approx(13 / 3)
    assert fedvarp.aggregate(a, [0, 2]) == pytest.approx(5.5)
    assert fedvarp.aggregate(b, [0]) == pytest.approx(2.0 + 11 / 3)  # the mean of the stored ones before the round
    assert fedvarp.aggregate(np.empty((0, 1)), []) == 0.0
    np.testing.assert_array_equal(fedvarp.last[:, 0], [3, 0, 10])
    assert AverageParticipating(3, 1).aggregate(np.empty((0, 1)), []) == 0.0


def test_floats_are_counted():
    present = np.array([[True, False, True, True], [False] * 4, [True, False, False, False]])
    for rule, memory in [(AverageAll(4, 3), 0), (KnownProbabilities(np.ones(4), 3), 4), (MIFA(4, 3), 12), (FedVARP(4, 3), 12)]:
        done = run(quadratics(), LocalSGD(0.1), rule, present, np.zeros(3), rng())
        assert (done.floats_up, done.floats_down, done.memory_floats) == (12, 12, memory)
        assert done.x.shape == (4, 3)


@pytest.mark.parametrize("make", RULES)
@pytest.mark.parametrize(("deltas", "clients", "name"), [
    (np.ones((2, 3)), [0, 0], "clients"), (np.ones((1, 3)), [4], "clients"), (np.ones((1, 3)), [-1], "clients"),
    (np.ones((1, 3)), [0.0], "clients"), (np.ones((2, 3)), [0], "deltas"), (np.ones((1, 2)), [0], "deltas"),
    (np.ones(3), [0], "deltas"), (np.array([[1.0, NAN, 0.0]]), [1], "deltas.*client 1"),
    (np.array([[1.0, np.inf, 0.0]]), [2], "deltas.*client 2"), (np.ones((1, 3)), [[0]], "clients")])
def test_bad_updates_change_nothing(make, deltas, clients, name):
    rule = make(4, 3)
    rule.aggregate(np.ones((2, 3)), [1, 2])
    before = {k: np.copy(v) for k, v in vars(rule).items()}
    with pytest.raises((ValueError, TypeError), match=name):
        rule.aggregate(deltas, clients)
    assert all(np.array_equal(before[k], v) for k, v in vars(rule).items())


@pytest.mark.parametrize(("change", "name"), [
    ({"present": np.ones((2, 3), dtype=bool)}, "present"), ({"present": np.ones((2, 4))}, "present"),
    ({"x0": np.zeros(2)}, "x0"), ({"x0": np.array([0.0, NAN, 0.0])}, "x0"), ({"server": AverageAll(4, 2)}, "server"),
    ({"server": AverageAll(5, 3)}, "server"), ({"server_lr": 0.0}, "server_lr"), ({"server_lr": NAN}, "server_lr")])
def test_parts_that_do_not_fit(change, name):
    parts = {"problem": quadratics(), "solver": LocalSGD(0.1), "server": AverageAll(4, 3),
             "present": np.ones((2, 4), dtype=bool), "x0": np.zeros(3), "rng": rng(), **change}
    with pytest.raises(ValueError, match=name):
        run(**parts)
