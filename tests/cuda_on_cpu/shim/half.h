// Half-precision numbers: 16 bits that are read exactly and rounded to nearest even. Arithmetic is
// done in fp32 and rounded, as a GPU's is (one operation of two 11-bit significands fits fp32).
#pragma once

#include <stdint.h>
#include <string.h>

#include "intrinsics.h"
#include "vectors.h"

namespace cuda_on_cpu {

inline float bf16_to_float(uint16_t bits) {
  return bits_of<float>(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t float_to_bf16(float x) {
  const uint32_t u = bits_of<uint32_t>(x);
  if (x != x) {
    return 0x7FFF;
  }
  return static_cast<uint16_t>((u + 0x7FFFu + (u >> 16 & 1)) >> 16);
}

inline float f16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = bits & 0x7FFF;
  if (magnitude >= 0x7C00) {  // infinity, NaN
    return bits_of<float>(sign | 0x7F800000u | (magnitude & 0x3FF) << 13);
  }
  // Bits of an fp32 number 2^112 times too small; subnormals too, so that the product is exact.
  return bits_of<float>(sign | bits_of<uint32_t>(bits_of<float>(magnitude << 13) * 0x1p112f));
}

inline uint16_t float_to_f16(float x) {
  const uint32_t u = bits_of<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000);
  const float size = bits_of<float>(u & 0x7FFFFFFFu);
  if (x != x) {
    return 0x7FFF;
  }
  if (size >= 65520.0f) {
    return sign | 0x7C00;
  }
  if (size < 0x1p-14f) {
    // The sum with 2^-1 has an ulp of 2^-24, that of fp16's subnormals.
    return static_cast<uint16_t>(sign | (bits_of<uint32_t>(size + 0.5f) - 0x3F000000u));
  }
  const uint32_t m = u & 0x7FFFFFFFu;
  return static_cast<uint16_t>(sign | ((m - 0x38000000u + 0xFFFu + (m >> 13 & 1)) >> 13));
}

template <class Format>
struct Half {
  uint16_t bits;
  Half() = default;
  Half(float x) : bits(Format::round(x)) {}
  operator float() const { return Format::read(bits); }
  static Half of_bits(uint16_t bits) {
    Half h;
    h.bits = bits;
    return h;
  }
  Half& operator+=(Half b) { return *this = *this + b; }
  Half& operator-=(Half b) { return *this = *this - b; }
  Half& operator*=(Half b) { return *this = *this * b; }
  friend Half operator+(Half a, Half b) { return Half(float(a) + float(b)); }
  friend Half operator-(Half a, Half b) { return Half(float(a) - float(b)); }
  friend Half operator*(Half a, Half b) { return Half(float(a) * float(b)); }
  friend Half operator/(Half a, Half b) { return Half(float(a) / float(b)); }
  friend Half operator-(Half a) { return of_bits(a.bits ^ 0x8000); }
};

template <class Format>
struct alignas(4) Half2 {
  Half<Format> x, y;
};

struct F16 {
  static float read(uint16_t bits) { return f16_to_float(bits); }
  static uint16_t round(float x) { return float_to_f16(x); }
};

struct Bf16 {
  static float read(uint16_t bits) { return bf16_to_float(bits); }
  static uint16_t round(float x) { return float_to_bf16(x); }
};

// One rounding: on the way from double to 16 bits, fp32 keeps in its last bit that digits are lost.
template <class Format>
Half<Format> fused(Half<Format> a, Half<Format> b, Half<Format> c) {
  const double exact = __builtin_fma(float(a), float(b), float(c));
  float x = static_cast<float>(exact);
  if (static_cast<double>(x) != exact && exact == exact) {
    if (fabs(static_cast<double>(x)) > fabs(exact)) {
      x = nextafterf(x, 0.0f);
    }
    x = bits_of<float>(bits_of<uint32_t>(x) | 1u);
  }
  return Half<Format>(x);
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_PAIRS(Scalar, Pair)                                                      \
  inline float __low2float(Pair a) { return a.x; }                                           \
  inline float __high2float(Pair a) { return a.y; }                                          \
  inline Scalar __hadd(Scalar a, Scalar b) { return a + b; }                                 \
  inline Scalar __hsub(Scalar a, Scalar b) { return a - b; }                                 \
  inline Scalar __hmul(Scalar a, Scalar b) { return a * b; }                                 \
  inline Scalar __hneg(Scalar a) { return -a; }                                              \
  inline Scalar __hfma(Scalar a, Scalar b, Scalar c) { return cuda_on_cpu::fused(a, b, c); } \
  inline Pair __hadd2(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }                     \
  inline Pair __hsub2(Pair a, Pair b) { return {a.x - b.x, a.y - b.y}; }                     \
  inline Pair __hmul2(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }                     \
  inline Pair __hfma2(Pair a, Pair b, Pair c) {                                              \
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};                                   \
  }
