// Loads and stores with a cache hint, and atomics.
#pragma once

#include "machine.h"

template <class T>
T __ldg(const T* p) {
  cuda_on_cpu::check_aligned(p, alignof(T));
  cuda_on_cpu::read_only(p, sizeof(T));
  return *p;
}

#define CUDA_ON_CPU_LOAD(name)                 \
  template <class T>                           \
  T name(const T* p) {                         \
    cuda_on_cpu::check_aligned(p, alignof(T)); \
    return *p;                                 \
  }
CUDA_ON_CPU_LOAD(__ldca)
CUDA_ON_CPU_LOAD(__ldcg)
CUDA_ON_CPU_LOAD(__ldcs)
CUDA_ON_CPU_LOAD(__ldlu)
CUDA_ON_CPU_LOAD(__ldcv)
#undef CUDA_ON_CPU_LOAD

#define CUDA_ON_CPU_STORE(name)                \
  template <class T>                           \
  void name(T* p, T value) {                   \
    cuda_on_cpu::check_aligned(p, alignof(T)); \
    *p = value;                                \
  }
CUDA_ON_CPU_STORE(__stwb)
CUDA_ON_CPU_STORE(__stcg)
CUDA_ON_CPU_STORE(__stcs)
CUDA_ON_CPU_STORE(__stwt)
#undef CUDA_ON_CPU_STORE

namespace cuda_on_cpu {

template <size_t kBytes>
struct Word;
template <>
struct Word<2> {
  using Type = uint16_t;
};
template <>
struct Word<4> {
  using Type = uint32_t;
};
template <>
struct Word<8> {
  using Type = uint64_t;
};

// *p = f(*p) at once; returns what was there.
template <class T, class F>
T atomically(T* p, F f) {
  check_aligned(p, sizeof(T));
  using W = typename Word<sizeof(T)>::Type;
  W* word = reinterpret_cast<W*>(p);
  W before = __atomic_load_n(word, __ATOMIC_RELAXED);
  for (;;) {
    T old;
    memcpy(static_cast<void*>(&old), &before, sizeof old);
    const T wanted = f(old);
    W after;
    memcpy(&after, &wanted, sizeof after);
    if (__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED)) {
      return old;
    }
  }
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_ATOMIC(name, expression)                                     \
  template <class T>                                                             \
  T name(T* p, T value) {                                                        \
    return cuda_on_cpu::atomically(p, [&](T old) -> T { return (expression); }); \
  }
CUDA_ON_CPU_ATOMIC(atomicAdd, old + value)
CUDA_ON_CPU_ATOMIC(atomicSub, old - value)
CUDA_ON_CPU_ATOMIC(atomicMin, old < value ? old : value)
CUDA_ON_CPU_ATOMIC(atomicMax, old > value ? old : value)
CUDA_ON_CPU_ATOMIC(atomicAnd, old& value)
CUDA_ON_CPU_ATOMIC(atomicOr, old | value)
CUDA_ON_CPU_ATOMIC(atomicXor, old ^ value)
CUDA_ON_CPU_ATOMIC(atomicExch, (static_cast<void>(old), value))
#undef CUDA_ON_CPU_ATOMIC

template <class T>
T atomicCAS(T* p, T compare, T value) {
  return cuda_on_cpu::atomically(p, [&](T old) -> T { return old == compare ? value : old; });
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
