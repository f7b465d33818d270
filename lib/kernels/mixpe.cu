// Products of weights in 4-bit groups, w = scale (u - zero), with int8 or float16 activations:
// Y [M][N] = W [M][K] X [N][K]^T. Codes are packed two a byte along K; scale and zero are [M][K / g].
//
// With COUNT_WORK defined, counts collects, in this order: multiplications by a scale, uses of a zero,
// additions for the sums of activations, shifts, additions of shifted parts, and bytes of W, X, sums and Y
// that pass global memory (a number that many threads of a block read at once counts once).
#include <cuda_fp16.h>

#define TILE 16         /* a block of `tile` makes 16 x 16 results ... */
#define STEP 32         /* ... from 32 values of K at a time, never across the end of a group */
#define FIRST 0         /* scale each weight when its tile is loaded */
#define ONCE 1          /* all weights were scaled before, by `dequantize` */
#define AFTER 2         /* scale the sum of a group */
#define SHIFT 3         /* the same, with products by shifts and additions */

struct Work { unsigned scalings, zeros, sums, shifts, adds, bytes; };
#ifdef COUNT_WORK
#define COUNT(what, n) (work.what += (n))
#define ADD(i, what) atomicAdd(&counts[i], (unsigned long long)work.what)
#define COUNTED (ADD(0, scalings), ADD(1, zeros), ADD(2, sums), ADD(3, shifts), ADD(4, adds), ADD(5, bytes))
#else
#define COUNT(what, n)
#define COUNTED
#endif

// a 2^b for a float16, from its bits. For normal numbers b is added to the exponent. Below them there is no
// hidden one, and moving the fraction to the left doubles it, across the border too. Too large is infinite.
__device__ unsigned short shifted_half(unsigned short h, int b) {
    unsigned size = h & 0x7fffu;
    if (size >= 0x7c00u) return h;                 // infinity, NaN
    while (b > 0 && size < 0x400u) { size <<= 1; --b; }
    size += (unsigned)b << 10;
    return (unsigned short)((h & 0x8000u) | min(size, 0x7c00u));
}

// x u: the four bits of u pick shifted copies of x. `top` is -1 where bit 3 counts -8, otherwise 1.
__device__ int shifted(signed char x, int b) { return (int)((unsigned)(int)x << b); }
__device__ float shifted(__half x, int b) {
    return __half2float(__ushort_as_half(shifted_half(__half_as_ushort(x), b)));
}
template <class X, class Acc> __device__ Acc by_shifts(X x, unsigned u, int top, Work& work) {
    Acc sum = 0;
    int terms = 0;
    for (int b = 0; b < 4; ++b)
        if (u >> b & 1u) {
            sum += (b == 3 ? top : 1) * shifted(x, b);  // float has room for 15 times a float16: exact
            COUNT(shifts, b > 0);
            COUNT(adds, terms > 0);
            ++terms;
        }
    return sum;
}

__device__ float number(signed char x) { return (float)x; }
__device__ float number(__half x) { return __half2float(x); }

// A dequantized weight as a GPU would keep it: rounded to float16.
__device__ float weight(unsigned u, __half scale, int zero) {
    return __half2float(__float2half(__half2float(scale) * (float)((int)u - zero)));
}

// Everything a product needs. Sum is the type for sums of activations: int for int8, float for float16.
template <class X, class Sum> struct Job {
    const unsigned char* codes; const __half* w16; const __half* scale; const unsigned char* zero;
    const X* x; const float* x_scale; const Sum* sums; float* Y; int M, N, K, g;
    __device__ float finished(int m, int n, int G, Sum dot) const {  // a group's share of Y, from its sum
        return __half2float(scale[(size_t)m * (K / g) + G])
             * (float)(dot - (Sum)zero[(size_t)m * (K / g) + G] * sums[(size_t)n * (K / g) + G]);
    }
};
template <int ORDER, class Sum> struct Accumulator { typedef Sum type; };    // codes are summed exactly,
template <class Sum> struct Accumulator<FIRST, Sum> { typedef float type; }; // scaled weights in float
template <class Sum> struct Accumulator<ONCE, Sum> { typedef float type; };

