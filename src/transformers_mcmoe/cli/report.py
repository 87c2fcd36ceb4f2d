# SPDX-License-Identifier: Apache-2.0
"""`mcmoe report`: a page to look at, and its figures as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transformers_mcmoe.cli.command import Refused, command
from transformers_mcmoe.cli.console import say, show
from transformers_mcmoe.cli.loading import read_config
from transformers_mcmoe.report.page import Run, write_page


@command("report", "Look")
def report(
    models: Annotated[
        list[str],
        typer.Argument(help="Folders or Hub ids of packed models; the first is told in full.", show_default=False),
    ],
    *,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Two packed models side by side, e.g. with two calibration sets."),
    ] = None,
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("mcmoe_report.html"),
    figures: Annotated[Path | None, typer.Option(help="Folder for the figures as PNG files.")] = None,
) -> None:
    """Draw what is known of packed MODELS into one HTML page that needs no network.

    With several models, perplexity is drawn against size. What `mcmoe evaluate` found is in it.
    """
    if not output.resolve().parent.is_dir():
        raise Refused(f"--output '{output}' lies in a folder that does not exist; make it first.")
    if output.is_dir():
        raise Refused(f"--output '{output}' is a folder; give a file, such as '{output / 'report.html'}'.")
    pair = None if compare is None else (_load(compare[0]), _load(compare[1]))
    written = write_page([_load(model) for model in models], output, compare=pair, figures=figures)
    for file in written:
        show(str(file))
    say("Open the page in any browser.")


def _load(model: str) -> Run:
    read_config(model)
    return Run.load(model)
