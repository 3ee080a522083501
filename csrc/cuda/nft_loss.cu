// nft_loss in three launches: partial sums per block (fp32), one block per sample that finishes
// them in fp64, the gradient. No atomics: the order of every sum is fixed by the sizes alone.
// Without adaptive weights the gradient's coefficients are known beforehand and the first launch
// writes it.
#include "launch.h"
#include "pack.cuh"

namespace afd::cuda {
namespace {

constexpr int kWarps = kThreads / kWarp;

// The scratch memory, cut into its parts.
struct Workspace {
  double* sums;                   // [batch, frames, 6]
  double* shares;                 // [batch, groups]: what each group adds to the loss
  NftCoefficients* coefficients;  // [batch, frames]
  float* partial;                 // [batch, rows, blocks per row, 6]
  int64_t bytes;

  __host__ __device__ Workspace(const NftProblem& p, void* memory) {
    char* at = static_cast<char*>(memory);
    const int64_t frames = p.rows.batch * p.rows.frames;
    const int64_t blocks = frames * p.rows.outer * blocks_per_row(p.rows);
    sums = reinterpret_cast<double*>(at);
    shares = sums + frames * kNftSums;
    coefficients = reinterpret_cast<NftCoefficients*>(shares + p.rows.batch * p.groups);
    partial = reinterpret_cast<float*>(coefficients + frames);
    bytes = reinterpret_cast<char*>(partial + blocks * kNftSums) - at;
  }
};

__device__ __forceinline__ void reduce_block(float (&sum)[kNftSums], float* out) {
  __shared__ float warps[kWarps][kNftSums];
#pragma unroll
  for (int k = 0; k < kNftSums; ++k) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      sum[k] += __shfl_xor_sync(0xFFFFFFFFu, sum[k], step);
    }
  }
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int k = 0; k < kNftSums; ++k) {
      warps[threadIdx.x / kWarp][k] = sum[k];
    }
  }
  __syncthreads();
  if (threadIdx.x < kNftSums) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      total += warps[w][threadIdx.x];
    }
    out[threadIdx.x] = total;
  }
}

// The batch's loss from the groups' shares, by one thread.
__device__ __forceinline__ void write_loss(const NftProblem& p, const Workspace& w) {
  double loss = 0.0;
  for (int64_t i = 0; i < p.rows.batch * p.groups; ++i) {
    loss += w.shares[i];
  }
  *p.loss = static_cast<float>(loss);
}

template <class P, bool kSums, bool kGrad>
__global__ void __launch_bounds__(kThreads)
    _nft_loss_fwd_kernel(NftProblem p, void* memory, int64_t first) {
  const Workspace w(p, memory);
  // The gradient pass runs backwards: what the sums read last is still in the second-level cache.
  const bool reversed = kGrad && !kSums;
  const int64_t block = reversed ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int64_t sample = first + (reversed ? gridDim.y - 1 - blockIdx.y : blockIdx.y);
  const Place at = place(p.rows, block, sample);
  if (reversed && blockIdx.x == 0 && blockIdx.y == 0 && first == 0 && threadIdx.x == 0) {
    write_loss(p, w);
  }
  __shared__ NftCoefficients c;
  if (threadIdx.x == 0) {
    if (kSums && kGrad) {
      c = nft_coefficients(p, sample, at.frame, valid_elements(p, sample), 1.0, 1.0);
    } else if (kSums) {
      // The gradient's coefficients are not known yet, and their divisions are slow.
      const NftFrame x = nft_frame(p, sample, at.frame);
      c.alpha_dot = static_cast<float>(x.alpha_dot);
      c.sigma_dot = static_cast<float>(x.sigma_dot);
    } else {
      c = w.coefficients[sample * p.rows.frames + at.frame];
    }
  }
  __syncthreads();
  const float beta = static_cast<float>(p.nft_beta);
  const PhiloxKey key = philox_key(p.seed == nullptr ? 0 : p.seed[sample]);
  const P* v_theta = static_cast<const P*>(p.v_theta);
  const P* v_old = static_cast<const P*>(p.v_old);
  // Without a prior v_theta is read twice: the difference is zero; the second read hits the cache.
  const P* v_ref = p.v_ref == nullptr ? v_theta : static_cast<const P*>(p.v_ref);
  float sum[kNftSums] = {};
  for_each_pack(at, [&](int64_t position, int count) {
    const int64_t offset = element_offset(p.rows, sample, position);
    float g[kPack] = {};
    // Asked for each pack: a register that lives through the loop would be one too many.
    if (frame_counts(p, sample, at.frame)) {
      float theta[kPack], old[kPack], ref[kPack], x0[kPack], noise[kPack];
      load_pack(v_theta + offset, count, theta);
      load_pack(v_old + offset, count, old);
      load_pack(v_ref + offset, count, ref);
      load_pack(p.x0_type, p.x0, offset, count, x0);
      if (p.noise == nullptr) {
        generate_pack(key, position, noise);
      } else {
        load_pack(p.noise_type, p.noise, offset, count, noise);
      }
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const float error = nft_error(old[i], x0[i], noise[i], c.alpha_dot, c.sigma_dot);
        const NftElement<float> x = nft_element(theta[i], old[i], ref[i], error, beta);
        if (kSums && i < count) {
          add_nft_sums(x, sum);
        }
        if (kGrad) {
          g[i] = nft_gradient(x, c.plus, c.minus, c.prior);
        }
      }
    }
    if (kGrad) {
      store_pack(static_cast<P*>(p.grad) + offset, count, g);
    }
  });
  if (kSums) {
    // Made anew: what lives through the loop costs registers.
    const int64_t here = (first + blockIdx.y) * gridDim.x + blockIdx.x;
    reduce_block(sum, w.partial + here * kNftSums);
  }
}

