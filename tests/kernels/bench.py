"""The launcher on a CPU. These are times of an emulation: they say nothing about a GPU."""
import statistics
import time

import numpy as np

from lib.cuda import Module, launch

TILED = r"""
extern "C" __global__ void product(const float* A, const float* B, float* C, int n) {
    __shared__ float a[16][16], b[16][16];
    int row = blockIdx.y * 16 + threadIdx.y, col = blockIdx.x * 16 + threadIdx.x;
    float sum = 0.0f;
    for (int t = 0; t < n; t += 16) {
        a[threadIdx.y][threadIdx.x] = A[row * n + t + threadIdx.x];
        b[threadIdx.y][threadIdx.x] = B[(t + threadIdx.y) * n + col];
        __syncthreads();
        for (int k = 0; k < 16; ++k) sum += a[threadIdx.y][k] * b[k][threadIdx.x];
        __syncthreads();
    }
    C[row * n + col] = sum;
}
extern "C" __global__ void nothing(float* x) { if (threadIdx.x == 0) x[0] = 1.0f; }
"""


def median_of(times, work):
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken)


def rows():
    module, r = Module(TILED), np.random.default_rng(0)
    A, B, C = r.random((256, 256), np.float32), r.random((256, 256), np.float32), np.zeros((256, 256), np.float32)
    x = np.zeros(1, np.float32)
    launch(module["product"], (16, 16), (16, 16), (A, B, C, 256))         # compiles
    assert np.allclose(C, A @ B, rtol=1e-4)
    launch(module["nothing"], 1, 32, (x,))
    yield "launch of an empty kernel", median_of(200, lambda: launch(module["nothing"], 1, 32, (x,))), "ms", "emulation, compiled before"
    yield "tiled product, 256 x 256 x 256", median_of(9, lambda: launch(module["product"], (16, 16), (16, 16), (A, B, C, 256))), "ms", "emulation, 16 x 16 tiles in shared memory"
