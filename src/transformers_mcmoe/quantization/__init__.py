# SPDX-License-Identifier: Apache-2.0
"""Group grids, GPTQ and the packed record: how a float matrix becomes bytes. Knows nothing of modules or models."""

from transformers_mcmoe.quantization.gptq import Factor, gptq
from transformers_mcmoe.quantization.grid import Grid, Quantized, group_size_for, num_groups, quantize
from transformers_mcmoe.quantization.packing import WIDTHS, dequantize, pack, packed_shape, unpack

__all__ = [
    "WIDTHS",
    "Factor",
    "Grid",
    "Quantized",
    "dequantize",
    "gptq",
    "group_size_for",
    "num_groups",
    "pack",
    "packed_shape",
    "quantize",
    "unpack",
]
