// Rows of any supported type as fp32. A scratch row is as long as the row rounded up to whole
// blocks, with zeros at its end, so that loops over it know no tails.
#pragma once

#include "convert.h"

namespace afd::AFD_ISA {

AFD_INLINE int64_t padded(int64_t count) { return (count + kBlock - 1) / kBlock * kBlock; }

// The row itself where it is fp32 and knows no tail, else a copy in `scratch`.
template <class T>
AFD_INLINE const float* widened(const T* in, int64_t count, float* scratch) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (count % kBlock == 0) {
      return in;
    }
  }
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(scratch + i, load(in + i));
  }
  if (i < count) {
    T rest[kLanes] = {};
    memcpy(rest, in + i, static_cast<size_t>(count - i) * sizeof(T));
    store(scratch + i, load(rest));
    i += kLanes;
  }
  for (; i < padded(count); i += kLanes) {
    store(scratch + i, Float(0.0f));
  }
  return scratch;
}

AFD_INLINE const float* widened(DType type, const void* data, int64_t offset, int64_t count,
                                float* scratch) {
  const float* row = nullptr;
  with_type(type, [&](auto x) {
    row = widened(static_cast<const decltype(x)*>(data) + offset, count, scratch);
  });
  return row;
}

// out[i] = value(i) for whole vectors i, i + 1, ...; the values beyond the end are dropped.
template <class T, class Value>
AFD_INLINE void write_row(T* out, int64_t count, bool stream, Value value) {
  int64_t i = 0;
  Float y[kParts];
  for (; i + kBlock <= count; i += kBlock) {
    for (int k = 0; k < kParts; ++k) {
      y[k] = value(i + k * kLanes);
    }
    store_block(out + i, y, stream);
  }
  if (i < count) {
    for (int k = 0; k < kParts; ++k) {
      y[k] = value(i + k * kLanes);
    }
    T rest[kBlock];
    store_block(rest, y, false);
    memcpy(out + i, rest, static_cast<size_t>(count - i) * sizeof(T));
  }
}

// A sum over sixteen lanes, on every instruction set: the order of summation is the same.
struct RowSum {
  Float lanes[kParts];

  AFD_INLINE RowSum() {
    for (Float& lane : lanes) {
      lane = Float(0.0f);
    }
  }
  AFD_INLINE void add(int part, Float x) { lanes[part] = lanes[part] + x; }
  AFD_INLINE double total() const {
    float lane[kBlock];
    memcpy(lane, lanes, sizeof lane);
    for (int half = kBlock / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) {
        lane[i] += lane[i + half];
      }
    }
    return static_cast<double>(lane[0]);
  }
};

// Calls body(i, part) for the vectors of a padded row.
template <class Body>
AFD_INLINE void for_vectors(int64_t count, Body body) {
  for (int64_t i = 0; i < count; i += kBlock) {
    for (int part = 0; part < kParts; ++part) {
      body(i + part * kLanes, part);
    }
  }
}

AFD_INLINE float factor_of_row(double sum_of_squares, int64_t count, double eps) {
  return power_of_row(sum_of_squares / static_cast<double>(count) + eps);
}

// to = x * factor, a padded row; `to` may be x.
AFD_INLINE void multiply_row(const float* x, float factor, int64_t count, float* to) {
  for_vectors(count, [&](int64_t i, int) { store(to + i, load(x + i) * Float(factor)); });
}

}  // namespace afd::AFD_ISA
