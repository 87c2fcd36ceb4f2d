# SPDX-License-Identifier: Apache-2.0
"""The meaning of the operators, in plain torch on any device: unpack one matrix, multiply, forget it.

Every faster backend is tested against this file. It knows nothing of dispatch or autograd (see `ops`).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from transformers_mcmoe.quantization.packing import dequantize


def packed_linear(x: Tensor, qweight: Tensor, bias: Tensor | None, bits: int, in_features: int) -> Tensor:
    """`x @ W.T + bias` [.., out] with W rebuilt in fp32 and rounded to the dtype of `x`."""
    return functional.linear(x, dequantize(qweight, bits, in_features, x.dtype), bias)


def packed_linear_input_gradient(gradient: Tensor, qweight: Tensor, bits: int, in_features: int) -> Tensor:
    """`gradient @ W` [.., in], the gradient of `packed_linear` with respect to `x`."""
    return gradient @ dequantize(qweight, bits, in_features, gradient.dtype)
