# SPDX-License-Identifier: Apache-2.0
"""Expert pruning as users switch it: at compression, on packed and on dense models, and what it reports."""

import copy
import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from tiny import compressed, load, quick_config, relative_rms, save_dense, tokens
from transformers import AutoModel, ContinuousBatchingConfig, GenerationConfig

from transformers_mcmoe import (
    MCMoEConfig,
    ODPConfig,
    PackedExperts,
    compression_report,
    expert_pruning_stats,
    set_expert_pruning,
)
from transformers_mcmoe.routing import attached

IDS = tokens(2, 24, seed=1)


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "packed"
    compressed(dense, quick_config(odp=True)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unpruned(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpruned") / "packed"
    compressed(dense).save_pretrained(folder)
    return folder


class TestPackedCheckpoints:
    def test_reload_computes_the_same(self, dense, tmp_path):
        model = compressed(dense, quick_config(odp=ODPConfig(quantile=0.7, protect=0.1)))
        model.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["odp"]
        assert set(saved["thresholds"]) == set(compression_report(model)["routing_ratios"])
        again = load(tmp_path)
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert again.config.quantization_config.odp == model.config.quantization_config.odp

    @pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
    def test_other_options_on_load(self, packed, unpruned):
        plain = load(unpruned)(IDS).logits
        model = load(packed, quantization_config=MCMoEConfig(odp=False))
        assert attached(model) is None
        assert torch.equal(model(IDS).logits, plain)
        model = load(packed, quantization_config=MCMoEConfig(odp=ODPConfig(quantile=0.2)))
        assert attached(model).options.quantile == 0.2
        assert attached(model).options.calibrated
        assert attached(load(packed, quantization_config=MCMoEConfig())).options == attached(load(packed)).options
        assert (
            attached(load(unpruned, quantization_config=MCMoEConfig(odp=True))).options
            == attached(load(packed)).options
        )

    def test_switched_without_compressing_again(self, packed, unpruned, tmp_path):
        model, plain = load(unpruned), load(packed)
        full = model(IDS).logits
        set_expert_pruning(model)
        pruned = model(IDS).logits
        assert torch.equal(pruned, plain(IDS).logits)
        set_expert_pruning(model, ODPConfig(rate=0.1))
        assert not torch.equal(model(IDS).logits, pruned)
        model.save_pretrained(tmp_path)
        assert torch.equal(load(tmp_path)(IDS).logits, model(IDS).logits)
        assert set_expert_pruning(model, False) is None
        assert torch.equal(model(IDS).logits, full)
        model.save_pretrained(tmp_path / "off")
        assert attached(load(tmp_path / "off")) is None

    @pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
    def test_base_model_and_model_with_head(self, packed, tmp_path):
        plain = load(packed)
        base = AutoModel.from_pretrained(packed, dtype=torch.float32)
        assert torch.equal(base(IDS).last_hidden_state, plain.model(IDS).last_hidden_state)
        other = AutoModel.from_pretrained(
            packed, dtype=torch.float32, quantization_config=MCMoEConfig(odp=ODPConfig(rate=0.2))
        )
        assert set(attached(other).options.thresholds) == {"layers.0.mlp.experts", "layers.1.mlp.experts"}
        base.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
        assert torch.equal(again(IDS).last_hidden_state, base(IDS).last_hidden_state)
        set_expert_pruning(again, ODPConfig(rate=0.2))
        assert attached(again).options == attached(other).options

    def test_cache_that_is_cut_back(self, packed):
        model = load(packed)
        set_expert_pruning(model, ODPConfig(threshold=1, protect=0.1, causal=True))
        output = model(IDS, use_cache=True)
        cache, step = output.past_key_values, IDS[:, :1]
        first = model(step, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        assert torch.equal(model(step, past_key_values=cache, use_cache=True).logits, first)

    def test_thresholds_from_other_text(self, packed):
        model = load(packed)
        before = attached(model).options.thresholds
        set_expert_pruning(model, ODPConfig(), dataset=tokens(4, 32, seed=9))
        assert attached(model).options.thresholds != before

    def test_layers(self, packed):
        model = load(packed)
        set_expert_pruning(model, ODPConfig(layers=[1]))
        model(IDS)
        stats = expert_pruning_stats(model)["prefill"]
        first, second = stats["layers"].values()
        assert first["bytes_skipped"] == 0 < second["bytes_skipped"]
        assert stats["bytes_per_token"] == pytest.approx(first["bytes_per_token"] + second["bytes_per_token"])
        with pytest.raises(ValueError, match="layer 5 has no experts"):
            set_expert_pruning(model, ODPConfig(layers=[5]))
        assert attached(model).options.layers == (1,)

    def test_layers_within_a_kl_budget(self, packed):
        model, text = load(packed), tokens(2, 32, seed=4)
        set_expert_pruning(model, dataset=text)
        with torch.no_grad():
            pruned = model(text).logits.log_softmax(-1)
            set_expert_pruning(model, False)
            base = model(text).logits.log_softmax(-1)
        both = float((base.exp() * (base - pruned)).sum(-1).mean())
        assert set_expert_pruning(model, ODPConfig(layers="auto", max_kl=both * 1.01), dataset=text).layers == (0, 1)
        odp = set_expert_pruning(model, ODPConfig(layers="auto", max_kl=both * 0.99), dataset=text)
        assert len(odp.layers) == 1
        with torch.no_grad():
            pruned = model(text).logits.log_softmax(-1)
        assert (base.exp() * (base - pruned)).sum(-1).mean() <= both * 0.99
        with pytest.raises(ValueError, match="allows no layer"):
            set_expert_pruning(model, ODPConfig(layers="auto", max_kl=1e-9), dataset=text)
        with pytest.raises(ValueError, match="with dataset="):
            set_expert_pruning(model, ODPConfig(layers="auto", max_kl=1))

    def test_at_compression_layers_within_a_kl_budget(self, dense):
        model = compressed(dense, quick_config(odp=ODPConfig(layers="auto", max_kl=10)))
        assert attached(model).options.layers == (0, 1)

    def test_options_are_followed_although_thresholds_are_known(self, packed):
        model = load(packed)
        found = attached(model).options
        other = set_expert_pruning(model, replace(found, quantile=0.1))
        assert other.thresholds == set_expert_pruning(model, ODPConfig(quantile=0.1)).thresholds != found.thresholds
        with pytest.raises(ValueError, match="dataset="):
            set_expert_pruning(model, replace(found, layers="auto", max_kl=1e-9))

    def test_experts_that_were_not_compressed_are_not_pruned(self, dense):
        model = compressed(dense, quick_config(odp=True, modules_to_not_convert=["model.layers.0.mlp.experts"]))
        model(IDS)
        first, second = expert_pruning_stats(model)["prefill"]["layers"].values()
        assert first["bytes_skipped"] == 0 < second["bytes_skipped"]

    @pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
    def test_without_its_report(self, packed, tmp_path, caplog):
        shutil.copytree(packed, tmp_path / "copy")
        (tmp_path / "copy" / "mcmoe_report.json").unlink()
        model = load(tmp_path / "copy")
        assert torch.equal(model(IDS).logits, load(packed)(IDS).logits)
        assert set_expert_pruning(model, ODPConfig(threshold=0.5)) is not None
        given = MCMoEConfig(odp=ODPConfig(threshold=0.5))
        again = load(tmp_path / "copy", quantization_config=given)
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        with pytest.raises(ValueError, match="give dataset="):
            set_expert_pruning(model, ODPConfig(rate=0.1))

    @pytest.mark.parametrize("which", ["packed", "dense"])
    def test_copies_and_pickles(self, which, request):
        model = load(request.getfixturevalue(which))
        set_expert_pruning(model, ODPConfig(threshold=0.9))
        logits = model(IDS).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            expert_pruning_stats(model, reset=True)
            assert torch.equal(other(IDS).logits, logits)
            assert (
                expert_pruning_stats(other)["prefill"]["tokens"]
                > 0
                == expert_pruning_stats(model)["prefill"]["tokens"]
            )

    def test_bytes_in_the_report(self, packed):
        ratios = compression_report(load(packed))["routing_ratios"]
        assert all(0 < table["droppable"] < 0.6 and table["normalized"] for table in ratios.values())


class TestDenseModels:
    def test_alone(self, dense):
        model = load(dense)
        with pytest.raises(ValueError, match="give dataset="):
            set_expert_pruning(model)
        full = model(IDS).logits
        set_expert_pruning(model, ODPConfig(threshold=0.9))
        assert not torch.equal(model(IDS).logits, full)
        text = tokens(8, 32, seed=6)
        odp = set_expert_pruning(model, ODPConfig(rate=0.3, protect=0), dataset=text)
        with torch.no_grad():
            model(text)
        assert abs(expert_pruning_stats(model)["prefill"]["bytes_skipped"] - 0.3) < 0.03
        set_expert_pruning(model, False)
        assert torch.equal(model(IDS).logits, full)
        assert odp.calibrated
        assert set_expert_pruning(model, odp) == odp

    def test_gradients_reach_the_router(self, dense):
        model = load(dense)
        set_expert_pruning(model, ODPConfig(threshold=0.9))
        model(IDS, labels=IDS).loss.backward()
        assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


class TestGeneration:
    @pytest.fixture(autouse=True)
    def without_gradients(self):
        with torch.no_grad():
            yield

    OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}  # noqa: RUF012

    @pytest.mark.parametrize("odp", [ODPConfig(protect=0), ODPConfig(protect=0.05, causal=True)])
    def test_static_cache_and_chunks_agree(self, packed, odp):
        model = load(packed)
        set_expert_pruning(model, odp)
        expected = model.generate(IDS, **self.OPTIONS)
        assert torch.equal(
            model.generate(IDS, cache_implementation="static", disable_compile=True, **self.OPTIONS), expected
        )
        assert torch.equal(model.generate(IDS, prefill_chunk_size=7, **self.OPTIONS), expected)

    def test_continuous_batching_agrees(self, packed):
        model = load(packed)
        set_expert_pruning(model, ODPConfig(protect=0))
        expected = model.generate(IDS, **self.OPTIONS)[:, IDS.shape[1] :]
        options = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
        answers = model.generate_batch(
            [row.tolist() for row in IDS],
            generation_config=options,
            # the cache takes most of the machine's memory unless told otherwise
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64),
            progress_bar=False,
        )
        assert sorted(answer.generated_tokens for answer in answers.values()) == sorted(expected.tolist())

    def test_stats_tell_prompt_and_decoding_apart(self, packed):
        model = load(packed)
        model.generate(IDS, **self.OPTIONS)
        stats = expert_pruning_stats(model, reset=True)
        assert stats["prefill"]["tokens"] == IDS.numel()
        assert stats["decode"]["tokens"] == 2 * 5
        layers = stats["prefill"]["layers"].values()
        assert all(layer["slots"] == 2 * IDS.numel() for layer in layers)
        assert stats["prefill"]["bytes"] == sum(layer["bytes"] for layer in layers)
        share = stats["prefill"]["bytes_skipped"]
        assert 0.1 < share < 0.4
        per_token = stats["prefill"]["bytes"] * (1 - share) / IDS.numel()
        assert stats["prefill"]["bytes_per_token"] == pytest.approx(per_token)
        assert expert_pruning_stats(model)["prefill"]["slots"] == 0

    def test_padding_with_static_caches(self, packed):
        model = load(packed)
        mask = torch.ones_like(IDS)
        mask[1, :10] = 0
        set_expert_pruning(model, ODPConfig(threshold=1, protect=0.1, causal=True))
        options = {"attention_mask": mask, **self.OPTIONS}
        expected = model.generate(IDS * mask, **options)
        dynamic = expert_pruning_stats(model, reset=True)
        static = model.generate(IDS * mask, cache_implementation="static", disable_compile=True, **options)
        assert torch.equal(static, expected)
        assert expert_pruning_stats(model) == dynamic
        assert dynamic["prefill"]["tokens"] == IDS.numel() - 10

    def test_cache_that_is_copied(self, packed):
        """A prompt's cache, used again: what is known of its tokens is copied with it."""
        model = load(packed)
        set_expert_pruning(model, ODPConfig(threshold=1, protect=0.1, causal=True))
        whole = model(IDS).logits[:, -4:]
        cache = model(IDS[:, :-4], use_cache=True).past_key_values
        for _ in range(2):
            part = model(IDS[:, -4:], past_key_values=copy.deepcopy(cache), use_cache=True).logits
            assert relative_rms(part, whole) <= 1e-5

    def test_padding_is_not_counted(self, packed):
        model = load(packed)
        mask = torch.ones_like(IDS)
        mask[1, :10] = 0
        model(IDS, attention_mask=mask)
        assert expert_pruning_stats(model)["prefill"]["tokens"] == IDS.numel() - 10

    def test_compiled_as_one_graph(self, packed):
        model = load(packed)
        set_expert_pruning(model, ODPConfig(protect=0))
        logits = model(IDS).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        expert_pruning_stats(model, reset=True)
        for _ in range(12):  # more than torch compiles again
            assert relative_rms(compiled(IDS).logits, logits) <= 1e-6
        assert expert_pruning_stats(model)["prefill"]["tokens"] == 12 * IDS.numel()

    def test_skipped_experts_are_not_run(self, packed, monkeypatch):
        """Slots that are skipped never reach an expert in the loop over experts; test_ops has the operator."""
        model, ran = load(packed), []
        set_expert_pruning(model, ODPConfig(threshold=1, protect=0))  # one expert a token
        experts = next(module for module in model.modules() if isinstance(module, PackedExperts))
        pruning, seen = experts.pruning, []

        def watch(x, index, weights):
            seen.append(pruning(x, index, weights)[0])
            return pruning(x, index, weights)

        experts.pruning = watch
        monkeypatch.setattr(experts, "_activation", None)  # the loop
        monkeypatch.setattr(experts, "_run", lambda e, x: ran.append((e, len(x))) or torch.zeros_like(x))
        model(IDS)
        kept = seen[0][seen[0] < experts.num_experts]
        assert len(kept) == IDS.numel()
        assert sum(n for e, n in ran if e < experts.num_experts) == IDS.numel()


class TestRefusals:
    def test_one_expert_per_token(self, tmp_path):
        folder = save_dense("mixtral", tmp_path, num_experts_per_tok=1)
        with pytest.raises(ValueError, match="one expert"):
            compressed(folder, quick_config(odp=True))
        with pytest.raises(ValueError, match="one expert"):
            set_expert_pruning(load(folder), ODPConfig(threshold=0.5))

    def test_routing_outside_of_the_experts(self, tmp_path):
        with pytest.raises(ValueError, match="not handed"):
            compressed(save_dense("llama4_text", tmp_path), quick_config(odp=True))

    def test_no_thresholds_without_calibration(self, dense, packed):
        plan = compression_report(load(packed))["config"]["plan"]
        config = quick_config(plan=plan, rounding="nearest", odp=True)
        with pytest.raises(ValueError, match="needs none"):
            compressed(dense, config)

    def test_text_that_does_not_fit_the_model(self, packed):
        model = load(packed)
        before = attached(model).options
        with pytest.raises(ValueError, match="320 embeddings"):
            set_expert_pruning(model, dataset=torch.full((2, 16), 400))
        with pytest.raises(ValueError, match="128 positions"):
            set_expert_pruning(model, dataset=tokens(2, 200))
        assert attached(model).options == before

    def test_attention_that_shows_no_weights(self, packed):
        model = load(packed)
        before = model(IDS).logits
        set_expert_pruning(model, False)
        model.config._attn_implementation = "flex_attention"
        with pytest.raises(ValueError, match="flex_attention"):
            set_expert_pruning(model)
        model.config._attn_implementation = "sdpa"
        set_expert_pruning(model)
        assert torch.equal(model(IDS).logits, before)

    def test_attention_that_is_changed_later(self, packed):
        model = load(packed)
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="switch pruning on again"):
            model(IDS)
        set_expert_pruning(model, False)
        model.set_attn_implementation("eager")
        set_expert_pruning(model)
        model(IDS)

    def test_layers_that_are_run_again(self, packed):
        model = load(packed)
        # renamed in transformers 5.23
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()
        with pytest.raises(ValueError, match="protect=0"):
            model(IDS)
        set_expert_pruning(model, ODPConfig(protect=0))
        model(IDS, labels=IDS).loss.backward()
        assert model.model.embed_tokens.weight.grad.abs().sum() > 0

    def test_rate_that_no_model_with_two_experts_can_meet(self, dense):
        config = quick_config(odp=ODPConfig(rate=0.9))
        with pytest.raises(ValueError, match=r"rate=0\.9 cannot be met: with 2 experts"):
            compressed(dense, config)

    def test_no_pruning_no_statistics(self, unpruned):
        with pytest.raises(ValueError, match="no expert pruning"):
            expert_pruning_stats(load(unpruned))

    def test_thresholds_of_another_model(self, packed):
        model = load(packed)
        other = replace(attached(model).options, thresholds={"a": [0.5]}, normalized={"a": True})
        with pytest.raises(ValueError, match="do not fit"):
            set_expert_pruning(model, other)
        assert attached(model) is not None
