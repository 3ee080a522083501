// x_t = alpha x0 + sigma noise, and the other elementwise loops. Compiled once per instruction set.
#include "tiles.h"

namespace afd::AFD_ISA {
namespace {

// Applies out[i] = formula(in[i], noise[i]) to a tile; the last, partial block goes through copies.
template <class X, class Formula>
AFD_INLINE void map_tile(const X* in, const float* noise, X* out, int count, Formula formula) {
  int i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    Float y[kParts];
    for (int k = 0; k < kParts; ++k) {
      const Float n = noise == nullptr ? Float(0.0f) : load(noise + i + k * kLanes);
      y[k] = formula(load(in + i + k * kLanes), n);
    }
    store_block(out + i, y, false);
  }
  if (i < count) {
    X in_rest[kBlock] = {}, out_rest[kBlock];
    float noise_rest[kBlock] = {};
    const size_t rest = static_cast<size_t>(count - i);
    memcpy(in_rest, in + i, rest * sizeof(X));
    if (noise != nullptr) {
      memcpy(noise_rest, noise + i, rest * sizeof(float));
    }
    Float y[kParts];
    for (int k = 0; k < kParts; ++k) {
      y[k] = formula(load(in_rest + k * kLanes), load(noise_rest + k * kLanes));
    }
    store_block(out_rest, y, false);
    memcpy(out + i, out_rest, rest * sizeof(X));
  }
}

template <class X>
void forward_noise_slice(const NoiseProblem& p, int64_t sample, int64_t begin, int64_t end,
                         const NoiseCoefficients* of_frame) {
  NoiseSource<X> source(p.rows, sample, p.seed, p.noise, p.noise_type);
  const int64_t base = element_offset(p.rows, sample, 0);
  const X* x0 = static_cast<const X*>(p.x0) + base;
  X* x_t = static_cast<X*>(p.x_t) + base;
  for_each_run(p.rows, begin, end, [&](int64_t frame, int64_t position, int64_t count) {
    const Float alpha(of_frame[frame].alpha), sigma(of_frame[frame].sigma);
    const int64_t run_end = position + count;
    while (position < run_end) {
      const int n = source.length(position, run_end - position);
      map_tile(x0 + position, source.tile(position, n), x_t + position, n,
               [&](Float x, Float noise) { return noised(x, noise, alpha, sigma); });
      position += n;
    }
  });
}

template <class X>
void scale_slice(const X* in, X* out, int64_t begin, int64_t end, float factor) {
  for (int64_t i = begin; i < end; i += kRun) {
    const int n = static_cast<int>(end - i < kRun ? end - i : kRun);
    map_tile(in + i, nullptr, out + i, n, [&](Float x, Float) { return x * Float(factor); });
  }
}

}  // namespace

void forward_noise(const NoiseProblem& p, int64_t sample, int64_t begin, int64_t end,
                   const NoiseCoefficients* of_frame) {
  with_type(p.x0_type,
            [&](auto x) { forward_noise_slice<decltype(x)>(p, sample, begin, end, of_frame); });
}

void scale(DType type, const void* in, void* out, int64_t begin, int64_t end, float factor) {
  with_type(type, [&](auto x) {
    using X = decltype(x);
    scale_slice(static_cast<const X*>(in), static_cast<X*>(out), begin, end, factor);
  });
}

void scale_by_frame(const NoiseProblem& p, int64_t sample, int64_t begin, int64_t end,
                    const NoiseCoefficients* of_frame) {
  const int64_t base = element_offset(p.rows, sample, 0);
  for_each_run(p.rows, begin, end, [&](int64_t frame, int64_t position, int64_t count) {
    scale(p.x0_type, p.x0, p.x_t, base + position, base + position + count, of_frame[frame].alpha);
  });
}

void normals(int64_t seed, int64_t first, int64_t count, float* out) {
  const Rows rows = {1, 1, 1, first + count, 1};
  NoiseSource<float> source(rows, 0, &seed, nullptr, DType::kFloat32);
  for (int64_t done = 0; done < count;) {
    const int n = source.length(first + done, count - done);
    memcpy(out + done, source.tile(first + done, n), static_cast<size_t>(n) * sizeof(float));
    done += n;
  }
}

void stream_5r1w(const float* const in[5], float* out, int64_t begin, int64_t end,
                 bool non_temporal) {
  int64_t i = begin;
  const bool stream = non_temporal && can_stream(out + begin);
  for (; i + kBlock <= end; i += kBlock) {
    Float y[kParts];
    for (int k = 0; k < kParts; ++k) {
      const int64_t at = i + k * kLanes;
      y[k] = load(in[0] + at) + load(in[1] + at) + load(in[2] + at) + load(in[3] + at) +
             load(in[4] + at);
    }
    store_block(out + i, y, stream);
  }
  for (; i < end; ++i) {
    out[i] = in[0][i] + in[1][i] + in[2][i] + in[3][i] + in[4][i];
  }
}

}  // namespace afd::AFD_ISA
