// SPDX-License-Identifier: Apache-2.0
#include "layout.h"

#include <string.h>

#include <algorithm>

#include "parallel.h"

namespace mcmoe {
namespace {

constexpr int LANES = 16;  // rows that one line holds; the loops over them become vector instructions

// Exchanges the bits that `mask` selects with those `shift` above.
inline uint32_t swap_bits(uint32_t v, uint32_t mask, int shift) {
  const uint32_t t = ((v >> shift) ^ v) & mask;
  return v ^ t ^ (t << shift);
}

// Fields of `width` bits of a dword, column n in field n, to column 4j + b in byte b, field j.
inline uint32_t spread(uint32_t v, int width) {
  switch (width) {
    case 4:  // 8 nibbles, index bits (b1 b0 s) of the result from (s b1 b0)
      v = swap_bits(v, 0x0000ff00u, 8);
      v = swap_bits(v, 0x00f000f0u, 4);
      return v;
    case 2:  // 4 x 4 fields: a transposition
      v = swap_bits(v, 0x0000f0f0u, 12);
      return swap_bits(v, 0x00cc00ccu, 6);
    case 1:  // 32 bits: index (b1 b0 s2 s1 s0) of the result from (s2 s1 s0 b1 b0)
    {
      uint32_t out = 0;
      for (int b = 0; b < 4; b++) {
        uint32_t t = (v >> b) & 0x11111111u;  // bits 4s + b
        t = (t | (t >> 3)) & 0x03030303u;
        t = (t | (t >> 6)) & 0x000f000fu;
        t = (t | (t >> 12)) & 0xffu;
        out |= t << (8 * b);
      }
      return out;
    }
    default: return v;  // 8 bits: a byte a column already
  }
}

// Top bits of 32 codes of 3 bits to where layout.h wants them.
inline uint32_t spread_top(uint32_t v) {
  v = spread(v, 1);  // byte b, bit j = 4i + s
  const uint32_t first = v & 0x0f0f0f0fu, second = (v >> 4) & 0x0f0f0f0fu;
  auto place = [](uint32_t f) {  // s = 0..3 -> bits 2, 4, 6, 0
    return ((f & 0x01010101u) << 2) | ((f & 0x02020202u) << 3) | ((f & 0x04040404u) << 4) | ((f & 0x08080808u) >> 3);
  };
  return place(first) | (place(second) << 1);
}

// One group of `lanes` rows, at most LANES, `pitch` bytes apart, into a record; the lanes that are missing get zeros.
void repack_group(const uint8_t* source, size_t pitch, int lanes, int bits, int group, int half, uint8_t* record) {
  const int units = group / UNIT, low = bits == 3 ? 2 : bits;
  uint32_t line[LANES];
  auto move = [&](const uint8_t* from, uint8_t* to, auto change) {
    for (int r = 0; r < lanes; r++) memcpy(line + r, from + r * pitch, 4);
    for (int r = lanes; r < LANES; r++) line[r] = 0;
    for (int r = 0; r < LANES; r++) line[r] = change(line[r]);
    memcpy(to, line, sizeof line);
  };
  for (int u = 0; u < units; u++) {
    uint8_t* lines = record + static_cast<size_t>(2 * u + half) * 64 * bits;
    for (int i = 0; i < low; i++)
      move(source + 4 * (low * u + i), lines + 64 * i, [low](uint32_t v) { return spread(v, low); });
    if (bits == 3) move(source + group / 4 + 4 * u, lines + 128, spread_top);
  }
  // the grid follows the codes, in both layouts: scale, zero
  uint8_t* grid = record + static_cast<size_t>(group) * ROWS * bits / 8 + 2 * LANES * half;
  const uint8_t* from = source + static_cast<size_t>(group) * bits / 8;
  for (int r = 0; r < LANES; r++) {
    uint16_t pair[2] = {0, 0};
    if (r < lanes) memcpy(pair, from + r * pitch, 4);
    memcpy(grid + 2 * r, pair, 2);
    memcpy(grid + 2 * ROWS + 2 * r, pair + 1, 2);
  }
}

}  // namespace

void repack(const uint8_t* packed, int rows, int bits, int group, int groups, int first, int pitch, uint8_t* blocks) {
  const size_t source_record = static_cast<size_t>(group) * bits / 8 + 4, source_row = source_record * groups;
  const size_t record = static_cast<size_t>(group) * ROWS * bits / 8 + 4 * ROWS;
  const int halves = pitch / LANES, count = (rows + pitch - 1) / pitch * halves;  // an odd last half is zeros
  Team::run(count > 64 ? Team::most() : 1, [&](Team& team) {
    for (int n; (n = team.next(count)) < count;) {
      const int block = n / halves, half = first / LANES + n % halves;
      const int row = block * pitch + (n % halves) * LANES, lanes = std::max(0, std::min(LANES, rows - row));
      for (int g = 0; g < groups; g++)
        repack_group(packed + row * source_row + g * source_record, source_row, lanes, bits, group, half,
                     blocks + (static_cast<size_t>(block) * groups + g) * record);
    }
  });
}

}  // namespace mcmoe
