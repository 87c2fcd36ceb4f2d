# SPDX-License-Identifier: Apache-2.0
"""Dynamic expert pruning in one MoE layer: which routed slots a call's tokens skip by thresholds and by their importance.

Knows routing tensors and what ranks tokens, not modules.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from transformers_mcmoe.config import ODPConfig
from transformers_mcmoe.kernels import cpu
from transformers_mcmoe.routing.call import Call
from transformers_mcmoe.routing.importance import TokenImportance
from transformers_mcmoe.routing.layer import LayerPruning
from transformers_mcmoe.routing.ratios import sort_slots


class ThresholdPruning(LayerPruning):
    """Expert pruning of one layer by `ODPConfig`.

    Args:
        odp: the options.
        name: distinguishes layers.
        levels: the layer's entry of `ODPConfig.thresholds`.
        renormalize: scale kept weights to the sum that all had.
        call: what is known of the model's current call.
        importance: ranks tokens where some are protected or skip everything.
        expert_bytes: [E], size of each expert.
        skip: expert id that stands for none; None keeps ids, and skipped slots get the weight 0.
    """

    def __init__(
        self,
        odp: ODPConfig,
        name: str,
        levels: Sequence[float],
        renormalize: bool,
        call: Call,
        importance: TokenImportance | None,
        expert_bytes: Sequence[float],
        skip: int | None,
    ) -> None:
        super().__init__(name, renormalize, call, expert_bytes, skip)
        self.odp, self.levels, self._importance = odp, list(levels), importance
        self._thresholds = torch.tensor([0.0, *levels])
        self._kind: bool | None = None  # whether the experts are given tokens of images, if of one kind alone
        self._random = torch.Generator().manual_seed(odp.seed + zlib.crc32(name.encode()))

    @torch.no_grad()
    def skipped(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Which slots are skipped, [T, K] bool; see `LayerPruning`."""
        chosen = self._below(index, weights) if self.odp.method == "odp" else self._compared(x, index, weights)
        if self.odp.drop_all:
            chosen |= self._tokens(self.odp.drop_all, index, least=True)[:, None]
        whole = self._protected(index)
        if whole is not None:
            chosen &= ~whole[:, None]
        return chosen & (index < self.counts.num_experts)

    def compiled(self, x: Tensor, index: Tensor) -> Callable[[cpu.Pruned], tuple[Tensor, Tensor]] | None:
        """See `LayerPruning`."""
        if self.odp.method != "odp" or self.odp.drop_all:
            return None
        whole = self._protected(index)
        return lambda routing: routing.skip_below(self.levels, whole)

    def _below(self, index: Tensor, weights: Tensor) -> Tensor:
        """Slots below their threshold; the largest weight never is."""
        weights = weights.to(torch.float32)
        if min(self.levels) == max(self.levels):  # of any order: no sorting
            return weights < self.levels[0] * weights.amax(-1, keepdim=True)
        _, _, ratios, order = sort_slots(index, weights)
        levels = self._thresholds.to(weights.device)
        return torch.zeros_like(index, dtype=torch.bool).scatter(-1, order, ratios < levels)

    def _compared(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Slots that a comparator skips: all but the largest weight may be."""
        first = weights.argmax(-1, keepdim=True) == torch.arange(index.shape[1], device=index.device)
        share = self.levels[0]
        if self.odp.method == "random":
            return (torch.rand(index.shape, generator=self._random).to(x.device) < share) & ~first
        if not share:
            return torch.zeros_like(first)
        shape = self._call.shape if self._call.shape is not None else (1, x.shape[0])
        self._check(shape, index)
        statistic = -token_statistic(self.odp.method, x).view(shape)
        reduced = self._call.select(self.name, statistic, statistic, share, self.odp.causal, keep=False)
        return reduced[:, None] & ~first

    def _protected(self, index: Tensor) -> Tensor | None:
        """[T] bool, tokens that keep all their experts; None for none."""
        images = self.odp.protect_images
        if images is None:
            return self._tokens(self.odp.protect, index) if self.odp.protect else None
        shares = ((False, self.odp.protect), (True, images))
        chosen = [self._tokens(share, index, images=kind) for kind, share in shares if share]
        return torch.stack(chosen).any(0) if chosen else None

    @torch.no_grad()
    def _tokens(self, share: float | None, index: Tensor, least: bool = False, images: bool | None = None) -> Tensor:
        assert self._importance is not None
        assert share is not None
        own = self._own(index)
        if own is None:
            self._check(self._call.shape, index)
        chosen = self._importance.select(share, least, images)
        return chosen if own is None else chosen[own.to(chosen.device)]

    def _own(self, index: Tensor) -> Tensor | None:
        """[B * T] bool, the tokens of the call that these experts were given, where they get those of images or of text alone."""
        shape, seen = self._call.shape, self._call.images
        if shape is None or seen is None or seen.shape != shape or len(index) == seen.numel():
            return None
        fits = [kind for kind in (True, False) if int((seen == kind).sum()) == len(index)]
        if len(fits) == 1:
            self._kind = fits[0]
        elif fits and self._kind is None:  # as many of either: modules for images are named so
            return (seen == ("vision" in self.name)).flatten()
        return (seen == self._kind).flatten() if self._kind in fits else None

    def _check(self, shape: tuple[int, int] | None, index: Tensor) -> None:
        if shape is None or shape[0] * shape[1] != len(index):
            raise ValueError(
                f"The experts of '{self.name}' were called with {len(index)} tokens, the model with {shape}; tokens cannot "
                "be ranked in this model, set protect=0 and drop_all=0."
            )


def token_statistic(method: str, x: Tensor) -> Tensor:
    """Mean, variance or kurtosis [T] of hidden vectors [T, H] (the comparators of arXiv 2410.06270, appendix A.7)."""
    x = x.to(torch.float32)
    mean = x.mean(-1)
    if method == "mean":
        return mean
    squared = (x - mean[:, None]).square()
    variance = squared.mean(-1)
    return variance if method == "variance" else squared.square().mean(-1) / variance.square().clamp(min=1e-30)
