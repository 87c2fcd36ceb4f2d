// SPDX-License-Identifier: Apache-2.0
// A whole MoE layer: out[t] = sum_k weight[t, k] * down(act(gate(x_t)) * up(x_t)) of the experts that t is routed to.
//
// One parallel region: tiles of tokens per expert are prepared; items (expert, group of inner columns) compute the inner
// activations and prepare them at once for the down projection; items (output rows) sum over all experts. Where experts
// have factors b a beside their matrices or in their place, what a returns is made before each of the two, prepared at
// once for b in the same way. Every number is computed by one thread in a fixed order, so results do not depend on the
// number of threads.
#include "moe.h"

#include <math.h>
#include <string.h>

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
  Tile low_gate, low_up, low_down;  // prepared inputs of the factors b
};

// One group of what a factor a returns for all tokens of an expert.
struct Thin {
  int expert, group;
  Factors Expert::*factors;
  Tile ExpertTile::*from, ExpertTile::*to;
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
  size_t place(ExpertTile& tile, float* memory) const;
  void prepare(const ExpertTile& tile, const void* x, size_t first) const;
  void thin(const Thin& item, float* y, float* values) const;
  void inner(int expert, int group, float* y, float* h) const;
  static void finish(const Tile& tile, int group, int columns, int done, float* values);
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
  std::vector<int> items_;          // [E + 1], items of the inner phase before each expert
  std::vector<Thin> low_in_, low_out_;  // items before the inner phase, and behind it
};

void Layer::sort(int tokens, const int64_t* index, const float* weights) {
  const int slots = tokens * shape_.top_k;
  auto runs = [&](int64_t e) { return e >= 0 && e < num_experts_ && experts_[e].runs(); };
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
      const Tile shape = Tile::choose(
          int8_, dtype_, start_[e + 1] - s,
          {&expert.gate_up, &expert.down, &expert.low_up.a, &expert.low_up.b, &expert.low_down.a, &expert.low_down.b});
      tiles_.push_back({e, s, shape, shape, shape, shape, shape});
      words += place(tiles_.back(), nullptr);
      s += shape.count;
    }
    first_tile_[e + 1] = static_cast<int>(tiles_.size());
    const bool any = start_[e] < start_[e + 1];
    items_[e + 1] = items_[e] + (any ? expert.reads_inner().groups() : 0);
    if (!any || !expert.factored()) continue;
    for (int g = 0; g < expert.low_up.b.groups(); g++) {
      if (shape_.gated) low_in_.push_back({e, g, &Expert::low_gate, &ExpertTile::x, &ExpertTile::low_gate});
      low_in_.push_back({e, g, &Expert::low_up, &ExpertTile::x, &ExpertTile::low_up});
      low_out_.push_back({e, g, &Expert::low_down, &ExpertTile::h, &ExpertTile::low_down});
    }
  }
  float* at = memory.get<float>(words);
  for (ExpertTile& tile : tiles_) at += place(tile, at);
}

// Gives the parts of a tile their memory, or with null only their sizes; returns the words that they take.
size_t Layer::place(ExpertTile& tile, float* memory) const {
  const Expert& expert = experts_[tile.expert];
  size_t words = 0;
  auto part = [&](Tile& own, const Matrix& m) {
    own = Tile(own, m, memory ? memory + words : nullptr);
    words += own.words();
  };
  part(tile.x, expert.reads_hidden());
  part(tile.h, expert.reads_inner());
  if (!expert.factored()) return words;
  if (shape_.gated) part(tile.low_gate, expert.low_gate.b);
  part(tile.low_up, expert.low_up.b);
  part(tile.low_down, expert.low_down.b);
  return words;
}

void Layer::prepare(const ExpertTile& tile, const void* x, size_t first) const {
  const Matrix& m = experts_[tile.expert].reads_hidden();
  const int padded = m.groups() * m.group;
  thread_local Buffer memory;
  float* row = memory.get<float>(padded);
  std::fill(row + shape_.hidden, row + padded, 0.f);
  for (int t = 0; t < tile.x.count; t++) {
    read_row(x, dtype_, (first + token_[tile.first + t]) * shape_.hidden, shape_.hidden, row);
    for (int g = 0; g < m.groups(); g++) tile.x.fill(g, t, row + g * m.group);
  }
}

void Layer::thin(const Thin& item, float* y, float* values) const {
  const Factors& factors = experts_[item.expert].*item.factors;
  const Matrix &a = factors.a, &b = factors.b;
  const int blocks = (b.columns + ROWS - 1) / ROWS, first = item.group * b.units();
  const int last = std::min(blocks, first + b.units());
  for (int i = first_tile_[item.expert]; i < first_tile_[item.expert + 1]; i++) {
    const Tile &from = tiles_[i].*item.from, &to = tiles_[i].*item.to;
    for (int n = first; n < last; n++) {
      from.multiply(a, a.blocks + n * a.block(), y);
      for (int t = 0; t < from.count; t++)
        memcpy(values + static_cast<size_t>(t) * b.group + (n - first) * ROWS, y + ROWS * t, ROWS * sizeof(float));
    }
    finish(to, item.group, b.group, (last - first) * ROWS, values);
  }
}

