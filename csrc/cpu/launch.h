// The CPU backend's entry points: whole ops, on at most `threads` threads.
#pragma once

#include "afd/norm_problem.h"

namespace afd::cpu {

void launch_normals(int64_t seed, int64_t first, int64_t count, float* out);
void launch_forward_noise(const NoiseProblem& p, int threads);
// x_t = alpha x0, the gradient of forward_noise with respect to x0 (p.x0 holds the incoming one).
void launch_forward_noise_bwd(const NoiseProblem& p, int threads);
void launch_nft_loss(const NftProblem& p, int threads);
// out = in * factor; `in` may be `out`, and a factor of exactly 1 in place touches nothing.
void launch_scale(DType type, const void* in, void* out, int64_t count, float factor, int threads);
// out = a + b + c + d + e over `count` floats: the memory traffic of nft_loss with given noise.
void launch_stream_5r1w(const float* const in[5], float* out, int64_t count, bool non_temporal,
                        int threads);

// Both forms, into results or into a cache.
void launch_qk_norm_rope(const QkNormRopeProblem& p, int threads);
void launch_qk_norm_rope_bwd(const QkNormRopeProblem& p, int threads);
void launch_adaln(const AdalnProblem& p, int threads);
void launch_adaln_bwd(const AdalnProblem& p, int threads);

}  // namespace afd::cpu
