# SPDX-License-Identifier: Apache-2.0
"""`mcmoe plan`: what a compression will give and take, without reading a weight."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from transformers_mcmoe.cli.command import Refused, command
from transformers_mcmoe.cli.console import progress, say, show_json, show_pairs, show_table
from transformers_mcmoe.cli.loading import is_packed, read_config
from transformers_mcmoe.cli.options import compression_options, config_of
from transformers_mcmoe.models.stream import checkpoint_files
from transformers_mcmoe.models.structure import Structure, model_class
from transformers_mcmoe.pipeline import allocate
from transformers_mcmoe.pipeline.preview import Preview, per_layer, preview
from transformers_mcmoe.plan import Plan
from transformers_mcmoe.progress import duration, size
from transformers_mcmoe.workdir import write_whole


@command("plan", "Compress")
@compression_options
def plan(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the dense model.", show_default=False)],
    options: dict[str, Any],
    *,
    dtype: Annotated[str, typer.Option(help="Floating dtype of what stays dense.")] = "auto",
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Run the calibration and choose every expert's width; takes the time of 'allocate'."
        ),
    ] = False,
    save: Annotated[
        Path | None, typer.Option(help="Write the chosen widths as JSON for compress --plan. Implies --measure.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what compressing MODEL will give and take: bits per layer, sizes, memory, disk, time.

    Takes the options of `compress`. Without --measure only the model's config is read; the time is a guess from some seconds of
    rounding on this machine.
    """
    if save is not None and not save.resolve().parent.is_dir():
        raise Refused(f"--save '{save}' lies in a folder that does not exist; make it first.")
    found = read_config(model)
    if is_packed(found):
        raise Refused(f"'{model}' is packed already; give the dense model it was made from.")
    config = config_of(options, resume=False)
    kind = _dtype(dtype, found)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with torch.device("meta"):
        built = model_class(found)
        empty = built._from_config(found, dtype=kind) if hasattr(built, "_from_config") else built.from_config(found)
    looked = preview(empty, config, dtype=kind, world_size=config.world_size or 1)
    chosen = _measured(model, empty, options, kind) if measure or save is not None else None
    if chosen is not None:
        layers = per_layer(Structure(empty, modules_to_not_convert=config.modules_to_not_convert), chosen)
        looked = dataclasses.replace(looked, layers=layers, decided=True)
        if save is not None:
            write_whole(save, json.dumps(chosen.to_dict(), indent=1) + "\n")
    if as_json:
        show_json(dataclasses.asdict(looked) | {"plan": None if chosen is None else chosen.to_dict()})
        return
    _show(looked, options["work_dir"])
    if save is not None:
        say(f"Saved {save}; compress --plan {save} goes on from here.")


def _measured(model: str, empty: Any, options: dict[str, Any], dtype: torch.dtype) -> Plan:
    """The widths that calibration chooses."""
    # a folder of its own, so that the finished layers of a compression stay
    if options["work_dir"] is not None:
        options["work_dir"].mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mcmoe-plan-", dir=options["work_dir"]) as folder, progress() as move:
        work = Path(folder)
        sources = {name: options[name] or model for name in ("tokenizer", "processor")}
        config = config_of(options, work_dir=work, resume=False, world_size=None, progress=move, **sources)
        return allocate(empty, checkpoint_files(model), config, dtype=dtype, work_dir=work)


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
            *([("dropped experts", f"{found.dropped} of {found.experts}")] if found.dropped else []),
            ("average bits", f"{found.average_bits:.4f}"),
            ("bits per weight", f"{found.bits_per_weight:.4f} (scales and zeros included)"),
            ("size", f"{size(found.total_bytes)}, dense {size(found.dense_bytes)}"),
            ("memory", f"up to {size(found.memory_bytes)} while compressing, {size(found.total_bytes)} to run it"),
            (
                "disk",
                f"up to {size(found.disk_bytes)} for the work folder and {size(found.total_bytes)} for the output; {size(free)} free here",
            ),
            *([("network", f"{size(found.network_bytes)} to each process")] if found.network_bytes else []),
            (
                "time",
                f"about {duration(total)} on {'this machine' if not found.network_bytes else 'as many machines like this'} ({stages})",
            ),
        ]
    )
    show_table(("experts of", "average bits"), [(path, f"{bits:.3f}") for path, bits in found.layers.items()])
    if not found.decided:
        say("One budget for the model: measuring will move bits between layers; --measure shows how.")
