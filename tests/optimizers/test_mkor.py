"""MKOR against a network and its gradients written in NumPy, explicit inverses, torch's SGD, and the drop-in checks."""
import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from lib.optimizers.base import state_bytes
from lib.optimizers.mkor import KFAC, MKOR, MKORH, RULES, exact, rescaled, stabilized
from tests.optimizers.conformance import NAN, Conformance, same, set_grads, snapshot, tensors

MODULE = "lib/optimizers/mkor.py"
BREAKS = [
    ("Sherman-Morrison adds", MODULE, "return (P - torch.outer(Pv, Pv) * ((1 - gamma)", "return (P + torch.outer(Pv, Pv) * ((1 - gamma)"),
    ("the two factors are exchanged in the division", MODULE, "return [d * (before / after)", "return [d * (after / before)"),
    ("the mean over the batch is not taken back", MODULE, "self.statistic(a, g * len(g))", "self.statistic(a, g)"),
    ("the bias has no column", MODULE, "a.new_ones(len(a), 1)", "a.new_zeros(len(a), 1)"),
    ("factors at every step", MODULE, 'steps % group["inv_freq"] == 0', "True"),
    ("the stabilizer never acts", MODULE, "if P.abs().max() <= limit:", "if True:"),
    ("the switch goes the other way", MODULE, 'newer > (1 - group["rate"]) * older', 'newer < (1 - group["rate"]) * older'),
    ("maximize is lost in the preconditioner", MODULE, '-p.grad if group["maximize"] else p.grad for p in pair', "p.grad for p in pair"),
]
OPTIONS = [("lr", -1e-3), ("lr", NAN), ("lr", float("inf")), ("lr", "fast"), ("momentum", 1.0), ("momentum", NAN), ("weight_decay", -0.1),
           ("maximize", "yes"), ("gamma", 0.0), ("gamma", 1.1), ("gamma", NAN), ("zeta", 0.0), ("limit", 0.0), ("rule", "paper"),
           ("inv_freq", 0), ("inv_freq", 1.5)]


class TestConformance(Conformance):
    optimizer = MKOR
    floats_per_parameter = 1
    bad_options = OPTIONS


class TestConformanceOfTheHybrid(Conformance):
    optimizer = MKORH
    floats_per_parameter = 1
    bad_options = [*OPTIONS, ("window", 0), ("window", 2.0), ("rate", 1.0), ("rate", NAN)]


class TestConformanceOfKFAC(Conformance):
    optimizer = KFAC
    floats_per_parameter = 1
    bad_options = [*OPTIONS, ("damping", 0.0)]


def network(seed=0, bias=True, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias)).to(dtype)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype) / 2
    return model


def batch(t, n=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(1000 + t)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64) + 1.0
    return x.to(dtype), torch.randn(n, 3, generator=g, dtype=torch.float64).to(dtype)


def squared(model, x, y):
    return 0.5 * (model(x) - y).square().sum(-1).mean()


def train(model, opt, steps, first=0):
    for t in range(first, first + steps):
        opt.zero_grad()
        loss = squared(model, *batch(t))
        loss.backward()
        opt.step()
        if isinstance(opt, MKORH):
            opt.observe(loss.item())
    return [p.detach().clone() for p in model.parameters()]


# -- oracles -----------------------------------------------------------------------------------------------------------

