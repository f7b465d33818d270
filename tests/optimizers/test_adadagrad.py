"""The batch-size tests by closed forms and loops in NumPy; AdaGrad-Norm against a transcription, torch's Adagrad in one dimension, and the drop-in checks."""
import math

import numpy as np
import pytest
import torch

from lib.optimizers.adadagrad import AdaGradNorm, Spread, coordinate_test, example_gradients, inner_product_test, next_size, norm_test
from tests.optimizers.conformance import Conformance, set_grads, tensors

MODULE = "lib/optimizers/adadagrad.py"
BREAKS = [
    ("variance around b instead of b - 1", MODULE, "grads.var(0)", "grads.var(0, correction=0)"),
    ("inner products are not squared away", MODULE, "theta**2 * s.norm2**2", "theta**2 * s.norm2"),
    ("eta is not squared", MODULE, "_ratio(s.variance, eta**2 * s.norm2)", "_ratio(s.variance, eta * s.norm2)"),
    ("batches may shrink", MODULE, "max(size, math.ceil(wanted))", "math.ceil(wanted)"),
    ("rounded down", MODULE, "math.ceil(wanted)", "math.floor(wanted)"),
    ("the accumulator forgets", MODULE, 'v = group["v"] + sum(', 'v = 1e-2 + sum('),
    ("a group counts only itself", MODULE, 'for other in self.param_groups for p in other["params"] if', 'for p in group["params"] if'),
    ("the orthogonal part keeps the rest", MODULE, "max(total - along, 0.0)", "total"),
]


class TestConformance(Conformance):
    optimizer = AdaGradNorm
    options = {"lr": 0.5}
    floats_per_parameter = 0
    bad_options = [(n, v) for n, v in Conformance.bad_options if n in ("lr", "maximize")] + [("v", 0.0), ("v", -1.0), ("v", math.nan)]

    def test_groups_keep_their_own_options(self):
        """One accumulator for all groups: two groups are one, but for their rates."""
        a, b = tensors(shapes=((3,), (4,))), tensors(shapes=((3,), (4,)))
        opt, whole = self.make([{"params": [a[0]]}, {"params": [a[1]], "lr": 0.0}]), self.make(b)
        before = a[1].detach().clone()
        for t in range(3):
            set_grads(a, t)
            set_grads(b, t)
            opt.step()
            whole.step()
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], before)
        assert opt.param_groups[0]["v"] == opt.param_groups[1]["v"] == whole.param_groups[0]["v"]

    def test_each_parameter_counts_its_own_steps(self):
        """A late parameter meets the sum that the early ones have gathered."""
        early, late = tensors(shapes=((3,), (4,)))
        before, total = late.detach().clone(), 1e-2
        opt = self.make([early, late])
        for t in range(4):
            set_grads([early, late] if t == 3 else [early], t)
            total += early.grad.square().sum().item() + (late.grad.square().sum().item() if t == 3 else 0.0)
            opt.step()
        torch.testing.assert_close(late, before - 0.5 / math.sqrt(total) * late.grad, rtol=1e-12, atol=1e-14)
        assert opt.state[early]["step"] == 4 and opt.state[late]["step"] == 1

    def test_a_spoilt_gradient_is_named(self):
        params = tensors()
        opt = self.run(params)
        params[0].grad[0, 0] = math.nan
        opt.step()
        with pytest.raises(ValueError, match="v must be finite"):
            opt.step()


# -- AdaGrad-Norm --------------------------------------------------------------------------------------------------------

def test_transcription_over_60_steps():
    params = tensors()
    w, v = [p.detach().numpy().copy() for p in params], 0.3
    opt = AdaGradNorm(params, lr=0.7, v=0.3)
    for t in range(60):
        set_grads(params, t)
        g = [p.grad.numpy() for p in params]
        v += sum(float((x * x).sum()) for x in g)
        w = [a - 0.7 / np.sqrt(v) * x for a, x in zip(w, g, strict=True)]
        opt.step()
    for p, q in zip(params, w, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), q, rtol=1e-12, atol=1e-13)  # the same float64 formula
    assert opt.param_groups[0]["v"] == pytest.approx(v, rel=1e-12)


def test_in_one_dimension_it_is_adagrad():
    x, y = (torch.tensor([1.5], dtype=torch.float64, requires_grad=True) for _ in range(2))
    opt = AdaGradNorm([x], lr=0.4, v=0.1)
    other = torch.optim.Adagrad([y], lr=0.4, initial_accumulator_value=0.1, eps=0.0)
    for t in range(80):
        set_grads([x], t)
        set_grads([y], t)
        opt.step()
        other.step()
    torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


# -- the tests -------------------------------------------------------------------------------------------------------------

