# SPDX-License-Identifier: Apache-2.0
"""`mcmoe export`: a packed model in the format of an engine that takes no plugin."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from transformers_mcmoe.cli.command import Refused, command
from transformers_mcmoe.cli.console import say, show
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
) -> None:
    """Write MODEL for llama.cpp or for vLLM without this package: codes and scales stay what they are.

    Such formats have one width for the experts of a layer: compress with --granularity layer and --attention-bits 4; 4 and 8 bits
    for gguf, with --symmetric for 8; --integer-zeros or --symmetric for compressed-tensors.
    """
    if pre is not None and format is not Format.GGUF:
        raise Refused("--pre is an option of gguf.")
    if output.is_dir() == (format is Format.GGUF) and output.exists():
        raise Refused(f"'{output}' must be a new {'file' if format is Format.GGUF else 'folder'}.")
    try:
        if format is Format.GGUF:
            gguf.export(model, output, pre)
        else:
            compressed.export(model, output)
    except ImportError as error:
        raise Refused(f"{error}; pip install transformers-mcmoe[export].") from error
    say(f"Wrote {output}.")
    show(str(output))
