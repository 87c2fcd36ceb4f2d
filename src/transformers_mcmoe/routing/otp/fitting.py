# SPDX-License-Identifier: Apache-2.0
"""Fits one layer's router to the measured costs of its slots. Knows tensors, not models."""

from __future__ import annotations

import torch
from torch import Tensor

from transformers_mcmoe.config import OTPConfig
from transformers_mcmoe.routing import prefix_scores, routing_features
from transformers_mcmoe.routing.otp.costs import Trace

# passes over a layer's tokens at most, and tokens of a step
EPOCHS, STEP = 60, 512
Matrices = tuple[Tensor, Tensor]


def fit_router(train: Trace, test: Trace, otp: OTPConfig, generator: torch.Generator) -> Matrices:
    """Matrices of a router (see `PrefixRouter`) whose scores are logarithms of expected costs.

    Least is the mean of c exp(-s) + s, whose minimum is at s = log E[c]: a measured cost is the square of one product, so
    single ones say little. Stops when tokens it is not fitted to no longer gain.

    Args:
        train: the layer's costs.
        test: costs of other tokens.
        otp: the options.
        generator: of initial values and of the order of tokens.
    """
    x, weights, costs = train.joined()
    fit = _Fit(x, weights, costs, otp.rank, generator)
    parameters = [fit.hidden, fit.scores]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-2)
    held_out = test.joined()
    best, kept, waited = float("inf"), fit.matrices(), 0
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(STEP):
            optimizer.zero_grad()
            fit.loss(x[rows], weights[rows], costs[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(fit.loss(*held_out))
        best, kept, waited = (loss, fit.matrices(), 0) if loss < best else (best, kept, waited + 1)
        if waited >= otp.patience:
            break
    return tuple(matrix.detach().clone() for matrix in kept)  # type: ignore[return-value]


class _Fit:
    """A router over standardized inputs, and its matrices over inputs as they come."""

    def __init__(self, x: Tensor, weights: Tensor, costs: Tensor, rank: int, generator: torch.Generator) -> None:
        features = routing_features(x, weights)
        whole = x.to(torch.float32)
        # directions that hardly vary are not blown up
        self._spread = torch.cat([whole.std(0).clamp(min=float(whole.std()) / 30), features.std(0).clamp(min=1e-2)])
        self._middle = torch.cat([whole.mean(0), features.mean(0)])
        self._size = costs.nanmean(0).nan_to_num(1.0).clamp(min=1e-30)  # of each slot
        self._rank, self._features, width = rank, features.shape[1], whole.shape[1] + features.shape[1]
        self.hidden = (torch.randn(rank, width + 1, generator=generator) / width**0.5).requires_grad_()
        self.scores = torch.zeros(costs.shape[1], rank + self._features + 1).requires_grad_()

    def matrices(self) -> Matrices:
        """As `PrefixRouter` stores them, [rank, H + K + 2] and [K - 1, rank + K + 2]."""
        hidden = self.hidden[:, :-1] / self._spread
        bias = self.hidden[:, -1] - hidden @ self._middle
        direct = self.scores[:, self._rank : -1] / self._spread[-self._features :]
        offset = self.scores[:, -1] - direct @ self._middle[-self._features :] + self._size.log()
        scores = torch.cat([self.scores[:, : self._rank], direct, offset[:, None]], dim=-1)
        return torch.cat([hidden, bias[:, None]], dim=-1), scores

    def loss(self, x: Tensor, weights: Tensor, costs: Tensor) -> Tensor:
        """Mean of c exp(-s) + s over the slots that lead to an expert, c in units of the slot's mean."""
        scores = prefix_scores(x, weights, *self.matrices()) - self._size.log()
        routed = ~costs.isnan()
        relative = costs.nan_to_num(0.0) / self._size
        terms = (relative * (-scores.clamp(min=-15)).exp() + scores) * routed
        return terms.sum() / routed.sum().clamp(min=1)
