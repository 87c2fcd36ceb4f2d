# SPDX-License-Identifier: Apache-2.0
"""Loading, saving and refusing: transformers' hooks as a user meets them."""

import copy
import json
import pickle
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import compressed, load, load_class, quick_config, relative_rms, save_dense, tokens
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from transformers_mcmoe import MCMoEConfig, PackedExperts, PackedLinear, Plan, compression_report
from transformers_mcmoe.plan import ExpertWidths

IDS = tokens(2, 16, seed=1)


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "packed"
    compressed(dense).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copy")


def _rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- the user's objects -------------------------------------------------------------------------------------------


def test_config_is_not_changed_and_can_be_used_again(dense):
    config = quick_config()
    first, second = compressed(dense, config), compressed(dense, config)
    assert config.plan is None
    assert first.config.quantization_config.plan == second.config.quantization_config.plan
    assert torch.equal(first(IDS).logits, second(IDS).logits)


def test_config_json_holds_the_plan_and_no_integer_bits(packed):
    saved = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "mcmoe"
    assert saved["format_version"] == 1
    assert "bits" not in saved
    assert saved["average_bits"] == pytest.approx(compression_report(load(packed))["average_bits"], abs=1e-5)
    assert set(saved["plan"]["experts"]) == {f"model.layers.{i}.mlp.experts" for i in range(2)}
    assert saved["plan"]["linears"]["model.layers.*.self_attn.q_proj"] == "44"


def test_published_names(packed):
    names = set(load_file(packed / "model.safetensors"))
    assert "model.layers.0.block_sparse_moe.experts.7.w2.weight" in names
    assert "model.layers.1.self_attn.o_proj.weight" in names
    assert not [name for name in names if ".mlp." in name]


def test_deepcopy_dequantizes_on_its_own(packed):
    model = load(packed)
    other = copy.deepcopy(model).dequantize()
    assert any(isinstance(module, PackedExperts) for module in model.modules())
    assert relative_rms(model(IDS).logits, other(IDS).logits) <= 1e-5


def test_loading_makes_no_dense_copy(packed):
    model = load(packed)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, PackedExperts)
    parameters = dict(experts.named_parameters())
    assert {p.dtype for p in parameters.values()} == {torch.uint8}
    assert all(p.dim() == 3 and not p.requires_grad for p in parameters.values())
    assert not list(experts.buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_casts_leave_packed_bytes_alone(packed, dtype):
    full, half = load(packed), load(packed, dtype=dtype)
    cast = load(packed).to(dtype)
    for (name, a), (_, b), (_, c) in zip(
        full.named_parameters(), half.named_parameters(), cast.named_parameters(), strict=True
    ):
        if a.dtype == torch.uint8:
            assert torch.equal(a, b), name
            assert torch.equal(a, c), name
        else:
            assert b.dtype == c.dtype == dtype
    assert torch.isfinite(half(IDS).logits).all()


def test_gradients_reach_what_is_not_packed(packed):
    model = load(packed)
    model(IDS, labels=IDS).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_save_twice_is_byte_identical(packed, tmp_path):
    model = load(packed)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (packed / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "mcmoe_report.json").read_text() == (packed / "mcmoe_report.json").read_text()


def test_dequantize_after_saving(packed, tmp_path):
    model = load(packed)
    logits = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert relative_rms(model.dequantize()(IDS).logits, logits) <= 1e-5


def test_sharded_save(packed, tmp_path):
    model = load(packed)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert torch.equal(load(tmp_path / "sharded")(IDS).logits, model(IDS).logits)


def test_device_map_auto(packed):
    assert torch.equal(load(packed, device_map="auto")(IDS).logits, load(packed)(IDS).logits)


@torch.no_grad()
def test_ways_to_generate_agree(packed):
    model, ids = load(packed), tokens(2, 24, seed=1)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    assert torch.equal(model.generate(ids, prefill_chunk_size=7, **options), expected)
    together = model.generate_batch(
        [row.tolist() for row in ids],
        generation_config=GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0),
        # the cache takes most of the machine's memory unless told otherwise
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64),
        progress_bar=False,
    )
    assert sorted(answer.generated_tokens for answer in together.values()) == sorted(expected[:, 24:].tolist())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe"])
