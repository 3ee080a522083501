// The primitive operations the formulas are written with, for one lane: float and uint32_t.
// csrc/cpu/simd.h gives vectors the same names, so a formula is a template over its lane type.
// Every operation is exactly rounded or exact; with contraction off (-ffp-contract=off,
// --fmad=false) all instruction sets and GPUs therefore return the same bits.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "afd/macros.h"

namespace afd {

AFD_HD float madd(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

AFD_HD float root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

AFD_HD float magnitude(float x) {
#if defined(__CUDA_ARCH__)
  return fabsf(x);
#else
  return __builtin_fabsf(x);
#endif
}

// cos and sin of pi x. CUDA's own need no argument reduction, whose slow path lives in local
// memory.
AFD_HD double cos_pi(double x) {
#if defined(__CUDA_ARCH__)
  return cospi(x);
#else
  return cos(3.14159265358979323846 * x);
#endif
}

AFD_HD double sin_pi(double x) {
#if defined(__CUDA_ARCH__)
  return sinpi(x);
#else
  return sin(3.14159265358979323846 * x);
#endif
}

AFD_HD uint32_t as_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

AFD_HD float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// Integer to float, round to nearest even; the signed one reads the word as two's complement.
AFD_HD float unsigned_to_float(uint32_t x) { return static_cast<float>(x); }
AFD_HD float signed_to_float(uint32_t x) { return static_cast<float>(static_cast<int32_t>(x)); }

AFD_HD uint32_t shift_right_signed(uint32_t x, int n) {
  return static_cast<uint32_t>(static_cast<int32_t>(x) >> n);
}

// a where the top bit of `sign` is set, else b.
AFD_HD float select_by_sign(uint32_t sign, float a, float b) { return (sign >> 31) ? a : b; }

AFD_HD void multiply_wide(uint32_t m, uint32_t x, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(m) * x;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}

}  // namespace afd
