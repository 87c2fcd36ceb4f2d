// SPDX-License-Identifier: Apache-2.0
// Learned expert pruning: a small router scores the slots of a token, and a prefix of them, the largest routing weight
// first, is kept. What it means is in routing/otp/router.py.
#include "prefix.h"

#include <math.h>

#include <algorithm>
#include <vector>

#include "drive.h"
#include "parallel.h"

namespace mcmoe {
namespace {

constexpr float TINY = 1e-6f;
constexpr int LANES = 8;

// In a fixed order whatever the number of threads.
float dot(const float* a, const float* b, int n) {
  float sums[LANES] = {};
  int i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int l = 0; l < LANES; l++) sums[l] += a[i + l] * b[i + l];
  for (; i < n; i++) sums[0] += a[i] * b[i];
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

// Slots of the k routing weights, the largest first; equal weights keep their order.
void sort_slots(const float* weights, int k, int* order) {
  for (int i = 0; i < k; i++) {
    int at = i;
    while (at > 0 && weights[order[at - 1]] < weights[i]) {
      order[at] = order[at - 1];
      at--;
    }
    order[at] = i;
  }
}

class Router {
 public:
  Router(const PrefixRouter& r) : r_(r), features_(r.top_k + 1), row_(r.hidden), units_(r.rank), order_(r.top_k) {}

  // How many slots a token keeps; order()[i] is its i-th slot then.
  int kept(const void* x, int dtype, size_t token, const float* weights) {
    const int k = r_.top_k, h = r_.hidden, rank = r_.rank;
    read_row(x, dtype, token * h, h, row_.data());
    sort_slots(weights, k, order_.data());
    const float first = std::max(weights[order_[0]], TINY);
    features_[0] = logf(first);
    for (int j = 1; j < k; j++) features_[j] = logf(std::max(weights[order_[j]] / first, TINY));
    features_[k] = logf(std::max(sqrtf(dot(row_.data(), row_.data(), h) / static_cast<float>(h)), TINY));
    for (int i = 0; i < rank; i++) {
      const float* m = r_.units + static_cast<size_t>(i) * (h + k + 2);
      const float v = dot(row_.data(), m, h) + dot(features_.data(), m + h, k + 1) + m[h + k + 1];
      units_[i] = v / (1.f + expf(-v));
    }
    float sum = 0, best = 0;
    int most = 1;
    for (int j = 1; j < k; j++) {
      const float* m = r_.scores + static_cast<size_t>(j - 1) * (rank + k + 2);
      sum += dot(units_.data(), m, rank) + dot(features_.data(), m + rank, k + 1) + m[rank + k + 1] - r_.shift;
      if (sum > best) best = sum, most = j + 1;
    }
    return most;
  }
  const int* order() const { return order_.data(); }

 private:
  const PrefixRouter& r_;
  std::vector<float> features_, row_, units_;
  std::vector<int> order_;
};

}  // namespace

void keep_prefixes(const PrefixRouter& r, const void* x, int dtype, int tokens, const uint8_t* valid,
                   const int64_t* index, const float* weights, int64_t* out_index, float* out_weights, int64_t* counts,
                   int threads) {
  constexpr int CHUNK = 16;
  const int chunks = (tokens + CHUNK - 1) / CHUNK, k = r.top_k;
  Team::run(std::min(threads, chunks), [&](Team& team) {
    Router router(r);
    for (int c; (c = team.next(chunks)) < chunks;)
      for (int t = c * CHUNK; t < std::min(tokens, (c + 1) * CHUNK); t++) {
        const size_t at = static_cast<size_t>(t) * k;
        const int kept = router.kept(x, dtype, t, weights + at);
        float total = 0, left = 0;
        for (int j = 0; j < k; j++) {
          const size_t slot = at + router.order()[j];
          const bool gone = j >= kept && index[slot] < r.num_experts;
          out_index[slot] = gone ? r.none : index[slot];
          out_weights[slot] = gone ? 0.f : weights[slot];
          total += weights[slot];
          left += out_weights[slot];
        }
        if (r.renormalize && left > 0 && left != total)
          for (int j = 0; j < k; j++) out_weights[at + j] *= total / left;
      }
  });
  for (int t = 0; t < tokens; t++)
    for (int j = 0; j < k && (!valid || valid[t]); j++) {
      const size_t slot = static_cast<size_t>(t) * k + j;
      const int64_t expert = std::min<int64_t>(index[slot], r.num_experts);
      counts[expert + (out_index[slot] != index[slot] ? r.num_experts + 1 : 0)]++;
    }
}

}  // namespace mcmoe
