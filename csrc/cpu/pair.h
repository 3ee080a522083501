// Two vectors in step. The noise is one long chain of dependent operations; two chains side by side
// keep the arithmetic units busy where one leaves them waiting.
#pragma once

#include "simd.h"

namespace afd::AFD_ISA {

struct WordPair {
  Word a, b;
  AFD_INLINE WordPair() = default;
  AFD_INLINE WordPair(Word x, Word y) : a(x), b(y) {}
  AFD_INLINE explicit WordPair(uint32_t x) : a(x), b(x) {}
};

struct FloatPair {
  Float a, b;
  AFD_INLINE FloatPair() = default;
  AFD_INLINE FloatPair(Float x, Float y) : a(x), b(y) {}
  AFD_INLINE explicit FloatPair(float x) : a(x), b(x) {}
};

AFD_INLINE WordPair operator+(WordPair x, WordPair y) { return {x.a + y.a, x.b + y.b}; }
AFD_INLINE WordPair operator-(WordPair x, WordPair y) { return {x.a - y.a, x.b - y.b}; }
AFD_INLINE WordPair operator&(WordPair x, WordPair y) { return {x.a & y.a, x.b & y.b}; }
AFD_INLINE WordPair operator^(WordPair x, WordPair y) { return {x.a ^ y.a, x.b ^ y.b}; }
AFD_INLINE WordPair operator<<(WordPair x, int n) { return {x.a << n, x.b << n}; }
AFD_INLINE WordPair shift_right_signed(WordPair x, int n) {
  return {shift_right_signed(x.a, n), shift_right_signed(x.b, n)};
}
AFD_INLINE FloatPair operator-(FloatPair x, FloatPair y) { return {x.a - y.a, x.b - y.b}; }
AFD_INLINE FloatPair operator*(FloatPair x, FloatPair y) { return {x.a * y.a, x.b * y.b}; }
AFD_INLINE FloatPair madd(FloatPair x, FloatPair y, FloatPair z) {
  return {madd(x.a, y.a, z.a), madd(x.b, y.b, z.b)};
}
AFD_INLINE FloatPair root(FloatPair x) { return {root(x.a), root(x.b)}; }
AFD_INLINE WordPair as_bits(FloatPair x) { return {as_bits(x.a), as_bits(x.b)}; }
AFD_INLINE FloatPair as_float(WordPair x) { return {as_float(x.a), as_float(x.b)}; }
AFD_INLINE FloatPair signed_to_float(WordPair x) {
  return {signed_to_float(x.a), signed_to_float(x.b)};
}
AFD_INLINE FloatPair unsigned_to_float(WordPair x) {
  return {unsigned_to_float(x.a), unsigned_to_float(x.b)};
}
AFD_INLINE FloatPair select_by_sign(WordPair sign, FloatPair x, FloatPair y) {
  return {select_by_sign(sign.a, x.a, y.a), select_by_sign(sign.b, x.b, y.b)};
}

// 2 * kLanes words in 64-bit lanes, for 32 x 32 -> 64 bit products. Only the low half of a lane
// means anything: no operation reads the high half.
struct WideWords {
  WideLanes v[4];
  AFD_INLINE WideWords() = default;
  AFD_INLINE explicit WideWords(WordPair x)
      : v{(WideLanes)x.a.v, (WideLanes)x.a.v >> 32, (WideLanes)x.b.v, (WideLanes)x.b.v >> 32} {}
};

// One word for every lane: a round key.
struct WideKey {
  WideLanes v;
  AFD_INLINE WideKey() = default;
  AFD_INLINE explicit WideKey(uint32_t x) : v(WideLanes{} + x) {}
};

AFD_INLINE WideWords operator^(const WideWords& x, const WideWords& y) {
  WideWords r;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r.v[i] = x.v[i] ^ y.v[i];
  }
  return r;
}

AFD_INLINE WideWords operator^(const WideWords& x, const WideKey& key) {
  WideWords r;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r.v[i] = x.v[i] ^ key.v;
  }
  return r;
}

AFD_INLINE void multiply_wide(uint32_t m, const WideWords& x, WideWords& high, WideWords& low) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    low.v[i] = multiply_low_halves(m, x.v[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    high.v[i] = low.v[i] >> 32;
  }
}

AFD_INLINE WordPair narrow(const WideWords& x) {
  return {interleave(x.v[0], x.v[1]), interleave(x.v[2], x.v[3])};
}

}  // namespace afd::AFD_ISA
