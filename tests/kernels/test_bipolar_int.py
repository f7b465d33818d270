"""kernels/bipolar_int: exact products at every pair of widths, counted work, the format's identities, bad input, and the kernels under the sanitizers."""
import numpy as np
import pytest

from lib.cuda import MissingTool, check, cpu, gpu_available
from lib.kernels import bipolar_int
from lib.kernels.bipolar_int import Planes, decode, encode, from_signed, matmul, pack, quantize, signed_product

BREAKS = [
    ("the top plane of W is dropped", "lib/kernels/bipolar_int.cu", "unsigned ones = 0;", "unsigned ones = 0; if (i == n_w - 1) continue;"),
    ("pad bits are counted as values", "lib/kernels/bipolar_int.cu", "unsigned most = (unsigned)K *", "unsigned most = (unsigned)KW * 32u *"),
    ("planes of X have no weight in the recovery", "lib/kernels/bipolar_int.cu", "* (1 << (i + j))", "* (1 << i)"),
    ("planes of W have no weight in the fused kernel", "lib/kernels/bipolar_int.cu", "differing += ones << (i + j);", "differing += ones << j;"),
    ("products are formed before the tile is there", "lib/kernels/bipolar_int.cu", "__syncthreads();\n        if (m < M && n < N)\n            for (int i", "if (m < M && n < N)\n            for (int i"),
    ("the next tile is loaded before all have read this one", "lib/kernels/bipolar_int.cu", "                }\n        __syncthreads();", "                }"),
    ("products on their way to memory are not counted", "lib/kernels/bipolar_int.cu", "= K - 2 * ones; COUNT(bytes, 4);", "= K - 2 * ones;"),
    ("packing forgets the end of a row", "lib/kernels/bipolar_int.cu", "row < rows && k < K ?", "row < rows && k < K / 32 * 32 ?"),
    ("values are even", "lib/kernels/bipolar_int.py", "- (2 ** n - 1)\n", "- 2 ** n\n"),
    ("signed codes are off by one", "lib/kernels/bipolar_int.py", "+ half).astype", "+ half - 1).astype"),
    ("the correction has the wrong sign", "lib/kernels/bipolar_int.py", "+ K) // 4", "- K) // 4"),
    ("overflow goes unnoticed", "lib/kernels/bipolar_int.py", ">= INT32:", ">= 2 * INT32:"),
    ("the staircase has a step at zero", "lib/kernels/bipolar_int.py", "np.floor(x / (2 * scale))", "np.round(x / (2 * scale))"),
    ("scales of rows are one for all", "lib/kernels/bipolar_int.py", "max(axis=axis,", "max(axis=None,"),
]
WIDTHS = range(1, 9)
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def compiler():
    try:
        cpu.compiler()
    except MissingTool as e:
        pytest.skip(str(e))


def codes(n, *shape):
    return rng.integers(0, 2**n, shape, dtype=np.uint8)


# ------------------------------------------------------------------------------------------------ parity with int64
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("n_w", WIDTHS)
def test_products_are_exact_at_every_pair_of_widths(n_w, fused):
    for n_x in WIDTHS:
        u, t = codes(n_w, 17, 77), codes(n_x, 5, 77)       # nothing is a multiple of a tile or a word
        Y = matmul(pack(u, n_w), pack(t, n_x), fused).Y
        assert Y.dtype == np.int32
        np.testing.assert_array_equal(Y, decode(u, n_w) @ decode(t, n_x).T)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (16, 16, 512), (33, 31, 513), (1, 40, 1100), (3, 2, 31), (3, 2, 32), (3, 2, 33)])
def test_products_are_exact_at_every_size(M, N, K, fused):
    u, t = codes(3, M, K), codes(5, N, K)
    np.testing.assert_array_equal(matmul(pack(u, 3), pack(t, 5), fused).Y, decode(u, 3) @ decode(t, 5).T)


@pytest.mark.parametrize("fused", [True, False])
def test_the_extreme_product_fits_int32_and_one_more_is_refused(fused):
    ends = np.array([[0], [255]], np.uint8)
    W = pack(np.repeat(ends, 33025, axis=1), 8)
    most = 33025 * 255 * 255
    np.testing.assert_array_equal(matmul(W, W, fused).Y, [[most, -most], [-most, most]])
    with pytest.raises(ValueError, match=r"K=33026: .* 8- and 8-bit values can reach .* = 2147515650, beyond int32; split K"):
        longer = pack(np.repeat(ends, 33026, axis=1), 8)
        matmul(longer, longer, fused)


