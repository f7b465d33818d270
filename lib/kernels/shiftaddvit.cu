// Products without multipliers. Sums of selected rows: out[r] = sum of X[j] over the j whose bit is set in row r of a packed 0/1
// matrix. Scores by popcount: how many bits two codes share. Shift-and-add: weights are 0 or +-2^P with -15 <= P <= 0, activations
// are fixed point with 16 binary places, and x 2^P is kept exact as x << (15 + P), in units of 2^-31.
// With COUNT_WORK defined, counts[0] collects additions of matadd, counts[1] popcounts, counts[2] shifts (each with an addition).

#define TILE 16

#ifdef COUNT_WORK
#define COUNTED(what, n) atomicAdd(&counts[what], (unsigned long long)(n))
#else
#define COUNTED(what, n)
#endif

// bits: [batch][rows][words], 32 columns a word; X: [batch][cols][E]; out: [batch][rows][E]. One block a row, one thread a column of X.
// All threads of a block meet the same bits, so none of them waits for another.
extern "C" __global__ void __launch_bounds__(64)
matadd(const unsigned* bits, const float* X, float* out, int rows, int cols, int words, int E, unsigned long long* counts) {
    int row = blockIdx.x, batch = blockIdx.y, e = threadIdx.x;
    if (e >= E) return;
    const unsigned* mine = bits + ((size_t)batch * rows + row) * words;
    const float* x = X + (size_t)batch * cols * E + e;
    float sum = 0.0f;
    int added = 0;
    for (int w = 0; w < words; ++w)
        for (unsigned left = mine[w], j = 32 * w; left != 0u; left >>= 1, ++j)
            if (left & 1u) {
                sum += x[(size_t)j * E];
                ++added;
            }
    out[((size_t)batch * rows + row) * E + e] = sum;
    COUNTED(0, added);
}

// shared[batch][n][m] = the bits that q[batch][n] and k[batch][m] have in common, one thread a pair.
extern "C" __global__ void popcount_scores(const unsigned* q, const unsigned* k, int* shared_bits, int N, int words, unsigned long long* counts) {
    int m = blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y * blockDim.y + threadIdx.y, batch = blockIdx.z;
    if (n >= N || m >= N) return;
    int sum = 0;
    for (int w = 0; w < words; ++w)
        sum += __popc(q[((size_t)batch * N + n) * words + w] & k[((size_t)batch * N + m) * words + w]);
    shared_bits[((size_t)batch * N + n) * N + m] = sum;
    COUNTED(1, words);
}

// Y = X W^T in units of 2^-31. X: [N][K] fixed point; codes: [M][K], 0 for a weight of 0, else sign times (16 + P), 1 to 16.
extern "C" __global__ void __launch_bounds__(TILE * TILE)
shift_gemm(const int* X, const signed char* codes, long long* Y, int N, int M, int K, unsigned long long* counts) {
    __shared__ int xs[TILE][TILE + 1];
    __shared__ signed char cs[TILE][TILE + 4];
    int tx = threadIdx.x, ty = threadIdx.y, n = blockIdx.y * TILE + ty, m = blockIdx.x * TILE + tx, m_load = blockIdx.x * TILE + ty;
    long long sum = 0;
    int shifts = 0;
    for (int k0 = 0; k0 < K; k0 += TILE) {
        int k = k0 + tx;
        xs[ty][tx] = n < N && k < K ? X[(size_t)n * K + k] : 0;
        cs[ty][tx] = m_load < M && k < K ? codes[(size_t)m_load * K + k] : (signed char)0;
        __syncthreads();                            // both tiles are complete
        for (int j = 0; j < TILE; ++j) {
            int code = cs[tx][j];
            if (code != 0) {                        // a shift of a negative number is one of its bits: done unsigned, the same bits
                long long x = (long long)((unsigned long long)(long long)xs[ty][j] << ((code > 0 ? code : -code) - 1));
                sum += code > 0 ? x : -x;
                ++shifts;
            }
        }
        __syncthreads();                            // nobody reads them any more
    }
    if (n < N && m < M) {
        Y[(size_t)n * M + m] = sum;
        COUNTED(2, shifts);
    }
}
