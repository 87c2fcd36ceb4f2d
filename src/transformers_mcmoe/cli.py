# SPDX-License-Identifier: Apache-2.0
"""The command `mcmoe`: compression from a shell, with progress.

The only file that prints. It adds nothing to what `from_pretrained` and `save_pretrained` do but the safe hand-over of
the output folder.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import transformers
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from transformers_mcmoe.config import ALLOCATIONS, ROUNDINGS, MCMoEConfig, ODPConfig, OTPConfig
from transformers_mcmoe.kernels import backend_info
from transformers_mcmoe.progress import Progress
from transformers_mcmoe.report import REPORT_NAME, compression_report, load_report
from transformers_mcmoe.workdir import FINGERPRINT, check_replaceable, recover_directory, replace_directory

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Mixture-of-Experts compression.")
console = Console()


@app.callback()
def main() -> None:
    """Mixture-of-Experts compression inside Hugging Face transformers."""


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the dense model.")],
    output: Annotated[Path, typer.Option(help="Folder of the packed model; replaced as a whole at the end.")],
    bits: Annotated[float, typer.Option(help="Average bits over all quantized weights.")] = 2.54,
    dataset: Annotated[str | None, typer.Option(help="Calibration text: Hub id or local file. Default: C4.")] = None,
    budget: Annotated[
        Literal["layer", "model"] | None, typer.Option(help="One budget per layer or for the model.")
    ] = None,
    allocation: Annotated[str, typer.Option(help=", ".join(ALLOCATIONS) + ".")] = "pmq",
    expert_bits: Annotated[str, typer.Option(help="Widths that experts may take.")] = "1,2,3",
    preset: Annotated[str | None, typer.Option(help="'paper': PMQ as the text of arXiv 2410.06270 has it.")] = None,
    rounding: Annotated[str, typer.Option(help=" or ".join(ROUNDINGS) + ".")] = "gptq",
    odp: Annotated[bool, typer.Option("--odp", help="Prune experts at run time (docs/pruning.md).")] = False,
    odp_rate: Annotated[
        float | None,
        typer.Option(help="Share of routed expert bytes to skip; default: the median rule. Implies --odp."),
    ] = None,
    otp: Annotated[
        float | None,
        typer.Option(
            help="Share of routed slots to skip by learned pruning, e.g. 0.2; its routers are trained at the end."
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per calibration sequence.")] = 2048,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    work_dir: Annotated[
        Path | None, typer.Option(help="Folder for intermediate files. Default: a hidden one beside OUTPUT.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device that layers are run on.")] = None,
    dtype: Annotated[str, typer.Option(help="Floating dtype of what stays dense.")] = "auto",
) -> None:
    """Compress MODEL into OUTPUT."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
    transformers.logging.disable_progress_bar()
    output = output.resolve()
    work = work_dir or _sibling(output, "work")
    try:
        recover_directory(output)
        check_replaceable(output, REPORT_NAME)
        if work_dir is None:
            _clear_leftovers(work)
        with _bars() as show:
            config = MCMoEConfig(
                bits,
                dataset=dataset,
                budget=budget,
                allocation=allocation,
                expert_bits=[int(bits) if bits.isdigit() else bits for bits in expert_bits.split(",")],  # type: ignore[misc]
                preset=preset,
                rounding=rounding,
                odp=ODPConfig(rate=odp_rate) if odp or odp_rate is not None else None,
                otp=OTPConfig(target=otp) if otp is not None else None,
                num_samples=num_samples,
                seq_len=seq_len,
                seed=seed,
                work_dir=work,
                device=device,
                progress=show,
            )
            packed = _load_class(model).from_pretrained(model, quantization_config=config, dtype=dtype)
        _save(packed, model, output)
    except (ValueError, OSError, NotImplementedError) as error:
        console.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error
    if work_dir is None:
        _clear_leftovers(work)
    console.print(f"Saved {output}.", highlight=False)
    _summary(compression_report(packed))


@app.command()
def inspect(
    model: Annotated[str | None, typer.Argument(help="Hub id or folder of a packed model.")] = None,
) -> None:
    """Show what a packed MODEL is made of, and what computes on this machine."""
    try:
        report = None if model is None else load_report(model)
        backend = backend_info()
    except (ValueError, OSError) as error:
        console.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error
    if report is not None:
        _summary(report)
        table = Table("experts", "bits of each expert")
        for path, digits in report["expert_bits"].items():
            table.add_row(path, digits if isinstance(digits, str) else json.dumps(digits))
        console.print(table)
    table = Table(show_header=False, box=None)
    for name, value in backend.items():
        table.add_row(name.replace("_", " "), " ".join(value) if isinstance(value, list) else value)
    console.print(table)


def _load_class(model: str) -> Any:
    """The class that the checkpoint names, or the one for causal language models."""
    config = transformers.AutoConfig.from_pretrained(model)
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


def _clear_leftovers(work: Path) -> None:
    """Remove the default work folder of an earlier, killed run; it is never the user's own."""
    if (work / FINGERPRINT).is_file():
        shutil.rmtree(work)


@contextmanager
def _bars() -> Iterator[Callable[[Progress], None]]:
    """A bar per stage while the block runs; gives the callback that moves them."""
    bars = Bars(
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        console=console,
    )
    tasks: dict[str, TaskID] = {}

    def show(step: Progress) -> None:
        if step.stage not in tasks:
            tasks[step.stage] = bars.add_task(step.stage, total=step.layers, detail="")
        expert = f"expert {step.expert}/{step.experts}, " if step.experts else ""
        left = f", {step.eta / 60:.0f} min left" if step.eta is not None else ""
        detail = f"{expert}{step.memory / 1e9:.2f} GB{left}"
        bars.update(tasks[step.stage], completed=step.layer, detail=detail)

    with bars:
        yield show


def _save(model: Any, source: str, output: Path) -> None:
    """Write the model under a temporary name, then put it in the place of `output`."""
    new = _sibling(output, "new")
    if new.exists():  # of an earlier run that was killed while it saved
        shutil.rmtree(new)
    model.save_pretrained(new, max_shard_size="4GB")
    for loader in (transformers.AutoProcessor, transformers.AutoTokenizer):
        try:
            loader.from_pretrained(source).save_pretrained(new)
            break
        except Exception as error:
            logging.getLogger(__name__).debug("%s: %s", loader.__name__, error)
    replace_directory(new, output)


def _sibling(output: Path, what: str) -> Path:
    """A folder of ours beside the output."""
    return output.with_name(f".{output.name}.mcmoe-{what}")


def _summary(report: dict[str, Any]) -> None:
    sizes = report["sizes"]
    table = Table(show_header=False, box=None)
    table.add_row("average bits", f"{report['average_bits']:.4f}")
    table.add_row("bits per weight", f"{report['bits_per_weight']:.4f} (scales and zeros included)")
    table.add_row("size", f"{sizes['total_bytes'] / 1e9:.3f} GB, dense {sizes['dense_bytes'] / 1e9:.3f} GB")
    table.add_row("seconds", json.dumps({stage: round(s, 1) for stage, s in report["seconds"].items()}))
    console.print(table)
    for fallback in report["fallbacks"]:
        console.print(f"note: {fallback}", highlight=False)
