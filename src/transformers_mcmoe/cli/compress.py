# SPDX-License-Identifier: Apache-2.0
"""`mcmoe compress`: from a dense checkpoint to a folder with the packed one.

It adds nothing to what `from_pretrained` and `save_pretrained` do but the safe hand-over of the output folder.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from transformers_mcmoe.cli.command import Refused, command
from transformers_mcmoe.cli.console import notes, progress, say, show_json, show_pairs
from transformers_mcmoe.cli.loading import is_packed, read_config
from transformers_mcmoe.cli.options import compression_options, config_of
from transformers_mcmoe.distributed import RankDone, launched, world
from transformers_mcmoe.integrations.hub import copy_tokenizer
from transformers_mcmoe.models.structure import model_class
from transformers_mcmoe.progress import Progress, duration, size
from transformers_mcmoe.report import REPORT_NAME, compression_report
from transformers_mcmoe.workdir import FINGERPRINT, check_replaceable, is_begun, recover_directory, replace_directory


@command("compress", "Compress")
@compression_options
def compress(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the dense model.", show_default=False)],
    options: dict[str, Any],
    *,
    output: Annotated[
        Path, typer.Option(help="Folder of the packed model; replaced as a whole at the end.", show_default=False)
    ],
    dtype: Annotated[str, typer.Option(help="Floating dtype of what stays dense.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compress MODEL into a folder, layer by layer.

    The model need not fit into memory. The old content of the folder stays whole until the new one is finished. Several processes
    share the work: torchrun --nproc-per-node 2 -m transformers_mcmoe compress ... (docs/scale.md).
    """
    given, asked = options["device"], options["world_size"]
    ranks = world(launched() if asked is None else asked, None if given is None else torch.device(given))
    if ranks.size > 1 and ranks.leads:
        say(f"{ranks.size} processes share the work.")
    elif not ranks.leads:
        logging.disable(logging.WARNING)  # the first rank says the same
    output = output.resolve()
    found = read_config(model)
    if is_packed(found):
        raise Refused(f"'{model}' is packed already; give the dense model it was made from.")
    own_work = options["work_dir"] is None
    work = _sibling(output, "work") if own_work else options["work_dir"]
    ranks.first(lambda: _begin(output, work if own_work and not options["resume"] else None))
    finished = False
    try:
        with progress() if ranks.leads else nullcontext(_unseen) as move:
            config = config_of(options, work_dir=work, progress=move, world_size=ranks.size)
            config.leaves = True
            packed = model_class(found).from_pretrained(model, quantization_config=config, dtype=dtype)
        save(packed, model, output)
        finished = True
    except RankDone:
        return
    finally:
        if ranks.leads:
            _leave(output, work, own_work, finished)
    report = compression_report(packed)
    if as_json:
        show_json(report)
        return
    say(f"Saved {output}.")
    show_summary(report)
    notes(report)


def _unseen(step: Progress) -> None:
    """Progress of a rank that shows nothing."""


def _begin(output: Path, leftovers: Path | None) -> None:
    """Raise if the output cannot be replaced, and remove what a run that was killed left."""
    recover_directory(output)
    check_replaceable(output, REPORT_NAME)
    if leftovers is not None:
        clear_leftovers(leftovers)


def _leave(output: Path, work: Path, own_work: bool, finished: bool = False) -> None:
    """Tidy up: a run that is killed leaves its folders; one that is interrupted or fails only layers that it has finished."""
    shutil.rmtree(_sibling(output, "new"), ignore_errors=True)
    kept = not finished and is_begun(work)
    if own_work and not kept:
        clear_leftovers(work)
    if kept:
        say(f"Finished layers are kept in '{work}'; the command that began them goes on with --resume.")
    if not finished and output.exists():
        say(f"'{output}' is as it was.")


def clear_leftovers(work: Path) -> None:
    """Remove the default work folder of a run that was killed or failed; it is never the user's own."""
    if (work / FINGERPRINT).is_file():
        for path in work.iterdir():  # the mark that it is ours goes last
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != FINGERPRINT:
                path.unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
    elif work.is_dir() and not any(work.iterdir()):
        work.rmdir()


def save(model: Any, source: str, output: Path) -> None:
    """Write the model under a temporary name, then put it in the place of `output`."""
    new = _sibling(output, "new")
    if new.exists():  # of an earlier run that was killed while it saved
        shutil.rmtree(new)
    model.save_pretrained(new, max_shard_size="4GB")
    copy_tokenizer(source, new)
    replace_directory(new, output)


def _sibling(output: Path, what: str) -> Path:
    """A folder of ours beside the output."""
    return output.with_name(f".{output.name}.mcmoe-{what}")


def _placed(found: dict[str, Any]) -> str:
    """What the ranks of expert parallelism hold and are sent."""
    names = {"bytes": "bytes", "tokens": "tokens", "tokens_after_odp": "tokens after pruning"}
    uneven = (f"{head} {found[f'{name}_max_over_mean']:.3f}" for name, head in names.items() if name in found)
    return f"{found['ranks']} ranks of {size(max(found['bytes']))}; fullest over even: {', '.join(uneven)}"


def show_summary(report: dict[str, Any]) -> None:
    """Sizes and times of a compression."""
    sizes, dropped = report["sizes"], report.get("dropped_experts")
    lost = f"{dropped['count']} of {dropped['of']}, {size(dropped['dense_bytes'])} at 16 bits" if dropped else ""
    show_pairs(
        [
            *([("dropped experts", lost)] if lost else []),
            ("average bits", f"{report['average_bits']:.4f}"),
            ("bits per weight", f"{report['bits_per_weight']:.4f} (scales and zeros included)"),
            *([("expert parallel", _placed(report["expert_parallel"]))] if "expert_parallel" in report else []),
            ("size", f"{size(sizes['total_bytes'])}, dense {size(sizes['dense_bytes'])}"),
            ("time", ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in report["seconds"].items())),
        ]
    )
