"""FRUGAL against a transcription of its algorithm in NumPy, AdamW and signSGD at its two ends, closed forms, and the drop-in checks."""
import math

import numpy as np
import pytest
import torch

from lib.optimizers.base import state_bytes
from lib.optimizers.frugal import FRUGAL, choose, down, residual, up
from tests.optimizers.conformance import Conformance, same, set_grads, snapshot, tensors

MODULE = "lib/optimizers/frugal.py"
BREAKS = [
    ("state-free part moves nothing", MODULE, 'return torch.sign(g) if rule == "sign"', 'return torch.zeros_like(g) if rule == "sign"'),
    ("state-free part goes up", MODULE, 'return torch.sign(g) if rule == "sign"', 'return -torch.sign(g) if rule == "sign"'),
    ("sign of the whole gradient", MODULE, "    rest = G - up(low, torch.zeros_like(G), subspace, P)", "    rest = G"),
    ("sign of rounding noise", MODULE, "rest.abs() > 1e-5 * G.abs().max()", "rest.abs() > 0"),
    ("step count not reset with the state", MODULE, 'state["step"] - state.get("since", 0)', 'state["step"]'),
    ("state of a block that rests is kept", MODULE, "            state.clear()\n", ""),
    ("subspace never changes", MODULE, '>= group["gap"]]', '>= 10**9]'),
    ("same subspace again", MODULE, 'group["seed"] + 1_000_003 * step', 'group["seed"]'),
    ("smallest singular vectors", MODULE, "Vh[:r].T if m >= n", "Vh[-r:].T if m >= n"),
    ("scale of the state-free part forgotten", MODULE, 'group["state_free"]).mul_(free_scale).contiguous()', 'group["state_free"]).contiguous()'),
    ("the wrong side", MODULE, "return G @ P if len(G) >= G.shape[1] else P.T @ G", "return G @ P if len(G) > G.shape[1] else P.T @ G"),
    ("infinite gradients decomposed", MODULE, "and not torch.isfinite(p.grad).all():", "and False:"),
]
COORDINATES = ("columns", "rows", "entries")
SHAPES = ((6, 9), (9, 6), (5, 5), (4, 3, 2), (7,), ())


class TestColumns(Conformance):
    optimizer = FRUGAL
    options = {"lr": 0.05, "subspace": "columns", "density": 0.5, "gap": 3, "weight_decay": 0.1}
    bad_options = [*Conformance.bad_options, ("density", -0.1), ("density", 1.1), ("density", math.nan), ("gap", 0), ("gap", 2.0), ("gap", True),
                   ("subspace", "diagonal"), ("state_free", "lion"), ("state_free_scale", -1.0)]


class TestBlocks(TestColumns):
    options = {"lr": 0.05, "subspace": "blocks", "density": 0.5, "gap": 3}


class TestEntries(TestColumns):
    options = {"lr": 0.05, "subspace": "entries", "density": 0.3, "gap": 2, "state_free": "sgd"}


class TestSvd(TestColumns):
    options = {"lr": 0.02, "subspace": "svd", "density": 0.5, "gap": 3}


class TestRandom(TestColumns):
    options = {"lr": 0.02, "subspace": "random", "density": 0.5, "gap": 3, "state_free_scale": 0.3}


# -- parity ------------------------------------------------------------------------------------------------------------

