// What one call of an op is: sizes, options and raw pointers, shared by the CPU and CUDA launchers.
#pragma once

#include <stdint.h>

#include "afd/noise_math.h"

namespace afd {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// A sample is `outer * frames` rows of `inner` contiguous elements; row r belongs to frame
// r % frames. t has `t_chunks` values per sample.
struct Rows {
  int64_t batch, outer, frames, inner, t_chunks;
};

AFD_HD int64_t elements_per_sample(const Rows& rows) {
  return rows.outer * rows.frames * rows.inner;
}

// Index of element `position` of sample `sample` in the whole tensor; 64-bit throughout.
AFD_HD int64_t element_offset(const Rows& rows, int64_t sample, int64_t position) {
  return sample * elements_per_sample(rows) + position;
}

AFD_HD int64_t frame_of_position(const Rows& rows, int64_t position) {
  return position / rows.inner % rows.frames;
}

// The chunk, of `chunks` equal ones, that holds `frame`.
AFD_HD int64_t chunk_of_frame(int64_t frame, int64_t frames, int64_t chunks) {
  return frame / (frames / chunks);
}

struct NoiseProblem {
  Rows rows;
  Schedule schedule;
  DType x0_type, noise_type;
  const void* x0;
  const float* t;
  const int64_t* seed;  // [batch], or null when `noise` is given
  const void* noise;
  void* x_t;
};

struct NftProblem {
  Rows rows;
  Schedule schedule;
  int64_t r_chunks, sigma_chunks, groups;
  double nft_beta, prior_weight;
  double scale, slope;  // of both branches' losses, and that times nft_beta
  double weight_min;
  double grad_power = 1.0;  // a power of two by which the gradient is stored
  // Whether weights divide the errors; whether they, and the prior, are those of x0.
  bool adaptive, x0_space, prior_in_x0, prior_by_r;
  DType prediction_type, x0_type, noise_type;
  const void *v_theta, *v_old;
  const void* v_ref;  // null without a prior
  const void* x0;
  const float *t, *r;
  const int64_t* seed;  // [batch], or null when `noise` is given
  const void* noise;
  const bool* frame_mask;  // [batch, frames], or null: every frame counts
  const float* sigma;      // of the x0 prediction, [batch, sigma_chunks], or null: the schedule's
  // Factors of a sample's prior and of its loss, [batch], or null: 1.
  const float *prior_weights, *sample_weight;
  float* loss;
  double* metrics;  // [batch, groups, 7]
  void* grad;       // null when no gradient is wanted
};

}  // namespace afd
