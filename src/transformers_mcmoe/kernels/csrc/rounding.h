// SPDX-License-Identifier: Apache-2.0
// Columns of a group rounded under its Hessian; what it means is in quantization/columns.py.
#pragma once

namespace mcmoe {

// A batch of groups [batch, columns, rows] in units of codes; matrices [batch, columns, columns].
struct Columns {
  int batch, columns, rows;
  int bits;
};

// Squared distances of weights values [batch, columns, rows] from the points of candidate grids, in units of codes:
// values * inverse + zero to the nearest code. inverse, zero and errors [candidates, batch, rows].
void grid_errors(const Columns& c, const float* values, const float* inverse, const float* zero, int candidates,
                 float* errors, int threads);

// Rounds values with feedback: column k to the code nearest to values[k] + sum_{j<k} errors[j] * feedback[k][j].
// codes and errors [batch, columns, rows]; loss [batch, rows] = sum of diagonal[k] * (what was rounded - code)^2.
void round_columns(const Columns& c, const float* values, const float* feedback, const float* diagonal, float* codes,
                   float* errors, float* loss, int threads);

// Coordinate descent: each code in turn takes the value that is best given all others, `sweeps` times.
// codes and gradients [batch, columns, rows] are changed in place; gradients are metric * errors, in units of codes.
void descend_columns(const Columns& c, const float* metric, float* codes, float* gradients, int sweeps, int threads);

}  // namespace mcmoe
