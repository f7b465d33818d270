"""The uniform quantizer, and the survey's toolbox around it."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from lib import models
from lib.number_formats import quantization_survey as survey
from lib.number_formats.uniform import (RANGES, StraightThrough, Uniform, codes, integer_matmul, mse_range, percentile_range, rows,
                                        scale_zero)

UNIFORM, SURVEY = "lib/number_formats/uniform.py", "lib/number_formats/quantization_survey.py"
BREAKS = [
    ("rounds towards zero", UNIFORM, "return torch.round(r * (1 / scale)) + zero", "return torch.trunc(r * (1 / scale)) + zero"),
    ("the symmetric scale is one code too coarse", UNIFORM, "2 ** (bits - 1) - 1)\n    else:", "2 ** (bits - 1) - 2 + (bits < 3))\n    else:"),
    ("the zero point has the wrong sign", UNIFORM, "torch.round(-low / scale)", "torch.round(low / scale)"),
    ("the straight-through gradient ignores clipping", UNIFORM, "return grad * inside,", "return grad,"),
    ("the cross term of the zero points is forgotten", UNIFORM, " + qa.shape[1] * za * zb", ""),
    ("the MSE search keeps the worst", UNIFORM, "better = error < best", "better = error > best * (best < torch.inf)"),
    ("group scales are counted once", UNIFORM, "side = self.scale.numel() * ", "side = "),
    ("NaN passes", UNIFORM, "if not torch.isfinite(r).all():", "if False:"),
    ("rounding and clipping errors trade places", SURVEY, "(squared * inside).mean().item(), (squared * ~inside)", "(squared * ~inside).mean().item(), (squared * inside)"),
    ("Lloyd-Max takes the sum for the mean", SURVEY, "total / count.clamp(min=1)", "total"),
    ("KL forgets the clipped mass", SURVEY, "p[-1] += counts[edge:].sum()", "p[-1] += 0"),
    ("the dyadic shift is off by one", SURVEY, "return round(math.ldexp(x, n)), n", "return round(math.ldexp(x, n)), n + 1"),
    ("the optimizer trains a frozen copy", SURVEY, "return self.spec(weight) ", "return self.spec(weight.detach()) "),
]

BITS = range(2, 9)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(n, seed):
    """Values of very different magnitudes, some of them one-sided."""
    g = seeded(seed)
    x = torch.randn(n, generator=g) * 10 ** (8 * torch.rand(1, generator=g) - 4)
    return x.abs() if seed % 3 == 0 else x


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


# ---------------------------------------------------------------- parity: torch, bit for bit

@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_affine_per_tensor_is_torch_bit_for_bit(bits, clip):
    for seed in range(20):
        x = draws(1000, seed)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        grid = Uniform(bits, symmetric=False, clip=clip).fit(x)
        a = grid(ours)
        b = torch.fake_quantize_per_tensor_affine(theirs, grid.scale.item(), int(grid.zero), *grid.spec.codes)
        weight = torch.randn(1000, generator=seeded(seed))
        (a * weight).sum().backward()
        (b * weight).sum().backward()
        assert same_bits(a.detach(), b.detach()) and torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_symmetric_per_channel_is_torch_bit_for_bit(bits, full):
    for seed in range(20):
        x = draws(1200, seed).view(12, 4, 5, 5) * torch.logspace(-2, 2, 12).view(-1, 1, 1, 1)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        grid = Uniform(bits, full=full, per="channel", clip="mse").fit(x)
        a = grid(ours)
        b = torch.fake_quantize_per_channel_affine(theirs, grid.scale[:, 0], grid.zero[:, 0].int(), 0, *grid.spec.codes)
        a.square().sum().backward()
        b.square().sum().backward()
        assert same_bits(a.detach(), b.detach()) and torch.equal(ours.grad, theirs.grad)


def test_ties_go_to_the_even_code():
    grid = Uniform(8, symmetric=False).fit(torch.tensor([0.0, 255.0]))
    assert grid.quantize(torch.tensor([0.5, 1.5, 2.5, 3.5])).tolist() == [0, 2, 2, 4]


def test_affine_range_is_the_observers():
    from torch.ao.quantization import MinMaxObserver

    for seed in range(20):
        x = draws(500, seed)
        observer = MinMaxObserver(dtype=torch.quint8)
        observer(x)
        scale, zero = observer.calculate_qparams()
        grid = Uniform(8, symmetric=False).fit(x)
        torch.testing.assert_close(grid.scale[0], scale, rtol=2e-7, atol=0)       # two quotients against one: an ulp or two
        assert abs(grid.zero.item() - zero.item()) <= 1            # an ulp can move a half


# ---------------------------------------------------------------- invariants of the grid

@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("spec", [dict(), dict(full=True), dict(symmetric=False), dict(per="channel"), dict(per="group", group=8), dict(per="token")],
                         ids=lambda v: getattr(v, "__name__", str(v)))
def test_error_is_at_most_half_a_step(bits, spec):
    for seed in range(5):
        x = draws(960, seed).view(12, 80)
        grid = Uniform(bits, **spec).fit(x)
        step = rows(torch.ones_like(x), grid.spec.per, grid.spec.group) * grid.scale
        assert ((x - grid(x)).abs() <= 0.5 * step.reshape(x.shape) * (1 + 2**bits * 1e-6)).all()   # r/S has 2^b * 6e-8 of error
        q = grid.quantize(x)
        assert q.dtype == torch.int32 and q.min() >= grid.spec.codes[0] and q.max() <= grid.spec.codes[1]
        assert torch.equal(grid.dequantize(q), grid(x))
        assert torch.allclose(grid(grid(x)), grid(x), rtol=1e-6, atol=0)          # a value on the grid stays


@pytest.mark.parametrize("bits", BITS)
def test_scales_by_hand(bits):
    low, high = torch.tensor([[-3.0]]), torch.tensor([[5.0]])
    assert scale_zero(low, high, bits)[0].item() == pytest.approx(5 / (2 ** (bits - 1) - 1), rel=1e-6)
    assert scale_zero(low, high, bits, full=True)[0].item() == pytest.approx(10 / (2**bits - 1), rel=1e-6)
    scale, zero = scale_zero(low, high, bits, symmetric=False)
    assert scale.item() == pytest.approx(8 / (2**bits - 1), rel=1e-6) and zero.item() == round(3 / 8 * (2**bits - 1))
    assert scale_zero(low, high, bits)[1].item() == 0


def test_extremes_restricted_full_and_affine():
    x = torch.tensor([-1.0, 0.25, 1.0])
    for bits in BITS:
        assert Uniform(bits)(x)[[0, 2]].tolist() == pytest.approx([-1, 1], rel=1e-6)
        grid = Uniform(bits, full=True).fit(x)
        off = (grid(x) - x)[[0, 2]].abs() / grid.scale[0]
        assert off.tolist() == pytest.approx([0.5, 0.5], abs=1e-4)
        assert codes(bits, full=True)[0] == codes(bits)[0] - 1


def test_zero_is_always_exact():
    for seed in range(20):
        x = draws(100, seed) + (3.0, -3.0, 0.0)[seed % 3]          # ranges that do not hold zero are widened
        for spec in (dict(), dict(full=True), dict(symmetric=False)):
            assert Uniform(4, **spec).fit(x)(torch.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [0.0, 2.5, -2.5, 1e-45, 3e38])
def test_constant_and_extreme_tensors(value):
    x = torch.full((4, 8), value)
    for spec in (dict(), dict(symmetric=False), dict(per="channel", clip="mse")):
        y = Uniform(8, **spec)(x)
        assert torch.isfinite(y).all()
        assert torch.allclose(y, x, rtol=1e-2, atol=1e-40)


def test_wider_and_finer():
    """More bits never raise the worst error; 16 bits are near exact."""
    x = draws(1000, 1)
    worst = [(Uniform(b)(x) - x).abs().max().item() / x.abs().max().item() for b in (2, 4, 8, 12, 16)]
    assert worst == sorted(worst, reverse=True) and worst[-1] < 2e-5


@pytest.mark.parametrize("bits", BITS)
def test_scales_shrink_with_granularity(bits):
    w = models.load("digits_mlp").fc2.weight
    steps = [(Uniform(bits, per=p, group=g).fit(w).scale * torch.ones_like(rows(w, p, g))).reshape(w.shape)
             for p, g in (("group", 16), ("channel", None), ("tensor", None))]
    assert (steps[0] <= steps[1]).all() and (steps[1] <= steps[2]).all() and (steps[0] < steps[2]).any()


def test_rows_of_every_granularity():
    r = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    assert [rows(r, *a).shape for a in (("tensor",), ("channel",), ("group", 6), ("token",))] == [(1, 24), (2, 12), (4, 6), (6, 4)]
    assert rows(r, "group", 6)[1].tolist() == [6, 7, 8, 9, 10, 11]


def test_storage_is_counted():
    w = torch.randn(32, 128, generator=seeded())
    assert Uniform(4, per="group", group=32).fit(w).bits_per_weight(w) == 4 + 16 / 32
    assert Uniform(4, per="channel", symmetric=False).fit(w).bits_per_weight(w) == 4 + 20 / 128
    assert Uniform(2).fit(w).bits_per_weight(w, scale_bits=32) == 2 + 32 / 4096


# ---------------------------------------------------------------- straight-through gradient

def test_gradient_is_one_inside_and_zero_outside():
    grid = Uniform(4).fit(torch.tensor([-7.0, 7.0]))               # S = 1
    x = torch.tensor([-9.0, -7.6, -7.4, -7.0, 0.2, 7.0, 7.4, 7.6, 9.0], requires_grad=True)
    grid(x).sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]


def test_gradient_scales_the_incoming_one():
    x = torch.randn(50, generator=seeded(), requires_grad=True)
    out = StraightThrough.apply(x, torch.tensor(0.1), torch.tensor(0.0), -1000, 1000)
    g = torch.randn(50, generator=seeded(1))
    out.backward(g)
    assert torch.equal(x.grad, g)


def test_training_moves_the_weights_behind_the_grid():
    model = survey.train_on_grid(models.load("digits_mlp"), Uniform(2, per="channel"))
    x, y = models.digits_tensors("valid")
    torch.nn.functional.cross_entropy(model(x), y).backward()
    shadow = model.fc1.parametrizations.weight.original
    assert shadow.grad is not None and shadow.grad.abs().sum() > 0
    assert len(model.fc1.weight[0].unique()) <= 3


# ---------------------------------------------------------------- ranges

@pytest.mark.parametrize("spec", [dict(bits=3), dict(bits=4, symmetric=False), dict(bits=2, full=True)], ids=lambda v: getattr(v, "__name__", str(v)))
def test_mse_range_is_the_best_of_its_candidates(spec):
    x = draws(2000, 5).view(4, 500)
    got = Uniform(per="channel", clip="mse", **spec)
    low, high = mse_range(x, got)

    def error(r, lo, hi):                                          # one row, in plain numpy
        s, z = (t.item() for t in scale_zero(torch.tensor(lo), torch.tensor(hi), got.bits, got.symmetric, got.full))
        q = np.clip(np.round(r / s) + z, *got.codes)
        return ((s * (q - z) - r) ** 2).sum()

    for i, r in enumerate(x.double().numpy()):
        every = [error(r, c * r.min(), c * r.max()) for c in np.arange(1, 101) / 100]
        assert error(r, low[i].item(), high[i].item()) <= min(every) * (1 + 1e-4)          # float32 sums of 500 squares


@pytest.mark.parametrize("full, expected", [(False, {2: 1.22, 4: 2.47}), (True, {4: 2.54})])
def test_best_clip_of_a_gaussian(full, expected):
    """Against the integral: minimize E(r - r^)^2 over the threshold for N(0, 1). 200 000 draws and a grid of 1 % of about 4.5
    sigma place the minimum within 0.1 (the minimum is flat)."""
    def mse(t, bits):
        qmin, qmax = codes(bits, True, full)
        s = t / ((2**bits - 1) / 2 if full else qmax)
        def part(lo, hi, k):
            return integrate.quad(lambda r: (r - s * k) ** 2 * stats.norm.pdf(r), lo, hi)[0]
        edges = [-12, *[(k + 0.5) * s for k in range(qmin, qmax)], 12]
        return sum(part(edges[i], edges[i + 1], qmin + i) for i in range(qmax - qmin + 1))

    x = torch.randn(200_000, generator=seeded())
    for bits, recalled in expected.items():
        candidates = np.arange(recalled - 0.3, recalled + 0.3, 0.02)
        best = candidates[np.argmin([mse(t, bits) for t in candidates])]
        assert abs(best - recalled) < 0.03
        assert abs(mse_range(x[None], Uniform(bits, full=full))[1].item() - best) < 0.1


def test_percentile_clips_that_many():
    x = torch.randn(1, 100_000, generator=seeded())
    low, high = percentile_range(x, Uniform(4), p=99)
    assert abs((x.abs() > high).sum().item() - 1000) <= 1 and torch.equal(low, -high)
    low, high = percentile_range(x, Uniform(4, symmetric=False), p=99)
    assert abs((x > high).sum().item() - 500) <= 1 and abs((x < low).sum().item() - 500) <= 1


def test_every_range_is_inside_minmax():
    x = draws(3000, 7)
    for name in (*RANGES, survey.kl_range):
        assert Uniform(4, clip=name).fit(x).scale <= Uniform(4).fit(x).scale


def test_kl_range_against_the_recipe_in_numpy():
    x = stats.laplace.rvs(size=20_000, random_state=3)
    spec = Uniform(4, clip=survey.kl_range)
    counts, edges = np.histogram(np.abs(x), 2048, (0, np.abs(x).max()))
    best = {}
    for edge in range(16, 2049, 16):
        p = counts[:edge].astype(float)
        q = np.zeros(edge)
        cell = np.arange(edge) * 8 // edge
        for c in range(8):
            here = (cell == c) & (p > 0)
            if here.any():
                q[here] = p[here].sum() / here.sum()
        p[-1] += counts[edge:].sum()
        q += 1e-9 * counts[:edge].sum()
        best[edge] = stats.entropy(p, q)                           # normalizes both
    edge = min(best, key=best.get)
    high = survey.kl_range(torch.from_numpy(x)[None], spec)[1].item()
    assert high == pytest.approx(min(edges[edge], x.max()), rel=1e-6)
    assert high < 0.7 * np.abs(x).max()                            # it does clip


def test_kl_range_of_nothing_and_of_many():
    assert Uniform(4, clip=survey.kl_range)(torch.zeros(10)).tolist() == [0.0] * 10
    with pytest.raises(ValueError, match="one tensor at a time.*gives 3 rows"):
        Uniform(4, per="channel", clip=survey.kl_range).fit(torch.ones(3, 4))


# ---------------------------------------------------------------- integer arithmetic

def test_integer_matmul_is_exact():
    for seed in range(10):
        g = seeded(seed)
        qa, qb = torch.randint(0, 256, (7, 300), generator=g).int(), torch.randint(0, 256, (300, 5), generator=g).int()
        za, zb = torch.randint(0, 256, (7, 1), generator=g), torch.randint(0, 256, (1, 5), generator=g)
        assert torch.equal(integer_matmul(qa, qb, za, zb), (qa.long() - za) @ (qb.long() - zb))
        assert torch.equal(integer_matmul(qa, qb, 3, 9), (qa.long() - 3) @ (qb.long() - 9))


def test_integer_layer_is_the_fake_quantized_layer():
    a, b = torch.randn(6, 40, generator=seeded(1)).double(), torch.rand(40, 3, generator=seeded(2)).double()
    ga, gb = Uniform(8).fit(a), Uniform(6, symmetric=False).fit(b)
    real = integer_matmul(ga.quantize(a), gb.quantize(b), ga.zero, gb.zero) * ga.scale * gb.scale
    torch.testing.assert_close(real, ga(a) @ gb(b), rtol=1e-12, atol=1e-12)       # float64


@pytest.mark.parametrize("bits", [8, 15, 31])
def test_dyadic_is_near(bits):
    g = np.random.default_rng(0)
    for x in [*10 ** g.uniform(-6, 4, 200), 1.0, 0.5, 3.0, 1 - 2**-40]:
        m, n = survey.dyadic(x, bits)
        assert 2 ** (bits - 1) <= m <= 2**bits and abs(m / 2**n / x - 1) <= 2**-bits


# ---------------------------------------------------------------- error measures

def test_sqnr_by_hand():
    r = torch.tensor([-1.0, 1.0])
    assert survey.sqnr_db(r, torch.tensor([-0.9, 0.9])) == pytest.approx(20, abs=1e-4)
    assert survey.sqnr_db(r, r) == math.inf


def test_error_split_by_hand():
    grid = Uniform(3).fit(torch.tensor([-3.0, 3.0]))               # S = 1, span [-3, 3]
    rounding, clipping = survey.error_split(torch.tensor([0.25, -1.5, 5.0, -3.5]), grid)
    assert rounding == pytest.approx((0.0625 + 0.25) / 4) and clipping == pytest.approx((4 + 0.25) / 4)


# ---------------------------------------------------------------- non-uniform levels

def brute_force(x, k):
    """Least squared error of k levels: every way to cut the sorted values into k runs."""
    x = np.sort(x)
    best = math.inf
    for cut in itertools.combinations(range(1, len(x)), k - 1):
        parts = np.split(x, cut)
        best = min(best, sum(((p - p.mean()) ** 2).sum() for p in parts))
    return best


def test_lloyd_max_never_beats_brute_force_and_reaches_it_from_some_start():
    for seed in range(6):
        x = np.random.default_rng(seed).normal(size=12)
        r = torch.from_numpy(x)
        found = []
        for start in itertools.combinations(np.sort(x), 3):        # 220 starts
            levels = survey.lloyd_max(r, torch.tensor(start))
            found.append((r - levels[survey.nearest(r, levels)]).square().sum().item())
        assert min(found) == pytest.approx(brute_force(x, 3), rel=1e-9)
        assert all(f >= min(found) - 1e-12 for f in found)


@pytest.mark.parametrize("levels, table", [(2, 0.3634), (4, 0.1175), (8, 0.03454)])
def test_lloyd_max_of_a_gaussian(levels, table):
    """Max's table of least distortions. The input is 20 000 quantiles, so nothing is random; they miss 1e-3 of the tails' variance."""
    r = torch.from_numpy(stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000))
    book = survey.lloyd_max(r, torch.linspace(-2, 2, levels).double(), iterations=500)
    assert (r - book[survey.nearest(r, book)]).square().mean().item() == pytest.approx(table, abs=1e-3)


def test_lloyd_max_is_a_fixed_point_and_never_worse_than_its_start():
    r = models.load("digits_mlp").fc2.weight.detach().flatten()
    grid = Uniform(3, clip="mse").fit(r)
    start = (torch.arange(-3, 4) * grid.scale).flatten()
    book = survey.lloyd_max(r, start, 500)
    at = survey.nearest(r, book)
    means = torch.stack([r[at == i].double().mean() for i in range(len(book))])
    torch.testing.assert_close(means.float(), book, rtol=1e-5, atol=1e-7)
    assert (r - book[at]).square().sum() < (r - grid(r)).square().sum()


def test_an_empty_level_stays():
    book = survey.lloyd_max(torch.tensor([0.0, 1.0]), torch.tensor([0.1, 0.9, 50.0]))
    assert book.tolist() == [0, 1, 50]


def test_powers_of_two():
    book = survey.powers_of_two(torch.tensor([0.1, -0.9]), 3)
    assert book.tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
    with pytest.raises(ValueError, match="bits must be at least 2"):
        survey.powers_of_two(torch.ones(3), 1)


# ---------------------------------------------------------------- networks

def test_quantize_weights_leaves_the_original_alone_and_biases_too():
    model = models.load("digits_cnn")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small = survey.quantize_weights(model, Uniform(3, per="channel"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for name, layer in small.named_children():
        assert max(len(w.unique()) for w in layer.weight.flatten(1)) <= 7
        assert torch.equal(layer.bias, getattr(model, name).bias)


def test_sixteen_bits_change_nothing():
    model = models.load("digits_mlp")
    x, _ = models.digits_tensors("test")
    fine = survey.quantize_inputs(survey.quantize_weights(model, Uniform(16)), Uniform(16, per="token"))
    torch.testing.assert_close(fine(x), model(x), rtol=0, atol=0.01)              # logits of order 10, steps of 2^-15


def test_static_and_dynamic_inputs():
    model = models.load("digits_mlp")
    x, _ = models.digits_tensors("valid")
    spec = Uniform(4, symmetric=False)
    static = {k: spec.fit(v) for k, v in models.layer_inputs(model, x).items()}
    with torch.no_grad():
        a, b = survey.quantize_inputs(model, static)(x), survey.quantize_inputs(model, spec)(x)
        by_hand = model.fc1(spec(x.flatten(1)))
    assert torch.equal(a[:0], b[:0]) and not torch.equal(a, model(x))
    seen = models.layer_inputs(survey.quantize_inputs(model, {"fc1": static["fc1"]}), x)
    torch.testing.assert_close(seen["fc2"], by_hand.relu())
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="no linear or convolution layer called fc9"):
        survey.quantize_inputs(model, {"fc9": static["fc1"]})


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_refused_everywhere(bad):
    x = torch.ones(4, 4)
    grid = Uniform(4).fit(x)
    x[1, 2] = bad
    for call in (Uniform(4).fit, Uniform(4, per="channel", clip="mse").fit, Uniform(4), grid, grid.quantize,
                 lambda v: survey.lloyd_max(v, torch.tensor([0.0, 1.0])), lambda v: survey.powers_of_two(v, 3)):
        with pytest.raises(ValueError, match="must be finite, but 1 of its 16 values"):
            call(x)
    with pytest.raises(ValueError, match="x must be a positive finite number"):
        survey.dyadic(bad)


@pytest.mark.parametrize("kwargs, says", [
    (dict(bits=1), "bits must be an int from 2 to 16"), (dict(bits=0, symmetric=False), "bits must be an int from 1 to 16"),
    (dict(bits=17), "was 17"), (dict(bits=4.0), "was 4.0"), (dict(bits=True), "was True"),
    (dict(bits=4, per="row"), "per must be tensor, channel, group or token, was 'row'"),
    (dict(bits=4, per="group"), "group must be a positive int"), (dict(bits=4, per="group", group=0), "was 0"),
    (dict(bits=4, group=8), "was 8 with per='tensor'"), (dict(bits=4, full=True, symmetric=False), "full=True is a choice"),
    (dict(bits=4, clip="max"), "clip must be one of minmax, percentile, mse or a function, was 'max'")], ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_bad_description_is_refused(kwargs, says):
    with pytest.raises(ValueError, match=says):
        Uniform(**kwargs)


def test_bad_tensors_are_refused():
    with pytest.raises(ValueError, match=r"group must divide the 10 weights of a channel \(shape \(3, 10\)\), was 4"):
        Uniform(4, per="group", group=4).fit(torch.ones(3, 10))
    with pytest.raises(ValueError, match=r"r is empty \(shape \(0, 3\)\)"):
        Uniform(4).fit(torch.ones(0, 3))
    with pytest.raises(TypeError, match="r must be a floating-point tensor, was torch.int64"):
        Uniform(4).fit(torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="floating-point tensor, was list"):
        Uniform(4).fit([1.0])
    with pytest.raises(ValueError, match="r has 5 rows of its own scale, the grid was fitted to 3"):
        Uniform(4, per="channel").fit(torch.ones(3, 2))(torch.ones(5, 2))
