"""Dual mirror descent: steps against a numerical Bregman argmin, the run against a transcription in plain Python, duality against brute force, bad input."""
import itertools
import math

import numpy as np
import pytest
from scipy.optimize import minimize

from lib.online.allocation import (Requests, competitive_ratio, corrupted_requests, dual_value, escalating_requests, hindsight, iid_requests,
                                   periodic_requests)
from lib.online.dual_mirror_descent import VOID, DualMirrorDescent, choose
from lib.online.mirror import entropy_step, euclidean_step

BREAKS = [
    ("prices move the wrong way", "lib/online/dual_mirror_descent.py", "grad = self.rho - desired ", "grad = desired - self.rho "),
    ("prices learn from what was played, not from what was wanted", "lib/online/dual_mirror_descent.py",
     "grad = self.rho - desired ", "grad = self.rho - np.where(fits[..., None], desired, 0.0) "),
    ("the guard looks at any resource instead of all", "lib/online/dual_mirror_descent.py", "(desired <= self.budget).all(axis=-1)", "(desired <= self.budget).any(axis=-1)"),
    ("the void action loses ties", "lib/online/dual_mirror_descent.py", "np.where(best[..., 0] > 0, cheapest, VOID)", "np.where(best[..., 0] >= 0, cheapest, VOID)"),
    ("ties go to the action that consumes most", "lib/online/dual_mirror_descent.py", "np.inf).argmin(axis=-1)", "-np.inf).argmax(axis=-1)"),
    ("the entropy step has the wrong sign", "lib/online/mirror.py", "np.clip(-lr * grad", "np.clip(lr * grad"),
    ("the Euclidean step forgets the projection", "lib/online/mirror.py", "np.maximum(mu - lr * grad, 0.0)", "mu - lr * grad"),
    ("the dual bound forgets the void action", "lib/online/allocation.py", "surplus.max(axis=-1).clip(min=0).sum", "surplus.max(axis=-1).sum"),
]


def transcription(rewards, costs, rho, lr, reference, mu):
    """The algorithm box, one request, one resource, one action at a time."""
    T, A, m = costs.shape
    mu, budget = [mu] * m, [T * r for r in rho]
    actions, prices = [], []
    for t in range(T):
        prices.append(list(mu))
        best, best_value, best_use = VOID, 0.0, 0.0
        for a in range(A):
            value = rewards[t, a] - sum(costs[t, a, j] * mu[j] for j in range(m))
            use = sum(costs[t, a])
            if value > best_value + 1e-15 or (abs(value - best_value) <= 1e-15 and use < best_use):
                best, best_value, best_use = a, value, use
        desired = list(costs[t, best]) if best != VOID else [0.0] * m
        if all(desired[j] <= budget[j] for j in range(m)):
            actions.append(best)
            budget = [budget[j] - desired[j] for j in range(m)]
        else:
            actions.append(VOID)
        for j in range(m):
            g = rho[j] - desired[j]
            mu[j] = max(mu[j] - lr * g, 0.0) if reference == "euclidean" else mu[j] * math.exp(-lr * g)
    return actions, prices, budget


# --- parity

@pytest.mark.parametrize("reference, mu", [("euclidean", 0.0), ("entropy", 0.4)])
@pytest.mark.parametrize("rho", [[0.1, 0.2, 0.3], [0.02, 0.5, 0.5]])          # the second exhausts one budget early
def test_run_equals_the_transcription(reference, mu, rho):
    q = iid_requests(np.random.default_rng(1), 3, 200, actions=3, resources=3)
    got = DualMirrorDescent(rho, 200, lr=0.1, reference=reference, mu=mu, batch=(3,)).run(q)
    for i in range(3):
        actions, prices, left = transcription(q.rewards[i], q.costs[i], rho, 0.1, reference, mu)
        assert got.actions[i].tolist() == actions
        # sums in another order: round-off of 200 steps
        assert np.allclose(got.prices[i], prices, atol=1e-12) and np.allclose(got.left[i, -1], left, atol=1e-11)


@pytest.mark.parametrize("step, divergence", [
    (euclidean_step, lambda x, y: 0.5 * np.sum((x - y) ** 2)),
    (entropy_step, lambda x, y: np.sum(x * np.log(x / y) - x + y)),
])
def test_steps_are_the_bregman_argmin(step, divergence):
    """argmin over mu >= 0 of g mu + V(mu, mu_t) / lr, by a numerical optimizer."""
    rng = np.random.default_rng(2)
    for _ in range(5):
        mu, g, lr = rng.uniform(0.1, 1, 4), rng.normal(size=4), 0.5
        found = minimize(lambda x: g @ x + divergence(x, mu) / lr, mu, bounds=[(1e-9, None)] * 4, options={"ftol": 1e-14, "gtol": 1e-10}).x
        assert np.allclose(step(mu, g, lr), found, atol=1e-4)          # L-BFGS-B with finite differences


