// Stands in for NVIDIA's header of the same name: a half is 16 stored bits; arithmetic is done in float and rounded to nearest even.
#pragma once
struct __half {
  unsigned short bits;
  __half() = default;
  inline __half(float x);
  inline operator float() const;
};
typedef __half half;
static inline __half __ushort_as_half(unsigned short bits) { __half h; h.bits = bits; return h; }
static inline unsigned short __half_as_ushort(__half h) { return h.bits; }
static inline float __half2float(__half h) {
  unsigned sign = (h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) return __uint_as_float(sign | __float_as_uint((float)fraction * 5.9604644775390625e-8f));  // subnormal: units of 2^-24
  return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}
static inline __half __float2half(float x) {
  unsigned u = __float_as_uint(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff, r;
  if (a > 0x7f800000) r = 0x7fff;                                                      // NaN
  else if (a >= 0x477ff000) r = 0x7c00;                                                // rounds to infinity
  else if (a < 0x38800000) r = __float_as_uint(__uint_as_float(a) + 0.5f) - 0x3f000000u;  // subnormal: 0.5 has a step of 2^-24
  else r = (a - 0x38000000u + 0xfff + (a >> 13 & 1)) >> 13;
  return __ushort_as_half((unsigned short)(sign | r));
}
inline __half::__half(float x) : bits(__float2half(x).bits) {}
inline __half::operator float() const { return __half2float(*this); }
static inline __half __float2half_rn(float x) { return __float2half(x); }
static inline __half __hadd(__half a, __half b) { return __float2half(__half2float(a) + __half2float(b)); }
static inline __half __hsub(__half a, __half b) { return __float2half(__half2float(a) - __half2float(b)); }
static inline __half __hmul(__half a, __half b) { return __float2half(__half2float(a) * __half2float(b)); }
struct alignas(4) __half2 { __half x, y; };
typedef __half2 half2;
