// Vectors with the lane operations of afd/lane.h. The sources that include this are compiled once
// per instruction set (AFD_ISA = baseline, avx2, avx512); each copy lives in a namespace of its
// own, and every operation is exactly rounded, so all copies return the same bits.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "afd/problem.h"

#ifndef AFD_ISA
#error "define AFD_ISA as the name of the instruction set this file is compiled for"
#endif

#define AFD_INLINE inline __attribute__((always_inline))

namespace afd::AFD_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float FloatLanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t WordLanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t SignedLanes __attribute__((vector_size(4 * kLanes)));
typedef uint64_t WideLanes __attribute__((vector_size(4 * kLanes)));

struct Word {
  WordLanes v;
  AFD_INLINE Word() = default;
  AFD_INLINE Word(WordLanes x) : v(x) {}
  AFD_INLINE explicit Word(uint32_t x) : v(WordLanes{} + x) {}
};

struct Float {
  FloatLanes v;
  AFD_INLINE Float() = default;
  AFD_INLINE Float(FloatLanes x) : v(x) {}
  AFD_INLINE explicit Float(float x) : v(x - FloatLanes{}) {}
};

AFD_INLINE Word operator+(Word a, Word b) { return a.v + b.v; }
AFD_INLINE Word operator-(Word a, Word b) { return a.v - b.v; }
AFD_INLINE Word operator&(Word a, Word b) { return a.v & b.v; }
AFD_INLINE Word operator|(Word a, Word b) { return a.v | b.v; }
AFD_INLINE Word operator^(Word a, Word b) { return a.v ^ b.v; }
AFD_INLINE Word operator<<(Word a, int n) { return a.v << n; }
AFD_INLINE Word operator>>(Word a, int n) { return a.v >> n; }
AFD_INLINE Word shift_right_signed(Word a, int n) { return (WordLanes)((SignedLanes)a.v >> n); }
AFD_INLINE Float operator+(Float a, Float b) { return a.v + b.v; }
AFD_INLINE Float operator-(Float a, Float b) { return a.v - b.v; }
AFD_INLINE Float operator*(Float a, Float b) { return a.v * b.v; }
AFD_INLINE Word as_bits(Float x) { return (WordLanes)x.v; }
AFD_INLINE Float as_float(Word x) { return (FloatLanes)x.v; }
AFD_INLINE Float magnitude(Float x) { return as_float(as_bits(x) & Word(0x7FFFFFFFu)); }

// Lanes where the mask is all ones take a, where it is zero b.
AFD_INLINE Word select(Word mask, Word a, Word b) { return (mask & a) | (b.v & ~mask.v); }

AFD_INLINE Float select_by_sign(Word sign, Float a, Float b) {
#if defined(__AVX512F__)
  return _mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)sign.v), b.v, a.v);
#elif defined(__AVX2__)
  return _mm256_blendv_ps(b.v, a.v, (__m256)sign.v);
#else
  return as_float(select(shift_right_signed(sign, 31), as_bits(a), as_bits(b)));
#endif
}

AFD_INLINE Float signed_to_float(Word x) {
  return __builtin_convertvector((SignedLanes)x.v, FloatLanes);
}

#if !defined(__FMA__) && !defined(__FP_FAST_FMAF)
typedef double HalfDoubles __attribute__((vector_size(16)));
typedef int64_t HalfSigned __attribute__((vector_size(16)));
typedef float HalfFloats __attribute__((vector_size(8)));

// fma of two lanes without the instruction: the product is exact in double, the sum is rounded to
// odd there (so that the final rounding to float sees every lost bit), then rounded once.
AFD_INLINE HalfFloats fused(HalfFloats a, HalfFloats b, HalfFloats c) {
  const HalfDoubles product =
      __builtin_convertvector(a, HalfDoubles) * __builtin_convertvector(b, HalfDoubles);
  const HalfDoubles addend = __builtin_convertvector(c, HalfDoubles);
  const HalfDoubles sum = product + addend;
  const HalfDoubles back = sum - product;
  const HalfDoubles lost = (product - (sum - back)) + (addend - back);
  const HalfSigned bits = (HalfSigned)sum;
  // Towards the lost part: +1 ulp in magnitude when it has the sum's sign, else -1 ulp. Comparisons
  // with NaN are false, which leaves infinities alone.
  const HalfSigned inexact = (lost < 0.0) | (lost > 0.0);
  const HalfSigned even = (bits & 1) - 1;
  const HalfSigned same_sign = ~((bits ^ (HalfSigned)lost) >> 63);
  const HalfSigned step = (same_sign & 2) - 1;
  const HalfSigned odd = bits + (inexact & even & step);
  return __builtin_convertvector((HalfDoubles)odd, HalfFloats);
}
#endif

AFD_INLINE Float madd(Float a, Float b, Float c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a.v, b.v, c.v);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a.v, b.v, c.v);
#elif defined(__FP_FAST_FMAF)
  Float r;
  for (int i = 0; i < kLanes; ++i) {
    r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  }
  return r;
#else
  Float r;
  for (int i = 0; i < 2; ++i) {
    HalfFloats x, y, z;
    memcpy(&x, reinterpret_cast<const char*>(&a.v) + 8 * i, 8);
    memcpy(&y, reinterpret_cast<const char*>(&b.v) + 8 * i, 8);
    memcpy(&z, reinterpret_cast<const char*>(&c.v) + 8 * i, 8);
    x = fused(x, y, z);
    memcpy(reinterpret_cast<char*>(&r.v) + 8 * i, &x, 8);
  }
  return r;
#endif
}

