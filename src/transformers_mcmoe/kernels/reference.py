# SPDX-License-Identifier: Apache-2.0
"""The meaning of the operators, in plain torch on any device: unpack one matrix, multiply, forget it.

Every faster backend is tested against this file. It knows nothing of dispatch or autograd (see `ops`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from transformers_mcmoe.quantization.packing import dequantize

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
# one expert's matrices as functions of their input: gate (None where there is none), up, down
Apply = Callable[[Tensor], Tensor]
Projections = tuple[Apply | None, Apply, Apply]


@dataclass(frozen=True)
class Layer:
    """The experts of a MoE layer; the fields are arguments of `ops.moe_mlp`."""

    qweights: Sequence[Tensor]
    layout: Tensor
    low_rank_a: Sequence[Tensor]
    low_rank_b: Sequence[Tensor]
    inner: int
    activation: str
    gated: bool


def packed_linear(x: Tensor, qweight: Tensor, bias: Tensor | None, bits: int, in_features: int) -> Tensor:
    """`x @ W.T + bias` [.., out] with W rebuilt in fp32 and rounded to the dtype of `x`."""
    return functional.linear(x, dequantize(qweight, bits, in_features, x.dtype), bias)


def packed_linear_input_gradient(gradient: Tensor, qweight: Tensor, bits: int, in_features: int) -> Tensor:
    """`gradient @ W` [.., in], the gradient of `packed_linear` with respect to `x`."""
    return gradient @ dequantize(qweight, bits, in_features, gradient.dtype)


def moe_mlp(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    layer: Layer,
) -> Tensor:
    """Combined output [T, H] of a MoE layer (`ops.moe_mlp`): summed in fp32 or wider over the experts, lowest id first."""
    output = torch.zeros(x.shape, dtype=_sum_dtype(x), device=x.device)
    for token, slot, expert in _routed(x, index, layer):
        y = _expert(x[token], expert, layer.activation)
        output = output.index_add(0, token, (y * weights[token, slot, None]).to(output.dtype))
    return output.to(x.dtype)


def moe_mlp_gradients(
    gradient: Tensor,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    layer: Layer,
) -> tuple[Tensor, Tensor]:
    """Gradients of `moe_mlp` with respect to `x` [T, H] and `weights` [T, K]; one expert is unpacked at a time."""
    dx = torch.zeros(x.shape, dtype=_sum_dtype(x), device=x.device)
    dweights = torch.zeros_like(weights)
    for token, slot, expert in _routed(x, index, layer):
        with torch.enable_grad():
            own = x[token].detach().requires_grad_()
            y = _expert(own, expert, layer.activation)
        dy = gradient[token]
        scale = weights[token, slot, None]
        (down,) = torch.autograd.grad(y, own, (dy * scale).to(y.dtype))
        dx = dx.index_add(0, token, down.to(dx.dtype))
        share = (y.detach().to(dx.dtype) * dy.to(dx.dtype)).sum(-1)
        dweights = dweights.index_put((token, slot), share.to(dweights.dtype), accumulate=True)
    return dx.to(x.dtype), dweights


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _expert(x: Tensor, projections: Projections, activation: str) -> Tensor:
    gate, up, down = projections
    act = ACTIVATIONS[activation]
    return down(act(gate(x)) * up(x) if gate is not None else act(up(x)))


def _routed(
    x: Tensor,
    index: Tensor,
    layer: Layer,
) -> Iterator[tuple[Tensor, Tensor, Projections]]:
    """Tokens, slots and matrices of every expert that some token is routed to, lowest id first."""
    kinds = (0, 0, 1) if layer.gated else (0, 1)
    rows, starts, at = layer.layout.tolist(), {}, 0
    for expert, parts in enumerate(rows):
        if any(start >= 0 for start, *_ in parts):
            starts[expert] = at
            at += len(kinds)
    for expert in index.unique().tolist():
        if expert not in starts:
            continue
        start = starts[expert]
        parts = rows[expert]
        applied = [
            _matrix(layer, start + n, [parts[kind], *parts[2 + 2 * n : 4 + 2 * n]]) for n, kind in enumerate(kinds)
        ]
        token, slot = torch.where(index == expert)
        yield token, slot, (applied[0] if layer.gated else None, applied[-2], applied[-1])


def _matrix(layer: Layer, n: int, rows: list[list[int]]) -> Apply:
    """The n-th matrix of all; `rows` of the layout for itself and, if there are any, for its factors."""
    (_, bits, _, columns), *factors = rows

    def apply(x: Tensor) -> Tensor:
        parts = []
        if bits:
            parts.append(functional.linear(x, dequantize(layer.qweights[n], bits, columns, x.dtype)))
        if factors and factors[0][1]:
            thin = x
            for packed, (_, width, _, inputs) in zip((layer.low_rank_a[n], layer.low_rank_b[n]), factors, strict=True):
                thin = functional.linear(thin, dequantize(packed, width, inputs, x.dtype))
            parts.append(thin)
        return sum(parts[1:], parts[0])

    return apply
