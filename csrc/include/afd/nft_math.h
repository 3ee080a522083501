// The NFT loss of one element, one group and one sample, with its gradient: afd_kernels/nft_loss/
// MATH.md derives it. Per element, with u = alpha_dot x0 + sigma_dot noise:
//   e = v_old - u,  d = beta (v_theta - v_old),  both branches are e + d and e - d.
#pragma once

#include "afd/problem.h"
#include "afd/reduce.h"

namespace afd {

// The smallest sigma / t of a given sigma, see contract.py.
constexpr double kLeastSigma = 1e-6;

template <class F>
struct NftElement {
  F plus, minus, prior, old;
};

// e, how far the old policy's velocity is from the target.
template <class F>
AFD_HD F nft_error(F v_old, F x0, F noise, F alpha_dot, F sigma_dot) {
  return v_old - madd(sigma_dot, noise, alpha_dot * x0);
}

template <class F>
AFD_HD NftElement<F> nft_element(F v_theta, F v_old, F v_ref, F error, F beta) {
  const F old = v_theta - v_old;
  return {madd(beta, old, error), madd(F(0.0f) - beta, old, error), v_theta - v_ref, old};
}

// In the order S1p, S2p, S1n, S2n, SP, SO of the metrics below.
template <class F>
AFD_HD void add_nft_sums(const NftElement<F>& x, F sum[kNftSums]) {
  sum[0] = sum[0] + magnitude(x.plus);
  sum[1] = madd(x.plus, x.plus, sum[1]);
  sum[2] = sum[2] + magnitude(x.minus);
  sum[3] = madd(x.minus, x.minus, sum[3]);
  sum[4] = madd(x.prior, x.prior, sum[4]);
  sum[5] = madd(x.old, x.old, sum[5]);
}

// Per frame, what the element formulas need.
struct NftCoefficients {
  float alpha_dot, sigma_dot, plus, minus, prior;
};

template <class F>
AFD_HD F nft_gradient(const NftElement<F>& x, F c_plus, F c_minus, F c_prior) {
  F g = c_plus * x.plus;
  g = madd(F(0.0f) - c_minus, x.minus, g);
  return madd(c_prior, x.prior, g);
}

AFD_HD bool frame_counts(const NftProblem& p, int64_t sample, int64_t frame) {
  return p.frame_mask == nullptr || p.frame_mask[sample * p.rows.frames + frame];
}

AFD_HD double valid_elements(const NftProblem& p, int64_t sample) {
  int64_t frames = 0;
  for (int64_t f = 0; f < p.rows.frames; ++f) {
    frames += frame_counts(p, sample, f) ? 1 : 0;
  }
  return static_cast<double>(frames * p.rows.outer * p.rows.inner);
}

AFD_HD ScheduleAt schedule_of_frame(const Rows& rows, const Schedule& schedule, const float* t,
                                    int64_t sample, int64_t frame) {
  const int64_t chunk = chunk_of_frame(frame, rows.frames, rows.t_chunks);
  return schedule_at(schedule, t[sample * rows.t_chunks + chunk]);
}

// NaN where r is outside [0, 1]: see schedule_at.
AFD_HD double r_of_frame(const NftProblem& p, int64_t sample, int64_t frame) {
  const int64_t chunk = chunk_of_frame(frame, p.rows.frames, p.r_chunks);
  const float r = p.r[sample * p.r_chunks + chunk];
  return static_cast<double>(r >= 0.0f && r <= 1.0f ? r : as_float(0x7FC00000u));
}

// A factor of one sample, 1 where `weights` is null; NaN where it is negative or infinite.
AFD_HD double weight_of_sample(const float* weights, int64_t sample) {
  if (weights == nullptr) {
    return 1.0;
  }
  const float w = weights[sample];
  return static_cast<double>(w >= 0.0f && w <= 3.4028235e38f ? w : as_float(0x7FC00000u));
}

// What a frame's formulas need: the target's coefficients, and the factors that turn a velocity
// error, and v_theta - v_ref, into the space of the loss. Everything is NaN for a bad t or sigma.
struct NftFrame {
  double alpha_dot, sigma_dot, kappa, prior_kappa;
};

AFD_HD NftFrame nft_frame(const NftProblem& p, int64_t sample, int64_t frame) {
  const ScheduleAt at = schedule_of_frame(p.rows, p.schedule, p.t, sample, frame);
  NftFrame x = {at.alpha_dot, at.sigma_dot, at.kappa, at.kappa};
  if (p.sigma != nullptr) {
    // x_t - sigma v - x0 = sigma (t / sigma (noise - x0) - v); of rectified_flow, at.sigma is t.
    const int64_t chunk = chunk_of_frame(frame, p.rows.frames, p.sigma_chunks);
    const double given = static_cast<double>(p.sigma[sample * p.sigma_chunks + chunk]);
    const bool valid = given >= kLeastSigma * at.sigma && given <= 1.0;
    x.kappa = valid ? given : static_cast<double>(as_float(0x7FC00000u));
    x.prior_kappa = x.kappa;
    if (p.x0_space) {
      x.sigma_dot = given == 0.0 ? 1.0 : at.sigma / x.kappa;
      x.alpha_dot = -x.sigma_dot;
    }
  }
  const double one = x.kappa != x.kappa ? x.kappa : 1.0;
  if (!p.x0_space) {
    x.kappa = one;
  }
  if (!p.prior_in_x0) {
    x.prior_kappa = one;
  }
  return x;
}

// The prior's factor in a frame, without its weight.
AFD_HD double prior_factor(const NftProblem& p, const NftFrame& frame, double r) {
  return frame.prior_kappa * frame.prior_kappa * (p.prior_by_r ? r : 1.0);
}

AFD_HD double prior_weight_of_sample(const NftProblem& p, int64_t sample) {
  return p.prior_weight * weight_of_sample(p.prior_weights, sample);
}

// Coefficients of the stored gradient of the batch's loss; w_plus = w_minus = 1 where the weights
// are not adaptive.
AFD_HD NftCoefficients nft_coefficients(const NftProblem& p, int64_t sample, int64_t frame,
                                        double valid, double w_plus, double w_minus) {
  const NftFrame at = nft_frame(p, sample, frame);
  NftCoefficients c = {static_cast<float>(at.alpha_dot), static_cast<float>(at.sigma_dot), 0.0f,
                       0.0f, 0.0f};
  if (valid == 0.0) {
    return c;
  }
  const double r = r_of_frame(p, sample, frame);
  const double share = 2.0 / (valid * static_cast<double>(p.rows.batch)) * p.grad_power *
                       weight_of_sample(p.sample_weight, sample);
  const double scale = share * (p.slope * at.kappa * at.kappa);
  c.plus = static_cast<float>(scale * r / w_plus);
  c.minus = static_cast<float>(scale * (1.0 - r) / w_minus);
  c.prior = static_cast<float>(share * prior_weight_of_sample(p, sample) * prior_factor(p, at, r));
  return c;
}

// One group of one sample: reads the frames' sums [frames, 6], writes the group's metrics [7] and
// its frames' coefficients (when wanted), returns its share of the batch's loss.
AFD_HD double finalize_group(const NftProblem& p, int64_t sample, int64_t group, double valid,
                             const double* sums, double* metrics, NftCoefficients* coefficients) {
  const int64_t length = p.rows.frames / p.groups;
  const int64_t first = group * length;
  const double per_frame = static_cast<double>(p.rows.outer * p.rows.inner);
  double count = 0, s1p = 0, s1n = 0, s2p = 0, s2n = 0;
  double r_s2p = 0, r_s2n = 0, prior = 0, old_deviation = 0, ref_deviation = 0;
  for (int64_t f = first; f < first + length; ++f) {
    if (!frame_counts(p, sample, f)) {
      continue;
    }
    const double* s = sums + f * kNftSums;
    const double r = r_of_frame(p, sample, f);
    const NftFrame at = nft_frame(p, sample, f);
    const double kappa = at.kappa;
    const double k2 = kappa * kappa;
    count += per_frame;
    s1p += kappa * s[0];
    s2p += k2 * s[1];
    s1n += kappa * s[2];
    s2n += k2 * s[3];
    r_s2p += r * k2 * s[1];
    r_s2n += (1.0 - r) * k2 * s[3];
    prior += prior_factor(p, at, r) * s[4];
    ref_deviation += s[4];
    old_deviation += s[5];
  }
  const double per_element = count > 0.0 ? 1.0 / count : 0.0;
  double w_plus = 1.0, w_minus = 1.0;
  if (p.adaptive) {
    // Written so that NaN stays NaN.
    const double mean_plus = s1p * per_element, mean_minus = s1n * per_element;
    w_plus = mean_plus < p.weight_min ? p.weight_min : mean_plus;
    w_minus = mean_minus < p.weight_min ? p.weight_min : mean_minus;
  }
  metrics[0] = s2p / w_plus * per_element;
  metrics[1] = s2n / w_minus * per_element;
  metrics[2] = prior * per_element;
  metrics[3] = w_plus;
  metrics[4] = w_minus;
  metrics[5] = old_deviation * per_element;
  metrics[6] = ref_deviation * per_element;
  if (coefficients != nullptr) {
    for (int64_t f = first; f < first + length; ++f) {
      coefficients[f] = nft_coefficients(p, sample, f, valid, w_plus, w_minus);
    }
  }
  if (valid == 0.0) {
    return 0.0;
  }
  const double branches = r_s2p / w_plus + r_s2n / w_minus;
  const double loss = p.scale * branches + prior_weight_of_sample(p, sample) * prior;
  return weight_of_sample(p.sample_weight, sample) * loss /
         (valid * static_cast<double>(p.rows.batch));
}

}  // namespace afd
