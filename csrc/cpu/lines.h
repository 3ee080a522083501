// A line of an op: 64 bytes of the type P that it writes, and the same elements of its other
// operands. A part of a line is kLanes of its elements, in the order in which P is unpacked
// fastest.
#pragma once

#include "convert.h"

namespace afd::AFD_ISA {

template <class P>
constexpr int kLine = static_cast<int>(64 / sizeof(P));
template <class P>
constexpr int kLineParts = kLine<P> / kLanes;

// AVX2 widens the halves of each 128 bits, so that parts hold elements 0-3 and 8-11, 4-7 and 12-15.
template <class P>
constexpr bool kInHalves = false;
#if defined(__AVX2__) && !defined(__AVX512F__)
template <>
inline constexpr bool kInHalves<bf16> = true;
#endif

// Where, in the parts of a block one after the other, its element i is.
template <class P>
AFD_INLINE constexpr int place_in_block(int i) {
  return kInHalves<P> ? i / 4 % 2 * 8 + i / 8 * 4 + i % 4 : i;
}

// Part k of a line of P's.
template <class P>
AFD_INLINE Float load_part(const float* line, int k) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (kInHalves<P>) {
    const float* from = line + k / 2 * kBlock + k % 2 * 4;
    return _mm256_set_m128(_mm_loadu_ps(from + 8), _mm_loadu_ps(from));
  }
#endif
  return load(line + k * kLanes);
}

template <class P>
AFD_INLINE Float load_part(const bf16* line, int k) {
#if defined(__AVX512F__)
  // One permutation widens and shifts.
  const __m512i x = _mm512_castsi256_si512(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + k * kLanes)));
  WordLanes twice;
  for (uint32_t i = 0; i < 16; ++i) {
    twice[i] = i << 16;
  }
  return (FloatLanes)_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, (__m512i)twice, x);
#elif defined(__AVX2__)
  if (kInHalves<P>) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + k / 2 * kBlock));
    const __m256i zero = _mm256_setzero_si256();
    return (FloatLanes)(k % 2 == 0 ? _mm256_unpacklo_epi16(zero, x)
                                   : _mm256_unpackhi_epi16(zero, x));
  }
#endif
  return load(line + k * kLanes);
}

template <class P>
AFD_INLINE Float load_part(const f16* line, int k) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (kInHalves<P>) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + k / 2 * kBlock));
    const __m256i halves = _mm256_permute4x64_epi64(x, 0xD8);
    return _mm256_cvtph_ps(k % 2 == 0 ? _mm256_castsi256_si128(halves)
                                      : _mm256_extracti128_si256(halves, 1));
  }
#endif
  return load(line + k * kLanes);
}

// Stores a line. `stream` bypasses the caches and needs p aligned to 64 bytes.
template <class P>
AFD_INLINE void store_line(P* p, const Float* x, bool stream) {
  for (int i = 0; i < kLine<P> / kBlock; ++i) {
    store_block(p + i * kBlock, x + i * kParts, stream);
  }
}

#if defined(__AVX512F__)
AFD_INLINE void store_line(bf16* p, const Float* x, bool stream) {
  // One question for the whole line, and the answer is hardly ever yes.
  if (__builtin_expect(_mm512_cmp_ps_mask(x[0].v, x[1].v, _CMP_UNORD_Q) != 0, 0)) {
    store_block(p, x, stream);
    store_block(p + kBlock, x + 1, stream);
    return;
  }
  __m512i words[2];
  for (int i = 0; i < 2; ++i) {
    const __m512i bits = (__m512i)x[i].v;
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF));
    words[i] = _mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
  }
  WordLanes upper;
  for (uint32_t i = 0; i < 16; ++i) {
    upper[i] = (4 * i + 1) | (4 * i + 3) << 16;
  }
  const __m512i line = _mm512_permutex2var_epi16(words[0], (__m512i)upper, words[1]);
  if (stream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), line);
  } else {
    _mm512_storeu_si512(p, line);
  }
}
#elif defined(__AVX2__)
AFD_INLINE void store_line(bf16* p, const Float* x, bool stream) {
  for (int i = 0; i < 2; ++i) {
    Word a, b;
    const __m256 nan = _mm256_cmp_ps(x[2 * i].v, x[2 * i + 1].v, _CMP_UNORD_Q);
    if (__builtin_expect(_mm256_testz_ps(nan, nan), 1)) {
      a = number_to_bf16(x[2 * i]);
      b = number_to_bf16(x[2 * i + 1]);
    } else {
      a = to_bf16(x[2 * i]);
      b = to_bf16(x[2 * i + 1]);
    }
    const __m256i packed = _mm256_packus_epi32((__m256i)a.v, (__m256i)b.v);
    __m256i* const to = reinterpret_cast<__m256i*>(p + i * kBlock);
    stream ? _mm256_stream_si256(to, packed) : _mm256_storeu_si256(to, packed);
  }
}
#endif

}  // namespace afd::AFD_ISA
