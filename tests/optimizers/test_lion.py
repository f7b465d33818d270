"""Lion against pytorch_optimizer and a transcription; Lion-K against closed forms of what it minimizes; its flow; the drop-in checks."""
import math

import numpy as np
import pytest
import torch

from lib.optimizers.lion import KAPPAS, Lion, flow, lyapunov
from tests.optimizers.conformance import Conformance, set_grads, tensors

MODULE = "lib/optimizers/lion.py"
BREAKS = [
    ("decay has the wrong sign", MODULE, "decay_(params, lr, decay)", "decay_(params, lr, -decay)"),
    ("average moves before the step", MODULE,
     "        step = torch._foreach_lerp(m, grads, 1.0 - beta1)", "        average_(m, grads, beta2)\n        step = torch._foreach_lerp(m, grads, 1.0 - beta1)"),
    ("betas exchanged", MODULE, "(beta1, beta2) = group", "(beta2, beta1) = group"),
    ("implicit decay multiplies", MODULE, "torch._foreach_div_(params, 1.0 + lr * decay)", "torch._foreach_mul_(params, 1.0 - lr * decay)"),
    ("momentum of the wrong sign in H", MODULE, "K.value(m) + weight_decay * (m * x).sum()", "K.value(m) - weight_decay * (m * x).sum()"),
    ("group divides by 0", MODULE, "torch.where(norm > 0, norm, 1.0)", "norm"),
    ("truncation forgotten", MODULE, "x.abs() > RADIUS, x.sign(), 0.0", "x.abs() > 0, x.sign(), 0.0"),
]
F64 = torch.float64


class TestConformance(Conformance):
    optimizer = Lion
    floats_per_parameter = 1
    bad_options = [*[o for o in Conformance.bad_options if o[0] != "eps"], ("kappa", "l2"), ("kappa", None), ("implicit", 1)]


class TestConformanceOfTheOptions(TestConformance):
    options = {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1, "implicit": True}


@pytest.mark.parametrize("kappa", ["square", "group", "huber"])
class TestConformanceOfTheKappas(TestConformance):
    @pytest.fixture(autouse=True)
    def choose(self, kappa):
        self.options = {"lr": 0.1, "kappa": kappa, "weight_decay": 0.1, "betas": (0.5, 0.8)}


# -- parity ------------------------------------------------------------------------------------------------------------

