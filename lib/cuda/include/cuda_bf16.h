// Stands in for NVIDIA's header of the same name: a bfloat16 is the upper half of a float, rounded to nearest even. NumPy holds it as uint16.
#pragma once
struct __nv_bfloat16 { unsigned short bits; };
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.bits; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { __nv_bfloat16 h; h.bits = bits; return h; }
static inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float((unsigned)h.bits << 16); }
static inline __nv_bfloat16 __float2bfloat16(float x) {
  unsigned u = __float_as_uint(x);
  if ((u & 0x7fffffff) > 0x7f800000) return __ushort_as_bfloat16(0x7fff);
  return __ushort_as_bfloat16((unsigned short)((u + 0x7fff + (u >> 16 & 1)) >> 16));
}
