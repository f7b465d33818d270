// The CUDA C language on a CPU. This header is included before a .cu file, so that a C++ compiler accepts the text that NVIDIA's compiler accepts.
// The threads themselves (who runs when, what a barrier waits for) are in cudacpu_run.h. No C++ standard library is needed.
#pragma once
#include "cudacpu_run.h"
#include <math.h>

// ------------------------------------------------------------------------------------------------ keywords
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static /* blocks run one after another, so one copy is one block's copy */
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// `extern __shared__ T name[];` is rewritten by cpu.py to this:
#define CC_DYNAMIC_SHARED(T, name) T* name = (T*)cc::now.dynamic

#define threadIdx (cc::now.tid)
#define blockIdx (cc::now.bid)
#define blockDim (cc::now.bdim)
#define gridDim (cc::now.gdim)
#define warpSize 32

// ------------------------------------------------------------------------------------------------ vector types
#define CC_THREE(T, N) struct N##3 { T x, y, z; };
CC_THREE(signed char, char) CC_THREE(unsigned char, uchar) CC_THREE(short, short) CC_THREE(unsigned short, ushort) CC_THREE(int, int)
CC_THREE(float, float) CC_THREE(double, double) CC_THREE(long long, longlong) CC_THREE(unsigned long long, ulonglong) // uint3: cudacpu_run.h
#define CC_VECTORS(T, N, TWO, FOUR) \
  struct N##1 { T x; }; struct TWO N##2 { T x, y; }; struct FOUR N##4 { T x, y, z, w; }; \
  static inline N##1 make_##N##1(T x) { return {x}; } \
  static inline N##2 make_##N##2(T x, T y) { return {x, y}; } \
  static inline N##3 make_##N##3(T x, T y, T z) { return {x, y, z}; } \
  static inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CC_VECTORS(signed char, char, alignas(2), alignas(4))
CC_VECTORS(unsigned char, uchar, alignas(2), alignas(4))
CC_VECTORS(short, short, alignas(4), alignas(8))
CC_VECTORS(unsigned short, ushort, alignas(4), alignas(8))
CC_VECTORS(int, int, alignas(8), alignas(16))
CC_VECTORS(unsigned, uint, alignas(8), alignas(16))
CC_VECTORS(float, float, alignas(8), alignas(16))
CC_VECTORS(double, double, alignas(16), alignas(16))
CC_VECTORS(long long, longlong, alignas(16), alignas(16))
CC_VECTORS(unsigned long long, ulonglong, alignas(16), alignas(16))

// ------------------------------------------------------------------------------------------------ barriers, votes, shuffles
#define __syncthreads() cc::block_sync(__LINE__)
#define __syncthreads_count(p) cc::block_vote(p, __LINE__).count
#define __syncthreads_and(p) cc::block_vote(p, __LINE__).all
#define __syncthreads_or(p) cc::block_vote(p, __LINE__).any
#define __syncwarp(...) cc::warp_barrier(__LINE__, ##__VA_ARGS__)
#define __threadfence() ((void)0)
#define __threadfence_block() ((void)0)
#define __activemask() (cc::now.fiber->warp->everyone())
#define __ballot_sync(mask, p) cc::ballot(mask, (p) != 0, __LINE__)
#define __any_sync(mask, p) (cc::ballot(mask, (p) != 0, __LINE__) != 0)
#define __all_sync(mask, p) (cc::ballot(mask, !(p), __LINE__) == 0)

