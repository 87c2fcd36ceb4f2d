// SPDX-License-Identifier: Apache-2.0
#include "avx2.h"
const mcmoe::Kernels* mcmoe::avx2_kernels() { return table<Avx2, INT8, FP32>(); }
