// Barriers and the collectives of a warp. Lanes of a mask must all come to the same line; a lane
// may be read only if the mask names it.
#pragma once

#include <type_traits>

#include "machine.h"

namespace cuda_on_cpu {

template <class T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  return word;
}

template <class T>
T from_word(uint64_t word) {
  T value;
  memcpy(static_cast<void*>(&value), &word, sizeof value);
  return value;
}

inline Collective together(const char* name, Site site, unsigned mask, uint64_t given) {
  Collective c = {name, site, mask, given};
  sync_lanes(c);
  return c;
}

// The lanes of one shuffle: segments of `width`, each reading inside itself.
struct Segment {
  int lane, first, width;
  explicit Segment(int w) : lane(static_cast<int>(cuda_on_cpu::lane())), width(w) {
    if (w < 1 || w > 32 || (w & (w - 1)) != 0) {
      fail("shuffle width " + std::to_string(w) + " is not a power of two up to 32");
    }
    first = lane & ~(w - 1);
  }
};

template <class T>
T shuffle(const char* name, Site site, unsigned mask, T value, int source) {
  const Collective c = together(name, site, mask, to_word(value));
  if (!(mask >> source & 1)) {
    fail(std::string(name) + " reads lane " + std::to_string(source) +
         ", which its mask does not name");
  }
  return from_word<T>(c.values[source]);
}

// f of the values of all lanes of the mask, from the lowest up.
template <class T, class F>
T reduce(const char* name, Site site, unsigned mask, T value, F f) {
  const Collective c = together(name, site, mask, to_word(value));
  bool first = true;
  T result{};
  for (unsigned i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) {
      const T other = from_word<T>(c.values[i]);
      result = first ? other : f(result, other);
      first = false;
    }
  }
  return result;
}

inline unsigned ballot(const char* name, Site site, unsigned mask, bool value) {
  const Collective c = together(name, site, mask, value ? 1 : 0);
  unsigned bits = 0;
  for (unsigned i = 0; i < kWarp; ++i) {
    bits |= (mask >> i & 1 & static_cast<unsigned>(c.values[i])) << i;
  }
  return bits;
}

}  // namespace cuda_on_cpu

// Where the caller stands.
#define CUDA_ON_CPU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::sync_block({file, line}); }

inline void __syncwarp(unsigned mask = cuda_on_cpu::kFullMask, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::together("__syncwarp", {file, line}, mask, 0);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_SITE) {
  const cuda_on_cpu::Segment s(width);
  return cuda_on_cpu::shuffle("__shfl_sync", {file, line}, mask, value,
                              s.first + (source & (width - 1)));
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const cuda_on_cpu::Segment s(width);
  const int source = s.lane - static_cast<int>(delta);
  return cuda_on_cpu::shuffle("__shfl_up_sync", {file, line}, mask, value,
                              source < s.first ? s.lane : source);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const cuda_on_cpu::Segment s(width);
  const int source = s.lane + static_cast<int>(delta);
  return cuda_on_cpu::shuffle("__shfl_down_sync", {file, line}, mask, value,
                              source >= s.first + width ? s.lane : source);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDA_ON_CPU_SITE) {
  const cuda_on_cpu::Segment s(width);
  const int source = s.lane ^ lanes;
  // Earlier segments may be read, later ones not.
  return cuda_on_cpu::shuffle("__shfl_xor_sync", {file, line}, mask, value,
                              source >= s.first + width ? s.lane : source);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::ballot("__ballot_sync", {file, line}, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::ballot("__any_sync", {file, line}, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::ballot("__all_sync", {file, line}, mask, predicate != 0) == mask;
}

#define CUDA_ON_CPU_REDUCE(name, type, expression)                                   \
  inline type name(unsigned mask, type value, CUDA_ON_CPU_SITE) {                    \
    return cuda_on_cpu::reduce(#name, {file, line}, mask, value,                     \
                               [](type a, type b) -> type { return (expression); }); \
  }
CUDA_ON_CPU_REDUCE(__reduce_add_sync, unsigned, a + b)
CUDA_ON_CPU_REDUCE(__reduce_add_sync, int, static_cast<int>(unsigned(a) + unsigned(b)))
CUDA_ON_CPU_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
CUDA_ON_CPU_REDUCE(__reduce_min_sync, int, a < b ? a : b)
CUDA_ON_CPU_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
CUDA_ON_CPU_REDUCE(__reduce_max_sync, int, a > b ? a : b)
CUDA_ON_CPU_REDUCE(__reduce_and_sync, unsigned, a& b)
CUDA_ON_CPU_REDUCE(__reduce_or_sync, unsigned, a | b)
CUDA_ON_CPU_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef CUDA_ON_CPU_REDUCE
