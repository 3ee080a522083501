// A token's row of channels in the registers of one block, sums over it, and sums over rows.
#pragma once

#include <type_traits>

#include "afd/norm_problem.h"
#include "launch.h"
#include "pack.cuh"

namespace afd::cuda {

constexpr int kRowThreads = 384;
// Packs of one thread, as many as its registers hold: they share the addresses and the sums over
// the block. Neighbouring packs belong to neighbours.
template <bool kWhole>
constexpr int kForwardPacks = kWhole ? 3 : 2;
constexpr int kBackwardPacks = 2;
static_assert(kMostChannels == kRowThreads * kBackwardPacks * kPack);
// Tokens of which one block of a backward adds up what they share.
constexpr int kRowTokens = 16;

// One thread's share of a row, in fp32.
template <int kPacks>
using RowPart = float[kPacks][kPack];

// n / divisor for n < 2^31 by a multiplication: a division takes twenty instructions.
struct Divisor {
  uint32_t factor;
  int shift = 31;

  explicit Divisor(int64_t divisor) {
    while ((int64_t{1} << (shift - 31)) < divisor) {
      ++shift;
    }
    factor = static_cast<uint32_t>(((int64_t{1} << shift) + divisor - 1) / divisor);
  }
  __device__ __forceinline__ uint32_t of(uint32_t n) const {
    return static_cast<uint32_t>(uint64_t{n} * factor >> shift);
  }
};

// How many channels a row has, and means over it.
struct Width {
  uint32_t channels;
  float count, inverse;

  explicit Width(int64_t n)
      : channels(static_cast<uint32_t>(n)), count(static_cast<float>(n)), inverse(1.0f / count) {}
  // sum / count but for the last bit: what the product misses is added.
  __device__ __forceinline__ float mean(float sum) const {
    const float about = sum * inverse;
    return madd(madd(-about, count, sum), inverse, about);
  }
};

template <class T>
__device__ __forceinline__ const T* row(const TokenRows& rows, int64_t sample, int64_t token) {
  return static_cast<const T*>(rows.data) + row_offset(rows, sample, token);
}

// Calls body(i, at, count) for the packs i of this thread: channels at .. at + count - 1. kWhole:
// every pack is whole and its address aligned.
template <int kPacks, bool kWhole, class Body>
__device__ __forceinline__ void for_each_pack(const Width& width, Body body) {
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const unsigned at = (i * blockDim.x + threadIdx.x) * kPack;
    if (at < width.channels) {
      body(i, at,
           kWhole || width.channels - at > kPack ? kPack : static_cast<int>(width.channels - at));
    }
  }
}

// The same for elements: body(i, k) for element k of pack i.
template <int kPacks, bool kWhole, class Body>
__device__ __forceinline__ void for_each_element(const Width& width, Body body) {
  for_each_pack<kPacks, kWhole>(width, [&](int i, unsigned, int count) {
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      if (kWhole || k < count) {
        body(i, k);
      }
    }
  });
}

template <bool kWhole, class T>
__device__ __forceinline__ void load(const T* p, int count, float (&x)[kPack]) {
  if constexpr (kWhole) {
    load_whole(p, x);
  } else {
    load_part(p, count, x);
  }
}

// Of a type that only the problem knows: T or float, the same for the whole launch.
template <bool kWhole, class T>
__device__ __forceinline__ void load(DType type, const void* base, int64_t offset, int count,
                                     float (&x)[kPack]) {
  if (sizeof(T) == sizeof(float) || type == DType::kFloat32) {
    load<kWhole>(static_cast<const float*>(base) + offset, count, x);
  } else {
    load<kWhole>(static_cast<const T*>(base) + offset, count, x);
  }
}

template <bool kWhole, bool kReadBack = false, class T, class Pack>
__device__ __forceinline__ void store(T* p, int count, Pack& x) {
  if constexpr (kWhole) {
    store_whole<kReadBack>(p, x);
  } else {
    store_part<kReadBack>(p, count, x);
  }
}

