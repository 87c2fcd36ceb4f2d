// SPDX-License-Identifier: Apache-2.0
#define MCMOE_VNNI
#include "avx512.h"
const mcmoe::Kernels* mcmoe::avx512_vnni_kernels() { return table<Avx512, INT8, INT24>(avx512_kernels()); }
