// SPDX-License-Identifier: Apache-2.0
// Vectors of 4 rows: ARMv8.2 with the byte dot product.
#include <arm_neon.h>
#define MCMOE_LAMBDA __attribute__((always_inline))
#include "dot.h"

namespace mcmoe {
namespace {

struct Neon {
  using I = int32x4_t;
  using F = float32x4_t;
  static constexpr int L = 4, parts = 4, registers = 32, largest_tile = 4;
  static constexpr bool in_place = false;  // the dot product is signed: codes up to 127

  static MCMOE_INLINE I load(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
  template <int N>
  static MCMOE_INLINE I right(I z) {
    if constexpr (N == 0) return z;
    else return vreinterpretq_s32_u16(vshrq_n_u16(vreinterpretq_u16_s32(z), N));
  }
  template <int N>
  static MCMOE_INLINE I left(I z) {
    if constexpr (N == 0) return z;
    else return vreinterpretq_s32_u16(vshlq_n_u16(vreinterpretq_u16_s32(z), N));
  }
  template <int M>
  static MCMOE_INLINE I mask(I z) {
    return vandq_s32(z, vreinterpretq_s32_u8(vdupq_n_u8(M)));
  }
  template <int M>  // a where the mask is set, else b
  static MCMOE_INLINE I select(I a, I b) {
    return vbslq_s32(vreinterpretq_u32_u8(vdupq_n_u8(M)), a, b);
  }
  static MCMOE_INLINE I broadcast(const int32_t* x) { return vld1q_dup_s32(x); }
  template <bool WIDE>
  static MCMOE_INLINE I dot(I sum, I w, I x) {
    const int8x16_t values = vreinterpretq_s8_s32(x);
    if constexpr (!WIDE) return vdotq_s32(sum, vreinterpretq_s8_s32(w), values);
    const I high = vdotq_s32(izero(), vreinterpretq_s8_s32(mask<15>(right<4>(w))), values);
    return vaddq_s32(vdotq_s32(sum, vreinterpretq_s8_s32(mask<15>(w)), values), vshlq_n_s32(high, 4));
  }
  static MCMOE_INLINE I add(I a, I b) { return vaddq_s32(a, b); }
  static MCMOE_INLINE I shift_down(I a, int n) { return vshlq_s32(a, vdupq_n_s32(-n)); }
  static MCMOE_INLINE I izero() { return vdupq_n_s32(0); }
  static MCMOE_INLINE F zero() { return vdupq_n_f32(0); }
  static MCMOE_INLINE F to_float(I a) { return vcvtq_f32_s32(a); }
  static MCMOE_INLINE F set1(float a) { return vdupq_n_f32(a); }
  static MCMOE_INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
  static MCMOE_INLINE F fadd(F a, F b) { return vaddq_f32(a, b); }
  static MCMOE_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static MCMOE_INLINE F fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }
  static MCMOE_INLINE F half(const uint8_t* p) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
  }
  static MCMOE_INLINE void store(float* y, F f) { vst1q_f32(y, f); }
  template <int B, int BYTE>
  static MCMOE_INLINE F byte_to_float(I w) {
    uint32x4_t moved = vreinterpretq_u32_s32(w);
    if constexpr (BYTE != 0) moved = vshrq_n_u32(moved, 8 * BYTE);
    return vcvtq_f32_u32(vandq_u32(moved, vdupq_n_u32((1u << B) - 1)));
  }
};

}  // namespace
}  // namespace mcmoe

const mcmoe::Kernels* mcmoe::neon_kernels() { return table<Neon, INT8, INT24, FP32>(); }
