// SPDX-License-Identifier: Apache-2.0
// Vectors of 16 rows: AVX512 F and BW; with MCMOE_VNNI and MCMOE_BF16 the dot products of those extensions.
#pragma once
#include <immintrin.h>
#define MCMOE_LAMBDA __attribute__((always_inline))
#include "dot.h"

namespace mcmoe {
namespace {

struct Avx512 {
  using I = __m512i;
  using F = __m512;
  static constexpr int L = 16, parts = 2, registers = 32, largest_tile = 8;
#ifdef MCMOE_VNNI
  static constexpr bool in_place = true;
#else
  static constexpr bool in_place = false;  // 16-bit sums would saturate
#endif

  static MCMOE_INLINE I load(const uint8_t* p) {
    I z = _mm512_loadu_si512(p);
    asm("" : "+v"(z));  // keep it in a register: GCC otherwise loads again for every shift
    return z;
  }
  template <int N>
  static MCMOE_INLINE I right(I z) {
    if constexpr (N == 0) return z;
    return _mm512_srli_epi16(z, N);
  }
  template <int N>
  static MCMOE_INLINE I left(I z) {
    if constexpr (N == 0) return z;
    return _mm512_slli_epi16(z, N);
  }
  template <int M>
  static MCMOE_INLINE I mask(I z) {
    return _mm512_and_si512(z, _mm512_set1_epi8(static_cast<char>(M)));
  }
  template <int M>  // a where the mask is set, else b
  static MCMOE_INLINE I select(I a, I b) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(static_cast<char>(M)), a, b, 0xCA);
  }
  static MCMOE_INLINE I broadcast(const int32_t* x) { return _mm512_set1_epi32(*x); }
  template <bool WIDE>  // unsigned codes, signed activations; WIDE: codes above 127
  static MCMOE_INLINE I dot(I sum, I w, I x) {
#ifdef MCMOE_VNNI
    return _mm512_dpbusd_epi32(sum, w, x);
#else
    const I one = _mm512_set1_epi16(1);
    if constexpr (!WIDE) return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), one));
    const I low = _mm512_maddubs_epi16(mask<15>(w), x), high = _mm512_maddubs_epi16(mask<15>(right<4>(w)), x);
    const I sixteen = _mm512_set1_epi16(16);
    return _mm512_add_epi32(sum, _mm512_add_epi32(_mm512_madd_epi16(low, one), _mm512_madd_epi16(high, sixteen)));
#endif
  }
  static MCMOE_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static MCMOE_INLINE I shift_down(I a, int n) { return _mm512_sra_epi32(a, _mm_cvtsi32_si128(n)); }
  static MCMOE_INLINE I izero() { return _mm512_setzero_si512(); }
  static MCMOE_INLINE F zero() { return _mm512_setzero_ps(); }
  static MCMOE_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static MCMOE_INLINE F set1(float a) { return _mm512_set1_ps(a); }
  static MCMOE_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static MCMOE_INLINE F fadd(F a, F b) { return _mm512_add_ps(a, b); }
  static MCMOE_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static MCMOE_INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  static MCMOE_INLINE F half(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static MCMOE_INLINE void store(float* y, F f) { _mm512_storeu_ps(y, f); }

  // Column `BYTE` of a dword of codes, as a float; what is above the code in the byte is ignored.
  template <int B, int BYTE>
  static MCMOE_INLINE F byte_to_float(I w) {
    if constexpr (B == 8) {
      const I moved = BYTE ? _mm512_srli_epi32(w, 8 * BYTE) : w;
      return _mm512_cvtepi32_ps(_mm512_and_si512(moved, _mm512_set1_epi32(255)));
    }
    constexpr int M = (1 << (B & 7)) - 1;  // a table repeats, so that upper index bits do not matter
    const F table = _mm512_setr_ps(0 & M, 1 & M, 2 & M, 3 & M, 4 & M, 5 & M, 6 & M, 7 & M, 8 & M, 9 & M, 10 & M, 11 & M,
                                   12 & M, 13 & M, 14 & M, 15 & M);
    return _mm512_permutexvar_ps(BYTE ? _mm512_srli_epi32(w, 8 * BYTE) : w, table);
  }

#ifdef MCMOE_BF16
  struct Table {
    I low, high;
  };
  template <int B>
  static Table bf16_table() {
    alignas(64) uint16_t low[32], high[32];
    for (int e = 0; e < 32; e++) {
      const float value = static_cast<float>(e & (B == 8 ? 15 : (1 << (B & 7)) - 1)), wide = 16.f * value;
      uint32_t bits;
      memcpy(&bits, &value, 4);
      low[e] = static_cast<uint16_t>(bits >> 16);
      memcpy(&bits, &wide, 4);
      high[e] = static_cast<uint16_t>(bits >> 16);
    }
    return {_mm512_load_si512(low), _mm512_load_si512(high)};
  }
  // Columns (0, 2) for H = 0 or (1, 3) for H = 1 of a dword of codes as bf16; NIBBLE 1: the high nibble of 8 bits.
  template <int B, int H, int NIBBLE>
  static MCMOE_INLINE I bf16_codes(I w, const Table& table) {
    I index = H || NIBBLE ? _mm512_srli_epi16(w, 8 * H + 4 * NIBBLE) : w;
    // an index has 5 bits; the table repeats what is below, but a bit of a neighbouring nibble must go
    if constexpr (B == 8) index = mask<15>(index);
    return _mm512_permutexvar_epi16(index, NIBBLE ? table.high : table.low);
  }
  static MCMOE_INLINE F dot_bf16(F sum, I w, I x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
#endif
};

}  // namespace
}  // namespace mcmoe
