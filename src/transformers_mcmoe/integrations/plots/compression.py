# SPDX-License-Identifier: Apache-2.0
"""Figures of a compression: what `mcmoe_report.json` and `mcmoe_evaluation.json` hold.

A figure whose data was not measured is left out. Knows those files' fields; it draws with `drawing`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from transformers_mcmoe.integrations.plots.drawing import INK, LINE, QUIET, SEQUENTIAL, SERIES, Figure

Report = Mapping[str, Any]
Table = list[list[float]]  # [layers][experts]; nan where there is nothing
NAN = float("nan")


def report_figures(report: Report, record: Report) -> list[Figure]:
    """All figures of one compression.

    Args:
        report: of the compression, see `build_report`.
        record: what was evaluated of it, or {}.
    """
    figures = [*_heat_maps(report), *_coverage(report), *_buildup(record), *_sizes(report)]
    return [*figures, *_pruning(report, record), *_classes(record), *_needles(record)]


def frequencies(report: Report) -> Table:
    """Share of its layer's routed tokens that every expert got."""
    return [[count / max(1, sum(row["tokens"])) for count in row["tokens"]] for row in report["coverage"].values()]


def routing_weights(report: Report) -> Table:
    """Mean routing weight of every expert over the tokens routed to it."""
    return [
        [weight / count if count else NAN for weight, count in zip(row["routing_weight"], row["tokens"], strict=True)]
        for row in report["coverage"].values()
    ]


def image_shares(report: Report) -> Table:
    """Share of every expert's tokens that stand for parts of images; empty where calibration had none."""
    return [
        [seen / count if count else NAN for seen, count in zip(row["image_tokens"], row["tokens"], strict=True)]
        for row in report["coverage"].values()
        if "image_tokens" in row
    ]


def chosen_bits(report: Report) -> Table:
    """Width of every expert, of its gate and up projections where that of down is another."""
    return [[float(digit) for digit in digits] for digits in report["expert_bits"].values()]


def down_bits(report: Report) -> Table:
    """Width of every expert's down projection, empty where all matrices of an expert have one width."""
    widths = report.get("down_bits", report["expert_bits"])
    return [] if widths == report["expert_bits"] else [[float(digit) for digit in own] for own in widths.values()]


def chosen_errors(report: Report) -> Table:
    """Error of every expert at the width it has, or at the two that it has."""
    table = []
    roles = {"gate_up": report["expert_bits"], "down": report.get("down_bits", report["expert_bits"])}
    for path, digits in report["expert_bits"].items():
        apart = report.get("role_errors", {}).get(path)
        if apart:
            nothing = [NAN] * len(digits)
            pairs = [[apart[role].get(d, nothing) for d in widths[path]] for role, widths in roles.items()]
            table.append([math.hypot(*(own[e][e] for own in pairs)) for e in range(len(digits))])
            continue
        errors = report["errors"].get(path, {})
        table.append([errors[d][e] if d in errors and e < len(errors[d]) else NAN for e, d in enumerate(digits)])
    return table if any(not math.isnan(value) for row in table for value in row) else []


def _heat_maps(report: Report) -> list[Figure]:
    found = []
    widths = f"Code width of {'gate and up' if down_bits(report) else 'the matrices of the expert'}."
    maps = (
        (
            "frequency",
            "How often each expert is used",
            frequencies(report),
            "Share of the layer's routed tokens.",
            "percent",
        ),
        (
            "weight",
            "With what weight",
            routing_weights(report),
            "Mean routing weight over the expert's tokens.",
            "number",
        ),
        (
            "images",
            "Who sees images",
            image_shares(report),
            "Share of the expert's tokens that are of images.",
            "percent",
        ),
        (
            "error",
            "What its width does to the layer's output",
            chosen_errors(report),
            "Error of the MoE block's output through this expert at the width it has, over the tokens routed to it"
            + (
                "; relative to the hidden states, so that layers compare."
                if report["config"].get("eps") == "final"
                else "."
            ),
            "log",
        ),
        ("bits", "The bits each expert got", chosen_bits(report), widths, "bits"),
        ("down-bits", "The bits its down projection got", down_bits(report), "Code width of down alone.", "bits"),
    )
    for name, title, table, caption, kind in maps:
        if table:
            draw = functools.partial(heat_map, [table], [""], kind)
            found.append(Figure(name, title, caption, draw, *heights(table)))
    return found


