# SPDX-License-Identifier: Apache-2.0
"""A matrix whose codes and grids are learned: real-valued codes that are rounded on use, moved by signs of gradients.

Knows one matrix and the gradient by what it stands for; the loss is its caller's. The method is that of SignRound (Cheng
et al., arXiv 2309.05516), started from GPTQ's codes instead of rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from transformers_mcmoe.quantization.grid import Quantized, round_codes, to_fp16

# how far a real-valued code starts from GPTQ's code towards the weight itself, at most: it stays nearest to that code
_LEAN = 0.45


class Latent:
    """Learnable codes and grids of one matrix.

    Args:
        weight: [out, in] the dense matrix.
        start: its codes and grids to begin with.
    """

    def __init__(self, weight: Tensor, start: Quantized) -> None:
        self._start = start
        self._scale, self._zero = start.scale.clone(), start.zero.clone()
        codes = start.codes.to(torch.float32)
        padding = codes.shape[1] * codes.shape[2] - start.in_features
        dense = functional.pad(weight.to(torch.float32), (0, padding)).view_as(codes)
        inverse = torch.where(self._scale > 0, self._scale.reciprocal(), 0.0).unsqueeze(-1)
        wanted = torch.addcmul(self._zero.unsqueeze(-1), dense, inverse)
        self._values = codes + (wanted - codes).clamp_(-_LEAN, _LEAN)

    def weight(self) -> Tensor:
        """What the matrix stands for now, [out, in] float32."""
        codes = round_codes(self._values.clone(), self._start.bits)
        rebuilt = codes.sub_(self._zero.unsqueeze(-1)).mul_(self._scale.unsqueeze(-1))
        return rebuilt.flatten(1)[:, : self._start.in_features]

    def step(self, gradient: Tensor, rate: float, grid_rate: float) -> None:
        """Move against the signs of a gradient.

        Args:
            gradient: [out, in] float32, of the loss by `weight`.
            rate: how far codes move, in codes.
            grid_rate: how far scales move, as a share of theirs; zeros move by as much of a code.
        """
        top = 2.0**self._start.bits - 1
        padding = self._values.shape[1] * self._values.shape[2] - self._start.in_features
        grouped = functional.pad(gradient, (0, padding)).view_as(self._values)
        codes = round_codes(self._values.clone(), self._start.bits)
        by_scale = (codes.sub_(self._zero.unsqueeze(-1)).mul_(grouped)).sum(-1)
        by_zero = -grouped.sum(-1)
        # codes at an end of the grid stay in reach of it
        self._values.sub_(grouped.sign().mul_(rate)).clamp_(-0.5, top + 0.5)
        self._scale *= 1 - grid_rate * by_scale.sign()
        self._zero -= grid_rate * by_zero.sign()

    def quantized(self) -> Quantized:
        """Codes and grids, with scales and zeros as they are stored."""
        codes = round_codes(self._values.clone(), self._start.bits).to(torch.uint8)
        padding = codes.shape[1] * codes.shape[2] - self._start.in_features
        if padding:
            codes[:, -1, codes.shape[2] - padding :] = 0
        return Quantized(codes, to_fp16(self._scale), to_fp16(self._zero), self._start.bits, self._start.in_features)
