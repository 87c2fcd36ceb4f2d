# SPDX-License-Identifier: Apache-2.0
"""docs/quality.md and its figures, from the rows that `quality` measured.

A dense model is known by its name and its perplexity on a text, as what a builder gives depends on the machine's arithmetic.
Each has, text by text, a table and a figure of all tools by true bits per weight, and a table of our rows per budget.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pages import replace_part

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
PAGE = Path(__file__).parent.parent / "docs" / "quality.md"
HEAD = Path(__file__).parent / "quality_head.md"

# rows that stand for a way to use this library; they are compared with other tools
OURS = ("default", "preset best", "preset fast", "preset paper", "uniform")
# average bits of the presets' table
PRESETS_AT = 2.54
# what rows were called before
RENAMED = {"paper preset": "preset paper"}
# rows of a series share a line in the figure
SERIES = {"K-quants": "llama.cpp Q", "I-quants": "llama.cpp IQ", "AutoRound": "AutoRound", "GPTQModel": "GPTQModel", "HQQ": "HQQ"}  # fmt: skip

# a model above these is lost; the figure leaves it out
LOST = {"perplexity": 250.0, "kl": 2.0}

Row = dict[str, Any]
# of a dense model on a text: name, its perplexity there, text, number of layers that are quantized (0: all)
Setting = tuple[str, float, str, int]


def write_page() -> None:
    """Write the page and its figures; of rows of one name the newest counts."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["row"] = RENAMED.get(row["row"], row["row"])
    newest = {(setting(row), *_told_apart(row)): row for row in rows}
    latest = list(dict.fromkeys(setting(row) for row in reversed(rows)))
    parts = [HEAD.read_text(encoding="utf-8")]
    for own in latest:
        here = [row for key, row in newest.items() if key[0] == own]
        compared = [row for row in here if "bits_per_weight" in row and series_of(row)]
        if {"peer" in row for row in compared} == {True, False}:
            parts += _against_others(own, compared)
        budgets: dict[float, list[Row]] = {}
        for row in here:
            if row["bits"] is not None:
                budgets.setdefault(row["bits"], []).append(row)
        for bits in sorted(budgets, reverse=True):
            parts += _budget(own, bits, budgets[bits])
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    replace_part("settings.md", "presets", _presets(list(newest.values())))


def _presets(rows: list[Row]) -> list[str]:
    """What presets take and give at one budget, on the newest build of each model."""
    lines = [
        f"At {PRESETS_AT} bits (protocols: [quality.md](quality.md)):\n",
        "| model | preset | calibration tokens | perplexity (dense) | KL | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for model, test in dict.fromkeys((row["model"], row["test"]) for row in rows):
        own = [r for r in rows if (r["model"], r["test"], r["bits"], r["layers"]) == (model, test, PRESETS_AT, 0)]
        own = [row for row in own if row["row"] in OURS and row["group_size"] == 128 and "seconds" in row]
        build = own and setting(own[-1])
        lines += [
            f"| {model}, {test} | {row['row'].removeprefix('preset ')} | {_tokens(row)} | {row['perplexity']:.2f} "
            f"({row['reference_perplexity']:.2f}) | {row['kl']:.4f} ± {row['kl_se']:.4f} | {_seconds(row)} |"
            for row in sorted(own, key=lambda row: row["kl"])
            if setting(row) == build
        ]
    return lines


def _told_apart(row: Row) -> tuple[Any, ...]:
    """What rows of one setting differ by."""
    return row["bits"] or row["bits_per_weight"], row["row"], row["group_size"], row.get("calibration_tokens")


def setting(row: Row) -> Setting:
    """Which dense model and text a row belongs to."""
    return row["model"], round(row["reference_perplexity"], 2), row["test"], row["layers"]


def series_of(row: Row) -> str | None:
    """The line of the figure that a row belongs to, None if to none."""
    name = row["row"]
    if "peer" in row or name.startswith(tuple(SERIES.values())):
        return next((label for label, start in SERIES.items() if name.startswith(start)), name)
    if name in OURS:
        return f"ours, {name}"
    return "ours, default with tuning" if name.startswith("default, ") and "tuning steps" in name else None


def _title(own: Setting) -> str:
    name, perplexity, test, layers = own
    cut = f", only layers 0-{layers - 1} quantized" if layers else ""
    return f"{name} (dense perplexity {perplexity:.2f} on {test}){cut}"


def _protocol(first: Row) -> str:
    protocol = first["protocol"]
    text = f"Calibration text: {first['calibration']}. " if "calibration_tokens" in first else ""
    return text + (
        f"Measured: {protocol['windows']} windows of {protocol['context']} tokens spread over the text, {first['tokens']:,} predictions, fp32, "
        f"on {first['cpus']} CPU cores. ± is a standard error over windows.\n"
    )


def _against_others(own: Setting, rows: list[Row]) -> list[str]:
    """All tools by true bits per weight, codes, scales and zeros counted, and the figure."""
    rows = sorted(rows, key=lambda row: row["bits_per_weight"])
    figure = f"quality_{own[0]}_{own[2].removesuffix('.txt')}{f'_{own[3]}_layers' if own[3] else ''}.svg"
    draw(rows, PAGE.parent / figure)
    return [
        f"## {_title(own)}: by true bits per weight\n",
        _protocol(next((row for row in rows if "calibration_tokens" in row), rows[0])),
        f"![Perplexity and KL divergence against bits per weight]({figure})\n",
        "| bits per weight | row | calibration tokens | perplexity | KL | top-1 | seconds | memory |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {row['bits_per_weight']:.3f} | {_named(row)} | {_tokens(row)} | {row['perplexity']:.2f} | {row['kl']:.4f} ± {row['kl_se']:.4f} | "
            f"{100 * row['top1']:.1f} % | {_seconds(row)} | {_memory(row)} |"
            for row in rows
        ),
        "",
    ]


