# SPDX-License-Identifier: Apache-2.0
"""`mcmoe inspect`: what a packed model is made of, and what computes on this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from transformers_mcmoe.cli.command import command
from transformers_mcmoe.cli.compress import show_summary
from transformers_mcmoe.cli.console import notes, show_json, show_pairs, show_table
from transformers_mcmoe.cli.loading import read_config
from transformers_mcmoe.kernels import backend_info
from transformers_mcmoe.report import load_report


@command("inspect", "Look")
def inspect(
    model: Annotated[
        str | None, typer.Argument(help="Hub id or folder of a packed model.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show what a packed MODEL is made of, and what computes on this machine."""
    report = None
    if model is not None:
        read_config(model)
        report = load_report(model)
    backend = backend_info()
    if as_json:
        show_json({"report": report, "machine": backend})
        return
    if report is not None:
        show_summary(report)
        notes(report)
        rows = [(path, d if isinstance(d, str) else json.dumps(d)) for path, d in report["expert_bits"].items()]
        show_table(("experts", "bits of each expert"), rows)
        if report.get("down_bits", report["expert_bits"]) != report["expert_bits"]:
            show_table(("experts", "bits of its down projection"), list(report["down_bits"].items()))
    show_pairs(
        (name.replace("_", " "), " ".join(value) if isinstance(value, list) else str(value))
        for name, value in backend.items()
    )