def naive(model, steps, kind, gamma, inv_freq, limit, zeta, lr=0.05, mu=0.9, decay=0.01):
    """Forward, backward, factors and momentum of the two-layer network, with explicit inverses where the rule is exact."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    W = [np.c_[m.weight.detach().numpy(), m.bias.detach().numpy()] if m.bias is not None else m.weight.detach().numpy().copy() for m in layers]
    bias = layers[0].bias is not None
    velocity = [np.zeros_like(w) for w in W]
    factors = [[np.eye(w.shape[1]), np.eye(w.shape[0])] for w in W]
    for t in range(steps):
        x, y = (z.numpy() for z in batch(t))
        extend = (lambda z: np.c_[z, np.ones(len(z))]) if bias else (lambda z: z)
        a1 = extend(x)
        h = np.tanh(a1 @ W[0].T)
        a2 = extend(h)
        g2 = a2 @ W[1].T - y  # of single samples
        g1 = (g2 @ W[1][:, :6]) * (1 - h * h)
        for k, (a, g) in enumerate(((a1, g1), (a2, g2))):
            grad = g.T @ a / len(x)
            if t % inv_freq == 0:
                for side, v in enumerate((a.mean(0), g.mean(0))):
                    P = factors[k][side]
                    if np.abs(P).max() > limit:
                        P = zeta * P + (1 - zeta) * np.eye(len(P))
                    if kind == "exact":
                        P = np.linalg.inv(gamma * np.linalg.inv(P) + (1 - gamma) * np.outer(v, v))
                    elif kind == "code":
                        P = np.linalg.inv(np.linalg.inv(gamma * P + (1 - gamma) * np.eye(len(P))) + np.outer(v, v))
                    else:
                        s = v @ P @ v
                        P = gamma * P + (1 - gamma) / (gamma**2 * (1 + gamma * (1 - gamma) * s)) * P @ np.outer(v, v) @ P
                    factors[k][side] = P
            D = factors[k][1] @ grad @ factors[k][0]
            size = (lambda M: np.sqrt((M[:, :-1] ** 2).sum()) + np.sqrt((M[:, -1] ** 2).sum())) if bias else np.linalg.norm
            D = D * size(grad) / size(D)
            velocity[k] = mu * velocity[k] + D + decay * W[k]
            W[k] = W[k] - lr * velocity[k]
    return W


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("inv_freq", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_naive_transcription_over_60_steps(rule, inv_freq, bias):
    gamma = 0.9 if rule != "printed" else 0.99  # the printed update grows; with 0.99 it stays finite over 60 steps
    model = network(bias=bias)
    W = naive(model, 60, rule, gamma, inv_freq, limit=1.5, zeta=0.8)
    opt = MKOR(model.parameters(), lr=0.05, weight_decay=0.01, gamma=gamma, rule=rule, inv_freq=inv_freq, limit=1.5, zeta=0.8).watch(model)
    train(model, opt, 60)
    for m, w in zip((model[0], model[2]), W, strict=True):
        ours = np.c_[m.weight.detach().numpy(), m.bias.detach().numpy()] if bias else m.weight.detach().numpy()
        np.testing.assert_allclose(ours, w, rtol=1e-7, atol=1e-8)  # explicit inverses lose digits where a factor is stretched


@pytest.mark.parametrize("gamma", [0.5, 0.95, 1.0])
def test_recursion_is_the_explicit_inverse(gamma):
    g = torch.Generator().manual_seed(0)
    A = P = torch.eye(7, dtype=torch.float64)
    for _ in range(40):
        v = torch.randn(7, generator=g, dtype=torch.float64)
        A = gamma * A + (1 - gamma) * torch.outer(v, v)
        P = exact(P, v, gamma)
        torch.testing.assert_close(P @ A, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-9)
        assert torch.linalg.eigvalsh(P).min() > 0


def test_kfac_by_explicit_moments():
    model = network()
    twin = copy.deepcopy(model)
    opt = KFAC(model.parameters(), lr=0.05, momentum=0.0, gamma=0.9, damping=0.2, inv_freq=1).watch(model)
    moments = [None, None]
    for t in range(20):
        x, y = batch(t)
        h = torch.tanh(twin[0](x))
        g2 = twin[2](h) - y
        g1 = (g2 @ twin[2].weight) * (1 - h * h)
        with torch.no_grad():
            new = []
            for k, (m, a, g) in enumerate(((twin[0], x, g1), (twin[2], h, g2))):
                a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
                M = [a.T @ a / len(a), g.T @ g / len(g)]
                moments[k] = M if moments[k] is None else [0.9 * old + 0.1 * fresh for old, fresh in zip(moments[k], M, strict=True)]
                A, G = (torch.linalg.inv(F + 0.2 * F.trace() / len(F) * torch.eye(len(F), dtype=F.dtype)) for F in moments[k])
                grad = g.T @ a / len(a)
                D = G @ grad @ A
                D = D * (grad[:, :-1].norm() + grad[:, -1].norm()) / (D[:, :-1].norm() + D[:, -1].norm())
                new.append((m, D))
            for m, D in new:
                m.weight -= 0.05 * D[:, :-1]
                m.bias -= 0.05 * D[:, -1]
        train(model, opt, 1, first=t)
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-9, atol=1e-9)


# -- the idea switched off ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("watched", [True, False])
def test_with_identity_factors_it_is_momentum_sgd_bit_for_bit(watched):
    """gamma = 1 never moves the factors from the identity; nor does a model that is not watched."""
    model, twin = network(), network()
    opt = MKOR(model.parameters(), lr=0.05, weight_decay=0.1, gamma=1.0 if watched else 0.9, inv_freq=1)
    if watched:
        opt.watch(model)
    other = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    assert same(train(model, opt, 60), train(twin, other, 60))
    assert not watched or torch.equal(opt.state[model[0].weight]["A_inv"], torch.eye(5, dtype=torch.float64))


def test_parity_with_sgd_in_conformance_shapes():
    ours, theirs = tensors(), tensors()
    opt, other = MKOR(ours, lr=0.05, weight_decay=0.1), torch.optim.SGD(theirs, lr=0.05, momentum=0.9, weight_decay=0.1)
    for t in range(50):
        set_grads(ours, t)
        set_grads(theirs, t)
        opt.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_the_switch_is_for_good_and_leaves_momentum_sgd():
    model = network()
    opt = MKORH(model.parameters(), lr=0.05, window=3, rate=0.1, inv_freq=1).watch(model)
    for loss in (9.0, 8.0, 7.0, 6.0, 5.0):
        opt.observe(loss)
    assert opt.param_groups[0]["second_order"]  # two windows are not full yet
    opt.observe(4.0)
    assert opt.param_groups[0]["second_order"]  # 15 against 24
    train(model, opt, 4)
    opt = MKORH(model.parameters(), lr=0.05, window=3, rate=0.1, inv_freq=1).watch(model)
    for loss in (4.0, 4.0, 4.0, 4.0, 3.5, 3.5):
        opt.observe(loss)
    assert not opt.param_groups[0]["second_order"]  # 11 against 12 is less than a tenth
    for loss in range(6, 0, -1):
        opt.observe(loss)
    assert not opt.param_groups[0]["second_order"]
    twin = copy.deepcopy(model)
    for m in twin.modules():
        m._forward_hooks.clear()
    assert same(train(model, opt, 10), train(twin, torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9), 10))


def test_a_closure_is_observed():
    model = network()
    opt = MKORH(model.parameters(), lr=0.0, window=2).watch(model)

    def closure():
        opt.zero_grad()
        loss = squared(model, *batch(0))
        loss.backward()
        return loss

    for _ in range(4):
        opt.step(closure)
    assert len(opt.param_groups[0]["losses"]) == 4 and not opt.param_groups[0]["second_order"]


# -- pieces ------------------------------------------------------------------------------------------------------------

def test_the_vector_of_g_is_the_gradient_of_the_bias():
    model, seen = network(), []
    opt = MKOR(model.parameters(), inv_freq=1).watch(model)
    opt.refresh = lambda state, statistics, group: seen.append(statistics[0])
    squared(model, *batch(0)).backward()
    opt.step()
    for (a, g), m in zip(seen, (model[0], model[2]), strict=True):
        torch.testing.assert_close(g, m.bias.grad, rtol=1e-12, atol=1e-12)
        assert a[-1] == 1.0
    torch.testing.assert_close(seen[0][0][:4], batch(0)[0].mean(0))


def test_rescaling_keeps_the_sum_of_norms():
    D = [torch.randn(3, 4), torch.randn(3)]
    grads = [7 * torch.randn(3, 4), torch.randn(3)]
    out = rescaled(D, grads)
    assert sum(d.norm() for d in out).item() == pytest.approx(sum(g.norm() for g in grads).item(), rel=1e-5)
    assert same(rescaled([torch.zeros(2)], [torch.ones(2)]), [torch.zeros(2)])


def test_stabilizer():
    P = torch.tensor([[3.0, 0.5], [0.5, 1.0]])
    assert torch.equal(stabilized(P, 3.0, 0.9), P)
    torch.testing.assert_close(stabilized(P, 2.0, 0.9), torch.tensor([[2.8, 0.45], [0.45, 1.0]]))


def test_flattened_sequences_and_accumulated_batches():
    """[batch, time, d] is read as rows; two backward passes before a step give the average of their vectors."""
    flat, deep = network(), network()
    opts = [MKOR(m.parameters(), lr=0.05, inv_freq=1).watch(m) for m in (flat, deep)]
    x, y = batch(0)
    squared(flat, x, y).backward()
    squared(deep, x.reshape(2, 4, 4), y.reshape(2, 4, 3)).backward()
    for opt in opts:
        opt.step()
    torch.testing.assert_close(list(flat.parameters()), list(deep.parameters()), rtol=1e-12, atol=1e-12)
    split = network()
    opt = MKOR(split.parameters(), lr=0.05, inv_freq=1).watch(split)
    for rows in (slice(0, 4), slice(4, 8)):
        (squared(split, x[rows], y[rows]) / 2).backward()
    opt.step()
    torch.testing.assert_close(opt.state[split[0].weight]["A_inv"], opts[0].state[flat[0].weight]["A_inv"])
    with torch.no_grad():
        squared(flat, *batch(1))
    assert not opts[0].layers[flat[0].weight][2]  # evaluation leaves no trace


def test_maximize_is_descent_on_the_negated_loss():
    up, down = network(), network()
    opts = [MKOR(up.parameters(), lr=0.05, inv_freq=1, maximize=True).watch(up), MKOR(down.parameters(), lr=0.05, inv_freq=1).watch(down)]
    for t in range(5):
        for model, opt, sign in zip((up, down), opts, (1, -1), strict=True):
            opt.zero_grad()
            (sign * squared(model, *batch(t))).backward()
            opt.step()
    torch.testing.assert_close(list(up.parameters()), list(down.parameters()), rtol=1e-12, atol=1e-12)


# -- state -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", [MKOR, MKORH, KFAC])
def test_state_dict_of_a_watched_model_continues_bit_for_bit(method):
    options = {"lr": 0.05, "inv_freq": 2} | ({"window": 2} if method is MKORH else {})
    whole, first = network(), network()
    finished = train(whole, method(whole.parameters(), **options).watch(whole), 9)
    opt = method(first.parameters(), **options).watch(first)
    train(first, opt, 5)
    saved = io.BytesIO()
    torch.save((first.state_dict(), opt.state_dict()), saved)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    second = network(seed=5)
    second.load_state_dict(weights)
    again = method(second.parameters(), lr=9.0).watch(second)
    again.load_state_dict(state)
    assert same(finished, train(second, again, 4, first=5))


def test_a_copy_has_to_watch_its_own_model():
    model = network()
    opt = MKOR(model.parameters(), lr=0.05, inv_freq=1).watch(model)
    train(model, opt, 2)
    twin = copy.deepcopy(opt)
    assert not twin.layers and same(snapshot(opt)[1]["state"], snapshot(twin)[1]["state"])


def test_counted_state():
    model = network(dtype=torch.float32)
    opt = MKOR(model.parameters(), inv_freq=1).watch(model)
    squared(model, *batch(0, dtype=torch.float32)).backward()
    opt.step()
    n = sum(p.numel() for p in model.parameters())
    assert state_bytes(opt) == 4 * (n + 5 * 5 + 6 * 6 + 7 * 7 + 3 * 3)


def test_bfloat16_parameters_have_float32_factors():
    model = network(dtype=torch.bfloat16)
    opt = MKOR(model.parameters(), inv_freq=1).watch(model)
    squared(model, *batch(0, dtype=torch.bfloat16)).backward()
    opt.step()
    assert opt.state[model[0].weight]["A_inv"].dtype == torch.float32
    assert all(torch.isfinite(p).all() for p in model.parameters())


# -- bad input ---------------------------------------------------------------------------------------------------------

def test_weight_and_bias_in_two_groups():
    model = network()
    groups = [{"params": [p for p in model.parameters() if p.ndim == d]} for d in (1, 2)]
    with pytest.raises(ValueError, match="weight and bias"):
        MKOR(groups).watch(model)
    assert not model[0]._forward_hooks


def test_a_factor_that_is_not_finite_stops_before_anything_moves():
    model = network()
    opt = MKOR(model.parameters(), inv_freq=1).watch(model)
    train(model, opt, 2)
    before = [p.detach().clone() for p in model.parameters()], opt.state[model[0].weight]["A_inv"].clone()
    x, y = batch(0)
    x[0, 0] = float("inf")
    squared(model, x, y).backward()
    with pytest.raises(FloatingPointError, match="A_inv"):
        opt.step()
    assert same(before, ([p.detach() for p in model.parameters()], opt.state[model[0].weight]["A_inv"]))


def test_zero_gradients_move_nothing():
    model = network()
    opt = MKOR(model.parameters(), lr=0.05, inv_freq=1).watch(model)
    before = [p.detach().clone() for p in model.parameters()]
    (0.0 * squared(model, *batch(0))).backward()
    opt.step()
    assert same(before, [p.detach() for p in model.parameters()])
