"""Coordinate-wise clipping against torch's SGD and AdamW, a NumPy transcription, closed forms, finite differences, and the drop-in checks."""
import math

import numpy as np
import pytest
import torch

from lib.optimizers.coordinate_clipping import AdamClip, Local, SGDClip, along, clip, direction_of, threshold
from tests.optimizers.conformance import Conformance, same, set_grads, snapshot, tensors

MODULE = "lib/optimizers/coordinate_clipping.py"
BREAKS = [
    ("small entries are raised to the threshold", MODULE, "torch._foreach_clamp_max(directions, c)", "torch._foreach_clamp_min(directions, c)"),
    ("the quantile from the wrong end", MODULE, "place = (1.0 - fraction) * (u.numel() - 1)", "place = fraction * (u.numel() - 1)"),
    ("no interpolation", MODULE, "below + (place - low) * (", "below + 0 * ("),
    ("a threshold for each batch", MODULE, "clip(us, c[float(group[\"fraction\"]), group[\"skip_zeros\"]])",
     "clip(us, threshold(us, float(group[\"fraction\"]), group[\"skip_zeros\"]))"),
    ("sharpness of a direction that is not of length one", MODULE, "return self.curvature / self.squared", "return self.curvature"),
    ("the parabola without its half", MODULE, "self.slope**2 / (2 * self.curvature)", "self.slope**2 / self.curvature"),
]

BAD = [("fraction", -0.1), ("fraction", 1.1), ("fraction", math.nan), ("fraction", "few"), ("skip_zeros", 1), ("normalise", "yes")]
SGD_BAD = [(n, v) for n, v in Conformance.bad_options if n not in ("betas", "eps")] + BAD + [("momentum", 1.0), ("momentum", math.nan)]


class TestConformanceSGD(Conformance):
    """Without a cut, tensors do not know of each other: all checks as they are."""

    optimizer = SGDClip
    options = {"lr": 0.02, "fraction": 0.0, "momentum": 0.9}
    floats_per_parameter = 1
    bad_options = SGD_BAD


class TestConformanceAdam(Conformance):
    optimizer = AdamClip
    options = {"lr": 0.05, "fraction": 0.0, "weight_decay": 0.1}
    floats_per_parameter = 2
    bad_options = Conformance.bad_options + BAD


class Company:
    """With a cut, what a tensor does depends on all others: two checks are about the company instead."""

    def test_groups_keep_their_own_options(self):
        a, b = tensors(shapes=((3,), (4,))), tensors(shapes=((3,), (4,)))
        opt, whole = self.make([{"params": [a[0]]}, {"params": [a[1]], "lr": 0.0}]), self.make(b)
        before = a[1].detach().clone()
        for t in range(3):
            set_grads(a, t + 9)
            set_grads(b, t + 9)
            opt.step()
            whole.step()
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], before)

    def test_each_parameter_counts_its_own_steps(self):
        early, late = tensors(shapes=((30,), (4,)))
        opt = self.make([early, late])
        for t in range(4):
            set_grads([early, late] if t == 3 else [early], t + 9)
            opt.step()
        assert opt.state[early]["step"] == 4 and opt.state[late]["step"] == 1


class TestConformanceClipped(Company, Conformance):
    optimizer = SGDClip
    options = {"lr": 0.05, "fraction": 0.3, "weight_decay": 0.1}
    floats_per_parameter = 0
    bad_options = SGD_BAD


class TestConformanceClippedNormalised(Company, Conformance):
    optimizer = SGDClip
    options = {"lr": 0.15, "fraction": 0.3, "momentum": 0.5, "normalise": True, "skip_zeros": True}
    floats_per_parameter = 1
    bad_options = SGD_BAD


class TestConformanceClippedAdam(Company, Conformance):
    optimizer = AdamClip
    options = {"lr": 0.05, "fraction": 0.3}
    floats_per_parameter = 2
    bad_options = Conformance.bad_options + BAD


# -- the cut -----------------------------------------------------------------------------------------------------------