// A block makes a tile of Y.
template <int ORDER, class X, class Sum> __device__ void
tile(const Job<X, Sum>& j, unsigned long long* counts) {
    typedef typename Accumulator<ORDER, Sum>::type Acc;
    __shared__ Acc Ws[TILE][STEP + 1];             // + 1: columns fall into different banks
    __shared__ X Xs[TILE][STEP + 2];
    int tx = threadIdx.x, ty = threadIdx.y, g = j.g, K = j.K;
    int m = blockIdx.y * TILE + ty, n = blockIdx.x * TILE + tx, n_load = blockIdx.x * TILE + ty;
    float y = 0.0f;
    Work work = {};
    for (int G = 0; G < K / g; ++G) {
        Acc dot = 0;
        for (int k0 = 0; k0 < g; k0 += STEP) {
            int steps = min(STEP, g - k0), k = 2 * tx;       // a thread loads one byte, two codes; g is even
            size_t from = (size_t)G * g + k0 + k, group = (size_t)m * (K / g) + G;
            if (m < j.M && k < steps) {
                if (ORDER == ONCE) {
                    for (int i = 0; i < 2; ++i) Ws[ty][k + i] = (Acc)number(j.w16[(size_t)m * K + from + i]);
                    COUNT(bytes, 4);
                } else {
                    unsigned two = j.codes[((size_t)m * K + from) / 2];
                    for (int i = 0; i < 2; ++i) {
                        unsigned u = two >> 4 * i & 15u;
                        Ws[ty][k + i] = ORDER == FIRST ? (Acc)weight(u, j.scale[group], j.zero[group])
                                                       : (Acc)u;
                    }
                    if (ORDER == FIRST) { COUNT(scalings, 2); COUNT(zeros, 2); }
                    COUNT(bytes, 1 + 3 * (k0 + k == 0));
                }
            }
            if (n_load < j.N && k < steps) {
                for (int i = 0; i < 2; ++i) Xs[ty][k + i] = j.x[(size_t)n_load * K + from + i];
                COUNT(bytes, 2 * sizeof(X));
            }
            __syncthreads();                       // both tiles are complete
            if (m < j.M && n < j.N)
                for (int s = 0; s < steps; ++s)
                    if (ORDER == SHIFT) dot += by_shifts<X, Acc>(Xs[tx][s], (unsigned)Ws[ty][s], 1, work);
                    else dot += Ws[ty][s] * (Acc)number(Xs[tx][s]);
            __syncthreads();                       // nobody reads them any more
        }
        if (m < j.M && n < j.N) {
            if (ORDER == FIRST || ORDER == ONCE) y += (float)dot;
            else {
                y += j.finished(m, n, G, (Sum)dot);
                COUNT(scalings, 1); COUNT(zeros, 1); COUNT(bytes, 4 * (ty == 0));
            }
        }
    }
    if (m < j.M && n < j.N) { j.Y[(size_t)m * j.N + n] = y * j.x_scale[n]; COUNT(bytes, 4); }
    COUNTED;
}

// One result a warp, for few rows of X. Its lanes share a group's bytes, and meet at the end of each group
// (AFTER) or of the row (FIRST).
template <int ORDER, class X, class Sum> __device__ void
warp(const Job<X, Sum>& j, unsigned long long* counts) {
    typedef typename Accumulator<ORDER, Sum>::type Acc;
    int lane = threadIdx.x, m = blockIdx.x * blockDim.y + threadIdx.y, n = blockIdx.y, g = j.g, K = j.K;
    if (m >= j.M) return;                          // the whole warp
    float y = 0.0f;
    Work work = {};
    for (int G = 0; G < K / g; ++G) {
        size_t group = (size_t)m * (K / g) + G;
        Acc dot = 0;
        for (int k = 2 * lane; k < g; k += 64) {
            unsigned two = j.codes[((size_t)m * K + G * g + k) / 2];
            for (int i = 0; i < 2; ++i) {
                unsigned u = two >> 4 * i & 15u;
                Acc w = ORDER == FIRST ? (Acc)weight(u, j.scale[group], j.zero[group]) : (Acc)u;
                dot += w * (Acc)number(j.x[(size_t)n * K + G * g + k + i]);
            }
            if (ORDER == FIRST) { COUNT(scalings, 2); COUNT(zeros, 2); }
            COUNT(bytes, 1 + 2 * sizeof(X));
        }
        COUNT(bytes, 3 * (lane == 0));
        if (ORDER == FIRST) { y += (float)dot; continue; }
        for (int d = 16; d > 0; d /= 2) dot += __shfl_down_sync(0xffffffffu, dot, d);
        if (lane == 0) {
            y += j.finished(m, n, G, (Sum)dot);
            COUNT(scalings, 1); COUNT(zeros, 1); COUNT(bytes, 4);
        }
    }
    if (ORDER == FIRST)
        for (int d = 16; d > 0; d /= 2) y += __shfl_down_sync(0xffffffffu, y, d);
    if (lane == 0) { j.Y[(size_t)m * j.N + n] = y * j.x_scale[n]; COUNT(bytes, 4); }
    COUNTED;
}

// Sums of the activations of each group [N][K / g], once for all rows of W. One thread a sum.
template <class X, class Sum> __device__ void
group_sums(const X* x, Sum* sums, int size, int g, unsigned long long* counts) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    Work work = {};
    if (at < size) {
        Sum sum = (Sum)number(x[(size_t)at * g]);
        for (int k = 1; k < g; ++k) { sum += (Sum)number(x[(size_t)at * g + k]); COUNT(sums, 1); }
        sums[at] = sum;
        COUNT(bytes, g * sizeof(X) + 4);
    }
    COUNTED;
}

