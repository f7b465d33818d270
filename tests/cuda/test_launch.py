"""lib.cuda on the CPU: every promised feature against NumPy, every error message, the cache of compiled kernels, and (where there is one) the GPU."""
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

import lib.cuda
from lib.cuda import ArgumentError, CompileError, KernelError, MissingTool, Module, cpu, launch

HERE = Path(__file__).parent
FILTERS = ("filter<2, float>", "filter<3, int>")
features = Module.from_file(HERE / "features.cu", names=FILTERS)
bugs = Module.from_file(HERE / "bugs.cu")
rng = np.random.default_rng(0)
on_cpu = pytest.mark.usefixtures("compiler")


# ------------------------------------------------------------------------------------------------ features
@on_cpu
@pytest.mark.parametrize("grid, block", [(1, 1), (3, 33), ((2, 3), (4, 5)), ((2, 3, 4), (5, 2, 3)), (np.int64(2), 1024)])
def test_every_thread_of_every_block_runs_once_with_its_own_index(grid, block):
    g, b = (np.atleast_1d(s).tolist() + [1, 1, 1] for s in (grid, block))
    out = np.zeros((int(np.prod(g)), int(np.prod(b)), 3), np.int32)
    launch(features["who_am_i"], grid, block, (out,))
    code = lambda s: (np.arange(s[0])[None, None] + 10 * np.arange(s[1])[None, :, None] + 100 * np.arange(s[2])[:, None, None]).ravel()
    assert (out[:, :, 0] == code(g)[:, None]).all()
    assert (out[:, :, 1] == code(b)[None]).all()
    assert (out[:, :, 2] == 1).all()


@on_cpu
@pytest.mark.parametrize("block", [32, 64, 256, 1024])
def test_shared_memory_and_barriers_in_a_loop(block):
    n = 5 * block - 7
    x = rng.integers(-8, 9, n).astype(np.float32)          # small integers: float sums are exact in any order
    out = np.zeros(5, np.float32)
    launch(features["block_sum"], 5, block, (x, out, n), shared=4 * block)
    np.testing.assert_array_equal(out, np.add.reduceat(x, np.arange(0, n, block)))


@on_cpu
def test_tiled_product_and_its_time():
    A, B = rng.standard_normal((2, 256, 256), dtype=np.float32)
    C = np.zeros_like(A)
    launch(features["matmul"], (16, 16), (16, 16), (A, B, C, 256))
    start = time.process_time()
    launch(features["matmul"], (16, 16), (16, 16), (A, B, C, 256))
    assert time.process_time() - start < 0.5
    np.testing.assert_allclose(C, A.astype(float) @ B, atol=2e-4)   # 256 float32 products of size ~1: 256 * 2^-24 * a few


@on_cpu
def test_launch_overhead():
    x = np.zeros(4, np.float32)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        launch(features["block_sum"], 1, 32, (x, np.zeros(1, np.float32), 4), shared=128)
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3


