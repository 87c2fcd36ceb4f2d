# SPDX-License-Identifier: Apache-2.0
"""`mcmoe evaluate`: measure a model, and keep what was found beside its weights for the report and the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from transformers_mcmoe.calibration.data import fingerprint, text_tokens, whole_text
from transformers_mcmoe.cli.command import Refused, command
from transformers_mcmoe.cli.console import counting, say, show, show_json, show_pairs, show_table, without_bars
from transformers_mcmoe.cli.generate import speed_rows
from transformers_mcmoe.cli.loading import is_packed, load_model, load_tokenizer, read_config
from transformers_mcmoe.evaluation import (
    TokenClasses,
    error_buildup,
    evaluate,
    find_needles,
    load_record,
    measure_speed,
    run_benchmarks,
    windows,
    write_record,
)
from transformers_mcmoe.evaluation.record import (
    EVALUATION_NAME,
    NEEDLE_NAME,
    checkpoint_mark,
    machine,
    merged,
    read_record,
)
from transformers_mcmoe.integrations.plots.compression import needle_figure
from transformers_mcmoe.pruning import expert_pruning_stats
from transformers_mcmoe.routing import attached

CONTEXT = 2048


@command("evaluate", "Look")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="Hub id or folder, packed or dense.", show_default=False)],
    *,
    reference: Annotated[
        str | None, typer.Option(help="The dense model: gives KL divergence and top-1 agreement. Both are in memory.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Floating dtype of both models.")] = "auto",
    output: Annotated[
        Path | None, typer.Option(help=f"File of the results; default {EVALUATION_NAME} in MODEL's folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as JSON.")] = False,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text for perplexity: a local .txt, .jsonl or .parquet file, or Hub id 'org/name[:subset[:split[:field]]]'. "
            "Default: WikiText-2's test set from the Hub. Take text that calibration never saw.",
            rich_help_panel="Text",
        ),
    ] = None,
    perplexity: Annotated[bool, typer.Option(help="Measure the text.", rich_help_panel="Text")] = True,
    context: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens of a window; default {CONTEXT}, or the model's positions if fewer.", rich_help_panel="Text"
        ),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from window to window; default the context.", rich_help_panel="Text")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Windows, spread over the text; default all.", rich_help_panel="Text")
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows, or questions, at a time.", rich_help_panel="Text")] = 8,
    classes: Annotated[
        bool,
        typer.Option("--classes", help="KL by class of token, and the 20 worst contexts.", rich_help_panel="Text"),
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="How the error builds up over the layers.", rich_help_panel="Text")
    ] = False,
    speed: Annotated[
        bool, typer.Option("--speed", help="Tokens per second and peak memory.", rich_help_panel="Speed")
    ] = False,
    speed_prompt: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1, rich_help_panel="Speed")] = 256,
    speed_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=2, rich_help_panel="Speed")] = 64,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-eval, separated by commas; 'paper' and 'hard' are groups (extra 'eval').",
            rich_help_panel="Tasks",
        ),
    ] = None,
    task_data: Annotated[
        Path | None,
        typer.Option(help="Folder with local data sets, as DATA/org/name.", rich_help_panel="Tasks"),
    ] = None,
    task_limit: Annotated[int | None, typer.Option(help="Questions per task.", rich_help_panel="Tasks")] = None,
    shots: Annotated[
        int | None, typer.Option(help="Examples before a question; default the task's.", rich_help_panel="Tasks")
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run programs that the model writes.", rich_help_panel="Tasks")
    ] = False,
    needle: Annotated[
        str | None,
        typer.Option(help="Lengths in tokens, e.g. 1024,4096: look for a needle in texts.", rich_help_panel="Needle"),
    ] = None,
    haystack: Annotated[
        str | None, typer.Option(help="Text to hide it in; default --text.", rich_help_panel="Needle")
    ] = None,
    depths: Annotated[int, typer.Option(help="Depths per length.", rich_help_panel="Needle")] = 5,
    repeats: Annotated[int, typer.Option(help="Needles per length and depth.", rich_help_panel="Needle")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of prompts, examples and needles.")] = 0,
) -> None:
    """Measure MODEL: perplexity, KL to the dense model, speed, benchmark tasks, needles.

    What was measured is kept as JSON with its protocol, seed and versions; measuring again replaces a figure and leaves the
    others.
    """
    if not (perplexity or layers or speed or needle or tasks):
        raise Refused(
            "There is nothing to measure; leave --no-perplexity out, or ask for --speed, --tasks or --needle."
        )
    if reference is None and (classes or layers):
        raise Refused("--classes and --layers compare with the dense model; give --reference.")
    lengths = _lengths(needle)
    for name in filter(None, (model, reference)):
        read_config(name)
    file = _file(model, output)
    source = whole_text(text) if perplexity or classes or layers else None
    hay = whole_text(haystack or text) if lengths else None
    tokenizer = load_tokenizer(model)
    before, mark = _known(model, file), checkpoint_mark(model)
    loaded = load_model(model, dtype)
    dense = load_model(reference, dtype) if reference is not None else None
    found: dict[str, Any] = {}

    def keep(**sections: Any) -> None:
        """What is measured is written at once: a later failure does not lose it."""
        found.update(sections)
        if file is not None:
            write_record(merged(before, {"checkpoint": mark, **found}), file)

    if source is not None:
        tokens = text_tokens([source], tokenizer)
        positions = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
        context = context or min(CONTEXT, positions or CONTEXT, len(tokens))
        options: dict[str, Any] = {"context": context, "stride": stride, "limit": limit, "batch": batch}
        about = {"text": _name_of(text), "sha256": fingerprint(tokens), "machine": machine()}
        keep(**_measure_text(loaded, dense, tokenizer, tokens, options, about, classes))
        if layers:
            short = {"context": context, "limit": min(limit or 4, 4)}
            keep(layers=error_buildup(loaded, dense, tokens, **short).to_dict() | about)
    if speed:
        models = ({"dense": dense} if dense is not None else {}) | {_kind(model): loaded}
        keep(speed=measure_speed(models, prompt=speed_prompt, new_tokens=speed_tokens, seed=seed))
    if lengths and hay is not None:
        with counting("needle", len(lengths) * depths * repeats, "prompt") as count:
            cells: dict[str, Any] = {"lengths": lengths, "depths": depths, "repeats": repeats, "seed": seed}
            row = find_needles(loaded, tokenizer, hay, **cells, progress=lambda done, total: count())
        keep(needle=row | {"text": _name_of(haystack or text), "machine": machine()})
        if file is not None:
            needle_figure(row).png(file.with_name(NEEDLE_NAME))
    if tasks:
        options = {"shots": shots, "limit": task_limit, "batch": batch, "data": task_data, "seed": seed}
        say(f"tasks: {tasks}")
        with without_bars():
            rows = run_benchmarks(loaded, tokenizer, tasks.split(","), allow_code=allow_code, **options)
        keep(tasks=rows)
    if as_json:
        show_json(found)
        return
    show_found(found)
    say(f"Saved {file}." if file is not None else "Nothing was saved; --output FILE keeps it.")


def _measure_text(
    model: Any, dense: Any, tokenizer: Any, tokens: Any, options: dict[str, Any], about: dict[str, Any], classes: bool
) -> dict[str, Any]:
    """Sections "text", "classes" and, of a pruned model, "pruning"."""
    by_class = TokenClasses(tokenizer, tokens) if classes else None
    total = len(windows(tokens, options["context"], options["stride"]))
    pruned = attached(model) is not None
    if pruned:
        expert_pruning_stats(model, reset=True)
    with counting("text", min(options["limit"] or total, total), "window") as count:

        def observe(window: Any, scores: Any) -> None:
            count()
            if by_class is not None:
                by_class(window, scores)

        row = evaluate(model, tokens, dense, observe=observe, **options).to_dict()
    found: dict[str, Any] = {"text": {about["text"]: row | about}}
    if by_class is not None:
        found["classes"] = by_class.to_dict() | {"protocol": row["protocol"], "seed": row["seed"]} | about
    if pruned:
        found["pruning"] = {
            "phases": expert_pruning_stats(model),
            "protocol": row["protocol"],
            "seed": row["seed"],
        } | about
    return found


def _file(model: str, output: Path | None) -> Path | None:
    """Where the record is kept; None if nowhere."""
    if output is None:
        return Path(model) / EVALUATION_NAME if Path(model).is_dir() else None
    if output.is_dir():
        raise Refused(f"--output '{output}' is a folder; give a file, such as '{output / EVALUATION_NAME}'.")
    if not output.resolve().parent.is_dir():
        raise Refused(f"--output '{output}' lies in a folder that does not exist; make it first.")
    return output


def _known(model: str, file: Path | None) -> dict[str, Any]:
    """What was measured before."""
    if file is not None:
        return read_record(file) if file.is_file() else {}
    return load_record(model)


def _kind(model: str) -> str:
    return "packed" if is_packed(read_config(model)) else "model"


def _name_of(text: str | None) -> str:
    """A text's name without the folders of this machine."""
    if text is None:
        return "WikiText-2 test"
    return Path(text).name if Path(text).exists() else text


