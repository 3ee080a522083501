// How a slice is walked, and the noise of a tile.
#pragma once

#include "convert.h"
#include "kernels.h"

namespace afd::AFD_ISA {

// Noise is generated this many elements at a time, right before they are used: small enough to stay
// in the first-level cache, and the memory system works on while the next ones are computed.
constexpr int kTile = 256;
// Lane sums are moved to fp64 after at most this many elements.
constexpr int kRun = 2048;

// Writes the normals of `quads` quads from `quad` on, rounded up to a multiple of kLanes quads.
// One copy per source file is enough: a call costs nothing beside a tile.
static __attribute__((noinline)) void fill_normals(PhiloxKey key, uint64_t quad, int quads, float* out) {
  WordLanes lane;
  for (int i = 0; i < kLanes; ++i) {
    lane[i] = quad_of_lane(i);
  }
  for (int q = 0; q < quads; q += kLanes, quad += kLanes) {
    const uint32_t low = static_cast<uint32_t>(quad);
    const WordLanes index = lane + low;
    // All ones, that is -1, where the low word wrapped around.
    const WordLanes carry = (WordLanes)(index < low);
    const WordLanes upper = static_cast<uint32_t>(quad >> 32) - carry;
    WideWord e0 = (WideLanes)index, e1 = (WideLanes)upper, e2(0u), e3(0u);
    WideWord o0 = (WideLanes)index >> 32, o1 = (WideLanes)upper >> 32, o2(0u), o3(0u);
    philox4x32_10(e0, e1, e2, e3, key);
    philox4x32_10(o0, o1, o2, o3, key);
    Float n0, n1, n2, n3;
    box_muller(interleave(e0, o0), interleave(e1, o1), n0, n1);
    box_muller(interleave(e2, o2), interleave(e3, o3), n2, n3);
    store_quads(out + 4 * q, n0, n1, n2, n3);
  }
}

// Where a tile's noise comes from: the caller's fp32 array, the caller's half-precision array, or
// the seed; the last two through a buffer.
template <class X>
class NoiseSource {
 public:
  AFD_INLINE NoiseSource(const Rows& rows, int64_t sample, const int64_t* seed, const void* noise,
                         DType noise_type)
      : noise_(noise), is_fp32_(noise_type == DType::kFloat32) {
    if (noise == nullptr) {
      key_ = philox_key(seed[sample]);
    } else {
      base_ = element_offset(rows, sample, 0);
    }
  }

  // Elements of the tile that starts at `position` of the sample and has at most `wanted`.
  AFD_INLINE int length(int64_t position, int64_t wanted) const {
    const int64_t most = noise_ == nullptr ? kTile - position % 4 : kTile;
    return static_cast<int>(wanted < most ? wanted : most);
  }

  AFD_INLINE const float* tile(int64_t position, int count) {
    if (noise_ == nullptr) {
      const int skip = static_cast<int>(position % 4);
      fill_normals(key_, static_cast<uint64_t>(position / 4), (skip + count + 3) / 4, buffer_);
      return buffer_ + skip;
    }
    if (is_fp32_) {
      return static_cast<const float*>(noise_) + base_ + position;
    }
    const X* from = static_cast<const X*>(noise_) + base_ + position;
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const Float x = load(from + i);
      memcpy(buffer_ + i, &x.v, sizeof x.v);
    }
    if (i < count) {
      X rest[kLanes] = {};
      memcpy(rest, from + i, static_cast<size_t>(count - i) * sizeof(X));
      const Float x = load(rest);
      memcpy(buffer_ + i, &x.v, sizeof x.v);
    }
    return buffer_;
  }

 private:
  alignas(64) float buffer_[kTile];
  const void* noise_;
  bool is_fp32_;
  PhiloxKey key_{0, 0};
  int64_t base_ = 0;
};

// Calls run(frame, position, count) over the pieces of a slice that lie in one row.
template <class Run>
AFD_INLINE void for_each_run(const Rows& rows, int64_t begin, int64_t end, Run run) {
  int64_t row = begin / rows.inner;
  for (int64_t position = begin; position < end; ++row) {
    const int64_t row_end = (row + 1) * rows.inner < end ? (row + 1) * rows.inner : end;
    const int64_t frame = frame_of_position(rows, position);
    while (position < row_end) {
      const int64_t left = row_end - position;
      const int64_t count = left < kRun ? left : kRun;
      run(frame, position, count);
      position += count;
    }
  }
}

// Non-temporal stores need whole aligned vectors.
AFD_INLINE bool can_stream(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

// Calls body(zero of the element type) for the type a DType names.
template <class Body>
AFD_INLINE void with_type(DType type, Body body) {
  if (type == DType::kFloat32) {
    body(float{});
  } else if (type == DType::kBFloat16) {
    body(bf16{});
  } else {
    body(f16{});
  }
}

}  // namespace afd::AFD_ISA
