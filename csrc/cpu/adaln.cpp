// Gated residual, layer norm and modulation in one pass, and its gradient. A call covers tokens of
// one sample that share their modulation. Compiled once per instruction set.
#include "kernels.h"
#include "rows.h"

namespace afd::AFD_ISA {
namespace {

// All ones in the lanes that lie inside a row of `count` channels.
AFD_INLINE Float inside(Float x, int64_t i, int64_t count) {
  if (i + kLanes <= count) {
    return x;
  }
  WordLanes mask;
  for (int lane = 0; lane < kLanes; ++lane) {
    mask[lane] = i + lane < count ? ~0u : 0u;
  }
  return as_float(as_bits(x) & Word(mask));
}

// What the tokens of a call share, in fp32.
struct Modulation {
  const float *gate, *gain, *shift;

  AFD_INLINE Modulation(const AdalnProblem& p, int64_t sample, int64_t token, float* scratch) {
    const int64_t row = padded(p.channels);
    const auto read = [&](const FrameRows& from, float* to) -> const float* {
      if (from.data == nullptr) {
        return nullptr;
      }
      return widened(from.type, from.data, row_offset(from, sample, token, p.tokens), p.channels,
                     to);
    };
    gate = read(p.gate, scratch);
    shift = read(p.shift, scratch + row);
    float* const sum = scratch + 2 * row;
    const float* scale = read(p.scale, sum);
    const Float offset(static_cast<float>(p.scale_offset));
    for_vectors(p.channels, [&](int64_t i, int) { store(sum + i, offset + load(scale + i)); });
    gain = sum;
  }
};

AFD_INLINE double sum_of(const float* x, int64_t count) {
  RowSum sum;
  for_vectors(count, [&](int64_t i, int part) { sum.add(part, load(x + i)); });
  return sum.total();
}

// Subtracts the row's mean (x may be `centred`), and returns the sum of the squares of the rest.
AFD_INLINE double centre(const float* x, int64_t count, float* centred) {
  const double sum = sum_of(x, count);
  const Float mean(static_cast<float>(sum / static_cast<double>(count)));
  RowSum squares;
  for_vectors(count, [&](int64_t i, int part) {
    const Float c = inside(load(x + i) - mean, i, count);
    store(centred + i, c);
    squares.add(part, c * c);
  });
  return squares.total();
}

// The row minus its mean, times `factor` (see factor_of_row); `inverse` is 1 / their deviation.
struct Centred {
  float factor, inverse;

