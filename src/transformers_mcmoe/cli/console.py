# SPDX-License-Identifier: Apache-2.0
"""What the command line shows: results on stdout, progress, notes and errors on stderr.

On a terminal there are bars and colours; elsewhere plain lines without control codes. Knows no models.
"""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any

import datasets
import transformers
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from transformers_mcmoe.progress import Meter, Progress, duration, size

# between two lines of a stage where there is no terminal
SECONDS = 2.0

results = Console()
messages = Console(stderr=True)


def quieten(debug: bool = False) -> None:
    """Let libraries say warnings only, and draw no bars of their own where there is no terminal."""
    handler: logging.Handler = logging.StreamHandler()
    if messages.is_terminal:
        handler = RichHandler(console=messages, show_time=False, show_path=debug)
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("transformers_mcmoe").setLevel(logging.DEBUG if debug else logging.WARNING)
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if not debug:  # every retry of a request is a warning
        hub_logging.set_verbosity_error()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that it has not loaded itself
    if not messages.is_terminal:
        disable_progress_bars()


def say(text: str) -> None:
    """A message on stderr."""
    messages.print(text, markup=False, highlight=False, soft_wrap=True)


def show(text: str) -> None:
    """A line of the result on stdout."""
    results.print(text, markup=False, highlight=False, soft_wrap=True)


def show_json(value: Any) -> None:
    """The result as one JSON document on stdout."""
    results.out(json.dumps(value, indent=2), highlight=False)


def show_pairs(rows: Iterable[tuple[str, str]]) -> None:
    """Names and values below each other."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(name, value)
    results.print(table, highlight=False)


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    results.print(table, highlight=False)


@contextmanager
def progress() -> Iterator[Callable[[Progress], None]]:
    """While open, its callback moves a bar per stage, or without a terminal writes a line per layer."""
    if not messages.is_terminal:
        yield _lines()
        return
    bars = Bars(
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        console=messages,
    )
    tasks: dict[str, TaskID] = {}

    def move(step: Progress) -> None:
        if step.stage not in tasks:
            tasks[step.stage] = bars.add_task(step.stage, total=step.layers, detail="")
        expert = f"expert {step.expert}/{step.experts}, " if step.experts else ""
        bars.update(tasks[step.stage], completed=step.layer, detail=expert + _detail(step))

    with bars:
        yield move


def _lines() -> Callable[[Progress], None]:
    shown: dict[str, float] = {}

    def write(step: Progress) -> None:
        now = time.monotonic()
        last = shown.get(step.stage, -SECONDS)
        if last < math.inf and (step.layer == step.layers or (step.layer and now - last >= SECONDS)):
            shown[step.stage] = now if step.layer < step.layers else math.inf
            say(f"{step.stage}: {step.layer} of {step.layers}, {_detail(step)}")

    return write


def _detail(step: Progress) -> str:
    left = f", {duration(step.eta)} left" if step.eta is not None and step.layer < step.layers else ""
    return size(step.memory) + left


@contextmanager
def without_bars() -> Iterator[None]:
    """While open, bars that libraries draw are not shown where there is no terminal; what they log is."""
    with nullcontext() if messages.is_terminal else redirect_stderr(io.StringIO()):
        yield


@contextmanager
def counting(stage: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
    """While open, its callback counts one of so many units."""
    with progress() as move:
        meter = Meter(move)
        meter.start(stage, total, unit)
        yield meter.layer_done


def notes(report: Mapping[str, Any]) -> None:
    """What a compression did otherwise than usual."""
    for fallback in report["fallbacks"]:
        say(f"note: {fallback}")
