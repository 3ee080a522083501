// The part of the CUDA runtime that kernels and their launchers use, for a host compiler. nvcc
// includes its own before every source; tests/cuda_on_cpu/build.py includes this one.
#pragma once

#include "intrinsics.h"
#include "launch.h"
#include "machine.h"
#include "memory.h"
#include "vectors.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (cuda_on_cpu::self().thread)
#define blockIdx (cuda_on_cpu::self().block)
#define gridDim (cuda_on_cpu::grid)
#define blockDim (cuda_on_cpu::block)
constexpr int warpSize = 32;

inline void __trap() { cuda_on_cpu::fail("__trap()"); }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
};
using cudaStream_t = void*;

struct cudaFuncAttributes {
  int binaryVersion, ptxVersion, numRegs, maxThreadsPerBlock;
  size_t sharedSizeBytes, localSizeBytes;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

extern "C" {
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cuda_on_cpu_function(cudaFuncAttributes* attributes);
cudaError_t cuda_on_cpu_shared_limit(int bytes);
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  return cuda_on_cpu_function(attributes);
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int value) {
  return cuda_on_cpu_shared_limit(value);
}
