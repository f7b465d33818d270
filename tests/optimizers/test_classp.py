"""CLASSP against torch's Adagrad, a transcription in NumPy, closed forms, and the drop-in checks; EWC against a linear model's formulas."""
import math

import numpy as np
import pytest
import torch

from lib.optimizers.classp import CLASSP, EWC, SideBySide, fisher_diagonal, learn_in_turn, overlap, passed
from tests.optimizers.conformance import Conformance, set_grads, tensors

MODULE = "lib/optimizers/classp.py"
BREAKS = [
    ("the sum never grows", MODULE, 'if not group["lag"]:', "if False:"),
    ("threshold on the size instead of the square", MODULE, "grad.square() <= threshold", "grad.abs() <= threshold"),
    ("always a square root", MODULE, "torch._foreach_pow_(root, 1.0 / power)", "torch._foreach_sqrt_(root)"),
    ("all gradients are summed", MODULE, 'batch.grads if group["all_gradients"] else through', "batch.grads"),
    ("the power is discarded from the sum", MODULE, "torch._foreach_pow_(new, power)", "torch._foreach_pow_(new, 1.0)"),
    ("threshold is not strict", MODULE, "grad.square() <= threshold", "grad.square() < threshold"),
    ("Fisher of the mean gradient", MODULE, "g.square().mean(0)", "g.mean(0).square()"),
    ("pull twice as strong", MODULE, "return 0.5 * strength", "return strength"),
]


class TestConformance(Conformance):
    optimizer = CLASSP
    options = {"lr": 0.05, "threshold": 1e-4}
    floats_per_parameter = 1
    bad_options = [(n, v) for n, v in Conformance.bad_options if n not in ("betas", "weight_decay")] + [
        ("eps", 0.0), ("threshold", -0.1), ("threshold", math.nan), ("power", 0.0), ("power", math.nan), ("lag", 1), ("all_gradients", "no")]


class TestConformanceAsPrinted(Conformance):
    """Sums of earlier gradients, passed or not; a large eps keeps the first step finite."""

    optimizer = CLASSP
    options = {"lr": 0.05, "threshold": 1e-4, "power": 2.0, "eps": 1.0, "lag": True, "all_gradients": True}
    floats_per_parameter = 1
    bad_options = TestConformance.bad_options


# -- parity ------------------------------------------------------------------------------------------------------------

SHAPES = ((6, 40), (4, 3, 5, 5), (7,), (), (8, 8))


@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_power_two_without_threshold_is_adagrad_over_100_steps(eps):
    ours, theirs = tensors(shapes=SHAPES), tensors(shapes=SHAPES)
    opt = CLASSP(ours, lr=0.1, threshold=0.0, power=2.0, eps=eps)
    other = torch.optim.Adagrad(theirs, lr=0.1, initial_accumulator_value=eps, eps=0.0)
    for t in range(100):
        set_grads(ours, t)
        set_grads(theirs, t)
        opt.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)  # the same float64 sums, eps added at the end or at the start


@pytest.mark.parametrize("all_gradients", [False, True])
@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_transcription_over_60_steps(threshold, power, lag, all_gradients):
    params = tensors(shapes=SHAPES)
    eps = 1e-2 if lag else 1e-5
    w, S = [p.detach().numpy().copy() for p in params], [np.zeros(p.shape) for p in params]
    opt = CLASSP(params, lr=0.05, threshold=threshold, power=power, eps=eps, lag=lag, all_gradients=all_gradients)
    for t in range(60):
        set_grads(params, t)
        for i, p in enumerate(params):
            for j in np.ndindex(*p.shape):
                g = p.grad[j].item()
                moves, before = g**2 > threshold, S[i][j]
                if moves or all_gradients:
                    S[i][j] += abs(g) ** power
                if moves:
                    w[i][j] -= 0.05 * g / (eps + (before if lag else S[i][j])) ** (1 / power)
        opt.step()
    for p, q, s in zip(params, w, S, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), q, rtol=1e-10, atol=1e-10)  # the same formulas; pow of torch and of Python
        np.testing.assert_allclose(opt.state[p]["S"].numpy(), s, rtol=1e-10)


# -- limits and closed forms ---------------------------------------------------------------------------------------------

