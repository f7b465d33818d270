"""The kernels of "Reading a kernel" at odd sizes, under the sanitizers; the page's broken ones are found; data sheets, roofline and occupancy."""
import re
from pathlib import Path

import numpy as np
import pytest

import lib.kernels
from lib.book.paths import CHAPTERS
from lib.cuda import Module, check, compile_check, launch
from lib.kernels.machine import A100, H100, occupancy, roofline

FILE = Path(lib.kernels.__file__).with_name("first.cu")
kernels = Module.from_file(FILE)
counting = Module('#define COUNT_WORK\n#line 1 "first.cu"\n' + kernels.source, "first.cu")
PAGE = (CHAPTERS / "kernels" / "reading_a_kernel.md").read_text(encoding="utf8")
rng = np.random.default_rng(0)              # any data do: the kernels have no branch on values

pytestmark = pytest.mark.usefixtures("compiler")


def f32(*shape):
    return rng.random(shape, dtype=np.float32)


def blocks(n, size):
    return -(-n // size)


@pytest.mark.parametrize("n", [1, 255, 256, 257])
def test_scale(n):
    x, y = f32(n), np.zeros(n, np.float32)
    launch(kernels["scale"], blocks(n, 256), 256, (x, y, np.float32(3), n))
    assert np.array_equal(y, 3 * x)                                        # one rounding on both sides


@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (1, 40, 17), (33, 1, 16), (17, 15, 1), (16, 32, 48), (19, 37, 50)])
def test_products_and_their_loads(M, N, K):
    A, B = f32(M, K), f32(K, N)
    grid = blocks(N, 16), blocks(M, 16)
    loads = {"product": 2 * M * N * K, "tiled": M * K * grid[0] + K * N * grid[1]}
    for name, expected in loads.items():
        C, counts = np.full((M, N), np.nan, np.float32), np.zeros(1, np.uint64)
        launch(counting[name], grid, (16, 16), (A, B, C, M, N, K, counts))
        assert np.allclose(C, A @ B, rtol=K * 2**-23, atol=0)              # K additions of positive numbers, each within half a unit in the last place, in either order
        assert counts[0] == expected, name


@pytest.mark.parametrize("name", ["tree_sum", "warp_sum"])
@pytest.mark.parametrize("n, block", [(1, 32), (31, 32), (256, 256), (1000, 256), (1000, 64)])
def test_sums(name, n, block):
    x = rng.integers(0, 100, n).astype(np.float32)                         # sums below 2^24 are exact, in any order
    partial = np.full(blocks(n, block), np.nan, np.float32)
    launch(kernels[name], len(partial), block, (x, partial, n))
    assert [x[i * block:(i + 1) * block].sum() for i in range(len(partial))] == partial.tolist()


def test_histogram():
    x, counts = rng.integers(0, 7, 1000).astype(np.int32), np.zeros(7, np.int32)
    launch(kernels["histogram"], 4, 256, (x, counts, 1000))
    assert np.array_equal(counts, np.bincount(x, minlength=7))


CALLS = [("scale", 2, 64, lambda: (f32(100), f32(100), np.float32(2), 100)), ("product", (2, 2), (16, 16), lambda: (f32(17, 19), f32(19, 20), f32(17, 20), 17, 20, 19, np.zeros(1, np.uint64))),
         ("tiled", (2, 2), (16, 16), lambda: (f32(17, 19), f32(19, 20), f32(17, 20), 17, 20, 19, np.zeros(1, np.uint64))), ("tree_sum", 2, 64, lambda: (f32(100), f32(2), 100)),
         ("warp_sum", 2, 64, lambda: (f32(100), f32(2), 100)), ("histogram", 1, 64, lambda: (np.zeros(50, np.int32), np.zeros(3, np.int32), 50))]


@pytest.mark.parametrize("name, grid, block, args", CALLS, ids=[c[0] for c in CALLS])
def test_kernels_are_clean(name, grid, block, args):
    report = check(kernels[name], grid, block, args())
    assert report.clean, str(report)


def edits():
    """The breaks that the page makes: (kernel, old, new) read from the page's own list."""
    text = re.search(r"EDITS = \{(.*?)\n\}", PAGE, re.S)[1]
    return eval("{" + text + "}")                                          # the page's literal: names to pairs of strings