OPTIONS = [{}, {"weight_decay": 0.5}, {"betas": (0.0, 0.9)}, {"betas": (0.95, 0.98), "weight_decay": 1.0}, {"maximize": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_parity_over_100_steps(options):
    peer = pytest.importorskip("pytorch_optimizer").Lion
    ours, theirs = tensors(), tensors()
    start = [p.detach().clone() for p in ours]
    opt, other = Lion(ours, lr=0.01, **options), peer(theirs, lr=0.01, **options)
    for t in range(100):
        set_grads(ours, t)
        set_grads(theirs, t)  # its own copy: the peer negates the gradient in place
        opt.step()
        other.step()
    for p, q, p0 in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)  # the same float64 formulas
        assert p.numel() == 0 or (p - p0).abs().max() > 1e-3


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("kappa", KAPPAS)
def test_transcription_over_60_steps(kappa, implicit):
    def gradient(c):
        return {"l1": np.sign(c), "square": c, "group": c / (np.linalg.norm(c) or 1.0), "huber": np.clip(c, -1, 1),
                "truncated": np.sign(c) * (np.abs(c) > 1)}[kappa]
    params = [p for p in tensors() if p.numel()]
    x, m = [p.detach().numpy().copy() for p in params], [0.0 for _ in params]
    opt = Lion(params, lr=0.02, betas=(0.6, 0.8), weight_decay=0.4, kappa=kappa, implicit=implicit)
    for t in range(60):
        set_grads(params, t)
        for p in params:
            p.grad *= 3.0  # so that all branches of huber and truncated are taken
        for i, p in enumerate(params):
            g = p.grad.numpy()
            step = 0.02 * gradient(0.6 * m[i] + 0.4 * g)
            x[i] = (x[i] - step) / (1 + 0.008) if implicit else (1 - 0.008) * x[i] - step
            m[i] = 0.8 * m[i] + 0.2 * g
        opt.step()
    for a, b in zip(params, x, strict=True):
        np.testing.assert_allclose(a.detach().numpy(), b, rtol=1e-11, atol=1e-12)


# -- limits ------------------------------------------------------------------------------------------------------------

def test_without_momentum_it_is_sign_descent():
    a, b = tensors(), tensors()
    opt = Lion(a, lr=0.01, betas=(0.0, 0.99))
    for t in range(50):
        set_grads(a, t)
        set_grads(b, t)
        opt.step()
        for p in b:
            p.data -= 0.01 * p.grad.sign()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_square_with_equal_betas_and_shift_is_momentum_sgd():
    """K = |.|^2/2, beta_1 = beta_2 = b: the step is the new average, torch's momentum with dampening b."""
    a, b = tensors(), tensors()
    opt = Lion(a, lr=0.1, betas=(0.9, 0.9), kappa="square")
    sgd = torch.optim.SGD(b, lr=0.1, momentum=0.9, dampening=0.9)
    for p in b:
        sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    for t in range(50):
        for params, o in ((a, opt), (b, sgd)):
            set_grads(params, t)
            o.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_implicit_is_explicit_with_a_shorter_step(kappa):
    a, b = tensors(), tensors()
    one = Lion(a, lr=0.1, weight_decay=2.0, kappa=kappa, implicit=True)
    other = Lion(b, lr=0.1 / 1.2, weight_decay=2.0, kappa=kappa)
    for t in range(50):
        for params, o in ((a, one), (b, other)):
            set_grads(params, t)
            o.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_an_euler_step_of_the_flow_is_a_step_of_the_optimizer(kappa):
    """gamma dt = 1 - beta_2, epsilon gamma = 1 - beta_1, alpha = gamma."""
    start, dt, lam = torch.tensor([1.0, -2.0, 0.3], dtype=F64), 0.05, 0.7
    x = start.clone().requires_grad_()
    opt = Lion([x], lr=dt, betas=(0.9, 0.99), weight_decay=lam, kappa=kappa)
    y, m, gamma = start, torch.zeros(3, dtype=F64), 0.01 / dt
    for _ in range(50):
        x.grad = 30 * x.detach() - 10
        opt.step()
        y, m = flow(lambda z: 30 * z - 10, y, m, kappa, alpha=gamma, gamma=gamma, epsilon=0.1 / gamma, weight_decay=lam, dt=dt)
    torch.testing.assert_close(x.detach(), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(opt.state[x]["m"], m, rtol=1e-10, atol=1e-10)


# -- what it minimizes -------------------------------------------------------------------------------------------------

LAM = 0.7
g = torch.Generator().manual_seed(5)
C = 3 * torch.randn(40, generator=g, dtype=F64)
CURVE = 0.5 + 2 * torch.rand(40, generator=g, dtype=F64)


def box(v):
    return v.clamp(-1 / LAM, 1 / LAM)


WANT = {"l1": box(C), "square": CURVE * C / (CURVE + LAM), "huber": box(CURVE * C / (CURVE + LAM)),
        "truncated": box(C.sign() * (C.abs() - 1 / CURVE).clamp(min=0))}


@pytest.mark.parametrize("kappa", WANT)
def test_minimizes_loss_plus_conjugate(kappa):
    x = torch.zeros(40, dtype=F64, requires_grad=True)
    opt = Lion([x], lr=0.01, weight_decay=LAM, kappa=kappa)
    for t in range(4000):
        opt.param_groups[0]["lr"] = 0.01 * (1 - t / 4000)
        x.grad = CURVE * (x.detach() - C)
        opt.step()
    torch.testing.assert_close(x.detach(), WANT[kappa], rtol=0, atol=1e-3)  # far above the last rates, 1e-5


def test_group_projects_on_a_ball():
    x = torch.zeros(40, dtype=F64, requires_grad=True)
    opt = Lion([x], lr=0.02, weight_decay=LAM, kappa="group")
    for _ in range(3000):
        x.grad = x.detach() - C
        opt.step()
    torch.testing.assert_close(x.detach(), C / (LAM * C.norm()), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_conjugates_by_fenchel(kappa):
    """K(x) + K*(y) >= <x, y>, with equality at y = grad K(x)."""
    K, draw = KAPPAS[kappa], torch.Generator().manual_seed(0)
    for _ in range(50):
        x = 2 * torch.randn(4, generator=draw, dtype=F64)
        y = 2 * torch.randn(4, generator=draw, dtype=F64)
        assert K.value(x) + K.conjugate(y) >= (x * y).sum() - 1e-12
        slope = x.clone()
        K.gradient_([slope])
        assert (K.value(x) + K.conjugate(slope)).item() == pytest.approx((x * slope).sum().item(), abs=1e-12)
        z = x.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(K.value(z), z)[0], slope)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_lyapunov_function_falls_along_the_flow(kappa):
    options = {"alpha": 1.3, "gamma": 0.8, "epsilon": 0.5, "weight_decay": LAM}
    draw = torch.Generator().manual_seed(1)
    x, m = box(torch.randn(40, generator=draw, dtype=F64)) / 7, torch.randn(40, generator=draw, dtype=F64)
    H, dt = [], 1e-3
    for _ in range(5000):
        H.append(lyapunov((CURVE * (x - C) ** 2).sum() / 2, x, m, kappa, **options).item())
        x, m = flow(lambda z: CURVE * (z - C), x, m, kappa, dt=dt, **options)
    H = np.array(H)
    assert H[0] - H[-1] > 10 and np.diff(H).max() < 40 * 100 * dt**2  # 40 entries may each jump by O(dt) in a step of dt


def test_lyapunov_is_infinite_outside_the_box():
    x = torch.tensor([2.0], dtype=F64)
    options = {"alpha": 1.0, "gamma": 1.0, "epsilon": 0.5, "weight_decay": 1.0}
    assert lyapunov(0.0, x, x, "l1", **options) == math.inf and lyapunov(0.0, x, x, "square", **options) < math.inf


@pytest.mark.parametrize("lam", [0.5, 10.0])
def test_outside_the_box_the_distance_shrinks_and_inside_stays_zero(lam):
    draw, x = np.random.default_rng(0), torch.linspace(-5, 5, 101, dtype=F64, requires_grad=True)
    opt = Lion([x], lr=0.02, weight_decay=lam)
    for _ in range(200):
        before = (lam * x.detach()).abs()
        x.grad = torch.from_numpy(draw.normal(size=101))
        opt.step()
        assert ((lam * x.detach()).abs() <= (1 - 0.02 * lam) * before + 0.02 * lam + 1e-12).all()


@pytest.mark.parametrize("kappa", KAPPAS)
def test_zero_gradients_never_make_nan(kappa):
    x = torch.ones(3, requires_grad=True)
    opt = Lion([x], kappa=kappa)
    x.grad = torch.zeros(3)
    opt.step()
    assert torch.equal(x, torch.ones(3))
