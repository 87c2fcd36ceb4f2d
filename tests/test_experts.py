# SPDX-License-Identifier: Apache-2.0
"""The adapter of every family against the module it stands for."""

import pytest
import torch
from tiny import TINY, relative_rms, tiny_model, tokens
from torch import nn

from transformers_mcmoe.models.experts import BLOCK, FusedExperts, find_experts, find_linears, layer_of

FAMILIES = sorted(TINY)
IDS = tokens(2, 24, seed=3)


def _calls(model, path):
    """Arguments and output of an experts module in one forward pass."""
    calls = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, args, out: calls.append((args, out)))
    model(IDS, use_cache=False)
    handle.remove()
    return calls[0]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_run_through_the_adapter_equal_the_module(family):
    model = tiny_model(family)
    for path, experts in find_experts(model).items():
        args, output = _calls(model, path)
        combined = experts.dispatch(*args, run=experts.run)
        assert combined.shape == output.shape
        assert relative_rms(combined, output) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "dbrx", "llama4_text", "longcat_flash", "nemotron_h"])
def test_blocks_change_nothing_but_rounding(family):
    model = tiny_model(family, torch.bfloat16)
    ids = tokens(4, 100, seed=4)  # more than one block for some experts
    assert ids.numel() > 2 * BLOCK
    expected = model(ids).logits
    found = find_experts(model)
    rows = []
    original = FusedExperts.run

    def run(self, expert, x, matrices=None):
        rows.append(x.shape[0])
        return original(self, expert, x, matrices)

    FusedExperts.run = run
    try:
        for experts in found.values():
            with experts.in_blocks():
                blocks = model(ids).logits
            assert relative_rms(blocks, expected) <= 1.5e-2
    finally:
        FusedExperts.run = original
    assert set(rows) == {BLOCK}
    assert torch.equal(model(ids).logits, expected)  # and the module is as it was


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_are_views_that_can_be_written(family):
    model = tiny_model(family)
    experts = next(iter(find_experts(model).values()))
    for projection in experts.projections:
        matrix = experts.matrix(1, projection.name)
        assert matrix.shape == (projection.out_features, projection.in_features)
        matrix.fill_(0.5)
        assert (experts.matrix(1, projection.name) == 0.5).all()
        assert not (experts.matrix(2, projection.name) == 0.5).any()


@torch.no_grad()
def test_every_routed_token_is_observed_once():
    model = tiny_model("qwen3_moe")
    path, experts = next(iter(find_experts(model).items()))
    seen = []
    with experts.observe(lambda *call: seen.append(call)):
        (hidden_states, index, weights), _ = _calls(model, path)
    assert sum(len(x) for _, x, _, _ in seen) == index.numel()
    for expert, x, w, position in seen:
        token, slot = torch.where(index == expert)
        assert torch.equal(position, token)
        assert torch.equal(x, hidden_states[token])
        assert torch.equal(w, weights[token, slot])
    assert not experts.module._forward_pre_hooks


def _kinds(family):
    model = tiny_model(family)
    widths = find_linears(model, find_experts(model), attention_bits=4, shared_expert_bits=8)
    names = {}
    for path, bits in widths.items():
        names.setdefault(bits, set()).add(path.rpartition(".")[2])
    rest = {p for p, m in model.named_modules() if isinstance(m, nn.Linear) and p not in widths}
    return names, rest


def test_attention_and_shared_experts_are_told_apart():
    names, rest = _kinds("qwen2_moe")
    assert names == {4: {"q_proj", "k_proj", "v_proj", "o_proj"}, 8: {"gate_proj", "up_proj", "down_proj"}}
    assert rest == {"lm_head", "model.layers.1.mlp.shared_expert_gate"}
    names, _ = _kinds("deepseek_v3")
    assert names[4] == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    names, _ = _kinds("dbrx")
    assert names == {4: {"Wqkv", "out_proj"}}


@pytest.mark.parametrize(
    ("family", "untouched"),
    [
        ("qwen3_next", "linear_attn"),
        ("minimax", "layers.0.self_attn"),  # lightning attention
        ("jamba", "mamba"),
        ("nemotron_h", "layers.0.mixer"),
        ("granitemoehybrid", "mamba"),
        ("lfm2_moe", "conv"),
        ("hunyuan_v1_moe", "gate.wg"),
        ("longcat_flash", "router"),
        ("gemma4_text", "router"),
    ],
)
def test_state_projections_and_routers_stay(family, untouched):
    model = tiny_model(family)
    widths = find_linears(model, find_experts(model), attention_bits=4, shared_expert_bits=4)
    assert not [path for path in widths if untouched in path]
    assert [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and untouched in p]


def test_layer_numbers():
    assert layer_of("model.layers.3.mlp.experts") == ("model.layers", 3)
    assert layer_of("transformer.blocks.12.ffn.experts.mlp") == ("transformer.blocks", 12)
    with pytest.raises(NotImplementedError, match="no numbered decoder layer"):
        layer_of("model.experts")
