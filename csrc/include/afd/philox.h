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

// Replaces the counter words c0..c3 by the four output words.
template <class Word>
AFD_HD void philox4x32_10(Word& c0, Word& c1, Word& c2, Word& c3, PhiloxKey key) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high2, low2;
    multiply_wide(0xD2511F53u, c0, high0, low0);
    multiply_wide(0xCD9E8D57u, c2, high2, low2);
    c0 = high2 ^ c1 ^ Word(key.low);
    c1 = low2;
    c2 = high0 ^ c3 ^ Word(key.high);
    c3 = low0;
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
}

}  // namespace afd