// Sums over the block, which every thread gets, in an order that the block's size fixes. Two sums
// in a row use different memory: whoever writes to it again has passed the other one's barrier.
class BlockSum {
 public:
  template <int kCount>
  __device__ __forceinline__ void operator()(float (&sum)[kCount]) {
    __shared__ float warps[2][kRowThreads / kWarp][kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) {
        sum[k] += __shfl_xor_sync(0xFFFFFFFFu, sum[k], step);
      }
      if (threadIdx.x % kWarp == 0) {
        warps[turn_][threadIdx.x / kWarp][k] = sum[k];
      }
      sum[k] = 0.0f;
    }
    __syncthreads();
#pragma unroll 1
    for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        sum[k] += warps[turn_][w][k];
      }
    }
    turn_ ^= 1;
  }

 private:
  int turn_ = 0;
};

// 1 / the deviation of a row that was multiplied by `factor` (see power_of_row).
struct Scale {
  float inverse = 0.0f, factor = 1.0f;

  // From a sum over the row; what the row is to be multiplied by before it is summed again, or 1.
  __device__ __forceinline__ float update(float mean_square, float eps) {
    const float square = mean_square + eps * factor * factor;
    inverse = rsqrtf(square);
    const float power = factor == 1.0f ? power_of_row(square) : 1.0f;
    factor *= power;
    return power;
  }
};

// Gradients that tokens share: out[f] is the sum of `run` partial rows from row f * run on, of each
// of `streams` streams, `stream_rows` rows apart. Out rows of other streams lie behind each other.
struct RowSums {
  const float* partial;
  int64_t stride, streams, stream_rows, run, channels;
  float* out;
};

namespace {

constexpr int kSumColumns = 32, kSumRows = 16;

// Grid (blocks of columns, rows of out of one stream, streams of out).
__global__ void __launch_bounds__(kSumColumns* kSumRows) _sum_rows_kernel(RowSums p) {
  __shared__ double sums[kSumRows][kSumColumns];
  const int lane = threadIdx.x % kSumColumns, first = threadIdx.x / kSumColumns;
  const int64_t column = int64_t{blockIdx.x} * kSumColumns + lane;
  double sum = 0.0;
  if (column < p.channels) {
    const int64_t row = blockIdx.z * p.stream_rows + blockIdx.y * p.run + first;
    const float* stream = p.partial + row * p.stride + column;
    for (int64_t s = 0; s < p.streams; ++s) {
      const float* at = stream + s * p.stream_rows * p.stride;
#pragma unroll 4
      for (int64_t i = first; i < p.run; i += kSumRows) {
        sum += static_cast<double>(*at);
        at += kSumRows * p.stride;
      }
    }
  }
  sums[first][lane] = sum;
  __syncthreads();
  if (first == 0 && column < p.channels) {
    for (int i = 1; i < kSumRows; ++i) {
      sum += sums[i][lane];
    }
    p.out[(int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * p.channels + column] =
        static_cast<float>(sum);
  }
}

}  // namespace

inline void sum_rows(const RowSums& p, int64_t rows, int64_t batches, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((p.channels + kSumColumns - 1) / kSumColumns),
                  static_cast<unsigned>(rows), static_cast<unsigned>(batches));
  _sum_rows_kernel<<<grid, kSumColumns * kSumRows, 0, stream>>>(p);
}

// Threads of a block that holds a row.
inline unsigned row_threads(int64_t channels, int packs) {
  if (channels > kMostChannels) {
    throw std::runtime_error("a token has more channels than a block holds");
  }
  const int64_t per_warp = int64_t{kWarp} * packs * kPack;
  return static_cast<unsigned>((channels + per_warp - 1) / per_warp * kWarp);
}

// Whether a row can be read and written in whole packs.
inline bool whole(const void* data, DType type, int64_t stride, int64_t other_stride = 0) {
  return aligned(data) && stride * size_of(type) % 16 == 0 &&
         other_stride * size_of(type) % 16 == 0;
}

inline bool whole(const TokenRows& rows, DType type) {
  return whole(rows.data, type, rows.batch, rows.token);
}

inline bool whole(const FrameRows& rows) {
  return whole(rows.data, rows.type, rows.batch, rows.frame);
}

// Calls launch(T{}, kWhole) with the type of the rows.
template <class Launch>
void with_types(DType type, bool is_whole, Launch launch) {
  const auto of = [&](auto x) {
    if (is_whole) {
      launch(x, std::true_type{});
    } else {
      launch(x, std::false_type{});
    }
  };
  if (type == DType::kFloat32) {
    of(float{});
  } else if (type == DType::kBFloat16) {
    of(bf16{});
  } else {
    of(f16{});
  }
}

}  // namespace afd::cuda
