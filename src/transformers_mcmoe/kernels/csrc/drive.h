// SPDX-License-Identifier: Apache-2.0
// What the operators share: reading activations, tiles of tokens, writing results.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "layout.h"

namespace mcmoe {

enum DType { F32 = 0, BF = 1, F16 = 2 };  // of activations and results

const Kernels& kernels();  // the chosen instruction set

inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float half_to_float(uint16_t h);
uint16_t float_to_half(float x);

// n values of a row to fp32, and back.
void read_row(const void* x, int dtype, size_t offset, int n, float* to);
void write_row(const float* x, int n, int dtype, void* to, size_t offset);

// Memory that grows and is kept; 64-byte aligned.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(data_); }
  template <class A>
  A* get(size_t count) {
    const size_t bytes = (count * sizeof(A) + 63) / 64 * 64;
    if (bytes > size_) {
      free(data_);
      data_ = nullptr;
      size_ = 0;
      if (posix_memalign(&data_, 64, bytes) != 0) abort();  // as operator new would without exceptions
      size_ = bytes;
    }
    return static_cast<A*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// The mode that runs for a mode asked for: bf16 products where the processor has them and activations are bf16.
inline int mode_for(bool int8, int dtype) {
  if (int8) return INT8;
  return dtype == BF && kernels().prepare[BF16] ? BF16 : FP32;
}

// Prepared activations of a tile of T tokens: dwords [units][dwords per unit][T], then xs and xz [groups][T].
struct Tile {
  int count = 0;         // tokens
  int32_t* x = nullptr;
  float *xs = nullptr, *xz = nullptr;

  static size_t floats(int mode, int groups, int units, int count) {  // 4-byte words it takes
    return static_cast<size_t>(count) * groups * (static_cast<size_t>(units) * dwords(mode) + 2);
  }
  Tile() = default;
  Tile(float* memory, int mode, int groups, int units, int count_) : count(count_) {
    x = reinterpret_cast<int32_t*>(memory);
    xs = memory + static_cast<size_t>(count) * groups * units * dwords(mode);
    xz = xs + static_cast<size_t>(count) * groups;
  }
  // Group g of token t of the tile, `size` values at `from`.
  void fill(int mode, int units, int g, int t, const float* from) const {
    int32_t* q = x + static_cast<size_t>(g) * units * dwords(mode) * count + t;
    kernels().prepare[mode](from, units * UNIT, q, count, xs + g * count + t, xz + g * count + t);
  }
  void multiply(const Matrix& m, int mode, const uint8_t* block, float* y) const;
};

// The index in TILES of the largest tile for `rest` tokens.
int tile_index(int mode, int bits, int rest);

}  // namespace mcmoe
