// Y [M][N] = W [M][K] X [N][K]^T for few rows of X, with a W of which only some groups are stored: group i
// holds columns col[i] * g .. col[i] * g + g - 1, as packed codes, a scale and a zero; row m has the groups
// row_start[m] .. row_start[m + 1] - 1. A worker is a warp. X is float16, sums are float.
//
// With COUNT_WORK defined, load[worker] collects the groups that a worker went through and counts[1] the
// parts of rows that had to be joined, both for the first row of X; counts[0] has the bytes of groups loaded.
#include <cuda_fp16.h>

#ifdef COUNT_WORK
#define LOADED(lane, worker, groups) \
    if ((lane) == 0) { \
        if (blockIdx.y == 0) load[worker] += (groups); \
        atomicAdd(&counts[0], (unsigned long long)(groups) * (g / 2 + 5)); \
    }
#define JOINED(n) if (blockIdx.y == 0) atomicAdd(&counts[1], (unsigned long long)(n))
#else
#define LOADED(lane, worker, groups)
#define JOINED(n)
#endif

struct Weights {
    const unsigned short* col; const unsigned char* codes; const __half* scale; const unsigned char* zero;
};

// Lane 0 gets the product of groups from .. to - 1 with x. The lanes share their bytes, which are neighbours.
__device__ float groups_times(const Weights& w, int from, int to, int g, const __half* x, int lane) {
    int half = g / 2;
    float sum = 0.0f;
    for (int b = from * half + lane; b < to * half; b += 32) {
        int i = b / half, k = w.col[i] * g + 2 * (b - i * half);
        unsigned two = w.codes[b];
        float low = (float)((int)(two & 15u) - w.zero[i]), high = (float)((int)(two >> 4) - w.zero[i]);
        sum += __half2float(w.scale[i]) * (low * __half2float(x[k]) + high * __half2float(x[k + 1]));
    }
    for (int d = 16; d > 0; d /= 2) sum += __shfl_down_sync(0xffffffffu, sum, d);
    return sum;
}

// Rows are dealt out: worker w takes rows w, w + workers, ... A row with many groups keeps its worker busy.
extern "C" __global__ void __launch_bounds__(256)
by_rows(const int* row_start, const unsigned short* col, const unsigned char* codes, const __half* scale,
        const unsigned char* zero, const __half* x, float* Y, int M, int N, int K, int g, int workers,
        unsigned* load, unsigned long long* counts) {
    int lane = threadIdx.x, worker = blockIdx.x * blockDim.y + threadIdx.y, n = blockIdx.y;
    if (worker >= workers) return;
    Weights w = {col, codes, scale, zero};
    for (int m = worker; m < M; m += workers) {
        float sum = groups_times(w, row_start[m], row_start[m + 1], g, x + (size_t)n * K, lane);
        if (lane == 0) Y[(size_t)m * N + n] = sum;
        LOADED(lane, worker, row_start[m + 1] - row_start[m]);
    }
}

// Groups are dealt out: worker w takes an equal share of all of them, wherever it begins and ends. A row
// belongs to the worker that has its first group. Who begins in the middle of a row leaves its part in carry.
extern "C" __global__ void __launch_bounds__(256)
by_groups(const int* row_start, const unsigned short* col, const unsigned char* codes, const __half* scale,
          const unsigned char* zero, const __half* x, float* Y, float* carry, int* carry_row, int M, int N,
          int K, int g, int workers, unsigned* load, unsigned long long* counts) {
    int lane = threadIdx.x, worker = blockIdx.x * blockDim.y + threadIdx.y, n = blockIdx.y;
    if (worker >= workers) return;
    Weights w = {col, codes, scale, zero};
    int all = row_start[M], share = (all + workers - 1) / workers;
    int from = min(worker * share, all), to = min(from + share, all), m = 0;
    for (int high = M; from < to && high - m > 1;) {      // the row m that has group `from`, by bisection
        int middle = (m + high) / 2;
        if (row_start[middle] <= from) m = middle;
        else high = middle;
    }
    if (lane == 0 && n == 0) carry_row[worker] = from < to && from > row_start[m] ? m : -1;
    LOADED(lane, worker, to - from);
    for (; from < to; ++m) {
        int end = min(to, row_start[m + 1]);
        if (end == from) continue;                                 // a row without groups
        float sum = groups_times(w, from, end, g, x + (size_t)n * K, lane);
        if (lane == 0) {
            if (from > row_start[m]) carry[(size_t)worker * N + n] = sum;
            else Y[(size_t)m * N + n] = sum;
        }
        from = end;
    }
}

// Joins the parts of rows that were cut, always in the same order, so that every run gives the same bits.
// One thread a worker and row of X; the first of the workers with parts of a row adds them all.
extern "C" __global__ void join(const float* carry, const int* carry_row, float* Y, int N, int workers,
                                unsigned long long* counts) {
    int worker = blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y;
    if (worker >= workers) return;
    int m = carry_row[worker];
    if (m < 0 || (worker > 0 && carry_row[worker - 1] == m)) return;
    float sum = Y[(size_t)m * N + n];
    for (int v = worker; v < workers && carry_row[v] == m; ++v) {
        sum += carry[(size_t)v * N + n];
        JOINED(1);
    }
    Y[(size_t)m * N + n] = sum;
}
