"""Schedules by refinement: the theorem on random convex problems, closed forms, a transcription with loops, the torch scheduler, bad input."""
import copy
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lib.optimizers.schedule_refinement import (Replay, best_weights, bound, bound_any, cosine, linear_decay, log_norms, refine, refine_any, smooth,
                                                steps_from_weights)

MODULE = "lib/optimizers/schedule_refinement.py"
BREAKS = [
    ("the tail includes its own weight", MODULE, "np.concatenate([np.cumsum(w[::-1])[-2::-1], [0.0]])", "np.cumsum(w[::-1])[::-1]"),
    ("longer gradients get larger weights", MODULE, "smooth(norms, tau) ** -float(power)", "smooth(norms, tau) ** float(power)"),
    ("the bound forgets its factor 2", MODULE, "/ (2 * w.sum()))", "/ w.sum())"),
    ("the optimal weights take norms, not squares", MODULE, "_positive(\"norms\", norms) ** -2.0", "_positive(\"norms\", norms) ** -1.0"),
    ("the filter mirrors the end with its last value", MODULE, "g[-2:-half - 2:-1]", "g[-1:-half - 1:-1]"),
    ("the filter is twice as wide", MODULE, "half = int(tau * len(g)) // 2", "half = int(tau * len(g))"),
    ("the second bound sums from the start", MODULE, "(eta ** 2 * g2).flip(0).cumsum(0).flip(0)", "(eta ** 2 * g2).cumsum(0)"),
    ("the scheduler is a step late", MODULE, "self.factors[self.last_epoch] if self.last_epoch <", "self.factors[self.last_epoch - 1] if self.last_epoch <"),
]


def descend(A, b, x, steps):
    """Subgradient descent on f(x) = max_i |a_i x - b_i|: final value and the norms at x_1, ..., x_T."""
    norms = []
    for eta in steps:
        e = A @ x - b
        i = np.abs(e).argmax()
        g = np.sign(e[i]) * A[i]
        norms.append(np.linalg.norm(g))
        x = x - eta * g
    return np.abs(A @ x - b).max(), np.array(norms)


