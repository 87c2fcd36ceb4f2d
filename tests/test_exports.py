# SPDX-License-Identifier: Apache-2.0
"""Unpacked models: plain transformers loads them and computes what the packed model computed."""

import pytest
import torch
from test_routers import spread
from tiny import compressed, families, load, load_class, quick_config, relative_rms, save_dense, tiny_model, tokens

from transformers_mcmoe import PruneConfig, unpack

FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "dbrx", "longcat_flash", "afmoe", "lfm2_moe",
            "minimax_m2", "phimoe", "granitemoe")  # fmt: skip


def pruned(family, folder, **changes):
    spread(tiny_model(family)).save_pretrained(folder)
    prune = PruneConfig(0.25, method="naee")
    return compressed(folder, quick_config(**({"bits": 3.2, "prune": prune, "expert_bits": (2, 4, 8)} | changes)))


@pytest.mark.parametrize("family", families(FAMILIES, ["mixtral", "deepseek_v3", "gpt_oss", "dbrx", "lfm2_moe"]))
def test_plain_transformers_runs_it(family, tmp_path):
    model = pruned(family, tmp_path / "dense")
    ids = tokens(2, 16)
    with torch.no_grad():
        expected = model(ids).logits
        plain = unpack(model)
        assert not any("mcmoe" in type(module).__module__ for module in plain.modules())
        assert relative_rms(plain(ids).logits, expected) < 2e-3  # kernels round activations
        plain.save_pretrained(tmp_path / "plain")
        loaded = load_class(tmp_path / "plain").from_pretrained(tmp_path / "plain", dtype=torch.float32)
        assert torch.equal(loaded(ids).logits, plain(ids).logits)
        assert torch.equal(model(ids).logits, expected)
    assert loaded.num_parameters() < load(tmp_path / "dense").num_parameters()


def test_nothing_dropped(tmp_path):
    model = pruned("mixtral", tmp_path / "dense", prune=None)
    plain = unpack(model, torch.bfloat16)
    assert plain.dtype == torch.bfloat16
    assert plain.config.num_local_experts == 8


def test_layers_that_differ(tmp_path):
    model = pruned("mixtral", tmp_path / "dense", prune=PruneConfig(3 / 16, method="random"))
    with pytest.raises(ValueError, match="The layers keep between 6 and 7 experts, but a model's config"):
        unpack(model)


def test_dense_models(tmp_path):
    save_dense("mixtral", tmp_path)
    with pytest.raises(ValueError, match="was not compressed by transformers_mcmoe"):
        unpack(load(tmp_path))


@torch.no_grad()
def test_correction_biases_stay_in_float32(tmp_path):
    model = pruned("deepseek_v3", tmp_path / "dense")
    plain = unpack(model, torch.bfloat16)
    (bias,) = (b for name, b in plain.named_buffers() if name.endswith("e_score_correction_bias"))
    assert bias.dtype == torch.float32
    kept = model.hf_quantizer.quantization_config.plan.experts["model.layers.1.mlp.experts"].kept
    own = dict(model.named_buffers())["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(bias, own[list(kept)])


def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    model = pruned("mixtral", tmp_path / "dense")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"q_proj' has adapters; call merge_and_unload\(\) or unload\(\) before unpacking"
    ):
        unpack(model)


def test_dequantized_models_are_not_saved(tmp_path):
    """Their routers would find dropped experts again."""
    dense = pruned("mixtral", tmp_path / "dense").dequantize()
    with pytest.raises(ValueError, match="some of its experts were dropped"):
        dense.save_pretrained(tmp_path / "out")


@torch.no_grad()
def test_experts_that_stay_dense(tmp_path):
    model = pruned("mixtral", tmp_path / "dense", prune=None, modules_to_not_convert=["model.layers.1"])
    ids = tokens(2, 16)
    assert relative_rms(unpack(model)(ids).logits, model(ids).logits) < 2e-3
    model = pruned("mixtral", tmp_path / "dense", modules_to_not_convert=["model.layers.1"])
    with pytest.raises(ValueError, match="The layers keep between 6 and 8 experts"):
        unpack(model)
