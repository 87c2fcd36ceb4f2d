// SPDX-License-Identifier: Apache-2.0
// Expert pruning: which routed slots a token skips, by a small router that scores them or by thresholds, and what remains
// of the routing. What it means is in routing/otp/router.py, routing/odp.py and routing/layer.py.
#include "pruning.h"

#include <math.h>

#include <algorithm>
#include <memory>
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

// Slots beyond a prefix that a router chooses.
class Learned {
 public:
  Learned(const PrefixRouter& r, const void* x, int dtype, int top_k)
      : r_(r), x_(x), dtype_(dtype), k_(top_k), features_(k_ + 1), row_(r.hidden), units_(r.rank), order_(k_) {}

  void operator()(size_t token, const float* weights, bool* skipped) {
    const int kept = this->kept(token, weights);
    for (int j = 0; j < k_; j++) skipped[order_[j]] = j >= kept;
  }

 private:
  int kept(size_t token, const float* weights) {
    const int h = r_.hidden, rank = r_.rank, k = k_;
    read_row(x_, dtype_, token * h, h, row_.data());
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

  const PrefixRouter& r_;
  const void* x_;
  int dtype_, k_;
  std::vector<float> features_, row_, units_;
  std::vector<int> order_;
};

// Slots whose weight is small beside the largest. Rounded as in routing/odp.py, so that both decide the same.
class Below {
 public:
  Below(const float* levels, const uint8_t* whole, int top_k) : levels_(levels), whole_(whole), k_(top_k), order_(k_) {
    for (int j = 1; j + 1 < k_; j++) same_ = same_ && levels[j] == levels[0];
  }

  void operator()(size_t token, const float* weights, bool* skipped) {
    std::fill(skipped, skipped + k_, false);
    if (whole_ && whole_[token]) return;
    sort_slots(weights, k_, order_.data());
    const float first = weights[order_[0]];
    for (int j = 1; j < k_; j++) {
      const float w = weights[order_[j]];
      skipped[order_[j]] = same_ ? w < levels_[0] * first : w / std::max(first, 1e-30f) < levels_[j - 1];
    }
  }

 private:
  const float* levels_;
  const uint8_t* whole_;
  int k_;
  bool same_ = true;
  std::vector<int> order_;
};

// `make` gives each thread its rule: rule(token, weights, skipped) says which slots of a token are skipped.
template <class Make>
void prune(const Routing& r, int threads, Make make) {
  constexpr int CHUNK = 16;
  const int chunks = (r.tokens + CHUNK - 1) / CHUNK, k = r.top_k;
  Team::run(std::max(1, std::min(threads, chunks)), [&](Team& team) {
    auto rule = make();
    const std::unique_ptr<bool[]> skipped(new bool[k]);
    for (int c; (c = team.next(chunks)) < chunks;)
      for (int t = c * CHUNK; t < std::min(r.tokens, (c + 1) * CHUNK); t++) {
        const size_t at = static_cast<size_t>(t) * k;
        rule(t, r.weights + at, skipped.get());
        float total = 0, left = 0;
        for (int j = 0; j < k; j++) {
          const bool gone = skipped[j] && r.index[at + j] < r.num_experts;
          r.out_index[at + j] = gone ? r.none : r.index[at + j];
          r.out_weights[at + j] = gone ? 0.f : r.weights[at + j];
          total += r.weights[at + j];
          left += r.out_weights[at + j];
        }
        if (r.renormalize && left > 0 && left != total)
          for (int j = 0; j < k; j++) r.out_weights[at + j] *= total / left;
      }
  });
  for (int t = 0; t < r.tokens; t++)
    for (int j = 0; j < k && (!r.valid || r.valid[t]); j++) {
      const size_t slot = static_cast<size_t>(t) * k + j;
      const int64_t expert = std::min<int64_t>(r.index[slot], r.num_experts);
      r.counts[expert + (r.out_index[slot] != r.index[slot] ? r.num_experts + 1 : 0)]++;
    }
}

}  // namespace

void keep_prefixes(const Routing& r, const PrefixRouter& router, const void* x, int dtype, int threads) {
  prune(r, threads, [&] { return Learned(router, x, dtype, r.top_k); });
}

void skip_below(const Routing& r, const float* levels, const uint8_t* whole, int threads) {
  prune(r, threads, [&] { return Below(levels, whole, r.top_k); });
}

}  // namespace mcmoe