SHAPES = ((6, 40), (4, 3, 5, 5), (7,), (), (0, 2), (8, 8))


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_threshold_is_numpys_quantile(fraction):
    us = tensors(shapes=SHAPES)
    flat = np.concatenate([u.detach().numpy().ravel() for u in us])
    assert threshold(us, fraction) == pytest.approx(np.quantile(np.abs(flat), 1 - fraction), rel=1e-13)  # one linear interpolation
    with torch.no_grad():
        us[0][:3] = 0.0
    nonzero = np.abs(flat)[120:]
    assert threshold(us, fraction, skip_zeros=True) == pytest.approx(np.quantile(nonzero, 1 - fraction), rel=1e-13)


def test_threshold_of_nothing():
    assert threshold([], 0.5) == threshold([torch.ones(0)], 0.5) == threshold([torch.ones(3)], 0.0) == math.inf
    assert threshold([torch.zeros(3)], 0.5, skip_zeros=True) == math.inf
    assert threshold([torch.tensor([0.0, 0.0, 0.0, 5.0])], 0.5) == 0.0  # zeros count: the trap that skip_zeros is for
    for bad in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="fraction"):
            threshold([torch.ones(3)], bad)


def test_cut_keeps_signs_and_small_entries():
    u = torch.tensor([-3.0, -0.5, 0.0, 0.5, 2.0])
    assert clip([u], 1.0)[0].tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert clip([u], math.inf)[0] is u
    nan = clip([torch.tensor([math.nan, math.inf])], 1.0)[0]
    assert nan[0].isnan() and nan[1] == 1.0  # NaN stays visible; an infinite entry is cut like any other


@pytest.mark.parametrize("n, fraction", [(1000, 0.1), (1001, 0.037), (50, 0.5)])
def test_number_of_coordinates_cut(n, fraction):
    u = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    cut = int((clip([u], threshold([u], fraction))[0] != u).sum())
    assert abs(cut - fraction * (n - 1)) < 1  # the threshold lies between two entries


# -- transcription -------------------------------------------------------------------------------------------------------

