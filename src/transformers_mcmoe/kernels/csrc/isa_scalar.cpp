// SPDX-License-Identifier: Apache-2.0
// Any processor: plain loops, one token at a time, which the compiler may make vectors of.
#define MCMOE_LAMBDA
#include "dot.h"
#include "drive.h"

namespace mcmoe {
namespace {

float half(const uint8_t* p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return half_to_float(h);
}

// Codes of columns 4j .. 4j + 3 of a row, one per byte; `lines` at the row's dword in the first line of the unit.
template <int B>
uint32_t four_codes(const uint8_t* lines, int j) {
  auto line = [lines](int i) {
    uint32_t v;
    memcpy(&v, lines + 64 * i, 4);
    return v;
  };
  if constexpr (B == 3) {
    const int e = j / 4, s = j % 4, place = s == 3 ? e : 2 + 2 * s + e;
    return ((line(e) >> (2 * s)) & 0x03030303u) | ((line(2) >> place) & 0x01010101u) << 2;
  } else {
    constexpr uint32_t MASK = 0x01010101u * ((1u << B) - 1);
    return (line(j / (8 / B)) >> (j % (8 / B) * B)) & MASK;
  }
}

template <int B, bool INTEGER>
void dot(const uint8_t* records, int groups, int units, const int32_t* x, const float* xs, const float* xz, float* y) {
  const int codes_bytes = units * 128 * B, stride = codes_bytes + 4 * ROWS;
  float f[ROWS] = {};
  for (int g = 0; g < groups; g++, records += stride) {
    int32_t whole[ROWS] = {};
    float real[ROWS] = {};
    for (int u = 0; u < units; u++)
      for (int j = 0; j < 8; j++, x += INTEGER ? 1 : 4)
        for (int r = 0; r < ROWS; r++) {
          const uint32_t w = four_codes<B>(records + (2 * u + r / 16) * 64 * B + 4 * (r % 16), j);
          for (int b = 0; b < 4; b++) {
            const int code = w >> (8 * b) & 255;
            if constexpr (INTEGER) {
              whole[r] += code * static_cast<int8_t>(static_cast<uint32_t>(*x) >> (8 * b));
            } else {
              float value;
              memcpy(&value, x + b, 4);
              real[r] += static_cast<float>(code) * value;
            }
          }
        }
    for (int r = 0; r < ROWS; r++) {
      const float scale = half(records + codes_bytes + 2 * r), zero = half(records + codes_bytes + 2 * (ROWS + r));
      const float sum = INTEGER ? static_cast<float>(whole[r]) * xs[g] : real[r];
      f[r] += scale * (sum - zero * xz[g]);
    }
  }
  memcpy(y, f, sizeof f);
}

template <int B>
void fill(Kernels& k, int width) {
  k.dot[INT8][width][0] = dot<B, true>;
  k.dot[FP32][width][0] = dot<B, false>;
}

}  // namespace
}  // namespace mcmoe

const mcmoe::Kernels* mcmoe::scalar_kernels() {
  static const Kernels kernels = [] {
    Kernels k{};
    fill<1>(k, 0), fill<2>(k, 1), fill<3>(k, 2), fill<4>(k, 3), fill<8>(k, 4);
    k.prepare[INT8] = prepare_int8;
    k.prepare[FP32] = prepare_fp32;
    k.grid_errors = grid_errors_of;
    k.round_columns = round_columns_of;
    k.descend_columns = descend_columns_of;
    return k;
  }();
  return &kernels;
}
