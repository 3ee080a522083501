// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// key = the sample's 64-bit seed, counter = (element index / 4, 0, 0): see docs/NUMERICS.md.
#pragma once

#include "afd/lane.h"

namespace afd {

struct PhiloxKey {
  uint32_t low, high;
};

AFD_HD PhiloxKey philox_key(int64_t seed) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier2 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxStep0 = 0x9E3779B9u, kPhiloxStep1 = 0xBB67AE85u;

template <class Word, class Key>
AFD_HD void philox_round(Word& c0, Word& c1, Word& c2, Word& c3, Key key_low, Key key_high) {
  Word high0, low0, high2, low2;
  multiply_wide(kPhiloxMultiplier0, c0, high0, low0);
  multiply_wide(kPhiloxMultiplier2, c2, high2, low2);
  // The products are the slow part of the chain; everything else is joined first.
  c0 = (c1 ^ key_low) ^ high2;
  c1 = low2;
  c2 = (c3 ^ key_high) ^ high0;
  c3 = low0;
}

// Replaces the counter words c0..c3 by the four output words.
AFD_HD void philox4x32_10(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, PhiloxKey key) {
  for (uint32_t round = 0; round < 10; ++round) {
    philox_round(c0, c1, c2, c3, key.low + round * kPhiloxStep0, key.high + round * kPhiloxStep1);
  }
}

// Counters (index, upper, 0, 0) differ in one word only, so most of the first two rounds is the
// same for all of them: it is folded into the round keys once, and a fifth of the work is gone.
template <class Key>
struct PhiloxRounds {
  Key low[10], high[10];
};

template <class Key>
AFD_HD PhiloxRounds<Key> philox_rounds(PhiloxKey key, uint32_t upper) {
  uint32_t shared_high, shared_low;
  multiply_wide(kPhiloxMultiplier0, upper ^ key.low, shared_high, shared_low);
  PhiloxRounds<Key> rounds;
  for (uint32_t i = 0; i < 10; ++i) {
    const uint32_t high = key.high + i * kPhiloxStep1;
    rounds.low[i] = Key(key.low + i * kPhiloxStep0);
    rounds.high[i] = Key(high ^ (i == 1 ? shared_high : i == 2 ? shared_low : 0u));
  }
  return rounds;
}

// The four output words of the counter (index, upper, 0, 0), upper being that of `rounds`.
template <class Word, class Key>
AFD_HD void philox_of_index(Word index, const PhiloxRounds<Key>& rounds, Word& c0, Word& c1,
                            Word& c2, Word& c3) {
  Word high, low;
  multiply_wide(kPhiloxMultiplier0, index, high, low);
  multiply_wide(kPhiloxMultiplier2, high ^ rounds.high[0], c0, c1);
  c0 = c0 ^ rounds.low[1];
  c2 = low ^ rounds.high[1];
  multiply_wide(kPhiloxMultiplier0, c0, high, c3);
  c0 = c1 ^ rounds.low[2];
  c1 = c2;
  c2 = high ^ rounds.high[2];
  multiply_wide(kPhiloxMultiplier2, c1, high, c1);
  c0 = c0 ^ high;
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif !defined(__CUDACC__)
#pragma GCC unroll 7
#endif
  for (int i = 3; i < 10; ++i) {
    philox_round(c0, c1, c2, c3, rounds.low[i], rounds.high[i]);
  }
}

}  // namespace afd
