# SPDX-License-Identifier: Apache-2.0
"""Rounds a packed matrix plus a change to the same width again.

Knows one matrix and its bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from transformers_mcmoe.quantization import pack, quantize
from transformers_mcmoe.quantization.grid import Quantized, nearest
from transformers_mcmoe.quantization.packing import unpack


def requantized(packed: Tensor, bits: int, in_features: int, change: Tensor) -> tuple[Tensor, float]:
    """Bytes of `packed + change`, and what rounding loses.

    Every group takes the better of two grids, in squared error: the one it has, so that a group that is not changed keeps its
    bytes, and one fitted anew (`quantize`).

    Args:
        packed: [out, n, G * bits / 8 + 4] uint8.
        bits: its width.
        in_features: its columns.
        change: [out, in_features] float32.

    Returns:
        The new bytes, and the sum of squared differences to `packed + change`, over the matrix.

    Raises:
        ValueError: a value of the change is not finite.
    """
    old = unpack(packed, bits, in_features)
    weight = old.dequantize() + change
    size = old.codes.shape[-1]
    new = quantize(weight, bits, size)
    groups = functional.pad(weight, (0, -in_features % size)).unflatten(1, (-1, size))
    kept = Quantized(nearest(groups.clone(), old.scale, old.zero, bits), old.scale, old.zero, bits, in_features)
    better = (_errors(new, weight) < _errors(kept, weight)).unsqueeze(-1)
    codes = torch.where(better, new.codes, kept.codes)
    codes.flatten(1)[:, in_features:] = 0  # padding is code 0
    pick = better.squeeze(-1)
    chosen = Quantized(
        codes, torch.where(pick, new.scale, old.scale), torch.where(pick, new.zero, old.zero), bits, in_features
    )
    return pack(chosen), float(_errors(chosen, weight).sum(dtype=torch.float64))


def _errors(quantized: Quantized, weight: Tensor) -> Tensor:
    """Squared errors [out, n] of groups."""
    size = quantized.codes.shape[-1]
    error = functional.pad(quantized.dequantize() - weight, (0, -quantized.in_features % size))
    return error.unflatten(1, (-1, size)).square().sum(-1)