def transcription(w, grads, method, o):
    """One step after the other, entries of the whole model in one vector; what the module does not do."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        if method is AdamClip:
            b1, b2 = o["betas"]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            u = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + o["eps"])
        else:
            u = m = o["momentum"] * m + g
        size = np.abs(u)
        if o["fraction"]:
            c = np.quantile(size[size > 0] if o["skip_zeros"] else size, 1 - o["fraction"])
            u = np.sign(u) * np.minimum(size, c)
        if o["normalise"]:
            u = u / np.sqrt((u**2).sum())
        w = w - o["lr"] * o["weight_decay"] * w - o["lr"] * u
    return w


@pytest.mark.parametrize("cut", [{"fraction": 0.0}, {"fraction": 0.1}, {"fraction": 0.5, "normalise": True}, {"fraction": 1.0},
                                 {"fraction": 0.8, "skip_zeros": True}, {"fraction": 0.3, "weight_decay": 0.2}], ids=str)
@pytest.mark.parametrize("method, options", [(SGDClip, {"momentum": 0.0}), (SGDClip, {"momentum": 0.7}), (AdamClip, {"betas": (0.8, 0.95), "eps": 1e-3})],
                         ids=["SGD", "momentum", "Adam"])
def test_transcription_over_60_steps(method, options, cut):
    params, o = tensors(shapes=SHAPES), {"lr": 0.02, "weight_decay": 0.0, "skip_zeros": False, "normalise": False, **options, **cut}
    half = len(params) // 2
    opt = method([{"params": params[:half]}, {"params": params[half:]}], **o)  # two groups, one threshold
    w, grads = np.concatenate([p.detach().numpy().ravel() for p in params]), []
    for t in range(60):
        set_grads(params, t + 70)
        for p in params:
            p.grad[p.grad.abs() < 0.3] = 0.0
        grads.append(np.concatenate([p.grad.numpy().ravel() for p in params]))
        opt.step()
    got = np.concatenate([p.detach().numpy().ravel() for p in params])
    np.testing.assert_allclose(got, transcription(w, grads, method, o), rtol=1e-10, atol=1e-11)  # float64 in another order
    if o["fraction"] < 1.0:  # with all cut, one small entry is enough to stop the rest
        assert np.abs(got - w).max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_a_cut_it_is_sgd_bit_for_bit(momentum, dtype):
    x, y = tensors(dtype), tensors(dtype)
    opt, other = SGDClip(x, lr=0.03, momentum=momentum, fraction=0.0), torch.optim.SGD(y, lr=0.03, momentum=momentum, foreach=True)  # the loop rounds bfloat16 elsewhere
    for t in range(60):
        set_grads(x, t)
        set_grads(y, t)
        opt.step()
        other.step()
    assert same(x, y)


def test_without_a_cut_it_is_adamw():
    x, y, options = tensors(shapes=SHAPES), tensors(shapes=SHAPES), {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-4, "weight_decay": 0.1}
    opt, other = AdamClip(x, fraction=0.0, **options), torch.optim.AdamW(y, **options)
    for t in range(60):
        set_grads(x, t)
        set_grads(y, t)
        opt.step()
        other.step()
    for p, q in zip(x, y, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)  # float64, divisions in another order


def test_everything_cut_is_the_sign_times_the_smallest_entry():
    params = tensors()
    opt, before = SGDClip(params, lr=0.5, fraction=1.0), [p.detach().clone() for p in params]
    set_grads(params, 1)
    c = min(p.grad.abs().min().item() for p in params if p.numel())
    opt.step()
    for p, p0 in zip(params, before, strict=True):
        assert torch.equal(p, p0 - 0.5 * (c * p.grad.sign()))


def test_everything_cut_and_normalised_is_signsgd():
    params = tensors(shapes=((50,), (5, 10)))
    opt, before = SGDClip(params, lr=0.5, fraction=1.0, normalise=True), [p.detach().clone() for p in params]
    set_grads(params, 1)
    opt.step()
    for p, p0 in zip(params, before, strict=True):
        torch.testing.assert_close(p, p0 - 0.05 * p.grad.sign(), rtol=1e-12, atol=1e-13)  # lr / sqrt(100)


@pytest.mark.parametrize("options", [{"normalise": True}, {"normalise": True, "skip_zeros": True}, {}])
def test_gradients_of_zero_leave_everything_where_it_is(options):
    params = tensors()
    opt, before = SGDClip(params, lr=0.5, fraction=0.5, **options), [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert same(before, [p.detach() for p in params])


def test_zeros_that_count_can_stop_everything():
    for skip, moves in ((False, False), (True, True)):
        x = torch.zeros(10, requires_grad=True)
        x.grad = torch.tensor([0.0] * 7 + [1.0, 2.0, 3.0])
        SGDClip([x], lr=1.0, fraction=0.5, skip_zeros=skip).step()
        assert bool(x.any()) is moves


# -- the local model -----------------------------------------------------------------------------------------------------

def bumpy(x, y):
    return (x.sin().sum() * y.square().sum() + (x[:2] * y[0, :2]).sum().exp()) / 3


def test_local_model_against_finite_differences():
    params = tensors(shapes=((4,), (2, 3)))
    v = tensors(seed=5, shapes=((4,), (2, 3)))
    local, h = along(bumpy(*params), params, [v])[0], 1e-4

    def f(eta):
        return bumpy(*(p.detach() + eta * d.detach() for p, d in zip(params, v, strict=True))).item()

    # central differences: errors of h^2 times third derivatives of order 10, and 1e-15 / h^2 of rounding
    assert local.slope == pytest.approx((f(h) - f(-h)) / (2 * h), rel=1e-5)
    assert local.curvature == pytest.approx((f(h) - 2 * f(0.0) + f(-h)) / h**2, rel=1e-5, abs=1e-5)
    assert local.sharpness == pytest.approx(local.curvature / sum(d.square().sum().item() for d in v), rel=1e-12)


@pytest.mark.parametrize("scale", [-2.0, 1e-3, 1e4])
def test_sharpness_and_decrease_do_not_change_with_the_length(scale):
    params, v = tensors(shapes=((4,), (2, 3))), tensors(seed=5, shapes=((4,), (2, 3)))
    a, b = along(bumpy(*params), params, [v, [scale * d for d in v]])
    assert b.sharpness == pytest.approx(a.sharpness, rel=1e-12)
    assert b.best_decrease == pytest.approx(a.best_decrease, rel=1e-12)
    assert b.slope == pytest.approx(scale * a.slope, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_diagonal_quadratic(seed):
    rng = np.random.default_rng(seed)
    h, w = rng.uniform(0.1, 10, 30), rng.normal(size=30)
    x = torch.from_numpy(w).requires_grad_()
    loss = 0.5 * (torch.from_numpy(h) * x.square()).sum()
    g = h * w
    steps = [torch.from_numpy(-g), torch.from_numpy(-np.sign(g)), torch.from_numpy(-w)]
    gradient, sign, newton = along(loss, [x], [[s] for s in steps])
    assert gradient.sharpness == pytest.approx((h * g**2).sum() / (g**2).sum(), rel=1e-12)
    assert sign.sharpness == pytest.approx(h.mean(), rel=1e-12)
    assert gradient.best_decrease == pytest.approx((g**2).sum() ** 2 / (2 * (h * g**2).sum()), rel=1e-12)
    assert sign.best_decrease == pytest.approx(np.abs(g).sum() ** 2 / (2 * h.sum()), rel=1e-12)
    assert newton.best_rate == pytest.approx(1.0, rel=1e-12) and newton.best_decrease == pytest.approx(loss.item(), rel=1e-12)
    moved = torch.from_numpy(w - gradient.best_rate * g)
    assert loss.item() - (0.5 * torch.from_numpy(h) * moved.square()).sum().item() == pytest.approx(gradient.best_decrease, rel=1e-10)


def test_a_step_that_is_only_asked_for():
    params, extra = tensors(), torch.full((2,), 1e6, requires_grad=True)
    opt = AdamClip([{"params": params}, {"params": [extra], "lr": 0.0}], lr=0.3, fraction=0.0)
    for t in range(3):
        set_grads([*params, extra], t)
        opt.step()
    set_grads([*params, extra], 9)
    before, v = snapshot(opt), direction_of(opt)
    assert same(before, snapshot(opt))
    opt.step()
    for p, p0, step in zip(params, before[0], v, strict=False):
        torch.testing.assert_close(p, p0 + 0.3 * step, rtol=1e-12, atol=1e-13)
    assert (v[-1].abs() > 1e-3).all()  # a rate of zero and a large parameter hide nothing
    x = torch.ones(3, requires_grad=True)
    x.grad = torch.tensor([1.0, -2.0, 1e-12])
    assert torch.equal(direction_of(torch.optim.SGD([x], lr=5.0))[0], -x.grad)


def test_no_parabola_no_bottom():
    bowl, ridge = Local(-2.0, 4.0, 1.0), Local(-2.0, -4.0, 1.0)
    assert (bowl.best_rate, bowl.best_decrease) == (0.5, 0.5)
    assert (ridge.sharpness, ridge.best_rate, ridge.best_decrease) == (-4.0, math.inf, math.inf)
    assert Local(2.0, 0.0, 1.0).best_rate == -math.inf
    x, unused = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    flat = along(3 * x.sum(), [x, unused], [[torch.ones(3), torch.ones(2)]])[0]  # linear: no second derivative to follow
    assert (flat.slope, flat.curvature, flat.squared) == (9.0, 0.0, 5.0)


def test_bad_input_of_the_local_model():
    x = torch.ones(3, requires_grad=True)
    for loss in (x.square(), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="loss"):
            along(loss, [x], [[torch.ones(3)]])
    for v in ([torch.ones(2)], [torch.ones(3), torch.ones(3)], [torch.zeros(3)], [torch.full((3,), math.nan)], [torch.full((3,), math.inf)]):
        with pytest.raises(ValueError, match=r"directions\[1\]"):
            along(x.square().sum(), [x], [[torch.ones(3)], v])
    assert x.grad is None


def test_fraction_spoilt_between_steps_changes_nothing():
    params, extra = tensors(), torch.ones(2, requires_grad=True)
    opt = AdamClip([{"params": params}, {"params": [extra]}])
    set_grads([*params, extra], 0)
    opt.step()
    before = snapshot(opt)
    opt.param_groups[1]["fraction"] = 2.0
    with pytest.raises(ValueError, match="fraction"):
        opt.step()
    opt.param_groups[1]["fraction"] = 0.1
    assert same(before, snapshot(opt))
