// Loads and stores of kLanes elements of any supported type, in fp32 inside.
#pragma once

#include "simd.h"

namespace afd::AFD_ISA {

typedef uint16_t ShortLanes __attribute__((vector_size(2 * kLanes)));

AFD_INLINE Word load_shorts(const void* p) {
  ShortLanes x;
  memcpy(&x, p, sizeof x);
#if defined(__AVX512F__)
  return (WordLanes)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (WordLanes)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, WordLanes);
#endif
}

AFD_INLINE Float load(const float* p) {
  FloatLanes x;
  memcpy(&x, p, sizeof x);
  return x;
}

AFD_INLINE void store(float* p, Float x) { memcpy(p, &x.v, sizeof x.v); }

AFD_INLINE Float load(const bf16* p) { return as_float(load_shorts(p) << 16); }

AFD_INLINE Float load(const f16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const Word h = load_shorts(p);
  // The exponent is off by 127 - 15; multiplying repairs it, for subnormals too.
  const Float x = as_float((h & Word(0x7FFFu)) << 13) * Float(0x1p112f);
  const Word not_finite = (WordLanes)(x.v >= 65536.0f);
  const Word bits = as_bits(x) | (not_finite & Word(0x7F800000u));
  return as_float(bits | ((h & Word(0x8000u)) << 16));
#endif
}

// Rounded to nearest even, as PyTorch does, if it is a number.
AFD_INLINE Word number_to_bf16(Float x) {
  const Word bits = as_bits(x);
  return (bits + Word(0x7FFFu) + ((bits >> 16) & Word(1u))) >> 16;
}

// NaN becomes 0x7FC0.
AFD_INLINE Word to_bf16(Float x) {
  return select((WordLanes)(x.v != x.v), Word(0x7FC0u), number_to_bf16(x));
}

#if !defined(__F16C__) && !defined(__AVX512F__)
// Rounded to nearest even; NaN keeps the top of its payload and becomes quiet, as F16C does.
AFD_INLINE Word to_f16(Float x) {
  const Word bits = as_bits(x);
  const Word sign = (bits >> 16) & Word(0x8000u);
  const Word a = bits & Word(0x7FFFFFFFu);
  const Word normal = (a + Word(0xFFFu) + ((a >> 13) & Word(1u)) - Word(0x38000000u)) >> 13;
  // The ulp of 0.5 is the smallest subnormal: the addition does the rounding.
  const Word subnormal = as_bits(as_float(a) + Float(0.5f)) - Word(0x3F000000u);
  Word h = select((WordLanes)((SignedLanes)a.v < 0x38800000), subnormal, normal);
  h = select((WordLanes)((SignedLanes)a.v >= 0x477FF000), Word(0x7C00u), h);
  const Word nan = Word(0x7E00u) | ((a >> 13) & Word(0x3FFu));
  return select((WordLanes)((SignedLanes)a.v > 0x7F800000), nan, h) | sign;
}
#endif

// A block is 16 elements on every instruction set: the lanes over which partial sums run.
constexpr int kBlock = 16;
constexpr int kParts = 16 / kLanes;

AFD_INLINE void store_shorts(uint16_t* p, const Word* x, bool stream) {
#if defined(__AVX512F__)
  const __m256i packed = _mm512_cvtepi32_epi16((__m512i)x[0].v);
#elif defined(__AVX2__)
  const __m256i packed =
      _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)x[0].v, (__m256i)x[1].v), 0xD8);
#else
  for (int i = 0; i < kParts; ++i) {
    const ShortLanes narrow = __builtin_convertvector(x[i].v, ShortLanes);
    memcpy(p + i * kLanes, &narrow, sizeof narrow);
  }
  (void)stream;
#endif
#if defined(__AVX2__)
  if (stream) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), packed);
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
  }
#endif
}

// Stores a block. `stream` bypasses the caches and needs p aligned to the block's size.
AFD_INLINE void store_block(float* p, const Float* x, bool stream) {
  for (int i = 0; i < kParts; ++i) {
#if defined(__AVX512F__)
    if (stream) {
      _mm512_stream_ps(p, x[i].v);
      continue;
    }
#elif defined(__AVX2__)
    if (stream) {
      _mm256_stream_ps(p + i * kLanes, x[i].v);
      continue;
    }
#elif defined(__SSE2__)
    if (stream) {
      _mm_stream_ps(p + i * kLanes, x[i].v);
      continue;
    }
#endif
    memcpy(p + i * kLanes, &x[i].v, sizeof x[i].v);
  }
  (void)stream;
}

AFD_INLINE void store_block(bf16* p, const Float* x, bool stream) {
  Word words[kParts];
#if defined(__AVX2__) && !defined(__AVX512F__)
  // One question for the whole block, and the answer is hardly ever yes.
  const __m256 nan = _mm256_cmp_ps(x[0].v, x[1].v, _CMP_UNORD_Q);
  if (__builtin_expect(_mm256_testz_ps(nan, nan), 1)) {
    words[0] = number_to_bf16(x[0]);
    words[1] = number_to_bf16(x[1]);
    store_shorts(&p->bits, words, stream);
    return;
  }
#endif
  for (int i = 0; i < kParts; ++i) {
    words[i] = to_bf16(x[i]);
  }
  store_shorts(&p->bits, words, stream);
}

AFD_INLINE void store_block(f16* p, const Float* x, bool stream) {
#if defined(__AVX512F__)
  const __m256i packed = _mm512_cvtps_ph(x[0].v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  const __m256i packed = _mm256_set_m128i(_mm256_cvtps_ph(x[1].v, _MM_FROUND_TO_NEAREST_INT),
                                          _mm256_cvtps_ph(x[0].v, _MM_FROUND_TO_NEAREST_INT));
#else
  Word words[kParts];
  for (int i = 0; i < kParts; ++i) {
    words[i] = to_f16(x[i]);
  }
  store_shorts(&p->bits, words, stream);
#endif
#if defined(__F16C__) || defined(__AVX512F__)
  if (stream) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), packed);
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
  }
#endif
}

// Non-temporal stores need whole aligned vectors.
AFD_INLINE bool can_stream(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

// Calls body(zero of the element type) for the type a DType names.
template <class Body>
AFD_INLINE void with_type(DType type, Body body) {
  if (type == DType::kFloat32) {
    body(float{});
  } else if (type == DType::kBFloat16) {
    body(bf16{});
  } else {
    body(f16{});
  }
}

}  // namespace afd::AFD_ISA
