// Arithmetic that CUDA has names of its own for. The _rn ones are exactly rounded on a GPU and
// here; the others (rsqrtf, __expf, ...) are accurate here and a few ulps off there.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <limits>

using std::max;
using std::min;

namespace cuda_on_cpu {

template <class To, class From>
To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

// As a GPU converts an already rounded number: the nearest integer there is, 0 for NaN.
template <class I, class F>
I to_integer(F x) {
  constexpr F limit = -static_cast<F>(std::numeric_limits<I>::min());
  static_assert(std::numeric_limits<I>::is_signed);
  if (x != x) {
    return 0;
  }
  if (x >= limit) {
    return std::numeric_limits<I>::max();
  }
  return x < -limit ? std::numeric_limits<I>::min() : static_cast<I>(x);
}

}  // namespace cuda_on_cpu

inline float __int_as_float(int x) { return cuda_on_cpu::bits_of<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bits_of<float>(x); }
inline int __float_as_int(float x) { return cuda_on_cpu::bits_of<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bits_of<unsigned>(x); }
inline double __longlong_as_double(long long x) { return cuda_on_cpu::bits_of<double>(x); }
inline long long __double_as_longlong(double x) { return cuda_on_cpu::bits_of<long long>(x); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return static_cast<float>(1.0 / sqrt(static_cast<double>(a))); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __drcp_rn(double a) { return 1.0 / a; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }

inline float rsqrtf(float x) { return __frsqrt_rn(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __exp2f(float x) { return exp2f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

// In long double the product with pi is good for every bit of a double's answer.
inline double cospi(double x) { return static_cast<double>(cosl(3.14159265358979323846264L * x)); }
inline double sinpi(double x) { return static_cast<double>(sinl(3.14159265358979323846264L * x)); }
inline float cospif(float x) { return static_cast<float>(cospi(x)); }
inline float sinpif(float x) { return static_cast<float>(sinpi(x)); }

inline int __float2int_rn(float x) { return cuda_on_cpu::to_integer<int>(rintf(x)); }
inline int __float2int_rz(float x) { return cuda_on_cpu::to_integer<int>(truncf(x)); }
inline int __float2int_rd(float x) { return cuda_on_cpu::to_integer<int>(floorf(x)); }
inline int __float2int_ru(float x) { return cuda_on_cpu::to_integer<int>(ceilf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline int __mulhi(int a, int b) { return static_cast<int>((static_cast<int64_t>(a) * b) >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) {
    y |= (x >> i & 1) << (31 - i);
  }
  return y;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  return static_cast<unsigned>((both << (n & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  return static_cast<unsigned>(both >> (n & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned at = selector >> (4 * i) & 0xF;
    unsigned byte = static_cast<unsigned>(both >> (8 * (at & 7))) & 0xFF;
    if (at & 8) {
      byte = byte & 0x80 ? 0xFF : 0;
    }
    result |= byte << (8 * i);
  }
  return result;
}
