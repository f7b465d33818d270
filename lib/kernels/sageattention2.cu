// Attention with integer products of queries and keys, online softmax, and FP8 (E4M3) weights and values.
// A block serves a tile of 128 query rows, a thread one row; keys and values pass by in tiles of 64.
// Small numbers travel four to a word: int8 codes of Q and K, E4M3 codes of V. Floats travel as their bits.
//
// With COUNT_WORK defined, counts[0] collects products of Q and K in the units that make them (__dp4a, four
// at once, or single floats), counts[1] multiply-adds of Delta S, counts[2] bytes of K and V that are read.

#ifndef HEAD
#define HEAD 64                         /* size of a head: compiled in, a multiple of 16 up to 64 */
#endif
#define ROWS 128
#define KEYS 64
#define STEP 32                         /* products that an FP8 tensor core adds before it rounds */
#define LOW -3.0e38f                    /* below every score: not to be seen */
#define WIDE 0                          /* accumulator of P V: 23 bits after the point, */
#define SHORT 1                         /* 13 bits all along, */
#define TWO_LEVEL 2                     /* 13 bits within a tile of keys, 23 from tile to tile */

#ifdef COUNT_WORK
#define COUNT(what, n) (what += (n))
#define COUNTED(i, what) atomicAdd(&counts[i], (unsigned long long)(what))
#else
#define COUNT(what, n)
#define COUNTED(i, what)
#endif

// The E4M3 number nearest to |x|, ties to even: m 2^(e-3), e >= -6, m <= 16; beyond 448 it stays at 448.
__device__ float nearest(float x, int* e, float* m) {
    float a = fminf(fabsf(x), 448.0f);
    *e = max((__float_as_int(a) >> 23) - 127, -6);  // below 2^-6 the steps stay 2^-9 wide
    *m = rintf(a * __int_as_float((130 - *e) << 23));
    return *m * __int_as_float((124 + *e) << 23);
}
__device__ float e4m3_value(unsigned code) {        // sign, 4 bits of exponent, 3 after the point
    int e = (int)(code >> 3 & 15u), m = (int)(code & 7u) + (e > 0 ? 8 : 0);
    float size = (float)m * __int_as_float((max(e, 1) + 117) << 23);
    return code & 128u ? -size : size;
}

// Codes of n numbers.
extern "C" __global__ void to_e4m3(const float* x, unsigned char* codes, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, e;
    float m;
    if (i >= n) return;
    nearest(x[i], &e, &m);
    codes[i] = (unsigned char)((__float_as_int(x[i]) >> 24 & 128) | ((e + 6) * 8 + (int)m));     // 16 carries
}

// Delta S [heads][tiles][N]: the mean query of each tile times each smoothed key, one a thread.
extern "C" __global__ void __launch_bounds__(ROWS)
delta_s(const float* mean, const float* K, float* delta, int N, unsigned long long* counts) {
    int key = blockIdx.x * ROWS + threadIdx.x, head = blockIdx.z, tile = head * gridDim.y + blockIdx.y;
    unsigned adds = 0;
    if (key < N) {
        float sum = 0.0f;
        for (int c = 0; c < HEAD; ++c) {
            sum += mean[(size_t)tile * HEAD + c] * K[((size_t)head * N + key) * HEAD + c];
            COUNT(adds, 1);
        }
        delta[(size_t)tile * N + key] = sum;
    }
    COUNTED(1, adds);
}

// Keep 13 bits after the point, cut off the rest.
__device__ float shortened(float x) { return __int_as_float(__float_as_int(x) & ~1023); }

