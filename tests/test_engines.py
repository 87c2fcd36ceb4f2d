# SPDX-License-Identifier: Apache-2.0
"""Exports for other engines: their own libraries read back the weights that the packed model computes with."""

import importlib.util
import json
import re

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from gguf.quants import dequantize
from safetensors.torch import load_file
from tiny import compressed, families, load, quick_config, relative_rms, save_dense, save_tokenizer, tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CompressedTensorsConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from transformers_mcmoe import PruneConfig
from transformers_mcmoe.cli import app
from transformers_mcmoe.integrations.exports import compressed as compressed_tensors
from transformers_mcmoe.integrations.exports import gguf as llama_cpp
from transformers_mcmoe.quantization import pack, quantize

LEAVES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
FOUR = {"bits": 4.0, "expert_bits": (4,), "attention_bits": 4, "shared_expert_bits": 4, "granularity": "layer"}
LAYERS = FOUR | {"bits": 3.2, "expert_bits": (2, 3, 4), "integer_zeros": True}
SIZES = {
    "mixtral": {"hidden_size": 64, "intermediate_size": 128},
    "qwen2_moe": {"shared_expert_intermediate_size": 64, "mlp_only_layers": []},
    "qwen3_moe": {"norm_topk_prob": True},
    "deepseek_v2": {},
}


def packed(folder, family="mixtral", **options):
    """A tiny packed model, and its folder."""
    dense = save_dense(family, folder / "dense", **SIZES[family])
    model = compressed(dense, quick_config(**(FOUR | {"group_size": 64} | options)))
    model.save_pretrained(folder / "packed")
    save_tokenizer(folder / "packed")
    return model, folder / "packed"


def exported(*args):
    """Result of `mcmoe export`."""
    return CliRunner().invoke(app, ["export", *map(str, args)])


def test_a_width_per_layer(tmp_path):
    model, _ = packed(tmp_path, **(LAYERS | {"bits": 2.9}))
    plan = model.config.quantization_config.plan
    found = [{*widths.gate_up, *widths.down} for widths in plan.experts.values()]
    assert all(len(widths) == 1 for widths in found)
    assert len(set.union(*found)) > 1  # the layers differ


@torch.no_grad()
@pytest.mark.parametrize("family", families(["mixtral", "qwen2_moe"], ["mixtral"]))
def test_transformers_reads_compressed_tensors(family, tmp_path):
    model, folder = packed(tmp_path, family, symmetric=True, group_size=32)
    done = exported(folder, tmp_path / "out", "--format", "compressed-tensors")
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert all(group["weights"]["num_bits"] == 4 for group in config["config_groups"].values())
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not (tmp_path / "out" / "mcmoe_report.json").exists()
    again = load(tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True))
    ids = tokens(2, 16)
    # products of codes and scales are rounded to fp16 there
    assert relative_rms(again(ids).logits, model.dequantize()(ids).logits) < 1e-3


def test_compressed_tensors_with_a_width_per_layer(tmp_path):
    model, folder = packed(tmp_path, **LAYERS)
    compressed_tensors.export(str(folder), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    plan = model.config.quantization_config.plan
    widths = {group["weights"]["num_bits"] for group in config["config_groups"].values()}
    assert widths == {4, *(bits for own in plan.experts.values() for bits in own.gate_up)}
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(tensor.dtype == torch.uint8 for tensor in tensors.values())
    # the library's own reader, which transformers does not use for experts with zeros
    schemes = QuantizationConfig.model_validate(config).config_groups.values()
    dense = model.dequantize().model.layers[1]
    for name, wanted in {
        "model.layers.1.block_sparse_moe.experts.3.w2": dense.mlp.experts.down_proj[3],
        "model.layers.1.self_attn.k_proj": dense.self_attn.k_proj.weight,
    }.items():
        (scheme,) = (s for s in schemes if any(re.match(target.removeprefix("re:"), name) for target in s.targets))
        own = {leaf: tensors[f"{name}.{leaf}"] for leaf in LEAVES}
        found = BaseCompressor.get_value_from_registry("pack-quantized").decompress(own, scheme)["weight"]
        assert relative_rms(found, wanted) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", families(["mixtral", "qwen2_moe", "qwen3_moe"], ["mixtral"]))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Q4_1", {}),
        ("Q4_0", {"symmetric": True}),
        ("Q8_0", {"symmetric": True, "expert_bits": (8,), "bits": 8.0, "attention_bits": 8, "shared_expert_bits": 8}),
    ],
)
def test_gguf_holds_the_weights(family, kind, options, tmp_path):
    model, folder = packed(tmp_path, family, **options)
    done = exported(folder, tmp_path / "model.gguf", "--format", "gguf")
    assert done.exit_code == 0, done.output
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    last = model.config.num_hidden_layers - 1
    step = _step(model, last)
    dense = model.dequantize()
    down = read[f"blk.{last}.ffn_down_exps.weight"]
    assert down.tensor_type.name == kind
    wanted = dense.model.layers[last].mlp.experts.down_proj
    found = torch.from_numpy(dequantize(down.data, down.tensor_type).copy()).view_as(wanted)
    # d * q + m has m in fp16; without zeros all is exact
    assert float((found - wanted).abs().max()) <= (0.01 * step if kind == "Q4_1" else 0)
    output = read[f"blk.{last}.attn_output.weight"]
    own = torch.from_numpy(dequantize(output.data, output.tensor_type).copy())
    assert relative_rms(own, dense.model.layers[last].self_attn.o_proj.weight) < 1e-3
    query = read[f"blk.{last}.attn_q.weight"]
    rows = torch.from_numpy(dequantize(query.data, query.tensor_type).copy())
    if family == "mixtral":  # neighbours are rotated together there
        rows = rows.unflatten(0, (4, -1, 2)).transpose(1, 2).flatten(0, 2)
    assert relative_rms(rows, dense.model.layers[last].self_attn.q_proj.weight) < 1e-3
    assert read["token_embd.weight"].tensor_type.name == "F32"


