// Wrong on purpose. A comment names the finding; the tests look the lines up by it.
extern "C" __global__ void missing_barrier(const float* x, float* y) {
    __shared__ float tile[128];
    int t = threadIdx.x;
    tile[t] = x[t];
    y[t] = tile[127 - t];                                   // race: missing_barrier
}

extern "C" __global__ void barrier_at_loop_end(const float* x, float* y, int n) {
    __shared__ float tile[128];
    int t = threadIdx.x;
    float sum = 0.0f;
    for (int k = 0; k < n; k += 128) {
        tile[t] = x[k + t];                                 // race: barrier_at_loop_end
        __syncthreads();
        for (int i = 0; i < 128; ++i) sum += tile[i];
    }
    y[t] = sum;
}

extern "C" __global__ void lost_update(const int* x, int* counts) {
    counts[x[threadIdx.x] & 7] += 1;                        // race: lost_update
}

extern "C" __global__ void one_too_many(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i <= n)
        y[i] = 2.0f * x[i];                                 // bounds: one_too_many
}

extern "C" __global__ void before_the_start(float* y) {
    y[(int)threadIdx.x - 1] = 1.0f;                         // bounds: before_the_start
}

extern "C" __global__ void far_away(float* y) {
    y[threadIdx.x + (1 << 28)] = 1.0f;                      // bounds: far_away
}

extern "C" __global__ void shared_overrun(const float* x, float* y) {
    __shared__ float tile[128];
    tile[threadIdx.x + 1] = x[threadIdx.x];                 // bounds: shared_overrun
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x];
}

extern "C" __global__ void dynamic_overrun(float* y) {
    extern __shared__ float part[];
    part[threadIdx.x + 1] = 1.0f;                           // bounds: dynamic_overrun
    __syncthreads();
    y[threadIdx.x] = part[threadIdx.x];
}

extern "C" __global__ void divergent(float* y) {
    if (threadIdx.x < 16) {
        __syncthreads();
    } else {
        y[threadIdx.x] = 1.0f;
        __syncthreads();                                    // barrier: divergent
    }
}

extern "C" __global__ void early_return(float* y) {
    if (threadIdx.x >= 100) return;
    __syncthreads();                                        // barrier: early_return
    y[threadIdx.x] = 1.0f;
}

extern "C" __global__ void half_a_warp(float* y) {
    if (threadIdx.x < 16)
        y[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1.0f, 1);  // deadlock: half_a_warp
}

extern "C" __global__ void not_in_mask(float* y) {
    y[threadIdx.x] = __shfl_down_sync(0x0000ffffu, 1.0f, 1);      // mask: not_in_mask
}

extern "C" __global__ void deep(float* y) {
    volatile float big[40000];
    for (int i = 0; i < 40000; ++i) big[i] = 1.0f;
    y[threadIdx.x] = big[threadIdx.x];
}
