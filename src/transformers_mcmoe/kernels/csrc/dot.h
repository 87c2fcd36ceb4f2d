// SPDX-License-Identifier: Apache-2.0
// Dot products of packed records with prepared activations, for any vector type V; included once by each isa_*.cpp.
//
// A group's value is scale * (sum_k code_k * x_k - zero * sum_k x_k): codes stay integers, the grid enters once a group.
// Everything is in an unnamed namespace and of the standard library only memcpy is used: two files compiled for different
// instruction sets must not share a function.
#pragma once
#include <string.h>

#include "columns.h"
#include "kernels.h"

#define MCMOE_INLINE inline __attribute__((always_inline))
// loops over registers; templates (`unroll`) only where an index must be a constant, as they compile slowly
#define MCMOE_EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)

namespace mcmoe {
namespace {

constexpr int PREFETCH = 8192;  // bytes ahead; hardware prefetch alone reaches half the bandwidth

template <int N>
struct Int {
  static constexpr int value = N;
  constexpr operator int() const { return N; }
};

template <int N, int I = 0, class F>
MCMOE_INLINE void unroll(F f) {
  if constexpr (I < N) {
    f(Int<I>());
    unroll<N, I + 1>(f);
  }
}

// ---- codes of a unit: f(j, w) for j = 0..7, w[parts] with the codes of columns 4j..4j+3 in the bytes of each row's dword

// What is above the code in each byte is left as it comes.
template <class V, int B, class F>
MCMOE_INLINE void raw_codes(const uint8_t* const (&p)[V::parts], F f) {
  typename V::I z[V::parts], w[V::parts];
  if constexpr (B == 3) {
    typename V::I high[V::parts];
    MCMOE_EACH(q, V::parts) { high[q] = V::load(p[q] + 128); }
    unroll<2>([&](auto e) MCMOE_LAMBDA {
      MCMOE_EACH(q, V::parts) { z[q] = V::load(p[q] + 64 * e); }
      unroll<4>([&](auto s) MCMOE_LAMBDA {
        constexpr int E = decltype(e)::value, S = decltype(s)::value;
        MCMOE_EACH(q, V::parts) {
          auto h = S == 3 ? V::template left<(S == 3 ? 2 - E : 0)>(high[q])
                          : V::template right<(S == 3 ? 0 : 2 * S + E)>(high[q]);
          w[q] = V::template select<3>(V::template right<2 * S>(z[q]), h);
        }
        f(Int<4 * E + S>(), w);
      });
    });
  } else {
    unroll<B>([&](auto i) MCMOE_LAMBDA {
      MCMOE_EACH(q, V::parts) { z[q] = V::load(p[q] + 64 * i); }
      unroll<8 / B>([&](auto s) MCMOE_LAMBDA {
        constexpr int N = decltype(i)::value, S = decltype(s)::value;
        MCMOE_EACH(q, V::parts) { w[q] = V::template right<B * S>(z[q]); }
        f(Int<8 / B * N + S>(), w);
      });
    });
  }
}

template <class V, int B, class F>
MCMOE_INLINE void codes(const uint8_t* const (&p)[V::parts], F f) {
  raw_codes<V, B>(p, [&](auto j, auto& w) MCMOE_LAMBDA {
    if constexpr (B != 8) MCMOE_EACH(q, V::parts) { w[q] = V::template mask<(1 << B) - 1>(w[q]); }
    f(j, w);
  });
}

// Codes left where they lie in the byte, so that hardly anything is shifted: f(j, c, w) where w is the codes times
// 2^in_place_shift(c); products are summed per class c, and the sums shifted.
template <int B>
constexpr int in_place_classes() { return B == 1 ? 8 : B == 2 ? 4 : B == 3 ? 3 : B == 4 ? 2 : 1; }
template <int B>
constexpr int in_place_shift(int c) { return B == 3 ? 2 * c : B * c; }

template <class V, int B, class F>
MCMOE_INLINE void codes_in_place(const uint8_t* const (&p)[V::parts], F f) {
  typename V::I z[V::parts], w[V::parts];
  if constexpr (B == 3) {
    typename V::I high[V::parts];
    MCMOE_EACH(q, V::parts) { high[q] = V::load(p[q] + 128); }
    unroll<2>([&](auto e) MCMOE_LAMBDA {
      constexpr int E = decltype(e)::value;
      MCMOE_EACH(q, V::parts) { z[q] = V::load(p[q] + 64 * E); }
      typename V::I h[V::parts];
      MCMOE_EACH(q, V::parts) { h[q] = V::template right<E>(high[q]); }
      unroll<4>([&](auto s) MCMOE_LAMBDA {
        constexpr int S = decltype(s)::value, C = S == 3 ? 2 : S, SHIFT = 2 * C;
        MCMOE_EACH(q, V::parts) {
          auto low = S == 3 ? V::template right<2>(z[q]) : z[q];
          auto top = S == 3 ? V::template left<6>(h[q]) : h[q];
          w[q] = V::template mask<(7 << SHIFT)>(V::template select<(3 << SHIFT)>(low, top));
        }
        f(Int<4 * E + S>(), Int<C>(), w);
      });
    });
  } else {
    unroll<B>([&](auto i) MCMOE_LAMBDA {
      MCMOE_EACH(q, V::parts) { z[q] = V::load(p[q] + 64 * i); }
      unroll<8 / B>([&](auto s) MCMOE_LAMBDA {
        constexpr int N = decltype(i)::value, S = decltype(s)::value;
        MCMOE_EACH(q, V::parts) {
          if constexpr (B == 8)
            w[q] = z[q];
          else
            w[q] = V::template mask<(((1 << B) - 1) << (B * S))>(z[q]);
        }
        f(Int<8 / B * N + S>(), Int<S>(), w);
      });
    });
  }
}

// ---- one group's end: f += scale * (sum - zero * xz)

template <class V, int T>
struct Rows {
  typename V::F f[T][V::parts];

