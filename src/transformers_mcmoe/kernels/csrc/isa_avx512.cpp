// SPDX-License-Identifier: Apache-2.0
#include "avx512.h"
const mcmoe::Kernels* mcmoe::avx512_kernels() { return table<Avx512, INT8, FP32>(); }
