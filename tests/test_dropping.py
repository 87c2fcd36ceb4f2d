# SPDX-License-Identifier: Apache-2.0
"""Compressing with dropped experts, end to end: plans, budgets, reports, checkpoints, and what runs on top of them."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from test_routers import spread
from tiny import compressed, families, load, load_class, quick_config, save_dense, tiny_model, tokens
from torch.nn import functional

from transformers_mcmoe import (
    ODPConfig,
    PackedExperts,
    PruneConfig,
    compression_report,
    expert_pruning_stats,
    set_expert_pruning,
)
from transformers_mcmoe.config.structure import METHODS
from transformers_mcmoe.integrations.card import build_card
from transformers_mcmoe.models.experts import find_experts
from transformers_mcmoe.models.routers import Router, SlicedRouter
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.pipeline.preview import preview
from transformers_mcmoe.plan import ExpertWidths, Plan

IDS = tokens(2, 24)
PAPERS = ("mixtral", "qwen2_moe", "deepseek_v2")  # the families of MoE-I2


def config_for(prune, **changes):
    return quick_config(**({"bits": 3.2, "expert_bits": (2, 4, 8), "prune": prune} | changes))


def plan_of(model):
    return model.hf_quantizer.quantization_config.plan


@pytest.fixture(scope="module", params=families(PAPERS, ["qwen2_moe"]))
def folder(request, tmp_path_factory):
    """A dense checkpoint whose routers send tokens everywhere."""
    path = tmp_path_factory.mktemp(request.param) / "dense"
    spread(tiny_model(request.param)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtral") / "dense"
    spread(tiny_model("mixtral")).save_pretrained(path)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_methods(folder, method):
    model = compressed(folder, config_for(PruneConfig(0.25, method=method)))
    report = compression_report(model)
    dropped = report["dropped_experts"]
    kept = {path: widths.kept for path, widths in plan_of(model).experts.items()}
    total = 8 * len(kept)
    assert dropped["count"] == total / 4
    assert dropped["of"] == total
    assert sum(map(len, kept.values())) == total * 3 / 4
    if method != "moe_i2":
        assert {len(own) for own in kept.values()} == {6}
        assert dropped["importance"] == {}
    else:
        assert {len(values) for values in dropped["importance"].values()} == {8}
    assert report["config"]["prune"]["method"] == method
    assert "structure" in report["seconds"]
    for path, own in kept.items():
        tokens_of = report["coverage"][path]["tokens"]
        assert all((tokens_of[e] == 0) == (e not in own) for e in range(8))
    # the average counts dropped weights as 0 bits
    assert report["average_bits"] == pytest.approx(3.2, abs=0.1)


@pytest.mark.slow
@torch.no_grad()
def test_searched_sets_change_less_than_others(mixtral):
    found = {}
    for method in ("naee", "reap", "frequency", "random"):
        model = compressed(mixtral, config_for(PruneConfig(0.5, method=method)))
        errors = compression_report(model)["dropped_experts"]["errors"]
        found[method] = errors["model.layers.0.mlp.experts"]  # later layers see different inputs
    assert found["naee"] == min(found.values())
    assert max(found.values()) > found["naee"]


@torch.no_grad()
def test_save_and_load(folder, tmp_path):
    model = compressed(folder, config_for(0.25))
    logits = model(IDS).logits
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again(IDS).logits, logits)
    dense, packed = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    for path, widths in plan_of(model).experts.items():
        router = Router(again, again.get_submodule(path).adapter)
        assert isinstance(router.module, SlicedRouter) == (len(widths.kept) < 8)
        assert torch.equal(router.module.weight, Router(load(folder), find_experts(load(folder))[path]).module.weight)
    assert len(packed) < len(dense)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["prune"]["ratio"] == 0.25


@torch.no_grad()
def test_a_plan_gives_the_same_again(mixtral):
    first = compressed(mixtral, config_for(0.25))
    second = compressed(mixtral, quick_config(plan=plan_of(first).to_dict()))
    assert plan_of(second) == plan_of(first)
    assert torch.equal(second(IDS).logits, first(IDS).logits)


@torch.no_grad()
def test_pruning_at_run_time_on_top(folder):
    model = compressed(folder, config_for(0.25, odp=ODPConfig(rate=0.2, protect=0)))
    model(IDS)
    assert 0.05 < expert_pruning_stats(model)["prefill"]["bytes_skipped"] < 0.4
    set_expert_pruning(model, False)
    assert torch.isfinite(model(IDS).logits).all()


@torch.no_grad()
def test_dequantized(folder):
    model = compressed(folder, config_for(0.25))
    expected = model(IDS).logits
    dense = model.dequantize()
    assert not any(isinstance(module, PackedExperts) for module in dense.modules())
    assert (dense(IDS).logits - expected).norm() < 5e-3 * expected.norm()


@torch.no_grad()
def test_a_loaded_router_does_not_sample(tmp_path):
    """PhiMoE's router is random while it trains: what is loaded computes as it was calibrated."""
    spread(tiny_model("phimoe")).save_pretrained(tmp_path / "dense")
    compressed(tmp_path / "dense", config_for(0.25)).save_pretrained(tmp_path / "packed")
    model = load(tmp_path / "packed")
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    plain = model.dequantize()
    assert torch.equal(plain(IDS).logits, plain(IDS).logits)


