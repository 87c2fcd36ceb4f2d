# SPDX-License-Identifier: Apache-2.0
"""Q2_K and Q3_K: bytes as llama.cpp's own library reads them, and errors under a Hessian."""

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from transformers_mcmoe.quantization import Factor, Grid, gptq
from transformers_mcmoe.quantization.grid import candidates
from transformers_mcmoe.quantization.k_quants import BlockGrid, quantize_blocks, unpack_blocks

KINDS = {2: Kind.Q2_K, 3: Kind.Q3_K}


def case(bits, columns=512, rows=24, batch=2, act_order=True):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(batch, rows, columns, generator=generator)
    x = torch.randn(batch, 4 * columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    x += torch.randn(batch, 4 * columns, 8, generator=generator) @ torch.randn(batch, 8, columns, generator=generator)
    hessian = x.transpose(1, 2) @ x
    return weight, hessian, Factor.of(hessian.clone(), 16, act_order=act_order)


def loss(weight, found, hessian):
    error = weight - found.view_as(weight)
    return float(((error @ hessian) * error).sum())


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_library_reads_what_is_written(bits, act_order):
    weight, _, factor = case(bits, act_order=act_order)
    packed = quantize_blocks(weight, factor, bits, sweeps=1)
    assert packed.dtype == torch.uint8
    assert packed.shape == (48, {2: 168, 3: 220}[bits])
    theirs = torch.from_numpy(dequantize(packed.numpy(), KINDS[bits]))
    assert torch.equal(unpack_blocks(packed, bits), theirs)
    assert float((theirs.view_as(weight) - weight).square().mean()) < {2: 0.2, 3: 0.06}[bits]


@pytest.mark.parametrize("bits", [2, 3])
def test_feedback_and_descent_lower_the_error(bits):
    weight, hessian, factor = case(bits)
    identity = Factor.of(torch.eye(512).expand(2, -1, -1).clone(), 16)
    plain = unpack_blocks(quantize_blocks(weight, identity, bits), bits)
    fed = unpack_blocks(quantize_blocks(weight, factor, bits), bits)
    swept = unpack_blocks(quantize_blocks(weight, factor, bits, sweeps=2), bits)
    assert loss(weight, fed, hessian) < 0.8 * loss(weight, plain, hessian)
    assert loss(weight, swept, hessian) < loss(weight, fed, hessian)


@pytest.mark.parametrize("bits", [2, 3])
def test_about_as_good_as_groups_with_fp16_scales(bits):
    weight, hessian, factor = case(bits)
    wide = gptq(weight, Factor.of(hessian.clone(), 32, act_order=True), bits, Grid(symmetric=bits == 3), sweeps=1)
    fine = unpack_blocks(quantize_blocks(weight, factor, bits, sweeps=1), bits)
    assert loss(weight, fine, hessian) < 1.1 * loss(weight, wide.dequantize(), hessian)


def test_zeros_and_tiny_weights():
    weight, _, factor = case(2)
    weight[0, 0] = 0
    weight[0, 1] *= 1e-12
    packed = quantize_blocks(weight, factor, 2)
    found = unpack_blocks(packed, 2)
    assert torch.isfinite(found).all()
    assert float(found[:2].abs().max()) < 1e-6


@pytest.mark.parametrize("bits", [2, 3])
def test_a_small_group_beside_large_ones_is_not_dropped(bits):
    """Its clipped grids round to the block's lowest level, 0, which rebuilds nothing; the least level above is better."""
    weight, _, _ = case(bits, rows=8, batch=1)
    small = slice(16, 32)
    # a scale of 0.6 levels: whole it is rounded up, clipped below 0.5 it is rounded to nothing
    block = BlockGrid(symmetric=bits == 3, bits=bits).fitted(weight).of_group(torch.tensor([1]))
    d = block.scales[0]
    top = 2**bits - 1
    span = 0.6 * d.unsqueeze(-1) * top
    weight[..., small] = (torch.rand(1, 8, 16, generator=torch.Generator().manual_seed(0)) - 0.5) * span
    weight[..., 16], weight[..., 17] = -0.5 * span[..., 0], 0.5 * span[..., 0]
    scale, _ = candidates(weight[..., small].amin(-1), weight[..., small].amax(-1), bits, block)
    assert bool((scale == 0).any())
    assert bool((scale > 0).any())
    factor = Factor.of(torch.eye(512)[None].clone(), 16)
    found = unpack_blocks(quantize_blocks(weight, factor, bits, refits=0), bits)[..., small]
    assert float((found - weight[0][..., small]).square().mean()) < 0.5 * float(weight[..., small].square().mean())
