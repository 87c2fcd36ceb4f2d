// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <stdint.h>

namespace mcmoe {

// A call's routing [tokens, top_k], and where what remains of it goes.
struct Routing {
  int tokens, top_k;
  int num_experts;   // larger ids are no expert's and never skipped
  int64_t none;      // id that skipped slots get
  bool renormalize;  // scale kept weights to the sum that all had
  const int64_t* index;
  const float* weights;
  const uint8_t* valid;  // [tokens], tokens that count; null: all do
  int64_t* out_index;
  float* out_weights;
  int64_t* counts;  // [2][num_experts + 1], grow by the kept and the skipped slots of each expert, and of ids that are none
};

struct PrefixRouter {
  const float *units, *scores;  // [rank, hidden + top_k + 2], [top_k - 1, rank + top_k + 2]
  int hidden, rank;
  float shift;  // subtracted from every score
};

// Learned pruning of tokens x [tokens, hidden].
void keep_prefixes(const Routing& r, const PrefixRouter& router, const void* x, int dtype, int threads);

// Slots whose weight is below levels [top_k - 1], by rank, times the largest are skipped, but for whole tokens (null: none).
void skip_below(const Routing& r, const float* levels, const uint8_t* whole, int threads);

}  // namespace mcmoe
