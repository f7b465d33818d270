"""Adan against pytorch_optimizer, a transcription of the algorithm in NumPy, Adam, closed forms, and the drop-in checks."""
import numpy as np
import pytest
import torch

from lib.optimizers.adan import Adan, nesterov, nesterov_by_differences
from tests.optimizers.conformance import NAN, Conformance, same, set_grads, snapshot, tensors

MODULE = "lib/optimizers/adan.py"
BREAKS = [
    ("gradient ahead without its scale", MODULE, "torch._foreach_add(grads, change, alpha=b2)", "torch._foreach_add(grads, change)"),
    ("first difference is g_1", MODULE, 'if name != "previous":', 'if name:'),
    ("difference not scaled in the update", MODULE, "-lr * root * b2 / c2", "-lr * root / c2"),
    ("previous gradient is never stored", MODULE, "        torch._foreach_copy_(previous, grads)\n", ""),
    ("proximal decay multiplies", MODULE, "torch._foreach_div_(params, 1.0 + lr * decay)", "torch._foreach_mul_(params, 1.0 - lr * decay)"),
    ("maximize forgotten in the first difference", MODULE, 'return -grad if group["maximize"] else grad.clone()', "return grad.clone()"),
    ("no correction of v", MODULE, "bias_correction(b2, batch.step), math", "1.0, math"),
    ("look-ahead taken at the new momentum", MODULE, "m = momentum * m + g + momentum * (g - previous)", "m = momentum * m + g + (g - previous)"),
]


class TestConformance(Conformance):
    optimizer = Adan
    floats_per_parameter = 4
    bad_options = [*[o for o in Conformance.bad_options if o[0] != "betas"], ("betas", (0.9, 0.99)), ("betas", (0.98, 0.92, 1.0)),
                   ("betas", (-0.1, 0.92, 0.99)), ("betas", (0.98, NAN, 0.99)), ("betas", 0.9), ("proximal", 1)]


class TestConformanceOfTheOptions(TestConformance):
    options = {"lr": 0.05, "betas": (0.9, 0.5, 0.95), "weight_decay": 0.1, "proximal": False, "eps": 1e-6}


# -- parity ------------------------------------------------------------------------------------------------------------

def pytorch_optimizer(params, proximal=True, **options):
    return pytest.importorskip("pytorch_optimizer").Adan(params, weight_decouple=not proximal, **options)


def transcription(x, gradients, lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0, proximal=True):
    """The algorithm, one line of NumPy for each of its lines."""
    b1, b2, b3 = betas
    m, v, n, previous = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x), gradients[0]
    for t, g in enumerate(gradients, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (g - previous)
        n = b3 * n + (1 - b3) * (g + b2 * (g - previous)) ** 2
        step = lr * (m / (1 - b1**t) + b2 * v / (1 - b2**t)) / (np.sqrt(n / (1 - b3**t)) + eps)
        x = (x - step) / (1 + lr * weight_decay) if proximal else (1 - lr * weight_decay) * x - step
        previous = g
    return x


OPTIONS = [{}, {"weight_decay": 0.3}, {"weight_decay": 0.3, "proximal": False}, {"eps": 1e-2}, {"betas": (0.9, 0.5, 0.999)},
           {"betas": (0.9, 0.0, 0.99)}, {"betas": (0.0, 0.9, 0.99), "weight_decay": 0.1}, {"lr": 0.1, "betas": (0.5, 0.99, 0.9)}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_parity_over_100_steps(options):
    """All options but `maximize`: the peer stores g_{-1} before it flips the sign, so its first difference is then -2 g_1."""
    ours, theirs = tensors(), tensors()
    opt, other = (make(p, **{"lr": 0.01, **options}) for make, p in ((Adan, ours), (pytorch_optimizer, theirs)))
    start = [p.detach().clone() for p in ours]
    for t in range(100):
        set_grads(ours, t)
        set_grads(theirs, t)
        opt.step()
        other.step()
    for p, q, p0 in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)  # the same float64 formulas in another order
        assert p.numel() == 0 or (p - p0).abs().max() > 1e-4


@pytest.mark.parametrize("options", OPTIONS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_transcription_over_60_steps(options):
    params = tensors()
    start, gradients = [p.detach().numpy().copy() for p in params], []
    opt = Adan(params, **{"lr": 0.01, **options})
    for t in range(60):
        set_grads(params, t)
        gradients.append([p.grad.numpy().copy() for p in params])
        opt.step()
    for i, p in enumerate(params):
        expected = transcription(start[i], [g[i] for g in gradients], **{"lr": 0.01, **options})
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-11, atol=1e-11)


def test_parity_in_float32():
    ours, theirs = tensors(torch.float32), tensors(torch.float32)
    opt, other = Adan(ours, lr=0.01), pytorch_optimizer(theirs, lr=0.01)
    for t in range(100):
        set_grads(ours, t)
        set_grads(theirs, t)
        opt.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=5e-6)  # values of order 1: some dozens of float32 roundings of 1e-7


def test_clipping_is_torchs_clipping_before_the_step():
    """The peer's `max_grad_norm`; torch divides by norm + 1e-6, as the peer does with this eps."""
    ours, theirs = (tensors(shapes=((3, 4), (5,), (2, 1, 3))) for _ in range(2))  # the peer cannot clip a scalar
    opt, other = Adan(ours, lr=0.01, eps=1e-6), pytorch_optimizer(theirs, lr=0.01, eps=1e-6, max_grad_norm=2.0)
    for t in range(60):
        set_grads(ours, t)
        set_grads(theirs, t)
        norm = torch.nn.utils.clip_grad_norm_(ours, 2.0)
        assert t > 0 or norm > 2.0
        opt.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-7)  # the peer's norm is a float32


