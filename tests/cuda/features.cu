// One kernel for each thing that the CPU side of lib.cuda promises.
#include <cuda_fp16.h>
#include <cuda_bf16.h>

extern "C" __global__ void who_am_i(int* out) {                      // (block, thread) -> one row, for any grid and block
    int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    int row = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
    out[3 * row] = (int)(blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z);
    out[3 * row + 1] = (int)(threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z);
    out[3 * row + 2] += 1;
}

extern "C" __global__ void block_sum(const float* x, float* out, int n) {   // dynamic shared memory, a barrier in a loop
    extern __shared__ float part[];
    int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
    part[t] = i < n ? x[i] : 0.0f;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (t < half) part[t] += part[t + half];
        __syncthreads();
    }
    if (t == 0) out[blockIdx.x] = part[0];
}

#define TILE 16
extern "C" __global__ void __launch_bounds__(TILE * TILE) matmul(const float* __restrict__ A, const float* __restrict__ B, float* __restrict__ C, int n) {
    __shared__ float As[TILE][TILE], Bs[TILE][TILE];
    int tx = threadIdx.x, ty = threadIdx.y, row = blockIdx.y * TILE + ty, col = blockIdx.x * TILE + tx;
    float sum = 0.0f;
    for (int k = 0; k < n; k += TILE) {
        As[ty][tx] = A[row * n + k + tx];
        Bs[ty][tx] = B[(k + ty) * n + col];
        __syncthreads();
        for (int i = 0; i < TILE; ++i) sum += As[ty][i] * Bs[i][tx];
        __syncthreads();
    }
    C[row * n + col] = sum;
}

extern "C" __global__ void warp(int* out, float* undefined) {        // 9 results a thread
    int t = threadIdx.x, lane = t & 31;
    unsigned all = 0xffffffffu;
    out[9 * t] = (int)__ballot_sync(all, t % 3 == 0);
    int scan = lane;
    for (int d = 1; d < 32; d <<= 1) { int below = __shfl_up_sync(all, scan, d); if (lane >= d) scan += below; }
    out[9 * t + 1] = scan;
    int sum = t;
    for (int d = 8; d; d >>= 1) sum += __shfl_xor_sync(all, sum, d, 16);
    out[9 * t + 2] = sum;
    out[9 * t + 3] = __shfl_sync(all, t, 5, 8);
    out[9 * t + 4] = __shfl_down_sync(all, t, 3);
    out[9 * t + 5] = 4 * __all_sync(all, lane > 0) + 2 * __any_sync(all, t == 40) + __all_sync(all, t >= 32);
    out[9 * t + 6] = __syncthreads_count(t & 1);
    int odd = 0;
    if (lane < 16) { odd = __shfl_sync(0x0000ffffu, t, 3); __syncwarp(0x0000ffffu); }   // half a warp, on its own
    out[9 * t + 7] = odd;
    out[9 * t + 8] = __shfl_xor_sync(all, t, 16, 16);                 // earlier groups can be read, later ones not
    undefined[t] = lane < 16 ? __shfl_sync(0x0000ffffu, 1.0f, 20) : 0.0f;                // reads a lane that takes no part
}

extern "C" __global__ void block_votes(int* out) {
    int t = threadIdx.x;
    out[2 * t] = __syncthreads_and(t < 1000);
    out[2 * t + 1] = __syncthreads_or(t == 77);
}

extern "C" __global__ void atomics(int* i, unsigned* u, float* f, double* d, unsigned long long* ll, int* order, int n) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= n) return;
    atomicAdd(&i[0], t); atomicSub(&i[1], t); atomicMin(&i[2], -t); atomicMax(&i[3], t);
    atomicAnd(&u[0], ~(1u << (t & 31))); atomicOr(&u[1], 1u << (t & 31)); atomicXor(&u[2], (unsigned)t); atomicInc(&u[3], 6u); atomicDec(&u[4], 6u);
    atomicAdd(f, 0.5f); atomicAdd(d, 0.25); atomicAdd(ll, 1ull << 33);
    while (atomicCAS(&i[4], 0, 1) != 0) {}                            // free when a thread gets here: there is no barrier inside
    i[5] += 1;
    atomicExch(&i[4], 0);
    order[atomicAdd(&i[6], 1)] = t;
}

extern "C" __global__ void bits(const int* a, const int* b, int* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int* o = out + 10 * i;
    o[0] = __dp4a(a[i], b[i], 7); o[1] = __popc(a[i]); o[2] = __clz(a[i]); o[3] = __ffs(a[i]); o[4] = (int)__brev(a[i]);
    o[5] = (int)__byte_perm(a[i], b[i], 0x3175); o[6] = (int)__funnelshift_l(a[i], b[i], 9); o[7] = __mulhi(a[i], b[i]);
    o[8] = __float_as_int(__int_as_float(a[i] & 0x7fffff) + 1.0f); o[9] = min(a[i], b[i]) ^ max(a[i], b[i]);
}

extern "C" __global__ void halves(const __half* a, const __half* b, __half* product, const float* x, __nv_bfloat16* rounded, half scale, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    product[i] = __hmul(__hmul(a[i], b[i]), scale);
    rounded[i] = __float2bfloat16(x[i]);
}

extern "C" __global__ void every_half(const __half* h, float* wide, __half* back) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    wide[i] = __half2float(h[i]);
    back[i] = __float2half(wide[i]);
}

extern "C" __global__ void vectors(const float4* v, float* dot) {
    float4 q = v[threadIdx.x], r = make_float4(1, 2, 3, 4);
    dot[threadIdx.x] = q.x * r.x + q.y * r.y + q.z * r.z + q.w * r.w;
}

__device__ __constant__ float weights[3] = {1.0f, 10.0f, 100.0f};
template <int TAPS, class T> __global__ void filter(const T* x, T* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    T sum = 0;
    for (int k = 0; k < TAPS && k <= i; ++k) sum += T(weights[k]) * x[i - k];
    y[i] = sum;
}
