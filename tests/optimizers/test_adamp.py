"""SGDP and AdamP against the authors' package, pytorch_optimizer, a transcription in NumPy, closed forms, and the drop-in checks."""
import math

import numpy as np
import pytest
import torch

from lib.optimizers.adamp import SGDP, AdamP, invariant_rows, tangent_
from tests.optimizers.conformance import Conformance, set_grads, tensors

MODULE = "lib/optimizers/adamp.py"
BREAKS = [
    ("nothing is projected", MODULE, "            tangent_(update, weight, rows, group[\"eps\"])", "            pass"),
    ("the radial part is added", MODULE, "weight.dim() - 1)), value=-1.0)", "weight.dim() - 1)), value=1.0)"),
    ("one channel that passes is enough", MODULE, "cosine.max() <", "cosine.min() <"),
    ("no test of the layer", MODULE, "return 1 if cosine <", "return None if cosine <"),
    ("the layer's threshold is a channel's", MODULE, "delta / math.sqrt(W.numel())", "delta / math.sqrt(W.shape[1])"),
    ("the angle is the update's", MODULE, "invariant_rows(weight, grad,", "invariant_rows(weight, update,"),
    ("projected weights decay in full", MODULE, '(projected, group["wd_ratio"])', "(projected, 1.0)"),
    ("decay before the projection", MODULE, "    free, projected = [], []",
     '    decay_(batch.params, group["lr"], group["weight_decay"])\n    free, projected = [], []'),
    ("the buffer is projected too", MODULE, "else [b.clone() for b in p]", "else p"),
    ("decay not divided by 1 - momentum", MODULE, "decay_scale=1.0 / (1.0 - beta)", "decay_scale=1.0"),
    ("no root of the correction", MODULE, "math.sqrt(bias_correction(beta2, batch.step))", "bias_correction(beta2, batch.step)"),
    ("Nesterov ignored by AdamP", MODULE, 'torch._foreach_lerp(m, grads, 1.0 - beta1) if group["nesterov"] else m', "m"),
]


class TestAdamPConformance(Conformance):
    optimizer = AdamP
    floats_per_parameter = 2
    bad_options = [*Conformance.bad_options, ("delta", -0.1), ("delta", math.nan), ("wd_ratio", -1.0), ("nesterov", 1)]


class TestSGDPConformance(Conformance):
    optimizer = SGDP
    options = {"lr": 0.05, "weight_decay": 0.1, "delta": 9.0}  # 9: no cosine is above the threshold, in any precision
    floats_per_parameter = 1
    bad_options = [(n, v) for n, v in Conformance.bad_options if n != "betas"] + [("momentum", 1.0), ("momentum", math.nan), ("delta", "x")]


class TestSGDPWithoutMomentum(Conformance):
    optimizer = SGDP
    options = {"lr": 0.05, "momentum": 0.0}
    floats_per_parameter = 0
    bad_options = [(n, v) for n, v in Conformance.bad_options if n != "betas"]


# -- parity ------------------------------------------------------------------------------------------------------------

SHAPES = ((6, 40), (4, 3, 5, 5), (7,), (), (1, 30), (30, 1), (8, 8))


def mixed_grads(params, seed):
    """Random gradients: by channel orthogonal to their weights, by layer only, or free, in turn over tensors and steps."""
    set_grads(params, 100 + seed)  # the seeds of the weights would give the weights themselves
    for i, p in enumerate(params):
        if p.dim() > 1 and p.shape != (30, 1) and (i + seed) % 3 < 2:
            rows = len(p) if (i + seed) % 3 == 0 else 1
            tangent_(p.grad, p.detach(), rows, 0.0)


