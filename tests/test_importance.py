# SPDX-License-Identifier: Apache-2.0
"""Importance of tokens: against brute force from eager attention matrices, and independent of how it is computed."""

import pytest
import torch
from tiny import relative_rms, save_dense, tokens
from transformers import AutoModelForCausalLM

from transformers_mcmoe import ODPConfig, set_expert_pruning
from transformers_mcmoe.routing import attached, attention_received
from transformers_mcmoe.routing.call import Call

FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"]
ODP = ODPConfig(threshold=0.9, protect=0.1)


def _model(family, folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(save_dense(family, folder), dtype=torch.float32, **kwargs)


def _importance(model):
    """Importance by layer of the calls to come."""
    seen = {}

    def watch(path, importance):
        values = importance.values
        importance.values = lambda: seen.setdefault(path, values())

    for path, layer in attached(model).layers.items():
        watch(path, layer._importance)
    return seen


def _padded(ids, lengths, side):
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        mask[row, slice(0, n) if side == "right" else slice(ids.shape[1] - n, None)] = 1
    return ids * mask, mask


@torch.no_grad()
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_brute_force(family, padding, tmp_path):
    model = _model(family, tmp_path, attn_implementation="eager")
    ids = tokens(2, 20, seed=3)
    ids, mask = (ids, torch.ones_like(ids)) if padding is None else _padded(ids, (20, 13), padding)
    plain = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    set_expert_pruning(model, ODPConfig(threshold=0.0, protect=0.1))
    seen = _importance(model)
    pruned = model(ids, attention_mask=mask)
    assert torch.equal(pruned.logits, plain.logits)
    matrices = iter(plain.attentions)  # a hybrid model has them for its attention layers only
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    by_layer = [None if kind == "linear_attention" else next(matrices) for kind in types]
    valid = mask.bool()
    assert len(seen) == len(attached(model).layers)
    for path, (importance, own) in seen.items():
        number = int(path.split(".")[2])
        norm = plain.hidden_states[number].abs().sum(-1)
        weights = by_layer[number]
        if weights is None:
            expected, expected_own = norm, norm
        else:
            mean = weights.mean(1) * valid[:, :, None]
            later = torch.stack([valid[:, j:].sum(-1) for j in range(ids.shape[1])], dim=1)
            expected = norm * mean.sum(1) / later.clamp(min=1)
            expected_own = norm * mean.diagonal(dim1=1, dim2=2) * valid.cumsum(-1)
        assert relative_rms(importance[valid], expected[valid]) <= 1e-5
        assert relative_rms(own[valid], expected_own[valid]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "qwen3_next"])
def test_fused_and_eager_attention_agree(family, tmp_path):
    ids, mask = _padded(tokens(2, 40, seed=3), (40, 31), "left")
    valid, seen = mask.bool(), {}
    for name in ("eager", "sdpa"):
        model = _model(family, tmp_path, attn_implementation=name)
        set_expert_pruning(model, ODP)
        importance = _importance(model)
        seen[name] = model(ids, attention_mask=mask).logits[valid], importance
    assert relative_rms(seen["sdpa"][0], seen["eager"][0]) <= 1e-4
    for path, (importance, _) in seen["eager"][1].items():
        assert relative_rms(seen["sdpa"][1][path][0][valid], importance[valid]) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_model_computes_what_it_did_under_either_attention(family, tmp_path):
    ids = tokens(2, 20, seed=3)
    for name in ("eager", "sdpa") if family != "gpt_oss" else ("eager",):
        model = _model(family, tmp_path, attn_implementation=name)
        with torch.no_grad():
            plain = model(ids).logits
            set_expert_pruning(model, ODPConfig(threshold=0.0))
            assert model.config._attn_implementation.startswith("mcmoe")
            assert torch.equal(model(ids).logits, plain)
            set_expert_pruning(model, False)
            assert model.config._attn_implementation == name
            assert torch.equal(model(ids).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [False, True])
