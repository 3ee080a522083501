// The CUDA backend's entry points: whole ops on a stream (a cudaStream_t). Nothing synchronises and
// nothing is allocated, so all of them can be captured in a CUDA graph. Launch errors throw.
#pragma once

#include "afd/norm_problem.h"

namespace afd::cuda {

// Why the current device cannot run these kernels (a driver too old, an architecture they were not
// compiled for), or null.
const char* unusable();

void launch_forward_noise(const NoiseProblem& p, void* stream);
// x_t = alpha x0, the gradient of forward_noise with respect to x0 (p.x0 holds the incoming one).
void launch_forward_noise_bwd(const NoiseProblem& p, void* stream);
int64_t nft_loss_workspace(const NftProblem& p);
void launch_nft_loss(const NftProblem& p, void* workspace, void* stream);
// out = in * factor, the factor on the device; in place a factor of exactly 1 touches nothing.
void launch_scale(DType type, const void* in, void* out, int64_t count, const float* factor,
                  void* stream);

// Rows of more channels are refused: a block holds a row in its registers.
constexpr int64_t kMostChannels = 6144;

void launch_qk_norm_rope(const QkNormRopeProblem& p, void* stream);
int64_t qk_norm_rope_bwd_workspace(const QkNormRopeProblem& p);
void launch_qk_norm_rope_bwd(const QkNormRopeProblem& p, void* workspace, void* stream);
void launch_adaln(const AdalnProblem& p, void* stream);
int64_t adaln_bwd_workspace(const AdalnProblem& p);
void launch_adaln_bwd(const AdalnProblem& p, void* workspace, void* stream);

}  // namespace afd::cuda