def test_the_bound_holds_for_any_weights():
    """60 random polyhedral functions with minimum 0 at a known point; weights are drawn before the run, norms are the run's own."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        A, star, T = rng.normal(size=(12, 4)), rng.normal(size=4), int(rng.integers(2, 60))
        weights = rng.exponential(size=T) * 10 ** rng.uniform(-2, 0)
        # x_T is reached after T - 1 moves; the last step is 0, and the gradient at x_T still counts in the bound
        value, norms = descend(A, A @ star, np.zeros(4), steps_from_weights(weights))
        assert value <= bound(weights, norms, np.linalg.norm(star)) + 1e-12


def test_the_bound_for_any_schedule_holds():
    rng = np.random.default_rng(1)
    for _ in range(60):
        A, star, T = rng.normal(size=(12, 4)), rng.normal(size=4), int(rng.integers(2, 60))
        eta = rng.exponential(size=T) * 10 ** rng.uniform(-2, 0)
        value_at_last, norms = descend(A, A @ star, np.zeros(4), np.append(eta[:-1], 0.0))          # x_T, before the last step
        assert value_at_last <= bound_any(eta, norms, np.linalg.norm(star)) + 1e-12


def test_transcription_with_loops():
    rng = np.random.default_rng(2)
    w, g, D = rng.exponential(size=9), rng.exponential(size=9), 1.7
    want = [w[t] * sum(w[p] for p in range(t + 1, 9)) / sum(w) for t in range(9)]
    assert np.allclose(steps_from_weights(w), want, rtol=1e-14) and steps_from_weights(w)[-1] == 0.0
    S = [sum(w[t] for t in range(k, 9)) for k in range(9)]
    q = [sum(w[t] ** 2 * g[t] ** 2 for t in range(k, 9)) for k in range(9)]
    want = (D**2 + q[0]) / (2 * S[0]) + 0.5 * sum(w[k] * q[k] / (S[k] * S[k + 1]) for k in range(8))
    assert math.isclose(bound_any(w, g, D), want, rel_tol=1e-13)


@pytest.mark.parametrize("T, tau", [(10, 0.5), (51, 0.1), (200, 0.1), (7, 0.9)])
def test_median_filter(T, tau):
    """Against a median in a window, entry by entry, over the padded sequence."""
    g = np.random.default_rng(3).exponential(size=T)
    half = int(tau * T) // 2
    padded = [g[0]] * half + list(g) + [g[T - 2 - i] for i in range(half)]
    assert np.array_equal(smooth(g, tau), [np.median(padded[t:t + 2 * half + 1]) for t in range(T)])
    assert np.array_equal(smooth(g, 0.0), g)


# --- closed forms

def test_constant_norms_give_linear_decay():
    for T in (2, 5, 100):
        for power in (1.0, 2.0):
            assert np.allclose(refine(np.full(T, 3.0), power=power), (T - np.arange(1, T + 1)) / (T - 1), atol=1e-12)
    assert np.allclose(linear_decay(11), np.linspace(1, 0, 11), atol=1e-15)


def test_constant_norms_give_the_classical_rate():
    D, G, T = 2.0, 3.0, 50
    w = best_weights(np.full(T, G), D)
    assert np.allclose(w, D / (G * math.sqrt(T))) and math.isclose(bound(w, np.full(T, G), D), D * G / math.sqrt(T))


def test_best_weights_minimize_the_bound():
    rng = np.random.default_rng(4)
    for _ in range(5):
        g, D = rng.uniform(0.5, 2, 6), 1.3
        w = best_weights(g, D)
        numeric = minimize(lambda v: bound(np.exp(v), g, D), np.zeros(6), tol=1e-12)
        assert math.isclose(bound(w, g, D), D / math.sqrt((g**-2.0).sum()), rel_tol=1e-12)
        assert math.isclose(numeric.fun, bound(w, g, D), rel_tol=1e-6) and np.allclose(np.exp(numeric.x), w, rtol=1e-3)      # BFGS with finite differences


def test_refinement_is_the_schedule_of_the_best_weights():
    g = np.random.default_rng(5).uniform(0.5, 2, 40)
    best = steps_from_weights(best_weights(g, 2.0))
    assert np.allclose(refine(g, tau=0.0), best / best.max(), rtol=1e-12)
    assert np.allclose(refine(g, tau=0.0), refine(7 * g, tau=0.0), rtol=1e-12)          # only ratios of norms matter


def test_filter_and_inversion_commute():
    g = np.random.default_rng(6).uniform(0.5, 2, 80)
    assert np.allclose(1 / smooth(g), smooth(1 / g), rtol=1e-14)


def test_shapes():
    """Large first norms make a warm-up; norms that rise at the end make the schedule fall faster."""
    T = 200
    warm = refine(np.where(np.arange(T) < 40, 5.0, 1.0), tau=0.0)
    assert warm[0] < 0.1 and 39 < warm.argmax() < 45
    late = refine(np.where(np.arange(T) > 160, 5.0, 1.0), tau=0.0)
    assert late[150] < linear_decay(T)[150] / 2
    assert cosine(4).tolist() == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


def test_refine_any_finds_a_lower_bound_than_its_start():
    g, D = np.random.default_rng(7).uniform(0.5, 2, 30), 1.5
    found = refine_any(g, D)
    start = np.full(30, D / (np.sqrt(np.mean(g**2)) * math.sqrt(30)))
    assert bound_any(found, g, D) < bound_any(start, g, D)
    nudged = [bound_any(found * np.exp(0.05 * np.random.default_rng(s).normal(size=30)), g, D) for s in range(20)]
    assert min(nudged) >= bound_any(found, g, D) * (1 - 1e-6)


# --- the torch side

def test_replay_drives_an_optimizer():
    x = torch.zeros(3, requires_grad=True)
    opt = torch.optim.SGD([{"params": [x], "lr": 2.0}], lr=1.0)
    schedule, seen = Replay(opt, [1.0, 0.5, 0.25]), []
    for _ in range(5):
        seen.append(opt.param_groups[0]["lr"])
        x.grad = torch.ones(3)
        opt.step()
        schedule.step()
    assert seen == [2.0, 1.0, 0.5, 0.0, 0.0] and torch.allclose(x, torch.full((3,), -3.5))


def test_replay_goes_on_from_its_state():
    def make():
        opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        return opt, Replay(opt, np.linspace(1, 0, 6))
    opt, a = make()
    for _ in range(2):
        opt.step()
        a.step()
    other, b = make()
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for _ in range(3):
        for o, s in ((opt, a), (other, b)):
            o.step()
            s.step()
        assert opt.param_groups[0]["lr"] == other.param_groups[0]["lr"]


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_logged_norms_are_those_of_the_whole_gradient(p):
    x, y = (torch.zeros(s, requires_grad=True) for s in ((2, 2), (3,)))
    unused = torch.zeros(1, requires_grad=True)
    opt = torch.optim.SGD([x, y, unused], lr=0.1)
    norms = log_norms(opt, p)
    for c in (1.0, 2.0):
        x.grad, y.grad = torch.full((2, 2), c), torch.full((3,), -c)
        opt.step()
    assert norms == pytest.approx([7 ** (1 / p), 2 * 7 ** (1 / p)], rel=1e-6)


# --- bad input

@pytest.mark.parametrize("bad", [[], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf], [[1.0]]])
def test_bad_sequences(bad):
    for call, name in ((steps_from_weights, "weights"), (refine, "norms"), (smooth, "norms"), (lambda x: best_weights(x, 1.0), "norms"),
                       (lambda x: bound(x, [1.0, 1.0], 1.0), "weights"), (lambda x: bound_any(x, [1.0, 1.0], 1.0), "factors"), (lambda x: refine_any(x, 1.0), "norms")):
        with pytest.raises(ValueError, match=name):
            call(bad)


@pytest.mark.parametrize("tau", [-0.1, 1.0, math.nan])
def test_bad_tau(tau):
    with pytest.raises(ValueError, match="tau"):
        refine([1.0, 2.0], tau=tau)


def test_bad_factors_leave_the_optimizer_alone():
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="factors"):
        Replay(opt, [1.0, math.nan])
    assert opt.state_dict() == before
