// What every instruction set provides: loops over a slice (elements begin..end of one sample, or
// tokens).
#pragma once

#include <stdint.h>

#include "afd/nft_math.h"
#include "afd/norm_problem.h"

namespace afd {

struct NoiseCoefficients {
  float alpha, sigma;
};

struct CpuKernels {
  const char* name;
  // out[0..count) = normals of elements first .. first + count - 1 of the sample with this seed.
  void (*normals)(int64_t seed, int64_t first, int64_t count, float* out);
  void (*forward_noise)(const NoiseProblem& p, int64_t sample, int64_t begin, int64_t end,
                        const NoiseCoefficients* of_frame);
  // x_t = alpha x0: the gradient of forward_noise.
  void (*scale_by_frame)(const NoiseProblem& p, int64_t sample, int64_t begin, int64_t end,
                         const NoiseCoefficients* of_frame);
  void (*scale)(DType type, const void* in, void* out, int64_t begin, int64_t end, float factor);
  // Adds the slice's six sums of every frame to sums [frames, 6]. With velocity weighting, where
  // the coefficients are known beforehand, also writes the gradient; else may leave notes in its
  // place for nft_gradient.
  void (*nft_sums)(const NftProblem& p, int64_t sample, int64_t begin, int64_t end,
                   const NftCoefficients* of_frame, double* sums);
  void (*nft_gradient)(const NftProblem& p, int64_t sample, int64_t begin, int64_t end,
                       const NftCoefficients* of_frame);
  // The floor nft_loss is measured against: out = a + b + c + d + e, one element after the other.
  void (*stream_5r1w)(const float* const in[5], float* out, int64_t begin, int64_t end,
                      bool non_temporal);

  // Tokens begin .. end - 1, counted through the batch; `stream`: results bypass the caches. A
  // scratch row is as long as a token's channels, rounded up to whole blocks.
  void (*qk_norm_rope)(const QkNormRopeProblem& p, int64_t begin, int64_t end, bool stream,
                       float* scratch);
  // Writes the tokens' share of the weights' gradients.
  void (*qk_norm_rope_bwd)(const QkNormRopeProblem& p, int64_t begin, int64_t end, bool stream,
                           float* scratch, float* dweight_q, float* dweight_k);
  // Tokens begin .. end - 1 of a sample, which share their rows of gate, scale and shift.
  void (*adaln)(const AdalnProblem& p, int64_t sample, int64_t begin, int64_t end, bool stream,
                float* scratch);
  // Writes the tokens' share of the modulation's gradients (of the gate's unless null).
  void (*adaln_bwd)(const AdalnProblem& p, int64_t sample, int64_t begin, int64_t end, bool stream,
                    float* scratch, float* dgate, float* dscale, float* dshift);
};

// How many scratch rows they need.
constexpr int64_t kQkNormRopeScratch = 4, kQkNormRopeBwdScratch = 8;
constexpr int64_t kAdalnScratch = 5, kAdalnBwdScratch = 11;

namespace baseline {
CpuKernels kernels();
}
#if defined(__x86_64__)
namespace avx2 {
CpuKernels kernels();
}
namespace avx512 {
CpuKernels kernels();
}
#endif

}  // namespace afd