def naive(params, opt, steps, *, lr, subspace, density, gap, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, state_free="sign",
          state_free_scale=1.0):
    """The algorithm in NumPy with dense projectors. Random choices are read off the optimizer, the SVD is made here."""
    w, m, v, E, t = [[None] * len(params) for _ in range(5)]
    w = [p.detach().numpy().copy() for p in params]
    for step in range(steps):
        set_grads(params, 40 + step)
        opt.step()
        for i, p in enumerate(params):
            g, state = p.grad.numpy(), opt.state[p]
            whole = g.ndim < 2 or subspace == "full"
            G = g.reshape(len(g), -1) if g.ndim > 1 else g.reshape(1, -1)
            rows, cols = G.shape
            right = rows >= cols
            if step == 0 or (step % gap == 0 and not whole):
                t[i] = 0
                if not whole and subspace == "svd":
                    U, _, Vh = np.linalg.svd(G)
                    r = round(density * min(rows, cols))
                    E[i] = Vh[:r].T if right else U[:, :r]
                elif not whole and subspace != "blocks":
                    E[i] = state["where"].numpy()
                m[i] = v[i] = 0.0
            t[i] += 1
            if whole or subspace == "blocks":
                low, rest, lift = (G, 0 * G, lambda x: x) if whole or state["active"] else (0 * G, G, lambda x: 0 * x)
            elif subspace in COORDINATES:
                mask = np.zeros((rows, cols), bool)
                if subspace == "entries":
                    mask.reshape(-1)[E[i]] = True
                elif subspace == "columns":
                    mask[:, E[i]] = True
                else:
                    mask[E[i]] = True
                low, rest, lift = G * mask, G * ~mask, lambda x, mask=mask: x * mask
            elif right:
                low, lift = G @ E[i], lambda x, P=E[i]: x @ P.T
                rest = G - lift(low)
            else:
                low, lift = E[i].T @ G, lambda x, P=E[i]: P @ x
                rest = G - lift(low)
            rest = np.where(abs(rest) > 1e-5 * abs(G).max(), rest, 0)
            m[i], v[i] = betas[0] * m[i] + (1 - betas[0]) * low, betas[1] * v[i] + (1 - betas[1]) * low**2
            adam = m[i] / (1 - betas[0] ** t[i]) / (np.sqrt(v[i] / (1 - betas[1] ** t[i])) + eps)
            free = {"sign": np.sign(rest), "sgd": rest, "none": 0 * rest}[state_free]
            w[i] = (1 - lr * weight_decay) * w[i] - lr * (lift(adam) + state_free_scale * free).reshape(w[i].shape)
    return w


KINDS = [{"subspace": kind, "density": d, "gap": 20} for kind in ("blocks", *COORDINATES, "svd", "random") for d in (0.25, 0.5)]
KINDS += [{"subspace": "columns", "density": 0.5, "gap": 7, "state_free": f, "state_free_scale": 0.1, "weight_decay": 0.2} for f in ("sign", "sgd", "none")]
KINDS += [{"subspace": "svd", "density": 0.4, "gap": 15, "state_free": "none", "betas": (0.5, 0.9), "eps": 1e-3}, {"subspace": "random", "density": 1.0, "gap": 30},
          {"subspace": "full", "density": 0.5, "gap": 10}]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_transcription_over_60_steps(options):
    params = tensors(shapes=SHAPES)
    opt = FRUGAL(params, lr=0.01, **options)
    expected = naive(params, opt, 60, lr=0.01, **options)
    for p, q in zip(params, expected, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), q, rtol=1e-9, atol=1e-10)  # float64 in another order, over 60 steps


def run(make, steps=60):
    params = tensors(shapes=SHAPES)
    opt = make(params)
    for t in range(steps):
        set_grads(params, 40 + t)
        opt.step()
    return params


@pytest.mark.parametrize("subspace", ["blocks", *COORDINATES, "full"])
def test_density_one_is_adamw(subspace):
    ours = run(lambda p: FRUGAL(p, lr=0.01, density=1.0, subspace=subspace, weight_decay=0.1, gap=1000))
    theirs = run(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)  # float64; where the correction is applied differs


def test_a_full_rotation_is_not_adamw():
    for subspace in ("svd", "random"):
        ours = run(lambda p, kind=subspace: FRUGAL(p, lr=0.01, density=1.0, subspace=kind, gap=1000))
        theirs = run(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0))
        assert (ours[0] - theirs[0]).abs().max() > 0.01 and torch.allclose(ours[4], theirs[4])  # the vector has full state


@pytest.mark.parametrize("subspace", ["blocks", *COORDINATES, "svd", "random"])
def test_density_zero_is_signsgd_and_free_of_state(subspace):
    params = [p for p in tensors(shapes=SHAPES) if p.dim() > 1]
    opt, expected = FRUGAL(params, lr=0.01, density=0.0, subspace=subspace, weight_decay=0.1), [p.detach().clone() for p in params]
    for t in range(60):
        set_grads(params, t)
        opt.step()
        expected = [(1 - 0.001) * q - 0.01 * p.grad.sign() for p, q in zip(params, expected, strict=True)]
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    assert state_bytes(opt) == 0


# -- invariants ----------------------------------------------------------------------------------------------------------

