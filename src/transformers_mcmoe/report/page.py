# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML page that needs no network, and its figures as PNG files.

Knows reports, records and how they are told; figures are drawn by `integrations.plots`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from transformers_mcmoe.evaluation.record import load_record
from transformers_mcmoe.integrations.card import command_line, model_name
from transformers_mcmoe.integrations.plots import Figure, comparison_figures, report_figures, runs_figure
from transformers_mcmoe.report.building import load_report
from transformers_mcmoe.workdir import write_whole

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Run:
    """One compression: its name, `mcmoe_report.json`, and `mcmoe_evaluation.json` ({} if nothing was measured)."""

    name: str
    report: Mapping[str, Any]
    record: Mapping[str, Any]

    @classmethod
    def load(cls, model: str) -> Run:
        """From a packed model's folder or Hub id.

        Raises:
            ValueError, OSError: see `load_report` and `load_record`.
        """
        name = Path(model).resolve().name if Path(model).is_dir() else model
        return cls(name, load_report(model), load_record(model))


def write_page(
    runs: Sequence[Run], path: str | Path, *, compare: tuple[Run, Run] | None = None, figures: str | Path | None = None
) -> list[Path]:
    """Write the page, and every figure as a PNG file if asked to.

    Args:
        runs: the first is told in full; with several, their perplexities are drawn against their sizes.
        path: the HTML file.
        compare: two runs to put side by side.
        figures: folder of the PNG files, made if need be.

    Returns:
        The files that were written.

    Raises:
        ValueError: the runs to compare are of different models.
        ImportError: matplotlib is not installed.
    """
    first = runs[0]
    drawn = report_figures(first.report, first.record)
    several = runs_figure([(run.name, run.report, run.record) for run in runs])
    side = [] if compare is None else comparison_figures(compare[0].report, compare[1].report, _two_names(compare))
    text = _render(runs, drawn, several, side, compare)
    path = Path(path)
    write_whole(path, text)
    written = [path]
    if figures is not None:
        Path(figures).mkdir(parents=True, exist_ok=True)
        for figure in [*drawn, *([several] if several else []), *side]:
            written.append(Path(figures) / f"{figure.name}.png")
            figure.png(written[-1])
    return written


def _two_names(compare: tuple[Run, Run]) -> tuple[str, str]:
    a, b = (run.name for run in compare)
    return (a, b) if a != b else (f"{a} (first)", f"{b} (second)")


def _render(
    runs: Sequence[Run],
    drawn: Sequence[Figure],
    several: Figure | None,
    side: Sequence[Figure],
    compare: tuple[Run, Run] | None,
) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    first = runs[0]
    sizes = first.report["sizes"]
    return environment.get_template(TEMPLATE).render(
        run=first,
        runs=runs,
        base=model_name(first.report),
        command=command_line(first.report, model_name(first.report), first.name),
        tiles=_tiles(first),
        share=sizes["total_bytes"] / sizes["dense_bytes"],
        figures={figure.name: figure for figure in drawn},
        heat_maps=[figure for figure in drawn if figure.name in ("frequency", "weight", "error", "bits")],
        several=several,
        side=side,
        names=None if compare is None else _two_names(compare),
    )


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """Figures at a glance: what, value, and what it is to be read with."""
    sizes = run.report["sizes"]
    factor, unit = (1e9, "GB") if sizes["dense_bytes"] > 1e9 else (1e6, "MB")
    total, dense = (sizes[name] / factor for name in ("total_bytes", "dense_bytes"))
    tiles = [
        ("Average bits", f"{run.report['average_bits']:.2f}", "code width of quantized weights"),
        ("Bits per weight", f"{run.report['bits_per_weight']:.2f}", "with scales and zeros"),
        ("Size", f"{total:,.3g} {unit}", f"dense {dense:,.3g} {unit}"),
    ]
    for name, row in run.record.get("text", {}).items():
        if row["perplexity"] is not None:
            dense_value = row.get("reference_perplexity")
            told = f"dense {dense_value:.2f}, {name}" if dense_value is not None else name
            tiles.append(("Perplexity", f"{row['perplexity']:.2f}", told))
        if row.get("kl") is not None:
            tiles.append(("KL to dense", f"{row['kl']:.4f}", f"nats per token, {name}"))
            tiles.append(("Top-1 agreement", f"{100 * row['top1']:.1f}%", name))
    for name, row in run.record.get("speed", {}).get("models", {}).items():
        tiles.append(("Generation", f"{row['decode_tokens_per_second']:.3g}/s", f"tokens, {name}"))
    return tiles
