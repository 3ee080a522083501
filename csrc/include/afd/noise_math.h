// Uniform words to normals, and the noising schedules with their derivatives.
//
// The normals use no library function and no approximate instruction: only fma, IEEE square root,
// integer operations and the polynomials below, so that every CPU and GPU returns the same bits.
// Measured against float64: ln <= 1.2 ulp, sin <= 2.4 ulp, cos <= 1.6 ulp.
#pragma once

#include "afd/lane.h"
#include "afd/philox.h"

namespace afd {

// ln u for normal u > 0. u = 2^e m with m in [2/3, 4/3); ln(1 + f) = f + f^2 (-1/2 + f L(f)).
// L: minimax in relative error, rounded to fp32 coefficient by coefficient, lowest order first.
template <class F>
AFD_HD F natural_log(F u) {
  const auto bits = as_bits(u);
  using Word = decltype(as_bits(u));
  const Word above = bits - Word(0x3F2AAAABu);
  const Word e = shift_right_signed(above, 23);
  const F f = as_float(bits - (above & Word(0xFF800000u))) - F(1.0f);
  F p = F(0x1.1b0c48p-3f);
  p = madd(p, f, F(-0x1.35b3e2p-3f));
  p = madd(p, f, F(0x1.1f9584p-3f));
  p = madd(p, f, F(-0x1.515a6ap-3f));
  p = madd(p, f, F(0x1.99c32cp-3f));
  p = madd(p, f, F(-0x1.000b1cp-2f));
  p = madd(p, f, F(0x1.555528p-2f));
  p = madd(p, f, F(-0.5f));
  p = madd(p, f * f, f);
  return madd(signed_to_float(e), F(0x1.62e430p-1f), p);
}

// cos and sin of int32(word) * pi * 2^-31, that is of an angle in [-pi, pi).
// The octant is split off exactly on the integer: word = quadrant * 2^30 + rest with rest in
// [-2^29, 2^29); z = rest * 2^-29 in [-1, 1] is the angle z * pi/4.
template <class F, class Word>
AFD_HD void cos_sin_of_word(Word word, F& cosine, F& sine) {
  const F z = signed_to_float(word << 2) * F(0x1p-31f);
  const F s = z * z;
  F sin_z = F(-0x1.32f65cp-15f);
  sin_z = madd(sin_z, s, F(0x1.467fdcp-9f));
  sin_z = madd(sin_z, s, F(-0x1.4abc22p-4f));
  sin_z = madd(sin_z, s, F(0x1.921fb6p-1f)) * z;
  F cos_z = F(-0x1.4e7ccap-12f);
  cos_z = madd(cos_z, s, F(0x1.03b064p-6f));
  cos_z = madd(cos_z, s, F(-0x1.3bd39cp-2f));
  cos_z = madd(cos_z, s, F(1.0f));
  // Quadrant q = bits 30 and 31: odd q swaps the two; q = 2, 3 negates sin; q = 1, 2 negates cos.
  const Word q = word + Word(0x20000000u);
  const Word swap = q << 1;
  const Word sine_sign = q & Word(0x80000000u);
  const Word cosine_sign = (q + Word(0x40000000u)) & Word(0x80000000u);
  cosine = as_float(as_bits(select_by_sign(swap, sin_z, cos_z)) ^ cosine_sign);
  sine = as_float(as_bits(select_by_sign(swap, cos_z, sin_z)) ^ sine_sign);
}

// Two independent standard normals from two uniform words: R cos(theta), R sin(theta) with
// u = (word + 1/2) 2^-32 in (0, 1], R = sqrt(-2 ln u).
template <class F, class Word>
AFD_HD void box_muller(Word radius_word, Word angle_word, F& n0, F& n1) {
  const F u = madd(unsigned_to_float(radius_word), F(0x1p-32f), F(0x1p-33f));
  const F radius = root(natural_log(u) * F(-2.0f));
  F cosine, sine;
  cos_sin_of_word(angle_word, cosine, sine);
  n0 = radius * cosine;
  n1 = radius * sine;
}

// x_t = alpha x0 + sigma noise.
template <class F>
AFD_HD F noised(F x0, F noise, F alpha, F sigma) {
  return madd(sigma, noise, alpha * x0);
}

enum ScheduleKind : int { kRectifiedFlow = 0, kVpCosine = 1, kVpLinear = 2 };

struct Schedule {
  int kind;
  double beta_min, beta_max;  // vp_linear only
};

// alpha, sigma and their time derivatives; kappa turns a velocity error into an x0 error.
struct ScheduleAt {
  double alpha, sigma, alpha_dot, sigma_dot, kappa;
};

// Outside the schedule's domain, and for NaN, everything is NaN: on a GPU the host cannot read t
// without a synchronisation, so a wrong t has to show in the result.
AFD_HD ScheduleAt schedule_at(Schedule schedule, float t_fp32) {
  const double pi = 3.14159265358979323846;
  const float lowest = schedule.kind == kVpLinear ? 1e-5f : 0.0f;
  if (!(t_fp32 >= lowest && t_fp32 <= 1.0f)) {
    const double nan = static_cast<double>(as_float(0x7FC00000u));
    return {nan, nan, nan, nan, nan};
  }
  const double t = static_cast<double>(t_fp32);
  ScheduleAt at;
  if (schedule.kind == kRectifiedFlow) {
    return {1.0 - t, t, -1.0, 1.0, t};
  }
  if (schedule.kind == kVpCosine) {
    at.alpha = cos_pi(0.5 * t);
    at.sigma = sin_pi(0.5 * t);
    at.alpha_dot = -0.5 * pi * at.sigma;
    at.sigma_dot = 0.5 * pi * at.alpha;
  } else {
    const double slope = schedule.beta_max - schedule.beta_min;
    const double integral = schedule.beta_min * t + 0.5 * slope * t * t;
    const double rate = schedule.beta_min + slope * t;
    at.alpha = exp(-0.5 * integral);
    at.sigma = sqrt(-expm1(-integral));
    at.alpha_dot = -0.5 * rate * at.alpha;
    at.sigma_dot = 0.5 * rate * at.alpha * at.alpha / at.sigma;
  }
  at.kappa = at.sigma / (at.alpha * at.sigma_dot - at.sigma * at.alpha_dot);
  return at;
}

}  // namespace afd