def test_disk_offload(family, tmp_path):
    compressed(save_dense(family, tmp_path / "dense")).save_pretrained(tmp_path / "packed")
    plain = load(tmp_path / "packed")
    device_map = {"lm_head": "cpu", "model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(tmp_path / "packed", device_map=device_map, offload_folder=tmp_path / "offload")
    experts = model.model.layers[1].mlp.experts if family != "granitemoe" else None
    if experts is not None:
        assert all(p.is_meta for p in experts.parameters() if p.numel())
    # offloaded experts run matrix by matrix, the others in one operator
    assert relative_rms(model(IDS).logits, plain(IDS).logits) <= 1e-6
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(again(IDS).logits, plain(IDS).logits)
    with pytest.raises(ValueError, match="offloaded"):
        model.dequantize()


def test_disk_offload_while_compressing_is_refused(dense, tmp_path):
    device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="device_map puts modules on disk"):
        compressed(dense, device_map=device_map, offload_folder=tmp_path)


def test_work_dir_keeps_layers_and_nothing_else(dense, tmp_path):
    work = tmp_path / "work"
    model = compressed(dense, quick_config(work_dir=work))
    assert sorted(f.name for f in work.iterdir()) == [
        "fingerprint.json",
        "layer-00000.safetensors",
        "layer-00001.safetensors",
        "records",
    ]
    again = compressed(dense, quick_config(work_dir=work))  # the same compression may use its folder again
    assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_sixteen_bits_leave_attention(dense):
    model = compressed(dense, quick_config(attention_bits=16, bits=2.5))
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert compression_report(model)["average_bits"] == 2.5


def test_modules_to_not_convert(dense, tmp_path):
    skip = ["model.layers.0.mlp.experts", "model.layers.1.self_attn.q_proj"]
    model = compressed(dense, quick_config(modules_to_not_convert=skip, bits=3.0))
    assert not isinstance(model.model.layers[0].mlp.experts, PackedExperts)
    assert isinstance(model.model.layers[1].mlp.experts, PackedExperts)
    assert type(model.model.layers[1].self_attn.q_proj) is nn.Linear
    original = load(dense).model.layers[0].mlp.experts
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj, original.gate_up_proj)
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_given_plan_with_a_dropped_expert_and_mixed_widths(dense, tmp_path):
    gate_up, down = (0, 1, 2, 3, 4, 8, 1, 2), (0, 2, 1, 4, 3, 8, 1, 2)
    plan = Plan({f"model.layers.{i}.mlp.experts": ExpertWidths(gate_up, down) for i in range(2)})
    model = compressed(dense, quick_config(plan=plan.to_dict()))
    assert compression_report(model)["expert_bits"]["model.layers.0.mlp.experts"] == "01234812"
    experts = model.model.layers[0].mlp.experts
    assert "0" not in dict(experts.named_children())
    assert (experts.linear(3, "gate_proj").bits, experts.linear(3, "down_proj").bits) == (3, 4)
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert not [n for n in load_file(tmp_path / "packed" / "model.safetensors") if ".experts.0." in n]
    assert relative_rms(model(IDS).logits, again.dequantize()(IDS).logits) <= 1e-5


def _experts_names(folder):
    return {name for name in load_file(folder / "model.safetensors") if ".experts." in name}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe", "qwen3_moe"])
@torch.no_grad()
def test_base_model_and_model_with_head_load_each_others_checkpoints(family, tmp_path):
    dense, config = save_dense(family, tmp_path / "dense"), partial(quick_config, rounding="nearest")
    base = AutoModel.from_pretrained(dense, quantization_config=config(), dtype=torch.float32)
    hidden = base(IDS).last_hidden_state
    base.save_pretrained(tmp_path / "base")
    with_head = compressed(dense, config())
    with_head.save_pretrained(tmp_path / "head")
    for name in ("base", "head"):
        again, info = AutoModel.from_pretrained(tmp_path / name, dtype=torch.float32, output_loading_info=True)
        assert torch.equal(again(IDS).last_hidden_state, hidden)
        assert not info["missing_keys"]
    assert torch.equal(with_head.model(IDS).last_hidden_state, hidden)
    # the checkpoint of a base model, compressed with a head that it lacks
    AutoModel.from_pretrained(dense, dtype=torch.float32).save_pretrained(tmp_path / "dense-base")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense-base", quantization_config=config(), dtype=torch.float32, output_loading_info=True
    )
    assert torch.equal(model.model(IDS).last_hidden_state, hidden)
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_checkpoint_that_is_not_in_the_published_layout(family, tmp_path):
    dense = save_dense(family, tmp_path / "dense")
    load(dense).save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any(name.endswith("gate_up_proj") for name in load_file(tmp_path / "fused" / "model.safetensors"))
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fused", quantization_config=quick_config(), dtype=torch.float32, output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert torch.equal(model(IDS).logits, compressed(dense)(IDS).logits)
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(load(tmp_path / "packed")(IDS).logits, model(IDS).logits)


