// Eight neighbouring elements per thread, in fp32 registers: 16-byte accesses where the address
// allows, one element at a time where it does not.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>

#include "afd/nft_math.h"

namespace afd::cuda {

constexpr int kPack = 8;
constexpr int kWarp = 32;
constexpr int kThreads = 256;
// Packs of one thread; a block covers this many elements of one row.
constexpr int kPacksPerThread = 2;
constexpr int64_t kBlockElements = int64_t{kThreads} * kPack * kPacksPerThread;

inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(cudaGetErrorString(error));
  }
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return as_float(uint32_t{x.bits} << 16); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ void from_float(float x, float& y) { y = x; }
__device__ __forceinline__ void from_float(float x, bf16& y) {
  y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ void from_float(float x, f16& y) {
  y.bits = __half_as_ushort(__float2half_rn(x));
}

// 16 bytes of a pack: what a load brings, and what a store takes.
template <class T>
struct alignas(16) Vector {
  T at[16 / sizeof(T)];
};

template <class T>
__device__ __forceinline__ void unpack(const int4& raw, float* x) {
  Vector<T> vector;
  memcpy(&vector, &raw, sizeof raw);
#pragma unroll
  for (int i = 0; i < static_cast<int>(16 / sizeof(T)); ++i) {
    x[i] = to_float(vector.at[i]);
  }
}

// A word at a time: one instruction for each number.
template <>
__device__ __forceinline__ void unpack<bf16>(const int4& raw, float* x) {
  const int words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = static_cast<uint32_t>(words[i]);
    x[2 * i] = as_float(word << 16);
    x[2 * i + 1] = as_float(word & 0xFFFF0000u);
  }
}

AFD_HD bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// Where a pack is read from: memory that is not written meanwhile, or the memory it goes back to,
// which the read-only cache must not hold.
enum class Source { kReadOnly, kInPlace };

// A whole pack at an aligned address.
template <Source kSource = Source::kReadOnly, class T>
__device__ __forceinline__ void load_whole(const T* p, float (&x)[kPack]) {
  constexpr int kWidth = 16 / sizeof(T);
#pragma unroll
  for (int v = 0; v < kPack / kWidth; ++v) {
    const int4* at = reinterpret_cast<const int4*>(p) + v;
    const int4 raw = kSource == Source::kReadOnly ? __ldg(at) : __ldca(at);
    unpack<T>(raw, x + v * kWidth);
  }
}

// Elements p[0..count) of a pack, zeros beyond, one at a time.
template <class T>
__device__ __forceinline__ void load_part(const T* p, int count, float (&x)[kPack]) {
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    x[i] = i < count ? to_float(p[i]) : 0.0f;
  }
}

template <Source kSource = Source::kReadOnly, class T>
__device__ __forceinline__ void load_pack(const T* p, int count, float (&x)[kPack]) {
  if (count == kPack && aligned(p)) {
    load_whole<kSource>(p, x);
  } else {
    load_part(p, count, x);
  }
}

// The same for a type known at run time: the branch is the same for a whole launch, and one kernel
// serves every combination of prediction and latent types.
__device__ __forceinline__ void load_pack(DType type, const void* base, int64_t offset, int count,
                                          float (&x)[kPack]) {
  if (type == DType::kFloat32) {
    load_pack(static_cast<const float*>(base) + offset, count, x);
  } else if (type == DType::kBFloat16) {
    load_pack(static_cast<const bf16*>(base) + offset, count, x);
  } else {
    load_pack(static_cast<const f16*>(base) + offset, count, x);
  }
}

// With kReadBack x is what the memory then holds.
template <bool kReadBack = false, class T, class Pack>
__device__ __forceinline__ void store_whole(T* p, Pack& x) {
  constexpr int kWidth = 16 / sizeof(T);
#pragma unroll
  for (int v = 0; v < kPack / kWidth; ++v) {
    Vector<T> vector;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      from_float(x[v * kWidth + i], vector.at[i]);
    }
    int4 raw;
    memcpy(&raw, &vector, sizeof raw);
    // A plain assignment is taken apart again, into stores of what made up the vector.
    __stwb(reinterpret_cast<int4*>(p) + v, raw);
    if constexpr (kReadBack) {
      unpack<T>(raw, x + v * kWidth);
    }
  }
}