def _named(row: Row) -> str:
    return str(row["row"]) if "peer" in row else f"**{row['row']}** at {row['bits']:.4g} bits{_groups(row)}"


def _groups(row: Row) -> str:
    return f", groups of {row['group_size']}" if row["group_size"] != 128 else ""


def _number(row: Row, name: str) -> str:
    return f"{row[name]:.3f}" if name in row else ""


def _tokens(row: Row) -> str:
    return f"{row['calibration_tokens']:,}" if "calibration_tokens" in row else ""


def _seconds(row: Row) -> str:
    return f"{row['seconds']:.0f}" if "seconds" in row else ""


def _memory(row: Row) -> str:
    return f"{row['memory'] / 1e9:.2f} GB" if "memory" in row else ""


def _budget(own: Setting, bits: float, rows: list[Row]) -> list[str]:
    """Every row at one average, the best first."""
    rows = sorted(rows, key=lambda row: row["kl"])
    return [
        f"## {_title(own)}: {bits:.4g} average bits\n",
        _protocol(rows[0]),
        "| row | average bits | bits per weight | calibration tokens | perplexity | dNLL | KL | top-1 | seconds | memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {row['row']}{_groups(row)} | {_number(row, 'average_bits')} | {_number(row, 'bits_per_weight')} | {_tokens(row)} | "
            f"{row['perplexity']:.2f} | {row['dnll']:.3f} ± {row['dnll_se']:.3f} | "
            f"{row['kl']:.4f} ± {row['kl_se']:.4f} | {100 * row['top1']:.1f} % | {_seconds(row)} | {_memory(row)} |"
            for row in rows
        ),
        "",
    ]


def draw(rows: list[Row], path: Path) -> None:
    """Perplexity and KL divergence against bits per weight, a line per series."""
    import matplotlib

    matplotlib.use("svg")
    # the same rows give the same file
    matplotlib.rcParams["svg.hashsalt"] = "quality"
    import matplotlib.pyplot as plt

    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(series_of(row) or row["row"], []).append(row)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axis, key, label in zip(
        axes, ("perplexity", "kl"), ("perplexity", "KL divergence, nats per token"), strict=True
    ):
        for name, own in sorted(lines.items()):
            thick = name.startswith("ours")
            axis.plot(
                [row["bits_per_weight"] for row in own],
                [row[key] for row in own],
                marker="o" if thick else "x",
                linewidth=2.0 if name == "ours, default" else 1.0,
                linestyle="-" if thick else "--",
                label=name,
            )
        axis.set_xlabel("bits per quantized weight, scales and zeros included")
        axis.set_ylabel(label)
        axis.set_yscale("log")
        axis.set_ylim(top=LOST[key])
        axis.grid(alpha=0.3, which="both")
    axes[0].axhline(rows[0]["reference_perplexity"], color="black", linewidth=0.8, linestyle=":", label="dense")
    axes[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
