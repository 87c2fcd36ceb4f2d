# SPDX-License-Identifier: Apache-2.0
"""`mcmoe export`: a packed model in the format of an engine that takes no plugin."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from transformers_mcmoe.cli.command import Refused, command
from transformers_mcmoe.cli.console import progress, say, show
from transformers_mcmoe.integrations.exports import compressed, gguf


class Format(str, Enum):
    """What is written."""

    GGUF = "gguf"
    COMPRESSED = "compressed-tensors"


@command("export", "Use")
def export(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a packed model.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="New file for gguf, new folder else.", show_default=False)],
    *,
    format: Annotated[Format, typer.Option(help="Of llama.cpp, or of vLLM without a plugin.")],
    pre: Annotated[
        str | None,
        typer.Option(
            help="gguf: llama.cpp's name of how a byte-pair tokenizer splits text; default by the model's type."
        ),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(help="gguf, experts of 2 and 3 bits: the dense model, which they are quantized from anew."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="gguf: calibration text for that, a file or Hub id.")] = None,
) -> None:
    """Write MODEL for llama.cpp or for vLLM without this package: codes and scales stay what they are.

    Such formats have one width for the experts of a layer: compress with --granularity layer and --attention-bits 4; 4 bits for
    gguf, 8 with --symmetric, 2 and 3 for experts; --integer-zeros or --symmetric for compressed-tensors.
    """
    if format is not Format.GGUF and (pre or dense or dataset):
        raise Refused("--pre, --dense and --dataset are options of gguf.")
    if output.is_dir() == (format is Format.GGUF) and output.exists():
        raise Refused(f"'{output}' must be a new {'file' if format is Format.GGUF else 'folder'}.")
    try:
        if format is Format.GGUF:
            with progress() as shown:
                gguf.export(model, output, pre, dense=dense, dataset=dataset, progress=shown)
        else:
            with progress() as shown:
                compressed.export(model, output, shown)
    except ImportError as error:
        raise Refused(f"{error}; pip install transformers-mcmoe[export].") from error
    say(f"Wrote {output}.")
    show(str(output))