WIDE = {"hidden_size": 256, "intermediate_size": 512}
MIXED = FOUR | {"bits": 2.8, "expert_bits": (2, 3), "group_size": 64}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A packed model of 2 and 3 bits whose rows have blocks of 256."""
    folder = tmp_path_factory.mktemp("wide")
    model = compressed(save_dense("mixtral", folder / "dense", **WIDE), quick_config(**MIXED))
    model.save_pretrained(folder / "packed")
    return model, folder


def test_two_and_three_bits_on_the_grids_of_llama_cpp(wide, tmp_path):
    model, folder = wide
    llama_cpp.export(
        str(folder / "packed"), tmp_path / "model.gguf", dense=str(folder / "dense"), dataset=tokens(8, 32)
    )
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    plan, dense = model.config.quantization_config.plan, load(folder / "dense")
    kinds = {2: "Q2_K", 3: "Q3_K"}
    found = set()
    for layer, (path, widths) in enumerate(plan.experts.items()):
        for name, wanted in (("down", dense.get_submodule(path).down_proj),):
            tensor = read[f"blk.{layer}.ffn_{name}_exps.weight"]
            assert tensor.tensor_type.name == kinds[widths.down[0]]
            own = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).view_as(wanted)
            assert relative_rms(own, wanted) < {2: 0.6, 3: 0.35}[widths.down[0]]
            found.add(tensor.tensor_type.name)
    assert found == set(kinds.values())
    assert read["blk.0.attn_q.weight"].tensor_type.name == "Q4_1"


def test_requantizing_wants_the_model_that_was_packed(wide, tmp_path):
    _, folder = wide
    with pytest.raises(ValueError, match="they are quantized anew on those grids, which takes the dense model"):
        llama_cpp.export(str(folder / "packed"), tmp_path / "model.gguf")
    other = load(folder / "dense")
    other.model.norm.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"is not the model that .* was made from.*'model.norm.weight' differs"):
        llama_cpp.export(
            str(folder / "packed"), tmp_path / "model.gguf", dense=str(tmp_path / "other"), dataset=tokens(8, 32)
        )
    assert not list(tmp_path.glob("*model.gguf*"))


def _step(model, layer):
    """The largest scale of a layer's down projections."""
    experts = model.model.layers[layer].mlp.experts
    scales = [
        experts.linear(e, "down_proj").weight.data[..., -4:-2].contiguous().view(torch.float16) for e in range(8)
    ]
    return float(torch.stack(scales).max())


