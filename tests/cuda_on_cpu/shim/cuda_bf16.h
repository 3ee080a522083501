// The part of CUDA's header of that name that kernels use.
#pragma once

#include "half.h"

using __nv_bfloat16 = cuda_on_cpu::Half<cuda_on_cpu::Bf16>;
using __nv_bfloat162 = cuda_on_cpu::Half2<cuda_on_cpu::Bf16>;

CUDA_ON_CPU_PAIRS(__nv_bfloat16, __nv_bfloat162)

inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return {x, x}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return __nv_bfloat16::of_bits(bits); }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