@on_cpu
def test_warp_operations():
    t = np.arange(128)
    lane, first = t % 32, t // 32 * 32
    out, undefined = np.zeros((128, 9), np.int32), np.zeros(128, np.float32)
    launch(features["warp"], 1, 128, (out, undefined))
    ballot = [sum(1 << i for i in range(32) if (f + i) % 3 == 0) for f in first]
    np.testing.assert_array_equal(out[:, 0].view(np.uint32), ballot)
    np.testing.assert_array_equal(out[:, 1], lane * (lane + 1) // 2)
    np.testing.assert_array_equal(out[:, 2], t.reshape(-1, 16).sum(1).repeat(16))
    np.testing.assert_array_equal(out[:, 3], t // 8 * 8 + 5)
    np.testing.assert_array_equal(out[:, 4], np.where(lane + 3 < 32, t + 3, t))
    np.testing.assert_array_equal(out[:, 5], 2 * (first == 32) + (first >= 32))
    np.testing.assert_array_equal(out[:, 6], 64)
    np.testing.assert_array_equal(out[:, 7], np.where(lane < 16, first + 3, 0))
    np.testing.assert_array_equal(out[:, 8], np.where(lane < 16, t, t - 16))
    assert np.isnan(undefined[lane < 16]).all()            # what CUDA leaves undefined can't pass for a number


@on_cpu
def test_block_votes():
    out = np.zeros((128, 2), np.int32)
    launch(features["block_votes"], 1, 128, (out,))
    assert (out == [1, 1]).all()
    launch(features["block_votes"], 1, 64, (out[:64],))
    assert (out[:64] == [1, 0]).all()


@on_cpu
def test_atomics():
    n = 1000
    t = np.arange(n)
    i, u, ll = np.zeros(7, np.int32), np.array([~0 & 0xffffffff, 0, 0, 0, 0], np.uint32), np.zeros(1, np.uint64)
    f, d, order = np.zeros(1, np.float32), np.zeros(1), np.full(n, -1, np.int32)
    launch(features["atomics"], 8, 128, (i, u, f, d, ll, order, n))
    assert i.tolist() == [t.sum(), -t.sum(), -(n - 1), n - 1, 0, n, n]
    assert u.tolist() == [0, 0xffffffff, np.bitwise_xor.reduce(t), n % 7, (-n) % 7]
    assert (f[0], d[0], ll[0]) == (n / 2, n / 4, n << 33)
    assert sorted(order) == t.tolist()


@on_cpu
def test_bit_operations():
    n = 500
    a, b = rng.integers(-2**31, 2**31, (2, n)).astype(np.int32)
    a[:3] = 0, -1, 1
    out = np.zeros((n, 10), np.int32)
    launch(features["bits"], 4, 128, (a, b, out, n))
    ua, ub = a.view(np.uint32).astype(object), b.view(np.uint32).astype(object)
    both = [x | y << 32 for x, y in zip(ua, ub)]
    np.testing.assert_array_equal(out[:, 0], 7 + (a.view(np.int8).astype(int) * b.view(np.int8)).reshape(n, 4).sum(1))
    np.testing.assert_array_equal(out[:, 1], np.bitwise_count(a.view(np.uint32)))
    np.testing.assert_array_equal(out[:, 2], [32 - x.bit_length() for x in ua])
    np.testing.assert_array_equal(out[:, 3], [(x & -x).bit_length() for x in ua])
    np.testing.assert_array_equal(out[:, 4].view(np.uint32), [int(f"{x:032b}"[::-1], 2) for x in ua])
    np.testing.assert_array_equal(out[:, 5].view(np.uint32), [sum((x >> 8 * p & 255) << 8 * q for q, p in enumerate((5, 7, 1, 3))) for x in both])
    np.testing.assert_array_equal(out[:, 6].view(np.uint32), [(y << 9 | x >> 23) & 0xffffffff for x, y in zip(ua, ub)])
    np.testing.assert_array_equal(out[:, 7], a.astype(np.int64) * b >> 32)
    np.testing.assert_array_equal(out[:, 8].view(np.float32), (a & 0x7fffff).view(np.float32) + np.float32(1))
    np.testing.assert_array_equal(out[:, 9], a ^ b)


@on_cpu
def test_half_precision_is_numpys():
    n = 3000
    a, b = rng.standard_normal((2, n)).astype(np.float16)
    x = np.r_[rng.standard_normal(n - 4), np.inf, -np.inf, 0, 1e-40].astype(np.float32)
    product, rounded = np.zeros(n, np.float16), np.zeros(n, np.uint16)
    launch(features["halves"], 24, 128, (a, b, product, x, rounded, np.float16(0.3), n))
    np.testing.assert_array_equal(product, a * b * np.float16(0.3))
    import torch
    np.testing.assert_array_equal(rounded, torch.from_numpy(x).bfloat16().view(torch.uint16).numpy())
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    wide, back = np.zeros(65536, np.float32), np.zeros(65536, np.float16)
    launch(features["every_half"], 64, 1024, (every, wide, back))
    np.testing.assert_array_equal(wide, every.astype(np.float32))
    np.testing.assert_array_equal(back, every)
    wide = (2.0 ** rng.uniform(-30, 17, 65536) * rng.choice([-1, 1], 65536)).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = wide.astype(np.float16)
    source = Module('#include <cuda_fp16.h>\nextern "C" __global__ void narrow(const float* x, half* h) '
                    "{ int i = blockIdx.x * blockDim.x + threadIdx.x; h[i] = __float2half(x[i]); }")
    launch(source["narrow"], 64, 1024, (wide, back))
    np.testing.assert_array_equal(back, expected)


@on_cpu
def test_vector_types_templates_and_constant_memory():
    v, dot = rng.integers(-9, 9, (32, 4)).astype(np.float32), np.zeros(32, np.float32)
    launch(features["vectors"], 1, 32, (v, dot))
    np.testing.assert_array_equal(dot, v @ [1, 2, 3, 4])
    for name, dtype, taps in zip(FILTERS, (np.float32, np.int32), ([1, 10], [1, 10, 100])):
        x, y = np.arange(50, dtype=dtype), np.zeros(50, dtype)
        launch(features[name], 1, 64, (x, y, 50))
        np.testing.assert_array_equal(y, np.convolve(x, taps)[:50])


@on_cpu
@pytest.mark.parametrize("order", ["down", "shuffled"])
def test_the_order_of_threads_does_not_matter(order):
    x, out = rng.integers(-8, 9, 1000).astype(np.float32), np.zeros(8, np.float32)
    kernel = features["block_sum"]
    features.library("numpy").run(kernel, (8, 1, 1), (128, 1, 1), [x, out, np.int32(1000)], 512, order=order)
    np.testing.assert_array_equal(out, np.add.reduceat(x, np.arange(0, 1000, 128)))


@on_cpu
def test_arrays_that_share_memory_stay_shared():
    source = Module('extern "C" __global__ void shift(const int* x, int* y) { y[threadIdx.x] = x[threadIdx.x] + 1; }')
    x = np.arange(8, dtype=np.int32)
    launch(source["shift"], 1, 8, (x, x))
    np.testing.assert_array_equal(x, np.arange(8) + 1)
    launch(source["shift"], 1, 4, (x[:6], x[4:]))          # overlapping views of one array
    np.testing.assert_array_equal(x, [1, 2, 3, 4, 2, 3, 4, 5])


@on_cpu
def test_arrays_without_elements():
    source = Module('extern "C" __global__ void fill(const int* x, int* y, int n) { if (threadIdx.x < n) y[threadIdx.x] = x[threadIdx.x]; }')
    empty, x = np.zeros(0, np.int32), np.arange(3, dtype=np.int32)
    launch(source["fill"], 1, 8, (empty, empty, 0))
    with pytest.raises(KernelError, match=r"touches byte 0 of the 0 bytes of array 'x'"):
        launch(source["fill"], 1, 8, (empty, x, 1))


@on_cpu
def test_threads_of_python_take_turns():
    outs = [np.zeros(4, np.float32) for _ in range(8)]
    x = np.ones(512, np.float32)
    workers = [threading.Thread(target=launch, args=(features["block_sum"], 4, 128, (x, out, 512), 512)) for out in outs]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    np.testing.assert_array_equal(outs, np.full((8, 4), 128))


# ------------------------------------------------------------------------------------------------ errors
ok = np.zeros(4, np.float32)
frozen = np.zeros(4, np.float32)
frozen.flags.writeable = False


class cupy_array(np.lib.mixins.NDArrayOperatorsMixin):
    """Looks like a CuPy array as far as the launcher looks."""
    def __init__(self, a):
        self.a, self.dtype, self.flags = a, a.dtype, types.SimpleNamespace(c_contiguous=True)
        self.data = types.SimpleNamespace(ptr=a.ctypes.data)


cupy_array.__module__ = "cupy"


@pytest.mark.parametrize("args, message", [
    ((ok.astype(float), ok, 4), r"argument 'x' \(const float\*\) should have dtype float32, has float64"),
    ((ok, ok.astype(np.int32), 4), r"argument 'out' \(float\*\) should have dtype float32, has int32"),
    ((np.zeros((4, 4), np.float32).T[:, :2], ok, 4), r"'x' .* should be C-contiguous, has shape \(4, 2\) and strides"),
    ((ok, ok), r"takes 3 arguments \(x, out, n\), got 2"),
    (([1.0], ok, 4), r"'x' .* should be a numpy or cupy array, was list"),
    ((ok, frozen, 4), r"'out' .* is written by the kernel, and this array is read-only"),
    ((ok, ok, ok), r"'n' \(int\) should be a number, was ndarray"),
    ((ok, ok, "4"), r"'n' \(int\) should be a number, was str"),
    ((ok, ok, 2**31), r"'n' \(int\) should be a int32, and 2147483648 does not fit"),
    ((ok, ok, 1.5), r"'n' .* 1.5 does not fit"),
    ((ok, ok, float("nan")), r"'n' .* nan does not fit"),
    ((ok, cupy_array(ok), 4), r"'x' is a numpy array and 'out' a cupy one; all should be on one side"),
    ((np.zeros(17, np.uint8)[1:].view(np.float32), ok, 4), r"'x' .* should start at a multiple of 4 bytes"),
])
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ArgumentError, match=message):
        launch(features["block_sum"], 1, 32, args, shared=128)
    assert not ok.any()


@pytest.mark.parametrize("grid, block, shared, message", [
    (1, 1025, 0, r"block=\(1025, 1, 1\): a block has at most 1024 threads"),
    (1, (1, 1, 65), 0, "at most 64 of them along z"),
    ((1, 65536), 1, 0, "grid=.*65535 along y"),
    (0, 1, 0, "grid=0: should be 1 to 3 positive integers"),
    (1, (2, 2, 2, 2), 0, "block=.*1 to 3 positive integers"),
    (1, 1.5, 0, "block=1.5"),
    (1, 1, 50000, "shared=50000: dynamic shared memory is 0 to 49152 bytes"),
])
def test_wrong_sizes_are_named(grid, block, shared, message):
    with pytest.raises(ArgumentError, match=message):
        launch(features["block_sum"], grid, block, (ok, ok, 4), shared=shared)


def test_unknown_kernels_and_types_are_named():
    with pytest.raises(KernelError, match=r"no kernel 'blocksum' in features.cu; it has \['who_am_i', 'block_sum'"):
        features["blocksum"]
    with pytest.raises(KernelError, match=r"does not know the type of parameter 'x' \(const real\* x\)"):
        Module('typedef float real; extern "C" __global__ void k(const real* x) {}')["k"]
    with pytest.raises(ArgumentError, match=r"kernel should be a Kernel.*was str"):
        launch("block_sum", 1, 1, ())


@on_cpu
def test_a_source_that_does_not_compile_names_file_and_line():
    broken = Module('extern "C" __global__ void k(float* x) {\n  x[0] = scale;\n}', "broken.cu")
    with pytest.raises(CompileError, match=r"broken\.cu:2:.*scale"):
        launch(broken["k"], 1, 1, (ok,))


@on_cpu
@pytest.mark.parametrize("name, args, message", [
    ("one_too_many", (np.ones(128, np.float32), ok_y := np.zeros(128, np.float32), 128), r"block \(1,0,0\) thread \(0,0,0\) touches byte 512 of the 512 bytes of array '[xy]'"),
    ("before_the_start", (ok_y,), "writes before the start of array 'y'"),
    ("far_away", (ok_y,), r"thread \(0,0,0\) touches address 0x\w+, which is in no array"),
    ("divergent", (ok_y,), r"thread \(\d+,0,0\) waits at the barrier of line \d+ while thread \(\d+,0,0\) waits at the one of line \d+: a barrier in divergent code"),
    ("half_a_warp", (ok_y,), r"waits at line \d+ for the lanes 0xffffffff of its warp, and not all of them arrive"),
    ("not_in_mask", (ok_y,), r"mask 0x0000ffff, which leaves out its own lane 16"),
    ("deep", (ok_y,), r"needs more than 64 KiB of stack"),
])
def test_a_failed_launch_says_where_and_changes_nothing(name, args, message):
    with pytest.raises(KernelError, match=message):
        launch(bugs[name], 2 if name == "one_too_many" else 1, 128, args)
    assert not args[-1 if name != "one_too_many" else 1].any()
    launch(features["block_sum"], 1, 32, (np.ones(4, np.float32), out := np.zeros(1, np.float32), 4), shared=128)
    assert out[0] == 4                                     # and the next launch is as good as new


def test_a_missing_compiler_is_said_with_the_remedy(no_compiler):
    with pytest.raises(MissingTool, match="need a C.. compiler, and there is none: install g.. or clang.., or `pip install ziglang`"):
        launch(Module(features.source)["vectors"], 1, 1, (np.zeros(4, np.float32), ok))


def test_a_compiler_that_does_not_run_is_named(monkeypatch):
    monkeypatch.setenv("LUC_CXX", "no-such-compiler")
    with pytest.raises(MissingTool, match="'no-such-compiler' does not run"):
        launch(Module(features.source)["vectors"], 1, 1, (np.zeros(4, np.float32), ok))


# ------------------------------------------------------------------------------------------------ the cache of compiled kernels
TINY = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2.0f; }'


