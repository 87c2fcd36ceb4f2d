# SPDX-License-Identifier: Apache-2.0
"""Experts in blocks, one per serving rank: equal bytes under every budget, and what the report says of them."""

import itertools

import numpy as np
import pytest
import torch
from tiny import compressed, load, quick_config, save_dense, tiny_model

from transformers_mcmoe import compression_report
from transformers_mcmoe.config import ODPConfig
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.pipeline.allocating import Allocator
from transformers_mcmoe.plan import Matrix
from transformers_mcmoe.report.placement import placement
from transformers_mcmoe.routing import RoutingRatios


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense("mixtral", tmp_path_factory.mktemp("placement") / "dense")


def sums(model, ranks):
    """Sum of code widths times weights of each rank, over all layers and per layer."""
    plan = model.hf_quantizer.quantization_config.plan
    found = []
    for widths in plan.experts.values():
        bits = np.asarray(widths.gate_up) * 2 + np.asarray(widths.down)  # gate and up have the weights of down each
        found.append(bits.reshape(ranks, -1).sum(1))
    return np.asarray(found)


PAPER = {"budget": "layer", "eps": "nearest", "alpha": 1.0, "beta": 1.5}


@pytest.mark.parametrize("changes", [{}, {"budget": "layer"}, {"allocation": "uniform"}, PAPER])
def test_ranks_hold_equal_bytes(dense, changes, tmp_path):
    model = compressed(dense, quick_config(expert_parallel=4, bits=2.6, **changes))
    totals = sums(model, 4).sum(0)
    report = compression_report(model)["expert_parallel"]
    step = 3  # the least by which two plans differ: one bit of an expert
    assert totals.max() - totals.min() <= step
    hidden, inner = model.config.hidden_size, model.config.intermediate_size
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    sizes = [sum(Matrix("", *shape, bits).packed_bytes(128) for shape in shapes) for bits in (1, 2)]
    assert max(report["bytes"]) - min(report["bytes"]) <= sizes[1] - sizes[0]
    assert report["ranks"] == 4
    assert sum(report["tokens"]) == 8 * 32 * 2 * 2  # tokens, slots, layers
    assert report["bytes_max_over_mean"] >= 1.0
    model.save_pretrained(tmp_path)
    assert compression_report(load(tmp_path))["expert_parallel"] == report


@pytest.mark.parametrize(
    ("bits", "remainders"), [((1, 2, 3, 4), (20, 21) * 8), ((2, 4), (20, 22, 24) * 5), ((1, 2), (9, 10, 13))]
)
def test_steps_are_dealt_to_one_rank_after_the_other(dense, bits, remainders):
    """Over many layers no rank gets a step more than another, whatever the layers' budgets, and nothing is lost."""
    model = tiny_model("mixtral", num_hidden_layers=len(remainders))
    structure = Structure(model, 4, 4)
    budgets = dict(zip(structure.experts, remainders, strict=True))
    allocator = Allocator(structure, quick_config(expert_bits=bits, expert_parallel=4, bits=2.5), budgets)
    shares = np.asarray([allocator._shares(path) for path in budgets])
    assert shares.sum(1).tolist() == list(remainders)
    totals = shares.sum(0)
    assert totals.max() - totals.min() <= bits[1] - bits[0]
    assert (shares >= 2 * bits[0]).all()


def test_layers_that_are_not_pruned_keep_their_tokens(dense):
    odp = ODPConfig(rate=0.3, protect=0.0, layers=[1])
    report = compression_report(compressed(dense, quick_config(expert_parallel=2, odp=odp)))["expert_parallel"]
    before, after = sum(report["tokens"]), sum(report["tokens_after_odp"])
    assert after == pytest.approx(0.85 * before, rel=0.03)


def test_a_given_plan_is_placed_too(dense):
    plan = compressed(dense, quick_config()).hf_quantizer.quantization_config.plan
    with pytest.raises(ValueError, match="does not divide the 8 experts"):
        compressed(dense, quick_config(expert_parallel=3, plan=plan))
    report = compression_report(compressed(dense, quick_config(expert_parallel=2, plan=plan)))["expert_parallel"]
    assert sum(report["tokens"]) == 8 * 32 * 2 * 2


def test_without_it_ranks_may_differ(dense):
    assert "expert_parallel" not in compression_report(compressed(dense, quick_config()))


def test_pruning_is_in_the_report(dense):
    odp = ODPConfig(rate=0.2, protect=0.0)
    report = compression_report(compressed(dense, quick_config(expert_parallel=2, odp=odp)))["expert_parallel"]
    before, after = sum(report["tokens"]), sum(report["tokens_after_odp"])
    assert after == pytest.approx(0.8 * before, rel=0.03)
    assert report["tokens_after_odp_max_over_mean"] >= 1.0


def test_limits(dense):
    with pytest.raises(ValueError, match=r"expert_parallel=3 does not divide the 8 experts of 'model\.layers\.0"):
        compressed(dense, quick_config(expert_parallel=3))
    for changes in (
        {"expert_parallel": 0},
        {"expert_parallel": 2, "at_least": {3: 1}},
        {"expert_parallel": 2, "prune": 0.25},
        {"expert_parallel": 2, "rank": 32},
    ):
        with pytest.raises(ValueError, match=r"expert_parallel=\d is not valid"):
            quick_config(**changes)


def test_placement_of_known_numbers():
    """Two layers of four experts on two ranks."""
    found = placement(2, {"a": [1.0, 2.0, 3.0, 4.0], "b": [5.0, 5.0, 1.0, 1.0]}, {})
    assert found == {"ranks": 2, "bytes": [13, 9], "bytes_max_over_mean": round((7 / 5 + 10 / 6) / 2, 4)}


@pytest.mark.parametrize(
    ("levels", "protect", "drop_all"), itertools.product([(0.5,), (0.1,), (1.0,), (0.0,)], [0.0, 0.1], [0.0, 0.05])
)
def test_kept_slots_of_a_top_2_router(levels, protect, drop_all):
    """Against a count of the routing tensors themselves."""
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(4096)])
    first = torch.rand(4096, generator=generator) * 0.5 + 0.5
    weights = torch.stack([first, 1 - first], 1)
    ratios = RoutingRatios(8)
    ratios.add(index, weights)
    own = torch.bincount(index.flatten(), minlength=8).double()
    gone = torch.bincount(index[:, 1][weights[:, 1] / weights[:, 0] < levels[0]], minlength=8).double()
    expected = own - (1 - protect - drop_all) * gone - drop_all * own
    found = torch.tensor(ratios.kept(levels, protect, drop_all), dtype=torch.float64)
    assert torch.allclose(found, expected, atol=3)


def test_kept_slots_where_slots_have_thresholds_of_their_own():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(2048, 4, generator=generator).sort(-1, descending=True).values
    index = torch.stack([torch.randperm(16, generator=generator)[:4] for _ in range(2048)])
    ratios = RoutingRatios(16)
    ratios.add(index, weights)
    levels = (0.9, 0.5, 0.2)
    skipped = sum(int((weights[:, n + 1] / weights[:, 0] < level).sum()) for n, level in enumerate(levels))
    assert sum(ratios.kept(levels)) == pytest.approx(2048 * 4 - skipped, abs=8)
