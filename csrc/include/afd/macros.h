#pragma once

// AFD_HD marks a formula that both compilers read. Internal linkage on purpose: the CPU sources are
// compiled once per instruction set, and the linker must not merge those copies.
#if defined(__CUDACC__)
#define AFD_HD static __host__ __device__ __forceinline__
#else
#define AFD_HD static inline __attribute__((always_inline, unused))
#endif
