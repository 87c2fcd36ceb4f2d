# SPDX-License-Identifier: Apache-2.0
"""Unpacked models: plain transformers loads them and computes what the packed model computed."""

import pytest
import torch
from tiny import compressed, load, load_class, quick_config, relative_rms, save_dense, tokens

from transformers_mcmoe import PruneConfig, unpack

FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "dbrx", "granitemoe", "longcat_flash")


def pruned(family, folder, **changes):
    save_dense(family, folder)
    prune = PruneConfig(0.25, method="naee")
    return compressed(folder, quick_config(**({"bits": 3.2, "prune": prune, "expert_bits": (2, 4, 8)} | changes)))


@pytest.mark.parametrize("family", FAMILIES)
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