def test_acting_one_by_one_is_the_run():
    q = iid_requests(np.random.default_rng(3), 1, 50)[0]
    a, b = (DualMirrorDescent([0.1] * 5, 50) for _ in range(2))
    one_by_one = [int(a.act(q.rewards[t], q.costs[t])) for t in range(50)]
    assert one_by_one == b.run(q).actions.tolist() and np.array_equal(a.mu, b.mu) and np.array_equal(a.budget, b.budget)


# --- invariants

def test_duality_against_brute_force():
    """Integral optimum <= linear program <= dual at any prices, = dual at the program's own prices."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        T, A, m = 5, 2, 2
        rho = rng.uniform(0.1, 0.6, m)
        q = Requests(rng.random((T, A)), rng.random((T, A, m)))
        best = 0.0
        for plan in itertools.product(range(-1, A), repeat=T):
            spent = sum((q.costs[t, a] for t, a in enumerate(plan) if a >= 0), np.zeros(m))
            if (spent <= T * rho).all():
                best = max(best, sum(q.rewards[t, a] for t, a in enumerate(plan) if a >= 0))
        value, prices = hindsight(q, rho)
        assert best <= value + 1e-9
        assert math.isclose(value, dual_value(q, rho, prices), rel_tol=1e-7)            # the solver's tolerance
        for _ in range(10):
            assert value <= dual_value(q, rho, rng.exponential(size=m)) + 1e-9


def test_surplus_below_zero_is_left_alone():
    """With prices above every reward the dual is the worth of the budget alone."""
    q = iid_requests(np.random.default_rng(5), 1, 20)[0]
    big = Requests(q.rewards, q.costs + 1)
    assert math.isclose(dual_value(big, [0.1] * 5, [10.0] * 5), 20 * 0.1 * 50)


@pytest.mark.parametrize("reference", ["euclidean", "entropy"])
@pytest.mark.parametrize("make", [iid_requests, periodic_requests, lambda r, b, T: corrupted_requests(r, b, T, 40)], ids=["iid", "periodic", "corrupted"])
def test_budgets_are_never_overspent(make, reference):
    rho = np.array([0.05, 0.1, 0.2, 0.3, 0.01])
    for lr in (0.0, 0.02, 1.0, 50.0):
        got = DualMirrorDescent(rho, 300, lr=lr, reference=reference, batch=(6,)).run(make(np.random.default_rng(6), 6, 300))
        assert (got.left >= 0).all() and (got.spent <= 300 * rho + 1e-9).all()
        assert (got.prices >= 0).all() and np.isfinite(got.prices).all()


def test_the_guard_tests_every_resource():
    """The second resource is gone, the first is not: the request does not fit."""
    q = Requests(np.array([[1.0], [1.0]]), np.array([[[0.1, 1.0]], [[0.1, 1.0]]]))
    got = DualMirrorDescent([1.0, 0.5], 2, lr=0.0).run(q)
    assert got.actions.tolist() == [0, VOID] and got.left.tolist() == [[1.9, 0.0], [1.9, 0.0]]


def test_a_request_that_costs_more_than_the_budget_is_declined_and_still_teaches():
    d = DualMirrorDescent([0.1], 10, lr=0.5)
    assert d.act([5.0], [[3.0]]) == VOID                       # budget 1, cost 3
    assert d.budget.tolist() == [1.0]
    assert math.isclose(d.mu[0], 0.5 * (3.0 - 0.1))            # the wish moves the price


def test_prices_keep_moving_after_exhaustion():
    q = Requests(np.ones((20, 1)), np.ones((20, 1, 1)))
    got = DualMirrorDescent([0.05], 20, lr=0.01).run(q)
    assert got.actions.tolist() == [0] + [VOID] * 19
    assert np.allclose(np.diff(got.prices[:, 0]), 0.01 * 0.95)


def test_ties():
    """Void wins a tie at zero; between actions the smaller consumption wins."""
    assert choose(np.array([0.0]), np.array([[0.0]]), np.array([1.0])) == VOID
    assert choose(np.array([1.0]), np.array([[2.0]]), np.array([0.5])) == VOID
    assert choose(np.array([1.0, 1.0, 1.0]), np.array([[3.0], [1.0], [2.0]]), np.array([0.0])) == 1
    assert choose(np.array([1.0, 2.0]), np.array([[0.5], [2.5]]), np.array([0.5])) in (0, 1)


# --- limit cases

def test_zero_step_is_a_static_price_and_zero_price_is_greedy():
    q = iid_requests(np.random.default_rng(7), 1, 100)[0]
    greedy = DualMirrorDescent([100.0] * 5, 100, lr=0.0).run(q)
    assert greedy.actions.tolist() == q.rewards.argmax(axis=1).tolist()
    priced = DualMirrorDescent([0.1] * 5, 100, lr=0.0, mu=[0.5] * 5).run(q)
    assert (priced.prices == 0.5).all()


def test_unlimited_budget_earns_the_maximum():
    q = iid_requests(np.random.default_rng(8), 1, 200)[0]
    for reference, mu in (("euclidean", 0.0), ("entropy", 1e-9)):
        got = DualMirrorDescent([1e6] * 5, 200, reference=reference, mu=mu).run(q)
        assert math.isclose(got.reward, q.rewards.max(axis=1).sum(), rel_tol=1e-6)


def test_a_batch_is_its_sequences():
    q = iid_requests(np.random.default_rng(9), 4, 60)
    together = DualMirrorDescent([0.1] * 5, 60, batch=(4,)).run(q)
    for i in range(4):
        assert np.array_equal(DualMirrorDescent([0.1] * 5, 60).run(q[i]).actions, together.actions[i])


def test_inputs_are_what_they_say():
    rng = np.random.default_rng(10)
    assert np.array_equal(periodic_requests(np.random.default_rng(1), 2, 30, depth=0.0).rewards, iid_requests(np.random.default_rng(1), 2, 30).rewards)
    q = corrupted_requests(rng, 200, 40, corrupted=10)
    assert q.rewards[:, :10].max() <= 0.2 < 0.9 < q.rewards[:, 10:].max()
    e = escalating_requests(40, 4, 2, 3.0)
    assert e.rewards.ravel().tolist() == [1 / 3] * 10 + [1.0] * 10 + [0.0] * 20
    assert competitive_ratio(e, [0.25]) == 4.0 and competitive_ratio(e, [5.0]) == 1.0


# --- bad input

@pytest.mark.parametrize("kwargs, message", [
    (dict(rho=[0.1, 0.0]), "rho="), (dict(rho=[-1.0]), "rho="), (dict(rho=[math.nan]), "rho="), (dict(rho=[]), "rho="), (dict(rho=[[0.1]]), "rho="),
    (dict(horizon=0), "horizon="), (dict(horizon=2.5), "horizon="), (dict(horizon=True), "horizon="),
    (dict(lr=-0.1), "lr="), (dict(lr=math.nan), "lr="), (dict(lr=math.inf), "lr="),
    (dict(reference="kl"), "reference="), (dict(mu=[-0.1]), "mu="), (dict(mu=[math.nan]), "mu="), (dict(reference="entropy", mu=[0.0]), "never leave 0"),
])
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DualMirrorDescent(**{"rho": [0.1], "horizon": 10} | kwargs)


@pytest.mark.parametrize("rewards, costs", [
    ([1.0], [[-0.1]]), ([math.nan], [[0.1]]), ([1.0], [[math.inf]]), ([1.0], [0.1]), ([1.0, 2.0], [[0.1]]), ([1.0], [[0.1, 0.1]]), ([[1.0]], [[[0.1]]]),
])
def test_bad_requests_change_nothing(rewards, costs):
    d = DualMirrorDescent([0.5], 10)
    d.act([1.0], [[1.0]])
    before = d.mu.copy(), d.budget.copy(), d.t
    with pytest.raises(ValueError):
        d.act(rewards, costs)
    assert np.array_equal(d.mu, before[0]) and np.array_equal(d.budget, before[1]) and d.t == before[2]


def test_the_horizon_is_a_wall():
    d = DualMirrorDescent([0.5], 1)
    d.act([1.0], [[1.0]])
    with pytest.raises(ValueError, match="after the horizon"):
        d.act([1.0], [[1.0]])
    with pytest.raises(ValueError, match="requests has rewards of shape"):
        DualMirrorDescent([0.5], 3).run(Requests(np.ones((4, 1)), np.ones((4, 1, 1))))


@pytest.mark.parametrize("rewards, costs", [(np.ones((3, 2)), np.ones((3, 2))), (np.ones((3, 2)), np.ones((3, 1, 2))),
                                            (np.full((3, 2), np.nan), np.ones((3, 2, 1))), (np.ones((3, 2)), -np.ones((3, 2, 1)))])
def test_bad_sequences(rewards, costs):
    with pytest.raises(ValueError, match="rewards|costs"):
        Requests(rewards, costs)
