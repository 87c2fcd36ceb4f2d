# SPDX-License-Identifier: Apache-2.0
"""Column kernels against torch, and coordinate descent: errors never grow, and no single code could do better."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from transformers_mcmoe.kernels import cpu
from transformers_mcmoe.quantization import columns
from transformers_mcmoe.quantization.gptq import Factor, gptq
from transformers_mcmoe.quantization.grid import Grid, Quantized, nearest

WIDTHS = (1, 2, 3, 4, 8)


def _layer(rows: int, count: int, tokens: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Weights [batch, rows, count] and Hessians of correlated inputs."""
    random = torch.Generator().manual_seed(rows + count)
    mix = torch.randn(count, count, generator=random) * torch.logspace(0, -1.5, count)
    x = torch.randn(batch, tokens, count, generator=random) @ mix
    return torch.randn(batch, rows, count, generator=random), x.transpose(1, 2) @ x


def _errors(weight: Tensor, done: Quantized, hessian: Tensor, damping: float = 0.01) -> Tensor:
    """Error [B, out] of every row under the damped Hessian."""
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    hessian = (hessian + damping * mean * torch.eye(hessian.shape[-1])).double()
    difference = (done.dequantize().view_as(weight) - weight).double()
    return ((difference @ hessian) * difference).sum(-1)


@pytest.mark.skipif(cpu.library() is None, reason="no compiled kernels")
@pytest.mark.parametrize(
    "grid", [Grid(), Grid(symmetric=True), Grid(integer_zeros=True), Grid(fit="minmax"), Grid("hqq")]
)
@pytest.mark.parametrize("bits", WIDTHS)
def test_compiled_search_of_grids_equals_torch(bits: int, grid: Grid, monkeypatch):
    random = torch.Generator().manual_seed(bits)
    target = torch.randn(2, 40, 130, generator=random) * torch.logspace(-9, 3, 130)
    target[0, :, 3] = 0

    def error(found: tuple[Tensor, Tensor]) -> Tensor:
        """Of the nearest codes on the grids found."""
        scale, zero = (part.unsqueeze(-1) for part in found)
        codes = nearest(target.transpose(1, 2), *found, bits)
        return ((codes - zero) * scale - target.transpose(1, 2)).norm(dim=-1)

    results = {}
    for name in cpu.instruction_sets():
        with cpu.using(name):
            results[name] = error(columns.fit_columns(target, bits, grid))
    with monkeypatch.context() as patch:
        patch.setattr(columns.cpu, "library", lambda: None)
        wanted = error(columns.fit_columns(target, bits, grid))
    for name, found in results.items():
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0, msg=name)


@pytest.mark.skipif(cpu.library() is None, reason="no compiled kernels")
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("batch", "size", "rows"), [(1, 1, 1), (2, 33, 65), (3, 96, 130)])
def test_compiled_columns_equal_torch(bits: int, batch: int, size: int, rows: int, monkeypatch):
    random = torch.Generator().manual_seed(size)
    values = torch.rand(batch, size, rows, generator=random) * (2**bits + 1) - 1
    unit = torch.randn(batch, size, size, generator=random).triu(1) * 0.1 + torch.eye(size)
    diagonal = torch.rand(batch, size, generator=random) + 0.1
    metric = unit @ unit.transpose(1, 2)
    start = torch.randint(0, 2**bits, values.shape, generator=random).float()
    gradients = torch.randn(values.shape, generator=random)

    def run() -> tuple[Tensor, ...]:
        codes, moved = start.clone(), gradients.clone()
        columns.descend_columns(metric, codes, moved, bits, 3)
        return *columns.round_columns(values, unit, diagonal, bits), codes, moved

    results = {}
    for name in cpu.instruction_sets():
        with cpu.using(name):
            results[name] = run()
    with monkeypatch.context() as patch:
        patch.setattr(columns.cpu, "library", lambda: None)
        wanted = run()
    for name, found in results.items():
        for a, b in zip(found, wanted, strict=True):
            # a sum in another order may tip a code that lies between two; with it go those that follow in its row
            alike = ((a - b).abs() <= 1e-3 * (1 + b.abs())).float().mean()
            assert alike > 0.98, name
        assert torch.equal(found[0], found[0].round().clamp(0, 2**bits - 1))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("grid", [Grid(), Grid(symmetric=True), Grid(integer_zeros=True)])
def test_errors_never_grow(bits: int, act_order: bool, grid: Grid):
    weight, hessian = _layer(40, 224, 400, batch=2)  # the last group is padded
    factor = Factor.of(hessian.clone(), 96, act_order=act_order)
    before, after = (gptq(weight, factor, bits, grid, sweeps=sweeps) for sweeps in (0, 2))
    lost, left = (_errors(weight, done, hessian) for done in (before, after))
    assert (left <= lost * (1 + 1e-4)).all()
    assert left.sum() < lost.sum()
    if grid.symmetric:
        assert (after.zero == (0.5 if bits == 1 else 2 ** (bits - 1))).all()
    if grid.integer_zeros and bits > 1:
        assert torch.equal(after.zero, after.zero.round())


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_no_single_code_could_do_better(bits: int):
    weight, hessian = _layer(6, 32, 200)
    done = gptq(weight, Factor.of(hessian.clone(), 32), bits, sweeps=60)
    best = _errors(weight, done, hessian)
    for column in range(32):
        for code in range(2**bits):
            codes = done.codes.clone()
            codes[:, 0, column] = code
            other = Quantized(codes, done.scale, done.zero, bits, 32)
            assert (_errors(weight, other, hessian) >= best * (1 - 1e-4)).all()


def test_rows_of_zeros_stay_zeros():
    weight, hessian = _layer(4, 64, 200)
    weight[0, 1] = 0
    done = gptq(weight, Factor.of(hessian.clone(), 32), 2, sweeps=2)
    assert (done.dequantize()[1] == 0).all()


def test_rows_in_parts_equal_all_at_once(monkeypatch):
    weight, hessian = _layer(50, 96, 300, batch=2)
    factor = Factor.of(hessian.clone(), 32, act_order=True)
    whole = gptq(weight, factor, 3, sweeps=1)
    monkeypatch.setattr(sys.modules[gptq.__module__], "AT_ONCE", 2 * 96 * 7)
    parts = gptq(weight, factor, 3, sweeps=1)
    assert (whole.dequantize() - parts.dequantize()).abs().mean() < 1e-3 * weight.abs().mean()
