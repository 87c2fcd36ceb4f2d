// SPDX-License-Identifier: Apache-2.0
// y = x W^T + bias for one packed matrix.
#include <algorithm>
#include <vector>

#include "drive.h"
#include "parallel.h"

namespace mcmoe {

namespace {
constexpr int TOKENS = 96;  // that stay in the second-level cache while a thread's rows pass
}

void linear(const Matrix& m, int rows, bool int8, const void* x, int dtype, int tokens, const float* bias, void* y,
            int threads) {
  const int groups = m.groups(), padded = groups * m.group, blocks = (rows + ROWS - 1) / ROWS;
  thread_local Buffer memory;
  thread_local std::vector<Tile> tiles;
  tiles.clear();
  size_t words = 0;
  for (int t = 0; t < tokens; t += tiles.back().count) {
    tiles.emplace_back(Tile::choose(int8, dtype, tokens - t, {&m}), m);
    words += tiles.back().words();
  }
  float* at = memory.get<float>(words);
  for (Tile& tile : tiles) {
    tile = Tile(tile, m, at);
    at += tile.words();
  }
  const int num_tiles = static_cast<int>(tiles.size());
  const Tile* tile = tiles.data();
  std::vector<int> start(num_tiles + 1, 0);
  for (int i = 0; i < num_tiles; i++) start[i + 1] = start[i] + tile[i].count;

  auto prepare = [&](int i) {
    thread_local Buffer row_memory;
    float* row = row_memory.get<float>(padded);
    std::fill(row + m.columns, row + padded, 0.f);
    for (int t = 0; t < tile[i].count; t++) {
      read_row(x, dtype, static_cast<size_t>(start[i] + t) * m.columns, m.columns, row);
      for (int g = 0; g < groups; g++) tile[i].fill(g, t, row + g * m.group);
    }
  };
  const bool small = tokens <= 4;  // a barrier takes longer than preparing them here
  if (small)
    for (int i = 0; i < num_tiles; i++) prepare(i);
  const double work = static_cast<double>(blocks) * m.block() * (1 + tokens / 8.0);
  threads = work < 1e5 ? 1 : std::min(threads, blocks);
  // blocks that a thread takes at a time: few enough for the second-level cache, beside the tokens that meet them, and
  // some for every thread; more of them where many tokens are read again for each chunk
  const int bytes = tokens > TOKENS ? 512 << 10 : 64 << 10;
  const int chunk = std::max(1, std::min<int>(static_cast<int>(bytes / m.block()), blocks / (4 * threads)));
  const int chunks = (blocks + chunk - 1) / chunk;

  Team::run(threads, [&](Team& team) {
    if (!small) {
      for (int i; (i = team.next(num_tiles)) < num_tiles;) prepare(i);
      team.barrier();
    }
    float out[TILES[NUM_TILES - 1] * ROWS];
    for (int c; (c = team.next(chunks)) < chunks;)
      for (int first = 0; first < num_tiles;) {
        int last = first;
        while (last < num_tiles && start[last + 1] - start[first] <= TOKENS) last++;
        last = std::max(last, first + 1);
        for (int b = c * chunk; b < std::min(blocks, (c + 1) * chunk); b++) {
          const int row = b * ROWS, n = std::min(ROWS, rows - row);
          for (int i = first; i < last; i++) {
            tile[i].multiply(m, m.blocks + b * m.block(), out);
            for (int t = 0; t < tile[i].count; t++) {
              float* values = out + ROWS * t;
              if (bias)
                for (int r = 0; r < n; r++) values[r] += bias[row + r];
              write_row(values, n, dtype, y, static_cast<size_t>(start[i] + t) * rows + row);
            }
          }
        }
        first = last;
      }
  });
}

}  // namespace mcmoe