def naive(params, gradients, kind, lr, steps, weight_decay=0.0, nesterov=False, delta=0.1, wd_ratio=0.1, eps=1e-8, momentum=0.9,
          betas=(0.9, 0.999)):
    """The algorithm boxes, one tensor and one channel at a time, in NumPy. `gradients(params, t)` gives the gradients."""
    w = [p.copy() for p in params]
    first, second = ([np.zeros_like(p) for p in params] for _ in range(2))
    projected = 0
    for t in range(1, steps + 1):
        for i, g in enumerate(gradients(w, t - 1)):
            if kind == "sgdp":
                first[i] = momentum * first[i] + g
                q = g + momentum * first[i] if nesterov else first[i].copy()
                decay = weight_decay / (1 - momentum)
            else:
                b1, b2 = betas
                first[i], second[i] = b1 * first[i] + (1 - b1) * g, b2 * second[i] + (1 - b2) * g * g
                top = b1 * first[i] + (1 - b1) * g if nesterov else first[i]
                q, decay = top / (1 - b1**t) / (np.sqrt(second[i] / (1 - b2**t)) + eps), weight_decay
            if w[i].ndim > 1:
                for rows in (len(w[i]), 1):
                    W, G, Q = (a.reshape(rows, -1) for a in (w[i], g, q))
                    cosines = [abs(x @ y) / (np.linalg.norm(x) * np.linalg.norm(y)) for x, y in zip(W, G, strict=True)]
                    if max(cosines) < delta / math.sqrt(W.shape[1]):
                        unit = [x / (np.linalg.norm(x) + eps) for x in W]
                        q = np.stack([y - (u @ y) * u for u, y in zip(unit, Q, strict=True)]).reshape(w[i].shape)
                        decay *= wd_ratio
                        projected += 1
                        break
            w[i] = (1 - lr * decay) * w[i] - lr * q
    return w, projected


def numpy_grads(w, t):
    params = [torch.from_numpy(np.asarray(a)).clone().requires_grad_() for a in w]
    mixed_grads(params, t)
    return [p.grad.numpy() for p in params]


KINDS = [("adamp", AdamP, {}), ("adamp", AdamP, {"weight_decay": 0.2, "nesterov": True}), ("adamp", AdamP, {"delta": 0.5, "betas": (0.5, 0.9)}),
         ("adamp", AdamP, {"eps": 1e-3, "wd_ratio": 0.5, "weight_decay": 0.2}), ("sgdp", SGDP, {}), ("sgdp", SGDP, {"weight_decay": 0.05}),
         ("sgdp", SGDP, {"nesterov": True, "weight_decay": 0.05, "momentum": 0.5}), ("sgdp", SGDP, {"momentum": 0.0, "delta": 0.3})]


@pytest.mark.parametrize(("kind", "method", "options"), KINDS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_transcription_over_60_steps(kind, method, options):
    params = tensors(shapes=SHAPES)
    expected, projected = naive([p.detach().numpy() for p in params], numpy_grads, kind, 0.01, 60, **options)
    opt = method(params, lr=0.01, **options)
    for t in range(60):
        mixed_grads(params, t)
        opt.step()
    assert projected > 100  # of 60 steps of five tensors; the rest stays free
    for p, q in zip(params, expected, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), q, rtol=1e-9, atol=1e-10)  # float64 in another order, over 60 steps


def authors(kind, params, **options):
    return getattr(pytest.importorskip("adamp"), kind)(params, **options)


def pytorch_optimizer(kind, params, **options):
    return getattr(pytest.importorskip("pytorch_optimizer"), kind)(params, **options)


# The authors' SGDP projects its momentum in place unless Nesterov builds a new tensor: that is the one option they share with the paper.
# pytorch_optimizer's AdamP adds eps to the root before the bias correction, the paper after it: they meet where eps is negligible.
PEERS = [(authors, m, o) for _, m, o in KINDS if m is AdamP or o.get("nesterov")]
PEERS += [(pytorch_optimizer, m, o if m is SGDP else o | {"eps": 1e-16}) for _, m, o in KINDS]


@pytest.mark.parametrize(("peer", "method", "options"), PEERS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_parity_over_100_steps(peer, method, options):
    ours, theirs = tensors(shapes=SHAPES), tensors(shapes=SHAPES)
    opt, other = method(ours, lr=0.01, **options), peer(method.__name__, theirs, lr=0.01, **{"momentum": 0.9} | options if method is SGDP else options)
    for t in range(100):
        mixed_grads(ours, t)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()
        opt.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)  # the same float64 formulas in another order


