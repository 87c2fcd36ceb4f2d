// SPDX-License-Identifier: Apache-2.0
// A program that checks the kernels without Python, for the sanitizers and for emulated processors (tests/test_kernels.py):
// every width, three group sizes and tiles of up to 8 tokens, with exactly as much memory as the layout says, on two threads, against a plain
// computation from the packed bytes.
#include <math.h>
#include <stdio.h>

#include <vector>

#include "drive.h"
#include "moe.h"
#include "parallel.h"

extern "C" const char* mcmoe_select(const char*);

using namespace mcmoe;

namespace {

uint32_t state = 1;
uint32_t draw() { return state = state * 1664525u + 1013904223u; }
float uniform() { return static_cast<float>(draw() >> 8) / 16777216.f; }

struct Packed {
  int rows, columns, bits, group, groups;
  std::vector<uint8_t> bytes;
  std::vector<float> dense;

  Packed(int rows_, int columns_, int bits_, int group_)
      : rows(rows_), columns(columns_), bits(bits_), group(group_), groups((columns_ + group_ - 1) / group_) {
    const int record = group * bits / 8 + 4;
    bytes.resize(static_cast<size_t>(rows) * groups * record);
    dense.resize(static_cast<size_t>(rows) * columns);
    for (int r = 0; r < rows; r++)
      for (int g = 0; g < groups; g++) {
        uint8_t* at = bytes.data() + (static_cast<size_t>(r) * groups + g) * record;
        for (int i = 0; i < record - 4; i++) at[i] = static_cast<uint8_t>(draw() >> 16);
        const uint16_t grid[2] = {float_to_half(0.01f + uniform()), float_to_half(uniform() * (1 << bits))};
        memcpy(at + record - 4, grid, 4);
        for (int k = 0; k < group && g * group + k < columns; k++)
          dense[static_cast<size_t>(r) * columns + g * group + k] =
              (static_cast<float>(code(at, k)) - half_to_float(grid[1])) * half_to_float(grid[0]);
      }
  }
  int code(const uint8_t* at, int k) const {  // docs/format.md
    auto field = [&](size_t start, int width) { return at[start + k * width / 8] >> (k * width % 8) & ((1 << width) - 1); };
    if (bits == 8) return at[k];
    return bits == 3 ? field(0, 2) | field(group / 4, 1) << 2 : field(0, bits);
  }
};

int failures = 0;
void check(const char* what, const std::vector<float>& y, const std::vector<double>& expected, double bound) {
  double error = 0, size = 0;
  for (size_t i = 0; i < y.size(); i++) {
    error += (y[i] - expected[i]) * (y[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  if (!(sqrt(error) <= bound * sqrt(size))) {
    failures++;
    fprintf(stderr, "%s: relative error %g\n", what, sqrt(error / size));
  }
}

void linears() {
  for (int bits : WIDTHS)
    for (int group : {32, 96, 128})
      for (int tokens : {1, 3, 13}) {
        const Packed p(45, 200, bits, group);
        Matrix m;
        m.bits = bits, m.group = group, m.columns = p.columns;
        std::vector<uint8_t> blocks(2 * m.block());
        repack(p.bytes.data(), p.rows, bits, group, p.groups, 0, ROWS, blocks.data());
        m.blocks = blocks.data();
        std::vector<float> x(static_cast<size_t>(tokens) * p.columns), y(static_cast<size_t>(tokens) * p.rows);
        for (float& v : x) v = uniform() - 0.5f;
        std::vector<double> expected(y.size(), 0.0);
        for (int t = 0; t < tokens; t++)
          for (int r = 0; r < p.rows; r++)
            for (int k = 0; k < p.columns; k++)
              expected[t * p.rows + r] += static_cast<double>(p.dense[r * p.columns + k]) * x[t * p.columns + k];
        for (bool int8 : {false, true}) {
          linear(m, p.rows, int8, x.data(), F32, tokens, nullptr, y.data(), 2);
          check("linear", y, expected, int8 ? 5e-2 : 1e-5);
        }
      }
}

// With `factors`, expert 0 has some beside its matrices, expert 1 in their place.
void layer(bool gated, bool factors) {
  const int experts = 4, hidden = 96, inner = 80, tokens = 37, top_k = 2, rank = 40;
  std::vector<Packed> gate, up, down, thin;
  std::vector<std::vector<uint8_t>> memory;
  thin.reserve(12);
  // packs a factor, exactly as large as it is
  auto factor = [&](int rows, int columns, Matrix& m) {
    thin.emplace_back(rows, columns, 4, 32);
    m.bits = 4, m.group = 32, m.columns = columns;
    memory.emplace_back((rows + ROWS - 1) / ROWS * m.block());
    repack(thin.back().bytes.data(), rows, 4, 32, m.groups(), 0, ROWS, memory.back().data());
    m.blocks = memory.back().data();
  };
  // adds b a to a dense matrix, or replaces it
  auto add = [&](Packed& dense, bool replaces) {
    const Packed &a = thin[thin.size() - 2], &b = thin.back();
    for (int r = 0; r < dense.rows; r++)
      for (int c = 0; c < dense.columns; c++) {
        float& value = dense.dense[static_cast<size_t>(r) * dense.columns + c];
        double sum = replaces ? 0 : value;
        for (int k = 0; k < rank; k++)
          sum += static_cast<double>(b.dense[static_cast<size_t>(r) * rank + k]) * a.dense[static_cast<size_t>(k) * dense.columns + c];
        value = static_cast<float>(sum);
      }
  };
  std::vector<Expert> list(experts);
  for (int e = 0; e < experts; e++) {
    const int bits = WIDTHS[e];
    gate.emplace_back(inner, hidden, bits, 32);
    up.emplace_back(inner, hidden, bits, 32);
    down.emplace_back(hidden, inner, WIDTHS[e + 1], 32);
    Matrix &a = list[e].gate_up, &b = list[e].down;
    a.bits = bits, a.group = 32, a.columns = hidden;
    b.bits = WIDTHS[e + 1], b.group = 32, b.columns = inner;
    const int pitch = gated ? ROWS / 2 : ROWS;
    memory.emplace_back((inner + pitch - 1) / pitch * a.block());
    if (gated) repack(gate[e].bytes.data(), inner, bits, 32, a.groups(), 0, pitch, memory.back().data());
    repack(up[e].bytes.data(), inner, bits, 32, a.groups(), gated ? pitch : 0, pitch, memory.back().data());
    a.blocks = e == 3 ? nullptr : memory.back().data();
    memory.emplace_back((hidden + ROWS - 1) / ROWS * b.block());
    repack(down[e].bytes.data(), hidden, b.bits, 32, b.groups(), 0, ROWS, memory.back().data());
    b.blocks = memory.back().data();
    if (!factors || e > 1) continue;
    const bool replaces = e == 1;
    auto both = [&](Factors& own, Packed& dense) {
      factor(rank, dense.columns, own.a);
      factor(dense.rows, rank, own.b);
      add(dense, replaces);
    };
    if (gated) both(list[e].low_gate, gate[e]);
    both(list[e].low_up, up[e]);
    both(list[e].low_down, down[e]);
    if (replaces) {
      a.blocks = b.blocks = nullptr;
      a.bits = b.bits = 0;
    }
  }
  std::vector<float> x(tokens * hidden), weights(tokens * top_k), out(tokens * hidden, NAN);
  std::vector<int64_t> index(tokens * top_k);
  for (float& v : x) v = uniform() - 0.5f;
  for (float& v : weights) v = uniform();
  for (int64_t& i : index) i = draw() / 65536 % (experts + 1);
  std::vector<double> expected(out.size(), 0.0);
  for (int s = 0; s < tokens * top_k; s++) {
    const int64_t e = index[s];
    if (e >= 3) continue;
    const float* in = x.data() + s / top_k * hidden;
    std::vector<double> h(inner);
    for (int i = 0; i < inner; i++) {
      double a = 0, b = 0;
      for (int k = 0; k < hidden; k++) {
        a += static_cast<double>(gate[e].dense[i * hidden + k]) * in[k];
        b += static_cast<double>(up[e].dense[i * hidden + k]) * in[k];
      }
      h[i] = gated ? a / (1 + exp(-a)) * b : b / (1 + exp(-b));
    }
    for (int r = 0; r < hidden; r++)
      for (int i = 0; i < inner; i++)
        expected[s / top_k * hidden + r] += weights[s] * static_cast<double>(down[e].dense[r * inner + i]) * h[i];
  }
  const MoeShape shape{hidden, inner, top_k, SILU, gated};
  for (bool int8 : {false, true}) {
    moe(list.data(), experts, shape, int8, x.data(), F32, tokens, index.data(), weights.data(), out.data(), 2);
    check(factors ? "moe with factors" : "moe", out, expected, int8 ? 1e-1 : 1e-5);
  }
}

}  // namespace

// The instruction set may be named; by default it is the best.
int main(int count, char** words) {
  if (!mcmoe_select(count > 1 ? words[1] : nullptr)) return 2;
  linears();
  for (bool factors : {false, true})
    for (bool gated : {true, false}) layer(gated, factors);
  return failures ? 1 : 0;
}