def heights(table: Table) -> tuple[float, float]:
    """Inches of a heat map, wide and narrow."""
    experts = max(map(len, table))
    return min(7.0, 1.6 + 0.16 * experts), min(6.0, 1.8 + 0.14 * experts)


def heat_map(tables: Sequence[Table], titles: Sequence[str], kind: str, figure: Any, narrow: bool) -> None:
    """Draw tables beside each other, or below each other where it is narrow, with one scale; `kind` says how that is read."""
    from matplotlib.colors import BoundaryNorm, LogNorm, Normalize

    stacked = narrow and len(tables) > 1
    grid = figure.subplots(len(tables), 1) if stacked else figure.subplots(1, len(tables), squeeze=False)[0]
    every = np.asarray([value for table in tables for row in table for value in row])
    known = every[~np.isnan(every)]
    ticks: list[float] | None = None
    colours = SEQUENTIAL
    norm: Any = Normalize(known.min(), known.max() if known.max() > known.min() else known.min() + 1e-9)
    if kind == "log" and (known > 0).any():
        low = known[known > 0].min()
        norm = LogNorm(low, max(known.max(), low * 1.01))
        ticks = np.geomspace(norm.vmin, norm.vmax, 5).tolist()
    elif kind == "bits":
        ticks = sorted(set(known.tolist()))
        edges = [ticks[0] - 0.5, *[(a + b) / 2 for a, b in itertools.pairwise(ticks)], ticks[-1] + 0.5]
        norm = BoundaryNorm(edges, 256)
    for axes, table, title in zip(grid, tables, titles, strict=True):
        experts = max(map(len, table))
        shown = np.full((experts, len(table)), NAN)
        for layer, row in enumerate(table):
            shown[: len(row), layer] = row
        axes.set_facecolor(LINE)
        image = axes.imshow(shown, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
        axes.set(xlabel="MoE layer", title=title)
        if axes is grid[0] or stacked:
            axes.set_ylabel("expert")
        whole_numbers(axes, both=True)
    options: dict[str, Any] = {"pad": 0.02, "fraction": 0.06, "aspect": 25}
    if ticks is not None:
        options["ticks"] = ticks
    bar = figure.colorbar(image, ax=list(grid), **options)
    bar.outline.set_visible(False)
    if kind == "percent":
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    elif ticks is not None:
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
        bar.ax.minorticks_off()


def whole_numbers(axes: Any, both: bool = False) -> None:
    """Label layers, and with `both` experts, by whole numbers."""
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis) if both else (axes.xaxis,):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def _coverage(report: Report) -> list[Figure]:
    if not report["coverage"]:
        return []
    caption = (
        "Calibration tokens per expert: the least, the median and the most used of each layer. Experts below the grey line are "
        "measured on tokens of the whole layer."
    )
    return [Figure("coverage", "Calibration coverage", caption, functools.partial(_draw_coverage, report), 2.8)]


def _draw_coverage(report: Report, figure: Any, narrow: bool) -> None:
    axes = figure.subplots()
    rows = [np.asarray(row["tokens"]) for row in report["coverage"].values()]
    for pick, label, colour in ((np.max, "most", 1), (np.median, "median", 0), (np.min, "least", 4)):
        axes.plot([float(pick(row)) for row in rows], marker=".", label=label, color=SERIES[colour])
    axes.axhline(32, color=QUIET, linewidth=0.8, linestyle="--")
    axes.set_yscale("symlog", linthresh=10)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(xlabel="MoE layer", ylabel="tokens of an expert", ylim=(0, None))
    whole_numbers(axes)
    _legend(figure, axes)


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)


