# SPDX-License-Identifier: Apache-2.0
"""torch.ops.mcmoe.* against dense layers: values, gradients, fakes and opcheck."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import relative_rms
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from transformers_mcmoe.kernels import arena, cpu, ops, reference  # noqa: F401
from transformers_mcmoe.plan import ExpertWidths
from transformers_mcmoe.quantization import WIDTHS, dequantize, pack, quantize

OUT = 24
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def _matrix(bits: int, in_features: int) -> Tensor:
    weight = torch.randn(OUT, in_features, generator=torch.Generator().manual_seed(bits))
    return pack(quantize(weight, bits, 96 if in_features % 96 == 0 else 128))


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("in_features", [192, 128, 200, 48])
@pytest.mark.parametrize("bits", WIDTHS)
def test_equals_dense(bits: int, in_features: int, with_bias: bool, dtype: torch.dtype):
    qweight = _matrix(bits, in_features)
    dense = dequantize(qweight, bits, in_features, dtype)
    bias = _random(OUT, dtype=dtype, seed=1) if with_bias else None
    for shape in ((0,), (1,), (5,), (2, 3), (2, 0), (2, 3, 4)):
        x = _random(*shape, in_features, dtype=dtype)
        y = torch.ops.mcmoe.packed_linear(x, qweight, bias, bits, in_features)
        assert y.shape == (*shape, OUT)
        assert y.dtype == dtype
        if y.numel():
            exact = functional.linear(x.double(), dense.double(), bias.double() if with_bias else None)
            assert relative_rms(y, exact) <= TOLERANCE[dtype]
        assert torch.equal(
            reference.packed_linear(x, qweight, bias, bits, in_features), functional.linear(x, dense, bias)
        )


def test_one_dimension():
    qweight = _matrix(3, 128)
    x, bias = _random(128).requires_grad_(), _random(OUT, seed=1).requires_grad_()
    y = torch.ops.mcmoe.packed_linear(x, qweight, bias, 3, 128)
    assert torch.allclose(y, functional.linear(x, dequantize(qweight, 3, 128), bias), atol=1e-5)
    dy = _random(OUT, seed=2)
    y.backward(dy)
    assert torch.allclose(x.grad, dy @ dequantize(qweight, 3, 128), atol=1e-5)
    assert torch.equal(bias.grad, dy)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("in_features", [192, 200])
@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (2, 3)])
def test_gradients_equal_dense(bits: int, in_features: int, shape: tuple[int, ...]):
    qweight = _matrix(bits, in_features)
    dense = dequantize(qweight, bits, in_features)
    inputs = [(_random(*shape, in_features).requires_grad_(), _random(OUT, seed=1).requires_grad_()) for _ in range(2)]
    (x, bias), (dense_x, dense_bias) = inputs
    weight = _random(*shape, OUT, seed=2)
    (torch.ops.mcmoe.packed_linear(x, qweight, bias, bits, in_features) * weight).sum().backward()
    (functional.linear(dense_x, dense, dense_bias) * weight).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.allclose(bias.grad, dense_bias.grad, rtol=1e-5, atol=1e-6)
    if x.numel():
        assert relative_rms(x.grad, dense_x.grad) <= 1e-6
    assert qweight.grad is None
    assert not qweight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_dtypes(dtype: torch.dtype):
    qweight = _matrix(4, 192)
    dense = dequantize(qweight, 4, 192, dtype)
    x, bias = _random(5, 192, dtype=dtype).requires_grad_(), _random(OUT, dtype=dtype, seed=1).requires_grad_()
    dy = _random(5, OUT, dtype=dtype, seed=2)
    torch.ops.mcmoe.packed_linear(x, qweight, bias, 4, 192).backward(dy)
    assert x.grad.dtype == bias.grad.dtype == dtype
    assert relative_rms(x.grad, dy.double() @ dense.double()) <= TOLERANCE[dtype]
    assert relative_rms(bias.grad, dy.double().sum(0)) <= TOLERANCE[dtype]


def test_only_wanted_gradients():
    qweight = _matrix(2, 128)
    x, bias = _random(5, 128), _random(OUT, seed=1).requires_grad_()
    torch.ops.mcmoe.packed_linear(x, qweight, bias, 2, 128).sum().backward()
    assert x.grad is None
    assert torch.equal(bias.grad, torch.full((OUT,), 5.0))
    x.requires_grad_()
    torch.ops.mcmoe.packed_linear(x, qweight, None, 2, 128).sum().backward()
    assert x.grad is not None
    assert not torch.ops.mcmoe.packed_linear(x.detach(), qweight, None, 2, 128).requires_grad


def test_inputs_are_not_changed():
    qweight, x, bias = _matrix(3, 192), _random(5, 192), _random(OUT, seed=1)
    before = [t.clone() for t in (qweight, x, bias)]
    torch.ops.mcmoe.packed_linear(x, qweight, bias, 3, 192)
    assert all(torch.equal(a, b) for a, b in zip((qweight, x, bias), before, strict=True))


@pytest.mark.parametrize(
    ("shape", "bits", "with_bias"), [((5, 192), 3, True), ((2, 3, 200), 8, False), ((0, 200), 1, True)]
)
def test_opcheck(shape: tuple[int, ...], bits: int, with_bias: bool):
    x = _random(*shape).requires_grad_()
    bias = _random(OUT, seed=1).requires_grad_() if with_bias else None
    qweight = _matrix(bits, shape[-1])
    torch.library.opcheck(torch.ops.mcmoe.packed_linear.default, (x, qweight, bias, bits, shape[-1]))


def test_opcheck_strided_input():
    x = _random(2, 192, 3).transpose(1, 2)
    torch.library.opcheck(
        torch.ops.mcmoe.packed_linear.default,
        (x, _matrix(3, 192), None, 3, 192),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("shape", [(0, 192), (5, 192), (2, 3, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_shape(shape: tuple[int, ...], dtype: torch.dtype):
    x, qweight = torch.empty(shape, dtype=dtype, device="meta"), _matrix(3, 192).to("meta")
    y = torch.ops.mcmoe.packed_linear(x, qweight, None, 3, 192)
    assert y.is_meta
    assert (y.shape, y.dtype) == ((*shape[:-1], OUT), dtype)


def test_fake_tensors():
    x, qweight = _random(5, 192), _matrix(3, 192)
    with FakeTensorMode() as mode:
        x, qweight = mode.from_tensor(x), mode.from_tensor(qweight)
        assert torch.ops.mcmoe.packed_linear(x, qweight, None, 3, 192).shape == (5, OUT)


def test_wrong_columns_raise():
    with pytest.raises(RuntimeError):
        torch.ops.mcmoe.packed_linear(_random(5, 191), _matrix(3, 192), None, 3, 192)
    with pytest.raises(RuntimeError, match="x has 191 columns, the matrix has 192"):
        torch.ops.mcmoe.packed_linear(torch.empty(5, 191, device="meta"), _matrix(3, 192).to("meta"), None, 3, 192)


def _layer(gated: bool = True, low_rank: bool = False) -> tuple:
    """Arguments of moe_mlp behind weights: matrices, table, no blocks, factors; expert 1 of 4 was dropped."""
    hidden, inner, widths = 64, 48, (2, 0, 3, 1)
    sizes = [(inner, hidden)] * (2 if gated else 1) + [(hidden, inner)]
    qweights, a, b = [], [], []
    for expert, bits in enumerate(widths):
        for n, (rows, columns) in enumerate(sizes if bits else []):
            weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(10 * expert + n)) / 8
            qweights.append(pack(quantize(weight, bits, 32)))
            a.append(pack(quantize(_random(3, columns, seed=expert + n) / 8, 8, 32)))
            b.append(pack(quantize(_random(rows, 3, seed=expert + n + 5) / 8, 8, 32)))
    table, _ = arena.layout(sizes, ExpertWidths(widths, widths, (3, 0, 3, 3) if low_rank else (), 8), 32)
    return qweights, table, None, *((a, b) if low_rank else ([], [])), inner, "silu", gated


def _dense_layer(x: Tensor, index: Tensor, weights: Tensor, layer: tuple) -> Tensor:
    """The same by a loop over tokens and slots."""
    qweights, table, _, a, b, inner, _, gated = layer
    step = 3 if gated else 2
    out = torch.zeros_like(x)
    for t, k in itertools.product(range(x.shape[0]), range(index.shape[1])):
        expert = int(index[t, k])
        if expert in (0, 2, 3):
            start = {0: 0, 2: step, 3: 2 * step}[expert]
            columns = [64] * (step - 1) + [inner]
            dense = [
                dequantize(qweights[start + n], int(table[expert, 0, 1]), columns[n], x.dtype) for n in range(step)
            ]
            for n in range(step):
                if a:
                    factors = dequantize(b[start + n], 8, 3, x.dtype), dequantize(a[start + n], 8, columns[n], x.dtype)
                    dense[n] = dense[n] + factors[0] @ factors[1]
            h = functional.silu(dense[0] @ x[t]) * (dense[1] @ x[t]) if gated else functional.silu(dense[0] @ x[t])
            out[t] += weights[t, k] * (dense[-1] @ h)
    return out


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_layer_equals_a_loop(gated: bool, low_rank: bool):
    layer = _layer(gated, low_rank)
    x, weights = _random(9, 64), _random(9, 3, seed=1)
    index = torch.randint(0, 6, (9, 3), generator=torch.Generator().manual_seed(0))  # 1: dropped; 4, 5: nobody
    expected = _dense_layer(x.double(), index, weights.double(), layer)
    for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        y = torch.ops.mcmoe.moe_mlp(x.to(dtype), index, weights.to(dtype), *layer)
        assert y.dtype == dtype
        assert relative_rms(y, expected) <= bound
    assert torch.ops.mcmoe.moe_mlp(x[:0], index[:0], weights[:0], *layer).shape == (0, 64)


@pytest.mark.parametrize("gated", [False, True])
def test_layer_gradients(gated: bool):
    layer = _layer(gated, low_rank=True)
    index = torch.tensor([[0, 2], [1, 3], [4, 0], [2, 2]])
    x, weights = (_random(4, n, seed=n).double().requires_grad_() for n in (64, 2))
    # sums are float64 for float64 inputs, so that finite differences see no rounding
    assert torch.autograd.gradcheck(
        lambda x, w: torch.ops.mcmoe.moe_mlp(x, index, w, *layer), (x, weights), atol=1e-5, fast_mode=True
    )


def test_layer_without_matrices_has_no_gradient():
    _, table, _, *rest = _layer()
    x = _random(2, 64).requires_grad_()
    y = torch.ops.mcmoe.moe_mlp(x, torch.full((2, 1), 9), torch.ones(2, 1), [], table, None, *rest)
    with pytest.raises(RuntimeError, match="without qweights"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layer_opcheck():
    layer = _layer()
    x, weights = _random(5, 64).requires_grad_(), _random(5, 2, seed=1).requires_grad_()
    index = torch.randint(0, 5, (5, 2), generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(torch.ops.mcmoe.moe_mlp.default, (x, index, weights, *layer))
