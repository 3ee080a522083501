// The two passes of nft_loss over a slice: sums, gradient. Compiled once per instruction set.
#include <type_traits>

#include "lines.h"
#include "tiles.h"

namespace afd::AFD_ISA {
namespace {

struct Coefficients {
  Float alpha_dot, sigma_dot, beta, plus, minus, prior;
};

// Sixteen lanes of the six sums, on every instruction set: the order of summation is the same.
using LaneSums = Float[kNftSums][kParts];

template <class P>
AFD_INLINE void add_lanes(const LaneSums& lanes, double* sums) {
  for (int k = 0; k < kNftSums; ++k) {
    float lane[kBlock];
    memcpy(lane, lanes[k], sizeof lane);
    double sum = 0.0;
    for (int i = 0; i < kBlock; ++i) {
      sum += static_cast<double>(lane[place_in_block<P>(i)]);
    }
    sums[k] += sum;
  }
}

template <class P, class X, class N>
struct Pointers {
  const P *v_theta, *v_old, *v_ref;
  const X* x0;
  const N* noise;
  P* grad;

  AFD_INLINE void advance() {
    v_theta += kLine<P>;
    v_old += kLine<P>;
    v_ref += kLine<P>;
    x0 += kLine<P>;
    noise += kLine<P>;
    grad += kLine<P>;
  }
};

// A last, partial line, filled up with zeros: they add nothing to the sums.
template <class P, class X, class N>
struct Rest {
  P v_theta[kLine<P>], v_old[kLine<P>], v_ref[kLine<P>], grad[kLine<P>];
  X x0[kLine<P>];
  N noise[kLine<P>];

