// SPDX-License-Identifier: Apache-2.0
// Vectors of 8 rows: AVX2, FMA and F16C; with MCMOE_VNNI the byte dot product of AVX-VNNI.
#pragma once
#include <immintrin.h>
#define MCMOE_LAMBDA __attribute__((always_inline))
#include "dot.h"

namespace mcmoe {
namespace {

struct Avx2 {
  using I = __m256i;
  using F = __m256;
  static constexpr int L = 8, parts = 1, registers = 16, largest_tile = 4;
#ifdef MCMOE_VNNI
  static constexpr bool in_place = true;
#else
  static constexpr bool in_place = false;  // 16-bit sums would saturate
#endif

  static MCMOE_INLINE I load(const uint8_t* p) {
    I z = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    asm("" : "+x"(z));  // keep it in a register: GCC otherwise loads again for every shift
    return z;
  }
  template <int N>
  static MCMOE_INLINE I right(I z) {
    if constexpr (N == 0) return z;
    return _mm256_srli_epi16(z, N);
  }
  template <int N>
  static MCMOE_INLINE I left(I z) {
    if constexpr (N == 0) return z;
    return _mm256_slli_epi16(z, N);
  }
  template <int M>
  static MCMOE_INLINE I mask(I z) {
    return _mm256_and_si256(z, _mm256_set1_epi8(static_cast<char>(M)));
  }
  template <int M>
  static MCMOE_INLINE I select(I a, I b) {
    const I m = _mm256_set1_epi8(static_cast<char>(M));
    return _mm256_or_si256(_mm256_and_si256(m, a), _mm256_andnot_si256(m, b));
  }
  static MCMOE_INLINE I broadcast(const int32_t* x) { return _mm256_set1_epi32(*x); }
  template <bool WIDE>
  static MCMOE_INLINE I dot(I sum, I w, I x) {
#ifdef MCMOE_VNNI
    return _mm256_dpbusd_avx_epi32(sum, w, x);
#else
    const I one = _mm256_set1_epi16(1);
    if constexpr (!WIDE) return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), one));
    const I low = _mm256_maddubs_epi16(mask<15>(w), x), high = _mm256_maddubs_epi16(mask<15>(right<4>(w)), x);
    const I sixteen = _mm256_set1_epi16(16);
    return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(low, one), _mm256_madd_epi16(high, sixteen)));
#endif
  }
  static MCMOE_INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static MCMOE_INLINE I shift_down(I a, int n) { return _mm256_sra_epi32(a, _mm_cvtsi32_si128(n)); }
  static MCMOE_INLINE I izero() { return _mm256_setzero_si256(); }
  static MCMOE_INLINE F zero() { return _mm256_setzero_ps(); }
  static MCMOE_INLINE F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static MCMOE_INLINE F set1(float a) { return _mm256_set1_ps(a); }
  static MCMOE_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static MCMOE_INLINE F fadd(F a, F b) { return _mm256_add_ps(a, b); }
  static MCMOE_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static MCMOE_INLINE F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
  static MCMOE_INLINE F half(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static MCMOE_INLINE void store(float* y, F f) { _mm256_storeu_ps(y, f); }
  template <int B, int BYTE>
  static MCMOE_INLINE F byte_to_float(I w) {
    const I moved = BYTE ? _mm256_srli_epi32(w, 8 * BYTE) : w;
    if constexpr (B <= 3) {  // an index of 3 bits; the table repeats below
      constexpr int M = (1 << (B & 7)) - 1;
      const F table = _mm256_setr_ps(0 & M, 1 & M, 2 & M, 3 & M, 4 & M, 5 & M, 6 & M, 7 & M);
      return _mm256_permutevar8x32_ps(table, moved);
    }
    return _mm256_cvtepi32_ps(_mm256_and_si256(moved, _mm256_set1_epi32(B == 8 ? 255 : 15)));
  }
};

}  // namespace
}  // namespace mcmoe
