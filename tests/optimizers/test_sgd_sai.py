"""SGD-SaI against the authors' package, a transcription of the algorithm box, closed forms, and the drop-in checks."""
import math

import numpy as np
import pytest
import torch

from lib.optimizers.sgd_sai import SGDSaI, g_snr
from tests.optimizers.conformance import Conformance, set_grads, tensors

MODULE = "lib/optimizers/sgd_sai.py"
BREAKS = [
    ("deviation without the sample correction", MODULE, "g.std().item()", "g.std(correction=0).item()"),
    ("factor measured anew in each step", MODULE, 'if p.grad is not None and "g_snr" not in self.state[p]', "if p.grad is not None"),
    ("the average starts at zero", MODULE, "mu if batch.step > 1 else 0.0", "mu"),
    ("decay is scaled too", MODULE, 'decay_(batch.params, lr, group["weight_decay"])',
     '[decay_([p], lr, group["weight_decay"] * self.state[p]["g_snr"]) for p in batch.params]'),
    ("always normalised", MODULE, 'state["largest"] if group["normalise"] else 1.0', 'state["largest"]'),
    ("divided by the smallest", MODULE, 'largest = max(state', 'largest = min(state'),
    ("equal entries are not special", MODULE, "if d < 2 or bool((grad == grad.flatten()[0]).all()):", "if d < 1:"),
]


class TestConformance(Conformance):
    """Each tensor by itself: without the division by the largest factor of all."""

    optimizer = SGDSaI
    options = {"lr": 0.02, "normalise": False}
    floats_per_parameter = 1
    bad_options = [(n, v) for n, v in Conformance.bad_options if n != "betas"] + [("momentum", 1.0), ("momentum", math.nan), ("normalise", 1)]


class TestConformanceNormalised(Conformance):
    optimizer = SGDSaI
    options = {"lr": 0.05, "weight_decay": 0.1}
    floats_per_parameter = 1
    bad_options = TestConformance.bad_options

    def test_groups_keep_their_own_options(self):
        """A tensor is scaled by its company: two groups are one group, but for their options."""
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
            if t == 0:
                first = opt.state[early]["g_snr"]
        assert opt.state[early]["g_snr"] == first  # measured once, also when another tensor starts
        assert opt.state[early]["step"] == 4 and opt.state[late]["step"] == 1
        assert opt.state[early]["largest"] == opt.state[late]["largest"] == opt.state[early]["g_snr"] > opt.state[late]["g_snr"]


class TestConformanceWithoutMomentum(Conformance):
    optimizer = SGDSaI
    options = {"lr": 0.02, "normalise": False, "momentum": 0.0}
    floats_per_parameter = 0
    bad_options = TestConformance.bad_options


# -- parity ------------------------------------------------------------------------------------------------------------

SHAPES = ((6, 40), (4, 3, 5, 5), (7,), (1, 30), (8, 8))  # no tensor of one entry: there the authors' factor is |g| / eps
OPTIONS = [{}, {"weight_decay": 0.0}, {"momentum": 0.5, "weight_decay": 0.3}, {"eps": 0.1}, {"lr": 1e-3}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_parity_with_the_authors_over_100_steps(options):
    package = pytest.importorskip("sgd_sai")
    ours, theirs = tensors(shapes=SHAPES), tensors(shapes=SHAPES)
    opt, other = SGDSaI(ours, normalise=False, **options), package.SGD_sai(theirs, **options)
    start = [p.detach().clone() for p in ours]
    for t in range(100):
        set_grads(ours, 50 + t)
        set_grads(theirs, 50 + t)
        opt.step()
        other.step()
    for p, q, p0 in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)  # the same float64 formulas in another order
        assert (p - p0).abs().max() > 1e-4


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_transcription_over_60_steps(options, normalise):
    params = tensors(shapes=SHAPES)
    o = {"lr": 1e-2, "momentum": 0.9, "eps": 1e-8, "weight_decay": 1e-2} | options
    w = [p.detach().numpy().copy() for p in params]
    opt, m, scale = SGDSaI(params, normalise=normalise, **options), None, None
    for t in range(60):
        set_grads(params, 50 + t)
        g = [p.grad.numpy() for p in params]
        if t == 0:
            scale = np.array([np.sqrt((x**2).sum()) / (np.sqrt(((x - x.mean()) ** 2).sum() / (x.size - 1)) + o["eps"]) for x in g])
            scale = scale / scale.max() if normalise else scale
            m = [x.copy() for x in g]
        else:
            m = [o["momentum"] * a + (1 - o["momentum"]) * x for a, x in zip(m, g, strict=True)]
        w = [(1 - o["lr"] * o["weight_decay"]) * a - o["lr"] * s * b for a, s, b in zip(w, scale, m, strict=True)]
        opt.step()
    for p, q in zip(params, w, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), q, rtol=1e-10, atol=1e-11)


