// RMS norm over all heads' channels and rotary positions of queries and keys, straight into the
// results or into a cache. Compiled once per instruction set.
#include "kernels.h"
#include "rows.h"

namespace afd::AFD_ISA {
namespace {

// Turning by the table's angles, or back.
enum class Turn { kForward, kBack };

AFD_INLINE Float turned(Float x, const float* table, Turn turn) {
  const Float angle = load(table);
  WordLanes negative;
  for (int i = 0; i < kLanes; ++i) {
    negative[i] = (i % 2 == 0) == (turn == Turn::kForward) ? 0x80000000u : 0u;
  }
  return rotated(x, swap_pairs(x), evens_twice(angle),
                 as_float(as_bits(odds_twice(angle)) ^ Word(negative)));
}

// The (cos, sin) of a token's channels. Where a head is whole blocks the table is read once per
// head; else it is written out for the whole row, as one long head.
struct Angles {
  const float* table;
  int64_t parts, length;

  AFD_INLINE Angles(const QkNormRopeProblem& p, int64_t sample, int64_t token, float* scratch)
      : table(p.rope + sample * p.rope_batch + token * p.head_dim),
        parts(p.heads),
        length(p.head_dim) {
    if (length % kBlock != 0) {
      for (int64_t h = 0; h < p.heads; ++h) {
        memcpy(scratch + h * length, table, static_cast<size_t>(length) * sizeof(float));
      }
      table = scratch;
      parts = 1;
      length *= p.heads;
      memset(scratch + length, 0, static_cast<size_t>(padded(length) - length) * sizeof(float));
    }
  }
};

AFD_INLINE double sum_of_squares(const float* x, int64_t count) {
  RowSum squares;
  for_vectors(count, [&](int64_t i, int part) {
    const Float value = load(x + i);
    squares.add(part, value * value);
  });
  return squares.total();
}

template <class T>
AFD_INLINE void forward_row(const T* in, const float* weight, const Angles& angles, double eps,
                            float* scratch, T* out, bool stream) {
  const int64_t channels = angles.parts * angles.length;
  const float* x = widened(in, channels, scratch);
  double squares = sum_of_squares(x, channels);
  const float factor = factor_of_row(squares, channels, eps);
  if (__builtin_expect(factor != 1.0f, 0)) {
    multiply_row(x, factor, channels, scratch);
    x = scratch;
    eps *= static_cast<double>(factor) * static_cast<double>(factor);
    squares = sum_of_squares(x, channels);
  }
  const Float scale(inverse_deviation(squares, static_cast<double>(channels), eps));
  stream = stream && can_stream(out);
  for (int64_t h = 0; h < angles.parts; ++h) {
    const int64_t first = h * angles.length;
    write_row(out + first, angles.length, stream, [&](int64_t i) {
      const Float y = rms_normed(load(x + first + i), scale, load(weight + first + i));
      return turned(y, angles.table + i, Turn::kForward);
    });
  }
}

template <class T>
void forward(const QkNormRopeProblem& p, int64_t begin, int64_t end, bool stream, float* scratch) {
  const int64_t channels = p.heads * p.head_dim, row = padded(channels);
  float *const table = scratch, *const x = scratch + row;
  const float* weight_q = widened(p.weight_type, p.weight_q, 0, channels, scratch + 2 * row);
  const float* weight_k = widened(p.weight_type, p.weight_k, 0, channels, scratch + 3 * row);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t sample = at / p.tokens, token = at % p.tokens;
    const Angles angles(p, sample, token, table);
    const T* q = static_cast<const T*>(p.q.data) + row_offset(p.q, sample, token);
    const T* k = static_cast<const T*>(p.k.data) + row_offset(p.k, sample, token);
    forward_row(q, weight_q, angles, p.eps, x, static_cast<T*>(p.q_out) + at * channels, stream);
    if (p.k_out != nullptr) {
      forward_row(k, weight_k, angles, p.eps, x, static_cast<T*>(p.k_out) + at * channels, stream);
      continue;
    }
    const int64_t frame = p.position[p.positions == 1 ? 0 : sample] + token / p.tokens_per_frame;
    const int64_t ring = p.slots / p.tokens_per_frame - p.sink_frames;
    const int64_t slot =
        cache_slot(frame, p.sink_frames, ring) * p.tokens_per_frame + token % p.tokens_per_frame;
    const int64_t offset = (sample * p.slots + slot) * channels;
    forward_row(k, weight_k, angles, p.eps, x, static_cast<T*>(p.k_cache) + offset, false);
    memcpy(static_cast<void*>(static_cast<T*>(p.v_cache) + offset),
           static_cast<const T*>(p.v.data) + row_offset(p.v, sample, token),
           static_cast<size_t>(channels) * sizeof(T));
  }
}

// Scratch rows: x, the gradient that came, and the same turned back.
template <class T>
AFD_INLINE void backward_row(const T* in, const T* incoming, const float* weight,
                             const Angles& angles, double eps, float* scratch, T* out, bool stream,
                             float* dweight) {
  const int64_t channels = angles.parts * angles.length, row = padded(channels);
  const float* x = widened(in, channels, scratch);
  const float* g = widened(incoming, channels, scratch + row);
  float* back = scratch + 2 * row;
  RowSum squares, along;
  const auto add = [&] {
    for (int64_t h = 0; h < angles.parts; ++h) {
      const int64_t first = h * angles.length;
      for_vectors(angles.length, [&](int64_t i, int part) {
        const int64_t c = first + i;
        const Float value = load(x + c);
        const Float y = turned(load(g + c), angles.table + i, Turn::kBack);
        store(back + c, y);
        squares.add(part, value * value);
        along.add(part, y * load(weight + c) * value);
      });
    }
  };
  add();
  const float factor = factor_of_row(squares.total(), channels, eps);
  if (__builtin_expect(factor != 1.0f, 0)) {
    multiply_row(x, factor, channels, scratch);
    x = scratch;
    eps *= static_cast<double>(factor) * static_cast<double>(factor);
    squares = along = RowSum();
    add();
  }
  const double count = static_cast<double>(channels);
  const float scale = inverse_deviation(squares.total(), count, eps);
  const Float s(scale), pull(pull_of(along.total(), count, scale));
  write_row(out, channels, stream && can_stream(out), [&](int64_t i) {
    const Float value = load(x + i), y = load(back + i);
    store(dweight + i, load(dweight + i) + y * (value * s));
    return rms_gradient(y * load(weight + i), value, s, pull) * Float(factor);
  });
}

template <class T>
void backward(const QkNormRopeProblem& p, int64_t begin, int64_t end, bool stream, float* scratch,
              float* dweight_q, float* dweight_k) {
  const int64_t channels = p.heads * p.head_dim, row = padded(channels);
  const size_t bytes = static_cast<size_t>(row) * sizeof(float);
  float *const table = scratch, *const rows = scratch + row;
  const float* weight_q = widened(p.weight_type, p.weight_q, 0, channels, scratch + 4 * row);
  const float* weight_k = widened(p.weight_type, p.weight_k, 0, channels, scratch + 5 * row);
  float *const sum_q = scratch + 6 * row, *const sum_k = scratch + 7 * row;
  memset(sum_q, 0, 2 * bytes);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t sample = at / p.tokens, token = at % p.tokens;
    const Angles angles(p, sample, token, table);
    const auto one = [&](const TokenRows& in, const TokenRows& grad, const float* weight, void* out,
                         float* sum) {
      backward_row(static_cast<const T*>(in.data) + row_offset(in, sample, token),
                   static_cast<const T*>(grad.data) + row_offset(grad, sample, token), weight,
                   angles, p.eps, rows, static_cast<T*>(out) + at * channels, stream, sum);
    };
    one(p.q, p.grad_q, weight_q, p.dq, sum_q);
    one(p.k, p.grad_k, weight_k, p.dk, sum_k);
  }
  memcpy(dweight_q, sum_q, static_cast<size_t>(channels) * sizeof(float));
  memcpy(dweight_k, sum_k, static_cast<size_t>(channels) * sizeof(float));
}

}  // namespace

void qk_norm_rope(const QkNormRopeProblem& p, int64_t begin, int64_t end, bool stream,
                  float* scratch) {
  with_type(p.type, [&](auto x) { forward<decltype(x)>(p, begin, end, stream, scratch); });
}

void qk_norm_rope_bwd(const QkNormRopeProblem& p, int64_t begin, int64_t end, bool stream,
                      float* scratch, float* dweight_q, float* dweight_k) {
  with_type(p.type, [&](auto x) {
    backward<decltype(x)>(p, begin, end, stream, scratch, dweight_q, dweight_k);
  });
}

}  // namespace afd::AFD_ISA
