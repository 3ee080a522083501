// Sums in a fixed order, so that two runs, any number of threads and any grid agree bit by bit.
#pragma once

#include "afd/macros.h"

namespace afd {

// The six sums nft_loss needs of a frame, see nft_math.h.
constexpr int kNftSums = 6;
// The columns of its metrics: loss_pos, loss_neg, prior, w_pos, w_neg, old and ref deviation.
constexpr int kNftMetrics = 7;

// sum[k] = partial[0][k] + partial[1][k] + ..., one after the other in fp64.
template <class T>
AFD_HD void add_in_order(const T* partial, long long count, long long stride, double* sum) {
  for (long long i = 0; i < count; ++i) {
    for (int k = 0; k < kNftSums; ++k) {
      sum[k] += static_cast<double>(partial[i * stride + k]);
    }
  }
}

}  // namespace afd
