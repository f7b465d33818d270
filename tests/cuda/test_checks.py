"""Every seeded bug is found, at its line, in its array; correct kernels are clean; every kernel of the book compiles for real GPUs."""
import re
from pathlib import Path

import numpy as np
import pytest

from lib.cuda import ArgumentError, CompileError, KernelError, MissingTool, Module, check, checks, compile_check, cpu, nvrtc as nvrtc_module

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
bugs = Module.from_file(HERE / "bugs.cu")
features = Module.from_file(HERE / "features.cu")
x, y, ints = np.arange(128, dtype=np.float32), np.zeros(128, np.float32), np.arange(128, dtype=np.int32)
KERNELS = sorted((ROOT / "lib").rglob("*.cu"))


@pytest.fixture(scope="module")
def sanitizers(compiler):
    report = check(features["vectors"], 1, 32, (np.zeros((32, 4), np.float32), np.zeros(32, np.float32)))
    if report.skipped:
        pytest.skip("; ".join(report.skipped))


CASES = [
    ("missing_barrier", (x, y), "race", "tile"), ("barrier_at_loop_end", (np.zeros(256, np.float32), y, 256), "race", "tile"),
    ("lost_update", (ints, np.zeros(8, np.int32)), "race", "counts"),
    ("one_too_many", (x, y, 128), "out of bounds", "x|y"), ("before_the_start", (y,), "out of bounds", "y"),
    ("shared_overrun", (x, y), "out of bounds", "tile"), ("dynamic_overrun", (y,), "out of bounds", "dynamic shared memory"),
    ("divergent", (y,), "barrier", ""), ("early_return", (y,), "barrier", ""), ("half_a_warp", (y,), "deadlock", ""), ("not_in_mask", (y,), "mask", ""),
]


@pytest.mark.parametrize("name, args, kind, array", CASES, ids=[c[0] for c in CASES])
def test_bugs_are_found_with_line_and_array(sanitizers, name, args, kind, array):
    report = check(bugs[name], 2 if name == "one_too_many" else 1, 128, args, shared=512 if name == "dynamic_overrun" else 0)
    line = next(i for i, text in enumerate(bugs.source.splitlines(), 1) if re.search(rf"// \w+: {name}\b", text))
    assert not report.clean and {f.kind for f in report.findings} == {kind}, str(report)
    assert any(re.search(rf"\bline {line}\b", f.says) for f in report.findings), str(report)
    assert any(re.fullmatch(array, f.array) for f in report.findings), str(report)
    assert not y.any()                                     # check works on copies


def test_far_out_of_bounds_is_found(sanitizers):
    assert {f.kind for f in check(bugs["far_away"], 1, 128, (y,)).findings} == {"out of bounds"}


def test_correct_kernels_are_clean(sanitizers):
    ones = np.ones(300, np.float32)
    report = check(features["block_sum"], 3, 128, (ones, np.zeros(3, np.float32), 300), shared=512)
    assert report.clean and report.tools[:2] == ("AddressSanitizer", "ThreadSanitizer"), str(report)
    assert check(features["matmul"], (2, 2), (16, 16), (*np.ones((3, 32, 32), np.float32), 32)).clean
    assert check(features["warp"], 1, 128, (np.zeros((128, 9), np.int32), np.zeros(128, np.float32))).clean
    n = np.int32(100)
    args = (np.zeros(7, np.int32), np.zeros(5, np.uint32), np.zeros(1, np.float32), np.zeros(1), np.zeros(1, np.uint64), np.zeros(100, np.int32), n)
    report = check(features["atomics"], 1, 128, args)
    assert {f.line for f in report.findings} <= {i for i, s in enumerate(features.source.splitlines(), 1) if "i[5] += 1" in s}, str(report)


