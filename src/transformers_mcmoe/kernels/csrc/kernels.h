// SPDX-License-Identifier: Apache-2.0
// What one instruction set offers. Each isa_*.cpp fills a table; api.cpp chooses one.
#pragma once
#include <stdint.h>

namespace mcmoe {

// How activations enter: a group's as 8-bit integers under one scale; as bf16; as fp32; or a group's as 24-bit integers
// under one scale, in three digits of 8 bits (digit 0 is the lowest), which byte dot products take: as exact as fp32.
enum Mode { INT8 = 0, BF16 = 1, FP32 = 2, INT24 = 3 };
constexpr int MODES = 4;

// Widths that matrices may have, and the numbers of tokens that one call can take.
constexpr int WIDTHS[] = {1, 2, 3, 4, 8};
constexpr int NUM_WIDTHS = 5;
constexpr int TILES[] = {1, 2, 4, 8, 16, 32, 64, 128};
constexpr int NUM_TILES = 8;
constexpr int FIRST_MATRIX_TILE = 16;  // from here on tokens lie in matrix tiles of 16; only some processors have them
constexpr int MOST_UNITS = 16;         // of a group, in matrix tiles

// Rows of a record, and input columns of a unit of codes.
constexpr int ROWS = 32, UNIT = 32;

// Output of 32 rows for T tokens, y[T][32].
//   records  `groups` records of the 32 rows (layout.h)
//   units    UNITs in a group
//   x        prepared activations, dwords interleaved over the tokens: [groups * units][dwords per unit][T]; in matrix
//            tiles: [groups][T / 16][steps][16 tokens][16 dwords], the last step of a group filled up with zeros;
//            the three digits of four INT24 columns follow each other
//   xs       integers only: scale of a token's group, [groups][T]
//   xz       sum of a token's group as the kernel sees it, [groups][T]
using Dot = void (*)(const uint8_t* records, int groups, int units, const int32_t* x, const float* xs,
                     const float* xz, float* y);

// Activations of one group of one token, `size` values at x, as the kernel reads them; dword d goes to q[d * stride].
using Prepare = void (*)(const float* x, int size, int32_t* q, int stride, float* xs, float* xz);

// Columns of a block of COLUMN_LANES rows, [columns][COLUMN_LANES] in units of codes; `codes` holds values before they are
// rounded (columns.h).
constexpr int COLUMN_LANES = 64;
using RoundColumns = void (*)(float* codes, float* errors, const float* feedback, const float* diagonal, int columns,
                              int bits, float* loss);
using GridErrors = void (*)(const float* values, const float* inverse, const float* zero, int columns, int candidates,
                            int bits, float* errors);
using DescendColumns = void (*)(float* codes, float* gradients, const float* metric, int columns, int bits, int sweeps);

struct Kernels {
  Dot dot[MODES][NUM_WIDTHS][NUM_TILES];  // null where the instruction set lacks a mode
  Prepare prepare[MODES];
  GridErrors grid_errors;
  RoundColumns round_columns;
  DescendColumns descend_columns;
};

// Dwords of prepared activations per unit.
constexpr int dwords(int mode) { return mode == INT8 ? 8 : mode == BF16 ? 16 : mode == FP32 ? 32 : 24; }

// Matrix tiles of 16 dwords that hold a group's columns.
constexpr int tile_steps(int mode, int units) { return (units * dwords(mode) + 15) / 16; }

const Kernels* amx_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* avx512_kernels();
const Kernels* avx_vnni_kernels();
const Kernels* avx2_kernels();
const Kernels* neon_kernels();
const Kernels* scalar_kernels();

}  // namespace mcmoe