@on_cpu
def test_two_processes_fill_one_cache(tmp_path):
    """Both find the cache empty, both compile, both run what they find."""
    cache, go = tmp_path / "cache", tmp_path / "go"
    code = f"""
import numpy as np, pathlib, time
from lib.cuda import Module, launch
kernel, x = Module({TINY!r})["twice"], np.ones(4, np.float32)
print("ready", flush=True)
while not pathlib.Path({str(go)!r}).exists():
    time.sleep(0.001)
launch(kernel, 1, 4, (x,))
print(x.tolist())
"""
    workers = [subprocess.Popen([sys.executable, "-c", code], cwd=HERE.parents[1], env=os.environ | {"LUC_CUDA_CACHE": str(cache)},
                                stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [w.stdout.readline() for w in workers] == ["ready\n"] * 2
    assert not cache.exists()
    go.touch()
    assert [w.communicate(timeout=60)[0] for w in workers] == ["[2.0, 2.0, 2.0, 2.0]\n"] * 2
    assert [p.suffix for p in cache.iterdir()] == [".so"]  # one file, no rubbish


@on_cpu
def test_a_build_that_is_stopped_leaves_nothing_behind(tmp_path, monkeypatch):
    """A compiled file appears under its name in one step, when it is complete."""
    def stopped(source, target):
        assert Path(source).stat().st_size > 0 and not Path(target).exists()
        raise KeyboardInterrupt
    monkeypatch.setenv("LUC_CUDA_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        launch(Module(TINY)["twice"], 1, 4, (np.ones(4, np.float32),))
    assert list(tmp_path.iterdir()) == []


@on_cpu
def test_the_cache_is_not_shared_between_processors(tmp_path, monkeypatch):
    monkeypatch.setenv("LUC_CUDA_CACHE", str(tmp_path))
    here = cpu.build("int one;", ["-shared", "-fPIC"], ".so")
    assert cpu.build("int one;", ["-shared", "-fPIC"], ".so") == here
    monkeypatch.setattr(cpu, "this_cpu", lambda: "another processor")
    assert cpu.build("int one;", ["-shared", "-fPIC"], ".so") != here


@on_cpu
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LUC_CUDA_CACHE", str(tmp_path / "file" / "cache"))
    launch(Module(TINY)["twice"], 1, 4, (x := np.ones(4, np.float32),))
    assert x.tolist() == [2.0] * 4


def test_import_is_light():
    code = "import sys, lib.cuda; sys.exit(any(m in sys.modules for m in ('cupy', 'torch', 'cuda', 'lib.book')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE.parents[1]).returncode == 0


# ------------------------------------------------------------------------------------------------ the GPU
def test_without_a_gpu_the_reason_is_said():
    there, why = lib.cuda.gpu_available()
    assert bool(lib.cuda.gpu_available()) == there and why


def test_cupy_arrays_go_to_cupy(monkeypatch):
    """What CuPy is asked for, told by a stand-in; the tests marked gpu ask the real one."""
    asked = {}

    class RawModule:
        def __init__(self, code, options, name_expressions):
            asked.update(code=code, options=options, names=name_expressions)

        def get_function(self, name):
            return lambda grid, block, args, shared_mem: asked.update(launch=(name, grid, block, args, shared_mem))

    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(RawModule=RawModule))
    module, x = Module(features.source, names=FILTERS), cupy_array(np.zeros(50, np.float32))
    launch(module["filter<2, float>"], (2, 1), 64, (x, x, 50), shared=16)
    assert asked["launch"] == ("filter<2, float>", (2, 1, 1), (64, 1, 1), (x, x, 50), 16)
    assert asked["code"] == features.source and asked["names"] == list(FILTERS) and "-std=c++17" in asked["options"]
    assert type(asked["launch"][3][2]) is np.int32         # scalars in the kernel's own type


@pytest.mark.gpu
def test_gpu_and_cpu_agree(cupy):
    A, B = rng.standard_normal((2, 64, 64), dtype=np.float32)
    C, D = np.zeros_like(A), cupy.zeros((64, 64), np.float32)
    launch(features["matmul"], (4, 4), (16, 16), (A, B, C, 64))
    launch(features["matmul"], (4, 4), (16, 16), (cupy.asarray(A), cupy.asarray(B), D, 64))
    np.testing.assert_allclose(cupy.asnumpy(D), C, atol=1e-4)  # the GPU contracts a*b+c


@pytest.mark.gpu
@pytest.mark.parametrize("name, out", [("warp", (128, 9)), ("block_votes", (128, 2))])
def test_gpu_warp_operations(cupy, name, out):
    here, there = np.zeros(out, np.int32), cupy.zeros(out, np.int32)
    more = name == "warp"
    launch(features[name], 1, 128, (here, np.zeros(128, np.float32))[:1 + more])
    launch(features[name], 1, 128, (there, cupy.zeros(128, np.float32))[:1 + more])
    np.testing.assert_array_equal(cupy.asnumpy(there), here)
