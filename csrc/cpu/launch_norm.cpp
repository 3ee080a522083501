// Cuts qk_norm_rope and adaln into pieces of whole tokens and puts the pieces' sums together. The
// cut depends on the sizes alone, so the result does not depend on the number of threads.
#include <stdlib.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <new>
#include <numeric>

#include "huge_pages.h"
#include "isa.h"
#include "launch.h"
#include "parallel.h"

namespace afd::cpu {
namespace {

// A piece is worth this many elements, unless there would be too many of them to add up.
constexpr int64_t kSmallestPiece = 16384;
constexpr int64_t kMostPieces = 64;
// Larger results are written past the caches: nothing of them would be left there anyway.
constexpr int64_t kStreamFrom = int64_t{32} << 20;

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `total` tokens in equal pieces.
struct Pieces {
  int64_t total, length, count;

  Pieces(int64_t tokens, int64_t channels, int64_t most) : total(tokens) {
    const int64_t wanted = divided_up(tokens * channels, kSmallestPiece);
    length = divided_up(tokens, std::clamp<int64_t>(wanted, 1, std::max<int64_t>(most, 1)));
    count = divided_up(tokens, length);
  }
  int64_t begin(int64_t i) const { return i * length; }
  int64_t end(int64_t i) const { return std::min(begin(i) + length, total); }
};

struct Free {
  void operator()(void* p) const { free(p); }
};

// For each of `workers` threads a buffer of its own, aligned to cache lines. Allocated before any
// work begins: an op that lacks memory has then written nothing yet.
template <class T>
class Scratch {
 public:
  Scratch(int workers, int64_t size)
      : size_(divided_up(size, kLine) * kLine),
        memory_(static_cast<T*>(
            aligned_alloc(64, static_cast<size_t>(std::max(workers, 1) * size_) * sizeof(T)))) {
    if (memory_ == nullptr) {
      throw std::bad_alloc();
    }
  }
  T* of(int worker) const { return memory_.get() + worker * size_; }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t size_;
  const std::unique_ptr<T, Free> memory_;
};

// As many rows as a kernel asks for.
Scratch<float> scratch_rows(int threads, int64_t rows, int64_t channels) {
  return {threads, rows * divided_up(channels, 16) * 16};
}

// out = the sum of the rows partial[piece(0)], partial[piece(1)], ..., one after the other in fp64;
// `sum` has room for one.
template <class Piece>
void add_rows(const float* partial, int64_t channels, int64_t count, Piece piece, double* sum,
              float* out) {
  std::fill_n(sum, channels, 0.0);
  for (int64_t i = 0; i < count; ++i) {
    const float* row = partial + piece(i) * channels;
    for (int64_t c = 0; c < channels; ++c) {
      sum[c] += static_cast<double>(row[c]);
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = static_cast<float>(sum[c]);
  }
}

// Tells the system about a fresh result, and whether it is to be written past the caches.
bool prepare(std::initializer_list<void*> results, int64_t bytes) {
  for (void* result : results) {
    hint_huge_pages(result, bytes);
  }
  return bytes >= kStreamFrom;
}

// adaln's pieces: tokens of one sample that share their rows of gate, scale and shift.
struct Units {
  int64_t tokens, per_sample, count;
  Pieces cut;

  explicit Units(const AdalnProblem& p)
      : tokens(shared_tokens(p)),
        per_sample(p.tokens / tokens),
        count(p.batch * per_sample),
        cut(tokens, p.channels, kMostPieces / count) {}

  template <class Body>
  void for_each_piece(int threads, Body body) const {
    parallel_for(count * cut.count, threads, [&](int64_t piece, int worker) {
      const int64_t unit = piece / cut.count, i = piece % cut.count;
      const int64_t first = unit % per_sample * tokens;
      body(piece, worker, unit / per_sample, first + cut.begin(i), first + cut.end(i));
    });
  }

 private:
  static int64_t shared_tokens(const AdalnProblem& p) {
    const auto tokens_of_row = [&](const FrameRows& rows) {
      return rows.data == nullptr ? 0 : p.tokens / rows.frames;
    };
    return std::gcd(tokens_of_row(p.scale),
                    std::gcd(tokens_of_row(p.shift), tokens_of_row(p.gate)));
  }
};

// Where the pieces' shares of one modulation's gradient go: straight into it where every row has a
// single piece, else into partial sums.
class ModulationSum {
 public:
  ModulationSum(const Units& units, int64_t channels, int64_t batch, const FrameRows& of,
                float* out)
      : units_(units), channels_(channels), batch_(batch), of_(of), out_(out) {
    if (out != nullptr && pieces_of_row() > 1) {
      partial_.reset(new float[static_cast<size_t>(units.count * units.cut.count * channels)]);
    }
  }
  float* at(int64_t piece) const {
    float* const to = partial_ == nullptr ? out_ : partial_.get();
    return to == nullptr ? nullptr : to + piece * channels_;
  }
  // `sums`: a row of doubles for each thread.
  void finish(int threads, const Scratch<double>& sums) const {
    if (partial_ == nullptr) {
      return;
    }
    const int64_t per_sample = units_.per_sample * units_.cut.count;
    const int64_t run = per_sample / of_.frames;
    parallel_for(of_.batches * of_.frames, threads, [&](int64_t row, int worker) {
      const int64_t first = row / of_.frames * per_sample + row % of_.frames * run;
      add_rows(
          partial_.get(), channels_, pieces_of_row(),
          [&](int64_t i) { return first + i / run * per_sample + i % run; }, sums.of(worker),
          out_ + row * channels_);
    });
  }

 private:
  int64_t pieces_of_row() const {
    return batch_ / of_.batches * (units_.per_sample / of_.frames) * units_.cut.count;
  }

  const Units& units_;
  const int64_t channels_, batch_;
  const FrameRows& of_;
  float* const out_;
  std::unique_ptr<float[]> partial_;
};

}  // namespace

void launch_qk_norm_rope(const QkNormRopeProblem& p, int threads) {
  const int64_t channels = p.heads * p.head_dim;
  const bool stream = prepare({p.q_out, p.k_out}, p.batch * p.tokens * channels * size_of(p.type));
  const Pieces pieces(p.batch * p.tokens, channels, kMostPieces);
  const Scratch<float> scratch = scratch_rows(threads, kQkNormRopeScratch, channels);
  parallel_for(pieces.count, threads, [&](int64_t i, int worker) {
    cpu_kernels().qk_norm_rope(p, pieces.begin(i), pieces.end(i), stream, scratch.of(worker));
  });
}

void launch_qk_norm_rope_bwd(const QkNormRopeProblem& p, int threads) {
  const int64_t channels = p.heads * p.head_dim;
  const bool stream = prepare({p.dq, p.dk}, p.batch * p.tokens * channels * size_of(p.type));
  const Pieces pieces(p.batch * p.tokens, channels, kMostPieces);
  const std::unique_ptr<float[]> partial(
      new float[static_cast<size_t>(2 * pieces.count * channels)]);
  float *const partial_q = partial.get(), *const partial_k = partial_q + pieces.count * channels;
  const Scratch<float> scratch = scratch_rows(threads, kQkNormRopeBwdScratch, channels);
  const Scratch<double> sum(1, channels);
  parallel_for(pieces.count, threads, [&](int64_t i, int worker) {
    cpu_kernels().qk_norm_rope_bwd(p, pieces.begin(i), pieces.end(i), stream, scratch.of(worker),
                                   partial_q + i * channels, partial_k + i * channels);
  });
  const auto in_order = [](int64_t i) { return i; };
  add_rows(partial_q, channels, pieces.count, in_order, sum.of(0), p.dweight_q);
  add_rows(partial_k, channels, pieces.count, in_order, sum.of(0), p.dweight_k);
}

void launch_adaln(const AdalnProblem& p, int threads) {
  const bool stream = prepare({p.x_out, p.h}, p.batch * p.tokens * p.channels * size_of(p.type));
  const Scratch<float> scratch = scratch_rows(threads, kAdalnScratch, p.channels);
  Units(p).for_each_piece(threads,
                          [&](int64_t, int worker, int64_t sample, int64_t begin, int64_t end) {
                            cpu_kernels().adaln(p, sample, begin, end, stream, scratch.of(worker));
                          });
}

void launch_adaln_bwd(const AdalnProblem& p, int threads) {
  const bool stream = prepare({p.dx, p.dbranch}, p.batch * p.tokens * p.channels * size_of(p.type));
  const Units units(p);
  const ModulationSum gate(units, p.channels, p.batch, p.gate, p.dgate);
  const ModulationSum scale(units, p.channels, p.batch, p.scale, p.dscale);
  const ModulationSum shift(units, p.channels, p.batch, p.scale, p.dshift);
  const Scratch<float> scratch = scratch_rows(threads, kAdalnBwdScratch, p.channels);
  const Scratch<double> sums(threads, p.channels);
  units.for_each_piece(threads,
                       [&](int64_t piece, int worker, int64_t sample, int64_t begin, int64_t end) {
                         cpu_kernels().adaln_bwd(p, sample, begin, end, stream, scratch.of(worker),
                                                 gate.at(piece), scale.at(piece), shift.at(piece));
                       });
  gate.finish(threads, sums);
  scale.finish(threads, sums);
  shift.finish(threads, sums);
}

}  // namespace afd::cpu
