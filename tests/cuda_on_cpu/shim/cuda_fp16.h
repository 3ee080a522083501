// The part of CUDA's header of that name that kernels use.
#pragma once

#include "half.h"

using __half = cuda_on_cpu::Half<cuda_on_cpu::F16>;
using __half2 = cuda_on_cpu::Half2<cuda_on_cpu::F16>;
using half = __half;
using half2 = __half2;

CUDA_ON_CPU_PAIRS(__half, __half2)

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half2 __float2half2_rn(float x) { return {x, x}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline __half __ushort_as_half(uint16_t bits) { return __half::of_bits(bits); }
inline __half __short_as_half(int16_t bits) { return __half::of_bits(static_cast<uint16_t>(bits)); }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline int16_t __half_as_short(__half x) { return static_cast<int16_t>(x.bits); }