template <bool kReadBack = false, class T, class Pack>
__device__ __forceinline__ void store_part(T* p, int count, Pack& x) {
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    if (i < count) {
      T rounded;
      from_float(x[i], rounded);
      p[i] = rounded;
      if constexpr (kReadBack) {
        x[i] = to_float(rounded);
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void store_pack(T* p, int count, const float (&x)[kPack]) {
  if (count == kPack && aligned(p)) {
    store_whole(p, x);
  } else {
    store_part(p, count, x);
  }
}

template <int kQuad>
__device__ __forceinline__ void generate_quad(PhiloxKey key, uint64_t quad,
                                              PhiloxRounds<uint32_t>& rounds, float (&out)[12]) {
  const uint64_t at = quad + kQuad;
  const uint32_t index = static_cast<uint32_t>(at);
  // The rounds hold for one upper word, which changes once in 2^34 elements.
  if (kQuad == 0 || index == 0) {
    rounds = philox_rounds<uint32_t>(key, static_cast<uint32_t>(at >> 32));
  }
  uint32_t c0, c1, c2, c3;
  philox_of_index(index, rounds, c0, c1, c2, c3);
  box_muller(c0, c1, out[4 * kQuad], out[4 * kQuad + 1]);
  box_muller(c2, c3, out[4 * kQuad + 2], out[4 * kQuad + 3]);
}

// Noise of the pack that starts at `position` of the sample: two quads, or three where the pack
// does not start on one.
__device__ __forceinline__ void generate_pack(PhiloxKey key, int64_t position,
                                              float (&noise)[kPack]) {
  const uint64_t quad = static_cast<uint64_t>(position) / 4;
  const int skip = static_cast<int>(position % 4);
  PhiloxRounds<uint32_t> rounds;
  float out[12] = {};
  generate_quad<0>(key, quad, rounds, out);
  generate_quad<1>(key, quad, rounds, out);
  if (skip != 0) {
    generate_quad<2>(key, quad, rounds, out);
  }
  // Constant indices only: an array indexed at run time would live in local memory.
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    noise[i] = skip == 0 ? out[i] : skip == 1 ? out[i + 1] : skip == 2 ? out[i + 2] : out[i + 3];
  }
}

// The block of one row: blockIdx.x counts blocks inside rows, blockIdx.y samples.
struct Place {
  int64_t sample, row, frame, begin, end;
};

AFD_HD int64_t blocks_per_row(const Rows& rows) {
  return (rows.inner + kBlockElements - 1) / kBlockElements;
}

// CUDA's limit on the second dimension of a grid, where the samples are.
constexpr int64_t kSamplesAtOnce = 65535;

// Calls launch(grid, first) for the samples from `first` on, as often as it takes to reach all,
// with `blocks` blocks for each.
template <class Launch>
void for_each_grid(int64_t blocks, int64_t batch, Launch launch) {
  if (blocks > INT32_MAX || batch > INT32_MAX) {
    throw std::runtime_error("more rows of a sample, or samples, than a CUDA grid has blocks");
  }
  for (int64_t first = 0; first < batch; first += kSamplesAtOnce) {
    const int64_t left = batch - first;
    const int64_t samples = left < kSamplesAtOnce ? left : kSamplesAtOnce;
    launch(dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(samples)), first);
  }
}

template <class Launch>
void for_each_grid(const Rows& rows, Launch launch) {
  for_each_grid(rows.outer * rows.frames * blocks_per_row(rows), rows.batch, launch);
}

__device__ __forceinline__ Place place(const Rows& rows, int64_t block, int64_t sample) {
  const int64_t per_row = blocks_per_row(rows);
  Place at;
  at.sample = sample;
  at.row = block / per_row;
  at.frame = at.row % rows.frames;
  at.begin = at.row * rows.inner + block % per_row * kBlockElements;
  const int64_t row_end = (at.row + 1) * rows.inner;
  at.end = at.begin + kBlockElements < row_end ? at.begin + kBlockElements : row_end;
  return at;
}

// Calls body(position, count) for each pack of this thread.
template <class Body>
__device__ __forceinline__ void for_each_pack(const Place& at, Body body) {
#pragma unroll 1
  for (int i = 0; i < kPacksPerThread; ++i) {
    const int64_t position = at.begin + (int64_t{i} * kThreads + threadIdx.x) * kPack;
    const int64_t left = at.end - position;
    if (left > 0) {
      body(position, left < kPack ? static_cast<int>(left) : kPack);
    }
  }
}

}  // namespace afd::cuda
