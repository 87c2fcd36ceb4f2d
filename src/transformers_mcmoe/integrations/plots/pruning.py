# SPDX-License-Identifier: Apache-2.0
"""Figures of expert pruning (extra `plots`): what each layer skips, and what skipping costs.

Knows figures; what they show is measured elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers_mcmoe.config import ODPConfig
from transformers_mcmoe.integrations.plots.drawing import figure_of, save
from transformers_mcmoe.pruning import expert_pruning_stats
from transformers_mcmoe.routing import ThresholdPruning, attached


def plot_expert_pruning(model: Any, path: str | Path) -> None:
    """Draw thresholds and shares of skipped expert bytes per layer into a file.

    Args:
        model: a model with expert pruning that has run; the shares are those since it was switched on.
        path: the file, its suffix says which format.

    Raises:
        ValueError: the model has no expert pruning, or has not run.
        ImportError: matplotlib is not installed.
    """
    stats, pruning = expert_pruning_stats(model), attached(model)
    assert pruning is not None  # there are statistics
    shares = {
        phase: [layer["bytes_skipped"] for layer in stats[phase]["layers"].values()]
        for phase in ("prefill", "decode")
        if stats[phase]["tokens"]
    }
    if not shares:
        raise ValueError("Nothing has been pruned yet; run the model, then draw.")
    levels = [layer.levels for layer in pruning.layers.values() if isinstance(layer, ThresholdPruning)]
    method = pruning.options.method if isinstance(pruning.options, ODPConfig) else "otp"
    if levels and method != "otp":
        figure, (above, below) = figure_of(2, 1, (8, 6))
        for rank in range(max(map(len, levels))):
            above.plot([own[rank] for own in levels], marker=".", label=f"slot {rank + 2}")
        above.set(ylabel="threshold")
        above.legend(fontsize="small")
    else:
        figure, below = figure_of(1, 1, (8, 3))
    figure.suptitle(f"Expert pruning, {method}")
    for phase, share in shares.items():
        below.plot([100 * value for value in share], marker=".", label=phase)
    below.set(xlabel="MoE layer", ylabel="expert bytes skipped, %")
    below.legend(fontsize="small")
    save(figure, path)


def plot_quality_against_rate(rows: Iterable[Mapping[str, Any]], path: str | Path, metric: str = "kl") -> None:
    """Draw a metric against the share of skipped expert bytes into a file, one line per method.

    Args:
        rows: each with `row` (the method), `skipped_share` in [0, 1] and the metric.
        path: the file, its suffix says which format.
        metric: "kl" or "perplexity".

    Raises:
        ImportError: matplotlib is not installed.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row["row"], []).append((100 * row["skipped_share"], row[metric]))
    figure, axes = figure_of(1, 1, (8, 5))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(
        xlabel="expert bytes skipped, %", ylabel={"kl": "KL to the dense model, nats per token"}.get(metric, metric)
    )
    axes.legend(fontsize="small")
    save(figure, path)
