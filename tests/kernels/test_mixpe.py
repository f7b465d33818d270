"""kernels/mixpe: every order of scaling against float64, exactly where arithmetic is exact; single products by enumeration; counted work; bad input; the sanitizers."""
import numpy as np
import pytest

from lib.cuda import check, gpu_available
from lib.kernels import mixpe
from lib.kernels.groups import Groups, pack, quantize, unpack
from lib.kernels.mixpe import ENERGY, ORDERS, energy, multiply, quantize_rows, scalings, shift_products, work

CU, PY = "lib/kernels/mixpe.cu", "lib/kernels/mixpe.py"
BREAKS = [
    ("the zero point is forgotten", CU, "(float)(dot - (Sum)zero", "(float)(dot - (Sum)0 * zero"),
    ("the tile is used before it is there", CU, "__syncthreads();                       // both tiles are complete", ""),
    ("the next tile is loaded too early", CU, "__syncthreads();                       // nobody reads them any more", ""),
    ("the second half of a long group is lost", CU, "k0 < g; k0 += STEP", "k0 < min(g, STEP); k0 += STEP"),
    ("halves of a byte are swapped in the warp kernel", CU, "x[(size_t)n * K + G * g + k + i]", "x[(size_t)n * K + G * g + k + 1 - i]"),
    ("subnormal numbers get an exponent", CU, "while (b > 0 && size < 0x400u) { size <<= 1; --b; }", ""),
    ("bit 3 of a signed code counts +8", CU, "(b == 3 ? top : 1) * shifted", "shifted"),
    ("a group's sum misses its first activation", CU, "Sum sum = (Sum)number(x[(size_t)at * g]);", "Sum sum = 0;"),
    ("scalings of a reused tile are not counted", PY, '"first": M * K * -(-N // reuse)', '"first": M * K'),
    ("the scale of a row is that of another", CU, "j.Y[(size_t)m * j.N + n] = y * j.x_scale[n]; COUNT(bytes, 4); }\n    COUNTED;\n}\n\n// One", "j.Y[(size_t)m * j.N + n] = y * j.x_scale[0]; COUNT(bytes, 4); }\n    COUNTED;\n}\n\n// One"),
]
rng = np.random.default_rng(0)              # any data do: the kernels' only branch on values is that of the shifts, which is enumerated
pytestmark = pytest.mark.usefixtures("compiler")
SIZES = [(1, 1, 2, 2), (17, 5, 96, 32), (33, 18, 80, 40), (3, 1, 132, 66), (16, 16, 64, 64), (1, 20, 12, 4)]     # M, N, K, g: tiles of 16 x 16, steps of 32
CASES = [(o, False) for o in ORDERS] + [("first", True), ("after", True)]


