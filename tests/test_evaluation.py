# SPDX-License-Identifier: Apache-2.0
"""Perplexity, KL divergence and agreement against a direct computation in float64 on a tiny random Mixtral."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tiny import tiny_model, tokens
from torch import Tensor

from transformers_mcmoe.evaluation import Evaluation, evaluate


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model("mixtral", intermediate_size=96)  # transformers' bf16 experts want multiples of 8
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform predictions
    return model


@pytest.fixture(scope="module")
def other(model: Any) -> Any:
    other = copy.deepcopy(model)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * parameter.std() * 0.3)
    return other


@torch.no_grad()
def _direct(model: Any, ids: Tensor) -> Tensor:
    """Log probabilities [N, T - 1, V] in float64, one window at a time."""
    logits = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in ids])
    return logits[:, :-1].double().log_softmax(-1)


def test_perplexity(model: Any):
    ids = tokens(5, 16)
    scores = _direct(model, ids)
    loss = 0.0
    for row in range(5):
        for position in range(15):
            loss -= float(scores[row, position, ids[row, position + 1]])
    result = evaluate(model, ids, batch=2)
    assert result.perplexity == pytest.approx(math.exp(loss / 75), rel=1e-5)
    assert result.perplexity != pytest.approx(320, rel=0.05)  # not a uniform guess
    assert (result.kl, result.top1, result.tokens) == (None, None, 75)


def test_kl_and_top1(model: Any, other: Any):
    ids = tokens(5, 16)
    ours, reference = _direct(other, ids), _direct(model, ids)
    result = evaluate(other, ids, reference=model, batch=2)
    kl = float((reference.exp() * (reference - ours)).sum(-1).mean())
    assert kl > 0.05
    assert result.kl == pytest.approx(kl, rel=1e-4)
    backwards = float((ours.exp() * (ours - reference)).sum(-1).mean())
    assert result.kl != pytest.approx(backwards, rel=1e-2)  # the reference's probabilities weigh
    agree = float((ours.argmax(-1) == reference.argmax(-1)).double().mean())
    assert 0.02 < agree < 0.98
    assert result.top1 == pytest.approx(agree)
    assert result.perplexity == pytest.approx(evaluate(other, ids).perplexity, rel=1e-6)


def test_reference_to_itself(model: Any):
    result = evaluate(model, tokens(3, 16), reference=model)
    assert result.kl == 0.0
    assert result.top1 == 1.0


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_batches_do_not_matter(model: Any, other: Any, batch: int):
    whole, parts = (evaluate(other, tokens(5, 16), model, size) for size in (5, batch))
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-5)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-4)
    assert (parts.top1, parts.tokens) == (whole.top1, whole.tokens)


def test_half_precision_logits_are_scored_in_float32(model: Any):
    ids = tokens(3, 16)
    half = copy.deepcopy(model).bfloat16()
    scores = _direct(half, ids)
    loss = -scores.gather(-1, ids[:, 1:, None]).mean()
    assert evaluate(half, ids).perplexity == pytest.approx(math.exp(float(loss)), rel=1e-5)


def test_no_gradients_are_kept(model: Any):
    result = evaluate(model, tokens(2, 8))
    assert isinstance(result, Evaluation)
    assert isinstance(result.perplexity, float)
    assert all(parameter.grad is None for parameter in model.parameters())
