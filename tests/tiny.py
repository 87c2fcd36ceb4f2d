# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of many MoE families, and the helpers that end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from transformers_mcmoe import MCMoEConfig

VOCABULARY = 320
WORDS = [f"w{i}" for i in range(300)]
_MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
_DEEPSEEK = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_DELTA_NET = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
_SHARED = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


def _base(**changes: Any) -> dict[str, Any]:
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    return {key: value for key, value in config.items() if value is not None}


def _eight(**changes: Any) -> dict[str, Any]:
    return _base(num_local_experts=8, num_experts_per_tok=2, **changes)


# in_features of 80, 72 and 100 have no divisor that is a multiple of 32: their last group is padded
TINY: dict[str, dict[str, Any]] = {
    "afmoe": _base(
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        num_shared_experts=1,
        num_dense_layers=1,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
    ),
    "aria_text": _base(moe_num_experts=8, moe_topk=2, moe_num_shared_experts=1, intermediate_size=32, head_dim=16),
    "cohere2_moe": _base(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16),
    "dbrx": {
        "vocab_size": VOCABULARY,
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 80, "moe_num_experts": 8, "moe_top_k": 2},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "deepseek_v2": _base(**_DEEPSEEK, **_MLA),
    "deepseek_v3": _base(**_DEEPSEEK, **_MLA, num_key_value_heads=4),
    "dots1": _base(**_DEEPSEEK, head_dim=16),
    "ernie4_5_moe": _base(
        moe_intermediate_size=32, moe_num_experts=8, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1
    ),
    "exaone_moe": _base(
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        num_shared_experts=1,
        first_k_dense_replace=1,
        head_dim=16,
        n_group=1,
        topk_group=1,
        layer_types=["full_attention"] * 2,
        sliding_window=16,
    ),
    "flex_olmo": _base(num_experts=8, num_experts_per_tok=2),
    "gemma4_text": _base(
        enable_moe_block=True,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=32,
        expert_intermediate_size=32,
        head_dim=16,
        global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=VOCABULARY,
    ),
    "glm4_moe": _base(**_DEEPSEEK, head_dim=16),
    "glm4_moe_lite": _base(**_DEEPSEEK, **_MLA, num_key_value_heads=4, mlp_layer_types=["dense", "sparse"]),
    "gpt_oss": _eight(
        head_dim=16, intermediate_size=72, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "granitemoe": _eight(tie_word_embeddings=True),
    "granitemoehybrid": _eight(
        shared_intermediate_size=48,
        layer_types=["mamba", "attention"],
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_chunk_size=16,
    ),
    "granitemoeshared": _eight(shared_intermediate_size=48),
    "hunyuan_v1_moe": _base(num_experts=8, moe_topk=2, head_dim=16),
    "jamba": _base(
        num_experts=8,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
        num_hidden_layers=4,
    ),
    "lfm2_moe": _base(
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        num_dense_layers=1,
        layer_types=["conv", "full_attention"],
    ),
    "llama4_text": _base(
        intermediate_size=32,
        intermediate_size_mlp=48,
        num_local_experts=8,
        num_experts_per_tok=1,
        head_dim=16,
        interleave_moe_layer_step=2,
        attention_chunk_size=32,
        layer_types=["chunked_attention", "full_attention"],
    ),
    "longcat_flash": _base(
        num_layers=2,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=32,
        n_routed_experts=8,
        zero_expert_num=2,
        moe_topk=2,
        num_hidden_layers=4,
        intermediate_size=None,
        **_MLA,
        num_key_value_heads=4,
        head_dim=16,
    ),
    "minimax": _eight(head_dim=16, layer_types=["linear_attention", "full_attention"], block_size=16),
    "minimax_m2": _eight(head_dim=16, rotary_dim=16),
    "mixtral": _eight(intermediate_size=100),
    "nemotron_h": _base(
        num_hidden_layers=None,
        layers_block_type=["mamba", "moe", "attention", "moe"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=16,
        head_dim=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=48,
        n_group=1,
        topk_group=1,
    ),
    "olmoe": _base(num_experts=8, num_experts_per_tok=2),
    "phimoe": _eight(),
    "qwen2_moe": _base(**_SHARED, decoder_sparse_step=1, mlp_only_layers=[0]),
    "qwen3_5_moe_text": _base(**_SHARED, **_DELTA_NET, head_dim=16),
    "qwen3_moe": _base(
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        head_dim=16,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=True,
    ),
    "qwen3_next": _base(**_SHARED, **_DELTA_NET, head_dim=16),
    "solar_open": _base(**_DEEPSEEK, head_dim=16),
}


# one family of each kind: every commit is tested with these in minutes, and with all by `make test-slow`
CORE = (
    "mixtral",
    "qwen2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "dbrx",
    "llama4_text",
    "longcat_flash",
    "nemotron_h",
)


def families(names: Iterable[str], core: Sequence[str] = CORE) -> list[Any]:
    """Families as parameters of a test: those that are not in the core are slow."""
    return [pytest.param(name, marks=() if name in core else pytest.mark.slow) for name in names]


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of a family, in eval mode; weights depend on nothing but the family's config."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**(TINY[family] | changes))
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def save_dense(family: str, folder: Path, **changes: Any) -> Path:
    """The checkpoint of a tiny model, in the family's published format."""
    tiny_model(family, **changes).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, **options: Any) -> None:
    """A tokenizer of the words w0, w1, ... w299."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: 3 + i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", **options)
    wrapped.save_pretrained(folder)


def save_text(path: Path) -> None:
    """2,048 of its words."""
    path.write_text(" ".join(WORDS[i % len(WORDS)] for i in tokens(64, 32).flatten().tolist()))


def load(folder: Path, **kwargs: Any) -> Any:
    """A causal language model in float32 unless another dtype is given."""
    return AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.float32} | kwargs))


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, length]."""
    return torch.randint(3, VOCABULARY - 20, (rows, length), generator=torch.Generator().manual_seed(seed))


def quick_config(**changes: Any) -> MCMoEConfig:
    """A config whose calibration takes a second; the average lies inside every tiny model's range."""
    return MCMoEConfig(**({"bits": 3.0, "dataset": tokens(8, 32), "num_samples": 8} | changes))


def compressed(folder: Path, config: MCMoEConfig | None = None, **kwargs: Any) -> Any:
    """`from_pretrained` of a dense checkpoint with compression."""
    kwargs = {"dtype": torch.float32} | kwargs
    return load_class(folder).from_pretrained(folder, quantization_config=config or quick_config(), **kwargs)


def load_class(folder: Path) -> Any:
    """The class that a checkpoint names."""
    return getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])


def relative_rms(a: torch.Tensor, b: torch.Tensor) -> float:
    """rms(a - b) / rms(b)."""
    a, b = a.to(torch.float64), b.to(torch.float64)
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-30))
