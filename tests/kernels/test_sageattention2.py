"""kernels/sageattention2: exact attention without quantizers, the quantized kernel against a slow oracle, E4M3 against torch, groups by loops, counted work, bad input, the sanitizers."""
import numpy as np
import pytest
import torch

from lib.cuda import check, gpu_available
from lib.kernels import sageattention2
from lib.kernels.sageattention2 import ACCUMULATORS, PER, TILE, Recipe, attend, centre, delta_s, quantize, similarity, to_e4m3

CU, PY = "lib/kernels/sageattention2.cu", "lib/kernels/sageattention2.py"
BREAKS = [
    ("the mean of K is taken a tile at a time", PY, "k = centre(K)[0] if", "k = centre(K, TILE)[0] if"),
    ("Delta S is subtracted", CU, "if (smooth) s += delta", "if (smooth) s -= delta"),
    ("values overwrite keys that others still need", CU, "__syncthreads();                            // nobody needs the keys any more", ""),
    ("the next keys overwrite values that others still need", CU, "__syncthreads();                            // nobody needs the values any more", ""),
    ("weights are added up after they are rounded", CU, "sum += weight; ", "sum += fp8 ? nearest(448.0f * weight, &e, &m) / 448.0f : weight; "),
    ("E4M3 has one exponent more", CU, "- 127, -6);", "- 127, -7);"),
    ("a token does not see itself", CU, "causal && start + j > row", "causal && start + j >= row && row > 0"),
    ("the groups of a thread are consecutive rows of K", PY, "((8, 4, 2), (2, 4))", "((4, 16), 3)"),
    ("negative codes are rounded to the wrong side", PY, "np.copysign(np.float32(0.5), codes)", "np.float32(0.5)"),
    ("the pad counts in the mean of the last tile", PY, "rows / (n - rows * (tiles - 1))", "1"),
    ("the short accumulator is too long", CU, "& ~1023)", "& ~511)"),
    ("the mean of V is forgotten", PY, "centre(V) if recipe.smooth_v", "(centre(V)[0], zeros(heads, 1, d)) if recipe.smooth_v"),
    ("1 / sqrt(D) leaves Delta S out", CU, "if (smooth) s += delta[((size_t)head * gridDim.x + blockIdx.x) * N + start + j];", "if (smooth) s += delta[((size_t)head * gridDim.x + blockIdx.x) * N + start + j] / scale;"),
]
rng = np.random.default_rng(0)                   # data are generic: nothing below depends on the draw
pytestmark = pytest.mark.usefixtures("compiler")
OFF = dict(fp8=False, accumulator="wide")        # weights and values in float32
SIZES = [(2, 1, 1, 16), (1, 5, 70, 32), (2, 130, 130, 16), (1, 257, 64, 64), (1, 128, 193, 32)]     # heads, M, N, D; tiles are 128 and 64


def draw(heads, m, n, d, bias=0.0):
    """Float32 Q, K, V, with `bias` on two channels of Q and K, and on those of V."""
    Q, K, V = (rng.standard_normal((heads, rows, d)).astype(np.float32) for rows in (m, n, n))
    Q[..., 3] += np.float32(bias)
    K[..., [3, 5]] -= np.float32(bias)
    return Q, K, V + np.float32(bias / 3)


def exact(Q, K, V, causal=False):
    return torch.nn.functional.scaled_dot_product_attention(*(torch.from_numpy(x).double() for x in (Q, K, V)), is_causal=causal).numpy()


def rounding(Q, K, V):
    """Float32 bound of |out - exact|, u = 2^-24. Errors of the means themselves cancel (what is taken off is put back, or is a row constant). A score adds D products twice over, of numbers rounded once: off by
    s = (2 D + 12) u S, S the largest sum of (|q| + |mean|) (|k| + |mean|). That makes weights wrong by 2 s; their sum and that of n values add (n + 16) u each."""
    u, n, d = 2.0**-24, K.shape[1], Q.shape[2]
    S = ((abs(Q) + abs(centre(Q, TILE)[1]).max(1, keepdims=True)) @ (abs(K) + abs(centre(K)[1])).mT).max() / np.sqrt(d)
    return abs(V).max() * (2 * u * (2 * d + 12) * S + 2 * (n + 16) * u)


