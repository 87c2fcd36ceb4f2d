// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "layout.h"

namespace mcmoe {

enum Activation { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, RELU2 = 4 };

struct Expert {
  Matrix gate_up, down;  // without blocks: the expert was dropped
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
