// Gated residual, layer norm and modulation in one pass, and its gradient: one block per token, one
// per run of tokens in the backward.
#include <algorithm>
#include <numeric>

#include "rows.cuh"

namespace afd::cuda {
namespace {

// Sums a row twice: for its mean, and for its deviation from it. The difference is made again where
// it is needed: kept, it would cost registers. x is multiplied by the scale's factor.
template <bool kWhole, int kPacks>
__device__ __forceinline__ Scale normalise(RowPart<kPacks>& x, const Width& width, float eps,
                                           BlockSum& add, float& mean) {
  Scale scale;
#pragma unroll 1
  for (;;) {
    float sum[1] = {}, squares[1] = {};
    for_each_element<kPacks, kWhole>(width, [&](int i, int k) { sum[0] += x[i][k]; });
    add(sum);
    mean = width.mean(sum[0]);
    for_each_element<kPacks, kWhole>(width, [&](int i, int k) {
      const float centred = x[i][k] - mean;
      squares[0] = madd(centred, centred, squares[0]);
    });
    add(squares);
    const float power = scale.update(width.mean(squares[0]), eps);
    if (power == 1.0f) {
      return scale;
    }
    for_each_element<kPacks, kWhole>(width, [&](int i, int k) { x[i][k] *= power; });
  }
}

template <bool kWhole, class T, int kPacks>
__device__ __forceinline__ void load_frame(const FrameRows& rows, int64_t sample, int64_t frame,
                                           const Width& width, RowPart<kPacks>& x) {
  const int64_t offset = frame_offset(rows, sample, frame);
  for_each_pack<kPacks, kWhole>(width, [&](int i, unsigned at, int count) {
    load<kWhole, T>(rows.type, rows.data, offset + at, count, x[i]);
  });
}

template <class T, bool kWhole>
__global__ void __launch_bounds__(kRowThreads, 1)
    _adaln_fwd_kernel(AdalnProblem p, Width width, Divisor gate_tokens, Divisor scale_tokens,
                      int64_t first) {
  constexpr int kPacks = kForwardPacks<kWhole>;
  const uint32_t sample = first + blockIdx.y, token = blockIdx.x;
  const int64_t out = (int64_t{sample} * gridDim.x + token) * width.channels;
  RowPart<kPacks> x = {}, scale, shift;
  // Every load before the first sum: behind its barrier they would wait.
  const T* x_row = row<T>(p.x, sample, token);
  for_each_pack<kPacks, kWhole>(
      width, [&](int i, unsigned at, int count) { load<kWhole>(x_row + at, count, x[i]); });
  load_frame<kWhole, T>(p.scale, sample, scale_tokens.of(token), width, scale);
  load_frame<kWhole, T>(p.shift, sample, scale_tokens.of(token), width, shift);
  if (p.branch.data != nullptr) {
    RowPart<kPacks> gate;
    if (p.gate.data != nullptr) {
      load_frame<kWhole, T>(p.gate, sample, gate_tokens.of(token), width, gate);
    }
    const T* branch_row = row<T>(p.branch, sample, token);
    for_each_pack<kPacks, kWhole>(width, [&](int i, unsigned at, int count) {
      float branch[kPack];
      load<kWhole>(branch_row + at, count, branch);
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        x[i][k] = gated(x[i][k], p.gate.data == nullptr ? 1.0f : gate[i][k], branch[k]);
      }
      // The normalisation reads what the next residual will read.
      store<kWhole, true>(static_cast<T*>(p.x_out) + out + at, count, x[i]);
    });
  }
  BlockSum add;
  float mean;
  const Scale norm = normalise<kWhole>(x, width, static_cast<float>(p.eps), add, mean);
  const float offset = static_cast<float>(p.scale_offset);
  for_each_pack<kPacks, kWhole>(width, [&](int i, unsigned at, int count) {
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      x[i][k] = modulated(x[i][k] - mean, norm.inverse, offset + scale[i][k], shift[i][k]);
    }
    store<kWhole>(static_cast<T*>(p.h) + out + at, count, x[i]);
  });
}

// How the tokens of a sample are cut: into segments that share gate, scale and shift, and these
// into blocks of at most kRowTokens. A block leaves the partial sums of dscale, dshift and dgate.
struct Cut {
  int64_t segments, segment, blocks;

  explicit Cut(const AdalnProblem& p)
      : segments(std::lcm(p.scale.frames, p.gate.data == nullptr ? 1 : p.gate.frames)),
        segment(p.tokens / segments),
        blocks((segment + kRowTokens - 1) / kRowTokens) {}
};