def dyadic(M, K, g):
    """Weights with scales of few bits: every sum of the sizes above is exact in float32, and every scaled weight in float16."""
    u, z = rng.integers(0, 16, (M, K), dtype=np.uint8), rng.integers(0, 16, (M, K // g), dtype=np.uint8)
    return Groups(pack(u), (rng.integers(1, 8, z.shape) / 64).astype(np.float16), z, g)


def real(kind, N, K):
    X = rng.standard_normal((N, K))
    return (X.astype(np.float16), None) if kind == "a16" else quantize_rows(X)


# ------------------------------------------------------------------------------------------------ products
@pytest.mark.parametrize("order, warp", CASES)
@pytest.mark.parametrize("M, N, K, g", SIZES)
def test_exact_arithmetic_gives_exact_products(M, N, K, g, order, warp):
    """Integers times dyadic scales: sums stay below 2^24 units of 2^-6, so float32 holds them, whatever the order."""
    W = dyadic(M, K, g)
    q = rng.integers(-128, 128, (N, K), dtype=np.int8)
    assert np.array_equal(multiply(W, q, order=order, warp=warp).Y, W.values() @ q.T.astype(float))
    h = (rng.integers(-64, 65, (N, K)) / 8).astype(np.float16)               # multiples of 1/8 below 8: likewise
    assert np.array_equal(multiply(W, h, order=order, warp=warp).Y, W.values() @ h.T.astype(float))


@pytest.mark.parametrize("order, warp", CASES)
@pytest.mark.parametrize("kind", ["a8", "a16"])
@pytest.mark.parametrize("M, N, K, g", SIZES[1:4])
def test_rounding_stays_within_the_derived_bound(M, N, K, g, kind, order, warp):
    W = quantize(rng.standard_normal((M, K)), g)
    X, scale = real(kind, N, K)
    values = X.astype(float) * (1 if scale is None else scale[:, None].astype(float))
    off = abs(multiply(W, X, scale, order=order, warp=warp).Y - W.values() @ values.T)
    eps = 2.0**-24
    if order in ("first", "once"):          # each weight rounded to float16, then K float32 additions
        bound = (abs(W.values()) @ abs(values).T) * (2.0**-11 + 2 * K * eps)
    else:                                   # K additions of code times activation and of the sums, before the zero is taken off; a few roundings a group
        s, z = (np.repeat(a.astype(float), g, axis=1) for a in (W.scale, W.zero))
        bound = (s * (unpack(W.codes) + z)) @ abs(values).T * 2 * (K + 8) * eps
    assert (off <= bound).all(), (off / bound).max()


@pytest.mark.parametrize("kind", ["a8", "a16"])
def test_shifts_give_the_same_bits_as_multiplications(kind):
    W, (X, s) = quantize(rng.standard_normal((18, 96)), 32), real(kind, 17, 96)
    assert np.array_equal(multiply(W, X, s, order="shift").Y, multiply(W, X, s, order="after").Y)


def test_rows_of_activations_are_quantized_to_the_nearest():
    X = rng.standard_normal((5, 40)) * np.array([[1], [100], [0.01], [1], [0]])
    q, s = quantize_rows(X)
    assert q.dtype == np.int8 and s.dtype == np.float32 and abs(q.astype(int)).max(1).tolist() == [127] * 4 + [0]
    assert np.allclose(s[:4], abs(X[:4]).max(1) / 127, rtol=1e-6)            # a float32 of a float64
    assert (abs(q * s[:, None].astype(float) - X) <= s[:, None] * 0.5001).all()


def test_int32_holds_the_largest_group():
    g = 4096
    W = Groups(np.full((1, g // 2), 255, np.uint8), np.ones((1, 1), np.float16), np.zeros((1, 1), np.uint8), g)
    X = np.full((1, g), -128, np.int8)
    for order in ("after", "shift"):
        assert multiply(W, X, order=order).Y == -128 * 15 * g               # 23 bits: also exact as float32


# ------------------------------------------------------------------------------------------------ single products
@pytest.mark.parametrize("signed", [False, True])
def test_all_int8_products(signed):
    a, u = np.repeat(np.arange(-128, 128).astype(np.int8), 16), np.tile(np.arange(16, dtype=np.uint8), 256)
    v = (u.astype(int) ^ 8) - 8 if signed else u.astype(int)
    product, shifts, adds = shift_products(a, u, signed)
    bits = u[:, None] >> np.arange(4) & 1
    assert np.array_equal(product, a * v)
    assert shifts == bits[:, 1:].sum() and adds == np.maximum(bits.sum(1) - 1, 0).sum()
    one = shift_products(a[-1:], np.array([15], np.uint8), signed)
    assert one[1:] == (3, 3)                                                 # the most that a product takes: bit 0 is not shifted


@pytest.mark.parametrize("signed", [False, True])
def test_all_float16_products(signed):
    h = np.arange(65536).astype(np.uint16).view(np.float16)
    a, u = np.repeat(h[np.isfinite(h)], 16), np.tile(np.arange(16, dtype=np.uint8), int(np.isfinite(h).sum()))
    v = (u.astype(int) ^ 8) - 8 if signed else u.astype(int)
    exact, top = a.astype(float) * v, np.where(u > 0, 2.0 ** np.floor(np.log2(np.maximum(u, 1))), 1)
    fits = abs(a.astype(float)) * top < 65536                                # no shifted copy overflows
    wide, narrow, naive = shift_products(a, u, signed)
    assert np.array_equal(wide[fits], exact[fits]) and not np.isfinite(wide[~fits]).any()
    small = fits & (abs(exact) < 65504) & (abs(a.astype(float)) * u < 65504)
    unit = np.spacing((abs(a[small].astype(float)) * u[small]).astype(np.float16)).astype(float)     # of the sum of the sizes, the largest on the way
    assert (abs(narrow[small].astype(float) - exact[small]) <= 1.5 * unit).all()                     # three additions, half a unit each
    normal = (abs(a.astype(float)) >= 2.0**-14)
    assert np.array_equal(naive[small & normal], narrow[small & normal])
    one = np.isin(u, (2, 4, 8))              # a single shift: of zero and subnormal numbers it gives (1024 + f) 2^(b-1) units instead of f 2^b, and f < 1024
    assert (naive != narrow)[~normal & one].all()
    infinite = shift_products(np.array([np.inf, -np.inf], np.float16), np.array([6, 6], np.uint8))[0]
    assert infinite.tolist() == [np.inf, -np.inf] and np.isnan(shift_products(np.array([np.nan], np.float16), np.array([3], np.uint8))[0])


# ------------------------------------------------------------------------------------------------ counts
@pytest.mark.parametrize("kind, size", [("a8", 1), ("a16", 2)])
@pytest.mark.parametrize("M, N, K, g", SIZES[1:5])
def test_counted_work(M, N, K, g, kind, size):
    W = quantize(rng.standard_normal((M, K)), g)
    X, s = real(kind, N, K)
    across, down, sides = -(-N // 16), -(-M // 16), 3 * M * K // g           # tiles; bytes of scales and zeros
    inside, sums = size * N * K * down + 4 * M * N, size * N * K + 4 * N * K // g
    bits = unpack(W.codes)[..., None] >> np.arange(4) & 1
    expected = {"first": (M * K * across, M * K * across, 0, 0, 0, (M * K // 2 + sides) * across + inside),
                "once": (M * K, M * K, 0, 0, 0, M * K // 2 + sides + 2 * M * K * (1 + across) + inside),
                "after": (M * N * K // g, M * N * K // g, N * (K - K // g), 0, 0, (M * K // 2 + sides) * across + inside + sums + 4 * N * K // g * down)}
    expected["shift"] = (*expected["after"][:3], N * bits[..., 1:].sum(), N * np.maximum(bits.sum(-1) - 1, 0).sum(), expected["after"][5])
    for order, counts in expected.items():
        p = multiply(W, X, s, order=order, count=True)
        assert (p.scalings, p.zeros, p.sums, p.shifts, p.adds, p.bytes) == counts, order
        assert p.scalings == scalings(M, N, K, g, order)
    p = multiply(W, X, s, order="first", warp=True, count=True)
    assert p.scalings == p.zeros == scalings(M, N, K, g, "first", reuse=1) == M * N * K and p.bytes == N * (M * K // 2 + sides) + M * N * (size * K + 4)
    p = multiply(W, X, s, order="after", warp=True, count=True)
    assert p.scalings == M * N * K // g and p.bytes == N * (M * K // 2 + sides) + M * N * (size * K + 4 + 4 * K // g) + sums
    assert multiply(W, X, s).scalings is None


def test_scaling_after_the_group_costs_n_over_g_of_scaling_once():
    for N, g in [(1, 32), (64, 128), (128, 128), (256, 64)]:
        assert scalings(48, N, 256, g, "after") * g == scalings(48, N, 256, g, "once") * N


def test_the_price_list():
    M, N, K, g = 4, 8, 64, 32
    macs, groups = M * N * K, M * N * K // g
    w = work(M, N, K, g, "shift")
    assert w["products"] == dict.fromkeys(ENERGY, 0) | {"int16 add": 3 * macs, "int32 add": macs}
    assert w["scales"] == dict.fromkeys(ENERGY, 0) | {"int8 mul": 2 * groups, "int32 add": groups, "fp16 mul": groups, "fp16 add": groups}
    assert w["sums"] == dict.fromkeys(ENERGY, 0) | {"int32 add": N * (K - K // g)}
    w = work(M, N, K, g, "once", "a16")
    assert w["products"] == dict.fromkeys(ENERGY, 0) | {"fp16 mul": macs, "fp16 add": macs} and not any(w["sums"].values())
    assert w["scales"] == dict.fromkeys(ENERGY, 0) | {"int8 add": M * K, "fp16 mul": M * K}
    assert work(M, N, K, g, "shift", "a16", "fp16 add")["products"] == dict.fromkeys(ENERGY, 0) | {"fp16 add": 4 * macs, "int8 add": 4 * macs}
    assert work(M, N, K, g, "after", "a16")["scales"] == dict.fromkeys(ENERGY, 0) | {"fp16 mul": 2 * groups, "fp16 add": 2 * groups}
    assert energy({"int8 mul": 3, "int32 add": 2}) == pytest.approx(3 * 0.2 + 2 * 0.1)


# ------------------------------------------------------------------------------------------------ bad input
good = quantize(rng.standard_normal((2, 8)), 4)
q8 = np.zeros((3, 8), np.int8)


@pytest.mark.parametrize("call, error, message", [
    (lambda: multiply(np.zeros((2, 8)), q8), TypeError, r"W: should be Groups, see groups.quantize\(\); was ndarray"),
    (lambda: multiply(good, q8.astype(np.float32)), TypeError, "X: should be an array of int8 or float16, was float32"),
    (lambda: multiply(good, [[1]]), TypeError, "X: .* was list"),
    (lambda: multiply(good, q8[:, :4]), ValueError, r"X: should be a matrix \[N, 8\], has shape \(3, 4\)"),
    (lambda: multiply(good, q8[:0]), ValueError, r"has shape \(0, 8\)"),
    (lambda: multiply(good, np.zeros((3, 16), np.int8)[:, ::2]), ValueError, "X: should be C-contiguous"),
    (lambda: multiply(good, q8.T.copy().T), ValueError, "X: should be C-contiguous"),
    (lambda: multiply(good, np.full((1, 8), np.nan, np.float16)), ValueError, "X: should be finite"),
    (lambda: multiply(good, q8, order="before"), ValueError, "order='before': should be one of first, once, after, shift"),
    (lambda: multiply(good, q8, order="once", warp=True), ValueError, "order='once': .* with warp=True, first or after"),
    (lambda: multiply(good, q8, np.ones(2, np.float32)), ValueError, "x_scale: should be 3 finite numbers of float32"),
    (lambda: multiply(good, q8, np.ones(3)), ValueError, "x_scale: should be 3 finite numbers of float32"),
    (lambda: multiply(good, q8, np.array([1, np.inf, 1], np.float32)), ValueError, "x_scale: should be 3 finite"),
    (lambda: multiply(Groups(np.zeros((1, 2**19), np.uint8), np.ones((1, 1), np.float16), np.zeros((1, 1), np.uint8), 2**20), np.zeros((1, 2**20), np.int8)), ValueError, "g=1048576: .*beyond int32"),
    (lambda: shift_products(q8[0], np.zeros(8, np.int8)), TypeError, "a, u: .*were int8 and int8"),
    (lambda: shift_products(q8[0], np.zeros(7, np.uint8)), ValueError, r"one length, have shapes \(8,\) and \(7,\)"),
    (lambda: shift_products(q8[0], np.array([16] + 7 * [0], np.uint8)), ValueError, "u: .*below 16, the largest is 16"),
    (lambda: quantize_rows(np.array([[1.0, np.nan]])), ValueError, "must be finite"),
    (lambda: quantize_rows(np.ones(3)), ValueError, r"X: should be a matrix \[N, K\], has shape \(3,\)"),
    (lambda: work(1, 1, 2, 2, "once", "a4"), ValueError, "kind='a4'"),
])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------------------------ the kernels themselves
@pytest.mark.parametrize("name", ["tile_a8", "warp_a16", "sums_a8"])
def test_no_race_and_nothing_out_of_bounds(name):
    M, N, K, g = 17, 3, 80, 40                                               # ragged tiles, and a ragged second step in a group
    W, counts = quantize(rng.standard_normal((M, K)), g), np.zeros(6, np.uint64)
    (q, s), h, sums, Y = quantize_rows(rng.standard_normal((N, K))), np.ones((N, K), np.float16), np.zeros((N, 2), np.int32), np.zeros((M, N), np.float32)
    head = (W.codes, np.zeros((M, K), np.float16), W.scale, W.zero)
    grid, block, args = {
        "tile_a8": ((1, 2), (16, 16), (*head, q, s, sums, Y, M, N, K, g, ORDERS["after"], counts)),
        "warp_a16": ((3, N), (32, 8), (*head, h, s, sums.astype(np.float32), Y, M, N, K, g, ORDERS["after"], counts)),
        "sums_a8": (1, 32, (q, sums, 6, g, counts)),
    }[name]
    report = check(mixpe._kernels(False)[name], grid, block, args)
    assert report.clean, str(report)


@pytest.mark.gpu
def test_the_gpu_agrees():
    there, why = gpu_available()
    if not there:
        pytest.skip(f"no GPU: {why}")
    import cupy
    W = dyadic(40, 256, 64)
    q = rng.integers(-128, 128, (20, 256), dtype=np.int8)
    for order, warp in CASES:
        made = multiply(W.on(cupy), cupy.asarray(q), order=order, warp=warp, count=True)
        assert np.array_equal(cupy.asnumpy(made.Y), W.values() @ q.T.astype(float)) and made.scalings == scalings(40, 20, 256, 64, order, 1 if warp else 16)