// One block per sample. A warp adds up one sum of one frame; then a thread finishes one group. Few
// blocks run it: rather registers than spills.
__global__ void __launch_bounds__(kThreads, 2)
    _nft_loss_finalize_kernel(NftProblem p, void* memory) {
  const Workspace w(p, memory);
  const int64_t sample = blockIdx.x;
  const int64_t per_row = blocks_per_row(p.rows);
  const int64_t entries = p.rows.outer * per_row;
  const float* partial = w.partial + sample * p.rows.frames * entries * kNftSums;
  double* sums = w.sums + sample * p.rows.frames * kNftSums;
  const int lane = threadIdx.x % kWarp;
  for (int64_t task = threadIdx.x / kWarp; task < p.rows.frames * kNftSums; task += kWarps) {
    const int64_t frame = task / kNftSums, k = task % kNftSums;
    double sum = 0.0;
    for (int64_t i = lane; i < entries; i += kWarp) {
      const int64_t row = i / per_row * p.rows.frames + frame;
      sum += static_cast<double>(partial[(row * per_row + i % per_row) * kNftSums + k]);
    }
    for (int step = kWarp / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    }
    if (lane == 0) {
      sums[task] = sum;
    }
  }
  __syncthreads();
  const double valid = valid_elements(p, sample);
  for (int64_t g = threadIdx.x; g < p.groups; g += kThreads) {
    w.shares[sample * p.groups + g] =
        finalize_group(p, sample, g, valid, sums, p.metrics + (sample * p.groups + g) * kNftMetrics,
                       w.coefficients + sample * p.rows.frames);
  }
}

__global__ void _nft_loss_mean_kernel(NftProblem p, void* memory) {
  write_loss(p, Workspace(p, memory));
}

template <class P>
void launch(const NftProblem& p, void* memory, cudaStream_t stream) {
  const bool one_pass = !p.adaptive && p.grad != nullptr;
  for_each_grid(p.rows, [&](dim3 grid, int64_t first) {
    if (one_pass) {
      _nft_loss_fwd_kernel<P, true, true><<<grid, kThreads, 0, stream>>>(p, memory, first);
    } else {
      _nft_loss_fwd_kernel<P, true, false><<<grid, kThreads, 0, stream>>>(p, memory, first);
    }
  });
  const unsigned samples = static_cast<unsigned>(p.rows.batch);
  _nft_loss_finalize_kernel<<<samples, kThreads, 0, stream>>>(p, memory);
  if (one_pass || p.grad == nullptr) {
    _nft_loss_mean_kernel<<<1, 1, 0, stream>>>(p, memory);
  } else {
    for_each_grid(p.rows, [&](dim3 grid, int64_t first) {
      _nft_loss_fwd_kernel<P, false, true><<<grid, kThreads, 0, stream>>>(p, memory, first);
    });
  }
  check_launch();
}

}  // namespace

int64_t nft_loss_workspace(const NftProblem& p) { return Workspace(p, nullptr).bytes; }

void launch_nft_loss(const NftProblem& p, void* workspace, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (p.prediction_type == DType::kFloat32) {
    launch<float>(p, workspace, s);
  } else if (p.prediction_type == DType::kBFloat16) {
    launch<bf16>(p, workspace, s);
  } else {
    launch<f16>(p, workspace, s);
  }
}

}  // namespace afd::cuda
