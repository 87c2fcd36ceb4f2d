# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the reference. Not collected by itself: `test_triton` runs it in a process of its own, under
Triton's interpreter; `benchmarks/gpu.py` runs it on a GPU (MCMOE_TEST_DEVICE=cuda).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny import quick_config, relative_rms, save_dense, tokens
from torch import Tensor

from transformers_mcmoe.kernels import arena, cpu, gpu, ops, reference, triton
from transformers_mcmoe.plan import ExpertWidths
from transformers_mcmoe.quantization import WIDTHS, group_size_for, pack, quantize

DEVICE = os.environ.get("MCMOE_TEST_DEVICE", "cpu")
# the interpreter multiplies the bits of bfloat16 tiles as integers (Triton 3.9)
HALF = torch.float16 if DEVICE == "cpu" else torch.bfloat16
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "DEVICES", (torch.device(DEVICE).type,))


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _matrix(out: int, columns: int, bits: int, group: int, seed: int = 0) -> Tensor:
    return pack(quantize(_random(out, columns, seed=seed), bits, group_size_for(columns, group))).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("tokens", [1, triton.FEW + 9])
@pytest.mark.parametrize("group", [32, 64, 96, 128])
@pytest.mark.parametrize("bits", WIDTHS)
def test_linear(bits: int, group: int, tokens: int, dtype: torch.dtype):
    columns = 2 * group if group > 64 else 160  # 160: the last group of 64 is padded
    qweight = _matrix(37, columns, bits, group)
    bias = _random(37, seed=2).to(DEVICE, dtype) if bits > 2 else None
    x = _random(tokens, columns, seed=1).to(DEVICE, dtype)
    y = ops.packed_linear(x, qweight, bias, bits, columns)
    exact = reference.packed_linear(x.double(), qweight, None if bias is None else bias.double(), bits, columns)
    assert y.dtype == dtype
    assert relative_rms(y, exact) <= TOLERANCE[dtype]


def test_bfloat16():
    qweight, x = _matrix(37, 160, 3, 64), _random(2, 160).to(DEVICE, torch.bfloat16)
    exact = reference.packed_linear(x.double(), qweight, None, 3, 160)
    assert relative_rms(ops.packed_linear(x, qweight, None, 3, 160), exact) <= TOLERANCE[torch.bfloat16]


def test_shapes():
    qweight = _matrix(8, 64, 2, 32)
    assert ops.packed_linear(torch.zeros(0, 64, device=DEVICE), qweight, None, 2, 64).shape == (0, 8)
    x = _random(2, 3, 64).to(DEVICE)
    flat = ops.packed_linear(x.flatten(0, 1), qweight, None, 2, 64)
    assert torch.equal(ops.packed_linear(x, qweight, None, 2, 64), flat.view(2, 3, 8))


GATE_UP, DOWN = (2, 3, 0, 1, 4, 8), (3, 4, 0, 2, 8, 1)


def _experts(hidden: int, inner: int, gated: bool, group: int) -> tuple[list[list[Tensor]], Tensor, Tensor]:
    """Matrices by expert (one was dropped), their layout and their allocation."""
    inputs = 2 if gated else 1
    qweights = [
        [_matrix(inner, hidden, bits, group, seed=10 * e + n) for n in range(inputs)]
        + [_matrix(hidden, inner, down, group, seed=10 * e + 5)]
        if bits
        else []
        for e, (bits, down) in enumerate(zip(GATE_UP, DOWN, strict=True))
    ]
    layout, _ = arena.layout([(inner, hidden)] * inputs + [(hidden, inner)], ExpertWidths(GATE_UP, DOWN), group)
    return qweights, layout, triton.pack_experts(qweights, layout)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("gated", [True, False])
def test_experts(gated: bool, tokens: int, dtype: torch.dtype):
    _check(gated, tokens, dtype, "silu")


@pytest.mark.parametrize("activation", cpu.ACTIVATIONS)
def test_activations(activation: str):
    _check(False, 20, torch.float32, activation)


def _check(gated: bool, tokens: int, dtype: torch.dtype, activation: str) -> None:
    hidden, inner = 32, 96
    qweights, layout, blocks = _experts(hidden, inner, gated, 32)
    flat = [matrix for matrices in qweights for matrix in matrices]
    x = _random(tokens, hidden).to(DEVICE, dtype)
    index = torch.randint(0, 7, (tokens, 3), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    index[0] = torch.tensor([-1, 1, 1])  # no expert, and one twice
    weights = _random(tokens, 3, seed=3).abs().to(DEVICE, dtype)
    y = ops.moe_mlp(x, index, weights, [], layout, blocks, [], [], inner, activation, gated)
    exact = reference.moe_mlp(
        x.double(), index, weights.double(), reference.Layer(flat, layout, [], [], inner, activation, gated)
    )
    assert y.dtype == dtype
    assert relative_rms(y, exact) <= TOLERANCE[dtype]


def test_no_expert_and_no_token():
    qweights, layout, blocks = _experts(64, 96, True, 32)
    assert len(qweights) == len(layout)
    for count in (0, 3, 20):
        index = torch.full((count, 2), len(layout), device=DEVICE)
        x = _random(count, 64).to(DEVICE)
        weights = torch.ones(count, 2, device=DEVICE)
        y = ops.moe_mlp(x, index, weights, [], layout, blocks, [], [], 96, "silu", True)
        assert torch.equal(y, torch.zeros_like(x))


def test_views():
    qweights, _, blocks = _experts(64, 96, True, 32)
    for own, views in zip(qweights, triton.views(qweights, blocks), strict=True):
        for matrix, view in zip(own, views, strict=True):
            assert torch.equal(matrix, view)
            assert view.untyped_storage().data_ptr() == blocks.untyped_storage().data_ptr()
            assert view.data_ptr() % triton.ALIGNMENT == blocks.data_ptr() % triton.ALIGNMENT


def test_model(tmp_path: Path):
    """A packed model computes on these kernels what the reference computes, and is saved unchanged."""
    from transformers import AutoModelForCausalLM

    config = quick_config(group_size=32, rounding="nearest")
    dense = save_dense("mixtral", tmp_path / "dense")
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").to(DEVICE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = tokens(1, 12).to(DEVICE)  # more than FEW
    with torch.no_grad():
        logits = model(ids).logits
        expected = model.dequantize()(ids).logits
        assert relative_rms(logits, expected) <= 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").to(DEVICE)
    with torch.no_grad():
        model.generate(ids, max_new_tokens=1)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.save_pretrained(tmp_path / "again")
    for file in sorted((tmp_path / "packed").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