def sample(b=7, d=5, seed=0, mean=0.5):
    return mean + torch.randn(b, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("b, d", [(2, 1), (2, 6), (7, 5), (40, 3)])
def test_spread_by_loops(b, d, seed):
    grads = sample(b, d, seed).numpy()
    g = sum(grads[i] for i in range(b)) / b
    norm2 = float(g @ g)
    variance = sum(sum((grads[i, j] - g[j]) ** 2 for i in range(b)) / (b - 1) for j in range(d))
    inner = [float(grads[i] @ g) for i in range(b)]
    rest = [grads[i] - inner[i] / norm2 * g for i in range(b)]
    s = Spread.of(torch.from_numpy(grads))
    # sums of a few float64 numbers; the orthogonal part is a difference, and may be zero
    assert s.norm2 == pytest.approx(norm2, rel=1e-12) and s.variance == pytest.approx(variance, rel=1e-12)
    assert s.inner == pytest.approx(sum((x - norm2) ** 2 for x in inner) / (b - 1), rel=1e-10)
    assert s.orthogonal == pytest.approx(sum(float(o @ o) for o in rest) / (b - 1), rel=1e-10, abs=1e-10 * variance)
    assert s.coordinates.numpy() == pytest.approx(np.array([np.var(grads[:, j], ddof=1) / g[j] ** 2 for j in range(d)]), rel=1e-10)
    assert np.abs(sum(rest)).max() < 1e-12


def test_two_gradients_by_hand():
    """(3, 1) and (1, -1): mean (2, 0), variances 2 and 2; along the mean 6 and 2, across it 1 and -1."""
    s = Spread.of(torch.tensor([[3.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    assert (s.norm2, s.variance, s.inner, s.orthogonal) == pytest.approx((4.0, 4.0, 8.0, 2.0))
    assert norm_test(s, 0.5) == pytest.approx(4.0) and norm_test(s, 1.0) == pytest.approx(1.0)
    assert inner_product_test(s, 0.5) == pytest.approx(2.0)
    assert inner_product_test(s, 0.5, 0.25) == pytest.approx(8.0) and inner_product_test(s, 0.5, 10.0) == pytest.approx(2.0)
    assert coordinate_test(s, 1.0) == math.inf
    assert coordinate_test(Spread.of(torch.tensor([[3.0, 1.0], [1.0, 2.0]])), 0.5) == pytest.approx(2.0)


def test_exact_split_and_order_of_the_tests():
    for seed in range(20):
        s = Spread.of(sample(seed=seed))
        assert s.variance == pytest.approx(s.inner / s.norm2 + s.orthogonal, rel=1e-12)
        assert inner_product_test(s, 0.3) <= norm_test(s, 0.3) * (1 + 1e-12) <= coordinate_test(s, 0.3) * (1 + 1e-9)
        assert inner_product_test(s, 0.3, 0.3) <= norm_test(s, 0.3) * (1 + 1e-12)


def test_a_grown_batch_passes_if_its_statistics_stay():
    s = Spread.of(sample(seed=3))
    b = next_size(7, norm_test(s, 0.1), 10_000)
    assert s.variance / b <= 0.1**2 * s.norm2 < s.variance / (b - 1)


def test_no_spread_no_growth_and_no_limit_no_growth():
    same = sample(b=1).expand(6, 5)
    s = Spread.of(same)
    assert norm_test(s, 1e-3) < 1e-20 and next_size(6, norm_test(s, 1e-3), 100) == 6
    assert next_size(7, norm_test(Spread.of(sample()), 1e9), 100) == 7
    zero = Spread.of(torch.zeros(4, 3))
    assert norm_test(zero, 0.1) == inner_product_test(zero, 0.1, 0.1) == coordinate_test(zero, 0.1) == 0.0
    opposite = Spread.of(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert norm_test(opposite, 0.1) == math.inf == inner_product_test(opposite, 0.1, 0.1) and next_size(2, math.inf, 64) == 64


@pytest.mark.parametrize("size, wanted, largest, then", [(8, 3.2, 64, 8), (8, 8.01, 64, 9), (8, 63.5, 64, 64), (8, 1e9, 64, 64), (2, 0.0, 2, 2)])
def test_next_size(size, wanted, largest, then):
    assert next_size(size, wanted, largest) == then


def test_gradients_of_examples():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()
    x, y = sample(6, 4), torch.tensor([0, 1, 1, 0, 1, 0])
    grads = example_gradients(model, torch.nn.functional.cross_entropy, x, y)
    for i in range(6):
        loss = torch.nn.functional.cross_entropy(model(x[i:i + 1]), y[i:i + 1])
        alone = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        torch.testing.assert_close(grads[i], alone, rtol=1e-12, atol=1e-14)
    assert all(p.grad is None for p in model.parameters())


# -- bad input -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("grads", [torch.ones(1, 3), torch.ones(3), torch.full((3, 2), math.nan), torch.full((3, 2), math.inf)])
def test_bad_gradients_are_refused(grads):
    with pytest.raises(ValueError, match="grads"):
        Spread.of(grads)


def test_bad_options_of_the_tests():
    s = Spread.of(sample())
    for call, name in [(lambda: norm_test(s, 0.0), "eta"), (lambda: norm_test(s, math.nan), "eta"), (lambda: coordinate_test(s, -1.0), "eta"),
                       (lambda: inner_product_test(s, 0.0), "theta"), (lambda: inner_product_test(s, 1.0, -1.0), "nu"),
                       (lambda: next_size(1, 3.0, 8), "size"), (lambda: next_size(9, 3.0, 8), "size"), (lambda: next_size(4, math.nan, 8), "wanted")]:
        with pytest.raises(ValueError, match=name):
            call()
    with pytest.raises(ValueError, match="batch norm"):
        example_gradients(torch.nn.Sequential(torch.nn.BatchNorm1d(3)), torch.nn.functional.mse_loss, torch.ones(2, 3), torch.ones(2, 3))
