# SPDX-License-Identifier: Apache-2.0
"""Runs a model under routers that are being trained: sampled prefixes with gradients, hard ones, and the shift between them.

Knows models and routers' matrices, not costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from transformers_mcmoe.calibration.sequences import Batch
from transformers_mcmoe.models.experts import FusedExperts
from transformers_mcmoe.models.stream import model_inputs
from transformers_mcmoe.routing import dropping_points, prefix_scores, reroute, reweighted, sampled_mask, sort_slots
from transformers_mcmoe.routing.otp.fitting import Matrices

# shares of the droppable slots that the shift is recorded for
POINTS = 101


class Routed:
    """A model whose experts are handed what the routers keep.

    Args:
        model: the model, without pruning.
        found: adapters of its experts modules, by path.
        renormalize: by experts path.
    """

    def __init__(self, model: Any, found: Mapping[str, FusedExperts], renormalize: Mapping[str, bool]) -> None:
        self._model, self._found, self._renormalize = model, found, renormalize
        # of the last call, of the slots after the first that lead to an expert: where they are dropped, what is kept of them
        self.points: list[Tensor] = []
        self.kept: list[Tensor] = []

    def logits(
        self,
        batch: Batch,
        matrices: Mapping[str, Matrices],
        shift: float,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Logits [B, T, V] float32 of a batch; prefixes are sampled if a generator is given, else the likeliest."""
        self.points, self.kept = [], []
        with ExitStack() as stack:
            for path, experts in self._found.items():
                rule = self._rule(path, experts, matrices[path], shift, temperature, generator)
                stack.callback(reroute(self._model.get_submodule(path), experts, rule).remove)
            return self._model(**model_inputs(self._model, batch)).logits.to(torch.float32)

    def _rule(
        self,
        path: str,
        experts: FusedExperts,
        matrices: Matrices,
        shift: float,
        temperature: float,
        generator: torch.Generator | None,
    ) -> Any:
        def rule(x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            ordered, _, _, order = sort_slots(index, weights)
            routed = index.gather(-1, order)[:, 1:] < experts.num_experts
            scores = prefix_scores(x, ordered, *(m.to(x.device) for m in matrices))
            self.points.append(dropping_points(scores.detach())[routed].to("cpu"))
            mask = sampled_mask(scores - shift, temperature, generator)
            self.kept.append(mask[:, 1:][routed])
            places = order.argsort(-1)
            kept = weights * mask.gather(-1, places).to(weights.dtype)
            return index, reweighted(weights, kept) if self._renormalize[path] else kept

        return rule

    @property
    def skipped(self) -> float:
        """Share of the slots after the first that the last call skipped."""
        return 1 - float(torch.cat([kept.detach() for kept in self.kept]).mean())


def shift_curve(points: Sequence[Tensor]) -> list[float]:
    """Shifts by which the shares 0, 1/100, .., 1 of the slots after the first are skipped.

    Args:
        points: parts of `dropping_points` of all these slots, [n] each.
    """
    every = torch.cat(list(points)).sort().values
    places = torch.linspace(0, len(every) - 1, POINTS, dtype=torch.float64).round().to(torch.int64)
    shifts = [round(shift, 5) for shift in every[places].tolist()]  # as they are stored
    return [shifts[0] - 1.0, *shifts[1:]]  # at the first nothing is skipped


def shift_for(points: Sequence[Tensor], share: float) -> float:
    """The shift by which a share of the slots after the first is skipped; see `shift_curve`."""
    every = torch.cat(list(points)).sort().values
    count = round(share * len(every))
    return float(every[count - 1]) if count else float(every[0]) - 1