AFD_INLINE Float root(Float x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x.v);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x.v);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(x.v);
#else
  for (int i = 0; i < kLanes; ++i) {
    x.v[i] = __builtin_sqrtf(x.v[i]);
  }
  return x;
#endif
}

// Lanes 2j and 2j + 1 change places, both become lane 2j, both become lane 2j + 1.
AFD_INLINE Float swap_pairs(Float x) {
#if defined(__AVX512F__)
  return _mm512_permute_ps(x.v, 0xB1);
#elif defined(__AVX2__)
  return _mm256_permute_ps(x.v, 0xB1);
#else
  return FloatLanes{x.v[1], x.v[0], x.v[3], x.v[2]};
#endif
}

AFD_INLINE Float evens_twice(Float x) {
#if defined(__AVX512F__)
  return _mm512_moveldup_ps(x.v);
#elif defined(__AVX2__)
  return _mm256_moveldup_ps(x.v);
#else
  return FloatLanes{x.v[0], x.v[0], x.v[2], x.v[2]};
#endif
}

AFD_INLINE Float odds_twice(Float x) {
#if defined(__AVX512F__)
  return _mm512_movehdup_ps(x.v);
#elif defined(__AVX2__)
  return _mm256_movehdup_ps(x.v);
#else
  return FloatLanes{x.v[1], x.v[1], x.v[3], x.v[3]};
#endif
}

// Both halves are exact in float, and so is high * 2^16: one rounding in all, fused or not.
AFD_INLINE Float unsigned_to_float(Word x) {
#if defined(__AVX512F__)
  return _mm512_cvtepu32_ps((__m512i)x.v);
#elif defined(__AVX2__)
  return madd(signed_to_float(x >> 16), Float(65536.0f), signed_to_float(x & Word(0xFFFFu)));
#else
  return signed_to_float(x >> 16) * Float(65536.0f) + signed_to_float(x & Word(0xFFFFu));
#endif
}

// The 64-bit products of the low halves of the lanes with m.
AFD_INLINE WideLanes multiply_low_halves(uint32_t m, WideLanes x) {
#if defined(__AVX512F__)
  return (WideLanes)_mm512_mul_epu32(_mm512_set1_epi32(static_cast<int>(m)), (__m512i)x);
#elif defined(__AVX2__)
  return (WideLanes)_mm256_mul_epu32(_mm256_set1_epi32(static_cast<int>(m)), (__m256i)x);
#elif defined(__SSE2__)
  return (WideLanes)_mm_mul_epu32(_mm_set1_epi32(static_cast<int>(m)), (__m128i)x);
#else
  return (x & 0xFFFFFFFFu) * m;
#endif
}

// Words 0, 2, 4, ... are the low halves of `even`, words 1, 3, 5, ... those of `odd`.
AFD_INLINE Word interleave(WideLanes even, WideLanes odd) {
  const WideLanes shifted = odd << 32;
#if defined(__AVX512F__)
  return (WordLanes)_mm512_mask_blend_epi32(0xAAAA, (__m512i)even, (__m512i)shifted);
#elif defined(__AVX2__)
  return (WordLanes)_mm256_blend_epi32((__m256i)even, (__m256i)shifted, 0xAA);
#else
  return (WordLanes)((even & 0xFFFFFFFFu) | shifted);
#endif
}

// The quad whose normals lane i computes, relative to the first of kLanes quads: chosen so that
// transposing inside each 128-bit part puts the elements in memory order.
AFD_INLINE constexpr uint32_t quad_of_lane(int i) {
  return static_cast<uint32_t>((i % 4) * (kLanes / 4) + i / 4);
}

// Stores element k of the quads in lane order n0..n3 as 4 * kLanes consecutive floats.
AFD_INLINE void store_quads(float* out, Float n0, Float n1, Float n2, Float n3) {
#if defined(__AVX512F__)
  const __m512 a = _mm512_unpacklo_ps(n0.v, n1.v), b = _mm512_unpackhi_ps(n0.v, n1.v);
  const __m512 c = _mm512_unpacklo_ps(n2.v, n3.v), d = _mm512_unpackhi_ps(n2.v, n3.v);
  _mm512_storeu_pd(out, _mm512_unpacklo_pd((__m512d)a, (__m512d)c));
  _mm512_storeu_pd(out + 16, _mm512_unpackhi_pd((__m512d)a, (__m512d)c));
  _mm512_storeu_pd(out + 32, _mm512_unpacklo_pd((__m512d)b, (__m512d)d));
  _mm512_storeu_pd(out + 48, _mm512_unpackhi_pd((__m512d)b, (__m512d)d));
#elif defined(__AVX2__)
  const __m256 a = _mm256_unpacklo_ps(n0.v, n1.v), b = _mm256_unpackhi_ps(n0.v, n1.v);
  const __m256 c = _mm256_unpacklo_ps(n2.v, n3.v), d = _mm256_unpackhi_ps(n2.v, n3.v);
  _mm256_storeu_ps(out, (__m256)_mm256_unpacklo_pd((__m256d)a, (__m256d)c));
  _mm256_storeu_ps(out + 8, (__m256)_mm256_unpackhi_pd((__m256d)a, (__m256d)c));
  _mm256_storeu_ps(out + 16, (__m256)_mm256_unpacklo_pd((__m256d)b, (__m256d)d));
  _mm256_storeu_ps(out + 24, (__m256)_mm256_unpackhi_pd((__m256d)b, (__m256d)d));
#else
  for (int i = 0; i < 4; ++i) {
    const FloatLanes quad = {n0.v[i], n1.v[i], n2.v[i], n3.v[i]};
    memcpy(out + 4 * i, &quad, sizeof quad);
  }
#endif
}

}  // namespace afd::AFD_ISA