def _lengths(needle: str | None) -> list[int]:
    words = needle.split(",") if needle else []
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise Refused(f"--needle {needle} must be lengths in tokens, such as 1024,4096.")
    return [int(word) for word in words]


def show_found(found: dict[str, Any]) -> None:
    """What was measured, as tables."""
    for name, row in found.get("text", {}).items():
        pairs = [("perplexity", f"{row['perplexity']:.3f}" if row["perplexity"] is not None else "out of range")]
        if row["kl"] is not None:
            error = f" ± {row['kl_se']:.4f}" if row["kl_se"] is not None else ""
            pairs += [
                ("dense perplexity", f"{row['reference_perplexity']:.3f}"),
                ("KL to dense", f"{row['kl']:.4f}{error} nats per token"),
                ("top-1 agreement", f"{row['top1']:.2%}"),
            ]
        protocol = row["protocol"]
        show(f"{name}: {row['tokens']:,} tokens, windows of {protocol['context']}, stride {protocol['stride']}")
        show_pairs(pairs)
    if "pruning" in found:
        phase = found["pruning"]["phases"]["prefill"]
        show_pairs([("expert bytes skipped", f"{phase['bytes_skipped'] or 0:.1%}")])
    if "classes" in found:
        classes = found["classes"]["classes"]
        rows: list[tuple[str, ...]] = [
            (
                f"{partition}: {name}",
                f"{row['tokens']:,}",
                f"{row['kl']:.4f}",
                f"{row['kl_share']:.0%}",
                f"{row['top1']:.1%}",
            )
            for partition, inside in classes.items()
            for name, row in inside.items()
        ]
        show_table(("class", "tokens", "KL", "share of KL", "top-1"), rows)
    if "layers" in found:
        rows = [
            (row["path"], f"{row['entering']['relative_error']:.4f}", f"{row['alone']['relative_error']:.4f}")
            for row in found["layers"]["layers"]
        ]
        show_table(("layer", "error entering", "error alone"), rows)
    if "speed" in found:
        show_table(
            ("model", "prompt tokens/s", "generated tokens/s", "against the first", "peak memory"),
            speed_rows(found["speed"]),
        )
    if "needle" in found:
        row = found["needle"]
        columns = ("depth", *(f"{length:,}" for length in row["lengths"]))
        shares = zip(row["depths"], *row["found"], strict=True)
        show_table(columns, [(f"{depth:.0%}", *(f"{share:.0%}" for share in rest)) for depth, *rest in shares])
    if "tasks" in found:
        rows = [
            (task, name, f"{metric['value']:.4f}", f"{metric['stderr']:.4f}" if metric["stderr"] is not None else "")
            for task, row in found["tasks"].items()
            for name, metric in row["metrics"].items()
        ]
        show_table(("task", "metric", "value", "standard error"), rows)