# ------------------------------------------------------------------------------------------------ nothing quantized
@pytest.mark.parametrize("heads, m, n, d", SIZES)
@pytest.mark.parametrize("smooth", [dict(smooth_q=a, smooth_k=b, smooth_v=c) for a, b, c in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]], ids=str)
def test_without_quantizers_it_is_attention(heads, m, n, d, smooth):
    for bias in (0.0, 4.0):
        Q, K, V = draw(heads, m, n, d, bias)
        for causal in (False, True)[:1 + (m == n)]:
            off = abs(attend(Q, K, V, Recipe(bits=None, **smooth, **OFF), causal).out - exact(Q, K, V, causal)).max()
            assert off <= rounding(Q, K, V)


def test_smoothing_is_an_identity_in_float64():
    """Rounding of float64 only: scores are about 10, sums of 32 products; 1e-12 leaves a factor of a hundred."""
    Q, K, V = (x.astype(float) for x in draw(2, 300, 200, 32, 5.0))
    (q, mean), (k, _), (v, v_mean) = centre(Q, TILE), centre(K), centre(V)
    S = q @ k.swapaxes(1, 2) + np.repeat(mean, TILE, 1)[:, :300] @ k.swapaxes(1, 2)
    P = torch.softmax(torch.from_numpy(S) / 32**0.5, -1).numpy()
    np.testing.assert_allclose(P @ v + v_mean, exact(Q, K, V), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n, rows", [(1, None), (70, None), (128, 128), (129, 128), (300, 128), (5, 128)])
def test_centre_takes_the_mean_of_each_tile(n, rows):
    x = rng.standard_normal((2, n, 4)) + 3
    centred, mean = centre(x, rows)
    for i, start in enumerate(range(0, n, rows or n)):
        tile = x[:, start:start + (rows or n)]
        np.testing.assert_allclose(mean[:, i], tile.mean(1), rtol=1e-13)          # order of a float64 sum
        np.testing.assert_allclose(centred[:, start:start + tile.shape[1]], tile - tile.mean(1, keepdims=True), atol=1e-13)


# ------------------------------------------------------------------------------------------------ E4M3
def test_e4m3_is_torchs():
    """All 253 numbers of the format, the points between neighbours (ties) and their float32 neighbours, and random numbers; torch gives NaN beyond 464, here it stays at 448."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    every = np.unique(every[np.isfinite(every)])
    middle = ((every[1:] + every[:-1]) / 2).astype(np.float32)
    random = (rng.standard_normal(20000) * 10.0 ** rng.uniform(-4, 2.5, 20000)).astype(np.float32)
    x = np.concatenate([every, middle, np.nextafter(middle, np.float32(500)), np.nextafter(middle, np.float32(-500)), random[abs(random) <= 448], [np.float32(-0.0)]])
    np.testing.assert_array_equal(to_e4m3(x), torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy())
    np.testing.assert_array_equal(to_e4m3(np.array([1e9, -460, -1e30], np.float32)), [0x7e, 0xfe, 0xfe])


# ------------------------------------------------------------------------------------------------ codes and scales
def label(t, side, per, n):
    """The group of row t, in words of the paper."""
    if per == "tensor":
        return 0
    if per == "token":
        return t
    if side == "q":
        return {"block": t // 128, "warp": t // 32, "thread": (t // 32, t % 8)}[per]
    return {"block": t // 64, "warp": t // 64, "thread": (t // 64, t % 8 // 2)}[per]


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("bits, n", [(4, 1), (4, 64), (8, 150), (2, 130)])
def test_codes_and_scales_of_groups(side, per, bits, n):
    x = (rng.standard_normal((2, n, 16)) * rng.uniform(0.5, 2, (2, n, 1))).astype(np.float32)
    x[:, 0, 0] = 0
    codes, scale = quantize(x, bits, side, per)
    top = 2 ** (bits - 1) - 1
    assert codes.dtype == np.int8 and codes.shape == x.shape and scale.dtype == np.float32 and abs(codes).max() == top
    groups = [label(t, side, per, n) for t in range(n)]
    for h in range(2):
        for g in set(groups):
            rows = [t for t in range(n) if groups[t] == g]
            np.testing.assert_allclose(scale[h, rows], abs(x[h, rows]).max() / top + 1e-7, rtol=1e-6)      # three float32 roundings
    np.testing.assert_array_equal(codes, np.sign(x) * np.floor(abs(x / scale[..., None]) + np.float32(0.5)))


def test_rounding_is_half_away_from_zero():
    x = np.zeros((1, 1, 16), np.float32)
    x[0, 0, :5] = 7, 2.5, -2.5, 0.5, -1.4
    x *= 1024                                    # so that the 1e-7 of the scale is below float32's last place
    np.testing.assert_array_equal(quantize(x, 4, "q")[0][0, 0, :5], [7, 3, -3, 1, -1])


def test_equal_keys_and_zeros_stay_finite():
    Q, _, V = draw(1, 5, 9, 16)
    K = np.full((1, 9, 16), np.float32(0.75))    # its mean is exact: nothing is left
    for V_ in (V, np.zeros_like(V)):
        for recipe in (Recipe(), Recipe(8, smooth_v=True)):
            np.testing.assert_allclose(attend(Q, K, V_, recipe).out, np.repeat(V_.mean(1, keepdims=True), 5, 1), atol=abs(V_).max() / 16 + 1e-6)   # all weights are 1, V is off by 2^-4 at most


# ------------------------------------------------------------------------------------------------ the quantized kernel
def e4m3(x):
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(torch.float8_e4m3fn).float().numpy()


def shortened(x):
    return (x.view(np.int32) & ~1023).view(np.float32)


def oracle(Q, K, V, r, causal):
    """Row by row and key tile by key tile, in float32 and the kernel's order of sums."""
    f, out = np.float32, np.zeros_like(Q)
    (heads, m, d), n = Q.shape, K.shape[1]
    k = centre(K)[0] if r.smooth_k else K
    q, mean = centre(Q, TILE) if r.smooth_q else (Q, None)
    v, v_mean = centre(V) if r.smooth_v else (V, np.zeros((heads, 1, d), f))
    (qc, qs), (kc, ks) = quantize(q, r.bits, "q", r.per), quantize(k, r.bits, "k", r.per)
    v_scale = np.ones((heads, d), f)
    if r.fp8:
        v_scale = np.where(v.any(1), abs(v).max(1), f(448)) / f(448)
        v = e4m3(v / v_scale[:, None])
    for h in range(heads):
        for i in range(m):
            S = (kc[h].astype(int) @ qc[h, i].astype(int)).astype(f) * (qs[h, i] * ks[h])
            if r.smooth_q:
                S = S + np.add.accumulate(mean[h, i // TILE] * k[h], axis=1)[:, -1]
            S, most, total, acc = S * f(d**-0.5), f(-3e38), f(0), np.zeros(d, f)
            for start in range(0, i + 1 if causal else n, 64):
                s = S[start:min(start + 64, i + 1 if causal else n)]
                now = max(most, s.max())
                fade, p = np.exp(most - now), np.exp(s - now)
                total, most = total * fade + np.add.accumulate(p)[-1], now
                p = e4m3(f(448) * p) if r.fp8 else p
                part = acc * fade if r.accumulator == "short" else np.zeros(d, f)
                for at in range(0, len(p), 32):
                    terms = p[at:at + 32, None] * v[h, start + at:start + at + len(p[at:at + 32])]
                    part = np.add.accumulate(np.concatenate([part[None], terms]))[-1]
                    part = part if r.accumulator == "wide" else shortened(part)
                acc = part if r.accumulator == "short" else acc * fade + part
            out[h, i] = acc / total * v_scale[h] / f(448 if r.fp8 else 1) + v_mean[h, 0]
    return out


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(8, "warp", smooth_q=False), Recipe(4, "token", accumulator="short"), Recipe(4, "warp", smooth_k=False, smooth_v=True, accumulator="wide"),
                                    Recipe(8, "block", fp8=False, accumulator="short"), Recipe(3, "tensor", smooth_v=True, fp8=False)], ids=str)
def test_quantized_is_what_the_slow_oracle_says(recipe):
    """Same numbers in the same order, but for exp, which may differ in the last place. Where that moves a weight across a tie of E4M3, or a sum across a step of 13 bits, the entries of a row differ by more (1/16 of a weight, or
    2^-13): rare, a row in a hundred at most. All others agree to 1e-5 of the largest value."""
    for heads, m, n, d, causal in [(2, 3, 70, 16, False), (1, 131, 131, 16, True), (1, 2, 1, 32, False)]:
        Q, K, V = draw(heads, m, n, d, 3.0)
        off = abs(attend(Q, K, V, recipe, causal).out - oracle(Q, K, V, recipe, causal)) / abs(V).max()
        assert np.mean(off <= 1e-5) >= 0.98 and off.max() <= 1 / 16


def test_smoothing_pays_where_there_is_a_bias():
    Q, K, V = draw(4, 256, 256, 64, 8.0)
    ex, off = exact(Q, K, V), {}
    for sq, sk in [(False, False), (False, True), (True, False), (True, True)]:
        off[sq, sk] = np.linalg.norm(attend(Q, K, V, Recipe(4, "warp", sq, sk, **OFF)).out - ex)
    assert off[True, True] < 0.7 * min(off[False, True], off[True, False]) and max(off[False, True], off[True, False]) < off[False, False]


def test_keys_may_be_shifted_freely():
    """K + c is the same K once its mean is off. Integers and a constant that is one keep float32 exact, so the codes are the same."""
    Q, K, V = draw(1, 64, 64, 16)
    K = np.round(8 * K)
    np.testing.assert_allclose(attend(Q, K, V).out, attend(Q, K + np.float32(64), V).out, atol=1e-5)


def test_similarity():
    x = rng.standard_normal((2, 5, 16)).astype(np.float32)
    assert similarity(x, x) == pytest.approx(1) and similarity(2 * x, x) == pytest.approx(0, abs=1e-6) and similarity(1.25 * x, x) == pytest.approx(0.75)
    assert similarity(-x, x) == pytest.approx(1)                                    # -1 times 1 - 2: the product forgets the sign, as the paper has it


# ------------------------------------------------------------------------------------------------ counted work
@pytest.mark.parametrize("heads, m, n, d", SIZES)
def test_counted_work(heads, m, n, d):
    tiles, (Q, K, V) = -(-m // TILE), draw(heads, m, n, d)
    for recipe, each, size in ((Recipe(), 4, 2), (Recipe(None, **OFF), 1, 8), (Recipe(8, smooth_q=False, fp8=False), 4, 5)):
        made = attend(Q, K, V, recipe, count=True)
        assert (made.products, made.delta, made.bytes) == (heads * m * n * d // each, heads * tiles * n * d * recipe.smooth_q, heads * tiles * n * d * size)
        np.testing.assert_array_equal(made.out, attend(Q, K, V, recipe).out)
    assert attend(Q, K, V).products is None


def test_causal_skips_tiles():
    Q, K, V = draw(1, 256, 256, 16)
    assert attend(Q, K, V, causal=True, count=True).products == (128 * 128 + 128 * 256) * 4
    np.testing.assert_allclose(attend(Q, K, V, Recipe(None, smooth_q=False, smooth_k=False, **OFF), True).out[:, 0], V[:, 0], atol=1e-6 * abs(V).max())


# ------------------------------------------------------------------------------------------------ bad input
GOOD = draw(2, 6, 7, 16)


@pytest.mark.parametrize("call, error, message", [
    (lambda Q, K, V: attend(Q.astype(np.float64), K, V), TypeError, "Q: should be an array of float32, has float64"),
    (lambda Q, K, V: attend(Q, K.tolist(), V), TypeError, "K: should be an array of float32, was list"),
    (lambda Q, K, V: attend(Q[0], K, V), ValueError, r"Q: should have shape \('any', 'any', 'any'\) .*has \(6, 16\)"),
    (lambda Q, K, V: attend(Q, K[:, :0], V), ValueError, "K: should have shape .*not be empty"),
    (lambda Q, K, V: attend(Q, K[:1].copy(), V), ValueError, r"K: should have shape \(2, 'any', 16\)"),
    (lambda Q, K, V: attend(Q, K, V[:, :6].copy()), ValueError, r"V: should have shape \(2, 7, 16\)"),
    (lambda Q, K, V: attend(Q[:, ::2], K, V), ValueError, "Q: should be contiguous in C order"),
    (lambda Q, K, V: attend(Q, K, V * np.float32(np.nan)), ValueError, "V: should be finite"),
    (lambda Q, K, V: attend(*(x[:, :, :8].copy() for x in (Q, K, V))), ValueError, "Q: head size 8, these kernels serve 16, 32, 64"),
    (lambda Q, K, V: attend(Q, K, V, causal=True), ValueError, "causal: needs as many queries as keys, there are 6 and 7"),
    (lambda Q, K, V: attend(Q, K, V, 4), TypeError, "recipe: should be a Recipe, was int"),
    (lambda Q, K, V: Recipe(9), ValueError, "bits=9: should be an integer from 2 to 8"),
    (lambda Q, K, V: Recipe(1), ValueError, "bits=1"),
    (lambda Q, K, V: Recipe(True), ValueError, "bits=True"),
    (lambda Q, K, V: Recipe(per="lane"), ValueError, "per='lane': should be one of tensor, block, warp, thread, token"),
    (lambda Q, K, V: Recipe(accumulator="long"), ValueError, "accumulator='long': should be one of " + ", ".join(ACCUMULATORS)),
    (lambda Q, K, V: quantize(Q, 0, "q"), ValueError, "bits=0"),
    (lambda Q, K, V: quantize(Q, 4, "v"), ValueError, "side='v', per='thread': should be q or k"),
    (lambda Q, K, V: to_e4m3(np.array([np.inf], np.float32)), ValueError, "x: should be finite"),
    (lambda Q, K, V: to_e4m3(np.zeros(3)), TypeError, "x: should be an array of float32"),
])
def test_bad_input_is_named(call, error, message):
    kept = [x.copy() for x in GOOD]
    with pytest.raises(error, match=message):
        call(*GOOD)
    assert all(np.array_equal(a, b) for a, b in zip(kept, GOOD))


# ------------------------------------------------------------------------------------------------ the kernels themselves
@pytest.mark.parametrize("name", ["attend", "delta_s", "to_e4m3"])
def test_no_race_and_nothing_out_of_bounds(name):
    m, n, d = 130, 70, 16                        # two tiles of queries and of keys, ragged
    Q, K, V = draw(1, m, n, d)
    (q, q_scale), (k, k_scale), counts = quantize(Q, 4, "q"), quantize(K, 4, "k"), np.zeros(3, np.uint64)
    ones, delta, mean = np.ones((1, d), np.float32), np.zeros((1, 2, n), np.float32), centre(Q, TILE)[1]
    scales = [np.ascontiguousarray(x) for x in (q_scale, k_scale)]
    grid, block, args = {
        "attend": ((2, 1), 128, (q.view(np.int32), k.view(np.int32), to_e4m3(V).view(np.int32), *scales, delta, ones, ones, np.zeros_like(Q), m, n, 1, 1, 1, 2, 0, np.float32(0.25), counts)),
        "delta_s": ((1, 2, 1), 128, (mean, K, delta, n, counts)),
        "to_e4m3": (5, 256, (V, np.zeros(V.shape, np.uint8), V.size)),
    }[name]
    report = check(sageattention2._kernels(d, False)[name], grid, block, args)
    assert report.clean, str(report)


@pytest.mark.gpu
def test_the_gpu_agrees():
    there, why = gpu_available()
    if not there:
        pytest.skip(f"no GPU: {why}")
    import cupy
    for heads, m, n, d in SIZES:
        Q, K, V = draw(heads, m, n, d, 3.0)
        for recipe in (Recipe(), Recipe(None, smooth_v=True, **OFF)):
            made = attend(*map(cupy.asarray, (Q, K, V)), recipe, count=True)
            np.testing.assert_allclose(cupy.asnumpy(made.out), attend(Q, K, V, recipe).out, atol=0.1 * abs(V).max() if recipe.fp8 else 1e-4)    # a code may fall to the other side of a step
            assert made.products == heads * m * n * d // (4 if recipe.bits else 1)
    np.testing.assert_allclose(cupy.asnumpy(delta_s(cupy.asarray(centre(Q, TILE)[1]), cupy.asarray(K))), delta_s(centre(Q, TILE)[1], K), atol=1e-4)
