// RMS norm over all heads' channels and rotary positions of queries and keys, straight into the
// results or into a cache, and its gradient: one block per token, one per run of tokens in the
// backward.
#include "rows.cuh"

namespace afd::cuda {
namespace {

// The (cos, sin) of a pack's pairs; a whole pack lies inside one head.
template <bool kWhole>
__device__ __forceinline__ void load_angles(const float* table, unsigned at, int count,
                                            unsigned head_dim, const Divisor& by_head,
                                            float (&angles)[kPack]) {
  const auto inside_head = [&](unsigned channel) {
    return channel - by_head.of(channel) * head_dim;
  };
  if constexpr (kWhole) {
    load_whole(table + inside_head(at), angles);
  } else {
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      angles[k] = k < count ? table[inside_head(at + k)] : 0.0f;
    }
  }
}

enum class Turn { kForward, kBack };

template <Turn kTurn>
__device__ __forceinline__ void turn(const float (&angles)[kPack], float (&x)[kPack]) {
#pragma unroll
  for (int k = 0; k < kPack; k += 2) {
    const float even = x[k], odd = x[k + 1], cosine = angles[k];
    const float sine = kTurn == Turn::kForward ? angles[k + 1] : -angles[k + 1];
    x[k] = rotated(even, odd, cosine, -sine);
    x[k + 1] = rotated(odd, even, cosine, sine);
  }
}

// Unchanged bits.
template <bool kWhole, class T>
__device__ __forceinline__ void copy(const T* from, int count, T* to) {
  if constexpr (kWhole) {
#pragma unroll
    for (int v = 0; v < kPack * static_cast<int>(sizeof(T)) / 16; ++v) {
      __stwb(reinterpret_cast<int4*>(to) + v, __ldg(reinterpret_cast<const int4*>(from) + v));
    }
  } else {
    for (int k = 0; k < count; ++k) {
      to[k] = from[k];
    }
  }
}

// Where a token's key and value go, and what is added to the scales of its rows: NaN at a negative
// position, which cannot be refused without a synchronisation.
struct Slot {
  int64_t row;
  float poison;
};

__device__ __forceinline__ Slot slot_of(const QkNormRopeProblem& p, const Divisor& by_frame,
                                        int64_t ring, uint32_t sample, uint32_t token) {
  if (p.k_out != nullptr) {
    return {int64_t{sample} * gridDim.x + token, 0.0f};
  }
  const int64_t position = p.position[p.positions == 1 ? 0 : sample];
  const uint32_t frame = by_frame.of(token);
  const int64_t slot = cache_slot(max(position, int64_t{0}) + frame, p.sink_frames, ring);
  return {sample * p.slots + (slot - frame) * p.tokens_per_frame + token,
          position < 0 ? as_float(0x7FC00000u) : 0.0f};
}

template <class T, bool kWhole>
__global__ void __launch_bounds__(kRowThreads, 1)
    _qk_norm_rope_fwd_kernel(QkNormRopeProblem p, Width width, Divisor by_head, Divisor by_frame,
                             int64_t ring, uint32_t first) {
  constexpr int kPacks = kForwardPacks<kWhole>;
  const uint32_t sample = first + blockIdx.y, token = blockIdx.x;
  __shared__ Slot shared_slot;
  if (threadIdx.x == 0) {
    shared_slot = slot_of(p, by_frame, ring, sample, token);
  }
  RowPart<kPacks> q = {}, k = {}, weight_q, weight_k, angles;
  // Every load before the first sum: behind its barrier they would wait.
  const T *q_row = row<T>(p.q, sample, token), *k_row = row<T>(p.k, sample, token);
  const unsigned head_dim = static_cast<unsigned>(p.head_dim);
  const float* table = p.rope + sample * p.rope_batch + int64_t{token} * head_dim;
  for_each_pack<kPacks, kWhole>(width, [&](int i, unsigned at, int count) {
    load<kWhole>(q_row + at, count, q[i]);
    load<kWhole>(k_row + at, count, k[i]);
    load_angles<kWhole>(table, at, count, head_dim, by_head, angles[i]);
    load<kWhole, T>(p.weight_type, p.weight_q, at, count, weight_q[i]);
    load<kWhole, T>(p.weight_type, p.weight_k, at, count, weight_k[i]);
  });
  BlockSum add;
  Scale scale_q, scale_k;
#pragma unroll 1
  for (;;) {
    float squares[2] = {};
    for_each_element<kPacks, kWhole>(width, [&](int i, int j) {
      squares[0] = madd(q[i][j], q[i][j], squares[0]);
      squares[1] = madd(k[i][j], k[i][j], squares[1]);
    });
    add(squares);
    const float power_q = scale_q.update(width.mean(squares[0]), static_cast<float>(p.eps));
    const float power_k = scale_k.update(width.mean(squares[1]), static_cast<float>(p.eps));
    if (power_q == 1.0f && power_k == 1.0f) {
      break;
    }
    for_each_element<kPacks, kWhole>(width, [&](int i, int j) {
      q[i][j] *= power_q;
      k[i][j] *= power_k;
    });
  }
  const Slot slot = shared_slot;
  const bool appends = p.k_out == nullptr;
  const int64_t k_at = slot.row * width.channels;
  T* const q_out =
      static_cast<T*>(p.q_out) + (int64_t{sample} * gridDim.x + token) * width.channels;
  T* const k_out = static_cast<T*>(appends ? p.k_cache : p.k_out) + k_at;
  T* const v_out = static_cast<T*>(p.v_cache) + k_at;
  const T* const v_row = row<T>(p.v, sample, token);
  const float factor_q = scale_q.inverse + slot.poison, factor_k = scale_k.inverse + slot.poison;
  for_each_pack<kPacks, kWhole>(width, [&](int i, unsigned at, int count) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      q[i][j] = rms_normed(q[i][j], factor_q, weight_q[i][j]);
      k[i][j] = rms_normed(k[i][j], factor_k, weight_k[i][j]);
    }
    turn<Turn::kForward>(angles[i], q[i]);
    turn<Turn::kForward>(angles[i], k[i]);
    store<kWhole>(q_out + at, count, q[i]);
    store<kWhole>(k_out + at, count, k[i]);
    if (appends) {
      copy<kWhole>(v_row + at, count, v_out + at);
    }
  });
}