def test_layers_that_the_model_does_not_have_are_left_out(tmp_path):
    """DeepSeek-V3 publishes a layer for multi-token prediction that transformers does not build."""
    dense = save_dense("deepseek_v3", tmp_path / "dense")
    expected = compressed(dense)(IDS).logits
    _rewrite(dense, lambda t: t.update({k.replace("s.1.", "s.2."): v.clone() for k, v in t.items() if "s.1." in k}))
    model = compressed(dense)
    assert torch.equal(model(IDS).logits, expected)
    model.save_pretrained(tmp_path / "packed")
    assert not [name for name in load_file(tmp_path / "packed" / "model.safetensors") if "layers.2." in name]


def test_pickle(packed):
    model = load(packed)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(IDS).logits, model(IDS).logits)


# --- errors -------------------------------------------------------------------------------------------------------


def test_no_experts(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be compressed: it has no MoE experts"):
        compressed(tmp_path)


def test_unsupported_experts_are_named(tmp_path):
    from transformers import JetMoeConfig, JetMoeForCausalLM

    config = JetMoeConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8, intermediate_size=32
    )
    JetMoeForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=r"JetMoeParallelExperts at 'model\.layers\.0"):
        compressed(tmp_path)


def test_unknown_experts_class_is_named(dense):
    from transformers_mcmoe.models.experts import find_experts

    class StrangeExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.cube = nn.Parameter(torch.zeros(2, 3, 4))

    model = load(dense)
    model.model.layers[1].mlp.experts = StrangeExperts()
    with pytest.raises(NotImplementedError, match=r"StrangeExperts at 'model\.layers\.1\.mlp\.experts'"):
        find_experts(model)


@pytest.mark.parametrize("bits", [0.9, 4.5])
def test_infeasible_average(dense, bits):
    with pytest.raises(ValueError, match=rf"bits={bits} cannot be met.*lies between 1\.\d+ and 4\.00"):
        compressed(dense, quick_config(bits=bits))


def test_datasets_that_do_not_do(dense, tmp_path):
    with pytest.raises(ValueError, match="no tokenizer"):
        compressed(dense, quick_config(dataset=["some text"], seq_len=8))
    (tmp_path / "empty.txt").write_text("")
    tokenizer = _Characters()
    with pytest.raises(ValueError, match="is empty"):
        compressed(dense, quick_config(dataset=str(tmp_path / "empty.txt"), tokenizer=tokenizer, seq_len=8))
    with pytest.raises(ValueError, match="gives 12 tokens, 1 sequences of 8, but num_samples=4"):
        compressed(dense, quick_config(dataset=["some texts."], tokenizer=tokenizer, num_samples=4, seq_len=8))
    with pytest.raises(ValueError, match="longer than the 128 positions"):
        compressed(dense, quick_config(dataset=tokens(8, 256)))
    with pytest.raises(ValueError, match="reach id 5000"):
        compressed(dense, quick_config(dataset=torch.full((8, 8), 5000)))


class _Characters:
    eos_token_id = 2

    def __call__(self, text, **kwargs):
        return {"input_ids": [3 + ord(c) % 100 for c in text]}