def test_the_threshold_is_strict_and_in_squares():
    g = torch.tensor([0.5, -0.5, 0.75, -0.25, 0.0], dtype=torch.float64)
    assert passed(g, 0.25).tolist() == [0.0, 0.0, 0.75, 0.0, 0.0]
    assert torch.equal(passed(g, 0.0), g)
    assert torch.isnan(passed(torch.tensor([math.nan]), 1.0)).all()


@pytest.mark.parametrize("g", [1e-6, 1.0, -1e4])
def test_a_constant_gradient_moves_a_weight_by_the_harmonic_numbers(g):
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    opt = CLASSP([w], lr=0.2, threshold=0.0, eps=1e-300)
    for t in range(1, 60):
        w.grad = torch.tensor([g], dtype=torch.float64)
        opt.step()
        assert w.item() == pytest.approx(-math.copysign(0.2, g) * sum(1 / k for k in range(1, t + 1)), rel=1e-12)


def test_a_path_of_power_one_is_at_most_a_logarithm():
    params = tensors(shapes=SHAPES)
    opt = CLASSP(params, lr=0.2, threshold=0.1, eps=1e-3)
    path = [torch.zeros_like(p) for p in params]
    for t in range(80):
        set_grads(params, t)
        before = [p.detach().clone() for p in params]
        opt.step()
        path = [a + (p.detach() - b).abs() for a, p, b in zip(path, params, before, strict=True)]
    for a, p in zip(path, params, strict=True):
        assert (a <= 0.2 * torch.log1p(opt.state[p]["S"] / 1e-3) + 1e-12).all() and a.max() > 0.2


def test_weights_below_the_threshold_rest_and_are_not_counted():
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    opt = CLASSP([w], threshold=0.5)
    for _ in range(5):
        w.grad = torch.tensor([0.7, 0.8], dtype=torch.float64)
        opt.step()
    assert w[0] == 1.0 and w[1] < 1.0
    assert opt.state[w]["S"].tolist() == pytest.approx([0.0, 4.0])


# -- elastic weight consolidation ----------------------------------------------------------------------------------------

def linear(weight):
    model = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    with torch.no_grad():
        model.weight.copy_(weight)
    return model


def test_fisher_of_a_linear_model():
    g = torch.Generator().manual_seed(3)
    weight, x = torch.randn(4, 6, generator=g, dtype=torch.float64), torch.randn(9, 6, generator=g, dtype=torch.float64)
    ours, = fisher_diagonal(linear(weight), x, torch.Generator().manual_seed(5))
    probability = (x @ weight.T).softmax(-1)
    y = torch.multinomial(probability, 1, generator=torch.Generator().manual_seed(5))[:, 0]
    by_hand = torch.zeros(4, 6, dtype=torch.float64)
    for x_i, y_i, p_i in zip(x, y, probability, strict=True):
        slope = -p_i.clone()
        slope[y_i] += 1
        by_hand += torch.outer(slope, x_i) ** 2 / len(x)
    torch.testing.assert_close(ours, by_hand, rtol=1e-12, atol=1e-14)


def test_fisher_expects_p_times_one_minus_p():
    """Two classes, one input: each label's squared slope is (1 - p)^2 or p^2 by chance, p (1 - p) on average."""
    n, weight = 20_000, torch.tensor([[1.2], [0.0]], dtype=torch.float64)
    p = math.exp(1.2) / (1 + math.exp(1.2))
    fisher, = fisher_diagonal(linear(weight), torch.ones(n, 1, dtype=torch.float64), torch.Generator().manual_seed(0))
    deviation = math.sqrt(p * (1 - p) / n) * abs((1 - p) ** 2 - p**2)
    assert abs(fisher[0, 0].item() - p * (1 - p)) < 4 * deviation  # four deviations: fails by chance once in 15000 seeds


def test_fisher_of_networks_side_by_side():
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))

        def forward(self, x):
            return x @ self.w  # [2, n, 3]

    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pair = Pair()
    both, = fisher_diagonal(pair, x, torch.Generator().manual_seed(4))
    probability = pair(x).detach().softmax(-1)
    y = torch.multinomial(probability.flatten(0, 1), 1, generator=torch.Generator().manual_seed(4)).view(2, 5)
    slope = torch.nn.functional.one_hot(y, 3) - probability
    torch.testing.assert_close(both, torch.einsum("knc,ni->kic", slope**2, x**2) / 5, rtol=1e-12, atol=1e-14)


