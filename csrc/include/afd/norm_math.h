// RMS norm with rotary positions, and layer norm with modulation: the element and the statistics of
// a row. afd_kernels/qk_norm_rope/MATH.md and afd_kernels/adaln/MATH.md derive the gradients.
//
// Products and sums are rounded one by one: no CPU then has to imitate a fused operation.
#pragma once

#include "afd/lane.h"

namespace afd {

// 1 / sqrt(mean + eps) of `count` squares.
AFD_HD float inverse_deviation(double sum_of_squares, double count, double eps) {
  return static_cast<float>(1.0 / sqrt(sum_of_squares / count + eps));
}

// How strongly a row's gradient is pulled back along the row itself: both norms are blind to its
// length, so that the component of the gradient along it vanishes (up to eps).
template <class F>
AFD_HD float pull_of(F gradient_along_row, F count, float scale) {
  const F s = static_cast<F>(scale);
  return static_cast<float>(s * s * s * gradient_along_row / count);
}

// Squares of very large and very small numbers leave fp32. A norm is blind to its row's length but
// for eps: the row is then first multiplied by this power of two, and eps by its square. 1 for any
// row whose squares fp32 holds. The argument is their mean plus eps.
template <class F>
AFD_HD float power_of_row(F mean_square) {
  if (mean_square >= F(1e-24) && mean_square <= F(1e24)) {
    return 1.0f;
  }
  return mean_square < F(1e-24) ? 0x1p80f : 0x1p-80f;
}

template <class F>
AFD_HD F rms_normed(F x, F scale, F weight) {
  return x * scale * weight;
}

// One channel of a pair turned by an angle, `partner` being the other one. signed_sine is -sin for
// the pair's first channel and sin for its second; turning back swaps the two signs.
template <class F>
AFD_HD F rotated(F x, F partner, F cosine, F signed_sine) {
  return x * cosine + partner * signed_sine;
}

// The gradient with respect to x of rms_normed, `grad` being that of its result times the weight.
template <class F>
AFD_HD F rms_gradient(F grad, F x, F scale, F pull) {
  return grad * scale - x * pull;
}

// The slot of a frame in a cache that keeps `sink` first frames and a ring of the latest others.
AFD_HD int64_t cache_slot(int64_t frame, int64_t sink, int64_t ring) {
  return frame < sink ? frame : sink + (frame - sink) % ring;
}

template <class F>
AFD_HD F gated(F x, F gate, F branch) {
  return x + gate * branch;
}

// `centred` is the row's element minus the row's mean.
template <class F>
AFD_HD F modulated(F centred, F scale, F gain, F shift) {
  return centred * scale * gain + shift;
}

// The gradient with respect to the row's element of modulated, `grad` being that of its result
// times the gain, `mean_grad` the mean of those.
template <class F>
AFD_HD F layer_norm_gradient(F grad, F mean_grad, F centred, F scale, F pull) {
  return (grad - mean_grad) * scale - centred * pull;
}

}  // namespace afd