def test_missing_packed_tensor_is_named(copied):
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    _rewrite(copied, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"lacks the packed tensor '{name}'"):
        load(copied)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt_oss", "model.layers.0.mlp.experts.0.gate_proj.bias"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj"),
        ("qwen2_moe", "model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_missing_bias_or_guard_is_named(family, name, tmp_path):
    compressed(save_dense(family, tmp_path / "dense")).save_pretrained(tmp_path / "packed")
    _rewrite(tmp_path / "packed", lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"lacks the packed tensor '{name}'"):
        load(tmp_path / "packed")


def test_unknown_tensor_beside_a_packed_linear_is_named(copied):
    _rewrite(copied, lambda t: t.update({"model.layers.0.self_attn.q_proj.low_rank_a.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"q_proj\.low_rank_a\.weight' is not part"):
        load(copied)


def test_dense_checkpoint_without_embeddings_is_named(tmp_path):
    dense = save_dense("mixtral", tmp_path / "dense")
    _rewrite(dense, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(ValueError, match=r"lacks 'model\.embed_tokens\.weight'"):
        compressed(dense)


def test_dense_checkpoint_without_a_layers_tensor_is_named(tmp_path):
    dense = save_dense("mixtral", tmp_path / "dense")
    _rewrite(dense, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks 'model\.layers\.1\.self_attn\.q_proj\.weight'"):
        compressed(dense)


def test_constraint_that_the_budget_cannot_meet(dense):
    with pytest.raises(
        ValueError, match=r"at_least=\{3: 8\} cannot be met: a layer of 8 experts has 14 bits.*takes 24"
    ):
        compressed(dense, quick_config(at_least={3: 8}, bits=2.0))


def test_misnamed_packed_tensor_is_named(copied):
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    _rewrite(copied, lambda tensors: tensors.update({name.replace("w2", "w9"): tensors.pop(name)}))
    with pytest.raises(ValueError, match=rf"lacks the packed tensor '{name}'.*unknown tensor '.*w9\.weight'"):
        load(copied)


def test_unknown_tensor_among_the_experts_is_named(copied):
    _rewrite(copied, lambda t: t.update({"model.layers.0.block_sparse_moe.experts.0.extra": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.block_sparse_moe\.experts\.0\.extra' is not part"):
        load(copied)


@pytest.mark.parametrize("damage", ["shape", "dtype", "linear"])
def test_damaged_packed_tensor_is_named(copied, damage):
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    name = "model.layers.0.self_attn.q_proj.weight" if damage == "linear" else name
    change = {"shape": lambda t: t[:-1].clone(), "dtype": lambda t: t.to(torch.int8), "linear": lambda t: t[0].clone()}
    _rewrite(copied, lambda tensors: tensors.update({name: change[damage](tensors[name])}))
    with pytest.raises(ValueError, match=rf"packed tensor '{name}' is .* but the plan says U8"):
        load(copied)


def test_scale_that_is_not_finite_is_named(copied):
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"

    def damage(tensors):
        tensors[name][5, 0, -4:] = 255

    _rewrite(copied, damage)
    with pytest.raises(ValueError, match=r"experts\.0\.w1\.weight' holds scales that are not finite"):
        load(copied)


def test_truncated_file_is_named(copied):
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(Exception, match=r"model\.safetensors|incomplete"):
        load(copied)


def test_newer_format_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format version 2"):
        load(copied)


def test_plan_that_does_not_fit(dense):
    plan = Plan({"model.layers.0.mlp.experts": ExpertWidths.of([2] * 8)})
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.experts' is missing"):
        compressed(dense, MCMoEConfig(plan=plan.to_dict()))
    plan = Plan({f"model.layers.{i}.mlp.experts": ExpertWidths.of([2] * 4) for i in range(2)})
    with pytest.raises(ValueError, match="has 4 widths, but it has 8 experts"):
        compressed(dense, MCMoEConfig(plan=plan.to_dict()))


def test_foreign_work_dir(dense, tmp_path):
    work = tmp_path / "work"
    compressed(dense, quick_config(work_dir=work))
    with pytest.raises(ValueError, match="another config"):
        compressed(dense, quick_config(work_dir=work, seed=1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("text")
    with pytest.raises(ValueError, match="not ours"):
        compressed(dense, quick_config(work_dir=tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "text"


def test_too_little_max_memory(dense):
    with pytest.raises(ValueError, match="max_memory='1MB' is too little"):
        compressed(dense, quick_config(max_memory="1MB"))


def test_max_memory_counts_the_tuning(dense):
    # float32 copies of the logits of 300,000 tokens over 128 words or more
    config = quick_config(max_memory="800MB", tuning_steps=2, dataset=tokens(2, 64))
    compressed(dense, config)
    config = quick_config(max_memory="800MB", tuning_steps=2, seq_len=300_000)
    with pytest.raises(ValueError, match="max_memory='800MB' is too little for tuning_steps=2"):
        compressed(dense, config)


def test_report_of_a_dense_model(dense):
    with pytest.raises(ValueError, match="was not compressed"):
        compression_report(load(dense))


def test_packed_linears_are_found_by_class(packed):
    linears = [m for m in load(packed).modules() if isinstance(m, PackedLinear)]
    assert len(linears) == 2 * (8 * 3 + 4)


def test_load_class_is_the_saved_one(packed):
    assert load_class(packed).__name__ == "MixtralForCausalLM"