// One group of the inner activations of all tokens of an expert.
void Layer::inner(int expert, int group, float* y, float* h) const {
  const Expert& own = experts_[expert];
  const Matrix& up = own.gate_up;
  const int columns = own.reads_inner().group;
  const int rows = shape_.gated ? ROWS / 2 : ROWS;  // inner columns that a block gives
  const int blocks = (shape_.inner + rows - 1) / rows, first = group * columns / rows;
  const int last = std::min(blocks, first + columns / rows);
  constexpr int MOST = TILES[NUM_TILES - 1] * ROWS;
  thread_local Buffer low_memory;
  float* low_gate = own.factored() ? low_memory.get<float>(2 * MOST) : nullptr;
  float* low_up = low_gate + MOST;
  for (int i = first_tile_[expert]; i < first_tile_[expert + 1]; i++) {
    const ExpertTile& tile = tiles_[i];
    for (int b = first; b < last; b++) {
      if (up.blocks)
        tile.x.multiply(up, up.blocks + b * up.block(), y);
      else
        std::fill(y, y + ROWS * tile.x.count, 0.f);
      if (own.factored()) {
        // a block of a factor has the rows of two blocks of gate and up
        const int half = shape_.gated ? b % 2 : 0, block = shape_.gated ? b / 2 : b;
        const Matrix &gate_b = own.low_gate.b, &up_b = own.low_up.b;
        if (!half && shape_.gated) tile.low_gate.multiply(gate_b, gate_b.blocks + block * gate_b.block(), low_gate);
        if (!half) tile.low_up.multiply(up_b, up_b.blocks + block * up_b.block(), low_up);
        for (int t = 0; t < tile.x.count; t++)
          for (int r = 0; r < rows; r++) {
            const int at = ROWS * t + half * rows + r;
            if (shape_.gated) y[ROWS * t + r] += low_gate[at];
            y[ROWS * t + (shape_.gated ? rows : 0) + r] += low_up[at];
          }
      }
      for (int t = 0; t < tile.x.count; t++) {
        const float* values = y + ROWS * t;
        float* to = h + static_cast<size_t>(t) * columns + (b - first) * rows;
        for (int r = 0; r < rows; r++)
          to[r] = activate(values[r], shape_.activation) * (shape_.gated ? values[r + rows] : 1.f);
      }
    }
    finish(tile.h, group, columns, (last - first) * rows, h);
  }
}

// Prepares a group of a tile's tokens, values [tokens][columns], of which those from `done` on are padding.
void Layer::finish(const Tile& tile, int group, int columns, int done, float* values) {
  for (int t = 0; t < tile.count; t++) {
    float* own = values + static_cast<size_t>(t) * columns;
    std::fill(own + done, own + columns, 0.f);
    tile.fill(group, t, own);
  }
}

// Output rows of some blocks for all tokens, summed over experts into sums[tokens][blocks * ROWS].
void Layer::outer(int first_block, int blocks, int tokens, float* sums, float* y) const {
  const int width = blocks * ROWS;
  std::fill(sums, sums + static_cast<size_t>(tokens) * width, 0.f);
  for (const ExpertTile& tile : tiles_) {
    const Expert& expert = experts_[tile.expert];
    auto add = [&](const Tile& input, const Matrix& m, int b) {
      if (!m.blocks) return;
      input.multiply(m, m.blocks + (first_block + b) * m.block(), y);
      for (int t = 0; t < input.count; t++) {
        const float weight = weight_[tile.first + t];
        float* to = sums + static_cast<size_t>(token_[tile.first + t]) * width + b * ROWS;
        for (int r = 0; r < ROWS; r++) to[r] += weight * y[ROWS * t + r];
      }
    };
    for (int b = 0; b < blocks; b++) {
      add(tile.h, expert.down, b);
      add(tile.low_down, expert.low_down.b, b);
    }
  }
}

double Layer::work() const {
  double bytes = 0;
  for (int e = 0; e < num_experts_; e++)
    if (const int slots = start_[e + 1] - start_[e]) {
      const Matrix& b = experts_[e].low_up.b;
      const double matrix = static_cast<double>(shape_.inner) * shape_.hidden * experts_[e].gate_up.bits;
      const double factors = static_cast<double>(shape_.inner + shape_.hidden) * b.columns * b.bits;
      bytes += (1 + slots / 8.0) * 3 * (matrix + factors) / 8;
    }
  return bytes;
}

void Layer::run(const void* x, size_t first, int tokens, const int64_t* index, const float* weights, void* out,
                int threads) {
  thread_local Buffer memory;
  tiles_.clear();
  low_in_.clear();
  low_out_.clear();
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
  for (const ExpertTile& tile : tiles_) {
    const Expert& expert = experts_[tile.expert];
    largest_group = std::max({largest_group, expert.reads_inner().group, expert.low_up.b.group});
  }
  const int num_in = static_cast<int>(low_in_.size()), num_out = static_cast<int>(low_out_.size());
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
    if (num_in) {
      for (int n; (n = team.next(num_in)) < num_in;) thin(low_in_[n], y, h);
      team.barrier();
    }
    for (int n; (n = team.next(num_items)) < num_items;) {
      const int expert = static_cast<int>(std::upper_bound(items_.begin(), items_.end(), n) - items_.begin()) - 1;
      inner(expert, n - items_[expert], y, h);
    }
    team.barrier();
    if (num_out) {
      for (int n; (n = team.next(num_out)) < num_out;) thin(low_out_[n], y, h);
      team.barrier();
    }
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
