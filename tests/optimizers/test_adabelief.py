"""AdaBelief against the authors' package, pytorch_optimizer, closed forms, and the drop-in checks."""
import contextlib
import io
import math

import numpy as np
import pytest
import torch

from lib.optimizers.adabelief import AdaBelief, rectification
from tests.optimizers.conformance import Conformance, same, set_grads, snapshot, tensors

MODULE = "lib/optimizers/adabelief.py"
BREAKS = [
    ("centred at the old average", MODULE,
     "        average_(m, grads, beta1)  # m_t\n        surprise = torch._foreach_sub(grads, m)",
     "        surprise = torch._foreach_sub(grads, m)\n        average_(m, grads, beta1)  # m_t"),
    ("update has the wrong sign", MODULE, "addcdiv_(params, m, scale, -step_size)", "addcdiv_(params, m, scale, step_size)"),
    ("eps does not stay in the state", MODULE, "torch._foreach_add_(s, eps)  #", "s = torch._foreach_add(s, eps)  #"),
    ("eps outside the root forgotten", MODULE, "if math.sqrt(eps) >= torch.finfo(params[0].dtype).eps / 8:", "if False:"),
    ("no bias correction of m", MODULE, "lr / bias_correction(beta1, batch.step)", "lr"),
    ("root of the correction forgotten", MODULE, "math.sqrt(bias_correction(beta2, batch.step))",
     "bias_correction(beta2, batch.step)"),
    ("decay is coupled", MODULE, 'if group["weight_decouple"]:', 'if not group["weight_decouple"]:'),
    ("maximum forgotten", MODULE, 's = batch.state["s_max"]', "pass"),
    ("rectified too early", MODULE, "if rho < 5.0:", "if rho < 4.1:"),
    ("eps may vanish", MODULE, 'float(group["eps"]) <', 'float(group["eps"]) < 0 *'),
    ("groups are not checked", "lib/optimizers/base.py", "        self._check_options(group)\n        self.check({",
     "        self.check({"),
    ("options are not checked before a step", "lib/optimizers/base.py",
     "            self._check_options(group)\n            self.check(group)\n", ""),
    ("maximize ignored", "lib/optimizers/base.py", "torch._foreach_neg(grads[run])", "grads[run]"),
    ("decay has the wrong sign", "lib/optimizers/base.py", "1.0 - lr * weight_decay)", "1.0 + lr * weight_decay)"),
]


class TestConformance(Conformance):
    optimizer = AdaBelief
    floats_per_parameter = 2
    bad_options = [*Conformance.bad_options, ("eps", 0.0), ("amsgrad", 1), ("rectify", None), ("weight_decouple", "no")]


class TestConformanceOfTheOptions(Conformance):
    optimizer = AdaBelief
    options = {"lr": 0.05, "amsgrad": True, "rectify": True, "weight_decay": 0.1, "weight_decouple": False, "betas": (0.8, 0.9)}
    floats_per_parameter = 3


# -- parity ------------------------------------------------------------------------------------------------------------

def authors(params, amsgrad=False, rectify=False, **options):
    package = pytest.importorskip("adabelief_pytorch")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a change log
        return package.AdaBelief(params, amsgrad=amsgrad, rectify=rectify, print_change_log=False, **options)


def pytorch_optimizer(params, amsgrad=False, **options):
    return pytest.importorskip("pytorch_optimizer").AdaBelief(params, ams_bound=amsgrad, **options)


OPTIONS = [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "weight_decouple": False}, {"amsgrad": True},
           {"rectify": True}, {"rectify": True, "amsgrad": True}, {"rectify": True, "betas": (0.8, 0.9)}, {"eps": 1e-3},
           {"eps": 1e-8, "betas": (0.0, 0.9)}, {"betas": (0.5, 0.99), "amsgrad": True, "weight_decay": 0.01}]


# Where the authors' package rectifies, it ignores the maximum of `amsgrad`: that pair of options has one peer.
PAIRS = [(peer, o) for o in OPTIONS for peer in (authors, pytorch_optimizer)
         if not (peer is authors and o.get("amsgrad") and o.get("rectify"))]


@pytest.mark.parametrize(("peer", "options"), PAIRS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_parity_over_100_steps(peer, options):
    ours, theirs = tensors(), tensors()
    opt, other = AdaBelief(ours, lr=0.01, **options), peer(theirs, lr=0.01, **options)
    start = [p.detach().clone() for p in ours]
    for t in range(100):
        set_grads(ours, t)
        set_grads(theirs, t)  # its own copy: both peers write coupled decay into the gradient
        opt.step()
        other.step()
    for p, q, p0 in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)  # the same float64 formulas in another order
        assert p.numel() == 0 or (p - p0).abs().max() > 1e-3


def test_parity_in_float32():
    ours, theirs = tensors(torch.float32), tensors(torch.float32)
    opt, other = AdaBelief(ours, lr=0.01), pytorch_optimizer(theirs, lr=0.01)
    for t in range(100):
        set_grads(ours, t)
        set_grads(theirs, t)
        opt.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)  # values of order 1: a dozen float32 roundings of 1e-7


# -- closed forms and limits ---------------------------------------------------------------------------------------------