def test_the_authors_sgdp_projects_its_buffer():
    """The difference that the docstring names: equal after one step, not after two."""
    ours, theirs = tensors(shapes=((3, 8),)), tensors(shapes=((3, 8),))
    opt, other = SGDP(ours, lr=0.1, delta=9.0), authors("SGDP", theirs, lr=0.1, momentum=0.9, delta=9.0)
    gaps = []
    for t in range(2):
        set_grads(ours, 100 + t)
        set_grads(theirs, 100 + t)
        opt.step()
        other.step()
        gaps.append((ours[0] - theirs[0]).abs().max().item())
    assert gaps[0] < 1e-12 and gaps[1] > 1e-3


# -- limits and closed forms ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_delta_zero_is_adamw(weight_decay):
    ours, theirs = tensors(shapes=SHAPES), tensors(shapes=SHAPES)
    opt, other = AdamP(ours, lr=0.01, delta=0.0, weight_decay=weight_decay), torch.optim.AdamW(theirs, lr=0.01, weight_decay=weight_decay)
    for t in range(60):
        mixed_grads(ours, t)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()
        opt.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)  # float64; where the factor of the correction is applied differs


@pytest.mark.parametrize("nesterov", [False, True])
def test_delta_zero_is_sgd(nesterov):
    ours, theirs = tensors(), tensors()
    opt, other = SGDP(ours, lr=0.1, delta=0.0, nesterov=nesterov), torch.optim.SGD(theirs, lr=0.1, momentum=0.9, nesterov=nesterov)
    for t in range(60):
        set_grads(ours, t)
        set_grads(theirs, t)
        opt.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_growth_with_and_without_projection():
    """Gradients orthogonal to the current weight: the norm follows the two recursions of the paper."""
    for delta, extra in ((0.0, True), (0.1, False)):
        w, = tensors(shapes=((5, 20),))
        opt, eta, p, pushes = SGDP([w], lr=0.03, delta=delta), 0.03, torch.zeros(5, 20, dtype=torch.float64), []
        for t in range(30):
            set_grads([w], 100 + t)
            tangent_(w.grad, w.detach(), 5, 0.0)
            before = w.detach().clone()
            p = 0.9 * p + w.grad
            opt.step()
            pushes.append(p.square().sum(1))
            grown = w.detach().square().sum(1) - before.square().sum(1)
            if extra:
                expected = eta**2 * (pushes[-1] + 2 * sum(0.9 ** (t - k) * pushes[k] for k in range(t)))
            else:
                expected = (w.detach() - before).square().sum(1)
                assert (w.detach() - before).mul(before).sum(1).abs().max() < 1e-8  # eps of the unit vector
            torch.testing.assert_close(grown, expected, rtol=1e-6, atol=1e-9)


def test_views():
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    channel = torch.tensor([[0.0, 2.0], [3.0, 0.0]], dtype=torch.float64)
    layer = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    assert invariant_rows(W, channel, 0.1, 1e-8) == 2 and invariant_rows(W, layer, 0.1, 1e-8) == 1
    assert invariant_rows(W, W, 0.1, 1e-8) is None and invariant_rows(W, channel, 0.0, 1e-8) is None
    assert invariant_rows(W[0], channel[0], 0.1, 1e-8) is None  # a vector is never tested
    assert invariant_rows(W[:0], W[:0], 0.1, 1e-8) is None


@pytest.mark.parametrize(("entries", "cosine", "passes"), [(25, 0.0199, True), (25, 0.0201, False), (400, 0.0049, True), (400, 0.0051, False)])
def test_threshold_shrinks_with_the_root_of_the_size(entries, cosine, passes):
    w = torch.zeros(1, entries, dtype=torch.float64)
    g = torch.zeros_like(w)
    w[0, 0], g[0, 0], g[0, 1] = 2.0, cosine, math.sqrt(1 - cosine**2)
    assert (invariant_rows(w, g, 0.1, 1e-8) is not None) is passes


def test_a_weight_of_zero_stays_finite():
    for method in (AdamP, SGDP):
        w = torch.zeros(3, 4, requires_grad=True)
        opt = method([w], weight_decay=0.1)
        for t in range(3):
            set_grads([w], t)
            opt.step()
        assert torch.isfinite(w).all() and w.abs().min() > 0
