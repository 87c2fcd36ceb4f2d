# SPDX-License-Identifier: Apache-2.0
"""The stages as a whole: allocations under one budget, the program on measured costs, streaming against loading."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import compressed, quick_config, save_dense, tokens

from transformers_mcmoe import MCMoEConfig, compression_report
from transformers_mcmoe.allocation import solve
from transformers_mcmoe.config import ALLOCATIONS
from transformers_mcmoe.models import stream
from transformers_mcmoe.pipeline import measuring

PATHS = [f"model.layers.{i}.mlp.experts" for i in range(2)]
CALIBRATION = {"dataset": tokens(32, 64), "num_samples": 32, "bits": 2.5}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense("mixtral", tmp_path_factory.mktemp("pipeline") / "dense")


@pytest.fixture(scope="module")
def report(dense):
    return compression_report(compressed(dense, quick_config(**CALIBRATION, budget="layer")))


def _total(report, path):
    return sum(int(digit) for digit in report["expert_bits"][path])


def _cost(report, path, alpha=0.0, beta=0.0, gamma=2.0):
    """phi^alpha * w^beta * eps^gamma from what the report says, [E, J]."""
    coverage, errors = report["coverage"][path], report["errors"][path]
    frequency, weight = np.array(coverage["tokens"], float), np.array(coverage["routing_weight"])
    eps = np.array([errors[str(bits)] for bits in (1, 2, 3)]).T
    return ((frequency / frequency.sum()) ** alpha * (weight / weight.sum()) ** beta)[:, None] * eps**gamma


@pytest.mark.parametrize("exponents", [{}, {"alpha": 1.0, "beta": 1.5, "gamma": 1.0}])
def test_plan_is_the_programs_answer_on_the_reported_costs(dense, exponents):
    # on dense activations both passes see the same routing
    options = {"expert_bits": (1, 2, 3), "attention_bits": 4, "granularity": "expert", "activations": "dense"}
    report = compression_report(compressed(dense, quick_config(**CALIBRATION, **exponents, **options)))
    for path in PATHS:
        price = np.tile([1.0, 2.0, 3.0], (8, 1))
        choice = solve(_cost(report, path, **exponents), price, _total(report, path))
        assert "".join(str(option + 1) for option in choice) == report["expert_bits"][path]


def test_budget_is_spent(report):
    budgets = [_total(report, path) for path in PATHS]
    assert report["average_bits"] <= 2.5
    one_expert_bit = 3 * 64 * 100 / report["sizes"]["quantized_weights"]
    assert report["average_bits"] > 2.5 - one_expert_bit
    assert abs(budgets[0] - budgets[1]) <= 1


def test_errors_fall_with_bits_and_coverage_counts_every_slot(report):
    for path in PATHS:
        one, two, three = (np.array(report["errors"][path][bits]) for bits in "123")
        assert (one > two).all()
        assert (two > three).all()
        assert sum(report["coverage"][path]["tokens"]) == 32 * 64 * 2
        # Mixtral's top-2 weights sum to 1
        assert sum(report["coverage"][path]["routing_weight"]) == pytest.approx(32 * 64, rel=1e-4)


@pytest.mark.parametrize("allocation", [name for name in ALLOCATIONS if name != "bsp"])
@pytest.mark.parametrize("budget", ["layer", "model"])
def test_every_allocation_spends_the_same_budget(dense, report, allocation, budget):
    config = quick_config(**CALIBRATION, allocation=allocation, budget=budget, attention_bits=4)
    other = compression_report(compressed(dense, config))
    totals = [_total(other, path) for path in PATHS]
    if budget == "layer":
        assert totals == [_total(report, path) for path in PATHS]
    assert sum(totals) == sum(_total(report, path) for path in PATHS)
    assert other["average_bits"] == report["average_bits"]
    if allocation == "uniform":
        assert all(set(other["expert_bits"][path]) == {"2", "3"} for path in PATHS)


def test_block_score_gives_whole_layers_the_higher_width(dense):
    config = CALIBRATION | {"bits": 3.1, "expert_bits": (2, 4), "budget": "model", "allocation": "bsp"}
    widths = compression_report(compressed(dense, quick_config(**config)))["expert_bits"]
    assert sorted(set(digits) == {"4"} for digits in widths.values()) == [False, True]
    assert all(len(set(digits)) == 1 for digits in widths.values())


def test_random_choices_follow_the_seed(dense):
    def widths(seed):
        config = quick_config(**CALIBRATION, allocation="uniform", seed=seed)
        return compression_report(compressed(dense, config))["expert_bits"]

    assert widths(0) == widths(0)
    assert widths(0) != widths(1)


def test_papers_constraint(dense):
    config = quick_config(**(CALIBRATION | {"bits": 1.7}), at_least={3: 1, 2: 1})
    for digits in compression_report(compressed(dense, config))["expert_bits"].values():
        assert {"2", "3"} <= set(digits)


def test_plan_of_a_report_gives_the_same_model(dense, tmp_path):
    first = compressed(dense, quick_config(**CALIBRATION))
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(first.config.quantization_config.plan.to_dict()))
    second = compressed(dense, quick_config(**CALIBRATION | {"bits": 2.54}, plan=plan))
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_plan_that_is_rounded_to_nearest_needs_no_data(dense, report):
    plan = report["config"]["plan"]
    packed = compressed(dense, MCMoEConfig(plan=plan, rounding="nearest", dataset="no such file.txt"))
    assert compression_report(packed)["calibration_tokens"] == 0


@pytest.mark.parametrize("activations", ["compressed", "dense"])
def test_what_a_layer_is_calibrated_on(dense, activations):
    """With dense activations a layer does not depend on the widths before it; with compressed ones it does."""

    def second_layer(first_bits):
        plan = {"experts": {path: {"gate_up": "22222222", "down": "22222222"} for path in PATHS}}
        plan["experts"][PATHS[0]] = {"gate_up": str(first_bits) * 8, "down": str(first_bits) * 8}
        state = compressed(dense, quick_config(plan=plan, activations=activations)).state_dict()
        return {name: tensor for name, tensor in state.items() if PATHS[1] in name and tensor.dtype == torch.uint8}

    one, eight = second_layer(1), second_layer(8)
    assert one
    assert all(torch.equal(one[name], eight[name]) for name in one) == (activations == "dense")


@pytest.mark.parametrize("budget", ["layer", "model"])
def test_streamed_equals_loaded(dense, tmp_path, monkeypatch, budget):
    """The same plan and the same bytes, whether layers are streamed or the whole model is in memory."""
    config = quick_config(**CALIBRATION, budget=budget)
    streamed = compressed(dense, config)

    def refuse(*args, **kwargs):
        raise stream.NotStreamable("a test says so")

    monkeypatch.setattr(stream, "LayerStream", refuse)
    loaded = compressed(dense, config)
    assert "a test says so" in compression_report(loaded)["fallbacks"][0]
    streamed.save_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_model_budget_compares_layers(tmp_path):
    """A layer whose experts matter more gets more bits from a budget for the whole model."""
    folder = save_dense("mixtral", tmp_path / "dense")
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "layers.0" in name and name.endswith("w2.weight"):
            tensors[name] = tensors[name] * 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = compression_report(compressed(folder, quick_config(**CALIBRATION, budget="model")))
    assert _total(report, PATHS[0]) < _total(report, PATHS[1])


def test_starved_experts_are_reported(dense):
    report = compression_report(compressed(dense, quick_config(dataset=tokens(1, 16), num_samples=1)))
    starved = report["coverage"][PATHS[0]]["starved"]
    assert starved == list(range(8))
    assert any(PATHS[0] in note and "too few" in note for note in report["fallbacks"])
    assert all(np.isfinite(errors).all() for errors in report["errors"][PATHS[0]].values())


def test_layers_behind_the_last_quantized_one_are_not_run(dense):
    steps = []
    options = {"modules_to_not_convert": ["model.layers.1"], "attention_bits": 16, "max_memory": "2GB"}
    model = compressed(dense, quick_config(**CALIBRATION, **options, progress=steps.append))
    assert {step.layers for step in steps} == {1}
    assert set(compression_report(model)["expert_bits"]) == {PATHS[0]}


def test_hessian_errors_are_measured_where_they_are_asked_for(dense, monkeypatch):
    calls = []
    original = measuring.hessian_error
    monkeypatch.setattr(measuring, "hessian_error", lambda *args: calls.append(args) or original(*args))
    compressed(dense, quick_config(**CALIBRATION))
    assert not calls
    compressed(dense, quick_config(**CALIBRATION, allocation="hessian"))
    assert len(calls) == 2 * 8 * 4  # layers, experts, widths


def test_progress_reaches_the_end(dense):
    steps = []
    compressed(dense, quick_config(**CALIBRATION, budget="model", progress=steps.append))
    assert [step.stage for step in steps if step.layer == step.layers] == ["allocate", "quantize"]
    assert {step.expert for step in steps} >= set(range(9))
    assert all(step.memory > 0 for step in steps)


def _files(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("share", [0.2, 0.3])
@pytest.mark.parametrize("allocation", ["pmq", "uniform"])
def test_target_size_is_met_and_used(dense, tmp_path, share, allocation):
    most = int(_files(dense) * share)
    options = {"dataset": tokens(8, 32), "num_samples": 8, "target_size": most, "allocation": allocation}
    config = MCMoEConfig(**options, expert_bits=(1, 2, 3, 4, 8), progress=lambda _: None)
    model = compressed(dense, config)
    model.save_pretrained(tmp_path / "packed")
    assert 0.97 * most < _files(tmp_path / "packed") <= most
    assert model.config.quantization_config.bits == pytest.approx(compression_report(model)["average_bits"], abs=1e-5)


def test_target_size_that_is_too_small_is_refused_with_what_there_is(dense):
    with pytest.raises(ValueError, match=r"target_size='5KB' cannot be met: at the lowest widths the weights take"):
        compressed(dense, MCMoEConfig(target_size="5KB", dataset=tokens(8, 32), num_samples=8))


def test_attention_is_given_more_bits_where_its_errors_ask_for_them(dense):
    options = CALIBRATION | {"attention_bits": (2, 4, 8), "bits": 3.0}
    model = compressed(dense, quick_config(**options))
    report, plan = compression_report(model), model.config.quantization_config.plan
    assert report["average_bits"] <= 3.0
    assert set(plan.linears.values()) <= {2, 4, 8}
    least = compression_report(compressed(dense, quick_config(**options | {"bits": 1.5})))
    assert min(plan.linears.values()) >= 2
    assert least["average_bits"] <= 1.5


def test_projections_may_have_widths_of_their_own(dense):
    options = CALIBRATION | {"granularity": "projection", "expert_bits": (1, 2, 3, 4)}
    reports = [compression_report(compressed(dense, quick_config(**options | {"bits": bits}))) for bits in (2.1, 2.5)]
    assert all(bits - 0.05 < r["average_bits"] <= bits for r, bits in zip(reports, (2.1, 2.5), strict=True))
    assert any(report["expert_bits"] != report["down_bits"] for report in reports)
    with pytest.raises(ValueError, match="granularity='projection' is not valid"):
        quick_config(granularity="projection", budget="layer")
