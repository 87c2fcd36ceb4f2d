// SPDX-License-Identifier: Apache-2.0
// The C interface that kernels/cpu.py loads, and the choice of the instruction set.
#include <string.h>

#include <utility>
#include <vector>

#include "drive.h"
#include "moe.h"
#include "pruning.h"
#include "rounding.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#endif

namespace mcmoe {
namespace {

const Kernels* chosen = nullptr;
const char* selected = nullptr;

struct Candidate {
  const char* name;
  bool (*runs)();
  const Kernels* (*table)();  // only where it runs: making it takes instructions of the set
};

#if defined(__x86_64__)
bool has_avx512() { return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"); }
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_bf16() { return has_vnni() && __builtin_cpu_supports("avx512bf16"); }
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// The byte dot product of processors without AVX512. The compiler's list of features is older.
bool has_avx_vnni() {
  unsigned a = 7, b, c = 1, d;
  asm("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return has_avx2() && (a & 1u << 4) != 0;
}

// Asks Linux for the tile registers, which a process may use only then; false where there are none.
bool has_amx() {
#if defined(__linux__)
  unsigned a = 7, b, c = 0, d;
  asm("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const unsigned needed = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;          // ARCH_REQ_XCOMP_PERM
  return has_bf16() && (d & needed) == needed && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return false;
#endif
}
#elif defined(__aarch64__)
bool has_dot_product() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & (1 << 20)) != 0;  // HWCAP_ASIMDDP
#else
  return true;  // every Apple processor of this kind has it
#endif
}
#endif

// Best first.
const Candidate CANDIDATES[] = {
#if defined(MCMOE_ONLY_SCALAR)  // the program of the sanitizers
#elif defined(__x86_64__)
#if defined(MCMOE_AMX)
    {"amx", has_amx, amx_kernels},
#endif
    {"avx512-bf16", has_bf16, avx512_bf16_kernels},
    {"avx512-vnni", has_vnni, avx512_vnni_kernels},
    {"avx512", has_avx512, avx512_kernels},
#if defined(MCMOE_AVX_VNNI)
    {"avx-vnni", has_avx_vnni, avx_vnni_kernels},
#endif
    {"avx2", has_avx2, avx2_kernels},
#elif defined(__aarch64__)
    {"neon", has_dot_product, neon_kernels},
#endif
    {"scalar", [] { return true; }, scalar_kernels},
};

// row: offset in the arena (-1: no matrix), code width, group size, columns.
Matrix matrix(const uint8_t* arena, const int64_t* row) {
  Matrix m;
  if (row[0] >= 0) m.blocks = arena + row[0];
  m.bits = static_cast<int>(row[1]);
  m.group = static_cast<int>(row[2]);
  m.columns = static_cast<int>(row[3]);
  return m;
}

}  // namespace

const Kernels& kernels() { return *chosen; }

}  // namespace mcmoe

using namespace mcmoe;

#define MCMOE_API extern "C" __attribute__((visibility("default")))

// Chooses an instruction set by name, or the best for a null or empty name. Returns the name chosen; null where this
// processor or build does not have it.
MCMOE_API const char* mcmoe_select(const char* name) {
  for (const Candidate& candidate : CANDIDATES) {
    if (name && *name && strcmp(candidate.name, name) != 0) continue;
    if (!candidate.runs()) continue;
    chosen = candidate.table();
    selected = candidate.name;
    return selected;
  }
  return nullptr;
}

MCMOE_API const char* mcmoe_selected() { return selected; }

// Names of the instruction sets that run here, best first, separated by spaces.
MCMOE_API const char* mcmoe_available() {
  static char names[256] = "";
  if (!*names)
    for (const Candidate& candidate : CANDIDATES)
      if (candidate.runs()) {
        if (*names) strcat(names, " ");
        strcat(names, candidate.name);
      }
  return names;
}

// Asks for huge pages under a block of memory whose start is 2 MB aligned.
MCMOE_API void mcmoe_huge_pages(void* start, size_t bytes) {
#if defined(__linux__)
  madvise(start, bytes, MADV_HUGEPAGE);
#else
  (void)start;
  (void)bytes;
#endif
}

MCMOE_API void mcmoe_repack(const uint8_t* packed, int rows, int bits, int group, int groups, int first, int pitch,
                            uint8_t* blocks) {
  repack(packed, rows, bits, group, groups, first, pitch, blocks);
}

// y [tokens, rows] = x [tokens, columns] W^T + bias; dtype of x and y: 0 fp32, 1 bf16, 2 fp16; bias fp32 or null.
MCMOE_API void mcmoe_linear(const uint8_t* blocks, int rows, int columns, int bits, int group, int int8, const void* x,
                            int dtype, int tokens, const float* bias, void* y, int threads) {
  const int64_t row[] = {0, bits, group, columns};
  linear(matrix(blocks, row), rows, int8 != 0, x, dtype, tokens, bias, y, threads);
}

// One MoE layer. layout [experts, parts, 4] int64: a row as `matrix` reads it for gate_up and down, and, where there are
// more parts, for the factors a and b of gate (if gated), up and down. index int64 and weights fp32 [tokens, top_k].
// shape: hidden, inner, top_k, activation, gated.
MCMOE_API void mcmoe_moe(const uint8_t* arena, const int64_t* layout, int experts, int parts, const int* shape, int int8,
                         const void* x, int dtype, int tokens, const int64_t* index, const float* weights, void* out,
                         int threads) {
  const MoeShape moe_shape{shape[0], shape[1], shape[2], shape[3], shape[4] != 0};
  std::vector<Expert> list(experts);
  for (int e = 0; e < experts; e++) {
    const int64_t* row = layout + static_cast<size_t>(4) * parts * e;
    auto next = [&] { return matrix(arena, std::exchange(row, row + 4)); };
    list[e].gate_up = next();
    list[e].down = next();
    if (parts == 2) continue;
    for (Factors* factors : {&list[e].low_gate, &list[e].low_up, &list[e].low_down})
      if (factors != &list[e].low_gate || moe_shape.gated) {
        factors->a = next();
        factors->b = next();
      }
  }
  moe(list.data(), experts, moe_shape, int8 != 0, x, dtype, tokens, index, weights, out, threads);
}

// Expert pruning of a layer's routing (pruning.h). sizes: tokens, top_k, experts, renormalize; tensors: index, weights,
// valid, out_index, out_weights, counts.
Routing routing(const int* sizes, int64_t none, void* const* tensors) {
  return {sizes[0],
          sizes[1],
          sizes[2],
          none,
          sizes[3] != 0,
          static_cast<const int64_t*>(tensors[0]),
          static_cast<const float*>(tensors[1]),
          static_cast<const uint8_t*>(tensors[2]),
          static_cast<int64_t*>(tensors[3]),
          static_cast<float*>(tensors[4]),
          static_cast<int64_t*>(tensors[5])};
}

MCMOE_API void mcmoe_keep_prefixes(const int* sizes, int64_t none, void* const* tensors, const float* units,
                                   const float* scores, int hidden, int rank, float shift, const void* x, int dtype,
                                   int threads) {
  keep_prefixes(routing(sizes, none, tensors), {units, scores, hidden, rank, shift}, x, dtype, threads);
}

MCMOE_API void mcmoe_skip_below(const int* sizes, int64_t none, void* const* tensors, const float* levels,
                                const uint8_t* whole, int threads) {
  skip_below(routing(sizes, none, tensors), levels, whole, threads);
}

// Columns of a batch of groups (rounding.h). sizes: batch, columns, rows, bits.
MCMOE_API void mcmoe_grid_errors(const int* sizes, const float* values, const float* inverse, const float* zero,
                                 int candidates, float* errors, int threads) {
  grid_errors({sizes[0], sizes[1], sizes[2], sizes[3]}, values, inverse, zero, candidates, errors, threads);
}

MCMOE_API void mcmoe_round_columns(const int* sizes, const float* values, const float* feedback, const float* diagonal,
                                   float* codes, float* errors, float* loss, int threads) {
  round_columns({sizes[0], sizes[1], sizes[2], sizes[3]}, values, feedback, diagonal, codes, errors, loss, threads);
}

MCMOE_API void mcmoe_descend_columns(const int* sizes, const float* metric, float* codes, float* gradients, int sweeps,
                                     int threads) {
  descend_columns({sizes[0], sizes[1], sizes[2], sizes[3]}, metric, codes, gradients, sweeps, threads);
}