def test_planes_are_the_bits_of_the_codes():
    u = codes(6, 11, 70)
    planes = pack(u, 6)
    assert (planes.n, planes.rows, planes.K, planes.words.shape) == (6, 11, 70, (6, 11, 3))
    bits = np.unpackbits(planes.words.view(np.uint8), axis=-1, bitorder="little")   # little endian, like every machine CUDA runs on
    np.testing.assert_array_equal(bits[..., :70], u[None] >> np.arange(6, dtype=np.uint8)[:, None, None] & 1)
    assert not bits[..., 70:].any()                        # equal pads add nothing to a XOR


# ------------------------------------------------------------------------------------------------ invariants
@pytest.mark.parametrize("n", WIDTHS)
def test_the_format_is_the_odd_numbers_each_once(n):
    u = np.arange(2**n, dtype=np.uint8)
    v = decode(u, n)
    np.testing.assert_array_equal(v, np.arange(-(2**n - 1), 2**n, 2))
    np.testing.assert_array_equal(v, sum(2**i * (2 * (u.astype(int) >> i & 1) - 1) for i in range(n)))
    np.testing.assert_array_equal(encode(v, n), u)
    s = np.arange(-2**(n - 1), 2**(n - 1))
    np.testing.assert_array_equal(decode(from_signed(s, n), n), 2 * s + 1)


def test_parity_and_bound():
    for n_w, n_x, K in [(1, 1, 40), (3, 2, 41), (8, 8, 100)]:
        Y = matmul(pack(codes(n_w, 20, K), n_w), pack(codes(n_x, 20, K), n_x)).Y.astype(int)
        assert ((Y - K) % 2 == 0).all()
        assert abs(Y).max() <= K * (2**n_w - 1) * (2**n_x - 1)


def test_signed_products_need_the_sums():
    a, b = rng.integers(-8, 8, (9, 50)), rng.integers(-4, 4, (7, 50))
    u, t = from_signed(a, 4), from_signed(b, 3)
    Y = matmul(pack(u, 4), pack(t, 3)).Y
    np.testing.assert_array_equal(signed_product(Y, decode(u, 4).sum(1), decode(t, 3).sum(1), 50), a @ b.T)


