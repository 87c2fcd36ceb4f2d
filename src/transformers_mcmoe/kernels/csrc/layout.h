// SPDX-License-Identifier: Apache-2.0
// The layout that kernels read, made from the checkpoint's (docs/format.md) at first use.
//
// A matrix is cut into blocks of 32 rows; a block is a run of records, one per group of input columns:
//   for each unit of 32 columns: for rows 0-15, then for rows 16-31: `bits` lines of 64 bytes
//   scales of the 32 rows (fp16), zeros of the 32 rows (fp16)
// A line holds a dword of each of 16 rows. Byte b of the dword has the codes of columns 4j + b, where j counts the
// fields of the lines, low bits first: with 2 bits, line i holds j = 4i + s at bits 2s. So a line shifted and masked is
// what a 4-way byte dot product takes, for natural order of the activations at every width. With 3 bits, two lines are
// as with 2 bits; the third has the top bits, of (line i, field s) at bit 2 + i, 4 + i, 6 + i, i for s = 0..3.
// Gate and up of an expert are one matrix whose blocks have 16 rows of gate and the same 16 rows of up.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

namespace mcmoe {

struct Matrix {
  const uint8_t* blocks = nullptr;  // null: there is no matrix
  int bits = 0, group = 0;          // code width; columns of a group, a multiple of 32
  int columns = 0;                  // input columns before padding

  int groups() const { return (columns + group - 1) / group; }
  int units() const { return group / UNIT; }
  size_t record() const { return static_cast<size_t>(group) * ROWS * bits / 8 + 4 * ROWS; }
  size_t block() const { return record() * groups(); }
};

inline int width_index(int bits) { return bits == 8 ? 4 : bits - 1; }

// Writes rows [rows] of a packed matrix of the checkpoint into its blocks. `first` and `pitch` place them: row r becomes
// row `first + r % pitch` of block r / pitch (pitch 32, first 0: all rows; pitch 16: gate (first 0) or up (first 16)).
void repack(const uint8_t* packed, int rows, int bits, int group, int groups, int first, int pitch, uint8_t* blocks);

}  // namespace mcmoe
