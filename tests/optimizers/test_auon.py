"""AuON against loops in NumPy, torch's SGD and Muon, the bounds of its divisor, and the drop-in checks."""
import math

import numpy as np
import pytest
import torch

from lib.optimizers.auon import AuON, HybridAuON, Muon, brake, units
from lib.optimizers.base import state_bytes
from tests.optimizers.conformance import NAN, Conformance, same, set_grads, snapshot, tensors

MODULE = "lib/optimizers/auon.py"
BREAKS = [
    ("the repository's form divides the unit matrix", MODULE, 'mixed if group["form"] == "repository" else unit', "unit"),
    ("the mean of cosh instead of its root mean square", MODULE,
     "[torch.sqrt(1.0 + x.square().sum() / max(x.numel(), 1)) for x in excess]",
     "[torch.sqrt(1.0 + x.square()).mean() for x in excess]"),
    ("the norm is not taken out", MODULE, "return torch._foreach_div(wide, norms)", "return wide"),
    ("no Nesterov mix", MODULE, "torch._foreach_lerp(batch.grads, m, mu)", "m"),
    ("decay has the wrong sign", MODULE, 'decay_(params, group["lr"], group["weight_decay"])',
     'decay_(params, -group["lr"], group["weight_decay"])'),
    ("aspect upside down", MODULE, "max(1.0, m / n)", "max(1.0, n / m)"),
    ("the brake forgets gamma", MODULE, "torch._foreach_mul(unit, gamma)", "unit"),
]
OPTIONS = [("lr", -1e-3), ("lr", NAN), ("lr", float("inf")), ("lr", "fast"), ("momentum", 1.0), ("momentum", -0.1), ("momentum", NAN),
           ("weight_decay", -0.1), ("weight_decay", NAN), ("maximize", "yes"), ("aspect", 1)]
GAMMA = [("gamma", -1.0), ("gamma", NAN), ("gamma", "small")]
STEPS = [("ns_steps", -1), ("ns_steps", 5.0), ("ns_steps", True)]


class TestConformance(Conformance):
    optimizer = AuON
    floats_per_parameter = 1
    bad_options = [*OPTIONS, *GAMMA, ("form", "paper")]


class TestConformanceOfTheDraft(Conformance):
    optimizer = AuON
    options = {"lr": 0.05, "form": "draft", "gamma": 1.0, "aspect": True, "weight_decay": 0.1}
    floats_per_parameter = 1
    bad_options = [*OPTIONS, *GAMMA]


class TestConformanceOfTheHybrid(Conformance):
    optimizer = HybridAuON
    floats_per_parameter = 1
    bad_options = [*OPTIONS, *GAMMA, *STEPS]


class TestConformanceOfMuon(Conformance):
    optimizer = Muon
    floats_per_parameter = 1
    bad_options = [*OPTIONS, *STEPS]


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- oracles -----------------------------------------------------------------------------------------------------------

def naive(kind, w, gradients, lr, mu, decay, gamma, ns_steps):
    """The algorithm boxes with plain sums; w: [m, n] arrays, changed in place."""
    m = np.zeros_like(w)
    for g in gradients:
        w *= 1 - lr * decay
        m = mu * m + (1 - mu) * g
        X = mu * m + (1 - mu) * g
        if kind in ("hybrid", "muon"):
            X = X.T if X.shape[0] > X.shape[1] else X
            X = X / (math.sqrt((X * X).sum()) + 1e-7)
            for _ in range(ns_steps):
                A = X @ X.T
                X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ A @ X
            X = X.T if w.shape[0] > w.shape[1] else X
        if kind == "muon":
            w -= lr * math.sqrt(max(1, w.shape[0] / w.shape[1])) * X
            continue
        u = X / (math.sqrt((X * X).sum()) + 1e-7)
        R = math.sqrt(sum(math.cosh(gamma * x) ** 2 for x in u.ravel()) / u.size)
        w -= lr * (u if kind == "draft" else X) / (R + 1e-8)


KINDS = {"repository": lambda p, **o: AuON(p, **o), "draft": lambda p, **o: AuON(p, form="draft", **o),
         "hybrid": lambda p, **o: HybridAuON(p, ns_steps=5, **o), "one step": lambda p, **o: HybridAuON(p, ns_steps=1, **o),
         "muon": lambda p, gamma, **o: Muon(p, **o)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [1.5, 6.0])
def test_naive_transcription_over_60_steps(kind, gamma):
    """g^ is close to (1 - mu) g in the first step and noise later: the steps see large and small unit entries."""
    generator = np.random.default_rng(0)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02, "gamma": gamma}
    for shape in ((3, 5), (5, 3), (1, 2), (4, 4)):
        w, gradients = generator.normal(size=shape), generator.standard_t(2, size=(60, *shape))
        p = torch.tensor(w, requires_grad=True)
        opt = KINDS[kind]([p], **options)
        for g in gradients:
            p.grad = torch.tensor(g)
            opt.step()
        naive("hybrid" if kind == "one step" else kind, w, gradients, 0.1, 0.9, 0.02, gamma, 1 if kind == "one step" else 5)
        # Newton-Schulz with these coefficients is steep at zero (3.44^5 = 480): roundings of 1e-16 grow by that much
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-10, atol=1e-10)