  MCMOE_INLINE Rows() {
    MCMOE_EACH(t, T) { MCMOE_EACH(q, V::parts) { f[t][q] = V::zero(); } }
  }
  template <class Sum>
  MCMOE_INLINE void add(const uint8_t* grid, int part, const float* xz, Sum sum) {
    MCMOE_EACH(q, V::parts) {
      const uint8_t* g = grid + 2 * V::L * (part + q);
      const auto scale = V::half(g), zero = V::half(g + 2 * ROWS);
      MCMOE_EACH(t, T) {
        f[t][q] = V::fma(scale, V::fnma(zero, V::set1(xz[t]), sum(t, q)), f[t][q]);
      }
    }
  }
  MCMOE_INLINE void store(float* y, int part) const {
    MCMOE_EACH(t, T) {
      MCMOE_EACH(q, V::parts) { V::store(y + ROWS * t + V::L * (part + q), f[t][q]); }
    }
  }
};

template <class V, int B>
MCMOE_INLINE void unit_of(const uint8_t* record, int unit, int part, const uint8_t* (&p)[V::parts]) {
  MCMOE_EACH(q, V::parts) {
    const int row = V::L * (part + q);
    p[q] = record + (2 * unit + row / 16) * 64 * B + 4 * (row % 16);
  }
}

MCMOE_INLINE void prefetch(const uint8_t* p, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + PREFETCH + i);
}

// Activations in DIGITS digits of 8 bits.
template <class V, int B, int T, int DIGITS>
void dot_integer(const uint8_t* records, int groups, int units, const int32_t* x, const float* xs, const float* xz,
                 float* y) {
  constexpr int EACH = DIGITS * T, IF_IN_PLACE = EACH * in_place_classes<B>();
  // codes stay in place where that leaves registers for more than sums
  constexpr bool IN_PLACE = V::in_place && T <= 2 && B != 8 && IF_IN_PLACE * V::parts <= V::registers * 9 / 16;
  constexpr int CLASSES = IN_PLACE ? in_place_classes<B>() : 1;
  // independent sums, as a product takes several cycles
  constexpr int SUMS = CLASSES * EACH, ROOM = V::registers * 3 / 4 / (SUMS * V::parts);
  constexpr int COPIES = ROOM >= 4 ? 4 : ROOM >= 2 ? 2 : 1;
  const int codes_bytes = units * 128 * B, stride = codes_bytes + 4 * ROWS;
  for (int part = 0; part < ROWS / V::L; part += V::parts) {
    Rows<V, T> rows;
    const uint8_t* record = records;
    const int32_t* a = x;
    for (int g = 0; g < groups; g++, record += stride) {
      typename V::I sums[COPIES][CLASSES][DIGITS][T][V::parts];
      MCMOE_EACH(c, COPIES) {
        MCMOE_EACH(k, CLASSES) {
          MCMOE_EACH(d, DIGITS) {
            MCMOE_EACH(t, T) {
              MCMOE_EACH(q, V::parts) { sums[c][k][d][t][q] = V::izero(); }
            }
          }
        }
      }
      if (part == 0) prefetch(record + codes_bytes, 4 * ROWS);
      for (int u = 0; u < units; u++, a += 8 * EACH) {
        const uint8_t* p[V::parts];
        unit_of<V, B>(record, u, part, p);
        if (part == 0) prefetch(p[0], 128 * B);
        auto multiply = [&](auto j, auto c, auto& w) MCMOE_LAMBDA {
          constexpr int COPY = (CLASSES > 1 ? j / (8 / COPIES) : (int)j) % COPIES;
          MCMOE_EACH(d, DIGITS) {
            MCMOE_EACH(t, T) {
              const auto b = V::broadcast(a + j * EACH + d * T + t);
              MCMOE_EACH(q, V::parts) {
                auto& s = sums[COPY][c][d][t][q];
                s = V::template dot<B == 8>(s, w[q], b);
              }
            }
          }
        };
        if constexpr (IN_PLACE)
          codes_in_place<V, B>(p, multiply);
        else
          codes<V, B>(p, [&](auto j, auto& w) MCMOE_LAMBDA { multiply(j, Int<0>(), w); });
      }
      rows.add(record + codes_bytes, part, xz + g * T, [&](auto t, auto q) MCMOE_LAMBDA {
        typename V::F value = V::zero();
        MCMOE_EACH(i, DIGITS) {
          constexpr int TOP = DIGITS - 1;
          typename V::I total = V::izero();
          MCMOE_EACH(k, CLASSES) {
            typename V::I sum = sums[0][k][TOP - i][t][q];
            MCMOE_EACH(c, COPIES - 1) { sum = V::add(sum, sums[c + 1][k][TOP - i][t][q]); }
            total = V::add(total, IN_PLACE ? V::shift_down(sum, in_place_shift<B>(k)) : sum);
          }
          value = i ? V::fma(value, V::set1(256.f), V::to_float(total)) : V::to_float(total);
        }
        return V::mul(value, V::set1(xs[g * T + t]));
      });
    }
    rows.store(y, part);
  }
}

// Sums in fp32. unit(p, add) calls add(d, values) with the codes of a unit at p that meet the d-th of the unit's DWORDS
// dwords of activations; multiply(sum, value, a) adds one product.
template <class V, int B, int T, int DWORDS, class Multiply, class Unit>
MCMOE_INLINE void dot_float(const uint8_t* records, int groups, int units, const int32_t* x, const float* xz, float* y,
                            Multiply multiply, Unit unit) {
  const int codes_bytes = units * 128 * B, stride = codes_bytes + 4 * ROWS;
  for (int part = 0; part < ROWS / V::L; part += V::parts) {
    Rows<V, T> rows;
    const uint8_t* record = records;
    const int32_t* a = x;
    constexpr int COPIES = T > 2 ? 1 : 4 / T;
    for (int g = 0; g < groups; g++, record += stride) {
      typename V::F sums[COPIES][T][V::parts];
      MCMOE_EACH(c, COPIES) {
        MCMOE_EACH(t, T) {
          MCMOE_EACH(q, V::parts) { sums[c][t][q] = V::zero(); }
        }
      }
      if (part == 0) prefetch(record + codes_bytes, 4 * ROWS);
      for (int u = 0; u < units; u++, a += DWORDS * T) {
        const uint8_t* p[V::parts];
        unit_of<V, B>(record, u, part, p);
        if (part == 0) prefetch(p[0], 128 * B);
        unit(p, [&](int d, const auto& value) MCMOE_LAMBDA {
          MCMOE_EACH(t, T) {
            MCMOE_EACH(q, V::parts) {
              auto& s = sums[d % COPIES][t][q];
              s = multiply(s, value[q], a + d * T + t);
            }
          }
        });
      }
      rows.add(record + codes_bytes, part, xz + g * T, [&](auto t, auto q) MCMOE_LAMBDA {
        auto sum = sums[0][t][q];
        MCMOE_EACH(c, COPIES - 1) { sum = V::fadd(sum, sums[c + 1][t][q]); }
        return sum;
      });
    }
    rows.store(y, part);
  }
}

template <class V, int B, int T>
void dot_fp32(const uint8_t* records, int groups, int units, const int32_t* x, const float*, const float* xz,
              float* y) {
  auto multiply = [](auto sum, auto value, const int32_t* a) MCMOE_LAMBDA {
    float b;
    memcpy(&b, a, 4);
    return V::fma(value, V::set1(b), sum);
  };
  dot_float<V, B, T, 32>(records, groups, units, x, xz, y, multiply, [](auto& p, auto add) MCMOE_LAMBDA {
    raw_codes<V, B>(p, [&](auto j, auto& w) MCMOE_LAMBDA {
      unroll<4>([&](auto b) MCMOE_LAMBDA {
        typename V::F value[V::parts];
        MCMOE_EACH(q, V::parts) { value[q] = V::template byte_to_float<B, decltype(b)::value>(w[q]); }
        add(4 * j + b, value);
      });
    });
  });
}

// Pairs of bf16: a dword of activations holds columns (4j, 4j + 2) or (4j + 1, 4j + 3).
template <class V, int B, int T>
void dot_bf16(const uint8_t* records, int groups, int units, const int32_t* x, const float*, const float* xz,
              float* y) {
  const auto table = V::template bf16_table<B>();
  auto multiply = [](auto sum, auto value, const int32_t* a) MCMOE_LAMBDA {
    return V::dot_bf16(sum, value, V::broadcast(a));
  };
  dot_float<V, B, T, 16>(records, groups, units, x, xz, y, multiply, [&](auto& p, auto add) MCMOE_LAMBDA {
    raw_codes<V, B>(p, [&](auto j, auto& w) MCMOE_LAMBDA {
      unroll<2>([&](auto h) MCMOE_LAMBDA {
        // 8-bit codes: the high nibble's table holds multiples of 16
        unroll<(B == 8 ? 2 : 1)>([&](auto n) MCMOE_LAMBDA {
          typename V::I value[V::parts];
          MCMOE_EACH(q, V::parts) {
            value[q] = V::template bf16_codes<B, decltype(h)::value, decltype(n)::value>(w[q], table);
          }
          add(2 * j + h, value);
        });
      });
    });
  });
}

// The kernel for T tokens where there are registers for that many.
template <class V, Mode M, int B, int T>
void add(Dot& dot) {
  if constexpr (T <= V::largest_tile && (M != INT24 || 3 * T * V::parts <= V::registers * 3 / 4)) {
    if constexpr (M == INT8) dot = dot_integer<V, B, T, 1>;
    if constexpr (M == INT24) dot = dot_integer<V, B, T, 3>;
    if constexpr (M == FP32) dot = dot_fp32<V, B, T>;
    if constexpr (M == BF16) dot = dot_bf16<V, B, T>;
  }
}

// ---- activations, in vectors of 16 values of the compiler's own, which it cuts as the processor needs

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int8_t Bytes __attribute__((vector_size(16)));
constexpr int LANES = 16, PIECE = 512;  // a piece is prepared together; groups are multiples of 32

template <class To, class From>
MCMOE_INLINE To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

MCMOE_INLINE Floats load_floats(const float* x) {
  Floats v;
  memcpy(&v, x, sizeof v);
  return v;
}

// Sum of the lanes in a fixed order.
inline float sum_lanes(const Floats& v) {
  float half[LANES / 2];
  for (int l = 0; l < LANES / 2; l++) half[l] = v[l] + v[l + LANES / 2];
  return ((half[0] + half[4]) + (half[1] + half[5])) + ((half[2] + half[6]) + (half[3] + half[7]));
}

inline void spread(const void* from, int count, int32_t* q, int stride) {
  if (stride == 1) {
    memcpy(q, from, 4 * static_cast<size_t>(count));
    return;
  }
  for (int d = 0; d < count; d++) memcpy(q + static_cast<long>(d) * stride, static_cast<const char*>(from) + 4 * d, 4);
}

inline float largest_magnitude(const float* x, int size) {
  Ints most = {};  // magnitudes as integers, whose order is the same
  for (int i = 0; i < size; i += LANES) {
    const Ints a = as<Ints>(load_floats(x + i)) & 0x7fffffff;
    most = a > most ? a : most;
  }
  int32_t top = 0;
  for (int l = 0; l < LANES; l++) top = most[l] > top ? most[l] : top;
  return as<float>(top);
}

inline void prepare_int8(const float* x, int size, int32_t* q, int stride, float* xs, float* xz) {
  const float largest = largest_magnitude(x, size), inverse = largest > 0 ? 127.f / largest : 0.f;
  Ints sums = {};
  alignas(64) int8_t bytes[PIECE];
  for (int start = 0; start < size; start += PIECE) {
    const int n = size - start < PIECE ? size - start : PIECE;
    for (int i = 0; i < n; i += LANES) {
      // adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even
      const Floats rounded = (load_floats(x + start + i) * inverse + 12582912.f) - 12582912.f;
      const Ints value = __builtin_convertvector(rounded, Ints);
      sums += value;
      const Bytes narrow = __builtin_convertvector(value, Bytes);
      memcpy(bytes + i, &narrow, sizeof narrow);
    }
    spread(bytes, n / 4, q + static_cast<long>(start / 4) * stride, stride);
  }
  int32_t sum = 0;
  for (int l = 0; l < LANES; l++) sum += sums[l];
  *xs = largest / 127.f;
  *xz = *xs * static_cast<float>(sum);
}

// The largest magnitude becomes 127 in the highest of three digits, so that rounding cannot carry beyond it.
inline void prepare_int24(const float* x, int size, int32_t* q, int stride, float* xs, float* xz) {
  constexpr float MOST = 127.f * 65536.f;
  const float largest = largest_magnitude(x, size), inverse = largest > 0x1p-100f ? MOST / largest : 0.f;
  int64_t sum = 0;
  alignas(64) int8_t bytes[3][PIECE];
  for (int start = 0; start < size; start += PIECE) {
    const int n = size - start < PIECE ? size - start : PIECE;
    Ints sums = {};
    for (int i = 0; i < n; i += LANES) {
      const Floats scaled = load_floats(x + start + i) * inverse;
      Ints value = __builtin_convertvector(scaled + (scaled < 0 ? Floats{} - 0.5f : Floats{} + 0.5f), Ints);
      sums += value;
      for (int d = 0; d < 3; d++) {
        const Bytes digit = __builtin_convertvector(value, Bytes);
        memcpy(bytes[d] + i, &digit, sizeof digit);
        value = (value - __builtin_convertvector(digit, Ints)) >> 8;
      }
    }
    for (int d = 0; d < 3; d++) spread(bytes[d], n / 4, q + (3 * static_cast<long>(start / 4) + d) * stride, 3 * stride);
    for (int l = 0; l < LANES; l++) sum += sums[l];
  }
  *xs = largest / MOST;
  *xz = *xs * static_cast<float>(sum);
}

inline void prepare_fp32(const float* x, int size, int32_t* q, int stride, float*, float* xz) {
  Floats sums = {};
  for (int i = 0; i < size; i += LANES) sums += load_floats(x + i);
  spread(x, size, q, stride);
  *xz = sum_lanes(sums);
}

inline void prepare_bf16(const float* x, int size, int32_t* q, int stride, float*, float* xz) {
  Floats sums = {};
  alignas(64) uint32_t wide[PIECE], pairs[PIECE / 2];
  for (int start = 0; start < size; start += PIECE) {
    const int n = size - start < PIECE ? size - start : PIECE;
    for (int i = 0; i < n; i += LANES) {
      const Words bits = as<Words>(load_floats(x + start + i));
      const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
      const Words value = (bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : rounded;  // NaN stays NaN
      sums += as<Floats>(value & 0xffff0000u);
      memcpy(wide + i, &value, sizeof value);
    }
    for (int j = 0; j < n / 4; j++)
      for (int h = 0; h < 2; h++) pairs[2 * j + h] = wide[4 * j + h] >> 16 | (wide[4 * j + 2 + h] & 0xffff0000u);
    spread(pairs, n / 2, q + static_cast<long>(start / 2) * stride, stride);
  }
  *xz = sum_lanes(sums);
}

// ---- tables

// Adds the kernels of some modes to a table that starts as a copy of `base`, or empty.
template <class V, Mode... M>
const Kernels* table(const Kernels* base = nullptr) {
  static const Kernels kernels = [base] {
    Kernels k = base ? *base : Kernels{};
    unroll<NUM_WIDTHS>([&](auto w) MCMOE_LAMBDA {
      unroll<NUM_TILES>([&](auto t) MCMOE_LAMBDA {
        constexpr int B = WIDTHS[decltype(w)::value], T = TILES[decltype(t)::value];
        (add<V, M, B, T>(k.dot[M][w][t]), ...);
      });
    });
    constexpr Prepare PREPARE[] = {prepare_int8, prepare_bf16, prepare_fp32, prepare_int24};
    ((k.prepare[M] = PREPARE[M]), ...);
    k.grid_errors = grid_errors_of;
    k.round_columns = round_columns_of;
    k.descend_columns = descend_columns_of;
    return k;
  }();
  return &kernels;
}

}  // namespace
}  // namespace mcmoe
