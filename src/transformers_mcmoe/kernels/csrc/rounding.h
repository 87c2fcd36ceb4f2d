// SPDX-License-Identifier: Apache-2.0
// Columns of a group rounded under its Hessian; what it means is in quantization/gptq.py and quantization/descent.py.
#pragma once

namespace mcmoe {

// A batch of groups [batch, columns, rows] in units of codes; matrices [batch, columns, columns].
struct Columns {
  int batch, columns, rows;
  int bits;
};

// Rounds values with feedback: column k to the code nearest to values[k] + sum_{j<k} errors[j] * feedback[k][j].
// codes and errors [batch, columns, rows]; loss [batch, rows] = sum of diagonal[k] * (what was rounded - code)^2.
void round_columns(const Columns& c, const float* values, const float* feedback, const float* diagonal, float* codes,
                   float* errors, float* loss, int threads);

// Coordinate descent: each code in turn takes the value that is best given all others, `sweeps` times.
// codes and gradients [batch, columns, rows] are changed in place; gradients are metric * errors, in units of codes.
void descend_columns(const Columns& c, const float* metric, float* codes, float* gradients, int sweeps, int threads);

}  // namespace mcmoe
