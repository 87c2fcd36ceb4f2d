// SPDX-License-Identifier: Apache-2.0
// What the operators share: reading activations, tiles of tokens, writing results.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>

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
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const uint32_t value = (bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : rounded;  // NaN stays NaN
  return static_cast<uint16_t>(value >> 16);
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

// Prepared activations of a tile of tokens, as Dot reads them.
struct Tile {
  int count = 0, mode = FP32;  // tokens; how they are prepared
  int groups = 0, units = 0;   // of the matrices that they meet
  int32_t* x = nullptr;
  float *xs = nullptr, *xz = nullptr;

  // The largest tile for `rest` tokens that the chosen instruction set has for all the matrices that there are, without
  // its memory.
  static Tile choose(bool int8, int dtype, int rest, std::initializer_list<const Matrix*> matrices);
  // The same tokens, prepared for a matrix; `words` 4-byte words from `memory` on are its own.
  Tile(const Tile& shape, const Matrix& m, float* memory = nullptr);
  Tile() = default;

  size_t words() const { return (codes() + 2 * static_cast<size_t>(count) * groups + 15) / 16 * 16; }  // whole cache lines
  // Group g of token t of the tile, `units * UNIT` values at `from`.
  void fill(int g, int t, const float* from) const;
  void multiply(const Matrix& m, const uint8_t* block, float* y) const;

 private:
  bool in_matrix_tiles() const { return count >= FIRST_MATRIX_TILE; }
  size_t codes() const;
};

}  // namespace mcmoe