def test_the_pull_towards_the_anchor():
    g = torch.Generator().manual_seed(3)
    model = linear(torch.randn(4, 6, generator=g, dtype=torch.float64))
    kept = EWC.after(model, torch.randn(9, 6, generator=g, dtype=torch.float64), g)
    assert kept.penalty(model, 10.0).item() == 0.0 and kept.floats == 2 * 24
    with torch.no_grad():
        model.weight.add_(0.1)
    kept.penalty(model, 10.0).backward()
    torch.testing.assert_close(model.weight.grad, 10.0 * 0.1 * kept.fisher[0], rtol=1e-12, atol=1e-14)
    assert not kept.anchor[0].requires_grad and not torch.equal(kept.anchor[0], model.weight)


def test_bad_input_of_the_baseline():
    model = linear(torch.ones(2, 3, dtype=torch.float64))
    kept = EWC.after(model, torch.ones(4, 3, dtype=torch.float64), torch.Generator().manual_seed(0))
    for strength in (-1.0, math.nan):
        with pytest.raises(ValueError, match="strength"):
            kept.penalty(model, strength)
    with pytest.raises(ValueError, match="model must have parameters"):
        kept.penalty(linear(torch.ones(2, 4, dtype=torch.float64)), 1.0)
    with pytest.raises(ValueError, match="finite"):
        fisher_diagonal(linear(torch.full((2, 3), math.nan, dtype=torch.float64)), torch.ones(4, 3, dtype=torch.float64), torch.Generator())
    with pytest.raises(ValueError, match="at least one"):
        fisher_diagonal(model, torch.ones(0, 3, dtype=torch.float64), torch.Generator())


# -- a sequence of tasks -------------------------------------------------------------------------------------------------

def task(seed, n=40):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 64, generator=g)
    y = torch.randint(10, (n,), generator=g)
    return x, y, x, y


def test_networks_side_by_side_do_not_meet():
    nets = SideBySide(torch.Generator().manual_seed(0), k=3)
    x, y, *_ = task(1)
    loss = torch.nn.functional.cross_entropy(nets(x)[1], y)
    loss.backward()
    assert nets.W1.grad[1].any() and not nets.W1.grad[[0, 2]].any()
    assert nets.accuracy(x, y).shape == (3,) and nets.accuracy(x, nets(x)[2].argmax(-1))[2] == 1.0


def test_a_course_is_one_run_with_one_optimizer():
    tasks = [task(1), task(2)]
    course = learn_in_turn(tasks, lambda p: CLASSP(p, threshold=1e-4), torch.Generator().manual_seed(0), steps=10, visits=5)
    again = learn_in_turn(tasks, lambda p: CLASSP(p, threshold=1e-4), torch.Generator().manual_seed(0), steps=10, visits=1)
    assert course.curve.shape == (10, 2, 6) and again.curve.shape == (2, 2, 6) and len(course.ends) == 3
    assert torch.equal(course.ends[2], again.ends[2])  # looking changes nothing
    assert torch.equal(course.curve[[4, 9]], again.curve)
    assert all(state["step"] == 20 for state in course.optimizer.state.values())  # the diary is not reset
    with pytest.raises(ValueError, match="steps"):
        learn_in_turn(tasks, CLASSP, torch.Generator(), steps=10, visits=3)


def test_the_pull_holds_the_weights_that_matter():
    tasks, drift = [task(1), task(2)], []
    for strength in (0.0, 3.0):
        course = learn_in_turn(tasks, lambda p: torch.optim.SGD(p, lr=0.1), torch.Generator().manual_seed(0), steps=60, strength=strength)
        assert (course.kept is None) is (strength == 0.0)
        drift.append((course.ends[2] - course.ends[1]).square())
    fisher = torch.cat([f.flatten() for f in course.kept.fisher])
    assert (fisher * drift[1]).sum() < 0.5 * (fisher * drift[0]).sum()


def test_overlap_by_hand():
    a, b = torch.tensor([True, True, True, False, False]), torch.tensor([False, True, True, True, False])
    found = overlap(a, b)
    assert [found[k] for k in ("A only", "B only", "both", "neither")] == pytest.approx([0.2, 0.2, 0.4, 0.2])
    assert found["jaccard"] == pytest.approx(2 / 4) and found["independent"] == pytest.approx(0.36 / (1.2 - 0.36))
    assert overlap(a & ~a, a & ~a)["jaccard"] == overlap(a & ~a, a & ~a)["independent"] == 0.0