  // `again` reads the row once more: x may be `row`, which holds the result.
  template <class Again>
  AFD_INLINE Centred(const float* x, int64_t count, double eps, float* row, Again again) {
    double squares = centre(x, count, row);
    factor = factor_of_row(squares, count, eps);
    if (__builtin_expect(factor != 1.0f, 0)) {
      multiply_row(again(), factor, count, row);
      eps *= static_cast<double>(factor) * static_cast<double>(factor);
      squares = centre(row, count, row);
    }
    inverse = inverse_deviation(squares, static_cast<double>(count), eps);
  }
};

// out = x + gate branch; `rounded` gets the values that out then holds.
template <class T>
AFD_INLINE void residual_row(const float* x, const float* gate, const float* branch, int64_t count,
                             bool stream, T* out, float* rounded) {
  const Float one(1.0f);
  const auto sum = [&](int64_t i) {
    return gated(load(x + i), gate == nullptr ? one : load(gate + i), load(branch + i));
  };
  if constexpr (sizeof(T) == sizeof(float)) {
    write_row(out, count, stream, [&](int64_t i) {
      const Float y = sum(i);
      store(rounded + i, y);
      return y;
    });
  } else {
    // What is streamed past the caches cannot be read back.
    write_row(out, count, false, sum);
    widened(out, count, rounded);
  }
}

template <class T>
void forward(const AdalnProblem& p, int64_t sample, int64_t begin, int64_t end, bool stream,
             float* scratch) {
  const int64_t count = p.channels, row = padded(count);
  const Modulation shared(p, sample, begin, scratch);
  float *const x_row = scratch + 3 * row, *const other = scratch + 4 * row;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t at = (sample * p.tokens + token) * count;
    const T* in = static_cast<const T*>(p.x.data) + row_offset(p.x, sample, token);
    const float* x = widened(in, count, x_row);
    const T* read = in;
    if (p.branch.data != nullptr) {
      const T* from = static_cast<const T*>(p.branch.data) + row_offset(p.branch, sample, token);
      T* const out = static_cast<T*>(p.x_out) + at;
      residual_row(x, shared.gate, widened(from, count, other), count, stream && can_stream(out),
                   out, x_row);
      x = x_row;
      read = out;
    }
    const auto again = [&] { return widened(read, count, other); };
    const Float scale(Centred(x, count, p.eps, x_row, again).inverse);
    T* const out = static_cast<T*>(p.h) + at;
    write_row(out, count, stream && can_stream(out), [&](int64_t i) {
      return modulated(load(x_row + i), scale, load(shared.gain + i), load(shared.shift + i));
    });
  }
}

template <class T>
void backward(const AdalnProblem& p, int64_t sample, int64_t begin, int64_t end, bool stream,
              float* scratch, float* dgate, float* dscale, float* dshift) {
  const int64_t count = p.channels, row = padded(count);
  const Modulation shared(p, sample, begin, scratch);
  float *const centred = scratch + 3 * row, *const dx_row = scratch + 4 * row;
  float* const sums = scratch + 8 * row;
  float *const sum_gate = sums, *const sum_scale = sums + row, *const sum_shift = sums + 2 * row;
  memset(sums, 0, static_cast<size_t>(3 * row) * sizeof(float));
  for (int64_t token = begin; token < end; ++token) {
    const int64_t at = (sample * p.tokens + token) * count;
    const auto read = [&](const TokenRows& from, int64_t which) {
      return widened(static_cast<const T*>(from.data) + row_offset(from, sample, token), count,
                     scratch + which * row);
    };
    const auto again = [&] { return read(p.x, 3); };
    const Centred normed(again(), count, p.eps, centred, again);
    const Float scale(normed.inverse), factor(normed.factor);
    const float* g = read(p.grad_h, 5);
    RowSum plain, along;
    for_vectors(count, [&](int64_t i, int part) {
      const Float grad = load(g + i), c = load(centred + i);
      const Float grad_normed = grad * load(shared.gain + i);
      plain.add(part, grad_normed);
      along.add(part, grad_normed * c);
      store(sum_shift + i, load(sum_shift + i) + grad);
      store(sum_scale + i, load(sum_scale + i) + grad * (c * scale));
    });
    const double size = static_cast<double>(count);
    const Float mean(static_cast<float>(plain.total() / size));
    const Float pull(pull_of(along.total(), size, normed.inverse));
    const float* passing = p.grad_x_out.data == nullptr ? nullptr : read(p.grad_x_out, 6);
    const bool gated = p.dbranch != nullptr;
    const float* branch = gated ? read(p.branch, 7) : nullptr;
    T* const dx = static_cast<T*>(p.dx) + at;
    write_row(dx, count, stream && can_stream(dx), [&](int64_t i) {
      const Float grad_normed = load(g + i) * load(shared.gain + i);
      Float d = layer_norm_gradient(grad_normed, mean, load(centred + i), scale, pull) * factor;
      d = passing == nullptr ? d : d + load(passing + i);
      if (gated) {
        store(dx_row + i, d);
        store(sum_gate + i, load(sum_gate + i) + d * load(branch + i));
      }
      return d;
    });
    if (gated) {
      T* const out = static_cast<T*>(p.dbranch) + at;
      write_row(out, count, stream && can_stream(out),
                [&](int64_t i) { return load(dx_row + i) * load(shared.gate + i); });
    }
  }
  const size_t bytes = static_cast<size_t>(count) * sizeof(float);
  if (dgate != nullptr) {
    memcpy(dgate, sum_gate, bytes);
  }
  memcpy(dscale, sum_scale, bytes);
  memcpy(dshift, sum_shift, bytes);
}

}  // namespace

void adaln(const AdalnProblem& p, int64_t sample, int64_t begin, int64_t end, bool stream,
           float* scratch) {
  with_type(p.type, [&](auto x) { forward<decltype(x)>(p, sample, begin, end, stream, scratch); });
}

void adaln_bwd(const AdalnProblem& p, int64_t sample, int64_t begin, int64_t end, bool stream,
               float* scratch, float* dgate, float* dscale, float* dshift) {
  with_type(p.type, [&](auto x) {
    backward<decltype(x)>(p, sample, begin, end, stream, scratch, dgate, dscale, dshift);
  });
}

}  // namespace afd::AFD_ISA