def test_one_removed_barrier_of_the_tiled_product_is_found(sanitizers):
    first, _, last = features.source.partition("C[row * n + col] = sum;")
    cut = first.rindex("__syncthreads();")
    wrong = Module(first[:cut] + first[cut + len("__syncthreads();"):] + "C[row * n + col] = sum;" + last, "wrong.cu")
    report = check(wrong["matmul"], (2, 2), (16, 16), (*np.ones((3, 32, 32), np.float32), 32))
    assert {f.array for f in report.findings if f.kind == "race"} == {"As", "Bs"}, str(report)


@pytest.mark.parametrize("name, args, kind, array", [CASES[0], CASES[3], CASES[4], CASES[7], CASES[8]], ids=["race", "bounds", "before", "barrier", "return"])
def test_without_sanitizers_fences_and_orders_still_find(compiler, monkeypatch, name, args, kind, array):
    def none(*_):
        raise checks._NoSanitizer("not on this machine")
    monkeypatch.setattr(checks, "_run_child", none)
    report = check(bugs[name], 2 if name == "one_too_many" else 1, 128, args)
    assert {f.kind for f in report.findings} == {kind}, str(report)
    assert any(re.fullmatch(array if kind != "race" else "y", f.array) for f in report.findings)
    assert "AddressSanitizer (not on this machine)" in report.skipped and "not used:" in str(report)
    assert check(features["block_sum"], 1, 128, (x, np.zeros(1, np.float32), 128), shared=512).clean


def test_check_says_what_it_can_not_do(compiler):
    with pytest.raises(ArgumentError, match="'y' .* should have dtype float32, has int32"):
        check(bugs["divergent"], 1, 128, (ints,))
    with pytest.raises(CompileError, match=r"kernel\.cu:1:"):
        check(Module('extern "C" __global__ void k(float* x) { x[0] = nothing; }')["k"], 1, 1, (y,))


def test_a_thread_that_spins_is_stopped(sanitizers):
    spin = Module('extern "C" __global__ void spin(volatile int* flag) { if (threadIdx.x == 0) while (flag[0] == 0); else flag[0] = 1; }')
    with pytest.raises(KernelError, match="not done after 2 s: does a thread wait for another one in a loop"):
        check(spin["spin"], 1, 2, (np.zeros(1, np.int32),), timeout=2)


# ------------------------------------------------------------------------------------------------ NVIDIA's compiler
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("path", KERNELS, ids=[str(p.relative_to(ROOT)) for p in KERNELS])
def test_every_kernel_of_the_book_compiles_for_real_gpus(nvrtc, path, arch):
    made = compile_check(path, arch)
    assert set(Module.from_file(path).names) == set(made.kernels) != set()
    for name, usage in made.kernels.items():
        assert 0 < usage.registers <= 255 and usage.shared <= 48 * 1024 and usage.spilled == 0, (name, usage)
    assert f".target {arch}" in made.ptx


def test_compile_check_reports_what_kernels_take(nvrtc):
    made = compile_check(str(HERE / "features.cu"), "sm_80", names=["filter<2, float>"])
    assert made.kernels["matmul"].shared == 2 * 16 * 16 * 4
    assert made.kernels["filter<2, float>"].registers > 0
    assert set(features.names) | {"filter<2, float>"} == set(made.kernels)


@pytest.mark.parametrize("source, message", [
    ('extern "C" __global__ void k(float* x) {\n  x[0] = scale;\n}', r'kernel.cu\(2\): error: identifier "scale" is undefined'),
    ('extern "C" __global__ void k(float* x) { __shared__ float s[20000]; s[threadIdx.x] = x[0]; __syncthreads(); x[0] = s[3]; }', "too much shared data"),
])
def test_compile_check_says_what_is_wrong(nvrtc, source, message):
    with pytest.raises(CompileError, match=message):
        compile_check(source, "sm_80")


def test_no_nvrtc_is_said_with_the_remedy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(MissingTool, match="pip install cuda-bindings nvidia-cuda-nvrtc"):
        compile_check("", "sm_80")
    assert nvrtc_module.include_folders() is not None and cpu.INCLUDE.is_dir()