// Grid (blocks of up to kRowTokens tokens, samples, q or k). A block leaves its share of the
// gradient of the weight.
template <class T, bool kWhole>
__global__ void __launch_bounds__(kRowThreads, 1)
    _qk_norm_rope_bwd_kernel(QkNormRopeProblem p, Width width, Divisor by_head, float* partial,
                             uint32_t first) {
  constexpr int kPacks = kBackwardPacks;
  const uint32_t sample = first + blockIdx.y;
  const int64_t begin = int64_t{blockIdx.x} * kRowTokens;
  const int64_t end = min(begin + kRowTokens, p.tokens);
  const bool is_q = blockIdx.z == 0;
  const TokenRows in = is_q ? p.q : p.k, incoming = is_q ? p.grad_q : p.grad_k;
  T* const dx = static_cast<T*>(is_q ? p.dq : p.dk);
  const unsigned head_dim = static_cast<unsigned>(p.head_dim);
  RowPart<kPacks> weight, dweight = {};
  for_each_pack<kPacks, kWhole>(width, [&](int i, unsigned at, int count) {
    load<kWhole, T>(p.weight_type, is_q ? p.weight_q : p.weight_k, at, count, weight[i]);
  });
  BlockSum add;
#pragma unroll 1
  for (int64_t token = begin; token < end; ++token) {
    const T *x_row = row<T>(in, sample, token), *grad_row = row<T>(incoming, sample, token);
    const float* table = p.rope + sample * p.rope_batch + token * head_dim;
    RowPart<kPacks> x = {}, grad;
    for_each_pack<kPacks, kWhole>(width, [&](int i, unsigned at, int count) {
      float angles[kPack];
      load<kWhole>(x_row + at, count, x[i]);
      load<kWhole>(grad_row + at, count, grad[i]);
      load_angles<kWhole>(table, at, count, head_dim, by_head, angles);
      turn<Turn::kBack>(angles, grad[i]);
    });
    Scale scale;
    float sums[2];  // of the row's squares, and of its products with the gradient times the weight
#pragma unroll 1
    for (;;) {
      sums[0] = sums[1] = 0.0f;
      for_each_element<kPacks, kWhole>(width, [&](int i, int j) {
        sums[0] = madd(x[i][j], x[i][j], sums[0]);
        sums[1] = madd(grad[i][j] * weight[i][j], x[i][j], sums[1]);
      });
      add(sums);
      const float power = scale.update(width.mean(sums[0]), static_cast<float>(p.eps));
      if (power == 1.0f) {
        break;
      }
      for_each_element<kPacks, kWhole>(width, [&](int i, int j) { x[i][j] *= power; });
    }
    const float pull = pull_of(sums[1], width.count, scale.inverse);
    const int64_t out = (sample * p.tokens + token) * width.channels;
    for_each_pack<kPacks, kWhole>(width, [&](int i, unsigned at, int count) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const float value = x[i][j];
        dweight[i][j] = madd(grad[i][j], value * scale.inverse, dweight[i][j]);
        x[i][j] =
            rms_gradient(grad[i][j] * weight[i][j], value, scale.inverse, pull) * scale.factor;
      }
      store<kWhole>(dx + out + at, count, x[i]);
    });
  }
  const int64_t share = (blockIdx.z * p.batch + sample) * gridDim.x + blockIdx.x;
  for_each_pack<kPacks, kWhole>(width, [&](int i, unsigned at, int count) {
    store<kWhole>(partial + share * width.channels + at, count, dweight[i]);
  });
}

