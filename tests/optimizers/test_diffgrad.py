"""diffGrad against pytorch_optimizer, a transcription, Adam at whole and half rate, closed forms, and the drop-in checks."""
import numpy as np
import pytest
import torch

from lib.optimizers.diffgrad import DiffGrad, friction
from tests.optimizers.conformance import Conformance, set_grads, tensors

MODULE = "lib/optimizers/diffgrad.py"
BREAKS = [
    ("previous gradient is never stored", MODULE, "-lr * root / bias_correction(beta1, batch.step))\n        torch._foreach_copy_(previous, grads)\n",
     "-lr * root / bias_correction(beta1, batch.step))\n        torch._foreach_zero_(previous)\n"),
    ("aliased always", MODULE, 'if group["aliased"] and batch.step > 1:', "if batch.step > 1:"),
    ("no absolute value", MODULE, "        torch._foreach_abs_(step)\n", ""),
    ("friction enters the average", MODULE, "torch._foreach_mul_(step, m)", "torch._foreach_mul_(m, step)\n        torch._foreach_copy_(step, m)"),
    ("no correction of m", MODULE, "-lr * root / bias_correction(beta1, batch.step)", "-lr * root"),
    ("decay is decoupled", MODULE, 'if group["weight_decouple"]:', 'if not group["weight_decouple"]:'),
    ("maximum forgotten", MODULE, 'v = batch.state["v_max"]', "pass"),
]


class TestConformance(Conformance):
    optimizer = DiffGrad
    floats_per_parameter = 3
    bad_options = [*Conformance.bad_options, ("amsgrad", 1), ("aliased", None), ("weight_decouple", "no")]


class TestConformanceOfTheOptions(TestConformance):
    options = {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1, "weight_decouple": True, "amsgrad": True}
    floats_per_parameter = 4


# -- parity ------------------------------------------------------------------------------------------------------------

OPTIONS = [{}, {"weight_decay": 0.3}, {"weight_decay": 0.3, "weight_decouple": True}, {"amsgrad": True}, {"maximize": True},
           {"betas": (0.0, 0.9)}, {"betas": (0.5, 0.99), "amsgrad": True, "weight_decay": 0.1}]


def pytorch_optimizer(params, amsgrad=False, weight_decouple=False, **options):
    return pytest.importorskip("pytorch_optimizer").DiffGrad(
        params, ams_bound=amsgrad, weight_decouple=weight_decouple, adam_debias=False, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parity_over_100_steps(options):
    """eps = 1e-30 on both sides: the peer puts eps beside the uncorrected root, and 1e-15 into v with its maximum."""
    ours, theirs = tensors(), tensors()
    opt, other = DiffGrad(ours, lr=0.01, eps=1e-30, **options), pytorch_optimizer(theirs, lr=0.01, eps=1e-30, **options)
    start = [p.detach().clone() for p in ours]
    for t in range(100):
        set_grads(ours, t)
        set_grads(theirs, t)  # its own copy: the peer writes decay and sign into the gradient
        opt.step()
        other.step()
    for p, q, p0 in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)
        assert p.numel() == 0 or (p - p0).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3}, {"eps": 1e-2}, {"aliased": True}, {"betas": (0.5, 0.9)}], ids=str)
def test_transcription_over_60_steps(options):
    params = [p for p in tensors() if p.numel()]
    x = [p.detach().numpy().copy() for p in params]
    m, v, previous = ([np.zeros_like(a) for a in x] for _ in range(3))
    opt = DiffGrad(params, lr=0.02, **options)
    (b1, b2), eps, decay = options.get("betas", (0.9, 0.999)), options.get("eps", 1e-8), options.get("weight_decay", 0.0)
    for t in range(1, 61):
        set_grads(params, t)
        for i, p in enumerate(params):
            g = p.grad.numpy() + decay * x[i]
            change = 0.0 if options.get("aliased") and t > 1 else np.abs(previous[i] - g)
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g**2
            xi = 1 / (1 + np.exp(-change))
            x[i] = x[i] - 0.02 * xi * (m[i] / (1 - b1**t)) / (np.sqrt(v[i] / (1 - b2**t)) + eps)
            previous[i] = g
        opt.step()
    for a, b, g in zip(params, x, previous, strict=True):
        np.testing.assert_allclose(a.detach().numpy(), b, rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(opt.state[a]["previous"].numpy(), g, rtol=1e-10, atol=1e-11)  # with the decay in it


# -- closed forms and limits ---------------------------------------------------------------------------------------------

def path(gradients, method=DiffGrad, **options):
    """Steps (previous minus next parameter) on a given sequence of gradients, in float64."""
    gradients = torch.as_tensor(gradients, dtype=torch.float64)
    x = torch.zeros(gradients.shape[1:], dtype=torch.float64, requires_grad=True)
    opt, steps = method([x], **{"lr": 1.0, "eps": 0.0, **options}), []
    for g in gradients:
        before, x.grad = x.detach().clone(), g.clone()
        opt.step()
        steps.append(before - x.detach())
    return torch.stack(steps).numpy()


@pytest.mark.parametrize("c", [3.0, -0.2])
def test_constant_gradient(c):
    steps = path(np.full((30, 1), c))[:, 0]
    assert steps[0] == pytest.approx(np.sign(c) / (1 + np.exp(-abs(c))), rel=1e-12)
    np.testing.assert_allclose(steps[1:], np.sign(c) / 2, rtol=1e-12)


@pytest.mark.parametrize(("scale", "share", "tolerance"), [(1e-13, 0.5, 1e-12), (1e9, 1.0, 1e-12)])
def test_limits_are_adam(scale, share, tolerance):
    """Differences of 1e-13 leave xi = 1/2 + 1e-13 / 4; those of 1e9 leave 1 (a smallest difference of 1e5 among 200)."""
    g = scale * np.random.default_rng(0).normal(size=(50, 4))
    np.testing.assert_allclose(path(g), share * path(g, torch.optim.Adam), rtol=1e-11, atol=tolerance)


def test_step_lies_between_half_of_adams_and_adams():
    g = np.random.default_rng(1).normal(size=(60, 100)) * np.logspace(-4, 2, 100)
    share = path(g) / path(g, torch.optim.Adam)
    assert share.min() >= 0.5 - 1e-12 and share.max() <= 1 + 1e-12
    before = np.concatenate([np.zeros((1, 100)), g[:-1]])
    np.testing.assert_allclose(share, friction(torch.from_numpy(g), torch.from_numpy(before)), rtol=1e-9)


def test_aliased_is_adam_at_half_rate_after_its_first_step():
    g = np.random.default_rng(2).normal(size=(50, 4))
    ours, adam = path(g, aliased=True), path(g, torch.optim.Adam)
    np.testing.assert_allclose(ours[1:], adam[1:] / 2, rtol=1e-10)
    np.testing.assert_allclose(ours[0], adam[0] / (1 + np.exp(-np.abs(g[0]))), rtol=1e-10)


def test_gradient_is_cloned():
    """In-place refilling of the gradient must not reach the stored one."""
    x = torch.zeros(3, requires_grad=True)
    opt = DiffGrad([x])
    x.grad = torch.ones(3)
    opt.step()
    x.grad.zero_()
    assert torch.equal(opt.state[x]["previous"], torch.ones(3))


def test_sign_of_the_change_is_irrelevant():
    a, b = torch.tensor([1.0, -3.0]), torch.tensor([0.5, 2.0])
    assert torch.equal(friction(a, b), friction(b, a)) and torch.equal(friction(a, a), torch.full((2,), 0.5))
