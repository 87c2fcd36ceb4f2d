# SPDX-License-Identifier: Apache-2.0
"""A packed matrix whose grids are trained; its codes are fixed.

With codes c, scale s and zero z of a group, w = (c - z) s. A gradient G of the weights gives the scale sum G (c - z)
over the group, and the zero -s sum G. Knows one matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from transformers_mcmoe.nn import PackedLinear
from transformers_mcmoe.quantization import Quantized, pack, unpack
from transformers_mcmoe.quantization.grid import to_fp16

# a scale keeps at least this share of its value: its sign must not turn
LEAST = 0.1


class TunedLinear(nn.Module):
    """A `PackedLinear` with grids that take gradients; what it computes with is what `store` would write, before fp16.

    Args:
        base: the packed matrix; it is not changed before `store`.
        zeros: train zeros, too.

    Attributes:
        base: as given.
        factor: [out, n] float32 parameter, scales are multiplied by it.
        shift: [out, n] float32 parameter, added to zeros, in codes.
    """

    def __init__(self, base: PackedLinear, zeros: bool = True) -> None:
        super().__init__()
        assert base.weight is not None
        self.base = base
        grid = unpack(base.weight.data, base.bits, base.in_features)
        self._scale, self._zero = grid.scale, grid.zero
        self.factor = nn.Parameter(torch.ones_like(grid.scale))
        self.shift = nn.Parameter(torch.zeros_like(grid.zero), requires_grad=zeros)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero [out, n] float32 as they are now."""
        return self._scale * self.factor.clamp(min=LEAST), self._zero + self.shift

    def forward(self, x: Tensor) -> Tensor:
        """[.., in_features] -> [.., out_features], in the dtype of `x`, or autocast's."""
        base = self.base
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _Product.apply(x, *self.grid(), base.weight, base.bits, base.in_features)
        return y if base.bias is None else y + base.bias.to(y.dtype)

    @torch.no_grad()
    def store(self) -> None:
        """Write the grids into the packed matrix."""
        base = self.base
        own = unpack(base.weight.data, base.bits, base.in_features)  # type: ignore[union-attr]
        scale, zero = (to_fp16(part) for part in self.grid())
        base.write(pack(Quantized(own.codes, scale, zero, own.bits, own.in_features)))


class _Product(torch.autograd.Function):
    """x W^T with W rebuilt from codes and grids, once forward and once backward: it is never kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, packed: Tensor, bits: int, in_features: int
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero, packed)
        ctx.form = bits, in_features
        codes = unpack(packed, bits, in_features).codes
        return functional.linear(x, Quantized(codes, scale, zero, bits, in_features).dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, scale, zero, packed) = gradients, ctx.saved_tensors
        bits, in_features = ctx.form
        codes = unpack(packed, bits, in_features).codes
        dx = dscale = dzero = None
        if ctx.needs_input_grad[0]:
            dx = gradient @ Quantized(codes, scale, zero, bits, in_features).dequantize(gradient.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            weights = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).to(torch.float32)
            groups = functional.pad(weights, (0, codes.shape[1] * codes.shape[2] - in_features)).view(codes.shape)
            total = groups.sum(-1)
            dscale = (groups * codes).sum(-1) - zero * total
            dzero = -scale * total
        return dx, dscale, dzero, None, None, None
