# SPDX-License-Identifier: Apache-2.0
"""Every family: compressed on the fly, saved, reloaded bit-identical, equal to the dequantized dense model."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny import TINY, compressed, load_class, relative_rms, save_dense, tokens

from transformers_mcmoe import PackedExperts, PackedLinear, compression_report


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(TINY))
def test_family(family, tmp_path):
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

    dequantized = reloaded.dequantize()
    assert not any(isinstance(module, PackedExperts | PackedLinear) for module in dequantized.modules())
    assert relative_rms(logits, dequantized(ids).logits) <= 1e-5
    # what dequantize gives is an ordinary checkpoint of the family
    dequantized.save_pretrained(tmp_path / "again")
    again = load_class(tmp_path / "again").from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(ids).logits, dequantized(ids).logits)
    assert _names(tmp_path / "again") == _names(dense)


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
    assert relative_rms(logits, reloaded.dequantize()(ids).logits) <= 1.5e-2
