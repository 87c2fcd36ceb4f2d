# SPDX-License-Identifier: Apache-2.0
"""Every family: compressed on the fly, saved, reloaded bit-identical, equal to the dequantized dense model."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny import TINY, compressed, families, load_class, relative_rms, save_dense, tokens

from transformers_mcmoe import (
    ODPConfig,
    PackedExperts,
    PackedLinear,
    compression_report,
    expert_pruning_stats,
    set_expert_pruning,
)
from transformers_mcmoe.models.experts import find_experts


@torch.no_grad()
@pytest.mark.parametrize("family", families(sorted(TINY)))
def test_family(family, tmp_path, table_of_models):
    dense = save_dense(family, tmp_path / "dense")
    ids = tokens(2, 24, seed=1)
    model, info = compressed(dense, output_loading_info=True)
    assert not any(info.values()), info
    assert any(isinstance(module, PackedExperts) for module in model.modules())
    assert any(isinstance(m, PackedLinear) and ".experts." not in path for path, m in model.named_modules())
    logits = model(ids).logits
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path / "packed")

    reloaded, info = load_class(tmp_path / "packed").from_pretrained(
        tmp_path / "packed", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    before, after = model.state_dict(), reloaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(reloaded(ids).logits, logits)
    assert torch.equal(reloaded.generate(ids, max_new_tokens=4, do_sample=False), generated)
    report = compression_report(reloaded)
    assert report == json.loads((tmp_path / "packed" / "mcmoe_report.json").read_text())
    assert report["average_bits"] <= 3.0
    assert not [note for note in report["fallbacks"] if "loaded" in note]

    odp, pruned = _prune(reloaded, ids, logits)
    dequantized = reloaded.dequantize()
    if odp is not None:  # skipped slots cost nothing in one and have the weight 0 in the other
        set_expert_pruning(dequantized, odp)
        assert relative_rms(dequantized(ids).logits, pruned) <= 1e-5
        set_expert_pruning(dequantized, False)
    assert not any(isinstance(module, PackedExperts | PackedLinear) for module in dequantized.modules())
    assert relative_rms(logits, dequantized(ids).logits) <= 1e-5
    # what dequantize gives is an ordinary checkpoint of the family
    dequantized.save_pretrained(tmp_path / "again")
    again = load_class(tmp_path / "again").from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(ids).logits, dequantized(ids).logits)
    assert _names(tmp_path / "again") == _names(dense)
    table_of_models(
        family=family,
        model=type(model).__name__,
        experts=sorted({type(experts.module).__name__ for experts in find_experts(dequantized).values()}),
        one_operator=model.hf_quantizer.is_compileable,
        prunable=odp is not None,
    )


def _prune(model, ids, logits):
    """Options and logits of a pruned model, which is then as it was before; None where a family has no choice to prune."""
    ratios = compression_report(model)["routing_ratios"]
    slots = [rank for table in ratios.values() for rank in table["ratios"]]
    if not slots:
        with pytest.raises(ValueError, match=r"not handed|one expert"):
            set_expert_pruning(model)
        return None, None
    set_expert_pruning(model, ODPConfig(threshold=0))
    assert torch.equal(model(ids).logits, logits)
    odp = set_expert_pruning(model)
    pruned = model(ids).logits
    skipped = expert_pruning_stats(model)["prefill"]["slots_skipped"]
    if max(rank[-1] - rank[0] for rank in slots) > 1e-3:  # a tiny router may give equal weights: nothing is below
        assert 0 < skipped < 1
        assert not torch.equal(pruned, logits)
    set_expert_pruning(model, False)
    return odp, pruned


def _names(folder):
    names = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            names |= set(handle.keys())
    return names


@torch.no_grad()
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama4_text", "dbrx", "granitemoe"])
def test_bfloat16(family, tmp_path):
    dense = save_dense(family, tmp_path / "dense")
    ids = tokens(2, 24, seed=1)
    model = compressed(dense, dtype=torch.bfloat16)
    logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "packed")
    reloaded = load_class(tmp_path / "packed").from_pretrained(tmp_path / "packed", dtype="auto")
    assert reloaded.dtype == torch.bfloat16
    assert torch.equal(reloaded(ids).logits, logits)
    exact = load_class(tmp_path / "packed").from_pretrained(tmp_path / "packed", dtype=torch.float32)(ids).logits
    dequantized = reloaded.dequantize()(ids).logits
    # rounding can turn a token's routing in either, so two of 48 may differ; the packed model rounds less, as its weights stay in fp32
    ours, theirs = (_errors(found, exact)[:-2].max() for found in (logits, dequantized))
    assert ours <= 1.2 * theirs < 1.2e-2


def _errors(found, exact):
    """Relative errors of all tokens, ascending."""
    return ((found.float() - exact).norm(dim=-1) / exact.norm(dim=-1)).flatten().sort().values


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_compile_and_export(family, tmp_path):
    """In one graph, before any eager call has repacked anything."""
    model = compressed(save_dense(family, tmp_path / "dense")).eval()
    assert model.hf_quantizer.is_compileable
    ids = tokens(2, 9, seed=1)
    exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
    logits = model(ids, use_cache=False).logits
    assert torch.equal(compiled, logits)
    assert relative_rms(exported.module()(ids, use_cache=False).logits, logits) <= 1e-5


def test_special_experts_are_not_one_operator(tmp_path):
    model = compressed(save_dense("gpt_oss", tmp_path / "dense"))
    assert not model.hf_quantizer.is_compileable


def test_training_step(tmp_path):
    """Gradients reach the embeddings through packed experts, and equal those of the dense copy."""
    model = compressed(save_dense("mixtral", tmp_path / "dense"))
    ids = tokens(2, 12, seed=1)

    def gradient(model) -> torch.Tensor:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return model.get_input_embeddings().weight.grad.clone()

    packed = gradient(model)
    assert relative_rms(packed, gradient(model.dequantize())) <= 1e-5
