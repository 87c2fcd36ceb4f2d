// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "layout.h"

namespace mcmoe {

enum Activation { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, RELU2 = 4 };

// A thin product b a that is added to a matrix, or stands for it.
struct Factors {
  Matrix a, b;  // [r, in] and [out, r]; without blocks: there is none
};

struct Expert {
  Matrix gate_up, down;          // without blocks: factors stand for them, or the expert was dropped
  Factors low_gate, low_up, low_down;  // gate and up apart, as each has its own input of r columns

  bool factored() const { return low_up.b.blocks != nullptr; }
  bool runs() const { return gate_up.blocks || factored(); }
  // what the hidden state and the inner activations are prepared for; factors have the same groups
  const Matrix& reads_hidden() const { return gate_up.blocks ? gate_up : low_up.a; }
  const Matrix& reads_inner() const { return down.blocks ? down : low_down.a; }
};

struct MoeShape {
  int hidden, inner, top_k, activation;
  bool gated;
};

// out [tokens, hidden] for x [tokens, hidden], index and weights [tokens, top_k]. Slots whose expert is out of range or
// dropped add nothing and cost nothing.
void moe(const Expert* experts, int num_experts, const MoeShape& shape, bool int8, const void* x, int dtype,
         int tokens, const int64_t* index, const float* weights, void* out, int threads);

void linear(const Matrix& m, int rows, bool int8, const void* x, int dtype, int tokens, const float* bias, void* y,
            int threads);

}  // namespace mcmoe
