// SPDX-License-Identifier: Apache-2.0
#define MCMOE_VNNI
#define MCMOE_BF16
#include "avx512.h"
const mcmoe::Kernels* mcmoe::avx512_bf16_kernels() { return table<Avx512, BF16>(avx512_vnni_kernels()); }
