# SPDX-License-Identifier: Apache-2.0
"""Perplexity, and KL divergence and top-1 agreement to a reference model, on given tokens.

Logits are compared batch by batch and never stored. Knows models and tokens, not how a model was compressed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Evaluation:
    """Means over all predicted tokens.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        kl: mean KL divergence from the reference to the model in nats per token, None without reference.
        top1: share of tokens whose most likely prediction equals the reference's, None without reference.
        tokens: number of predicted tokens.
    """

    perplexity: float
    kl: float | None
    top1: float | None
    tokens: int


@torch.no_grad()
def evaluate(model: Any, tokens: Tensor, reference: Any = None, batch: int = 8) -> Evaluation:
    """Score a causal language model on windows of tokens; every token but a window's first is predicted.

    Args:
        model: a causal language model.
        tokens: [N, T] int64, windows without overlap.
        reference: the dense model, or None.
        batch: windows per forward pass.

    Returns:
        Means over N * (T - 1) tokens, with log-softmax in float32 and sums in float64.

    Raises:
        ValueError: there is no token to predict.
    """
    if tokens.dim() != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise ValueError(f"Windows must be [N, T] with T >= 2, but their shape is {tuple(tokens.shape)}.")
    loss = divergence = torch.zeros((), dtype=torch.float64)
    agree = 0
    for windows in tokens.split(batch):
        scores = _log_probabilities(model, windows)
        targets = windows[:, 1:].to(scores.device)
        loss = loss - scores.gather(-1, targets.unsqueeze(-1)).sum(dtype=torch.float64).cpu()
        if reference is not None:
            expected = _log_probabilities(reference, windows).to(scores.device)
            kl = functional.kl_div(scores, expected, log_target=True, reduction="none")
            divergence = divergence + kl.sum(dtype=torch.float64).cpu()
            agree += int((scores.argmax(-1) == expected.argmax(-1)).sum())
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    known = reference is not None
    return Evaluation(
        perplexity=math.exp(float(loss) / count),
        kl=float(divergence) / count if known else None,
        top1=agree / count if known else None,
        tokens=count,
    )


def _log_probabilities(model: Any, windows: Tensor) -> Tensor:
    """[N, T - 1, V] float32."""
    logits = model(input_ids=windows.to(model.device), use_cache=False).logits[:, :-1]
    return functional.log_softmax(logits.to(torch.float32), dim=-1)
