# SPDX-License-Identifier: Apache-2.0
"""A model as remote code ships it: routed experts in a ModuleList of dense MLPs, router in the block."""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput


class RemoteMoeConfig(PreTrainedConfig):
    model_type = "remote_moe"

    def __init__(self, vocab_size=320, hidden_size=64, intermediate_size=64, num_experts=4, num_layers=2, **kwargs):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_experts, self.num_hidden_layers = num_experts, num_layers
        super().__init__(**kwargs)


class RemoteMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class RemoteMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList([RemoteMLP(config) for _ in range(config.num_experts)])

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, index = self.gate(x).softmax(-1).topk(2)
        output = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(index == i)
            output.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return output.view_as(hidden_states)


class RemoteLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mlp = RemoteMoE(config)

    def forward(self, hidden_states):
        return (hidden_states + self.mlp(self.norm(hidden_states)),)


class RemoteMoeForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = RemoteMoeConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([RemoteLayer(config) for _ in range(config.num_hidden_layers)])
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, **kwargs):
        hidden_states = self.embed(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)[0]
        return CausalLMOutput(logits=self.head(hidden_states))
