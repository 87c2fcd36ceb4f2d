# SPDX-License-Identifier: Apache-2.0
"""`mcmoe generate` and `mcmoe bench`: text from a model, and how fast it comes."""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer
from transformers import TextStreamer, set_seed

from transformers_mcmoe.cli.command import Refused, command
from transformers_mcmoe.cli.console import say, show_json, show_table
from transformers_mcmoe.cli.loading import load_model, load_tokenizer
from transformers_mcmoe.evaluation import measure_speed
from transformers_mcmoe.progress import size


@command("generate", "Use")
def generate(
    model: Annotated[str, typer.Argument(help="Hub id or folder, packed or dense.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.", show_default=False)],
    *,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; more varies.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this share of the probability.", min=0, max=1)] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: repeat less.", min=0.01)] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="Floating dtype of what is not packed.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print text and speed as JSON at the end.")] = False,
) -> None:
    """Let MODEL go on from a PROMPT; the text appears as it is made."""
    loaded = load_model(model, dtype)
    tokenizer = load_tokenizer(model)
    inputs = _inputs(tokenizer, prompt, chat)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    set_seed(seed)
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    started = time.perf_counter()
    with torch.no_grad():
        output = loaded.generate(
            **inputs.to(loaded.device),
            max_new_tokens=max_new_tokens,
            repetition_penalty=repetition_penalty,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            streamer=streamer,
            **sampling,
        )
    seconds = time.perf_counter() - started
    new = output[0, inputs["input_ids"].shape[1] :]
    if as_json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        show_json({"text": text, "tokens": len(new), "tokens_per_second": len(new) / seconds})
    else:
        say(f"{len(new)} tokens, {len(new) / seconds:.1f} per second, the prompt included")


def _inputs(tokenizer: Any, prompt: str, chat: bool) -> Any:
    if not prompt:
        raise Refused("The prompt is empty; give some text to go on from.")
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    if tokenizer.chat_template is None:
        raise Refused("This model's tokenizer has no chat template; leave --chat out.")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")


@command("bench", "Use")
def bench(
    models: Annotated[
        list[str], typer.Argument(help="Models to time in turns; the first is compared with.", show_default=False)
    ],
    *,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=2)] = 64,
    batch: Annotated[int, typer.Option(help="Sequences at a time.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Medians of so many runs.", min=1)] = 3,
    dtype: Annotated[str, typer.Option(help="Floating dtype of what is not packed.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Time prompts and generation of one or several MODELS, e.g. the dense one and the packed one.

    They are loaded together and take turns, so that another load on the machine meets all of them alike.
    """
    loaded = {name: load_model(name, dtype) for name in models}
    found = measure_speed(loaded, prompt=prompt, new_tokens=new_tokens, batch=batch, rounds=rounds)
    if as_json:
        show_json(found)
        return
    show_table(("model", "prompt tokens/s", "generated tokens/s", "faster", "peak memory"), speed_rows(found))
    machine = found["machine"]
    say(
        f"{machine['processor']}, {found['protocol']['threads']} threads, load {machine['load']}; prompt {prompt}, {rounds} rounds"
    )


def speed_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Table rows of what `measure_speed` found."""
    first = next(iter(found["models"].values()))["decode_tokens_per_second"]
    return [
        (
            name,
            f"{row['prefill_tokens_per_second']:.1f}",
            f"{row['decode_tokens_per_second']:.1f}",
            f"{row['decode_tokens_per_second'] / first:.2f}x",
            size(row["peak_memory_bytes"]),
        )
        for name, row in found["models"].items()
    ]
