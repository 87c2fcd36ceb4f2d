# SPDX-License-Identifier: Apache-2.0
"""Figures of two compressions beside each other, and how alike they rank experts.

Knows what `compression` reads from a report; it draws with its heat maps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from transformers_mcmoe.integrations.plots.compression import (
    NAN,
    Report,
    Table,
    chosen_bits,
    chosen_errors,
    frequencies,
    heat_map,
    heights,
    routing_weights,
    whole_numbers,
)
from transformers_mcmoe.integrations.plots.drawing import LINE, SERIES, Figure


def comparison_figures(a: Report, b: Report, names: tuple[str, str]) -> list[Figure]:
    """Two compressions of one model beside each other, such as with two calibration sets.

    Raises:
        ValueError: they are of models with other layers or experts.
    """
    if {p: len(d) for p, d in a["expert_bits"].items()} != {p: len(d) for p, d in b["expert_bits"].items()}:
        raise ValueError(
            f"'{names[0]}' and '{names[1]}' are of models with different experts; compare runs of one model."
        )
    found = []
    pairs = (
        ("frequency", "Use of experts", frequencies, "percent"),
        ("weight", "Routing weight", routing_weights, "number"),
        ("error", "Error at the chosen width", chosen_errors, "log"),
        ("bits", "Bits", chosen_bits, "bits"),
    )
    for name, title, read, kind in pairs:
        tables = [read(a), read(b)]
        if not all(tables):
            continue
        rank = rank_correlation(*tables)
        told = "undefined (one of them is constant)" if rank is None else f"{rank:.3f}"
        draw = functools.partial(heat_map, tables, list(names), kind)
        wide, narrow = heights(tables[0])
        caption = f"Spearman rank correlation over all experts: {told}."
        found.append(Figure(f"compare-{name}", title, caption, draw, wide, 2 * narrow))
    correlations = layer_correlations(a, b)
    if correlations:
        draw = functools.partial(_correlations, correlations)
        caption = "Spearman rank correlation of the experts' use between the two runs, layer by layer."
        found.append(Figure("compare-layers", "Do both runs rank experts alike?", caption, draw, 2.4))
    return found


def rank_correlation(a: Table, b: Table) -> float | None:
    """Spearman's rank correlation over the experts of all layers; None if a table is constant."""
    x, y = (np.asarray([value for row in table for value in row]) for table in (a, b))
    known = ~(np.isnan(x) | np.isnan(y))
    x, y = _ranks(x[known]), _ranks(y[known])
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, equal values share their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def layer_correlations(a: Report, b: Report) -> list[float]:
    """Rank correlation of use, per layer."""
    rows = zip(frequencies(a), frequencies(b), strict=True)
    found = [rank_correlation([x], [y]) for x, y in rows]
    return [NAN if value is None else value for value in found]


def _correlations(values: Sequence[float], figure: Any, narrow: bool) -> None:
    axes = figure.subplots()
    axes.bar(range(len(values)), values, color=SERIES[0])
    axes.axhline(0, color=LINE, linewidth=0.8)
    axes.set(xlabel="MoE layer", ylabel="rank correlation", ylim=(min(0, np.nanmin(values)) - 0.02, 1.02))
    whole_numbers(axes)
