// Attention that reads only some blocks of the past: a block iterator for prefill, statistics and scores of pages, and
// decoding from listed pages. Head size D <= 64. A page holds P <= 64 tokens in P / L logical pages of L tokens each;
// a pool holds pages [pages][P][D], of which fill[page] tokens are written.
// With COUNT_WORK defined, counts[0] collects blocks of keys that prefill reads, counts[1] logical pages scored,
// counts[2] keys that decode reads.

#define MAX_D 64
#define ROWS 16                                     /* queries of a prefill block */
#define KEYS 64                                     /* keys of one step of it, and of a page at most */
#define LOW -3.0e38f                                /* below every score: not written yet, or not to be seen */

#ifdef COUNT_WORK
#define COUNTED(what, n) atomicAdd(&counts[what], (unsigned long long)(n))
#else
#define COUNTED(what, n)
#endif

// Causal attention of N tokens, only over listed blocks of B keys. Q: [heads][N][D], K and V: [heads / group][N][D].
// The b-th B queries of head h read the key blocks list[first[h * blocks + b]] .. list[first[h * blocks + b + 1] - 1]:
// the kernel never asks why a block is missing. 16 x 16 threads serve 16 queries.
extern "C" __global__ void __launch_bounds__(256)
prefill(const float* Q, const float* K, const float* V, const int* first, const int* list, float* out,
        int N, int D, int B, int group, float scale, unsigned long long* counts) {
    __shared__ float q[ROWS][MAX_D + 1], k[KEYS][MAX_D + 1], v[KEYS][MAX_D], s[ROWS][KEYS + 1];
    int lane = threadIdx.x, r = threadIdx.y, t = r * 16 + lane, head = blockIdx.y;
    int row = blockIdx.x * ROWS + r, blocks = (N + B - 1) / B, at = head * blocks + blockIdx.x * ROWS / B;
    const float *k_head = K + (size_t)(head / group) * N * D, *v_head = V + (size_t)(head / group) * N * D;
    float most = LOW, total = 0.0f, acc[MAX_D / 16] = {0.0f};
    for (int c = lane; c < D; c += 16) q[r][c] = row < N ? Q[((size_t)head * N + row) * D + c] * scale : 0.0f;
    for (int i = first[at]; i < first[at + 1]; ++i) {
        int start = list[i] * B, keys = min(B, N - start);
        for (int j = t; j < keys * D; j += 256) {
            k[j / D][j % D] = k_head[(size_t)start * D + j];
            v[j / D][j % D] = v_head[(size_t)start * D + j];
        }
        __syncthreads();                            // keys and values are here
        float highest = LOW, sum = 0.0f;
        for (int j = lane; j < keys; j += 16) {
            float dot = 0.0f;
            for (int c = 0; c < D; ++c) dot += q[r][c] * k[j][c];
            s[r][j] = start + j <= row ? dot : LOW;
            highest = fmaxf(highest, s[r][j]);
        }
        for (int d = 8; d > 0; d /= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, d));
        float now = fmaxf(most, highest), fade = expf(most - now);
        for (int j = lane; j < keys; j += 16) {
            s[r][j] = s[r][j] > LOW ? expf(s[r][j] - now) : 0.0f;
            sum += s[r][j];
        }
        for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
        __syncthreads();                            // all weights of the row are here
        for (int x = 0; x < MAX_D / 16; ++x)
            if (x * 16 + lane < D) {
                acc[x] *= fade;
                for (int j = 0; j < keys; ++j) acc[x] += s[r][j] * v[j][x * 16 + lane];
            }
        total = total * fade + sum;
        most = now;
        __syncthreads();                            // nobody reads this block any more
        if (t == 0 && blockIdx.x * ROWS % B == 0) COUNTED(0, 1);
    }
    for (int x = 0; x < MAX_D / 16; ++x)
        if (row < N && x * 16 + lane < D)
            out[((size_t)head * N + row) * D + x * 16 + lane] = total > 0.0f ? acc[x] / total : 0.0f;
}

// Channel-wise minimum and maximum of the keys of each logical page of listed pages: low and high are [pages][P / L][D].
// One block a page, one thread a channel.
extern "C" __global__ void __launch_bounds__(64)
page_stats(const float* K, const int* fill, const int* list, float* low, float* high, int P, int L, int D) {
    int page = list[blockIdx.x], c = threadIdx.x, written = fill[page];
    if (c >= D) return;
    for (int i = 0; i * L < written; ++i) {
        float a = -LOW, b = LOW;
        for (int t = i * L; t < min(written, (i + 1) * L); ++t) {
            float x = K[((size_t)page * P + t) * D + c];
            a = fminf(a, x);
            b = fmaxf(b, x);
        }
        low[((size_t)page * (P / L) + i) * D + c] = a;
        high[((size_t)page * (P / L) + i) * D + c] = b;
    }
}

// Scores of the pages list[first[h]] .. list[first[h + 1] - 1] for the query of head h: the largest, over the logical
// pages that have tokens, of sum_c max(q_c low_c, q_c high_c), which no q . k of the page exceeds. One thread a page.
extern "C" __global__ void __launch_bounds__(64)
page_scores(const float* q, const float* low, const float* high, const int* fill, const int* list, const int* first,
            float* scores, int P, int L, int D, unsigned long long* counts) {
    int h = blockIdx.y, i = first[h] + blockIdx.x * 64 + threadIdx.x;
    if (i >= first[h + 1]) return;
    int page = list[i];
    float best = LOW;
    for (int l = 0; l * L < fill[page]; ++l) {      // a logical page without tokens has no score, not a score of 0
        size_t at = ((size_t)page * (P / L) + l) * D;
        float bound = 0.0f;
        for (int c = 0; c < D; ++c) bound += fmaxf(q[h * D + c] * low[at + c], q[h * D + c] * high[at + c]);
        best = fmaxf(best, bound);
        COUNTED(1, 1);
    }
    scores[i] = best;
}

// Attention of one query a head over the tokens of its listed pages. One block a head, 64 threads: first one a token,
// then one a channel.
extern "C" __global__ void __launch_bounds__(64)
decode(const float* q, const float* K, const float* V, const int* fill, const int* list, const int* first, float* out,
       int P, int D, float scale, unsigned long long* counts) {
    __shared__ float qs[MAX_D], s[KEYS];
    int h = blockIdx.x, t = threadIdx.x;
    float most = LOW, total = 0.0f, acc = 0.0f;
    if (t < D) qs[t] = q[h * D + t] * scale;
    __syncthreads();                                // the query is here
    for (int i = first[h]; i < first[h + 1]; ++i) {
        int page = list[i], tokens = fill[page];
        const float *k = K + (size_t)page * P * D, *v = V + (size_t)page * P * D;
        if (t < tokens) {
            float dot = 0.0f;
            for (int c = 0; c < D; ++c) dot += qs[c] * k[t * D + c];
            s[t] = dot;
        }
        __syncthreads();                            // all scores are here
        float now = most, sum = 0.0f, part = 0.0f;
        for (int j = 0; j < tokens; ++j) now = fmaxf(now, s[j]);
        for (int j = 0; j < tokens; ++j) {
            float w = expf(s[j] - now);
            sum += w;
            if (t < D) part += w * v[j * D + t];
        }
        float fade = expf(most - now);
        total = total * fade + sum;
        acc = acc * fade + part;
        most = now;
        __syncthreads();                            // nobody reads these scores any more
        if (t == 0) COUNTED(2, tokens);
    }
    if (t < D) out[h * D + t] = total > 0.0f ? acc / total : 0.0f;
}
