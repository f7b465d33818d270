"""kernels/shiftaddvit: sums of rows against products with 0/1 matrices, shifts against exact integers, codes, gradients, the balancing loss against its formulas, bad input, the kernels under the sanitizers."""
import math

import numpy as np
import pytest
import torch
from torch import nn

from lib.cuda import Module, check
from lib.kernels import shiftaddvit as s
from lib.kernels.shiftaddvit import AddAttention, Mixture, ShiftLinear, add_attention, balance_loss, binary_codes, fixed, pack, power_of_two, scv, shift_codes, shift_gemm, shifted
from lib.models import digits_tensors, load

CU, PY = "lib/kernels/shiftaddvit.cu", "lib/kernels/shiftaddvit.py"
BREAKS = [
    ("rows are added whether or not their bit is set", CU, "            if (left & 1u) {", "            if (true) {"),
    ("scores count differing bits", CU, "words + w] & k[", "words + w] ^ k["),
    ("negative weights shift like positive ones", CU, "sum += code > 0 ? x : -x;", "sum += x;"),
    ("the next tile is loaded while this one is read", CU, "        __syncthreads();                            // nobody reads them any more\n", ""),
    ("exponents are rounded down", PY, ".clamp(2.0 ** LOWEST, 1.0)).round())", ".clamp(2.0 ** LOWEST, 1.0)).floor())"),
    ("one threshold for all images", PY, "x.mean(dim=(1, 2, 3), keepdim=True)", "x.mean()"),
    ("slow experts get more tokens", PY, "alpha, (best, second) = latency / latency.sum()", "alpha, (best, second) = latency.sum() / latency"),
    ("the winner is its own rival", PY, "torch.where(noisy == best[:, None], second[:, None], best[:, None])", "best[:, None]"),
    ("activations are rounded up", PY, "(x * 2.0 ** PLACES).floor()", "(x * 2.0 ** PLACES).ceil()"),
]
rng = np.random.default_rng(0)             # the kernels' work depends on the bits, their results are exact for any
pytestmark = pytest.mark.usefixtures("compiler")


def f32(*shape):
    return rng.standard_normal(shape).astype(np.float32)


# --- additions

