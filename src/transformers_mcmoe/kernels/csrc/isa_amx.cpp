// SPDX-License-Identifier: Apache-2.0
// Many tokens on matrix tiles: AMX (int8 and bf16). Fewer tokens run on AVX512; fp32 products there outrun its bf16 ones
// on the processors that have AMX.
#define MCMOE_VNNI
#define MCMOE_BF16
#include "avx512.h"

namespace mcmoe {
namespace {

constexpr int SIDE = 16;          // rows of a tile, and dwords of a row
constexpr int TILE_BYTES = 1024;

// The compiler does not know what the tile instructions read and write.
MCMOE_INLINE void memory_is_read() { asm volatile("" ::: "memory"); }

// Tiles 0-3: sums of two token tiles and two row tiles; 4, 5: activations; 6, 7: codes. All have 16 rows of 64 bytes.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    Config config{};
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = SIDE;
    memory_is_read();
    _tile_loadconfig(&config);
  }
  ~Tiles() {  // what the caller's libraries had set
    memory_is_read();
    if (before_.palette)
      _tile_loadconfig(&before_);
    else
      _tile_release();
  }

 private:
  struct alignas(64) Config {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  Config before_;
};

// A macro, as the intrinsics want literal numbers.
#define MCMOE_MULTIPLY(sum, a, b)    \
  do {                               \
    if constexpr (M == INT8)         \
      _tile_dpbsud(sum, a, b);       \
    else                             \
      _tile_dpbf16ps(sum, a, b);     \
  } while (0)

// Codes of a group as tiles: [row half][step][16 dwords of columns][16 rows].
template <Mode M, int B>
MCMOE_INLINE void unpack(const uint8_t* record, int units, int steps, uint8_t* to) {
  using V = Avx512;
  const auto table = V::bf16_table<B>();
  if (M == INT8 && units % 2)  // half of the last tile has no columns
    for (int half = 0; half < 2; half++) memset(to + half * steps * TILE_BYTES + (steps - 1) * TILE_BYTES, 0, TILE_BYTES);
  for (int u = 0; u < units; u++) {
    const uint8_t* p[2];
    unit_of<V, B>(record, u, 0, p);
    if constexpr (M == INT8) {
      codes<V, B>(p, [&](auto j, auto& w) MCMOE_LAMBDA {
        MCMOE_EACH(q, 2) { _mm512_store_si512(to + q * steps * TILE_BYTES + (8 * u + j) * 64, w[q]); }
      });
    } else {
      raw_codes<V, B>(p, [&](auto j, auto& w) MCMOE_LAMBDA {
        unroll<2>([&](auto h) MCMOE_LAMBDA {
          constexpr int H = decltype(h)::value;
          MCMOE_EACH(q, 2) {
            __m512i value;
            if constexpr (B == 8) {  // a byte is exact in bf16
              const __m512i even = _mm512_srli_epi32(w[q], 8 * H), byte = _mm512_set1_epi32(255);
              const __m512 low = _mm512_cvtepi32_ps(_mm512_and_si512(even, byte));
              const __m512 high = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(even, 16), byte));
              value = _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_castps_si512(high));
            } else {
              value = V::bf16_codes<B, H, 0>(w[q], table);
            }
            _mm512_store_si512(to + q * steps * TILE_BYTES + (16 * u + 2 * j + h) * 64, value);
          }
        });
      });
    }
  }
}

// Adds a group's sums of up to 32 tokens to their rows of y: y += scale * (sum * xs - zero * xz).
template <Mode M, int T, int PAIR>
MCMOE_INLINE void add_sums(const float (&sums)[4][SIDE][SIDE], const uint8_t* grid, const float* xs, const float* xz,
                           bool first, float* y) {
  const __m512 scale[] = {Avx512::half(grid), Avx512::half(grid + 32)};
  const __m512 zero[] = {Avx512::half(grid + 64), Avx512::half(grid + 96)};
  for (int r = 0; r < PAIR * SIDE; r++) {
    MCMOE_EACH(q, 2) {
      __m512 sum = _mm512_load_ps(sums[2 * (r / SIDE) + q][r % SIDE]);
      if constexpr (M == INT8) sum = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_castps_si512(sum)), _mm512_set1_ps(xs[r]));
      sum = _mm512_fnmadd_ps(zero[q], _mm512_set1_ps(xz[r]), sum);
      float* to = y + ROWS * r + SIDE * q;
      const __m512 before = first ? _mm512_setzero_ps() : _mm512_loadu_ps(to);
      _mm512_storeu_ps(to, _mm512_fmadd_ps(scale[q], sum, before));
    }
  }
}

