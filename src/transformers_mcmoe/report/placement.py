# SPDX-License-Identifier: Apache-2.0
"""What every rank of expert parallelism holds and is sent: experts in blocks of equal size, as engines place them.

Knows bytes of experts and routing; it does not place anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers_mcmoe.config import ODPConfig
from transformers_mcmoe.pipeline.allocating import LayerResult
from transformers_mcmoe.routing import chosen_layers


def placement(
    ranks: int,
    expert_bytes: Mapping[str, Sequence[float]],
    layers: Mapping[str, LayerResult],
    odp: ODPConfig | None = None,
    images: float = 0.0,
) -> dict[str, Any]:
    """Bytes and routed tokens per rank, and how uneven they are.

    Every expert-parallel step waits for the fullest rank of its layer: `..._max_over_mean` is the mean over layers of the fullest rank's
    share over an even one.

    Args:
        ranks: how many there are.
        expert_bytes: by experts path, packed bytes of each expert.
        layers: measurements by experts path.
        odp: pruning with its thresholds, to say what it leaves, or None.
        images: share of image tokens in the calibration.
    """
    found: dict[str, Any] = {"ranks": ranks} | _spread("bytes", ranks, expert_bytes)
    known = {path: layer for path, layer in layers.items() if layer.routing is not None and path in expert_bytes}
    tokens = {path: layer.routing.tokens.tolist() for path, layer in known.items() if layer.routing is not None}
    if tokens:
        found |= _spread("tokens", ranks, tokens)
    if tokens and odp is not None and odp.method == "odp" and odp.thresholds:
        left = dict(tokens)
        for path in chosen_layers(odp.thresholds, odp):
            ratios = known[path].ratios if path in known else None
            if ratios is not None:
                left[path] = ratios.kept(odp.thresholds[path], odp.protected(images), odp.drop_all)
        found |= _spread("tokens_after_odp", ranks, left)
    return found


def _spread(name: str, ranks: int, by_path: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Sums per rank over all layers, and the mean over layers of the fullest rank's share over an even one."""
    totals, worst = [0.0] * ranks, []
    for values in by_path.values():
        size = len(values) // ranks
        own = [float(sum(values[rank * size : (rank + 1) * size])) for rank in range(ranks)]
        totals = [a + b for a, b in zip(totals, own, strict=True)]
        if sum(own):
            worst.append(max(own) * ranks / sum(own))
    return {
        name: [round(total) for total in totals],
        f"{name}_max_over_mean": round(sum(worst) / max(1, len(worst)), 4),
    }