@pytest.mark.parametrize("M, N, K", [(17, 5, 77), (40, 33, 600)])
def test_counted_work(M, N, K):
    words = -(-K // 32)
    rows, columns = -(-M // 16), -(-N // 16)               # tiles
    for n_w, n_x in [(1, 1), (2, 3), (8, 4)]:
        W, X = pack(codes(n_w, M, K), n_w), pack(codes(n_x, N, K), n_x)
        fused, plain = matmul(W, X, True, count=True), matmul(W, X, False, count=True)
        np.testing.assert_array_equal(fused.Y, plain.Y)
        assert fused.popcounts == plain.popcounts == n_w * n_x * M * N * words
        assert (fused.bytes, plain.bytes) == (4 * M * N, 4 * M * N * (2 * n_w * n_x + 1))
        assert fused.words == words * (n_w * M * columns + n_x * N * rows)
        assert plain.words == words * n_w * n_x * (M * columns + N * rows)
        assert matmul(W, X).popcounts is None


# ------------------------------------------------------------------------------------------------ the quantizer
@pytest.mark.parametrize("n", WIDTHS)
def test_quantization_is_to_the_nearest_value(n):
    x = rng.standard_normal((6, 40))
    for axis, shape in ((None, (1, 1)), (1, (6, 1))):
        u, scale = quantize(x, n, axis)
        assert scale.shape == shape
        np.testing.assert_allclose((scale * (2**n - 1)), abs(x).max(axis=axis, keepdims=True), rtol=1e-15)
        grid = scale[..., None] * np.arange(-(2**n - 1), 2**n, 2)
        nearest = abs(x[..., None] - grid).min(-1)
        np.testing.assert_allclose(abs(x - scale * decode(u, n)), nearest, atol=1e-12)   # rounding at ties; values are of order 1
    np.testing.assert_array_equal(quantize(decode(np.arange(2**n, dtype=np.uint8), n)[None], n)[0], np.arange(2**n)[None])


def test_rows_of_zeros_stay_finite():
    u, scale = quantize(np.zeros((2, 3)), 4, axis=1)
    assert (scale == 1).all() and (abs(decode(u, 4)) == 1).all()     # no zero: the nearest values are +-1


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("call, error, message", [
    (lambda: pack(codes(2, 3, 4), 9), ValueError, "n=9: should be an integer from 1 to 8"),
    (lambda: pack(codes(2, 3, 4), 0), ValueError, "n=0: should be an integer from 1 to 8"),
    (lambda: quantize(np.ones(3), 2.5), ValueError, "n=2.5: should be an integer from 1 to 8"),
    (lambda: pack(codes(2, 3, 4).astype(np.int32), 2), TypeError, "codes: codes should have dtype uint8, have int32"),
    (lambda: pack([[1, 2]], 2), TypeError, "codes: .*was list"),
    (lambda: pack(np.array([[0, 4]], np.uint8), 2), ValueError, "codes: codes of 2 bits should be below 4, the largest is 4"),
    (lambda: pack(codes(2, 3), 2), ValueError, r"codes: should be a matrix \[rows, K\], has shape \(3,\)"),
    (lambda: pack(codes(2, 3, 0), 2), ValueError, r"has shape \(3, 0\)"),
    (lambda: matmul(pack(codes(2, 3, 4), 2), pack(codes(2, 3, 5), 2)), ValueError, "X: rows of W have 4 values, rows of X have 5"),
    (lambda: matmul(codes(2, 3, 4), pack(codes(2, 3, 4), 2)), TypeError, r"W: should be Planes, see pack\(\); was ndarray"),
    (lambda: encode(np.array([1, 0]), 2), ValueError, "v: should be odd numbers from -3 to 3; there is no zero"),
    (lambda: encode(np.array([5]), 2), ValueError, "v: should be odd numbers from -3 to 3"),
    (lambda: encode(np.array([1.0]), 2), TypeError, "v: should be integers, has dtype float64"),
    (lambda: from_signed(np.array([2]), 2), ValueError, "s: should be from -2 to 1"),
    (lambda: from_signed(np.array([0.5]), 2), TypeError, "s: should be integers"),
    (lambda: quantize(np.array([1.0, np.nan]), 2), ValueError, "x: should be finite, has NaN or infinity"),
    (lambda: decode(np.array([4], np.uint8), 2), ValueError, "u: codes of 2 bits should be below 4"),
])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------------------------ the kernels themselves
@pytest.mark.parametrize("name", ["pack", "fused", "plane_products", "recover"])
def test_no_race_and_nothing_out_of_bounds(name):
    M, N, K, n_w, n_x = 17, 3, 600, 2, 1                   # two steps along K, ragged tiles
    W, X, counts = pack(codes(n_w, M, K), n_w).words, pack(codes(n_x, N, K), n_x).words, np.zeros(3, np.uint64)
    P, Y = np.zeros((n_w * n_x, M, N), np.int32), np.zeros((M, N), np.int32)
    grid, block, args = {
        "pack": ((19, 3), (32, 8), (codes(n_w, M, K), np.zeros_like(W), M, K, n_w)),
        "fused": ((1, 2), (16, 16), (W, X, Y, M, N, K, n_w, n_x, counts)),
        "plane_products": ((1, 2, 2), (16, 16), (W, X, P, M, N, K, n_x, counts)),
        "recover": (1, 256, (P, Y, M * N, n_w, n_x, counts)),
    }[name]
    report = check(bipolar_int._kernels(False)[name], grid, block, args)
    assert report.clean, str(report)


@pytest.mark.gpu
def test_the_gpu_agrees():
    there, why = gpu_available()
    if not there:
        pytest.skip(f"no GPU: {why}")
    import cupy
    for n_w, n_x, M, N, K in [(1, 8, 17, 5, 77), (4, 4, 100, 60, 1000)]:
        u, t = codes(n_w, M, K), codes(n_x, N, K)
        W, X = pack(cupy.asarray(u), n_w), pack(cupy.asarray(t), n_x)
        for fused in (True, False):
            made = matmul(W, X, fused, count=True)
            np.testing.assert_array_equal(cupy.asnumpy(made.Y), decode(u, n_w) @ decode(t, n_x).T)
            assert made.popcounts == n_w * n_x * M * N * -(-K // 32)
    assert isinstance(W, Planes)
