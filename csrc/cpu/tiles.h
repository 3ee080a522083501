// How a slice is walked, and the noise of a tile.
#pragma once

#include "convert.h"
#include "kernels.h"
#include "pair.h"

namespace afd::AFD_ISA {

// Noise is generated this many elements at a time, right before they are used: small enough to stay
// in the first-level cache, and the memory system works on while the next ones are computed.
constexpr int kTile = 256;
// Lane sums are moved to fp64 after at most this many elements.
constexpr int kRun = 2048;

// Normals are made in groups of this many elements, two quads per lane.
constexpr int kGroup = 8 * kLanes;

// Writes the normals of `groups` groups from quad `quad` on, a multiple of 2 * kLanes. Two loops,
// so that neither is longer than a CPU looks ahead: consecutive groups then overlap.
// One copy per source file is enough: a call costs nothing beside a tile.
static __attribute__((noinline)) void fill_normals(const PhiloxRounds<WideKey>& rounds,
                                                   uint32_t quad, int groups, float* out) {
  WordPair words[kTile / kGroup][4];
  WordLanes lane;
  for (int i = 0; i < kLanes; ++i) {
    lane[i] = quad_of_lane(i);
  }
  for (int g = 0; g < groups; ++g) {
    const WordLanes index = lane + (quad + static_cast<uint32_t>(g * 2 * kLanes));
    WideWords c0, c1, c2, c3;
    philox_of_index(WideWords(WordPair(index, index + static_cast<uint32_t>(kLanes))), rounds, c0,
                    c1, c2, c3);
    words[g][0] = narrow(c0);
    words[g][1] = narrow(c1);
    words[g][2] = narrow(c2);
    words[g][3] = narrow(c3);
  }
  for (int g = 0; g < groups; ++g) {
    for (int half = 0; half < 2; ++half) {
      const auto word = [&](int i) { return half == 0 ? words[g][i].a : words[g][i].b; };
      FloatPair n0, n1;
      box_muller(WordPair(word(0), word(2)), WordPair(word(1), word(3)), n0, n1);
      store_quads(out + g * kGroup + half * kGroup / 2, n0.a, n1.a, n0.b, n1.b);
    }
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
      rounds_ = philox_rounds<WideKey>(key_, 0);
    } else {
      base_ = element_offset(rows, sample, 0);
    }
  }

  // Elements of the tile that starts at `position` of the sample and has at most `wanted`. Tiles
  // end at multiples of kTile: on every instruction set at the same places, and never across a
  // wrap-around of the lower counter word.
  AFD_INLINE int length(int64_t position, int64_t wanted) const {
    const int64_t most = kTile - position % kTile;
    return static_cast<int>(wanted < most ? wanted : most);
  }

  AFD_INLINE const float* tile(int64_t position, int count) {
    if (noise_ == nullptr) {
      const int skip = static_cast<int>(position % kGroup);
      const uint64_t quad = static_cast<uint64_t>(position / kGroup * (kGroup / 4));
      const uint32_t upper = static_cast<uint32_t>(quad >> 32);
      if (upper != upper_) {
        upper_ = upper;
        rounds_ = philox_rounds<WideKey>(key_, upper);
      }
      fill_normals(rounds_, static_cast<uint32_t>(quad), (skip + count + kGroup - 1) / kGroup,
                   buffer_);
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
  // The upper 32 bits of the quad that rounds_ is for.
  uint32_t upper_ = 0;
  PhiloxRounds<WideKey> rounds_;
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

}  // namespace afd::AFD_ISA