def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
@pytest.mark.parametrize("subspace", [*COORDINATES, "svd", "random"])
def test_the_two_parts_are_orthogonal_and_add_up(subspace, shape):
    G = torch.randn(shape, generator=gen(1), dtype=torch.float64)
    P = choose(G, subspace, 0.5, gen(2))
    low = down(G, subspace, P)
    lifted = up(low, torch.zeros_like(G), subspace, P)
    assert abs((lifted * (G - lifted)).sum().item()) < 1e-12 and 0 < lifted.square().sum() < G.square().sum()
    torch.testing.assert_close(low, down(lifted, subspace, P), rtol=1e-12, atol=1e-12)
    if subspace in ("svd", "random"):
        torch.testing.assert_close(P.T @ P, torch.eye(P.shape[1], dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(residual(G, low, subspace, P), G - lifted, rtol=0, atol=1e-4)  # small entries are set to 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_sign_of_rounding_noise(dtype):
    """A gradient of rank 2 lies in two singular directions: nothing is left for the sign."""
    G = (torch.randn(30, 2, generator=gen(), dtype=torch.float64) @ torch.randn(2, 20, generator=gen(1), dtype=torch.float64)).to(dtype)
    for density, subspace in ((0.1, "svd"), (1.0, "svd"), (1.0, "random")):
        P = choose(G, subspace, density, gen(2))
        assert not residual(G, down(G, subspace, P), subspace, P).any()


def test_svd_takes_the_most_of_the_gradient():
    G = torch.randn(12, 8, generator=gen(3), dtype=torch.float64)
    kept = {kind: down(G, kind, choose(G, kind, 0.25, gen(4))).square().sum().item() for kind in ("svd", "random")}
    assert kept["svd"] == pytest.approx(torch.linalg.svdvals(G)[:2].square().sum().item()) and kept["random"] < kept["svd"]


@pytest.mark.parametrize(("subspace", "floats", "extra"), [("columns", 2 * 8 * 3, 3 * 8), ("rows", 2 * 2 * 12, 2 * 8), ("entries", 2 * 24, 24 * 8),
                                                          ("svd", 2 * 12 * 2 + 8 * 2, 0), ("random", 2 * 12 * 2 + 8 * 2, 0), ("full", 2 * 96, 0)])
def test_counted_state(subspace, floats, extra):
    w = torch.ones(8, 12, requires_grad=True)
    opt = FRUGAL([w], density=0.25, subspace=subspace)
    set_grads([w], 0)
    opt.step()
    assert state_bytes(opt) == 4 * floats + extra  # indices are int64


def test_blocks_take_turns_and_free_their_state():
    params = tensors(torch.float32, shapes=((4, 4),) * 8)
    opt, seen = FRUGAL(params, density=0.25, gap=2, subspace="blocks"), []
    for t in range(40):
        set_grads(params, t)
        opt.step()
        seen.append([opt.state[p]["active"] for p in params])
        assert state_bytes(opt) == 2 * 2 * 16 * 4  # two of eight, two averages, 16 entries
    seen = np.array(seen)
    assert (seen.sum(1) == 2).all() and (seen[::2] == seen[1::2]).all() and seen.any(0).all()


def test_a_new_subspace_starts_like_adam():
    """Entry by entry, the first step after a choice has length lr: the count of steps is reset with the averages."""
    w = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    opt = FRUGAL([w], lr=1.0, density=0.5, gap=5, subspace="columns", eps=0.0)
    for t in range(11):
        before = w.detach().clone()
        set_grads([w], t)
        opt.step()
        if t % 5 == 0:
            torch.testing.assert_close(w.detach(), before - w.grad.sign(), rtol=1e-12, atol=1e-12)


def test_choices_come_from_the_generator():
    def chosen(generator):
        w = torch.ones(4, 40, requires_grad=True)
        opt = FRUGAL([w], subspace="columns", gap=1, generator=generator)
        out = []
        for t in range(3):
            set_grads([w], t)
            opt.step()
            out.append(opt.state[w]["where"].tolist())
        return out
    a, b, c = chosen(gen(1)), chosen(gen(1)), chosen(gen(2))
    assert a == b != c and a[0] != a[1] != a[2] and chosen(None) == chosen(None)


def test_rank_of_the_update():
    moved = {}
    for state_free in ("none", "sign"):
        w = torch.zeros(12, 10, dtype=torch.float64, requires_grad=True)
        opt = FRUGAL([w], subspace="svd", density=0.2, state_free=state_free, gap=100)
        for t in range(5):
            set_grads([w], t)
            opt.step()
        moved[state_free] = torch.linalg.matrix_rank(w.detach()).item()
    assert moved == {"none": 2, "sign": 10}


# -- bad input -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("when", [0, 2])
def test_a_gradient_that_cannot_be_decomposed(bad, when):
    first, w = tensors(shapes=((3,), (4, 4)))
    opt = FRUGAL([{"params": [first]}, {"params": [w]}], subspace="svd", gap=2)
    for t in range(when):
        set_grads([first, w], t)
        opt.step()
    before = snapshot(opt)
    set_grads([first, w], 9)
    w.grad[0, 0] = bad
    with pytest.raises(ValueError, match="gradients must be finite"):
        opt.step()
    assert same(before, snapshot(opt))
