// SPDX-License-Identifier: Apache-2.0
// Cuts a batch of groups into blocks of rows, which threads take; a block lies in a core's cache while it is rounded.
#include "rounding.h"

#include <algorithm>
#include <vector>

#include "drive.h"
#include "parallel.h"

namespace mcmoe {
namespace {

// Multiplications that are worth a thread: waking one takes some microseconds.
constexpr double WORK = 1 << 21;

// Calls f(member of the batch, first row, rows, blocks of floats) for every block of rows.
template <class F>
void each_block(const Columns& c, int threads, F f) {
  const int blocks = (c.rows + COLUMN_LANES - 1) / COLUMN_LANES;
  const double work = static_cast<double>(c.batch) * c.rows * c.columns * c.columns / 2;
  const int useful = static_cast<int>(std::min(work / WORK, static_cast<double>(c.batch * blocks)));
  Team::run(std::max(1, std::min(threads, useful)), [&](Team& team) {
    std::vector<float> memory(2 * static_cast<size_t>(c.columns) * COLUMN_LANES);
    for (int n; (n = team.next(c.batch * blocks)) < c.batch * blocks;) {
      const int first = n % blocks * COLUMN_LANES;
      f(n / blocks, first, std::min(COLUMN_LANES, c.rows - first), memory.data());
    }
  });
}

// Rows of a group to and from a block [columns][COLUMN_LANES]; lanes without a row are zeros.
struct Part {
  Part(const Columns& c, int member, int first, int rows)
      : start(static_cast<size_t>(member) * c.columns * c.rows + first), columns(c.columns), pitch(c.rows), rows(rows) {}

  void load(const float* from, float* block) const {
    for (int k = 0; k < columns; k++, block += COLUMN_LANES) {
      std::copy_n(from + start + static_cast<size_t>(k) * pitch, rows, block);
      std::fill(block + rows, block + COLUMN_LANES, 0.f);
    }
  }
  void store(const float* block, float* to) const {
    for (int k = 0; k < columns; k++, block += COLUMN_LANES)
      std::copy_n(block, rows, to + start + static_cast<size_t>(k) * pitch);
  }

  size_t start;
  int columns, pitch, rows;
};

}  // namespace

void grid_errors(const Columns& c, const float* values, const float* inverse, const float* zero, int candidates,
                 float* errors, int threads) {
  // rows of one candidate lie apart from those of the next by all rows of the batch
  const size_t apart = static_cast<size_t>(c.batch) * c.rows;
  each_block(c, threads, [&](int member, int first, int rows, float* block) {
    Part(c, member, first, rows).load(values, block);
    std::vector<float> memory(3 * static_cast<size_t>(candidates) * COLUMN_LANES, 0.f);
    float *own_inverse = memory.data(), *own_zero = own_inverse + candidates * COLUMN_LANES,
          *own_errors = own_zero + candidates * COLUMN_LANES;
    const size_t start = static_cast<size_t>(member) * c.rows + first;
    for (int n = 0; n < candidates; n++) {
      std::copy_n(inverse + n * apart + start, rows, own_inverse + n * COLUMN_LANES);
      std::copy_n(zero + n * apart + start, rows, own_zero + n * COLUMN_LANES);
    }
    kernels().grid_errors(block, own_inverse, own_zero, c.columns, candidates, c.bits, own_errors);
    for (int n = 0; n < candidates; n++)
      std::copy_n(own_errors + n * COLUMN_LANES, rows, errors + n * apart + start);
  });
}

void round_columns(const Columns& c, const float* values, const float* feedback, const float* diagonal, float* codes,
                   float* errors, float* loss, int threads) {
  const size_t size = static_cast<size_t>(c.columns) * c.columns;
  each_block(c, threads, [&](int member, int first, int rows, float* block) {
    const Part part(c, member, first, rows);
    float *own_errors = block + static_cast<size_t>(c.columns) * COLUMN_LANES, own_loss[COLUMN_LANES];
    part.load(values, block);
    kernels().round_columns(block, own_errors, feedback + member * size, diagonal + member * c.columns, c.columns,
                            c.bits, own_loss);
    part.store(block, codes);
    part.store(own_errors, errors);
    std::copy_n(own_loss, rows, loss + static_cast<size_t>(member) * c.rows + first);
  });
}

void descend_columns(const Columns& c, const float* metric, float* codes, float* gradients, int sweeps, int threads) {
  const size_t size = static_cast<size_t>(c.columns) * c.columns;
  each_block(c, threads, [&](int member, int first, int rows, float* block) {
    const Part part(c, member, first, rows);
    float* own_gradients = block + static_cast<size_t>(c.columns) * COLUMN_LANES;
    part.load(codes, block);
    part.load(gradients, own_gradients);
    kernels().descend_columns(block, own_gradients, metric + member * size, c.columns, c.bits, sweeps);
    part.store(block, codes);
    part.store(own_gradients, gradients);
  });
}

}  // namespace mcmoe