def test_padded_batch_gives_what_each_sequence_gives_alone(side, causal, tmp_path):
    model = _model("mixtral", tmp_path)
    set_expert_pruning(model, ODPConfig(threshold=0.95, protect=0.1, causal=causal))
    ids, mask = _padded(tokens(3, 30, seed=5), (30, 17, 9), side)
    together = model(ids, attention_mask=mask).logits
    for row in range(3):
        alone = model(ids[row, mask[row].bool()][None]).logits
        assert relative_rms(together[row, mask[row].bool()], alone[0]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_next"])
def test_causal_protection_does_not_depend_on_how_a_prompt_is_cut(family, tmp_path):
    model = _model(family, tmp_path)
    set_expert_pruning(model, ODPConfig(threshold=0.95, protect=0.1, causal=True))
    ids = tokens(2, 24, seed=7)
    whole = model(ids).logits
    parts, cache = [], None
    for piece in ids.split((9, 1, 1, 8, 5) if family != "qwen3_next" else (20, 1, 1, 1, 1), dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        parts.append(output.logits)
        cache = output.past_key_values
    assert relative_rms(torch.cat(parts, dim=1), whole) <= 1e-5


@torch.no_grad()
def test_sliding_windows(tmp_path):
    model = _model("gpt_oss", tmp_path, attn_implementation="eager")
    assert model.config.sliding_window
    assert "sliding_attention" in model.config.layer_types
    ids = tokens(1, 60, seed=2)
    plain = model(ids, output_attentions=True, output_hidden_states=True)
    set_expert_pruning(model, ODPConfig(threshold=0.0))
    seen = _importance(model)
    model(ids)
    for number, (importance, _) in enumerate(seen.values()):
        later = torch.arange(60, 0, -1)
        expected = plain.hidden_states[number].abs().sum(-1) * plain.attentions[number].mean(1).sum(1) / later
        assert relative_rms(importance, expected) <= 1e-5


def test_long_sequences_in_blocks():
    query, key = torch.randn(1, 4, 700, 16), torch.randn(1, 2, 700, 16)
    import transformers_mcmoe.routing.importance as module

    block = module.BLOCK
    try:
        module.BLOCK = 4 * 700 * 33  # 33 rows at a time
        received, given = attention_received(query, key, None, 0, None, scaling=0.25)
    finally:
        module.BLOCK = block
    weights = (query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.25).masked_fill(
        torch.ones(700, 700).triu(1).bool(), -torch.inf
    )
    weights = weights.softmax(-1).mean(1)
    assert relative_rms(received, weights.sum(1)) <= 1e-5
    assert relative_rms(given, weights.diagonal(dim1=1, dim2=2)) <= 1e-5


class TestTop:
    def test_share_of_a_call(self):
        call = Call()
        call.valid = torch.tensor([[True] * 10, [False] * 7 + [True] * 3])
        value = torch.arange(20.0).view(2, 10)
        kept = call.top(value, 0.11)  # rounded up, and the first token of each sequence
        assert kept.tolist() == [[True] + [False] * 7 + [True] * 2, [False] * 7 + [True, False, True]]
        assert call.top(value, 0.3).sum().item() == 4 + 2
        reduced = call.top(value, 0.34, keep=False)
        assert reduced.tolist() == [[False] * 7 + [True] * 3, [False] * 9 + [True]]

    @pytest.mark.parametrize("keep", [True, False])
    def test_running_choice_equals_brute_force(self, keep):
        call, value = Call(), torch.rand(2, 50)
        chosen = torch.cat(
            [call.top_so_far("x", piece, 0.1, keep) for piece in value.split((20, 1, 29), dim=1)], dim=1
        )
        for row in range(2):
            for t in range(50):
                larger = (value[row, : t + 1] > value[row, t]).sum()
                assert chosen[row, t] == (larger < (-(-(t + 1) // 10) if keep else (t + 1) // 10))
