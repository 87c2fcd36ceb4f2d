// SPDX-License-Identifier: Apache-2.0
#define MCMOE_VNNI
#include "avx2.h"
const mcmoe::Kernels* mcmoe::avx_vnni_kernels() { return table<Avx2, INT8, INT24>(avx2_kernels()); }