int64_t blocks_of_tokens(const QkNormRopeProblem& p) {
  return (p.tokens + kRowTokens - 1) / kRowTokens;
}

bool reads_whole_packs(const QkNormRopeProblem& p) {
  const auto rows = [&](const TokenRows& x) { return whole(x, p.type); };
  return p.head_dim % kPack == 0 && rows(p.q) && rows(p.k) && rows(p.v) && rows(p.grad_q) &&
         rows(p.grad_k) && aligned(p.weight_q) && aligned(p.weight_k) && aligned(p.k_cache) &&
         aligned(p.v_cache) && whole(p.rope, DType::kFloat32, p.rope_batch);
}

}  // namespace

void launch_qk_norm_rope(const QkNormRopeProblem& p, void* stream) {
  const int64_t channels = p.heads * p.head_dim;
  const int64_t frame = p.k_out == nullptr ? p.tokens_per_frame : 1;
  const int64_t ring = p.slots / frame - p.sink_frames;
  with_types(p.type, reads_whole_packs(p), [&](auto x, auto is_whole) {
    const unsigned threads = row_threads(channels, kForwardPacks<decltype(is_whole)::value>);
    for_each_grid(p.tokens, p.batch, [&](dim3 grid, int64_t first) {
      _qk_norm_rope_fwd_kernel<decltype(x), decltype(is_whole)::value>
          <<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(
              p, Width(channels), Divisor(p.head_dim), Divisor(frame), ring, first);
    });
  });
  check_launch();
}

int64_t qk_norm_rope_bwd_workspace(const QkNormRopeProblem& p) {
  return 2 * p.batch * blocks_of_tokens(p) * p.heads * p.head_dim * int64_t{sizeof(float)};
}

void launch_qk_norm_rope_bwd(const QkNormRopeProblem& p, void* workspace, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const int64_t channels = p.heads * p.head_dim, blocks = blocks_of_tokens(p);
  float* const partial = static_cast<float*>(workspace);
  const unsigned threads = row_threads(channels, kBackwardPacks);
  with_types(p.type, reads_whole_packs(p), [&](auto x, auto is_whole) {
    for_each_grid(blocks, p.batch, [&](dim3 grid, int64_t first) {
      grid.z = 2;
      _qk_norm_rope_bwd_kernel<decltype(x), decltype(is_whole)::value>
          <<<grid, threads, 0, s>>>(p, Width(channels), Divisor(p.head_dim), partial, first);
    });
  });
  const int64_t rows = p.batch * blocks;
  sum_rows({partial, channels, 1, rows, rows, channels, p.dweight_q}, 1, 1, s);
  sum_rows({partial + rows * channels, channels, 1, rows, rows, channels, p.dweight_k}, 1, 1, s);
  check_launch();
}

}  // namespace afd::cuda
