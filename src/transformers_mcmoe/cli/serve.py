# SPDX-License-Identifier: Apache-2.0
"""`mcmoe serve`: transformers' own OpenAI-compatible server on a packed model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub.constants import HF_HUB_CACHE

from transformers_mcmoe.cli.command import Refused, command
from transformers_mcmoe.cli.console import say
from transformers_mcmoe.cli.loading import load_tokenizer, read_config


@command("serve", "Use")
def serve(
    model: Annotated[str, typer.Argument(help="Hub id or folder, packed or dense.", show_default=False)],
    *,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    dtype: Annotated[str, typer.Option(help="Floating dtype of what is not packed.")] = "auto",
    device: Annotated[str, typer.Option(help="Device, or auto.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    continuous_batching: Annotated[
        bool, typer.Option("--continuous-batching", help="Batch requests as they come (paged attention).")
    ] = False,
    cors: Annotated[bool, typer.Option("--cors", help="Let web pages of other origins ask.")] = False,
    log_level: Annotated[str, typer.Option(help="info or warning.")] = "warning",
) -> None:
    """Answer OpenAI clients (chat and completions) from MODEL.

    This is `transformers serve` with the packed format known to it; its further endpoints work as there. Requests name the model
    as it is named here.
    """
    read_config(model)
    load_tokenizer(model)
    try:
        import uvicorn  # noqa: F401
        from transformers.cli.serve import Serve
    except ImportError as error:
        raise Refused("Serving needs further packages; pip install transformers-mcmoe[serve].") from error
    # the server lists the models in the Hub's cache, and fails where there is none yet
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    say(f"Serving {model} on http://{host}:{port}/v1; stop with Ctrl-C.")
    Serve(
        force_model=model,
        host=host,
        port=port,
        dtype=dtype,
        device=device,
        compile=compile,
        continuous_batching=continuous_batching,
        enable_cors=cors,
        log_level=log_level,
    )