def test_the_page_breaks_each_kernel_in_one_place():
    broken = edits()
    assert len(broken) == 5
    for name, (old, new) in broken.items():
        assert kernels.source.count(old) == 1 and old != new, name


def test_wrong_kernels_of_the_page_are_found():
    """Kind, array and line of each finding; the page shows these reports."""
    source = kernels.source
    for old, new in edits().values():
        source = source.replace(old, new)
    wrong = Module(source, "wrong.cu")
    line = lambda text: next(i for i, s in enumerate(source.splitlines(), 1) if text in s)
    expected = {"scale": ("out of bounds", {"x", "y"}, line("y[i] = a * x[i]")), "tiled": ("race", {"As", "Bs"}, None), "tree_sum": ("barrier", {""}, None),
                "warp_sum": ("deadlock", {""}, None), "histogram": ("race", {"counts"}, line("counts[x[i]] += 1"))}
    for name, grid, block, args in CALLS:
        if name in expected:
            if name == "scale":
                grid, block, args = 1, 128, lambda: (f32(100), f32(100), np.float32(2), 100)
            kind, arrays, at = expected[name]
            report = check(wrong[name], grid, block, args())
            assert {f.kind for f in report.findings} == {kind} and {f.array for f in report.findings} <= arrays, f"{name}: {report}"
            assert at is None or any(f.line == at for f in report.findings), f"{name}: {report}"


# --- data sheets

def test_occupancy_of_known_kernels():
    """Worked by hand from the allocation rules; the same numbers as NVIDIA's occupancy calculator gives for compute capability 8.0."""
    assert occupancy(A100, 256, 32).warps == 64 and occupancy(A100, 256, 32).share == 1
    assert set(occupancy(A100, 256, 32).limits) == {"threads", "registers"}
    assert occupancy(A100, 256, 33).warps == 48                             # 33 registers are allocated as 40: 12 warps a partition of 16384, 48 in all, 6 blocks
    assert occupancy(A100, 256, 64).warps == 32 and occupancy(A100, 256, 64).limits == ("registers",)
    assert occupancy(A100, 32, 16).blocks == 32 and occupancy(A100, 32, 16).limits == ("blocks",) and occupancy(A100, 32, 16).share == 0.5
    assert occupancy(A100, 256, 32, 48 * 1024).blocks == 3 and occupancy(H100, 256, 32, 48 * 1024).blocks == 4      # 49 KiB each of 164, of 228
    assert occupancy(A100, 1024, 64).blocks == 1 and occupancy(A100, 96, 32).warps == 63
    assert occupancy(A100, 33, 32).warps == 64                              # two warps, one of them with a single thread
    assert occupancy(A100, 96, 33).blocks == 16                             # 48 warps in four partitions; one pool of registers would hold 51, and 17 blocks
    assert occupancy(A100, 1024, 40).warps == 32                            # 12 warps fit in each partition, 48 in all, and only whole blocks of 32 count


@pytest.mark.parametrize("bad, name", [((0, 32), "block"), ((1025, 32), "block"), ((256, 0), "registers"), ((256, 256), "registers"), ((256, 32, -1), "shared"), ((256, 32, 164 * 1024), "shared"), ((1024, 128), "block")])
def test_bad_launches_are_named(bad, name):
    with pytest.raises(ValueError, match=f"{name}="):
        occupancy(A100, *bad)


def test_roofline():
    ridge = A100.peak["fp32"] / A100.bandwidth
    assert roofline(A100, "fp32", 2 * ridge) == A100.peak["fp32"] and roofline(A100, "fp32", ridge / 2) == pytest.approx(A100.peak["fp32"] / 2)
    assert roofline(H100, "fp8 tensor", np.array([1.0, 1e6])).tolist() == [H100.bandwidth, H100.peak["fp8 tensor"]]
    with pytest.raises(ValueError, match="unit='fp64'"):
        roofline(A100, "fp64", 1.0)
    for bad in (0.0, -1.0, float("nan")):
        for given in (bad, np.array([1.0, bad])):
            with pytest.raises(ValueError, match="intensity="):
                roofline(A100, "fp32", given)


def test_what_the_compiler_says_fits_the_data_sheets():
    pytest.importorskip("cuda.bindings")
    for gpu in (A100, H100):
        for usage in compile_check(FILE, gpu.arch).kernels.values():
            assert occupancy(gpu, 256, usage.registers, usage.shared).share > 0.4