template <class T, bool kWhole>
__global__ void __launch_bounds__(kRowThreads, 1)
    _adaln_bwd_kernel(AdalnProblem p, Width width, Cut cut, float* partial, uint32_t first) {
  constexpr int kPacks = kBackwardPacks;
  const uint32_t sample = first + blockIdx.y;
  const uint32_t blocks = static_cast<uint32_t>(cut.blocks);
  const int64_t start = blockIdx.x / blocks * cut.segment;
  const int64_t begin = start + blockIdx.x % blocks * kRowTokens;
  const int64_t end = min(begin + kRowTokens, start + cut.segment);
  const bool with_gate = p.dbranch != nullptr;
  RowPart<kPacks> gain, dscale = {}, dshift = {}, dgate = {};
  load_frame<kWhole, T>(p.scale, sample, start / (p.tokens / p.scale.frames), width, gain);
  const float offset = static_cast<float>(p.scale_offset);
  for_each_element<kPacks, kWhole>(width, [&](int i, int k) { gain[i][k] += offset; });
  const int64_t gate_offset =
      with_gate ? frame_offset(p.gate, sample, start / (p.tokens / p.gate.frames)) : 0;
  BlockSum add;
#pragma unroll 1
  for (int64_t token = begin; token < end; ++token) {
    const int64_t out = (sample * p.tokens + token) * width.channels;
    const T* x_row = row<T>(p.x, sample, token);
    const T* grad_row = row<T>(p.grad_h, sample, token);
    RowPart<kPacks> x = {}, grad;
    for_each_pack<kPacks, kWhole>(width, [&](int i, unsigned at, int count) {
      load<kWhole>(x_row + at, count, x[i]);
      load<kWhole>(grad_row + at, count, grad[i]);
    });
    float mean;
    const Scale norm = normalise<kWhole>(x, width, static_cast<float>(p.eps), add, mean);
    float sums[2] = {};  // of the gradient times the gain, and of its products with the row
    for_each_element<kPacks, kWhole>(width, [&](int i, int k) {
      const float centred = x[i][k] - mean;
      dshift[i][k] += grad[i][k];
      dscale[i][k] = madd(grad[i][k], centred * norm.inverse, dscale[i][k]);
      grad[i][k] *= gain[i][k];
      sums[0] += grad[i][k];
      sums[1] = madd(grad[i][k], centred, sums[1]);
    });
    add(sums);
    const float mean_grad = width.mean(sums[0]);
    const float pull = pull_of(sums[1], width.count, norm.inverse);
    for_each_pack<kPacks, kWhole>(width, [&](int i, unsigned at, int count) {
      float d[kPack], other[kPack];
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        d[k] = layer_norm_gradient(grad[i][k], mean_grad, x[i][k] - mean, norm.inverse, pull) *
               norm.factor;
      }
      if (p.grad_x_out.data != nullptr) {
        load<kWhole>(row<T>(p.grad_x_out, sample, token) + at, count, other);
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          d[k] += other[k];
        }
      }
      store<kWhole>(static_cast<T*>(p.dx) + out + at, count, d);
      if (with_gate) {
        load<kWhole>(row<T>(p.branch, sample, token) + at, count, other);
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          dgate[i][k] = madd(d[k], other[k], dgate[i][k]);
        }
        // Of every token's pass: the first-level cache has it, the registers have no room.
        load<kWhole, T>(p.gate.type, p.gate.data, gate_offset + at, count, other);
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          d[k] *= other[k];
        }
        store<kWhole>(static_cast<T*>(p.dbranch) + out + at, count, d);
      }
    });
  }
  float* const sums = partial + (int64_t{sample} * gridDim.x + blockIdx.x) * 3 * width.channels;
  for_each_pack<kPacks, kWhole>(width, [&](int i, unsigned at, int count) {
    store<kWhole>(sums + at, count, dscale[i]);
    store<kWhole>(sums + width.channels + at, count, dshift[i]);
    if (with_gate) {
      store<kWhole>(sums + 2 * width.channels + at, count, dgate[i]);
    }
  });
}

bool reads_whole_packs(const AdalnProblem& p) {
  return p.channels % kPack == 0 && whole(p.x, p.type) && whole(p.branch, p.type) &&
         whole(p.gate) && whole(p.scale) && whole(p.shift) && whole(p.grad_x_out, p.type) &&
         whole(p.grad_h, p.type);
}

}  // namespace

void launch_adaln(const AdalnProblem& p, void* stream) {
  const Divisor gate_tokens(p.gate.data == nullptr ? 1 : p.tokens / p.gate.frames);
  const Divisor scale_tokens(p.tokens / p.scale.frames);
  with_types(p.type, reads_whole_packs(p), [&](auto x, auto is_whole) {
    const unsigned threads = row_threads(p.channels, kForwardPacks<decltype(is_whole)::value>);
    for_each_grid(p.tokens, p.batch, [&](dim3 grid, int64_t first) {
      _adaln_fwd_kernel<decltype(x), decltype(is_whole)::value>
          <<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(
              p, Width(p.channels), gate_tokens, scale_tokens, first);
    });
  });
  check_launch();
}

int64_t adaln_bwd_workspace(const AdalnProblem& p) {
  const Cut cut(p);
  return p.batch * cut.segments * cut.blocks * 3 * p.channels * int64_t{sizeof(float)};
}

void launch_adaln_bwd(const AdalnProblem& p, void* workspace, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const Cut cut(p);
  float* const partial = static_cast<float*>(workspace);
  const unsigned threads = row_threads(p.channels, kBackwardPacks);
  with_types(p.type, reads_whole_packs(p), [&](auto x, auto is_whole) {
    for_each_grid(cut.segments * cut.blocks, p.batch, [&](dim3 grid, int64_t first) {
      _adaln_bwd_kernel<decltype(x), decltype(is_whole)::value>
          <<<grid, threads, 0, s>>>(p, Width(p.channels), cut, partial, first);
    });
  });
  const auto add = [&](const float* part, const FrameRows& of, float* out) {
    const int64_t rows = cut.segments * cut.blocks;
    sum_rows({part, 3 * p.channels, p.batch / of.batches, rows, rows / of.frames, p.channels, out},
             of.frames, of.batches, s);
  };
  add(partial, p.scale, p.dscale);
  add(partial + p.channels, p.scale, p.dshift);
  if (p.dgate != nullptr) {
    add(partial + 2 * p.channels, p.gate, p.dgate);
  }
  check_launch();
}

}  // namespace afd::cuda
