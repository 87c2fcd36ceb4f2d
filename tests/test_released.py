# SPDX-License-Identifier: Apache-2.0
"""benchmarks/released.py: the rounding of MC's authors, against GPTQ as published, written plainly."""

from pathlib import Path

import pytest
import torch

from transformers_mcmoe.quantization import Factor

COLUMNS, GROUP = 64, 32


@pytest.fixture(scope="module")
def released():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        import released

        yield released


@pytest.fixture
def case():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(400, COLUMNS, generator=random) @ torch.randn(COLUMNS, COLUMNS, generator=random)
    weight = torch.randn(12, COLUMNS, generator=random)
    hessian = x.T @ x
    return weight, hessian, Factor.of(hessian.clone()[None], GROUP, damping=0.01)


def published(weight, hessian, bits, search, inside):
    """Column by column with the Cholesky factor of the inverse, as in the paper's algorithm 1; `inside` a group or not."""
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(COLUMNS)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped.double()), upper=True).float()
    work, rebuilt = weight.clone(), torch.zeros_like(weight)
    for start in range(0, COLUMNS, GROUP):
        scale, zero = search(work[None, :, start : start + GROUP], bits)
        errors = torch.zeros(len(weight), GROUP)
        for k in range(start, start + GROUP):
            code = (work[:, k] / scale[0] + zero[0]).round().clamp(0, 2**bits - 1)
            rebuilt[:, k] = (code - zero[0]) * scale[0]
            errors[:, k - start] = (work[:, k] - rebuilt[:, k]) / upper[k, k]
            if inside:
                work[:, k + 1 : start + GROUP] -= errors[:, k - start, None] * upper[k, k + 1 : start + GROUP]
        work[:, start + GROUP :] -= errors @ upper[start : start + GROUP, start + GROUP :]
    return rebuilt


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_inside_a_group_above_3_bits_only(released, case, bits):
    weight, hessian, factor = case
    found = released.gptq(weight[None], factor, bits).dequantize()
    wanted = published(weight, hessian, bits, released.search, inside=bits > 3)
    assert float((found - wanted).abs().max()) < 1e-2 * float(weight.abs().max())
    other = published(weight, hessian, bits, released.search, inside=bits <= 3)
    assert float((found - other).abs().max()) > 0.1


def test_ranges_lie_within_a_tenth(released, case):
    weight = case[0][None, :, :GROUP]
    scale, _ = released.search(weight, 2)
    whole = (weight.amax(-1) - weight.amin(-1)) / 3
    assert (scale <= 1.101 * whole).all()
    assert (scale >= 0.899 * whole).all()


def test_the_pipeline_rounds_like_it_while_asked_to(released):
    from transformers_mcmoe.pipeline import rounding

    before = rounding.gptq
    with released.as_released():
        assert rounding.gptq is released.gptq
    assert rounding.gptq is before