// ------------------------------------------------------------------------------- the kernels by plain names
extern "C" __global__ void
sums_a8(const signed char* x, int* sums, int size, int g, unsigned long long* counts) {
    group_sums(x, sums, size, g, counts);
}
extern "C" __global__ void
sums_a16(const __half* x, float* sums, int size, int g, unsigned long long* counts) {
    group_sums(x, sums, size, g, counts);
}

extern "C" __global__ void __launch_bounds__(TILE * TILE)
tile_a8(const unsigned char* codes, const __half* w16, const __half* scale, const unsigned char* zero,
        const signed char* x, const float* x_scale, const int* sums, float* Y, int M, int N, int K, int g,
        int order, unsigned long long* counts) {
    Job<signed char, int> job = {codes, w16, scale, zero, x, x_scale, sums, Y, M, N, K, g};
    if (order == FIRST) tile<FIRST>(job, counts);
    if (order == ONCE) tile<ONCE>(job, counts);
    if (order == AFTER) tile<AFTER>(job, counts);
    if (order == SHIFT) tile<SHIFT>(job, counts);
}
extern "C" __global__ void __launch_bounds__(TILE * TILE)
tile_a16(const unsigned char* codes, const __half* w16, const __half* scale, const unsigned char* zero,
         const __half* x, const float* x_scale, const float* sums, float* Y, int M, int N, int K, int g,
         int order, unsigned long long* counts) {
    Job<__half, float> job = {codes, w16, scale, zero, x, x_scale, sums, Y, M, N, K, g};
    if (order == FIRST) tile<FIRST>(job, counts);
    if (order == ONCE) tile<ONCE>(job, counts);
    if (order == AFTER) tile<AFTER>(job, counts);
    if (order == SHIFT) tile<SHIFT>(job, counts);
}

extern "C" __global__ void __launch_bounds__(256)
warp_a8(const unsigned char* codes, const __half* w16, const __half* scale, const unsigned char* zero,
        const signed char* x, const float* x_scale, const int* sums, float* Y, int M, int N, int K, int g,
        int order, unsigned long long* counts) {
    Job<signed char, int> job = {codes, w16, scale, zero, x, x_scale, sums, Y, M, N, K, g};
    if (order == FIRST) warp<FIRST>(job, counts);
    else warp<AFTER>(job, counts);
}
extern "C" __global__ void __launch_bounds__(256)
warp_a16(const unsigned char* codes, const __half* w16, const __half* scale, const unsigned char* zero,
         const __half* x, const float* x_scale, const float* sums, float* Y, int M, int N, int K, int g,
         int order, unsigned long long* counts) {
    Job<__half, float> job = {codes, w16, scale, zero, x, x_scale, sums, Y, M, N, K, g};
    if (order == FIRST) warp<FIRST>(job, counts);
    else warp<AFTER>(job, counts);
}

// All weights to float16, in memory: w16 [M][K]. One thread a byte of codes.
extern "C" __global__ void
dequantize(const unsigned char* codes, const __half* scale, const unsigned char* zero, __half* w16, int size,
           int g, unsigned long long* counts) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    Work work = {};
    if (at < size) {
        int group = 2 * at / g;
        for (int i = 0; i < 2; ++i)
            w16[2 * at + i] = __float2half(weight(codes[at] >> 4 * i & 15u, scale[group], zero[group]));
        COUNT(scalings, 2); COUNT(zeros, 2); COUNT(bytes, 1 + 4 + 3 * (2 * at % g == 0));
    }
    COUNTED;
}

// Single products, by shifts and additions alone: out = a u.
extern "C" __global__ void
products_a8(const signed char* a, const unsigned char* u, int* out, int size, int top,
            unsigned long long* counts) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    Work work = {};
    if (at < size) out[at] = by_shifts<signed char, int>(a[at], u[at], top, work);
    COUNTED;
}

// The same for float16, three times. wide: as in the tile, nothing is rounded. narrow: each addition rounds to
// float16, lowest bit first. naive: as narrow, but b is added to the exponent's bits of every number alike.
extern "C" __global__ void
products_a16(const __half* a, const unsigned char* u, float* wide, __half* narrow, __half* naive,
             int size, int top, unsigned long long* counts) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    Work work = {};
    if (at < size) {
        unsigned short h = __half_as_ushort(a[at]);
        __half right = __ushort_as_half(0), wrong = right;
        for (int b = 0; b < 4; ++b)
            if (u[at] >> b & 1) {
                unsigned sign = b == 3 && top < 0 ? 0x8000u : 0u;
                unsigned bare = (h & 0x8000u) | ((h + (b << 10)) & 0x7fffu);
                right = __hadd(right, __ushort_as_half((unsigned short)(shifted_half(h, b) ^ sign)));
                wrong = __hadd(wrong, __ushort_as_half((unsigned short)(bare ^ sign)));
            }
        wide[at] = by_shifts<__half, float>(a[at], u[at], top, work);
        narrow[at] = right;
        naive[at] = wrong;
    }
    COUNTED;
}