def test_parity_with_torch_muon():
    """torch computes Newton-Schulz in bfloat16, we in the parameter's precision: its steps scatter by a few parts in 2^8."""
    ours, theirs = ([gaussian(*s, seed=i).float().requires_grad_() for i, s in enumerate(((6, 9), (9, 6), (5, 5)))] for _ in range(2))
    opt, other = Muon(ours, lr=0.02, weight_decay=0.1), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    start = [p.detach().clone() for p in ours]
    for t in range(50):
        set_grads(ours, t)
        set_grads(theirs, t)
        opt.step()
        other.step()
    for p, q, p0 in zip(ours, theirs, start, strict=True):
        moved = (p - p0).norm()
        assert moved > 0.3 and (p - q).norm() < 0.02 * moved


def test_parity_with_torch_muon_in_its_arithmetic(monkeypatch):
    """With no Newton-Schulz steps nothing but a cast to bfloat16 remains of the difference: decay, momentum and aspect agree."""
    ours, theirs = ([gaussian(*s, seed=i).float().requires_grad_() for i, s in enumerate(((6, 9), (9, 6)))] for _ in range(2))
    opt = Muon(ours, lr=0.02, weight_decay=0.1, ns_steps=0)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, ns_steps=0)
    for t in range(50):
        set_grads(ours, t)
        set_grads(theirs, t)
        opt.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=50 * 0.02 * 2.0 ** -8)


# -- what the divisor can do -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gamma", [0.5, 1.5, 5.0])
@pytest.mark.parametrize("shape", [(2, 2), (8, 3), (64, 64)])
def test_bounds_of_the_divisor(gamma, shape):
    N = math.prod(shape)
    low, high = math.sqrt(1 + gamma**2 / N), math.sqrt(1 + math.sinh(gamma) ** 2 / N)
    generator = torch.Generator().manual_seed(0)
    spike, equal = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
    spike[0, 0] = 3.0
    cases = [spike, equal, gaussian(*shape), gaussian(*shape) ** 5, torch.outer(gaussian(shape[0]), gaussian(shape[1])),
             torch.where(torch.rand(shape, generator=generator) < 0.1, 1.0, 1e-3).double()]
    Rs = [R.item() for R in brake(units(cases), gamma)]
    assert all(low - 1e-6 <= R <= high + 1e-12 for R in Rs)  # the 1e-7 beside the norm shrinks u a little
    assert Rs[0] == pytest.approx(high, rel=1e-6)
    if gamma / math.sqrt(N) < 0.2:  # sinh(x) is x for equal magnitudes that are small
        assert Rs[1] == pytest.approx(low, rel=1e-4)


def test_divisor_does_not_see_the_size_of_the_gradient():
    G = gaussian(6, 8)
    torch.testing.assert_close(brake(units([G]), 1.5)[0], brake(units([1e4 * G]), 1.5)[0], rtol=1e-7, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.95])
def test_without_gamma_the_repositorys_form_is_nesterov_sgd(momentum):
    ours, theirs = tensors(), tensors()
    opt = AuON(ours, lr=0.2, momentum=momentum, gamma=0.0)
    other = torch.optim.SGD(theirs, lr=0.2 * (1 - momentum), momentum=momentum, nesterov=momentum > 0)
    for t in range(100):
        set_grads(ours, t)
        set_grads(theirs, t)
        opt.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # the 1e-8 beside R = 1


def test_without_gamma_the_hybrid_is_muon():
    ours, theirs = tensors(), tensors()
    opt, other = HybridAuON(ours, lr=0.02, gamma=0.0), Muon(theirs, lr=0.02, aspect=False)
    for t in range(50):
        set_grads(ours, t)
        set_grads(theirs, t)
        opt.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_drafts_step_has_norm_below_one():
    for seed in range(5):
        p = torch.zeros(6, 9, dtype=torch.float64, requires_grad=True)
        opt = AuON([p], lr=1.0, form="draft", gamma=1.0)
        p.grad = gaussian(6, 9, seed=seed)
        opt.step()
        assert 0.9 < p.norm().item() < 1.0  # sqrt(1 + 1.38 / 54) = 1.013 at most
        assert torch.cosine_similarity(p.detach().flatten(), -p.grad.flatten(), dim=0) > 1 - 1e-12


def test_large_gamma_stays_finite_until_sinh_overflows():
    p = torch.ones(4, 4, requires_grad=True)
    p.grad = torch.ones(4, 4)
    AuON([p], gamma=100.0).step()
    assert torch.isfinite(p).all()


# -- state, bad input ------------------------------------------------------------------------------------------------------

def test_one_buffer_as_large_as_the_parameters():
    for method in (AuON, HybridAuON, Muon):
        p = torch.zeros(6, 9, requires_grad=True)
        opt = method([p])
        set_grads([p], 0)
        opt.step()
        assert state_bytes(opt) == 4 * 54


def test_zero_gradients_move_nothing():
    for method in (AuON, HybridAuON, Muon):
        p = torch.ones(3, 4, requires_grad=True)
        p.grad = torch.zeros(3, 4)
        method([p]).step()
        assert torch.equal(p, torch.ones(3, 4))


def test_form_spoilt_between_steps():
    opt = AuON(tensors())
    set_grads(opt.param_groups[0]["params"], 0)
    opt.step()
    before = snapshot(opt)
    opt.param_groups[0]["form"] = "paper"
    with pytest.raises(ValueError, match="form"):
        opt.step()
    opt.param_groups[0]["form"] = "repository"
    assert same(before, snapshot(opt))