// out [heads][M][HEAD] = softmax(scale (Q K^T + Delta S)) V. integer: Q, K are int8 codes with a scale for
// each row, otherwise floats. smooth: add Delta S. fp8: P and V in E4M3. v_scale, v_mean: of a channel.
extern "C" __global__ void __launch_bounds__(ROWS)
attend(const int* Q, const int* K, const int* V, const float* q_scale, const float* k_scale,
       const float* delta, const float* v_scale, const float* v_mean, float* out, int M, int N, int integer,
       int smooth, int fp8, int accumulator, int causal, float scale, unsigned long long* counts) {
    __shared__ int tile[KEYS * HEAD];               // keys, then values
    __shared__ float p[KEYS][ROWS];                 // scores, then weights: a thread has a column of its own
    int t = threadIdx.x, row = blockIdx.x * ROWS + t, head = blockIdx.y, words = integer ? HEAD / 4 : HEAD;
    int q[HEAD];
    unsigned products = 0, bytes = 0;
    float acc[HEAD], most = LOW, total = 0.0f, q_unit = row < M ? q_scale[(size_t)head * M + row] : 0.0f;
#pragma unroll
    for (int c = 0; c < HEAD; ++c) {
        q[c] = row < M && c < words ? Q[((size_t)head * M + row) * words + c] : 0;
        acc[c] = 0.0f;
    }
    int end = causal ? min(N, (int)(blockIdx.x + 1) * ROWS) : N;
    for (int start = 0; start < end; start += KEYS) {
        int keys = min(KEYS, N - start);
        for (int i = t; i < keys * words; i += ROWS) {
            tile[i] = K[((size_t)head * N + start) * words + i];
            COUNT(bytes, 4);
        }
        __syncthreads();                            // the keys are here
        float highest = LOW;
        for (int j = 0; j < keys && row < M; ++j) {
            float s = 0.0f;
            if (integer) {
                int dot = 0;
#pragma unroll
                for (int c = 0; c < HEAD / 4; ++c) {
                    dot = __dp4a(q[c], tile[j * (HEAD / 4) + c], dot);
                    COUNT(products, 1);
                }
                s = (float)dot * (q_unit * k_scale[(size_t)head * N + start + j]);
            } else {
#pragma unroll
                for (int c = 0; c < HEAD; ++c) {
                    s += __int_as_float(q[c]) * __int_as_float(tile[j * HEAD + c]);
                    COUNT(products, 1);
                }
            }
            if (smooth) s += delta[((size_t)head * gridDim.x + blockIdx.x) * N + start + j];
            s = causal && start + j > row ? LOW : s * scale;
            p[j][t] = s;
            highest = fmaxf(highest, s);
        }
        float now = fmaxf(most, highest), fade = expf(most - now), sum = 0.0f;
        for (int j = 0; j < keys && row < M; ++j) {
            int e;
            float m, weight = p[j][t] > LOW ? expf(p[j][t] - now) : 0.0f;
            sum += weight;                          // before it is rounded
            p[j][t] = fp8 ? nearest(448.0f * weight, &e, &m) : weight;
        }
        __syncthreads();                            // nobody needs the keys any more
        if (fp8)
            for (int i = t; i < keys * (HEAD / 4); i += ROWS) {
                unsigned four = (unsigned)V[((size_t)head * N + start) * (HEAD / 4) + i];
                for (int b = 0; b < 4; ++b)
                    tile[4 * i + b] = __float_as_int(e4m3_value(four >> 8 * b & 255u));
                COUNT(bytes, 4);
            }
        else
            for (int i = t; i < keys * HEAD; i += ROWS) {
                tile[i] = V[((size_t)head * N + start) * HEAD + i];
                COUNT(bytes, 4);
            }
        __syncthreads();                            // the values are here
#pragma unroll
        for (int c0 = 0; c0 < HEAD; c0 += 16) {
            float part[16];
            for (int c = 0; c < 16; ++c) part[c] = accumulator == SHORT ? acc[c0 + c] * fade : 0.0f;
            for (int j0 = 0; j0 < keys && row < M; j0 += STEP) {
                for (int j = j0; j < min(j0 + STEP, keys); ++j) {
                    float weight = p[j][t];
                    for (int c = 0; c < 16; ++c) part[c] += weight * __int_as_float(tile[j * HEAD + c0 + c]);
                }
                if (accumulator != WIDE)
                    for (int c = 0; c < 16; ++c) part[c] = shortened(part[c]);
            }
            for (int c = 0; c < 16; ++c)
                acc[c0 + c] = accumulator == SHORT ? part[c] : acc[c0 + c] * fade + part[c];
        }
        total = total * fade + sum;
        most = now;
        __syncthreads();                            // nobody needs the values any more
    }
#pragma unroll
    for (int c = 0; c < HEAD; ++c)
        if (row < M)
            out[((size_t)head * M + row) * HEAD + c] =
                acc[c] / total * v_scale[head * HEAD + c] + v_mean[head * HEAD + c];
    COUNTED(0, products);
    COUNTED(2, bytes);
}
