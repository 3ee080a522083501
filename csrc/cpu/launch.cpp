// Cuts ops into slices and puts the slices' sums together. The cut depends on the sizes alone, so
// the result does not depend on the number of threads.
#include "launch.h"

#include <vector>

#include "huge_pages.h"
#include "isa.h"
#include "kernels.h"
#include "parallel.h"

namespace afd::cpu {
namespace {

// Slices are multiples of this many elements: rows of 64-byte lines for every type, whole quads.
constexpr int64_t kGrain = 2048;
constexpr int64_t kSmallestSlice = 8 * kGrain;
constexpr int64_t kMostSlices = 64;

struct Slices {
  int64_t length, count, total;

  explicit Slices(int64_t elements) : total(elements) {
    const int64_t even = (elements + kMostSlices - 1) / kMostSlices;
    length = (even + kGrain - 1) / kGrain * kGrain;
    length = length < kSmallestSlice ? kSmallestSlice : length;
    count = (elements + length - 1) / length;
  }
  int64_t begin(int64_t i) const { return i * length; }
  int64_t end(int64_t i) const { return (i + 1) * length < total ? (i + 1) * length : total; }
};

int64_t bytes_of(const Rows& rows, DType type) {
  return rows.batch * elements_per_sample(rows) * size_of(type);
}

std::vector<NoiseCoefficients> noise_coefficients(const NoiseProblem& p) {
  std::vector<NoiseCoefficients> table(static_cast<size_t>(p.rows.batch * p.rows.frames));
  for (int64_t b = 0; b < p.rows.batch; ++b) {
    for (int64_t f = 0; f < p.rows.frames; ++f) {
      const ScheduleAt at = schedule_of_frame(p.rows, p.schedule, p.t, b, f);
      table[static_cast<size_t>(b * p.rows.frames + f)] = {static_cast<float>(at.alpha),
                                                           static_cast<float>(at.sigma)};
    }
  }
  return table;
}

using NoiseKernel = void (*)(const NoiseProblem&, int64_t, int64_t, int64_t,
                             const NoiseCoefficients*);

void for_each_slice(const NoiseProblem& p, int threads, NoiseKernel kernel) {
  const std::vector<NoiseCoefficients> table = noise_coefficients(p);
  const Slices slices(elements_per_sample(p.rows));
  parallel_for(p.rows.batch * slices.count, threads, [&](int64_t i, int) {
    const int64_t b = i / slices.count, s = i % slices.count;
    kernel(p, b, slices.begin(s), slices.end(s), table.data() + b * p.rows.frames);
  });
}

}  // namespace

void launch_normals(int64_t seed, int64_t first, int64_t count, float* out) {
  cpu_kernels().normals(seed, first, count, out);
}

void launch_forward_noise(const NoiseProblem& p, int threads) {
  hint_huge_pages(p.x_t, bytes_of(p.rows, p.x0_type));
  for_each_slice(p, threads, cpu_kernels().forward_noise);
}

void launch_forward_noise_bwd(const NoiseProblem& p, int threads) {
  hint_huge_pages(p.x_t, bytes_of(p.rows, p.x0_type));
  for_each_slice(p, threads, cpu_kernels().scale_by_frame);
}

void launch_nft_loss(const NftProblem& p, int threads) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t frames = p.rows.frames;
  hint_huge_pages(p.grad, bytes_of(p.rows, p.prediction_type));
  const Slices slices(elements_per_sample(p.rows));
  // Without adaptive weights the gradient's coefficients are known before the sums: one pass.
  const bool one_pass = !p.adaptive && p.grad != nullptr;
  // Samples go through both passes one after the other (small ones several at a time), so that the
  // second pass finds as much as possible in the cache.
  int64_t together = kMostSlices / slices.count;
  together = together < p.rows.batch ? together : p.rows.batch;
  std::vector<NftCoefficients> table(static_cast<size_t>(together * frames));
  std::vector<double> partial(static_cast<size_t>(together * slices.count * frames * kNftSums));
  std::vector<double> sums(static_cast<size_t>(frames * kNftSums));
  double loss = 0.0;
  for (int64_t first = 0; first < p.rows.batch; first += together) {
    const int64_t here = p.rows.batch - first < together ? p.rows.batch - first : together;
    for (int64_t i = 0; i < here; ++i) {
      const double valid = valid_elements(p, first + i);
      for (int64_t f = 0; f < frames; ++f) {
        table[static_cast<size_t>(i * frames + f)] =
            nft_coefficients(p, first + i, f, valid, 1.0, 1.0);
      }
    }
    partial.assign(partial.size(), 0.0);
    parallel_for(here * slices.count, threads, [&](int64_t piece, int) {
      const int64_t i = piece / slices.count, s = piece % slices.count;
      kernels.nft_sums(p, first + i, slices.begin(s), slices.end(s), table.data() + i * frames,
                       partial.data() + piece * frames * kNftSums);
    });
    for (int64_t i = 0; i < here; ++i) {
      for (int64_t f = 0; f < frames; ++f) {
        double* sum = sums.data() + f * kNftSums;
        for (int k = 0; k < kNftSums; ++k) {
          sum[k] = 0.0;
        }
        add_in_order(partial.data() + (i * slices.count * frames + f) * kNftSums, slices.count,
                     frames * kNftSums, sum);
      }
      const double valid = valid_elements(p, first + i);
      for (int64_t g = 0; g < p.groups; ++g) {
        loss += finalize_group(p, first + i, g, valid, sums.data(),
                               p.metrics + ((first + i) * p.groups + g) * kNftMetrics,
                               table.data() + i * frames);
      }
    }
    if (p.grad != nullptr && !one_pass) {
      // Backwards: what the first pass read last is still there.
      const int64_t pieces = here * slices.count;
      parallel_for(pieces, threads, [&](int64_t reversed, int) {
        const int64_t piece = pieces - 1 - reversed;
        const int64_t i = piece / slices.count, s = piece % slices.count;
        kernels.nft_gradient(p, first + i, slices.begin(s), slices.end(s),
                             table.data() + i * frames);
      });
    }
  }
  *p.loss = static_cast<float>(loss);
}

void launch_scale(DType type, const void* in, void* out, int64_t count, float factor, int threads) {
  if (in == out && factor == 1.0f) {
    return;
  }
  const Slices slices(count);
  parallel_for(slices.count, threads, [&](int64_t s, int) {
    cpu_kernels().scale(type, in, out, slices.begin(s), slices.end(s), factor);
  });
}

void launch_stream_5r1w(const float* const in[5], float* out, int64_t count, bool non_temporal,
                        int threads) {
  const Slices slices(count);
  parallel_for(slices.count, threads, [&](int64_t s, int) {
    cpu_kernels().stream_5r1w(in, out, slices.begin(s), slices.end(s), non_temporal);
  });
}

}  // namespace afd::cpu
