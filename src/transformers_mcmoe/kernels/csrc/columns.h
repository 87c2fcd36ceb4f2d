// SPDX-License-Identifier: Apache-2.0
// The column kernels of rounding.h, in plain loops over lanes that the compiler turns into an instruction set's vectors.
// Included by the isa_*.cpp files, each of which gets its own copy.
#pragma once
#include "kernels.h"

namespace mcmoe {
namespace {

// The nearest code, ties to even: adding and subtracting 1.5 * 2^23 rounds. At 1 bit the middle goes up.
inline float nearest_code(float value, float top, bool binary) {
  const float magic = 12582912.f;
  if (binary) return value >= 0.5f ? 1.f : 0.f;
  value = value < 0.f ? 0.f : value > top ? top : value;
  return (value + magic) - magic;
}

inline void round_columns_of(float* codes, float* errors, const float* feedback, const float* diagonal, int columns,
                             int bits, float* loss) {
  constexpr int N = COLUMN_LANES;
  const float top = static_cast<float>((1 << bits) - 1);
  for (int r = 0; r < N; r++) loss[r] = 0.f;
  for (int k = 0; k < columns; k++) {
    float value[N];
    float *own = codes + k * N, *error = errors + k * N;
    for (int r = 0; r < N; r++) value[r] = own[r];
    const float* row = feedback + static_cast<long>(k) * columns;
    for (int j = 0; j < k; j++) {
      const float factor = row[j], *before = errors + j * N;
      for (int r = 0; r < N; r++) value[r] += factor * before[r];
    }
    for (int r = 0; r < N; r++) {
      const float code = nearest_code(value[r], top, bits == 1), residual = value[r] - code;
      loss[r] += diagonal[k] * residual * residual;
      error[r] = own[r] - code;
      own[r] = code;
    }
  }
}

inline void descend_columns_of(float* codes, float* gradients, const float* metric, int columns, int bits, int sweeps) {
  constexpr int N = COLUMN_LANES;
  const float top = static_cast<float>((1 << bits) - 1);
  for (int sweep = 0; sweep < sweeps; sweep++) {
    bool moved = false;
    for (int k = 0; k < columns; k++) {
      const float* row = metric + static_cast<long>(k) * columns;
      const float inverse = row[k] > 0.f ? 1.f / row[k] : 0.f;
      float step[N], *own = codes + k * N, *gradient = gradients + k * N;
      int changed = 0;
      for (int r = 0; r < N; r++) {
        const float code = nearest_code(own[r] + gradient[r] * inverse, top, bits == 1);
        step[r] = code - own[r];
        own[r] = code;
        changed |= step[r] != 0.f;
      }
      if (!changed) continue;
      moved = true;
      for (int j = 0; j < columns; j++) {
        const float factor = row[j];
        float* other = gradients + j * N;
        for (int r = 0; r < N; r++) other[r] -= factor * step[r];
      }
    }
    if (!moved) return;
  }
}

// Squared distances of weights from the points of candidate grids, in units of codes: values[k] * inverse + zero to the
// nearest of 0 .. 2^bits - 1. inverse, zero and errors [candidates][COLUMN_LANES].
inline void grid_errors_of(const float* values, const float* inverse, const float* zero, int columns, int candidates,
                           int bits, float* errors) {
  constexpr int N = COLUMN_LANES;
  const float top = static_cast<float>((1 << bits) - 1);
  for (int c = 0; c < candidates; c++) {
    float error[N];
    const float *factor = inverse + c * N, *shift = zero + c * N;
    for (int r = 0; r < N; r++) error[r] = 0.f;
    for (int k = 0; k < columns; k++) {
      const float* own = values + k * N;
      for (int r = 0; r < N; r++) {
        const float value = own[r] * factor[r] + shift[r], distance = value - nearest_code(value, top, false);
        error[r] += distance * distance;
      }
    }
    for (int r = 0; r < N; r++) errors[c * N + r] = error[r];
  }
}

}  // namespace
}  // namespace mcmoe
