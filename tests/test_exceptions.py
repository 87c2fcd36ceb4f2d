# SPDX-License-Identifier: Apache-2.0
"""Models outside the experts contract: Step-3.7 (multimodal, fused in three), NLLB (two stacks), remote code (a list)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import VOCABULARY, compressed, quick_config, relative_rms, tokens
from transformers import (
    AutoModelForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    Step3p7Config,
    Step3p7ForConditionalGeneration,
)

from transformers_mcmoe import PackedExperts, PackedLinear, Plan, compression_report
from transformers_mcmoe.models.routers import SlicedRouter
from transformers_mcmoe.plan import ExpertWidths

IDS = tokens(2, 16, seed=1)


def _step(folder):
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_sliding_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "num_experts_per_tok": 2,
        "n_routed_experts": 8,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["full_attention"] * 2,
        "sliding_window": 16,
        "moe_intermediate_size": 32,
        "share_expert_dim": 32,
        "pad_token_id": 0,
        "swiglu_limits": [7.0] * 2,
    }
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision |= {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    model = Step3p7ForConditionalGeneration(Step3p7Config(text_config=text, vision_config=vision))
    model.save_pretrained(folder)


@torch.no_grad()
def test_step(tmp_path):
    _step(tmp_path / "dense")
    model = compressed(tmp_path / "dense")
    logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "packed")
    again = Step3p7ForConditionalGeneration.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(again(input_ids=IDS).logits, logits)
    assert not [m for p, m in model.named_modules() if "vision" in p and isinstance(m, PackedLinear)]
    saved = load_file(tmp_path / "packed" / "model.safetensors")
    assert saved["model.layers.1.moe.gate_proj.weight"].shape == (0,)  # the guard, under the first fused name
    assert "model.layers.1.moe.up_proj.weight" not in saved
    assert relative_rms(logits, again.dequantize()(input_ids=IDS).logits) <= 1e-5


@torch.no_grad()
def test_nllb(tmp_path):
    torch.manual_seed(0)
    config = NllbMoeConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_experts=4,
        encoder_sparse_step=1,
        decoder_sparse_step=2,
        max_position_embeddings=128,
        pad_token_id=0,
        decoder_start_token_id=2,
    )
    NllbMoeForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    model = compressed(tmp_path / "dense")
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path / "packed")
    again = NllbMoeForConditionalGeneration.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(again(**inputs).logits, logits)
    report = compression_report(again)
    assert "2 stacks of layers" in report["fallbacks"][0]
    assert set(report["expert_bits"]) == {
        "model.encoder.layers.0.ffn.experts",
        "model.encoder.layers.1.ffn.experts",
        "model.decoder.layers.1.ffn.experts",
    }
    assert isinstance(model.model.encoder.layers[0].ffn.experts["expert_3"].fc2, PackedLinear)
    assert relative_rms(logits, again.dequantize()(**inputs).logits) <= 1e-5


@pytest.fixture
def remote(tmp_path):
    """A checkpoint folder with its own modelling code."""
    import remote_moe

    torch.manual_seed(0)
    folder = tmp_path / "remote"
    remote_moe.RemoteMoeForCausalLM(remote_moe.RemoteMoeConfig()).save_pretrained(folder)
    shutil.copy(Path(remote_moe.__file__), folder / "remote_moe.py")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "remote_moe.RemoteMoeConfig",
        "AutoModelForCausalLM": "remote_moe.RemoteMoeForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _remote(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("dropped", [False, True])
def test_remote_code(remote, tmp_path, dropped):
    config = quick_config(bits=2.0)
    if dropped:
        plan = Plan({f"layers.{i}.mlp.experts": ExpertWidths((0, 2, 3, 4), (0, 3, 2, 8)) for i in range(2)})
        config = quick_config(plan=plan.to_dict())
    model = _remote(remote, quantization_config=config)
    assert not any(isinstance(module, PackedExperts) for module in model.modules())
    expert = model.layers[0].mlp.experts[1]
    assert all(isinstance(linear, PackedLinear) for linear in (expert.w1, expert.w2, expert.w3))
    assert isinstance(model.layers[0].mlp.gate, torch.nn.Linear)
    assert isinstance(model.layers[0].mlp.gate, SlicedRouter) == dropped
    logits = model(IDS).logits
    model.save_pretrained(tmp_path / "packed")
    names = set(load_file(tmp_path / "packed" / "model.safetensors"))
    assert "layers.1.mlp.experts.1.w2.weight" in names
    assert dropped != ("layers.1.mlp.experts.0.w2.weight" in names)
    shutil.copy(remote / "remote_moe.py", tmp_path / "packed")
    again = _remote(tmp_path / "packed")
    assert torch.equal(again(IDS).logits, logits)
    if not dropped:
        report = compression_report(again)
        assert report["average_bits"] == 2.0
        assert report["fallbacks"] == []
    else:
        assert (expert.w1.bits, expert.w3.bits, expert.w2.bits) == (2, 2, 3)
    assert relative_rms(logits, again.dequantize()(IDS).logits) <= 1e-5
