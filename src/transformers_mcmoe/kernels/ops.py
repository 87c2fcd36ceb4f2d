# SPDX-License-Identifier: Apache-2.0
"""Schemas, fake implementations, gradients and dispatch of `torch.ops.mcmoe.*`; the mathematics is in `reference`.

Codes are fixed: gradients go to inputs, biases and routing weights, never to packed matrices. The compiled kernels
(`cpu`) or those in Triton (`gpu`) serve where they can, elsewhere the reference; gradients are the reference's.

packed_linear(x, qweight, bias, bits, in_features, blocks) -> Tensor
    Linear layer over a packed matrix.

    x: [.., in_features] float, any number of rows, 0 included.
    qweight: [out, n, G * bits / 8 + 4] uint8 (`quantization.packing`).
    bias: [out] in the dtype of `x`, or None.
    bits: code width, 1, 2, 3, 4 or 8.
    in_features: columns of the matrix before padding.
    blocks: the same matrix in the layout of the CPU kernels, or None: on CPU it is then repacked for this call.
    Returns [.., out] in the dtype of `x`.

moe_mlp(x, index, weights, qweights, layout, blocks, low_rank_a, low_rank_b, inner, activation, gated) -> Tensor
    The experts of a MoE layer: sum over k of weights[t, k] * down(act(gate(x_t)) * up(x_t)) of expert index[t, k].

    x: [T, H] float.
    index: [T, K] integer; slots whose value is no expert's id, or a dropped expert's, add nothing and cost nothing.
    weights: [T, K] float.
    qweights: packed gate (if gated), up and down of every expert that was not dropped, expert by expert; empty tensors
        where factors stand for a matrix. May be empty where `blocks` is given and no gradient is wanted.
    layout: [E, P, 4] int64 on CPU (`arena.layout`), for gate_up and down of each expert, and where some have factors for
        the factors a and b of gate (if gated), up and down: offset in `blocks` (-1: not there), code width, group size,
        input columns.
    blocks: [bytes] uint8, all experts in the layout of the device's kernels (`pack_experts` of `arena` or `triton`), or
        None; in Triton's without factors.
    low_rank_a, low_rank_b: packed factors [r, in] and [out, r] of each of `qweights`, whose product is added to the
        matrix, empty tensors where one has none; or empty lists.
    inner: I, the experts' inner size.
    activation: "silu", "gelu", "gelu_tanh", "relu" or "relu2".
    gated: whether experts have a gate.
    Returns [T, H] in the dtype of `x`.

moe_mlp_gradients(gradient, x, index, weights, qweights, layout, low_rank_a, low_rank_b, inner, activation, gated)
    The gradients of moe_mlp with respect to `x` and `weights`, given the one of its output [T, H].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformers_mcmoe.kernels import arena, cpu, gpu, reference

_SCHEMAS = (
    "packed_linear(Tensor x, Tensor qweight, Tensor? bias, int bits, int in_features, Tensor? blocks=None) -> Tensor",
    "moe_mlp(Tensor x, Tensor index, Tensor weights, Tensor[] qweights, Tensor layout, Tensor? blocks, "
    "Tensor[] low_rank_a, Tensor[] low_rank_b, int inner, str activation, bool gated) -> Tensor",
    "moe_mlp_gradients(Tensor gradient, Tensor x, Tensor index, Tensor weights, Tensor[] qweights, Tensor layout, "
    "Tensor[] low_rank_a, Tensor[] low_rank_b, int inner, str activation, bool gated) -> (Tensor, Tensor)",
)
_library = torch.library.Library("mcmoe", "FRAGMENT")
for _schema in _SCHEMAS:
    if not hasattr(torch.ops.mcmoe, _schema.partition("(")[0]):  # a reload must not fail
        _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _packed_linear(
    x: Tensor, qweight: Tensor, bias: Tensor | None, bits: int, in_features: int, blocks: Tensor | None = None
) -> Tensor:
    if x.shape[-1] != in_features:
        raise RuntimeError(f"x has {x.shape[-1]} columns, the matrix has {in_features}.")
    device = gpu.backend(x.device)
    if device is not None and device.takes(x) and device.packs(qweight, bits):
        return device.packed_linear(x, qweight, bias, bits, in_features)
    if not cpu.takes(x) or not cpu.packs(qweight, bits):
        return reference.packed_linear(x, qweight, bias, bits, in_features)
    if blocks is None:
        blocks = arena.pack_matrix(qweight, bits)
    group = (qweight.shape[2] - 4) * 8 // bits
    return cpu.packed_linear(x, blocks, bias, qweight.shape[0], bits, group, in_features)


def _packed_linear_fake(
    x: Tensor, qweight: Tensor, bias: Tensor | None, bits: int, in_features: int, blocks: Tensor | None = None
) -> Tensor:
    torch._check(x.shape[-1] == in_features, lambda: f"x has {x.shape[-1]} columns, the matrix has {in_features}.")
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _packed_linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qweight, _, ctx.bits, ctx.in_features, _ = inputs
    ctx.save_for_backward(qweight)


def _packed_linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (qweight,) = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = reference.packed_linear_input_gradient(gradient, qweight, ctx.bits, ctx.in_features)
    if ctx.needs_input_grad[2]:
        dbias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return dx, None, dbias, None, None, None


def _moe_mlp(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    qweights: list[Tensor],
    layout: Tensor,
    blocks: Tensor | None,
    low_rank_a: list[Tensor],
    low_rank_b: list[Tensor],
    inner: int,
    activation: str,
    gated: bool,
) -> Tensor:
    if blocks is not None:
        device = gpu.backend(x.device) or cpu
        if device.takes(x):
            return device.moe_mlp(x, index, weights, blocks, layout, inner, activation, gated)
    layer = reference.Layer(qweights, layout, low_rank_a, low_rank_b, inner, activation, gated)
    return reference.moe_mlp(x, index, weights, layer)


def _moe_mlp_fake(x: Tensor, index: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


def _moe_mlp_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, weights, qweights, layout, _, low_rank_a, low_rank_b, *ctx.options = inputs
    ctx.save_for_backward(x, index, weights, layout, *qweights, *low_rank_a, *low_rank_b)
    ctx.counts = len(qweights), len(low_rank_a), len(low_rank_b)


def _moe_mlp_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    x, index, weights, layout, *rest = ctx.saved_tensors
    n, a, _ = ctx.counts
    if not n:
        raise RuntimeError("moe_mlp was called without qweights, which its gradient needs; pass them beside blocks.")
    # an operator of its own, as its loop depends on the data and is traced by torch.compile
    dx, dweights = torch.ops.mcmoe.moe_mlp_gradients(
        gradient, x, index, weights, rest[:n], layout, rest[n : n + a], rest[n + a :], *ctx.options
    )
    lists = [[None] * count for count in ctx.counts]
    return dx, None, dweights, lists[0], None, None, lists[1], lists[2], None, None, None


def _moe_mlp_gradients(
    gradient: Tensor, x: Tensor, index: Tensor, weights: Tensor, *layer: Any
) -> tuple[Tensor, Tensor]:
    return reference.moe_mlp_gradients(gradient, x, index, weights, reference.Layer(*layer))


def _moe_mlp_gradients_fake(gradient: Tensor, x: Tensor, index: Tensor, weights: Tensor, *rest: Any) -> Any:
    return torch.empty_like(x), torch.empty_like(weights)


def _register(name: str, run: Any, fake: Any, context: Any = None, backward: Any = None) -> None:
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"mcmoe::{name}", "CompositeExplicitAutograd"):
        return  # a reload
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mcmoe::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"mcmoe::{name}", backward, setup_context=context, lib=_library)


_register("packed_linear", _packed_linear, _packed_linear_fake, _packed_linear_context, _packed_linear_backward)
_register("moe_mlp", _moe_mlp, _moe_mlp_fake, _moe_mlp_context, _moe_mlp_backward)
_register("moe_mlp_gradients", _moe_mlp_gradients, _moe_mlp_gradients_fake)

packed_linear = torch.ops.mcmoe.packed_linear.default
moe_mlp = torch.ops.mcmoe.moe_mlp.default
