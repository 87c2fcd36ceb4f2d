# SPDX-License-Identifier: Apache-2.0
"""A vision-language model as remote code ships it, of DeepSeek-VL2's shape.

Image features are written over the embeddings of placeholders that `images_seq_mask` marks; the language model, below
`language`, has a dense first layer, shared experts, and routed experts in a ModuleList.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast


class RemoteVLConfig(PreTrainedConfig):
    model_type = "remote_vl_v2"

    def __init__(self, vision_config=None, language_config=None, **kwargs):
        self.vision_config = vision_config or {"width": 32, "patch_size": 8}
        self.language_config = language_config or {
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 3,
        }
        super().__init__(**kwargs)


class DeepseekMLP(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DeepseekMoEGate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config["num_experts_per_tok"]
        self.weight = nn.Parameter(torch.randn(config["n_routed_experts"], config["hidden_size"]) / 8)

    def forward(self, hidden_states):
        scores = nn.functional.linear(hidden_states.flatten(0, 1), self.weight).softmax(-1)
        weight, index = scores.topk(self.top_k, dim=-1)
        return index, weight


class DeepseekMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
        self.experts = nn.ModuleList([DeepseekMLP(hidden, inner) for _ in range(config["n_routed_experts"])])
        self.gate = DeepseekMoEGate(config)
        self.shared_experts = DeepseekMLP(hidden, inner * config["n_shared_experts"])

    def forward(self, hidden_states):
        index, weight = self.gate(hidden_states)
        x = hidden_states.flatten(0, 1)
        output = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(index == i)
            if len(token):
                output.index_add_(0, token, expert(x[token]) * weight[token, slot, None])
        return output.view_as(hidden_states) + self.shared_experts(hidden_states)


class DeepseekAttention(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.num_heads, self.num_key_value_groups, self.scaling = 4, 1, (hidden // 4) ** -0.5
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x):
        batch, length, hidden = x.shape
        q, k, v = (
            linear(x).view(batch, length, 4, -1).transpose(1, 2) for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scaling)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, hidden))


class DeepseekDecoderLayer(nn.Module):
    def __init__(self, config, sparse):
        super().__init__()
        hidden = config["hidden_size"]
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.self_attn = DeepseekAttention(hidden)
        self.mlp = DeepseekMoE(config) if sparse else DeepseekMLP(hidden, config["intermediate_size"])

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states))
        return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)),)


class DeepseekModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList([DeepseekDecoderLayer(config, i > 0) for i in range(config["num_hidden_layers"])])
        self.norm = nn.LayerNorm(config["hidden_size"])

    def forward(self, inputs_embeds):
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)[0]
        return self.norm(inputs_embeds)


class DeepseekLanguage(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.model = DeepseekModel(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)


class Vision(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, config["width"], config["patch_size"], config["patch_size"])
        self.mlp = nn.Sequential(nn.Linear(config["width"], 48), nn.GELU(), nn.Linear(48, config["width"]))

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        return x + self.mlp(x)


class RemoteVLForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = RemoteVLConfig

    def __init__(self, config):
        super().__init__(config)
        self.vision = Vision(config.vision_config)
        self.projector = nn.Linear(config.vision_config["width"], config.language_config["hidden_size"])
        self.language = DeepseekLanguage(config.language_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language.model.embed_tokens

    def get_output_embeddings(self):
        return self.language.lm_head

    def forward(self, input_ids, images=None, images_seq_mask=None, **kwargs):
        embeds = self.language.model.embed_tokens(input_ids)
        if images is not None and images_seq_mask is not None:
            embeds = embeds.masked_scatter(images_seq_mask[..., None], self.projector(self.vision(images)).to(embeds))
        return CausalLMOutputWithPast(logits=self.language.lm_head(self.language.model(embeds)))