def _buildup(record: Report) -> list[Figure]:
    if "layers" not in record:
        return []
    protocol = record["layers"]["protocol"]
    caption = (
        f"Relative error of the hidden states against the dense model on {protocol['tokens']:,} tokens: what enters each layer "
        "after all compressed layers before it, and what each layer adds by itself on dense inputs."
    )
    draw = functools.partial(_draw_buildup, record["layers"])
    return [Figure("buildup", "How the error builds up", caption, draw, 2.8)]


def _draw_buildup(found: Mapping[str, Any], figure: Any, narrow: bool) -> None:
    axes = figure.subplots()
    layers = found["layers"]
    entering = [layer["entering"]["relative_error"] for layer in layers] + [found["leaving"]["relative_error"]]
    axes.plot(range(len(entering)), entering, marker=".", label="whole prefix", color=SERIES[0])
    alone = [layer["alone"]["relative_error"] for layer in layers]
    axes.plot(range(1, len(alone) + 1), alone, marker=".", label="layer alone", color=SERIES[1])
    axes.set(xlabel="decoder layers passed", ylabel="relative error", ylim=(0, None))
    whole_numbers(axes)
    _legend(figure, axes)


def _sizes(report: Report) -> list[Figure]:
    parts = report["sizes"].get("parts")
    if not parts:
        return []
    parts = {name: count for name, count in parts.items() if count}
    dense = report["sizes"]["dense_bytes"]
    told = f"{dense / 1e9:,.1f} GB" if dense > 1e9 else f"{dense / 1e6:,.1f} MB"
    caption = f"Bytes on disk by what they are for; the dense model takes {told}."
    draw = functools.partial(_draw_sizes, parts)
    return [Figure("size", "Where the bytes are", caption, draw, 0.9 + 0.32 * len(parts))]


def _draw_sizes(parts: Mapping[str, int], figure: Any, narrow: bool) -> None:
    axes = figure.subplots()
    unit, factor = ("GB", 1e9) if sum(parts.values()) > 1e9 else ("MB", 1e6)
    total = sum(parts.values())
    values = [count / factor for count in parts.values()]
    bars = axes.barh(list(parts), values, color=SERIES[0], height=0.7)
    axes.bar_label(
        bars, [f"{v:.3g} ({100 * v * factor / total:.0f}%)" for v in values], padding=3, color=INK, fontsize=8
    )
    axes.invert_yaxis()
    axes.set(xlabel=unit, xlim=(0, max(values) * (1.5 if narrow else 1.2)))


def _pruning(report: Report, record: Report) -> list[Figure]:
    phases = {
        name: [layer["bytes_skipped"] for layer in phase["layers"].values()]
        for name, phase in record.get("pruning", {}).get("phases", {}).items()
        if phase["tokens"]
    }
    if not phases:
        return []
    caption = f"Share of the routed expert bytes that each layer skips, measured on {record['pruning']['text']}."
    draw = functools.partial(_draw_pruning, phases)
    return [Figure("pruning", "What expert pruning skips", caption, draw, 2.6)]


def _draw_pruning(phases: Mapping[str, Sequence[float]], figure: Any, narrow: bool) -> None:
    axes = figure.subplots()
    names = {"prefill": "prompts", "decode": "generation"}
    for index, (name, shares) in enumerate(phases.items()):
        percents = [100 * (share or 0) for share in shares]
        axes.plot(percents, marker=".", label=names.get(name, name), color=SERIES[index])
    axes.set(xlabel="MoE layer", ylabel="skipped, %", ylim=(0, None))
    whole_numbers(axes)
    _legend(figure, axes)


def _classes(record: Report) -> list[Figure]:
    if "classes" not in record:
        return []
    caption = "Mean KL divergence from the dense model by what the token is, how rare it is, and where it stands in its window."
    classes = record["classes"]["classes"]
    draw = functools.partial(_draw_classes, classes)
    count = sum(map(len, classes.values()))
    return [Figure("classes", "Which tokens compression costs most", caption, draw, 0.9 + 0.26 * count)]