@pytest.mark.parametrize("batch, n, d, e", [(1, 1, 1, 1), (2, 5, 33, 3), (3, 40, 16, 64), (1, 65, 7, 17), (2, 32, 32, 32)])
def test_sums_are_products_with_binary_matrices(batch, n, d, e):
    Q, K = rng.random((2, batch, n, d)) < 0.4
    V = rng.integers(-50, 50, (batch, n, e)).astype(np.float32)                # sums stay far below 2^24: float32 is exact
    exact = Q.astype(float) @ (K.transpose(0, 2, 1).astype(float) @ V)
    linear, quadratic = add_attention(Q, K, V, count=True), add_attention(Q, K, V, quadratic=True, count=True)
    assert np.array_equal(linear.out, exact) and np.array_equal(quadratic.out, exact)
    assert linear.additions == e * (int(Q.sum()) + int(K.sum())) and linear.popcounts == 0
    assert quadratic.popcounts == batch * n * n * -(-d // 32) and quadratic.additions == 0
    assert np.allclose(add_attention(Q, K, f32(batch, n, e)).out.shape, exact.shape) and add_attention(Q, K, V).additions is None


def test_packing():
    bits = rng.random((2, 3, 70)) < 0.5
    words = pack(bits)
    assert words.shape == (2, 3, 3) and words.dtype == np.uint32 and words.flags.c_contiguous
    assert all((words[b, r, j // 32] >> (j % 32) & 1) == bits[b, r, j] for b in range(2) for r in range(3) for j in range(70))
    assert np.array_equal(pack(bits.transpose(0, 2, 1)), pack(np.ascontiguousarray(bits.transpose(0, 2, 1))))


def test_codes_have_one_threshold_an_image_and_a_straight_through_gradient():
    x = torch.from_numpy(f32(3, 2, 4, 5)).double().requires_grad_()
    codes = binary_codes(x)
    unit = x.detach() / x.detach().norm(dim=-1, keepdim=True)
    for i in range(3):
        assert torch.equal(codes[i], (unit[i] > unit[i].mean()).double())
    assert torch.equal(binary_codes(x[:1]), codes[:1]), "an image's codes do not depend on the others"
    weight = torch.from_numpy(f32(3, 2, 4, 5)).double()
    (codes * weight).sum().backward()
    again = x.detach().clone().requires_grad_()
    (torch.nn.functional.normalize(again, dim=-1).clamp(0, 1) * weight).sum().backward()
    assert torch.allclose(x.grad, again.grad, rtol=1e-12)


def test_add_attention_by_its_formula():
    vit = load("digits_vit")
    layer, x = AddAttention(vit.blocks[0].attn).double(), torch.from_numpy(f32(2, 16, 64)).double()
    nn.init.normal_(layer.dconv.weight, generator=torch.Generator().manual_seed(0))
    q, k, v = ((x @ w.weight.T).view(2, 16, 4, 16).transpose(1, 2) for w in (layer.wq, layer.wk, layer.wv))
    qb, kb = binary_codes(q), binary_codes(k)
    out = torch.zeros(2, 4, 16, 16, dtype=torch.double)
    for n in range(16):
        y = v[:, :, n] / 2 + torch.einsum("bhd,bhmd,bhme->bhe", qb[:, :, n], kb, v) / math.pi
        near = sum(layer.dconv.weight[:, 0, j][None, :, None] * v[:, :, n + j - 4] for j in range(9) if 0 <= n + j - 4 < 16)
        out[:, :, n] = y / y.norm(dim=-1, keepdim=True) + near
    exact = out.transpose(1, 2).reshape(2, 16, 64) @ layer.wo.weight.T
    assert torch.allclose(layer(x), exact, rtol=1e-10, atol=1e-12)
    assert torch.equal(layer(torch.zeros(1, 16, 64).double()), torch.zeros(1, 16, 64).double()), "rows of length 0 stay 0, and are not NaN"


def test_the_model_through_the_kernels_is_the_model():
    vit, x = load("digits_vit"), digits_tensors("test")[0][:6]
    for block in vit.blocks:
        block.attn, block.mlp = AddAttention(block.attn), shifted(block.mlp)
    with torch.no_grad():
        plain = vit(x)
        for block in vit.blocks:
            block.attn.sums, block.mlp = s.kernel_sums, shifted(block.mlp, kernel=True)
        # sums in another order, and a floor of activations that a last bit can move by 2^-16: 1e-3 of logits near 10
        assert torch.allclose(vit(x), plain, atol=1e-2) and torch.equal(vit(x).argmax(1), plain.argmax(1))


# --- shifts

def test_powers_of_two():
    w = torch.tensor([0.0, -0.0, 1.0, 5.0, -3.0, 0.5, 0.7, 0.71, -0.36, 1e-9, -(2.0 ** -15), 2.0 ** -0.5])
    assert power_of_two(w).tolist()[:11] == [0, 0, 1, 1, -1, 0.5, 0.5, 1, -0.5, 2.0 ** -15, -(2.0 ** -15)]
    w = torch.from_numpy(rng.uniform(-1, 1, 20_000))
    ratio = power_of_two(w) / w
    inside = w.abs() > 2.0 ** -15
    assert ratio[inside].min() >= 2 ** -0.5 - 1e-12 and ratio[inside].max() <= 2 ** 0.5 + 1e-12
    with pytest.raises(ValueError, match="w: should hold no NaN"):
        power_of_two(torch.tensor([math.nan]))


def test_codes_and_fixed_point():
    w = torch.tensor([[0.0, 1.0, -0.5, 2.0 ** -15, -2.0]])
    assert shift_codes(w).tolist() == [[0, 16, -15, 1, -16]]
    assert fixed(torch.tensor([0.0, 1e-6, -1e-6, 1.5, 1e6, -1e6])).tolist() == [0, 0, -2.0 ** -16, 1.5, 2.0 ** 15 - 1, -2.0 ** 15]


@pytest.mark.parametrize("n, m, k", [(1, 1, 1), (17, 5, 33), (16, 16, 16), (3, 40, 50)])
def test_shifts_are_exact_products(n, m, k):
    X, w = rng.integers(-2**31, 2**31, (n, k)).astype(np.int32), torch.from_numpy(f32(m, k))
    w[rng.random((m, k)) < 0.2] = 0
    Y, shifts = shift_gemm(X, shift_codes(w), count=True)
    scaled = (power_of_two(w).double().numpy() * 2 ** 15).astype(np.int64).astype(object)
    assert (Y == X.astype(object) @ scaled.T).all()
    assert shifts == n * int((w != 0).sum()) and np.array_equal(shift_gemm(X, shift_codes(w)), Y)


def test_shift_linear_is_the_rounded_layer_and_passes_gradients_straight():
    linear = nn.Linear(9, 4).double()
    with torch.no_grad():
        linear.weight[0, 0], linear.weight[1, 1] = 3.0, 0.0
    layer, x = ShiftLinear(linear), torch.from_numpy(f32(5, 9)).double().requires_grad_()
    y = layer(x)
    rounded = power_of_two(linear.weight.detach())
    assert torch.allclose(y, fixed(x.detach()) @ rounded.T + fixed(linear.bias.detach()), rtol=1e-12)
    assert layer.weight[0, 0] == 1.0 and layer.weight[1, 1] == 0.0, "beyond 1 comes back in place, 0 stays"
    up = torch.from_numpy(f32(5, 4)).double()
    y.backward(up)
    assert torch.allclose(x.grad, up @ rounded) and torch.allclose(layer.weight.grad, up.T @ fixed(x.detach())) and torch.allclose(layer.bias.grad, up.sum(0))
    kernel = ShiftLinear(linear, kernel=True)
    assert torch.allclose(kernel(x), y.detach(), rtol=1e-12)
    assert torch.equal(shifted(nn.Sequential(linear))[0].weight, linear.weight) and isinstance(shifted(nn.Sequential(ShiftLinear(linear)))[0], ShiftLinear)
    assert ShiftLinear(nn.Linear(2, 2, bias=False))(torch.zeros(1, 2)).tolist() == [[0, 0]]


# --- the mixture

def test_balance_by_its_formulas():
    logits, eps = torch.from_numpy(f32(50, 2)).double(), torch.from_numpy(f32(50, 2)).double()
    noisy, latency, sigma = logits + 0.5 * eps, torch.tensor([6.0, 4.0]).double(), 0.5
    alpha, p = latency / 10, logits.softmax(-1)
    phi = lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2)))
    load = torch.tensor([sum(phi(float(logits[t, i] - noisy[t, 1 - i]) / sigma) for t in range(50)) for i in (0, 1)])
    def cv(x):
        mean = sum(x) / 2
        return ((x[0] - mean) ** 2 + (x[1] - mean) ** 2) / mean ** 2           # variance with n - 1 = 1
    assert balance_loss(logits, noisy, latency, sigma).item() == pytest.approx(cv((alpha * p.sum(0)).tolist()) + cv((alpha * load).tolist()), rel=1e-6)
    three = torch.from_numpy(f32(7, 3)).double()
    best = lambda row, i: max(float(row[j]) for j in range(3) if j != i)
    load = torch.tensor([sum(phi(float(three[t, i]) - best(three[t], i)) for t in range(7)) for i in range(3)])
    assert balance_loss(three, three, torch.ones(3), 1.0).item() == pytest.approx(float(scv(three.softmax(-1).sum(0) / 3) + scv(load / 3)), rel=1e-6)


def test_the_least_loss_splits_tokens_inversely_to_latency():
    shares = torch.linspace(0.01, 0.99, 99).double()
    loss = torch.stack([scv(torch.tensor([6.0, 4.0]).double() * torch.stack([x, 1 - x])) for x in shares])
    assert shares[loss.argmin()].item() == pytest.approx(0.4) and loss.min() < 1e-12


def test_mixture_routes_scales_and_repeats():
    mlp, x = load("digits_vit").blocks[0].mlp, torch.from_numpy(f32(3, 16, 64))
    mix = Mixture(mlp, 64, generator=torch.Generator().manual_seed(0)).eval()
    nn.init.normal_(mix.gate.weight, generator=torch.Generator().manual_seed(1))
    y, p = mix(x), (x @ mix.gate.weight.T).softmax(-1)
    assert torch.equal(mix.chosen, p.argmax(-1)) and 0 < mix.chosen.float().mean() < 1
    each = [mlp(x), shifted(mlp)(x)]
    assert torch.allclose(y, torch.stack([p[..., i:i + 1] * each[i] for i in (0, 1)])[mix.chosen, torch.arange(3)[:, None], torch.arange(16)], atol=1e-5)
    assert torch.equal(mix(x), y), "no noise at test"
    y.sum().backward()
    assert mix.gate.weight.grad.abs().sum() > 0, "the scale gives the router a gradient"
    runs = []
    for _ in range(2):
        noisy = Mixture(mlp, 64, generator=torch.Generator().manual_seed(5)).train()
        noisy(x)
        runs.append(noisy.chosen)
    assert torch.equal(*runs) and 0.2 < runs[0].float().mean() < 0.8, "a gate of zeros decides by noise"
    for bad in ((6.0,), (6.0, -1.0)):
        with pytest.raises(ValueError, match="latency="):
            Mixture(mlp, 64, latency=bad)
    for sigma, latency in ((0.0, torch.ones(2)), (0.5, torch.ones(3)), (0.5, torch.tensor([1.0, 0.0]))):
        with pytest.raises(ValueError, match="latency="):
            balance_loss(torch.zeros(4, 2), torch.zeros(4, 2), latency, sigma)


# --- bad input, sanitizers

def test_bad_input_is_named():
    Q, V = rng.random((1, 4, 3)) < 0.5, f32(1, 4, 2)
    for q, k, v, error, match in [(Q.astype(int), Q, V, TypeError, "Q: should be an array of bool, has int64"), (Q, Q, V.astype(float), TypeError, "V: .*float32"), (Q, Q[:, :3], V, ValueError, "K: should be"), (Q, Q[..., :2], V, ValueError, "K, V: K should have the shape"),
                                  (Q, Q, f32(1, 4, 65), ValueError, "at most 64"), (Q, Q, f32(1, 2, 4).transpose(0, 2, 1), ValueError, "V: should be contiguous"), (Q, Q, V * np.float32(np.nan), ValueError, "V: .*finite"), (Q, Q, None, TypeError, "V: .*was NoneType"), (Q[0], Q, V, ValueError, "Q: ")]:
        with pytest.raises(error, match=match):
            add_attention(q, k, v)
    X, codes = np.zeros((2, 3), np.int32), np.zeros((4, 3), np.int8)
    for x, c, error, match in [(X.astype(np.int64), codes, TypeError, "X: should be an array of int32"), (X, codes.astype(int), TypeError, "codes: .*int8"), (X[:, :2], codes, ValueError, "X: should be a matrix, contiguous"), (np.zeros((2, 2), np.int32), codes, ValueError, "codes: rows of X have 2"),
                               (X, codes + np.int8(17), ValueError, "codes: should be from -16 to 16"), (X[:0], codes, ValueError, "X: ")]:
        with pytest.raises(error, match=match):
            shift_gemm(x, c)


def test_kernels_are_clean():
    kernels = Module.from_file(s.Path(s.__file__).with_suffix(".cu"))
    counts, bits = np.zeros(3, np.uint64), np.array([[[5, 1], [7, 0], [0, 1]]], np.uint32)
    for name, grid, block, args in [("matadd", (3, 1), 64, (bits, f32(1, 33, 5), np.zeros((1, 3, 5), np.float32), 3, 33, 2, 5, counts)),
                                    ("popcount_scores", (1, 1, 1), (16, 16), (bits, bits, np.zeros((1, 3, 3), np.int32), 3, 2, counts)),
                                    ("shift_gemm", (1, 2), (16, 16), (np.ones((17, 19), np.int32), np.ones((5, 19), np.int8), np.zeros((17, 5), np.int64), 17, 5, 19, counts))]:
        report = check(kernels[name], grid, block, args)
        assert report.clean, f"{name}: {report}"