def test_forgetting_the_state_is_the_restart():
    a = tensors()
    opt = TestConformance().run(a, steps=4)
    b = [p.detach().clone().requires_grad_() for p in a]
    opt.state.clear()
    fresh = Adan(b, lr=0.05)
    for t in range(5, 8):
        for params, o in ((a, opt), (b, fresh)):
            set_grads(params, t)
            o.step()
    assert same(a, b) and same(snapshot(opt), snapshot(fresh))


# -- closed forms and limits ---------------------------------------------------------------------------------------------

def path(gradients, **options):
    """Steps (previous minus next parameter) on a given sequence of gradients, in float64, and the last state."""
    gradients = torch.as_tensor(gradients, dtype=torch.float64)
    x = torch.zeros(gradients.shape[1:], dtype=torch.float64, requires_grad=True)
    opt, steps = Adan([x], **{"lr": 1.0, "eps": 0.0, **options}), []
    for g in gradients:
        before, x.grad = x.detach().clone(), g.clone()
        opt.step()
        steps.append(before - x.detach())
    return torch.stack(steps).numpy(), opt.state[x]


@pytest.mark.parametrize("foreach", [False, True])
def test_without_differences_it_is_adam(foreach):
    ours, theirs = tensors(), tensors()
    opt, adam = Adan(ours, lr=0.01, betas=(0.9, 0.0, 0.99)), torch.optim.Adam(theirs, lr=0.01, betas=(0.9, 0.99), foreach=foreach)
    for t in range(100):
        for params, o in ((ours, opt), (theirs, adam)):
            set_grads(params, t)
            o.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("c", [3.0, -1e-3])
def test_constant_gradient_makes_signed_steps(c):
    steps, _ = path(np.full((50, 2), c))
    np.testing.assert_allclose(steps, np.sign(c), rtol=1e-12)


def test_scale_invariance():
    g = np.random.default_rng(1).normal(size=(30, 4))
    np.testing.assert_allclose(path(1e3 * g)[0], path(g)[0], rtol=1e-10)


def test_average_of_differences_is_a_difference_of_averages():
    """v_t = (1 - b2)(g_t - a_{t-1}), where a averages the gradients with b2 from a_0 = g_1."""
    g = np.random.default_rng(2).normal(size=(40, 3))
    a = g[0]
    for row in g[:-1]:
        a = 0.92 * a + 0.08 * row
    np.testing.assert_allclose(path(g)[1]["v"].numpy(), 0.08 * (g[-1] - a), rtol=1e-11)


def test_divisor_of_pure_noise():
    """E (g + b2 (g - g'))^2 = (1 + b2)^2 + b2^2; 50 000 entries averaged over about 19 steps: standard error below 0.02."""
    g = np.random.default_rng(3).normal(size=(200, 50_000))
    assert path(g, betas=(0.98, 0.92, 0.9))[1]["n"].mean().item() == pytest.approx(1.92**2 + 0.92**2, abs=0.1)


# -- the rewritten momentum --------------------------------------------------------------------------------------------

A = np.diag([1.0, 30.0])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_nesterov_needs_no_gradient_ahead(momentum):
    def gradient(x):
        return A @ x + 0.3 * np.sin(x)
    start = np.array([2.0, -1.0])
    ahead = nesterov(gradient, start, 0.02, momentum, 100)
    here = nesterov_by_differences(gradient, start, 0.02, momentum, 100)
    np.testing.assert_allclose(here, ahead, rtol=1e-11, atol=1e-12)
    theta, m = start, np.zeros(2)  # the textbook's form: velocity u = -lr m, gradient at theta + momentum u
    for point in ahead:
        np.testing.assert_allclose(point, theta - 0.02 * momentum * m, rtol=1e-12, atol=1e-13)
        m = momentum * m + gradient(point)
        theta = theta - 0.02 * m


def test_equivalence_needs_a_zero_gradient_before_the_first():
    start, calls = np.array([2.0, -1.0]), []

    def gradient(x):
        calls.append(x)
        return A @ x
    ahead = nesterov(gradient, start, 0.02, 0.9, 10)
    assert len(calls) == 10
    here = nesterov_by_differences(gradient, start, 0.02, 0.9, 10, first=A @ start)
    assert len(calls) == 20
    np.testing.assert_array_equal(here[0], ahead[0])
    assert np.abs(here[1] - ahead[1]).max() > 0.1


def test_adan_is_the_rewritten_momentum_where_the_divisor_is_constant():
    """With b1 = b2 = b, m + b v averages g + b (g - previous): (1 - b) times the sum that `nesterov_by_differences` keeps."""
    b, g = 0.9, np.random.default_rng(4).normal(size=(30, 3))
    state = path(g, betas=(b, b, 0.99))[1]
    m = np.zeros(3)
    for now, previous in zip(g, [g[0], *g[:-1]], strict=True):
        m = b * m + now + b * (now - previous)
    np.testing.assert_allclose(state["m"].numpy() + b * state["v"].numpy(), (1 - b) * m, rtol=1e-11)


# -- bad input -----------------------------------------------------------------------------------------------------------

def test_betas_spoilt_between_steps():
    params = tensors()
    opt = TestConformance().run(params)
    before = snapshot(opt)
    opt.param_groups[0]["betas"] = (0.9, 0.99)
    set_grads(params, 9)
    with pytest.raises(ValueError, match="betas must be 3 numbers"):
        opt.step()
    opt.param_groups[0]["betas"] = (0.98, 0.92, 0.99)
    assert same(before, snapshot(opt))
