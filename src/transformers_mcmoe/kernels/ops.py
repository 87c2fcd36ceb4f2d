# SPDX-License-Identifier: Apache-2.0
"""Schemas, fake implementations and gradients of `torch.ops.mcmoe.*`; the mathematics is in `reference`.

Codes are fixed: gradients go to the input and the bias, never to the packed matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformers_mcmoe.kernels import reference


@torch.library.custom_op("mcmoe::packed_linear", mutates_args=())
def packed_linear(x: Tensor, qweight: Tensor, bias: Tensor | None, bits: int, in_features: int) -> Tensor:
    """Linear layer over a packed matrix.

    Args:
        x: [.., in_features] float, any number of rows, 0 included.
        qweight: [out, n, G * bits / 8 + 4] uint8 (`quantization.packing`).
        bias: [out] in the dtype of `x`, or None.
        bits: code width, 1, 2, 3, 4 or 8.
        in_features: columns of the matrix before padding.

    Returns:
        [.., out] in the dtype of `x`.
    """
    return reference.packed_linear(x, qweight, bias, bits, in_features)


@packed_linear.register_fake
def _packed_linear_fake(x: Tensor, qweight: Tensor, bias: Tensor | None, bits: int, in_features: int) -> Tensor:
    torch._check(x.shape[-1] == in_features, lambda: f"x has {x.shape[-1]} columns, the matrix has {in_features}.")
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int, int], output: Tensor) -> None:
    _, qweight, _, ctx.bits, ctx.in_features = inputs
    ctx.save_for_backward(qweight)


def _packed_linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
    (qweight,) = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = reference.packed_linear_input_gradient(gradient, qweight, ctx.bits, ctx.in_features)
    if ctx.needs_input_grad[2]:
        dbias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return dx, None, dbias, None, None


packed_linear.register_autograd(_packed_linear_backward, setup_context=_setup_context)
