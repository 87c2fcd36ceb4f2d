# SPDX-License-Identifier: Apache-2.0
"""Plans: JSON round trips, what is refused, and sizes against a computation by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from transformers_mcmoe.plan import ExpertWidths, Matrix, Plan, average_bits, bits_per_weight

PLAN = Plan(
    {
        "model.layers.0.mlp.experts": ExpertWidths((1, 2, 3, 0), (1, 2, 3, 0)),
        "model.layers.1.mlp.experts": ExpertWidths((8, 4, 0, 2), (4, 8, 0, 3)),
    },
    {
        "model.layers.0.self_attn.q_proj": 4,
        "model.layers.1.self_attn.q_proj": 8,
        "model.layers.11.self_attn.q_proj": 3,
        "model.layers.1.self_attn.o_proj": 2,
        "encoder.blocks.2.inner.5.fc": 1,
        "model.adapter": 4,
    },
)


def _expert_plan(gate_up: Any, down: Any) -> dict[str, Any]:
    return {"experts": {"m.0.experts": {"gate_up": gate_up, "down": down}}}


def test_to_dict():
    assert PLAN.to_dict() == {
        "version": 2,
        "experts": {
            "model.layers.0.mlp.experts": {"gate_up": "1230", "down": "1230"},
            "model.layers.1.mlp.experts": {"gate_up": "8402", "down": "4803"},
        },
        "linears": {
            "model.layers.*.self_attn.q_proj": "48---------3",
            "model.layers.*.self_attn.o_proj": "-2",
            "encoder.blocks.*.inner.5.fc": "--1",
            "model.adapter": "4",
        },
    }


@pytest.mark.parametrize("plan", [PLAN, Plan(PLAN.experts), Plan({})])
def test_json_round_trip(plan: Plan):
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_linears_and_version_may_be_left_out():
    plan = Plan.from_dict(_expert_plan("12", "13"))
    assert plan == Plan({"m.0.experts": ExpertWidths((1, 2), (1, 3))})


def test_expert_widths():
    assert ExpertWidths.of(iter([3, 0])) == ExpertWidths((3, 0), (3, 0))
    widths = ExpertWidths((1, 2), (3, 4))
    assert widths.of_role("gate_up") == (1, 2)
    assert widths.of_role("down") == (3, 4)


def test_expert_widths_of_numpy_are_json():
    import numpy as np

    plan = Plan({"m": ExpertWidths.of(np.array([1, 3]))})
    assert json.loads(json.dumps(plan.to_dict()))["experts"] == {"m": {"gate_up": "13", "down": "13"}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "A plan is a dict with the keys 'experts' and 'linears'; this one has no 'experts'"),
        ([], "A plan is a dict with the keys"),
        ("12", "A plan is a dict with the keys"),
        ({"version": 3, "experts": {}}, "The plan has version 3, this release reads up to 2; update the package"),
        (_expert_plan("15", "15"), r"'m\.0\.experts' holds the widths '15'; each must be one of \(0, 1, 2, 3, 4, 8\)"),
        (_expert_plan("12", "1x"), r"'m\.0\.experts' holds the widths '1x'"),
        (_expert_plan("1-", "1-"), r"'m\.0\.experts' holds the widths '1-'"),
        (_expert_plan("10", "12"), r"'m\.0\.experts' must drop \(0\) the same experts .* they are '10' and '12'"),
        (_expert_plan("12", "10"), r"must drop \(0\) the same experts"),
        (_expert_plan("12", "123"), r"must drop \(0\) the same experts"),
        ({"experts": {}, "linears": {"a.*.b": "4-7"}}, r"'a\.\*\.b' holds the widths '7'; each must be one of"),
        ({"experts": {}, "linears": {"a.*.b": "0"}}, r"'a\.\*\.b' holds the widths '0'.* one of \(1, 2, 3, 4, 8\)"),
    ],
)
def test_from_dict_refuses(data: Any, message: str):
    with pytest.raises(ValueError, match=message):
        Plan.from_dict(data)


@pytest.mark.parametrize(
    "widths",
    [{"gate_up": "12"}, {"down": "12"}, "12", {"gate_up": [1, 2], "down": [1, 2]}],
    ids=["no down", "no gate_up", "a string", "lists"],
)
def test_from_dict_names_malformed_experts(widths: Any):
    """A plan may be written by hand: what is wrong is a ValueError that names the entry."""
    with pytest.raises(ValueError, match=r"m\.0\.experts"):
        Plan.from_dict({"experts": {"m.0.experts": widths}})


def test_packed_bytes():
    # 2 x 96 at 3 bits in groups of 96: a record is 36 bytes of codes and 4 of the grid
    assert Matrix("a", 2, 96, 3).packed_bytes(128) == 2 * 1 * 40
    # 5 x 200 at 4 bits: two groups of 128, the last one padded
    assert Matrix("a", 5, 200, 4).packed_bytes(128) == 5 * 2 * (64 + 4)
    assert Matrix("a", 5, 256, 8).packed_bytes(64) == 5 * 4 * (64 + 4)
    assert Matrix("a", 5, 256, 0).packed_bytes(128) == 0
    assert Matrix("a", 5, 200, 4).weights == 1000


def test_average_bits_by_hand():
    matrices = [Matrix("a", 10, 128, 4), Matrix("b", 30, 128, 2), Matrix("c", 20, 256, 0)]
    # (1280 * 4 + 3840 * 2 + 5120 * 0) / 10240
    assert average_bits(matrices) == 1.25
    assert average_bits(iter(matrices)) == 1.25
    assert average_bits([]) == 0.0


def test_bits_per_weight_by_hand():
    matrices = [Matrix("a", 10, 128, 4), Matrix("b", 30, 128, 2), Matrix("c", 20, 256, 0)]
    # bytes: 10 * (64 + 4) + 30 * (32 + 4) = 1760, over 10240 weights
    assert bits_per_weight(matrices, 128) == 8 * 1760 / 10240
    # groups of 64: 10 * 2 * (32 + 4) + 30 * 2 * (16 + 4) = 1920
    assert bits_per_weight(iter(matrices), 64) == 8 * 1920 / 10240
    assert bits_per_weight([], 128) == 0.0


def test_grid_costs_a_quarter_bit_in_groups_of_128():
    for bits in (1, 2, 3, 4, 8):
        assert bits_per_weight([Matrix("a", 7, 4096, bits)], 128) == bits + 0.25
