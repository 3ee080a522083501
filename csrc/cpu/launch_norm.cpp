// Cuts qk_norm_rope and adaln into pieces of whole tokens and puts the pieces' sums together. The
// cut depends on the sizes alone, so the result does not depend on the number of threads.
#include <stdlib.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

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
  void operator()(float* p) const { free(p); }
};

// Rows for one piece, aligned to cache lines.
class Scratch {
 public:
  Scratch(int64_t rows, int64_t channels)
      : memory_(static_cast<float*>(aligned_alloc(
            64, static_cast<size_t>(rows * divided_up(channels, 16) * 16) * sizeof(float)))) {
    if (memory_ == nullptr) {
      throw std::bad_alloc();
    }
  }
  float* data() { return memory_.get(); }

 private:
  std::unique_ptr<float, Free> memory_;
};

// out = the sum of the rows partial[piece(0)], partial[piece(1)], ..., one after the other in fp64.
template <class Piece>
void add_rows(const float* partial, int64_t channels, int64_t count, Piece piece, float* out) {
  std::vector<double> sum(static_cast<size_t>(channels), 0.0);
  for (int64_t i = 0; i < count; ++i) {
    const float* row = partial + piece(i) * channels;
    for (int64_t c = 0; c < channels; ++c) {
      sum[static_cast<size_t>(c)] += static_cast<double>(row[c]);
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = static_cast<float>(sum[static_cast<size_t>(c)]);
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
    parallel_for(count * cut.count, threads, [&](int64_t piece) {
      const int64_t unit = piece / cut.count, i = piece % cut.count;
      const int64_t first = unit % per_sample * tokens;
      body(piece, unit / per_sample, first + cut.begin(i), first + cut.end(i));
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
  void finish(int threads) const {
    if (partial_ == nullptr) {
      return;
    }
    const int64_t per_sample = units_.per_sample * units_.cut.count;
    const int64_t run = per_sample / of_.frames;
    parallel_for(of_.batches * of_.frames, threads, [&](int64_t row) {
      const int64_t first = row / of_.frames * per_sample + row % of_.frames * run;
      add_rows(
          partial_.get(), channels_, pieces_of_row(),
          [&](int64_t i) { return first + i / run * per_sample + i % run; },
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
  parallel_for(pieces.count, threads, [&](int64_t i) {
    Scratch scratch(kQkNormRopeScratch, channels);
    cpu_kernels().qk_norm_rope(p, pieces.begin(i), pieces.end(i), stream, scratch.data());
  });
}

void launch_qk_norm_rope_bwd(const QkNormRopeProblem& p, int threads) {
  const int64_t channels = p.heads * p.head_dim;
  const bool stream = prepare({p.dq, p.dk}, p.batch * p.tokens * channels * size_of(p.type));
  const Pieces pieces(p.batch * p.tokens, channels, kMostPieces);
  const std::unique_ptr<float[]> partial(
      new float[static_cast<size_t>(2 * pieces.count * channels)]);
  float *const partial_q = partial.get(), *const partial_k = partial_q + pieces.count * channels;
  parallel_for(pieces.count, threads, [&](int64_t i) {
    Scratch scratch(kQkNormRopeBwdScratch, channels);
    cpu_kernels().qk_norm_rope_bwd(p, pieces.begin(i), pieces.end(i), stream, scratch.data(),
                                   partial_q + i * channels, partial_k + i * channels);
  });
  const auto in_order = [](int64_t i) { return i; };
  add_rows(partial_q, channels, pieces.count, in_order, p.dweight_q);
  add_rows(partial_k, channels, pieces.count, in_order, p.dweight_k);
}

void launch_adaln(const AdalnProblem& p, int threads) {
  const bool stream = prepare({p.x_out, p.h}, p.batch * p.tokens * p.channels * size_of(p.type));
  Units(p).for_each_piece(threads, [&](int64_t, int64_t sample, int64_t begin, int64_t end) {
    Scratch scratch(kAdalnScratch, p.channels);
    cpu_kernels().adaln(p, sample, begin, end, stream, scratch.data());
  });
}

void launch_adaln_bwd(const AdalnProblem& p, int threads) {
  const bool stream = prepare({p.dx, p.dbranch}, p.batch * p.tokens * p.channels * size_of(p.type));
  const Units units(p);
  const ModulationSum gate(units, p.channels, p.batch, p.gate, p.dgate);
  const ModulationSum scale(units, p.channels, p.batch, p.scale, p.dscale);
  const ModulationSum shift(units, p.channels, p.batch, p.scale, p.dshift);
  units.for_each_piece(threads, [&](int64_t piece, int64_t sample, int64_t begin, int64_t end) {
    Scratch scratch(kAdalnBwdScratch, p.channels);
    cpu_kernels().adaln_bwd(p, sample, begin, end, stream, scratch.data(), gate.at(piece),
                            scale.at(piece), shift.at(piece));
  });
  gate.finish(threads);
  scale.finish(threads);
  shift.finish(threads);
}

}  // namespace afd::cpu
