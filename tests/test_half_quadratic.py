# SPDX-License-Identifier: Apache-2.0
"""The half-quadratic fit: against the hqq package, against the min/max grid, and on odd groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transformers_mcmoe.quantization.half_quadratic import half_quadratic

WIDTHS = (2, 3, 4, 8)
G = 64


def _heavy_tailed(rows: int, groups: int, size: float = 0.02, seed: int = 0) -> Tensor:
    """Weights [rows, groups, G] with outliers: normal, one in a hundred eight times as large."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, groups, G, generator=random)
    return x * size * torch.where(torch.rand(x.shape, generator=random) < 0.01, 8.0, 1.0)


def _codes(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (x / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, 2**bits - 1)


def _rebuilt(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (_codes(x, scale, zero, bits) - zero.unsqueeze(-1)) * scale.unsqueeze(-1)


def _min_max(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = x.amin(-1), x.amax(-1)
    scale = ((high - low) / (2**bits - 1)).half().float()
    return scale, (-low / scale).half().float()


def _error(x: Tensor, grid: tuple[Tensor, Tensor], bits: int, p: float = 0.7) -> float:
    return float((x - _rebuilt(x, *grid, bits)).double().abs().pow(p).mean())


class TestAgainstThePackage:
    """The same matrices through `hqq.core.quantize.Quantizer`, whose scales and zeros are rounded to fp16 here."""

    # share of codes that the rounding of grids may change: an 8-bit zero near 128 moves by up to 1/16
    DIFFERENT = {1: 1e-3, 2: 1e-3, 3: 1e-3, 4: 2e-3, 8: 3e-2}  # noqa: RUF012

    @staticmethod
    def _package(x: Tensor, bits: int, **options) -> tuple[Tensor, Tensor, Tensor]:
        quantizer = pytest.importorskip("hqq.core.quantize", reason="compares with the hqq package").Quantizer
        codes, meta = quantizer.quantize(
            x.flatten(1), nbits=bits, group_size=G, axis=1, device="cpu", bitpack=False, **options
        )
        return codes.view_as(x), meta["scale"].view(x.shape[:-1]), meta["zero"].view(x.shape[:-1])

    @pytest.mark.parametrize("size", [0.02, 1.0])  # at 1.0 errors are large enough for the shrinking to act
    @pytest.mark.parametrize("round_zero", [False, True])
    @pytest.mark.parametrize("bits", [1, *WIDTHS])
    def test_same_grids_and_codes(self, bits: int, round_zero: bool, size: float):
        x = _heavy_tailed(32, 8, size)
        codes, scale, zero = self._package(x, bits, round_zero=round_zero)
        own_scale, own_zero = half_quadratic(x, bits, kappa=1.0, round_zero=round_zero, early_stop=True)
        assert torch.allclose(own_scale, scale.half().float(), rtol=2**-10, atol=0)
        spacing = 2.0 ** (zero.abs().clamp(min=1).log2().floor() - 10)
        # a start on the border of two integers may be rounded otherwise
        assert float(((own_zero - zero).abs() / spacing).quantile(0.99)) <= 0.51
        own = _codes(x, own_scale, own_zero, bits)
        assert float((own - codes).abs().max()) <= 1
        assert float((own != codes).double().mean()) <= self.DIFFERENT[bits]
        stored = (scale.half().float(), zero.half().float())
        assert _error(x, (own_scale, own_zero), bits) == pytest.approx(_error(x, stored, bits), rel=3e-3)

    @pytest.mark.parametrize("bits", WIDTHS)
    @pytest.mark.parametrize(("size", "change"), [(0.02, 1e-2), (1.0, 5e-2)])
    def test_growing_beta_and_all_steps_change_little(self, bits: int, size: float, change: float):
        x = _heavy_tailed(32, 8, size)
        _, scale, zero = self._package(x, bits)
        ours = _error(x, half_quadratic(x, bits), bits, p=2)
        assert ours == pytest.approx(_error(x, (scale, zero), bits, p=2), rel=change)


@pytest.mark.parametrize("size", [1e-4, 0.02, 1.0])
@pytest.mark.parametrize("bits", [1, *WIDTHS])
def test_beats_the_min_max_grid(bits: int, size: float):
    x = _heavy_tailed(32, 8, size)
    for p in (0.7, 2):
        assert _error(x, half_quadratic(x, bits), bits, p) < _error(x, _min_max(x, bits), bits, p)


def test_beats_the_min_max_grid_by_much_where_the_zero_is_bad():
    """All weights but one lie between two points of the range grid; the zero brings them onto one."""
    x = torch.full((1, G), 0.5)
    x[0, 0], x[0, 1] = 0.0, 3.0
    assert _error(x, half_quadratic(x, 2), 2) < 0.5 * _error(x, _min_max(x, 2), 2)


def test_steps_minimise_the_norm_on_a_group_with_an_outlier():
    """With p < 1 the many weights are met exactly and the outlier pays; the squared error would share it."""
    x = torch.tensor([[0.0, 3.0, *([0.9] * 30)]]) * 10
    scale, zero = half_quadratic(x, 2, iterations=200)
    error = (x - _rebuilt(x, scale, zero, 2)).abs()
    assert float(error[0, 2:].max()) < 0.02


def test_a_group_does_not_depend_on_the_others():
    x = _heavy_tailed(6, 4)
    scale, zero = half_quadratic(x, 3)
    for row in range(6):
        own_scale, own_zero = half_quadratic(x[row, 2], 3)
        assert torch.equal(own_scale, scale[row, 2])
        assert torch.allclose(own_zero, zero[row, 2], rtol=2**-10)


@pytest.mark.parametrize("bits", [1, *WIDTHS])
@pytest.mark.parametrize("value", [0.0, 1e-9, 1e-3, -0.02, 1.0, -300.0, 6e4])
def test_constant_groups(value: float, bits: int):
    x = torch.full((2, 3, G), value)
    scale, zero = half_quadratic(x, bits)
    assert bool((scale > 0).all())
    error = (_rebuilt(x, scale, zero, bits) - x).abs().max()
    assert float(error) <= abs(value) * 2.0**-10


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("offset", "size"), [(1.0, 1e-5), (-20.0, 0.3), (0.0, 1e-6), (0.0, 1e-8), (0.0, 3e5)])
def test_extreme_groups_stay_finite_in_fp16(bits: int, offset: float, size: float):
    x = offset + _heavy_tailed(4, 4, size)
    scale, zero = half_quadratic(x, bits)
    for grid in (scale, zero):
        assert grid.dtype == torch.float32
        assert torch.equal(grid.half().float(), grid)
    assert bool((scale > 0).all() and torch.isfinite(scale).all() and torch.isfinite(zero).all())
    if size < 1e3:
        assert float((_rebuilt(x, scale, zero, bits) - x).abs().max()) <= float(x.abs().max()) * 1.1


@pytest.mark.parametrize("length", [1, 7, 96])
def test_any_group_length(length: int):
    scale, zero = half_quadratic(_heavy_tailed(2, 3)[..., :1].expand(2, 3, length), 3)
    assert scale.shape == zero.shape == (2, 3)


def test_x_is_not_changed():
    x = _heavy_tailed(2, 2)
    before = x.clone()
    half_quadratic(x, 2, early_stop=True)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("option", "value"),
    [("bits", 0), ("bits", 9), ("lp_norm", 0.0), ("lp_norm", 1.5), ("beta", 0.0), ("kappa", 0.9), ("iterations", 0)],
)
def test_bad_options(option: str, value: float):
    with pytest.raises(ValueError, match=f"{option}={value!r} is not valid"):
        half_quadratic(_heavy_tailed(1, 1), **({"bits": 2} | {option: value}))
