"""lib/kernels/groups.py: packing, the grid of a group, storage, layers whose product is a function, bad input."""
import numpy as np
import pytest
import torch

from lib.kernels.groups import Groups, ProductLinear, pack, quantize, unpack, with_product
from lib.models import load

rng = np.random.default_rng(0)              # any data do, except where a comment says otherwise


def test_pack_is_two_codes_a_byte_low_half_first():
    u = np.arange(16, dtype=np.uint8)
    assert pack(u).tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    for shape in [(2,), (3, 8), (2, 3, 4)]:
        u = rng.integers(0, 16, shape, dtype=np.uint8)
        assert np.array_equal(unpack(pack(u)), u)


@pytest.mark.parametrize("M, K, g", [(1, 2, 2), (3, 96, 32), (7, 40, 8), (1, 128, 128)])
def test_each_weight_is_the_nearest_of_its_group(M, K, g):
    W = rng.standard_normal((M, K)) + rng.standard_normal((M, 1))
    q = quantize(W, g)
    assert (q.M, q.K, q.scale.shape) == (M, K, (M, K // g)) and q.bits_per_weight == 4 + 20 / g
    s, z = (np.repeat(a.astype(float), g, axis=1) for a in (q.scale, q.zero))
    levels = s[..., None] * (np.arange(16) - z[..., None])
    best = abs(W[..., None] - levels).min(-1)
    assert np.allclose(abs(W - q.values()), best, rtol=0, atol=1e-12)        # 1e-12: float64 rounding of numbers of order 1
    low, high = (op(W.reshape(M, -1, g), axis=-1) for op in (np.min, np.max))
    width = np.maximum(high, 0) - np.minimum(low, 0)
    assert np.allclose(q.scale.astype(float), width / 15, rtol=2.0**-11, atol=0)         # a scale of float16: half a unit in the last place
    assert abs(W - q.values()).max() <= (q.scale.astype(float) * 0.51 + width * 2.0**-11).max()     # half a step, and what the rounded scale misses at the ends


def test_values_on_the_grid_come_back():
    u, z = rng.integers(0, 16, (4, 6, 16), dtype=np.uint8), rng.integers(0, 16, (4, 6), dtype=np.uint8)
    u[..., 0], u[..., 1] = 0, 15                                             # the group's range is then the grid's
    scale = np.exp2(rng.integers(-6, 3, (4, 6))).astype(np.float16)          # powers of two: exact in float16
    q = Groups(pack(u.reshape(4, -1)), scale, z, 16)
    again = quantize(q.values(), 16)
    assert np.array_equal(again.codes, q.codes) and np.array_equal(again.scale, scale) and np.array_equal(again.zero, z)


def test_zeros_and_weights_below_float16():
    q = quantize(np.zeros((2, 8)), 4)
    assert not q.values().any() and (q.scale == 1).all()
    assert not quantize(np.full((1, 4), 1e-12), 4).values().any()            # its scale would be 0 in float16


def test_storage_counts_bits():
    q = quantize(rng.standard_normal((8, 64)), 16)
    assert q.bits_per_weight * 8 * 64 == 8 * q.codes.nbytes + 8 * q.scale.nbytes + 4 * q.zero.size


def test_layers_with_a_product_of_ours():
    model, seen = load("digits_mlp"), []
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def make(name, W):
        seen.append((name, W.shape))
        return None if name == "fc3" else lambda X: W @ X.T
    ours = with_product(model, make)
    assert seen == [("fc1", (128, 64)), ("fc2", (64, 128)), ("fc3", (10, 64))]
    assert isinstance(ours.fc1, ProductLinear) and isinstance(ours.fc3, torch.nn.Linear) and isinstance(model.fc1, torch.nn.Linear)
    assert torch.allclose(ours(x), model(x), atol=1e-4)                      # float32 sums of at most 128 terms of order 1, in two orders
    lm, tokens = load("shakespeare_lm"), torch.arange(12).reshape(2, 6)
    assert torch.allclose(with_product(lm, lambda name, W: lambda X: W @ X.T)(tokens), lm(tokens), atol=1e-4)


@pytest.mark.parametrize("call, error, message", [
    (lambda: pack(np.array([1, 2])), TypeError, "u: should be an array of uint8, was int64"),
    (lambda: pack([1, 2]), TypeError, "u: .* was list"),
    (lambda: pack(np.array([16, 0], np.uint8)), ValueError, "u: .*below 16, the largest is 16"),
    (lambda: pack(np.zeros((2, 3), np.uint8)), ValueError, r"u: .*even length, has shape \(2, 3\)"),
    (lambda: unpack(np.zeros(3)), TypeError, "packed: should be an array of uint8, was float64"),
    (lambda: quantize(np.zeros((2, 8)), 3), ValueError, "g=3: should be an even number"),
    (lambda: quantize(np.zeros((2, 8)), 0), ValueError, "g=0: should be an even number"),
    (lambda: quantize(np.zeros((2, 8)), 4.0), ValueError, "g=4.0: should be an even number"),
    (lambda: quantize(np.zeros((2, 8)), 6), ValueError, "group must divide the 8 weights"),
    (lambda: quantize(np.zeros(8), 4), ValueError, r"W: should be a matrix \[M, K\], has shape \(8,\)"),
    (lambda: quantize(np.full((1, 4), np.nan), 4), ValueError, "must be finite"),
    (lambda: quantize(np.array([[0.0, 2e6]]), 2), ValueError, "W: a scale of 1.33e.05 is beyond float16"),
    (lambda: Groups(np.zeros((2, 4), np.int8), np.ones((2, 1), np.float16), np.zeros((2, 1), np.uint8), 8), TypeError, "codes: should be an array of uint8, was int8"),
    (lambda: Groups(np.zeros((2, 4), np.uint8), np.ones((2, 1), np.float32), np.zeros((2, 1), np.uint8), 8), TypeError, "scale: should be an array of float16"),
    (lambda: Groups(np.zeros((2, 4), np.uint8), np.ones((2, 1), np.float16), np.zeros((2, 2), np.uint8), 8), ValueError, r"zero: should have shape \(2, 1\), has \(2, 2\)"),
    (lambda: Groups(np.zeros((2, 4), np.uint8), np.ones((1, 2), np.float16), np.zeros((2, 1), np.uint8), 8), ValueError, r"scale: should have shape \(2, 1\), has \(1, 2\)"),
    (lambda: Groups(np.zeros((2, 4), np.uint8), np.ones((2, 1), np.float16), np.full((2, 1), 16, np.uint8), 8), ValueError, "zero: should be at most 15, the largest is 16"),
    (lambda: Groups(np.zeros((2, 4), np.uint8), np.full((2, 1), np.inf, np.float16), np.zeros((2, 1), np.uint8), 8), ValueError, "scale: should be finite"),
    (lambda: Groups(np.zeros((2, 8), np.uint8)[:, ::2], np.ones((2, 1), np.float16), np.zeros((2, 1), np.uint8), 8), ValueError, "codes: should be C-contiguous"),
    (lambda: Groups(np.zeros(4, np.uint8), np.ones((2, 1), np.float16), np.zeros((2, 1), np.uint8), 8), ValueError, "codes: should be a matrix"),
    (lambda: Groups(np.zeros((2, 4), np.uint8), np.ones((2, 1), np.float16), np.zeros((2, 1), np.uint8), 6), ValueError, "g=6: should divide the 8 weights"),
])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