  AFD_INLINE Pointers<P, X, N> copy(const Pointers<P, X, N>& from, int count) {
    memset(static_cast<void*>(this), 0, sizeof *this);
    const size_t n = static_cast<size_t>(count);
    memcpy(v_theta, from.v_theta, n * sizeof(P));
    memcpy(v_old, from.v_old, n * sizeof(P));
    memcpy(v_ref, from.v_ref, n * sizeof(P));
    memcpy(x0, from.x0, n * sizeof(X));
    memcpy(noise, from.noise, n * sizeof(N));
    return {v_theta, v_old, v_ref, x0, noise, grad};
  }
};

// Hardware prefetchers stop at the end of a page, and four to six streams meet one every few tiles.
// Further ahead than this is slower again: lines then arrive long before they are used.
constexpr size_t kAhead = 384;

// The part of an operand that lies beside a line of P.
template <class P, class T>
AFD_INLINE void prefetch(const T* p) {
  for (size_t i = 0; i < kLine<P> * sizeof(T); i += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead + i);
  }
}

// Between the passes the gradient's memory is free: where the noise comes from a seed, the first
// pass leaves the errors there, as many as fit, and the second makes the noise of the others only.
enum class Errors { kComputed, kLeft, kFound };

template <bool kSums, bool kGrad, Errors errors, class P, class X, class N>
AFD_INLINE void line(const Pointers<P, X, N>& at, float* kept, const Coefficients& c, bool stream,
                     LaneSums& sums) {
  prefetch<P>(at.v_theta);
  prefetch<P>(at.v_old);
  prefetch<P>(at.v_ref);
  if constexpr (errors != Errors::kFound) {
    prefetch<P>(at.x0);
    prefetch<P>(at.noise);
  }
  Float g[kLineParts<P>];
  for (int k = 0; k < kLineParts<P>; ++k) {
    const Float v_old = load_part<P>(at.v_old, k);
    Float error;
    if constexpr (errors == Errors::kFound) {
      error = load(kept + k * kLanes);
    } else {
      error = nft_error(v_old, load_part<P>(at.x0, k), load_part<P>(at.noise, k), c.alpha_dot,
                        c.sigma_dot);
    }
    if constexpr (errors == Errors::kLeft) {
      store(kept + k * kLanes, error);
    }
    const NftElement<Float> x =
        nft_element(load_part<P>(at.v_theta, k), v_old, load_part<P>(at.v_ref, k), error, c.beta);
    if constexpr (kSums) {
      Float sum[kNftSums];
      for (int s = 0; s < kNftSums; ++s) {
        sum[s] = sums[s][k % kParts];
      }
      add_nft_sums(x, sum);
      for (int s = 0; s < kNftSums; ++s) {
        sums[s][k % kParts] = sum[s];
      }
    }
    if constexpr (kGrad) {
      g[k] = nft_gradient(x, c.plus, c.minus, c.prior);
    }
  }
  if constexpr (kGrad) {
    store_line(at.grad, g, stream);
  }
}

template <bool kSums, bool kGrad, Errors errors, class P, class X, class N>
void slice(const NftProblem& p, int64_t sample, int64_t begin, int64_t end,
           const NftCoefficients* of_frame, double* frame_sums) {
  constexpr bool kKeeps = errors != Errors::kComputed;
  NoiseSource<float> source(p.rows, sample, p.seed, p.noise, p.noise_type);
  const int64_t base = element_offset(p.rows, sample, 0);
  const P* v_theta = static_cast<const P*>(p.v_theta) + base;
  const P* v_old = static_cast<const P*>(p.v_old) + base;
  // Without a prior v_theta is read twice: the difference is then zero, at no cost.
  const P* v_ref = p.v_ref == nullptr ? v_theta : static_cast<const P*>(p.v_ref) + base;
  const X* x0 = static_cast<const X*>(p.x0) + base;
  // Half-precision noise is widened where it is used; the rest comes through the source.
  [[maybe_unused]] const N* noise =
      p.noise == nullptr ? nullptr : static_cast<const N*>(p.noise) + base;
  P* grad = static_cast<P*>(p.grad) + (kGrad || kKeeps ? base : 0);
  for_each_run(p.rows, begin, end, [&](int64_t frame, int64_t position, int64_t count) {
    if (!frame_counts(p, sample, frame)) {
      if constexpr (kGrad) {
        memset(static_cast<void*>(grad + position), 0, static_cast<size_t>(count) * sizeof(P));
      }
      return;
    }
    const NftCoefficients& f = of_frame[frame];
    const Coefficients c = {
        Float(f.alpha_dot), Float(f.sigma_dot), Float(static_cast<float>(p.nft_beta)),
        Float(f.plus),      Float(f.minus),     Float(f.prior)};
    LaneSums sums;
    for (auto& lanes : sums) {
      for (Float& lane : lanes) {
        lane = Float(0.0f);
      }
    }
    const int64_t run_end = position + count;
    while (position < run_end) {
      // Noise that is given needs no buffer: tiles matter to it up to the first whole one only.
      const bool whole = p.noise != nullptr && position % kTile == 0;
      const int n = whole ? static_cast<int>(run_end - position)
                          : source.length(position, run_end - position);
      // The first whole lines, as many as have room for their errors in the tile's gradient.
      const int keeps = kKeeps ? n / static_cast<int>(kLine<P> * 4 / sizeof(P)) * kLine<P> : 0;
      Pointers<P, X, N> at = {v_theta + position, v_old + position, v_ref + position,
                              x0 + position,      nullptr,          grad + position};
      bool stream = kGrad && can_stream(at.grad);
      float* kept = reinterpret_cast<float*>(at.grad);
      int done = 0;
      if constexpr (errors == Errors::kFound) {
        float copy[kTile];
        if (sizeof(P) < sizeof(float)) {
          memcpy(copy, kept, static_cast<size_t>(keeps) * sizeof(float));
          kept = copy;
        }
        // A line that was just read is in the cache already.
        const bool past = stream && sizeof(P) < sizeof(float);
        for (; done < keeps; done += kLine<P>) {
          line<kSums, kGrad, errors>(at, kept + done, c, past, sums);
          at.advance();
        }
      }
      if (done < n) {
        if constexpr (std::is_same_v<N, float>) {
          at.noise = source.tile(position + done, n - done);
        } else {
          at.noise = noise + position + done;
        }
      }
      if constexpr (errors == Errors::kLeft) {
        for (; done < keeps; done += kLine<P>) {
          line<kSums, kGrad, errors>(at, kept + done, c, false, sums);
          at.advance();
        }
      }
      Rest<P, X, N> rest;
      for (int left = n - done; left > 0; left -= kLine<P>) {
        P* const out = at.grad;
        if (left < kLine<P>) {
          at = rest.copy(at, left);
          stream = false;
        }
        line<kSums, kGrad, Errors::kComputed>(at, nullptr, c, stream, sums);
        if (kGrad && left < kLine<P>) {
          memcpy(static_cast<void*>(out), at.grad, static_cast<size_t>(left) * sizeof(P));
        }
        at.advance();
      }
      position += n;
    }
    if constexpr (kSums) {
      add_lanes<P>(sums, frame_sums + frame * kNftSums);
    }
  });
}

template <bool kSums, bool kGrad, Errors errors>
void dispatch(const NftProblem& p, int64_t sample, int64_t begin, int64_t end,
              const NftCoefficients* of_frame, double* sums) {
  with_type(p.prediction_type, [&](auto v) {
    with_type(p.x0_type, [&](auto x) {
      using P = decltype(v);
      using X = decltype(x);
      if constexpr (errors == Errors::kComputed) {
        if (p.noise != nullptr && p.noise_type != DType::kFloat32) {
          slice<kSums, kGrad, errors, P, X, X>(p, sample, begin, end, of_frame, sums);
          return;
        }
      }
      slice<kSums, kGrad, errors, P, X, float>(p, sample, begin, end, of_frame, sums);
    });
  });
}

}  // namespace

void nft_sums(const NftProblem& p, int64_t sample, int64_t begin, int64_t end,
              const NftCoefficients* of_frame, double* sums) {
  if (p.grad != nullptr && !p.adaptive) {
    dispatch<true, true, Errors::kComputed>(p, sample, begin, end, of_frame, sums);
  } else if (p.grad != nullptr && p.noise == nullptr) {
    dispatch<true, false, Errors::kLeft>(p, sample, begin, end, of_frame, sums);
  } else {
    dispatch<true, false, Errors::kComputed>(p, sample, begin, end, of_frame, sums);
  }
}

void nft_gradient(const NftProblem& p, int64_t sample, int64_t begin, int64_t end,
                  const NftCoefficients* of_frame) {
  if (p.noise == nullptr) {
    dispatch<false, true, Errors::kFound>(p, sample, begin, end, of_frame, nullptr);
  } else {
    dispatch<false, true, Errors::kComputed>(p, sample, begin, end, of_frame, nullptr);
  }
}

}  // namespace afd::AFD_ISA
