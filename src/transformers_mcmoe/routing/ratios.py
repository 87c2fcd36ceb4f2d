# SPDX-License-Identifier: Apache-2.0
"""How much smaller than a token's largest routing weight its others are: counted in calibration, kept as quantiles.

Thresholds of expert pruning are read from these; a checkpoint keeps them, so that they can be read again with other
options. Knows routing tensors, not layers or modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformers_mcmoe.config import ODPConfig

# bins of w_j / w_1 over [0, 1]; fewer by expert, as there may be hundreds of them in each layer
BINS, EXPERT_BINS = 4096, 512
# quantiles that are kept, evenly spaced from 0 to 1
KEPT = 33
# sums of a token's routing weights that differ by less are the same: routers compute in bf16
SAME_SUM = 0.02


class RoutingRatios:
    """Counts of w_j / w_1 over tokens, with slots sorted by their weight. Additive.

    Args:
        num_experts: E; slots with other ids are not counted.

    Attributes:
        slots: K, 0 before the first token.
    """

    def __init__(self, num_experts: int) -> None:
        self.slots = 0
        self._ranks = torch.zeros(0, BINS, dtype=torch.int64)  # [K - 1, BINS]
        self._experts = torch.zeros(num_experts, EXPERT_BINS, dtype=torch.int32)  # slots 2..K, by expert
        self._first = torch.zeros(num_experts, dtype=torch.int64)  # slots 1, by expert
        self._least, self._most = float("inf"), 0.0  # sum of a token's weights

    def add(self, index: Tensor, weights: Tensor) -> None:
        """Count tokens, given their expert ids [T, K] and routing weights [T, K]."""
        if not len(weights):
            return
        num_experts = len(self._first)
        sums = weights.detach().to(torch.float32).sum(-1)
        self._least, self._most = min(self._least, float(sums.min())), max(self._most, float(sums.max()))
        _, index, ratios, _ = (t.cpu() for t in sort_slots(index, weights))
        self.slots = index.shape[1]
        if not len(self._ranks):
            self._ranks = torch.zeros(self.slots - 1, BINS, dtype=torch.int64)
        known = index < num_experts
        self._first += torch.bincount(index[:, 0][known[:, 0]], minlength=num_experts)
        bins = (ratios * BINS).long().clamp(0, BINS - 1)
        for rank in range(1, self.slots):
            self._ranks[rank - 1] += torch.bincount(bins[:, rank][known[:, rank]], minlength=BINS)
        others = known[:, 1:]
        flat = index[:, 1:][others] * EXPERT_BINS + bins[:, 1:][others] // (BINS // EXPERT_BINS)
        self._experts += torch.bincount(flat, minlength=self._experts.numel()).view_as(self._experts)

    def __add__(self, other: RoutingRatios) -> RoutingRatios:
        total = RoutingRatios(len(self._first))
        total.slots = max(self.slots, other.slots)
        parts = [part._ranks for part in (self, other) if len(part._ranks)]
        total._ranks = torch.stack(parts).sum(0) if parts else self._ranks
        total._experts, total._first = self._experts + other._experts, self._first + other._first
        total._least, total._most = min(self._least, other._least), max(self._most, other._most)
        return total

    def kept(self, levels: Sequence[float], protect: float = 0.0, drop_all: float = 0.0) -> list[float]:
        """(token, slot) pairs that each expert keeps, [E], if slots 2..K with ratios below these levels are skipped.

        With several levels, those of an expert are cut at the one ratio that skips as many slots as they do together.

        Args:
            levels: mu of slots 2..K.
            protect: share of the tokens that skip nothing.
            drop_all: share that skips all of its slots.
        """
        skipped = sum(
            float(counts[: round(level * BINS)].sum()) for counts, level in zip(self._ranks, levels, strict=True)
        )
        every = self._experts.sum(0, dtype=torch.float64).cumsum(0)
        cut = torch.searchsorted(every, torch.tensor(skipped, dtype=torch.float64), right=True)
        within = every[cut - 1] if cut else every.new_zeros(())
        part = (skipped - float(within)) / max(1.0, float(every[cut.clamp(max=len(every) - 1)] - within))
        gone = self._experts[:, :cut].sum(-1, dtype=torch.float64)
        if cut < len(every):
            gone += min(part, 1.0) * self._experts[:, cut]
        own = self._first + self._experts.sum(-1)
        kept = own - (1 - protect - drop_all) * gone - drop_all * own
        return kept.tolist()  # type: ignore[no-any-return]

    def to_record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON form, and tensors by name."""
        tensors = {"ranks": self._ranks, "experts": self._experts, "first": self._first}
        return {"slots": self.slots, "least": self._least, "most": self._most}, tensors

    @classmethod
    def from_record(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RoutingRatios:
        """Inverse of `to_record`."""
        known = cls(len(tensors["first"]))
        known.slots, known._least, known._most = data["slots"], data["least"], data["most"]
        known._ranks, known._experts, known._first = tensors["ranks"], tensors["experts"], tensors["first"]
        return known

    def table(self, expert_bytes: Sequence[float]) -> RatioTable:
        """Quantiles, with slots weighted by the bytes [E] of the expert they lead to where bytes are asked for."""
        sizes = torch.tensor(expert_bytes, dtype=torch.float64)
        others = (self._experts.to(torch.float64) * sizes[:, None]).sum(0)
        first, rest = float((self._first * sizes).sum()), float(others.sum())
        return RatioTable(
            ranks=tuple(_quantiles(counts.to(torch.float64)) for counts in self._ranks),
            by_bytes=_quantiles(others),
            droppable=rest / (first + rest) if rest else 0.0,
            normalized=self._most - self._least <= SAME_SUM * self._most,
        )


@dataclass(frozen=True)
class RatioTable:
    """What calibration knows of one layer's routing ratios.

    Attributes:
        ranks: per slot 2..K, the KEPT quantiles of w_j / w_1.
        by_bytes: KEPT quantiles over all these slots, weighted by the bytes of their experts.
        droppable: share of the routed expert bytes that lies in slots 2..K.
        normalized: whether the routing weights of every token had the same sum.
    """

    ranks: tuple[tuple[float, ...], ...]
    by_bytes: tuple[float, ...]
    droppable: float
    normalized: bool

    @property
    def slots(self) -> int:
        """K."""
        return len(self.ranks) + 1

    def levels(self, odp: ODPConfig, images: float = 0.0) -> list[float]:
        """What a layer's pruning goes by, see `ODPConfig.thresholds`; a share of the tokens is of images.

        Protected tokens skip nothing: the others skip more, so that the rate is met.

        Raises:
            ValueError: the rate is more than slots 2..K can give.
        """
        if odp.threshold is not None:
            return [float(odp.threshold)] * len(self.ranks)
        if odp.rate is None:
            return [_read(rank, 0.5 if odp.quantile is None else odp.quantile) for rank in self.ranks]
        # some tokens skip nothing and some everything; the others make up the rest of the rate
        protect = odp.protected(images)
        most = (1 - protect - odp.drop_all) * self.droppable
        if not odp.drop_all <= odp.rate <= most + odp.drop_all:
            raise ValueError(
                f"rate={odp.rate} cannot be met: with protect={protect:g} and drop_all={odp.drop_all} the share of the "
                f"routed expert bytes that is skipped lies in [{odp.drop_all:.3f}, {most + odp.drop_all:.3f}]; change it."
            )
        share = (odp.rate - odp.drop_all) / most if most else 0.0
        return [_read(self.by_bytes, share)] * len(self.ranks) if odp.method == "odp" else [share] * len(self.ranks)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "ratios": [[round(value, 5) for value in rank] for rank in self.ranks],
            "by_bytes": [round(value, 5) for value in self.by_bytes],
            "droppable": round(self.droppable, 5),
            "normalized": self.normalized,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RatioTable:
        """Inverse of `to_dict`."""
        ranks = tuple(tuple(rank) for rank in data["ratios"])
        return cls(ranks, tuple(data["by_bytes"]), data["droppable"], data["normalized"])


def sort_slots(index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Routing weights and expert ids [T, K] with the largest weight first, the weights over the largest, and their slots.

    Routers may return slots in any order. Weights and ratios are float32; equal weights keep their order.
    """
    weights, order = weights.detach().to(torch.float32).sort(dim=-1, descending=True, stable=True)
    return weights, index.gather(-1, order), weights / weights[:, :1].clamp(min=1e-30), order


def _quantiles(counts: Tensor) -> tuple[float, ...]:
    """KEPT quantiles of values in [0, 1], given how many lie in each of evenly spaced bins [..] float64."""
    bins = len(counts)
    total = float(counts.sum())
    if not total:
        return (0.0,) * KEPT
    below = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    wanted = torch.linspace(0, 1, KEPT, dtype=torch.float64) * total
    upper = torch.searchsorted(below, wanted).clamp(1, bins)
    lower = upper - 1
    inside = (wanted - below[lower]) / (below[upper] - below[lower]).clamp(min=1e-30)
    # the least value lies at the lower end of the first bin that holds any
    values = (lower + inside) / bins
    values[0] = float(counts.nonzero()[0]) / bins
    return tuple(values.tolist())


def _read(quantiles: Sequence[float], share: float) -> float:
    place = share * (len(quantiles) - 1)
    low = min(int(place), len(quantiles) - 2)
    return quantiles[low] + (place - low) * (quantiles[low + 1] - quantiles[low])