@torch.no_grad()
def test_target_size(mixtral):
    """The size is met by what is kept."""
    model = compressed(mixtral, config_for(0.25, bits=2.54, target_size="400KB", expert_bits=(1, 2, 3, 4, 8)))
    size = compression_report(model)["sizes"]["total_bytes"]
    assert 360e3 < size <= 400e3


@pytest.mark.slow
def test_tuning_on_top(mixtral):
    """Grids, norms and sliced routers are trained; nothing is left out with a note."""
    config = config_for(0.25, tuning_steps=4, dataset=tokens(16, 32), num_samples=16)
    report = compression_report(compressed(mixtral, config))
    assert not any("Not tuned" in note for note in report["fallbacks"])
    assert report["tuning"]["steps"] == 4


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_on_routers(mixtral):
    """An adapter on a sliced router trains; one inside a router that is made of layers would do nothing, and is refused."""
    peft = pytest.importorskip("peft")
    model = compressed(mixtral, config_for(0.25))
    with torch.no_grad():
        before = model(IDS).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["gate"]))
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in adapted.parameters() if p.requires_grad)
    with torch.no_grad():
        assert torch.allclose(adapted(input_ids=IDS).logits, before, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_inside_routers(tmp_path):
    peft = pytest.importorskip("peft")
    spread(tiny_model("dbrx")).save_pretrained(tmp_path)
    model = compressed(tmp_path, config_for(0.25))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["layer"]))
    with pytest.raises(ValueError, match=r"An adapter wraps 'layer\.weight' of the DbrxRouter"):
        adapted(input_ids=IDS)


def test_cards_and_reports(mixtral):
    model = compressed(mixtral, config_for(0.25))
    report = json.loads(json.dumps(compression_report(model)))
    text = str(build_card("me/packed", report, {}))
    assert "4 of 16 experts were dropped" in text
    assert "--prune-options" in text
    del report["dropped_experts"]  # of an earlier release
    assert "were dropped" not in str(build_card("me/packed", report, {}))


@torch.no_grad()
def test_generation(folder):
    model = compressed(folder, config_for(0.25))
    out = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 28)


class TestImportance:
    @torch.no_grad()
    def test_by_the_loss(self, mixtral):
        """Against the whole model's cross entropy without each expert."""
        data = tokens(4, 32, seed=5)
        prune = PruneConfig(0.25, importance="loss")
        found = compression_report(compressed(mixtral, config_for(prune, dataset=data, num_samples=4)))
        dense = load(mixtral)

        def loss():
            logits = dense(data, use_cache=False).logits[:, :-1]
            return float(functional.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten()))

        before = loss()
        for path, experts in find_experts(dense).items():
            for expert in range(8):
                with Router(dense, experts).keeping([e for e in range(8) if e != expert]):
                    own = max(loss() - before, 1e-6)
                measured = found["dropped_experts"]["importance"][path][expert]
                assert measured == pytest.approx(own, rel=1e-3, abs=1e-6)

    @torch.no_grad()
    def test_less_important_layers_drop_more(self, tmp_path):
        model = spread(tiny_model("mixtral"))
        for parameter in model.model.layers[0].mlp.experts.parameters():
            parameter.data.mul_(0.1)  # the first layer hardly matters
        model.save_pretrained(tmp_path)
        kept = [len(w.kept) for w in plan_of(compressed(tmp_path, config_for(0.25))).experts.values()]
        assert sum(kept) == 12
        assert kept[0] < kept[1]


@pytest.mark.slow
@torch.no_grad()
def test_layers_are_combined(mixtral):
    """The sets of two layers against all combinations of each layer's best, by the output behind both."""
    data = tokens(4, 32, seed=7)
    options = {"dataset": data, "num_samples": 4, "rounding": "gptq"}
    prune = PruneConfig(0.25, candidates=4, field=2)
    model = compressed(mixtral, config_for(prune, **options))
    chosen = [widths.kept for widths in plan_of(model).experts.values()]
    dense = load(mixtral)
    counts = [8 - len(kept) for kept in chosen]
    routers = [Router(dense, experts) for experts in find_experts(dense).values()]

    def behind():
        found = []
        with dense.model.layers[1].register_forward_hook(
            lambda m, a, o: found.append(o if torch.is_tensor(o) else o[0])
        ):
            dense(data, use_cache=False)
        return found[0].double()

    whole = behind()
    norm = whole.norm(dim=-1)

    def error(kept):
        with routers[0].keeping(kept[0]), routers[1].keeping(kept[1]):
            change = (behind() - whole).square().sum(-1)
        return float((change / (norm * norm.median())).sum())

    everything = [
        [tuple(e for e in range(8) if e not in dropped) for dropped in itertools.combinations(range(8), count)]
        for count in counts
    ]
    errors = sorted(error(pair) for pair in itertools.product(*everything))
    rank = errors.index(min(errors, key=lambda e: abs(e - error(chosen))))
    assert rank < len(errors) / 10
    first = PruneConfig(0.25, candidates=1, field=1)
    single = [w.kept for w in plan_of(compressed(mixtral, config_for(first, **options))).experts.values()]
    assert error(chosen) <= error(single) + 1e-9


