// SPDX-License-Identifier: Apache-2.0
// A whole MoE layer: out[t] = sum_k weight[t, k] * down(act(gate(x_t)) * up(x_t)) of the experts that t is routed to.
//
// One parallel region: tiles of tokens per expert are prepared; items (expert, group of inner columns) compute the inner
// activations and prepare them at once for the down projection; items (output rows) sum over all experts. Every number
// is computed by one thread in a fixed order, so results do not depend on the number of threads.
#include "moe.h"

#include <math.h>

#include <algorithm>
#include <vector>

#include "drive.h"
#include "parallel.h"

namespace mcmoe {
namespace {

constexpr int BLOCK = 1024;  // tokens at a time: bounds the memory for activations

struct ExpertTile {
  int expert, first;   // first: its first slot in the sorted order
  Tile x, h;           // prepared inputs of gate_up and of down
};

float activate(float v, int activation) {
  switch (activation) {
    case SILU: return v / (1.f + expf(-v));
    case GELU: return 0.5f * v * (1.f + erff(v * 0.70710678f));
    case GELU_TANH: return 0.5f * v * (1.f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    case RELU: return v > 0 ? v : 0.f;
    default: return v > 0 ? v * v : 0.f;  // RELU2
  }
}

class Layer {
 public:
  Layer(const Expert* experts, int num_experts, const MoeShape& shape, bool int8, int dtype)
      : experts_(experts), num_experts_(num_experts), shape_(shape), int8_(int8), dtype_(dtype) {}

  void run(const void* x, size_t first, int tokens, const int64_t* index, const float* weights, void* out,
           int threads);

 private:
  void sort(int tokens, const int64_t* index, const float* weights);
  void make_tiles(Buffer& memory);
  void prepare(const ExpertTile& tile, const void* x, size_t first) const;
  void inner(int expert, int group, float* out, float* h) const;
  void outer(int first_block, int blocks, int tokens, float* sums, float* y) const;
  double work() const;

  const Expert* experts_;
  const int num_experts_;
  const MoeShape shape_;
  const bool int8_;
  const int dtype_;
  std::vector<int> start_;          // [E + 1], slots of an expert
  std::vector<int> token_;          // [slots], sorted by expert, then token
  std::vector<float> weight_;       // [slots]
  std::vector<ExpertTile> tiles_;
  std::vector<int> first_tile_;     // [E + 1]
  std::vector<int> items_;          // [E + 1], items of the first phase before each expert
};

void Layer::sort(int tokens, const int64_t* index, const float* weights) {
  const int slots = tokens * shape_.top_k;
  auto runs = [&](int64_t e) { return e >= 0 && e < num_experts_ && experts_[e].gate_up.blocks; };
  start_.assign(num_experts_ + 1, 0);
  for (int s = 0; s < slots; s++)
    if (runs(index[s])) start_[index[s] + 1]++;
  for (int e = 0; e < num_experts_; e++) start_[e + 1] += start_[e];
  token_.resize(start_[num_experts_]);
  weight_.resize(start_[num_experts_]);
  std::vector<int> next(start_.begin(), start_.end() - 1);
  for (int s = 0; s < slots; s++)
    if (runs(index[s])) {
      const int at = next[index[s]]++;
      token_[at] = s / shape_.top_k;
      weight_[at] = weights[s];
    }
}

void Layer::make_tiles(Buffer& memory) {
  first_tile_.assign(num_experts_ + 1, 0);
  items_.assign(num_experts_ + 1, 0);
  size_t words = 0;
  for (int e = 0; e < num_experts_; e++) {
    const Expert& expert = experts_[e];
    for (int s = start_[e]; s < start_[e + 1];) {
      const Tile shape = Tile::choose(int8_, dtype_, start_[e + 1] - s, expert.gate_up, expert.down);
      tiles_.push_back({e, s, Tile(shape, expert.gate_up), Tile(shape, expert.down)});
      words += tiles_.back().x.words() + tiles_.back().h.words();
      s += shape.count;
    }
    first_tile_[e + 1] = static_cast<int>(tiles_.size());
    items_[e + 1] = items_[e] + (start_[e] < start_[e + 1] ? expert.down.groups() : 0);
  }
  float* at = memory.get<float>(words);
  for (ExpertTile& tile : tiles_) {
    tile.x = Tile(tile.x, experts_[tile.expert].gate_up, at);
    at += tile.x.words();
    tile.h = Tile(tile.h, experts_[tile.expert].down, at);
    at += tile.h.words();
  }
}

void Layer::prepare(const ExpertTile& tile, const void* x, size_t first) const {
  const Matrix& m = experts_[tile.expert].gate_up;
  const int padded = m.groups() * m.group;
  thread_local Buffer memory;
  float* row = memory.get<float>(padded);
  std::fill(row + shape_.hidden, row + padded, 0.f);
  for (int t = 0; t < tile.x.count; t++) {
    read_row(x, dtype_, (first + token_[tile.first + t]) * shape_.hidden, shape_.hidden, row);
    for (int g = 0; g < m.groups(); g++) tile.x.fill(g, t, row + g * m.group);
  }
}

// One group of the inner activations of all tokens of an expert.
void Layer::inner(int expert, int group, float* out, float* h) const {
  const Matrix &up = experts_[expert].gate_up, &down = experts_[expert].down;
  const int rows = shape_.gated ? ROWS / 2 : ROWS;  // inner columns that a block gives
  const int blocks = (shape_.inner + rows - 1) / rows, first = group * down.group / rows;
  const int last = std::min(blocks, first + down.group / rows);
  for (int i = first_tile_[expert]; i < first_tile_[expert + 1]; i++) {
    const ExpertTile& tile = tiles_[i];
    for (int b = first; b < last; b++) {
      tile.x.multiply(up, up.blocks + b * up.block(), out);
      for (int t = 0; t < tile.x.count; t++) {
        const float* y = out + ROWS * t;
        float* to = h + static_cast<size_t>(t) * down.group + (b - first) * rows;
        for (int r = 0; r < rows; r++)
          to[r] = activate(y[r], shape_.activation) * (shape_.gated ? y[r + rows] : 1.f);
      }
    }
    const int done = (last - first) * rows;
    for (int t = 0; t < tile.x.count; t++) {
      float* to = h + static_cast<size_t>(t) * down.group;
      std::fill(to + done, to + down.group, 0.f);
      tile.h.fill(group, t, to);
    }
  }
}

// Output rows of some blocks for all tokens, summed over experts into sums[tokens][blocks * ROWS].
void Layer::outer(int first_block, int blocks, int tokens, float* sums, float* y) const {
  const int width = blocks * ROWS;
  std::fill(sums, sums + static_cast<size_t>(tokens) * width, 0.f);
  for (const ExpertTile& tile : tiles_) {
    const Matrix& down = experts_[tile.expert].down;
    for (int b = 0; b < blocks; b++) {
      tile.h.multiply(down, down.blocks + (first_block + b) * down.block(), y);
      for (int t = 0; t < tile.h.count; t++) {
        const float weight = weight_[tile.first + t];
        float* to = sums + static_cast<size_t>(token_[tile.first + t]) * width + b * ROWS;
        for (int r = 0; r < ROWS; r++) to[r] += weight * y[ROWS * t + r];
      }
    }
  }
}

double Layer::work() const {
  double bytes = 0;
  for (int e = 0; e < num_experts_; e++)
    if (const int slots = start_[e + 1] - start_[e])
      bytes += (1 + slots / 8.0) * 3 * shape_.inner * static_cast<double>(shape_.hidden) * experts_[e].gate_up.bits / 8;
  return bytes;
}

void Layer::run(const void* x, size_t first, int tokens, const int64_t* index, const float* weights, void* out,
                int threads) {
  thread_local Buffer memory;
  tiles_.clear();
  sort(tokens, index, weights);
  make_tiles(memory);
  const int num_tiles = static_cast<int>(tiles_.size()), num_items = items_[num_experts_];
  const int blocks = (shape_.hidden + ROWS - 1) / ROWS;
  if (work() < 1e5) threads = 1;
  int chunk = std::min(8, std::max(1, blocks / (4 * threads)));
  while (chunk > 1 && static_cast<size_t>(tokens) * chunk * ROWS > (32 << 10)) chunk /= 2;
  const int chunks = (blocks + chunk - 1) / chunk;
  const bool small = tokens <= 4;
  int largest_group = 0;
  for (const ExpertTile& tile : tiles_) largest_group = std::max(largest_group, experts_[tile.expert].down.group);
  if (small)
    for (const ExpertTile& tile : tiles_) prepare(tile, x, first);

  Team::run(threads, [&](Team& team) {
    thread_local Buffer h_memory, sum_memory;
    constexpr int MOST = TILES[NUM_TILES - 1];
    float y[MOST * ROWS];
    if (!small) {
      for (int i; (i = team.next(num_tiles)) < num_tiles;) prepare(tiles_[i], x, first);
      team.barrier();
    }
    float* h = h_memory.get<float>(static_cast<size_t>(MOST) * largest_group);
    for (int n; (n = team.next(num_items)) < num_items;) {
      const int expert = static_cast<int>(std::upper_bound(items_.begin(), items_.end(), n) - items_.begin()) - 1;
      inner(expert, n - items_[expert], y, h);
    }
    team.barrier();
    float* sums = sum_memory.get<float>(static_cast<size_t>(tokens) * chunk * ROWS);
    for (int c; (c = team.next(chunks)) < chunks;) {
      const int block = c * chunk, count = std::min(chunk, blocks - block);
      outer(block, count, tokens, sums, y);
      const int n = std::min(count * ROWS, shape_.hidden - block * ROWS);
      for (int t = 0; t < tokens; t++)
        write_row(sums + static_cast<size_t>(t) * count * ROWS, n, dtype_, out,
                  (first + t) * shape_.hidden + block * ROWS);
    }
  });
}

}  // namespace

void moe(const Expert* experts, int num_experts, const MoeShape& shape, bool int8, const void* x, int dtype,
         int tokens, const int64_t* index, const float* weights, void* out, int threads) {
  Layer layer(experts, num_experts, shape, int8, dtype);
  for (int first = 0; first < tokens; first += BLOCK) {
    const size_t slot = static_cast<size_t>(first) * shape.top_k;
    layer.run(x, first, std::min(BLOCK, tokens - first), index + slot, weights + slot, out, threads);
  }
}

}  // namespace mcmoe
