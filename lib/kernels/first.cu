// The kernels of "Reading a kernel": small enough to be read whole, correct at every size.
// With COUNT_WORK defined, counts[0] collects the numbers that product and tiled load from global memory.

#ifdef COUNT_WORK
#define LOADED(n) atomicAdd(&counts[0], (unsigned long long)(n))
#else
#define LOADED(n)
#endif

// y = a x, one thread an element. The grid is rounded up to whole blocks:
// the last threads have nothing to do.
extern "C" __global__ void scale(const float* x, float* y, float a, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        y[i] = a * x[i];
}

// C = A B, one thread an entry: A is [M][K], B is [K][N]. Each thread reads a row and a column for itself.
extern "C" __global__ void product(const float* A, const float* B, float* C, int M, int N, int K,
      unsigned long long* counts) {
    int row = blockIdx.y * blockDim.y + threadIdx.y, col = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= M || col >= N) return;
    float sum = 0.0f;
    for (int k = 0; k < K; ++k)
        sum += A[(size_t)row * K + k] * B[(size_t)k * N + col];
    LOADED(2 * K);
    C[(size_t)row * N + col] = sum;
}

// The same, in tiles: a block loads a tile of A and one of B together, and every number loaded serves TILE threads.
#ifndef TILE
#define TILE 16
#endif
extern "C" __global__ void __launch_bounds__(TILE * TILE)
tiled(const float* A, const float* B, float* C, int M, int N, int K,
      unsigned long long* counts) {
    __shared__ float As[TILE][TILE], Bs[TILE][TILE];
    int tx = threadIdx.x, ty = threadIdx.y;
    int row = blockIdx.y * TILE + ty, col = blockIdx.x * TILE + tx;
    float sum = 0.0f;
    for (int k0 = 0; k0 < K; k0 += TILE) {
        bool in_a = row < M && k0 + tx < K, in_b = k0 + ty < K && col < N;
        As[ty][tx] = in_a ? A[(size_t)row * K + k0 + tx] : 0.0f;
        Bs[ty][tx] = in_b ? B[(size_t)(k0 + ty) * N + col] : 0.0f;
        LOADED(in_a + in_b);
        __syncthreads();        // both tiles are complete
        for (int k = 0; k < TILE; ++k)
            sum += As[ty][k] * Bs[k][tx];
        __syncthreads();        // nobody reads them any more
    }
    if (row < M && col < N)
        C[(size_t)row * N + col] = sum;
}

// partial[block] = the sum of the block's elements: half of the threads add the other half's numbers,
// then a quarter, and so on. blockDim.x is a power of two.
extern "C" __global__ void tree_sum(const float* x, float* partial, int n) {
    __shared__ float s[256];
    int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
    s[t] = i < n ? x[i] : 0.0f;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (t < half)
            s[t] += s[t + half];
        __syncthreads();
    }
    if (t == 0)
        partial[blockIdx.x] = s[0];
}

// The same within warps: 32 lanes hand their numbers down by shuffles, without barriers;
// only one number a warp goes through shared memory.
extern "C" __global__ void warp_sum(const float* x, float* partial, int n) {
    __shared__ float s[32];
    int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
    float v = i < n ? x[i] : 0.0f;
    for (int d = 16; d > 0; d /= 2)
        v += __shfl_down_sync(0xffffffffu, v, d);
    if (t % 32 == 0)
        s[t / 32] = v;
    __syncthreads();
    if (t == 0) {
        for (int w = 1; w < (int)blockDim.x / 32; ++w)
            v += s[w];
        partial[blockIdx.x] = v;
    }
}

// counts[v] = how often v occurs: two threads may meet the same v at once, so the addition must be atomic.
extern "C" __global__ void histogram(const int* x, int* counts, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        atomicAdd(&counts[x[i]], 1);
}