def _draw_classes(classes: Mapping[str, Mapping[str, Any]], figure: Any, narrow: bool) -> None:
    axes = figure.subplots()
    names = {"type": "", "frequency": "rank ", "position": "position "}
    rows = [
        (names.get(partition, "") + name, values["kl"], SERIES[index])
        for index, (partition, inside) in enumerate(classes.items())
        for name, values in inside.items()
    ]
    values = [kl for _, kl, _ in rows]
    bars = axes.barh([name for name, _, _ in rows], values, color=[colour for _, _, colour in rows], height=0.7)
    axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, color=INK, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="KL, nats per token", xlim=(0, max(values) * (1.25 if narrow else 1.12) or 1))


def _needles(record: Report) -> list[Figure]:
    if "needle" not in record:
        return []
    found = record["needle"]
    prompts = len(found["lengths"]) * len(found["depths"]) * found["repeats"]
    caption = (
        f"Share of {prompts} needles (a number of {found['protocol']['digits']} digits) that the model found, by length of the "
        "text and depth of the needle, with the negative log-likelihood of the number in nats per token."
    )
    return [needle_figure(found, caption)]


def needle_figure(found: Mapping[str, Any], caption: str = "") -> Figure:
    """Recall of needles over length and depth, see `find_needles`."""
    height = 1.4 + 0.42 * len(found["depths"])
    return Figure("needle", "Needle in a haystack", caption, functools.partial(_draw_needles, found), height)


def _draw_needles(found: Mapping[str, Any], figure: Any, narrow: bool) -> None:
    axes = figure.subplots()
    recall, nll = np.asarray(found["found"]).T, np.asarray(found["nll"]).T
    image = axes.imshow(recall, aspect="auto", cmap=SEQUENTIAL, vmin=0, vmax=1)
    for (depth, length), share in np.ndenumerate(recall):
        dark = share < 0.6
        text = (
            f"{share:.0%}\n{nll[depth, length]:.1f}"
            if len(found["lengths"]) <= (5 if narrow else 10)
            else f"{share:.0%}"
        )
        axes.text(length, depth, text, ha="center", va="center", fontsize=7, color="#ffffff" if dark else "#101010")
    axes.set_xticks(range(len(found["lengths"])), [f"{length:,}" for length in found["lengths"]])
    axes.set_yticks(range(len(found["depths"])), [f"{depth:.0%}" for depth in found["depths"]])
    axes.set(xlabel="tokens of the text", ylabel="depth")
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.06)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    bar.outline.set_visible(False)


def runs_figure(runs: Sequence[tuple[str, Report, Report]]) -> Figure | None:
    """Perplexity against bits per weight of several compressions, on texts that all of them were measured on.

    Args:
        runs: name, report and record of each.
    """
    shared = set.intersection(*(set(record.get("text", {})) for _, _, record in runs)) if runs else set()
    texts = [name for name in sorted(shared) if len({_mark(record["text"][name]) for _, _, record in runs}) == 1]
    if len(runs) < 2 or not texts:
        return None
    rows = sorted((report["bits_per_weight"], name, record["text"]) for name, report, record in runs)
    caption = "Perplexity on each text that all runs were measured on, with one protocol, against bits per weight (scales and zeros included)."
    return Figure("runs", "Perplexity against size", caption, functools.partial(_draw_runs, rows, texts), 3.2)


def _mark(row: Mapping[str, Any]) -> tuple[Any, ...]:
    protocol = row["protocol"]
    return row.get("sha256"), protocol["context"], protocol["stride"], protocol["windows"]


def _draw_runs(rows: Sequence[tuple[float, str, Any]], texts: Sequence[str], figure: Any, narrow: bool) -> None:
    axes = figure.subplots()
    for index, text in enumerate(texts):
        points = [(bits, found[text]["perplexity"]) for bits, _, found in rows]
        axes.plot(*zip(*points, strict=True), marker="o", label=text, color=SERIES[index % len(SERIES)])
        dense = rows[0][2][text].get("reference_perplexity")
        if dense is not None:
            axes.axhline(
                dense, color=SERIES[index % len(SERIES)], linewidth=0.8, linestyle="--", label=f"{text}, dense"
            )
    axes.set(xlabel="bits per weight", ylabel="perplexity")
    _legend(figure, axes)
