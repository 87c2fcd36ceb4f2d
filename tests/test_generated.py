# SPDX-License-Identifier: Apache-2.0
"""Calibration text that a dense model writes: shapes, seeds, and that a compression takes it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_mcmoe import MCMoEConfig, compression_report
from transformers_mcmoe.calibration.generated import generated_tokens

DEMO = Path(__file__).parent.parent / "examples" / "demo-mixtral"


@pytest.fixture(scope="module")
def dense():
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)


def test_sequences_are_sampled_from_the_model(dense):
    state = torch.get_rng_state()
    tokens = generated_tokens(dense, 5, 32, batch=2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert tokens.shape == (5, 32)
    assert tokens.dtype == torch.int64
    assert (tokens[:, 0] == tokens[0, 0]).all()
    assert len({tuple(row) for row in tokens.tolist()}) == 5
    assert torch.equal(generated_tokens(dense, 5, 32, batch=2, seed=3), tokens)
    assert not torch.equal(generated_tokens(dense, 5, 32, batch=2, seed=4), tokens)
    random = torch.randint(0, dense.config.vocab_size, tokens.shape)
    losses = [float(dense(t, labels=t).loss) for t in (tokens, random)]
    assert losses[0] < losses[1] - 2


def test_a_text_that_ends_is_followed_by_another(dense):
    ends = dense.generation_config.eos_token_id
    bias = torch.zeros(dense.config.vocab_size)
    bias[ends] = 20.0
    dense.lm_head.bias = torch.nn.Parameter(bias)
    try:
        tokens = generated_tokens(dense, 2, 12)
    finally:
        dense.lm_head.bias = None
    assert tokens.shape == (2, 12)
    assert (tokens[:, 1:] == ends).sum() > 5


def test_a_compression_takes_it(dense):
    config = MCMoEConfig(3.0, dataset=generated_tokens(dense, 8, 64), num_samples=8, progress=lambda _: None)
    model = AutoModelForCausalLM.from_pretrained(DEMO, quantization_config=config, dtype=torch.float32)
    assert compression_report(model)["calibration_tokens"] == 8 * 64
    ids = AutoTokenizer.from_pretrained(DEMO)("The list is sorted", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()


def test_a_model_without_a_first_token_is_refused(dense, monkeypatch):
    monkeypatch.setattr(dense.generation_config, "bos_token_id", None)
    monkeypatch.setattr(dense.generation_config, "eos_token_id", None)
    with pytest.raises(ValueError, match="begin-of-text"):
        generated_tokens(dense, 1, 4)
