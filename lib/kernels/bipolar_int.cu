// Products of bipolar integers, bit plane by bit plane. A bit b stands for 2b - 1, a code u of n bits for v = 2u - (2^n - 1).
// Planes are packed 32 bits along K into a word: W is [n_w][M][KW], X is [n_x][N][KW], KW = ceil(K / 32), pad bits are 0 on both sides.
//
// With COUNT_WORK defined, counts[0] collects XOR-popcounts of words, counts[1] operand words read from global memory,
// counts[2] bytes of products written to and read from global memory. Without it the counting is not compiled.

#define TILE 16                                    /* a block computes 16 x 16 products, in steps of 16 words (512 bits) of K */
#define MAX_BITS 8

#ifdef COUNT_WORK
#define COUNTERS unsigned popcounts = 0, words = 0, bytes = 0
#define COUNT(what, n) (what += (n))
#define COUNTED(counts) (atomicAdd(&counts[0], (unsigned long long)popcounts), atomicAdd(&counts[1], (unsigned long long)words), \
                         atomicAdd(&counts[2], (unsigned long long)bytes))
#else
#define COUNTERS
#define COUNT(what, n)
#define COUNTED(counts)
#endif

// Codes [rows][K], one byte each, to planes [n][rows][KW]. A warp makes one word of each plane: its 32 lanes vote with bit i of their codes.
extern "C" __global__ void pack(const unsigned char* __restrict__ codes, unsigned* __restrict__ planes, int rows, int K, int n) {
    int k = blockIdx.x * 32 + threadIdx.x, row = blockIdx.y * blockDim.y + threadIdx.y, KW = (K + 31) / 32;
    unsigned code = row < rows && k < K ? codes[(size_t)row * K + k] : 0u;
    for (int i = 0; i < n; ++i) {
        unsigned word = __ballot_sync(0xffffffffu, code >> i & 1u);
        if (threadIdx.x == 0 && row < rows) planes[((size_t)i * rows + row) * KW + blockIdx.x] = word;
    }
}

// Y = W X^T in one go: all planes of a tile are loaded once, all n_w n_x plane products are summed in a register, and only Y leaves the chip.
extern "C" __global__ void __launch_bounds__(TILE * TILE)
fused(const unsigned* __restrict__ W, const unsigned* __restrict__ X, int* __restrict__ Y, int M, int N, int K, int n_w, int n_x,
      unsigned long long* counts) {
    __shared__ unsigned Ws[MAX_BITS][TILE][TILE + 1], Xs[MAX_BITS][TILE][TILE + 1];     // + 1: columns fall into different banks
    int tx = threadIdx.x, ty = threadIdx.y, m = blockIdx.y * TILE + ty, n = blockIdx.x * TILE + tx, n_load = blockIdx.x * TILE + ty;
    int KW = (K + 31) / 32;
    unsigned differing = 0;                        // sum over planes of 2^(i+j) popcount(w_i ^ x_j)
    COUNTERS;
    for (int k0 = 0; k0 < KW; k0 += TILE) {
        int k = k0 + tx, steps = min(TILE, KW - k0);
        if (m < M && k < KW)
            for (int i = 0; i < n_w; ++i) { Ws[i][ty][tx] = W[((size_t)i * M + m) * KW + k]; COUNT(words, 1); }
        if (n_load < N && k < KW)
            for (int j = 0; j < n_x; ++j) { Xs[j][ty][tx] = X[((size_t)j * N + n_load) * KW + k]; COUNT(words, 1); }
        __syncthreads();
        if (m < M && n < N)
            for (int i = 0; i < n_w; ++i)
                for (int j = 0; j < n_x; ++j) {
                    unsigned ones = 0;
                    for (int s = 0; s < steps; ++s) { ones += __popc(Ws[i][ty][s] ^ Xs[j][tx][s]); COUNT(popcounts, 1); }
                    differing += ones << (i + j);
                }
        __syncthreads();
    }
    if (m < M && n < N) {                          // unsigned arithmetic wraps, and the result fits: |Y| <= K (2^n_w - 1)(2^n_x - 1) < 2^31
        unsigned most = (unsigned)K * ((1u << n_w) - 1) * ((1u << n_x) - 1);
        Y[(size_t)m * N + n] = (int)(most - 2u * differing);
        COUNT(bytes, 4);
    }
    COUNTED(counts);
}

// The obvious way: each pair of planes (i, j) = blockIdx.z is a product of its own, written to P [n_w n_x][M][N] ...
extern "C" __global__ void __launch_bounds__(TILE * TILE)
plane_products(const unsigned* __restrict__ W, const unsigned* __restrict__ X, int* __restrict__ P, int M, int N, int K, int n_x,
               unsigned long long* counts) {
    __shared__ unsigned Ws[TILE][TILE + 1], Xs[TILE][TILE + 1];
    int tx = threadIdx.x, ty = threadIdx.y, m = blockIdx.y * TILE + ty, n = blockIdx.x * TILE + tx, n_load = blockIdx.x * TILE + ty;
    int KW = (K + 31) / 32, i = blockIdx.z / n_x, j = blockIdx.z % n_x, ones = 0;
    COUNTERS;
    for (int k0 = 0; k0 < KW; k0 += TILE) {
        int k = k0 + tx, steps = min(TILE, KW - k0);
        if (m < M && k < KW) { Ws[ty][tx] = W[((size_t)i * M + m) * KW + k]; COUNT(words, 1); }
        if (n_load < N && k < KW) { Xs[ty][tx] = X[((size_t)j * N + n_load) * KW + k]; COUNT(words, 1); }
        __syncthreads();
        if (m < M && n < N)
            for (int s = 0; s < steps; ++s) { ones += __popc(Ws[ty][s] ^ Xs[tx][s]); COUNT(popcounts, 1); }
        __syncthreads();
    }
    if (m < M && n < N) { P[((size_t)blockIdx.z * M + m) * N + n] = K - 2 * ones; COUNT(bytes, 4); }
    COUNTED(counts);
}

// ... and read again to be shifted and added.
extern "C" __global__ void recover(const int* __restrict__ P, int* __restrict__ Y, int size, int n_w, int n_x, unsigned long long* counts) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    COUNTERS;
    if (at < size) {
        int sum = 0;
        for (int i = 0; i < n_w; ++i)
            for (int j = 0; j < n_x; ++j) { sum += P[(size_t)(i * n_x + j) * size + at] * (1 << (i + j)); COUNT(bytes, 4); }
        Y[at] = sum;
        COUNT(bytes, 4);
    }
    COUNTED(counts);
}
