// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <stdint.h>

namespace mcmoe {

struct PrefixRouter {
  const float *units, *scores;  // [rank, hidden + top_k + 2], [top_k - 1, rank + top_k + 2]
  int hidden, top_k, rank;
  float shift;      // subtracted from every score
  int num_experts;  // larger ids are no expert's and never skipped
  int64_t none;     // id that skipped slots get
  bool renormalize;
};

// Routing [tokens, top_k] after pruning of tokens x [tokens, hidden]. counts [2][num_experts + 1] grow by the kept and the
// skipped slots of each expert, and of ids that are none; tokens that are not valid (null: all are) do not count.
void keep_prefixes(const PrefixRouter& r, const void* x, int dtype, int tokens, const uint8_t* valid,
                   const int64_t* index, const float* weights, int64_t* out_index, float* out_weights, int64_t* counts,
                   int threads);

}  // namespace mcmoe
