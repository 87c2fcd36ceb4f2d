// SPDX-License-Identifier: Apache-2.0
#include "drive.h"

namespace mcmoe {

float half_to_float(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  uint32_t bits = magnitude << 13;
  float value;
  memcpy(&value, &bits, 4);
  value *= 5.192296858534828e33f;  // 2^112: a half's exponent is biased by 15, a float's by 127
  memcpy(&bits, &value, 4);
  if (magnitude >= 0x7c00u) bits |= 0x7f800000u;
  bits |= static_cast<uint32_t>(h & 0x8000u) << 16;
  memcpy(&value, &bits, 4);
  return value;
}

uint16_t float_to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (bits < 0x38800000u) {                        // subnormal: adding 0.5 aligns the last bit with 2^-24
    float value;
    memcpy(&value, &bits, 4);
    value += 0.5f;
    memcpy(&bits, &value, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000u);
  }
  return sign | static_cast<uint16_t>((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13);
}

void read_row(const void* x, int dtype, size_t offset, int n, float* to) {
  if (dtype == F32) {
    memcpy(to, static_cast<const float*>(x) + offset, sizeof(float) * n);
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(x) + offset;
  if (dtype == BF)
    for (int i = 0; i < n; i++) to[i] = bf16_to_float(from[i]);
  else
    for (int i = 0; i < n; i++) to[i] = half_to_float(from[i]);
}

void write_row(const float* x, int n, int dtype, void* to, size_t offset) {
  if (dtype == F32) {
    memcpy(static_cast<float*>(to) + offset, x, sizeof(float) * n);
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(to) + offset;
  if (dtype == BF)
    for (int i = 0; i < n; i++) out[i] = float_to_bf16(x[i]);
  else
    for (int i = 0; i < n; i++) out[i] = float_to_half(x[i]);
}

Tile Tile::choose(bool int8, int dtype, int rest, std::initializer_list<const Matrix*> matrices) {
  Tile tile;
  auto has = [&](int mode, int index) {
    for (const Matrix* m : matrices) {
      if (!m->bits) continue;
      if (!kernels().dot[mode][width_index(m->bits)][index]) return false;
      if (TILES[index] >= FIRST_MATRIX_TILE && m->units() > MOST_UNITS) return false;
    }
    return true;
  };
  // exact: bf16 activations as they are where the table has such products (it does where they are the fastest), others in
  // integers, else as fp32
  const int exact = kernels().dot[INT24][0][0] ? INT24 : FP32;
  for (int index = NUM_TILES - 1; index >= 0; index--) {
    tile.count = TILES[index];
    if (tile.count > rest) continue;
    tile.mode = int8 ? INT8 : dtype == BF && has(BF16, index) ? BF16 : exact;
    if (has(tile.mode, index)) break;
  }
  return tile;
}

Tile::Tile(const Tile& shape, const Matrix& m, float* memory)
    : count(shape.count), mode(shape.mode), groups(m.groups()), units(m.units()) {
  if (!memory) return;
  x = reinterpret_cast<int32_t*>(memory);
  xs = memory + codes();
  xz = xs + static_cast<size_t>(count) * groups;
}

size_t Tile::codes() const {
  const size_t dwords_of_group = in_matrix_tiles() ? 16 * tile_steps(mode, units) : units * dwords(mode);
  return static_cast<size_t>(count) * groups * dwords_of_group;
}

void Tile::fill(int g, int t, const float* from) const {
  const Prepare prepare = kernels().prepare[mode];
  float *scale = xs + g * count + t, *sum = xz + g * count + t;
  if (!in_matrix_tiles()) {
    prepare(from, units * UNIT, x + static_cast<size_t>(g) * units * dwords(mode) * count + t, count, scale, sum);
    return;
  }
  const int steps = tile_steps(mode, units);
  int32_t group[MOST_UNITS * 16];
  for (int d = units * dwords(mode); d < 16 * steps; d++) group[d] = 0;  // the last step may be half full
  prepare(from, units * UNIT, group, 1, scale, sum);
  int32_t* to = x + (static_cast<size_t>(g) * (count / 16) + t / 16) * steps * 256 + t % 16 * 16;
  for (int step = 0; step < steps; step++) memcpy(to + step * 256, group + 16 * step, 64);
}

void Tile::multiply(const Matrix& m, const uint8_t* block, float* y) const {
  int index = 0;
  while (TILES[index] != count) index++;
  kernels().dot[mode][width_index(m.bits)][index](block, groups, units, x, xs, xz, y);
}

}  // namespace mcmoe