enum { CC_FROM, CC_UP, CC_DOWN, CC_XOR };
template <class T> static inline T cc_shuffle(int line, int how, unsigned mask, T value, int arg, int width = 32) {
  static_assert(sizeof(T) <= 16, "a shuffle moves at most 16 bytes a lane");
  int lane = cc::now.fiber->lane, first = lane & ~(width - 1), last = first + width - 1, from = lane;
  if (how == CC_FROM) from = first + (arg & (width - 1));
  if (how == CC_UP && lane - arg >= first) from = lane - arg;
  if (how == CC_DOWN && lane + arg <= last) from = lane + arg;
  if (how == CC_XOR && (lane ^ arg) <= last) from = lane ^ arg;
  cc::exchange(mask, &value, sizeof value, from, line);
  return value;
}
#define __shfl_sync(mask, ...) cc_shuffle(__LINE__, CC_FROM, mask, __VA_ARGS__)
#define __shfl_up_sync(mask, ...) cc_shuffle(__LINE__, CC_UP, mask, __VA_ARGS__)
#define __shfl_down_sync(mask, ...) cc_shuffle(__LINE__, CC_DOWN, mask, __VA_ARGS__)
#define __shfl_xor_sync(mask, ...) cc_shuffle(__LINE__, CC_XOR, mask, __VA_ARGS__)

// ------------------------------------------------------------------------------------------------ atomics: real ones, so that the race detector knows them
template <class T> struct cc_same { typedef T type; };
#define CC_ATOMIC(name, result) \
  template <class T> static inline T name(T* p, typename cc_same<T>::type v) { \
    T old, next; __atomic_load(p, &old, __ATOMIC_RELAXED); \
    do next = (result); while (!__atomic_compare_exchange(p, &old, &next, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)); \
    return old; }
CC_ATOMIC(atomicAdd, old + v)
CC_ATOMIC(atomicSub, old - v)
CC_ATOMIC(atomicExch, v)
CC_ATOMIC(atomicMin, v < old ? v : old)
CC_ATOMIC(atomicMax, v > old ? v : old)
CC_ATOMIC(atomicAnd, old & v)
CC_ATOMIC(atomicOr, old | v)
CC_ATOMIC(atomicXor, old ^ v)
CC_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
CC_ATOMIC(atomicDec, old == 0 || old > v ? v : old - 1)
template <class T> static inline T atomicCAS(T* p, typename cc_same<T>::type expected, typename cc_same<T>::type v) {
  __atomic_compare_exchange(p, &expected, &v, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

// ------------------------------------------------------------------------------------------------ bits
template <class To, class From> static inline To cc_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to; memcpy(&to, &from, sizeof to); return to;
}
static inline int __float_as_int(float x) { return cc_bits<int>(x); }
static inline unsigned __float_as_uint(float x) { return cc_bits<unsigned>(x); }
static inline float __int_as_float(int x) { return cc_bits<float>(x); }
static inline float __uint_as_float(unsigned x) { return cc_bits<float>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (x >> i & 1u) << (31 - i);
  return r;
}
static inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++) c += (signed char)(a >> 8 * i) * (signed char)(b >> 8 * i);
  return c;
}
static inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; i++) c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
  return c;
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  unsigned long long both = (unsigned long long)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) {
    unsigned pick = selector >> 4 * i, byte = (unsigned)(both >> 8 * (pick & 7)) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << 8 * i;
  }
  return r;
}
static inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned s) { s &= 31; return s ? hi << s | lo >> (32 - s) : hi; }
static inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned s) { s &= 31; return s ? lo >> s | hi << (32 - s) : lo; }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
static inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }

// ------------------------------------------------------------------------------------------------ arithmetic
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.f) : 0.f; }
static inline int __float2int_rn(float x) { return (int)rintf(x); }
static inline int __float2int_rz(float x) { return (int)x; }
static inline float __int2float_rn(int x) { return (float)x; }
#define __expf(x) expf(x) /* macros: some C libraries declare functions of these names */
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __powf(x, y) powf(x, y)
#define rsqrtf(x) (1.0f / sqrtf(x))
template <class T> static inline T __ldg(const T* p) { return *p; }
#define CC_MIN_MAX(T) static inline T min(T a, T b) { return b < a ? b : a; } static inline T max(T a, T b) { return a < b ? b : a; }
CC_MIN_MAX(int) CC_MIN_MAX(unsigned) CC_MIN_MAX(long) CC_MIN_MAX(unsigned long) CC_MIN_MAX(long long) CC_MIN_MAX(unsigned long long)
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
