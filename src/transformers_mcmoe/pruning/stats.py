# SPDX-License-Identifier: Apache-2.0
"""What expert pruning has skipped, as users read it.

Knows counts; how slots are chosen is elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers_mcmoe.routing import attached


def expert_pruning_stats(model: Any, reset: bool = False) -> dict[str, Any]:
    """What expert pruning skipped since it was switched on, or since the last reset.

    Args:
        model: a model with expert pruning.
        reset: start counting again afterwards.

    Returns:
        "prefill" (calls with several tokens a sequence) and "decode" (with one), each with `tokens`; `slots` and `bytes`, the
        routed (token, expert) pairs and the bytes of their experts; `slots_skipped` and `bytes_skipped`, shares of
        these; `bytes_per_token`, the bytes of experts that a token ran, over all layers; and `layers`, the same per
        experts module. Shares are None where nothing was routed. Padding is not counted.

    Raises:
        ValueError: the model has no expert pruning.
    """
    pruning = attached(model)
    if pruning is None:
        raise ValueError("This model has no expert pruning; switch it on with set_expert_pruning(model).")
    report: dict[str, Any] = {}
    for phase, name in enumerate(("prefill", "decode")):
        layers = {path: layer.counts.read(phase) for path, layer in pruning.layers.items()}
        total = {key: sum(layer[key] for layer in layers.values()) for key in next(iter(layers.values()))}
        total["tokens"] = max(layer["tokens"] for layer in layers.values())
        report[name] = _shares(total) | {"layers": {path: _shares(layer) for path, layer in layers.items()}}
    if reset:
        for layer in pruning.layers.values():
            layer.counts.reset()
    return report


def _shares(sums: Mapping[str, float]) -> dict[str, Any]:
    return {
        "tokens": int(sums["tokens"]),
        "slots": int(sums["slots"]),
        "bytes": int(sums["bytes"]),
        "slots_skipped": sums["slots_skipped"] / sums["slots"] if sums["slots"] else None,
        "bytes_skipped": sums["bytes_skipped"] / sums["bytes"] if sums["bytes"] else None,
        "bytes_per_token": (sums["bytes"] - sums["bytes_skipped"]) / sums["tokens"] if sums["tokens"] else None,
    }