// x: [groups][T / 16][steps][16 tokens][16 dwords]. The sums of one pair of token tiles are added while the next pair is
// multiplied.
template <Mode M, int B, int T>
void dot_tiles(const uint8_t* records, int groups, int units, const int32_t* x, const float* xs, const float* xz,
               float* y) {
  alignas(64) uint8_t code_tiles[2 * MOST_UNITS * TILE_BYTES];
  alignas(64) float sums[2][4][SIDE][SIDE];
  const int steps = tile_steps(M, units), codes_bytes = units * 128 * B, stride = codes_bytes + 4 * ROWS;
  constexpr int PAIR = T > SIDE ? 2 : 1, PAIRS = T / SIDE / PAIR, TOKENS = PAIR * SIDE;
  const uint8_t *b0 = code_tiles, *b1 = code_tiles + steps * TILE_BYTES, *a0 = reinterpret_cast<const uint8_t*>(x);
  const Tiles tiles;
  auto add = [&](int n) MCMOE_LAMBDA {
    const int g = n / PAIRS, t = n % PAIRS * TOKENS;
    const uint8_t* grid = records + static_cast<size_t>(g) * stride + codes_bytes;
    add_sums<M, T, PAIR>(sums[n % 2], grid, xs + g * T + t, xz + g * T + t, g == 0, y + ROWS * t);
  };
  for (int n = 0; n < groups * PAIRS; n++, a0 += PAIR * steps * TILE_BYTES) {
    if (n % PAIRS == 0) {
      const uint8_t* record = records + static_cast<size_t>(n / PAIRS) * stride;
      for (int i = 0; i < stride; i += 64) __builtin_prefetch(record + stride + i);
      unpack<M, B>(record, units, steps, code_tiles);
      memory_is_read();
    }
    const uint8_t* a1 = a0 + steps * TILE_BYTES;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (PAIR == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int k = 0; k < steps; k++) {
      _tile_loadd(4, a0 + k * TILE_BYTES, 64);
      _tile_loadd(6, b0 + k * TILE_BYTES, 64);
      MCMOE_MULTIPLY(0, 4, 6);
      _tile_loadd(7, b1 + k * TILE_BYTES, 64);
      MCMOE_MULTIPLY(1, 4, 7);
      if constexpr (PAIR == 2) {
        _tile_loadd(5, a1 + k * TILE_BYTES, 64);
        MCMOE_MULTIPLY(2, 5, 6);
        MCMOE_MULTIPLY(3, 5, 7);
      }
    }
    if (n) add(n - 1);
    memory_is_read();
    auto& own = sums[n % 2];
    _tile_stored(0, own[0], 64);
    _tile_stored(1, own[1], 64);
    if constexpr (PAIR == 2) {
      _tile_stored(2, own[2], 64);
      _tile_stored(3, own[3], 64);
    }
    memory_is_read();
  }
  add(groups * PAIRS - 1);
}

template <Mode M>
void add(Kernels& k) {
  unroll<NUM_WIDTHS>([&](auto w) {
    unroll<NUM_TILES>([&](auto t) {
      constexpr int B = WIDTHS[decltype(w)::value], T = TILES[decltype(t)::value];
      if constexpr (T >= SIDE) k.dot[M][w][t] = dot_tiles<M, B, T>;
    });
  });
}

}  // namespace
}  // namespace mcmoe

const mcmoe::Kernels* mcmoe::amx_kernels() {
  static const Kernels kernels = [] {
    Kernels k = *avx512_vnni_kernels();
    k.prepare[BF16] = prepare_bf16;
    add<INT8>(k);
    add<BF16>(k);
    return k;
  }();
  return &kernels;
}