def test_the_ports_that_differ():
    """pytorch_optimizer takes the bare norm for vectors and starts its average at zero: not an oracle, and this is where."""
    package = pytest.importorskip("pytorch_optimizer")
    ours, theirs = tensors(shapes=((6, 40), (7,))), tensors(shapes=((6, 40), (7,)))
    opt, other = SGDSaI(ours, normalise=False, weight_decay=0.0), package.SGDSaI(theirs, lr=1e-2, weight_decay=0.0)
    start = [p.detach().clone() for p in ours]
    set_grads(ours, 50)
    set_grads(theirs, 50)
    opt.step()
    other.step()
    ratios = [((q - p0) / (p - p0)).mean().item() for p, q, p0 in zip(ours, theirs, start, strict=True)]
    g = ours[1].grad
    assert ratios[0] == pytest.approx(0.1, rel=1e-3)  # a first step of (1 - momentum) g
    assert ratios[1] == pytest.approx(0.1 * g.norm().item() / g_snr(g), rel=1e-3)  # |g| in the place of |g| / std


# -- limits and closed forms ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("d", [2, 5, 100, 4096])
def test_identity(d):
    g = torch.from_numpy(np.random.default_rng(d).normal(0.3, 2.0, size=d))
    mean, s = g.mean().item(), g.std().item()
    assert g_snr(g, 0.0) == pytest.approx(math.sqrt(d - 1 + d * mean**2 / s**2), rel=1e-12)
    assert g_snr(g - mean, 0.0) == pytest.approx(math.sqrt(d - 1), rel=1e-12)
    assert g_snr(1e3 * g, 0.0) == pytest.approx(g_snr(g, 0.0), rel=1e-12)


@pytest.mark.parametrize("grad", [torch.zeros(9), torch.full((9,), 0.3), torch.tensor([0.3] * 9, dtype=torch.bfloat16)])
def test_equal_entries_count_by_their_number(grad):
    assert g_snr(grad) == 3.0
    assert g_snr(grad[:1]) == 1.0 == g_snr(grad[:0]) == g_snr(grad[0])


def test_a_tensor_behind_a_layer_of_zeros_is_not_frozen():
    """As in LoRA, whose second factor starts at zero: the first factor's first gradient is zero, its later ones aren't."""
    A, B = torch.ones(2, 3, dtype=torch.float64, requires_grad=True), torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    opt = SGDSaI([A, B], lr=0.1, weight_decay=0.0)
    target = torch.arange(4, dtype=torch.float64).reshape(2, 2)
    for t in range(3):
        opt.zero_grad()
        (A @ B - target).square().sum().backward()
        assert bool(A.grad.any()) is (t > 0)
        opt.step()
    assert not torch.equal(A, torch.ones_like(A))


def test_one_tensor_normalised_is_sgd_with_an_average():
    x, y = tensors(shapes=((5, 5),))[0], tensors(shapes=((5, 5),))[0]
    opt, other = SGDSaI([x], lr=0.1, weight_decay=0.0), torch.optim.SGD([y], lr=0.1, momentum=0.9, dampening=0.9)
    for t in range(60):
        set_grads([x], t)
        set_grads([y], t)
        opt.step()
        other.step()
    torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)  # torch's buffer starts at g_1 as well


def test_factors_stay():
    params = tensors(shapes=SHAPES)
    opt = SGDSaI(params)
    factors = []
    for t in range(3):
        set_grads(params, t)
        for p in params:
            p.grad += t  # another mean, another g-SNR
        opt.step()
        factors.append([opt.state[p]["g_snr"] for p in params])
    assert factors[0] == factors[1] == factors[2]


def test_a_rule_of_ones_is_plain_momentum():
    class Plain(SGDSaI):
        ratio = staticmethod(lambda grad, eps: 1.0)
    x, y = tensors(shapes=SHAPES), tensors(shapes=SHAPES)
    opt, other = Plain(x, lr=0.1, weight_decay=0.0), torch.optim.SGD(y, lr=0.1, momentum=0.9, dampening=0.9)
    for t in range(60):
        set_grads(x, t)
        set_grads(y, t)
        opt.step()
        other.step()
    for p, q in zip(x, y, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
