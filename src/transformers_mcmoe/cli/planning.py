# SPDX-License-Identifier: Apache-2.0
"""`mcmoe plan`: what a compression will give and take, without reading a weight."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from transformers_mcmoe.cli.command import Refused, command
from transformers_mcmoe.cli.console import say, show_json, show_pairs, show_table
from transformers_mcmoe.cli.loading import is_packed, model_class, read_config
from transformers_mcmoe.cli.options import compression_options, config_of
from transformers_mcmoe.pipeline.preview import Preview, preview
from transformers_mcmoe.progress import duration, size


@command("plan", "Compress")
@compression_options
def plan(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the dense model.", show_default=False)],
    options: dict[str, Any],
    *,
    dtype: Annotated[str, typer.Option(help="Floating dtype of what stays dense.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what compressing MODEL will give and take: bits per layer, sizes, memory, disk, time.

    Takes the options of `compress`. Only the model's config is read; the time is a guess from some seconds of rounding
    on this machine.
    """
    found = read_config(model)
    if is_packed(found):
        raise Refused(f"'{model}' is packed already; give the dense model it was made from.")
    config = config_of(options)
    kind = _dtype(dtype, found)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with torch.device("meta"):
        built = model_class(found)
        empty = built._from_config(found, dtype=kind) if hasattr(built, "_from_config") else built.from_config(found)
    looked = preview(empty, config, dtype=kind)
    if as_json:
        show_json(dataclasses.asdict(looked))
        return
    _show(looked, options["work_dir"])


def _dtype(name: str, config: Any) -> torch.dtype:
    kind = config.dtype if name == "auto" else getattr(torch, name, None)
    if name == "auto" and kind is None:
        return torch.bfloat16
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise Refused(f"--dtype {name} is no floating dtype of torch; give bfloat16, float16, float32 or auto.")
    return kind


def _show(found: Preview, work_dir: Path | None) -> None:
    free = shutil.disk_usage(work_dir if work_dir is not None and work_dir.is_dir() else Path.cwd()).free
    total = sum(found.seconds.values())
    stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in found.seconds.items())
    show_pairs(
        [
            (
                "experts",
                f"{found.experts} in {len(found.layers)} layers, {found.quantized_weights / 1e9:.3f} B weights quantized",
            ),
            ("average bits", f"{found.average_bits:.4f}"),
            ("bits per weight", f"{found.bits_per_weight:.4f} (scales and zeros included)"),
            ("size", f"{size(found.total_bytes)}, dense {size(found.dense_bytes)}"),
            ("memory", f"up to {size(found.memory_bytes)} while compressing, {size(found.total_bytes)} to run it"),
            (
                "disk",
                f"up to {size(found.disk_bytes)} for the work folder and {size(found.total_bytes)} for the output; {size(free)} free here",
            ),
            ("time", f"about {duration(total)} on this machine ({stages})"),
        ]
    )
    show_table(("experts of", "average bits"), [(path, f"{bits:.3f}") for path, bits in found.layers.items()])
    if not found.decided:
        say("One budget for the model: measuring will move bits between layers; --budget layer keeps them equal.")
