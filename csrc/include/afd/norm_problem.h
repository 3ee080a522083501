// What one call of qk_norm_rope or adaln is: sizes, options, pointers and strides (in elements).
#pragma once

#include "afd/norm_math.h"
#include "afd/problem.h"

namespace afd {

// A [batch, tokens, channels] tensor with contiguous channels.
struct TokenRows {
  const void* data;
  int64_t batch, token;
};

// A [batches, frames, channels] tensor whose rows serve equal parts of the batch and of the tokens.
struct FrameRows {
  const void* data;
  DType type;
  int64_t batch, frame;  // strides
  int64_t batches, frames;
};

AFD_HD int64_t row_offset(const TokenRows& rows, int64_t sample, int64_t token) {
  return sample * rows.batch + token * rows.token;
}

// Where the row of a frame lies.
AFD_HD int64_t frame_offset(const FrameRows& rows, int64_t sample, int64_t frame) {
  return (rows.batches == 1 ? 0 : sample) * rows.batch + frame * rows.frame;
}

// Where the row lies that serves this token of `tokens`.
AFD_HD int64_t row_offset(const FrameRows& rows, int64_t sample, int64_t token, int64_t tokens) {
  return frame_offset(rows, sample, token / (tokens / rows.frames));
}

struct QkNormRopeProblem {
  int64_t batch, tokens, heads, head_dim;
  DType type, weight_type;
  double eps;
  TokenRows q, k;
  const void *weight_q, *weight_k;
  const float* rope;   // [batch or 1, tokens, head_dim / 2, 2]: cos, sin
  int64_t rope_batch;  // its batch stride
  // Forward: results [batch, tokens, heads, head_dim]. Appending: k_out null, and a cache instead.
  void *q_out, *k_out;
  TokenRows v;
  void *k_cache, *v_cache;  // [batch, slots, heads, head_dim]
  const int64_t* position;  // [batch or 1]: the frame of the first token
  int64_t positions, slots, tokens_per_frame, sink_frames;
  // Backward: incoming gradients, and results in the inputs' type and (weights) in fp32.
  TokenRows grad_q, grad_k;
  void *dq, *dk;
  float *dweight_q, *dweight_k;
};

struct AdalnProblem {
  int64_t batch, tokens, channels;
  DType type;
  double scale_offset, eps;
  TokenRows x;       // backward: x_out
  TokenRows branch;  // data null without one
  FrameRows gate;    // data null without one
  FrameRows scale, shift;
  void *x_out, *h;       // forward; x_out null without a branch
  TokenRows grad_x_out;  // backward; data null when nothing came
  TokenRows grad_h;
  void *dx, *dbranch;              // dbranch null without a gate
  float *dgate, *dscale, *dshift;  // one contiguous row for every row of gate and scale
};

AFD_HD int64_t size_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

}  // namespace afd