def path(gradients, **options):
    """Steps (previous minus next parameter) on a given sequence of gradients, in float64."""
    gradients = torch.as_tensor(gradients, dtype=torch.float64)
    x = torch.zeros(gradients.shape[1:], dtype=torch.float64, requires_grad=True)
    opt = AdaBelief([x], **{"lr": 1.0, "eps": 1e-60, **options})  # 1e-60 is negligible in float64, and never zero
    steps = []
    for g in gradients:
        before = x.detach().clone()
        x.grad = g.clone()
        opt.step()
        steps.append(before - x.detach())
    return torch.stack(steps).numpy()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.9), (0.5, 0.99)])
def test_constant_gradient(betas):
    b1, b2 = betas
    t = np.arange(1, 201)
    s_hat = 9.0 * (1 - b2) * b1**2 * (b2**t - b1**(2.0 * t)) / ((b2 - b1**2) * (1 - b2**t))
    # g - m cancels down to b1^t: at t = 200 with b1 = 0.5 it is far below a rounding of g, so stop at a surprise of 1e-6
    keep = b1**t > 1e-6
    np.testing.assert_allclose(path(np.full(200, 3.0), betas=betas)[keep], (3.0 / np.sqrt(s_hat))[keep], rtol=1e-6)


def test_first_step_is_one_over_beta1():
    np.testing.assert_allclose(path([[-7.0, 0.01]])[0], [-1 / 0.9, 1 / 0.9], rtol=1e-12)


def test_ceiling_of_a_constant_gradient():
    """A surprise of zero leaves s = eps / (1 - beta2): 800 steps at beta2 = 0.9 are 80 time constants."""
    eps, c = 1e-4, 2.0
    last = path(np.full(800, c), betas=(0.9, 0.9), eps=eps)[-1]
    assert last == pytest.approx(c / (math.sqrt(eps / 0.1) + eps), rel=1e-9)


def test_eps_gathers_in_the_state():
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    opt = AdaBelief([x], eps=1e-3)
    for _ in range(50):
        x.grad = torch.zeros(1, dtype=torch.float64)
        opt.step()
    assert opt.state[x]["s"].item() == pytest.approx(1e-3 * (1 - 0.999**50) / 0.001, rel=1e-12)
    assert x.item() == 0.0


def test_beta1_zero_is_plain_sgd():
    g = np.random.default_rng(0).normal(size=(30, 4))
    eps = 1e-4
    np.testing.assert_allclose(path(g, betas=(0.0, 0.9), eps=eps), g / (math.sqrt(eps / 0.1) + eps), rtol=1e-12)


def test_scale_invariance():
    g = np.random.default_rng(1).normal(size=(30, 4))
    np.testing.assert_allclose(path(1e3 * g), path(g), rtol=1e-10)


def test_centring_at_the_old_average_would_scale_the_step_by_beta1():
    g = np.random.default_rng(2).normal(size=(40, 3))
    m, s, old = np.zeros(3), np.zeros(3), []
    for t, row in enumerate(g, 1):
        s = 0.999 * s + 0.001 * (row - m) ** 2
        m = 0.9 * m + 0.1 * row
        old.append(m / (1 - 0.9**t) / np.sqrt(s / (1 - 0.999**t)))
    np.testing.assert_allclose(np.array(old), 0.9 * path(g), rtol=1e-10)


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 1e-16), (torch.bfloat16, 1e-7)])
def test_the_eps_that_is_left_out_would_round_away(dtype, eps):
    """Where the module skips the sum sqrt(s) + eps, the sum is sqrt(s), for the smallest s there can be and all above."""
    s = torch.cat([torch.tensor([eps], dtype=dtype), torch.logspace(math.log10(eps), 0, 2000, dtype=torch.float64).to(dtype)])
    assert math.sqrt(eps) < torch.finfo(dtype).eps / 8
    assert torch.equal(s.sqrt() + eps, s.sqrt())


def test_amsgrad_keeps_the_largest_scale():
    g = np.concatenate([np.full(5, 10.0), np.full(200, 0.1) * (-1) ** np.arange(200)])
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    opt = AdaBelief([x], betas=(0.9, 0.5), amsgrad=True)
    largest = 0.0
    for value in g:
        x.grad = torch.tensor([value], dtype=torch.float64)
        opt.step()
        largest = max(largest, opt.state[x]["s"].item())
        assert opt.state[x]["s_max"].item() == largest


def test_rectification():
    assert rectification(0.999, 5) is None  # rho_5 is just below 5
    assert 0.0 < rectification(0.999, 6) < 0.05
    assert rectification(0.999, 20_000) == pytest.approx(1.0, abs=1e-3)
    assert rectification(0.5, 100) is None  # rho never exceeds 3


# -- bad input -----------------------------------------------------------------------------------------------------------

def test_eps_that_vanishes_in_the_dtype():
    half = torch.ones(2, dtype=torch.float16, requires_grad=True)
    with pytest.raises(ValueError, match="eps must not round to 0"):
        AdaBelief([half])
    opt = AdaBelief(tensors())
    before = snapshot(opt)
    with pytest.raises(ValueError, match="eps must not round to 0"):
        opt.add_param_group({"params": [half]})
    assert same(before, snapshot(opt))
    AdaBelief([half], eps=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gradients_never_make_nan(dtype):
    x = torch.ones(3, dtype=dtype, requires_grad=True)
    opt = AdaBelief([x])
    for _ in range(20):
        x.grad = torch.zeros(3, dtype=dtype)
        opt.step()
    assert torch.equal(x, torch.ones(3, dtype=dtype))