class TestRefused:
    def test_more_than_the_router_can_spare(self, mixtral):
        with pytest.raises(ValueError, match=r"prune=0\.9 cannot be met: .* at most 12 of 16 experts"):
            compressed(mixtral, config_for(0.9))

    def test_routers_that_cannot_be_sliced(self, tmp_path):
        save_dense("llama4_text", tmp_path)
        with pytest.raises(NotImplementedError, match="class Llama4Router cannot be sliced"):
            compressed(tmp_path, config_for(0.25))

    def test_groups(self, tmp_path):
        """A router with groups keeps equally many of each."""
        save_dense("deepseek_v3", tmp_path)
        model = compressed(tmp_path, config_for(0.25, bits=4.0))
        (kept,) = (widths.kept for widths in plan_of(model).experts.values())
        assert [sum(e // 4 == g for e in kept) for g in range(2)] == [3, 3]

    @pytest.mark.parametrize(
        ("family", "kept", "message"),
        [
            ("mixtral", (3,), "keeps 1 experts of 'model.layers.0.mlp.experts', but its router sends tokens to 2"),
            ("deepseek_v3", (0, 1, 2, 3, 4, 5), "must keep equally many"),
            ("dbrx", (3,), "keeps 1 experts of 'transformer.blocks.0.ffn.experts', but its router sends tokens to 2"),
        ],
    )
    def test_plans(self, family, kept, message, tmp_path):
        """A given plan is checked before anything is run."""
        save_dense(family, tmp_path)
        with torch.device("meta"):
            structure = Structure(tiny_model(family))
        widths = ExpertWidths.of([2 if e in kept else 0 for e in range(8)])
        plan = Plan(dict.fromkeys(structure.experts, widths), {})
        with pytest.raises(ValueError, match=message):
            compressed(tmp_path, quick_config(plan=plan))

    def test_conditions_that_layers_must_be_able_to_pay(self, tmp_path):
        """A layer that matters little keeps as many experts as two of 8 bits need."""
        model = spread(tiny_model("mixtral"))
        for parameter in model.model.layers[0].mlp.experts.parameters():
            parameter.data.mul_(0.01)
        model.save_pretrained(tmp_path)
        options = {"bits": 3.1, "expert_bits": (2, 4, 8), "budget": "layer", "attention_bits": 4}
        plain = plan_of(compressed(tmp_path, quick_config(prune=0.35, **options)))
        asked = plan_of(compressed(tmp_path, quick_config(prune=0.35, at_least={8: 2}, **options)))
        kept = [[len(widths.kept) for widths in plan.experts.values()] for plan in (plain, asked)]
        assert kept[0][0] < kept[1][0]
        assert all(sum(bits == 8 for bits in widths.gate_up) >= 2 for widths in asked.experts.values())

    def test_none_at_all(self, mixtral):
        with pytest.raises(ValueError, match=r"prune=0\.01 drops none of 16 experts; give 0\.0625 at least"):
            compressed(mixtral, config_for(0.01))

    def test_loss_without_a_head(self, mixtral):
        from transformers import MixtralModel

        config = config_for(PruneConfig(0.25, importance="loss"))
        with pytest.raises(ValueError, match="MixtralModel has no output head, which"):
            MixtralModel.from_pretrained(mixtral, quantization_config=config, dtype=torch.float32)

    def test_a_budget_that_the_kept_experts_cannot_spend(self, mixtral):
        with pytest.raises(ValueError, match="without its dropped experts lies between"):
            compressed(mixtral, config_for(0.5, bits=7.0))


def test_preview(mixtral):
    with torch.device("meta"):
        empty = load_class(mixtral)._from_config(tiny_model("mixtral").config)
    config = config_for(0.25, attention_bits=4)
    looked = preview(empty, config, dtype=torch.float32)
    report = compression_report(compressed(mixtral, config))
    assert (looked.dropped, looked.experts) == (4, 16)
    assert looked.seconds["structure"] > 0
    assert looked.total_bytes == pytest.approx(report["sizes"]["total_bytes"], rel=0.02)
    assert looked.average_bits == pytest.approx(report["average_bits"], abs=0.1)
    assert Structure(empty).kept == {}
