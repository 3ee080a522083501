// The two passes of nft_loss over a slice: sums, gradient. Compiled once per instruction set.
#include "tiles.h"

namespace afd::AFD_ISA {
namespace {

struct Coefficients {
  Float alpha_dot, sigma_dot, beta, plus, minus, prior;
};

// Sixteen lanes of the six sums, on every instruction set: the order of summation is the same.
using LaneSums = Float[kNftSums][kParts];

AFD_INLINE void add_lanes(const Float (&lanes)[kNftSums][kParts], double* sums) {
  for (int k = 0; k < kNftSums; ++k) {
    float lane[kBlock];
    memcpy(lane, lanes[k], sizeof lane);
    double sum = 0.0;
    for (float x : lane) {
      sum += static_cast<double>(x);
    }
    sums[k] += sum;
  }
}

template <class P, class X>
struct Pointers {
  const P *v_theta, *v_old, *v_ref;
  const X* x0;
  const float* noise;
  P* grad;

  AFD_INLINE void advance() {
    v_theta += kBlock;
    v_old += kBlock;
    v_ref += kBlock;
    x0 += kBlock;
    noise += kBlock;
    grad += kBlock;
  }
};

// A last, partial block, filled up with zeros: they add nothing to the sums.
template <class P, class X>
struct Rest {
  P v_theta[kBlock], v_old[kBlock], v_ref[kBlock], grad[kBlock];
  X x0[kBlock];
  float noise[kBlock];

  AFD_INLINE Pointers<P, X> copy(const Pointers<P, X>& from, int count) {
    memset(static_cast<void*>(this), 0, sizeof *this);
    const size_t n = static_cast<size_t>(count);
    memcpy(v_theta, from.v_theta, n * sizeof(P));
    memcpy(v_old, from.v_old, n * sizeof(P));
    memcpy(v_ref, from.v_ref, n * sizeof(P));
    memcpy(x0, from.x0, n * sizeof(X));
    memcpy(noise, from.noise, n * sizeof(float));
    return {v_theta, v_old, v_ref, x0, noise, grad};
  }
};

// Hardware prefetchers stop at the end of a page, and four to six streams meet one every few tiles.
constexpr size_t kAhead = 1024;

AFD_INLINE void prefetch(const void* p) {
  __builtin_prefetch(static_cast<const char*>(p) + kAhead);
}

// Between the passes the gradient's memory is free: where the noise comes from a seed, the first
// pass leaves the errors there, as many as fit, and the second makes the noise of the others only.
enum class Errors { kComputed, kLeft, kFound };

template <bool kSums, bool kGrad, Errors errors, class P, class X>
AFD_INLINE void block(const Pointers<P, X>& at, float* kept, const Coefficients& c, bool stream,
                      LaneSums& sums) {
  prefetch(at.v_theta);
  prefetch(at.v_old);
  prefetch(at.v_ref);
  if constexpr (errors != Errors::kFound) {
    prefetch(at.x0);
  }
  Float g[kParts];
  for (int k = 0; k < kParts; ++k) {
    const int i = k * kLanes;
    const Float v_old = load(at.v_old + i);
    Float error;
    if constexpr (errors == Errors::kFound) {
      error = load(kept + i);
    } else {
      error = nft_error(v_old, load(at.x0 + i), load(at.noise + i), c.alpha_dot, c.sigma_dot);
    }
    if constexpr (errors == Errors::kLeft) {
      store(kept + i, error);
    }
    const NftElement<Float> x =
        nft_element(load(at.v_theta + i), v_old, load(at.v_ref + i), error, c.beta);
    if constexpr (kSums) {
      Float sum[kNftSums];
      for (int s = 0; s < kNftSums; ++s) {
        sum[s] = sums[s][k];
      }
      add_nft_sums(x, sum);
      for (int s = 0; s < kNftSums; ++s) {
        sums[s][k] = sum[s];
      }
    }
    if constexpr (kGrad) {
      g[k] = nft_gradient(x, c.plus, c.minus, c.prior);
    }
  }
  if constexpr (kGrad) {
    store_block(at.grad, g, stream);
  }
}

template <bool kSums, bool kGrad, Errors errors, class P, class X>
void slice(const NftProblem& p, int64_t sample, int64_t begin, int64_t end,
           const NftCoefficients* of_frame, double* frame_sums) {
  constexpr bool kKeeps = errors != Errors::kComputed;
  NoiseSource<X> source(p.rows, sample, p.seed, p.noise, p.noise_type);
  const int64_t base = element_offset(p.rows, sample, 0);
  const P* v_theta = static_cast<const P*>(p.v_theta) + base;
  const P* v_old = static_cast<const P*>(p.v_old) + base;
  // Without a prior v_theta stands in: the difference is then zero, and the read costs nothing.
  const P* v_ref = p.v_ref == nullptr ? v_theta : static_cast<const P*>(p.v_ref) + base;
  const X* x0 = static_cast<const X*>(p.x0) + base;
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
      const int n = source.length(position, run_end - position);
      // The first whole blocks, as many as have room for their errors in the tile's gradient.
      const int keeps = kKeeps ? n / static_cast<int>(kBlock * 4 / sizeof(P)) * kBlock : 0;
      Pointers<P, X> at = {v_theta + position, v_old + position, v_ref + position,
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
        for (; done < keeps; done += kBlock) {
          block<kSums, kGrad, errors>(at, kept + done, c, past, sums);
          at.advance();
        }
      }
      if (done < n) {
        at.noise = source.tile(position + done, n - done);
      }
      if constexpr (errors == Errors::kLeft) {
        for (; done < keeps; done += kBlock) {
          block<kSums, kGrad, errors>(at, kept + done, c, false, sums);
          at.advance();
        }
      }
      Rest<P, X> rest;
      for (int left = n - done; left > 0; left -= kBlock) {
        P* const out = at.grad;
        if (left < kBlock) {
          at = rest.copy(at, left);
          stream = false;
        }
        block<kSums, kGrad, Errors::kComputed>(at, nullptr, c, stream, sums);
        if (kGrad && left < kBlock) {
          memcpy(static_cast<void*>(out), at.grad, static_cast<size_t>(left) * sizeof(P));
        }
        at.advance();
      }
      position += n;
    }
    if constexpr (kSums) {
      add_lanes(sums, frame_sums + frame * kNftSums);
    }
  });
}

template <bool kSums, bool kGrad, Errors errors>
void dispatch(const NftProblem& p, int64_t sample, int64_t begin, int64_t end,
              const NftCoefficients* of_frame, double* sums) {
  with_type(p.prediction_type, [&](auto v) {
    with_type(p.x0_type, [&](auto x) {
      slice<kSums, kGrad, errors, decltype(v), decltype(x)>(p, sample, begin, end, of_frame, sums);
    });
  });
}

}  // namespace

void nft_sums(const NftProblem& p, int64_t sample, int64_t begin, int64_t end,
              const NftCoefficients* of_frame, double* sums) {
  if (p.grad != nullptr && p.velocity_weighting) {
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