REFUSED = [
    ({"granularity": "projection", "bits": 3.0, "expert_bits": (2, 4)}, "compress with granularity='layer'"),
    ({"expert_bits": (2, 3), "bits": 2.8}, "but Q2_K and Q3_K have blocks of 256"),
    ({"expert_bits": (4, 8), "attention_bits": 3, "bits": 5.0, "symmetric": True}, "other matrices 4 or 8"),
    ({"attention_bits": 8, "expert_bits": (4, 8), "bits": 5.0}, "Q8_0 has none; compress with symmetric=True"),
    (
        {"prune": PruneConfig(0.25, method="naee"), "bits": 2.6, "expert_bits": (2, 4)},
        "dropped experts, which other formats have no place for",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_gguf_cannot_hold_is_refused(options, message, tmp_path):
    _, folder = packed(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        llama_cpp.export(str(folder), tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*model.gguf*"))


def test_what_compressed_tensors_cannot_hold_is_refused(tmp_path):
    _, folder = packed(tmp_path)
    with pytest.raises(ValueError, match=r"zeros that are no codes.*integer_zeros=True"):
        compressed_tensors.export(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_other_models(tmp_path):
    dense = save_dense("mixtral", tmp_path / "dense")
    with pytest.raises(ValueError, match="is not packed; compress it first"):
        llama_cpp.export(str(dense), tmp_path / "model.gguf")
    _, folder = packed(tmp_path / "other", "deepseek_v2")
    with pytest.raises(ValueError, match="Models of type 'deepseek_v2' are not exported to GGUF"):
        llama_cpp.export(str(folder), tmp_path / "model.gguf")


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@torch.no_grad()
def test_llama_cpp_computes_the_same(tmp_path):
    import llama_cpp as engine

    model, folder = packed(tmp_path)
    llama_cpp.export(str(folder), tmp_path / "model.gguf")
    ids = tokens(1, 24)
    assert (
        relative_rms(found_by(engine, tmp_path / "model.gguf", ids), model(ids).logits[0].float()) < 0.05
    )  # activations have 8 bits there


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@torch.no_grad()
def test_llama_cpp_computes_with_requantized_experts(wide, tmp_path):
    import llama_cpp as engine

    _, folder = wide
    llama_cpp.export(
        str(folder / "packed"), tmp_path / "model.gguf", dense=str(folder / "dense"), dataset=tokens(8, 32)
    )
    ids, model = tokens(1, 24), load(folder / "dense")
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        if "_exps" in tensor.name:
            layer, kind = int(tensor.name.split(".")[1]), tensor.name.split("_")[1]
            experts, own = (
                model.model.layers[layer].mlp.experts,
                torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()),
            )
            if kind == "down":
                experts.down_proj.data = own.view_as(experts.down_proj)
            else:
                rows = slice(0, 512) if kind == "gate" else slice(512, 1024)
                experts.gate_up_proj.data[:, rows] = own.view_as(experts.gate_up_proj[:, rows])
    assert (
        relative_rms(found_by(engine, tmp_path / "model.gguf", ids), model(ids).logits[0]) < 0.1
    )  # attention has 4 bits


def found_by(engine, file, ids):
    """Logits of llama.cpp."""
    runner = engine.Llama(str(file), n_ctx=64, logits_all=True, verbose=False)
    runner.eval(ids[0].tolist())
    return torch.from_numpy(np.array(runner.scores[:24]))


def test_pairs_are_merged_in_the_tokenizers_order(tmp_path):
    # llama.cpp merges by scores, which the gguf package does not read from a tokenizer.json
    _, folder = packed(tmp_path)
    corpus = ["the theory of then and there", "an other another mother"] * 50
    built = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=[])
    built.train_from_iterator(corpus, trainer)
    built.add_tokens(["<tool>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)
    llama_cpp.export(str(folder), tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    tokens_, scores = fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.scores"].contents()
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in json.loads(built.to_str())["model"]["merges"]
    ]
    ranked = [scores[tokens_.index(merge.replace(" ", ""))] for merge in merges]
    assert ranked == sorted(ranked, reverse=True)
    assert len(set(ranked)) > 10
    kinds = dict(zip(tokens_, fields["tokenizer.ggml.token_type"].contents(), strict=True))
    assert kinds["<tool>"] == gguf.TokenType.USER_DEFINED
    assert kinds["</s>"] == gguf.TokenType.CONTROL


def test_byte_pairs(tmp_path):
    _, folder = packed(tmp_path)
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    built.train_from_iterator(["the theory of then and there"] * 50, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|end|>")
    wrapped.save_pretrained(folder)
    llama_cpp.export(str(folder), tmp_path / "model.gguf", "qwen2")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert fields["tokenizer.ggml.pre"].contents() == "qwen2"
    assert fields["tokenizer.ggml.merges"].contents()
    kinds = dict(
        zip(fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents(), strict=True)
    )
    assert kinds["<|end|>"] == gguf.TokenType.CONTROL


def test_merged_adapters_end_symmetry(tmp_path):
    model, folder = packed(tmp_path, symmetric=True)
    linear = model.model.layers[0].self_attn.q_proj
    linear.write(pack(quantize(linear.dequantize(torch.float32) + 0.01, 4, 64)))
    model.save_pretrained(folder)
    for run in (
        lambda: llama_cpp.export(str(folder), tmp_path / "m.gguf"),
        lambda: compressed_tensors.export(str(folder), tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=r"q_proj.weight' has zeros, although .* symmetric=True"):
            run()
