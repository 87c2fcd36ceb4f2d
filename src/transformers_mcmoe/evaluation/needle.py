# SPDX-License-Identifier: Apache-2.0
"""A needle in a haystack: does a model find one sentence in a long text, by length of the text and depth of the sentence?

Knows models, tokenizers and texts. The haystack is any text, such as essays; the needle is a number of seven digits,
drawn anew for each cell, and is found if the greedy continuation of the question states it.
Source: the "single needle" task as Mixture Compressor (arXiv 2410.06270) reports it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from transformers_mcmoe.evaluation.protocol import dtype_of, evaluating, seed_of
from transformers_mcmoe.version import versions

CITIES = ("Lisbon", "Nairobi", "Kyoto", "Quito", "Oslo", "Hanoi", "Perth", "Tunis")
NEEDLE = " The secret number of {city} is {number}. "
QUESTION = "\nThe secret number of {city} is"
DIGITS = 7


@torch.no_grad()
def find_needles(
    model: Any,
    tokenizer: Any,
    haystack: str,
    *,
    lengths: Sequence[int],
    depths: int = 5,
    repeats: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Ask for a needle at every depth of texts of every length.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        haystack: text to hide it in; repeated where it is too short.
        lengths: tokens of a prompt, needle and question included.
        depths: how many, spread evenly from the beginning (0) to the end (1).
        repeats: prompts per cell, each with its own needle and piece of the haystack.
        seed: of needles and pieces.
        progress: is told how many prompts of how many are done.

    Returns:
        JSON-serialisable: `lengths`, `depths`, `found` [lengths][depths], the share of needles found, and `nll`, the mean
        negative log-likelihood of a needle's tokens in nats, which also tells models apart that find none.

    Raises:
        ValueError: there is no text, a length does not fit into the model or is shorter than needle and question.
    """
    ids = torch.tensor(tokenizer(haystack, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    if len(ids) == 0:
        raise ValueError("The haystack is empty; give it a text.")
    if depths < 1 or repeats < 1 or not lengths:
        raise ValueError(f"lengths={list(lengths)}, depths={depths}, repeats={repeats}: take at least one of each.")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    answer_tokens = 3 * DIGITS
    if isinstance(positions, int) and max(lengths) + answer_tokens > positions:
        raise ValueError(
            f"A prompt of {max(lengths)} tokens and its answer exceed the {positions} positions of this model; "
            "take shorter lengths."
        )
    shares = [i / (depths - 1) if depths > 1 else 0.5 for i in range(depths)]
    random_ = random.Random(seed)
    found: list[list[float]] = []
    nll: list[list[float]] = []
    with evaluating(model):
        for length in lengths:
            row: list[tuple[float, float]] = []
            for depth in shares:
                cells = []
                for _ in range(repeats):
                    prompt, answer = _prompt(tokenizer, ids, length, depth, random_)
                    cells.append(_ask(model, tokenizer, prompt, answer, answer_tokens))
                    if progress is not None:
                        progress(
                            len(found) * depths * repeats + len(row) * repeats + len(cells),
                            len(lengths) * depths * repeats,
                        )
                row.append((sum(hit for hit, _ in cells) / repeats, sum(value for _, value in cells) / repeats))
            found.append([hit for hit, _ in row])
            nll.append([value for _, value in row])
    return {
        "lengths": list(lengths),
        "depths": shares,
        "repeats": repeats,
        "found": found,
        "nll": nll,
        "protocol": {"needle": NEEDLE, "question": QUESTION, "digits": DIGITS, "dtype": dtype_of(model)},
        "needle_seed": seed,
        "seed": seed_of(model),
        "versions": versions(),
    }


def _prompt(tokenizer: Any, haystack: Tensor, length: int, depth: float, random_: random.Random) -> tuple[Tensor, str]:
    """Ids [length] with a needle at a depth, and its number."""
    city = random_.choice(CITIES)
    number = str(random_.randrange(10 ** (DIGITS - 1), 10**DIGITS))

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)

    needle, question = encode(NEEDLE.format(city=city, number=number)), encode(QUESTION.format(city=city))
    room = length - len(needle) - len(question)
    if room < 0:
        raise ValueError(
            f"A length of {length} tokens is shorter than needle and question; take at least {length - room}."
        )
    if len(haystack) < room:
        haystack = haystack.repeat(room // len(haystack) + 1)
    start = random_.randrange(len(haystack) - room + 1)
    piece = haystack[start : start + room]
    cut = round(depth * room)
    return torch.cat([piece[:cut], needle, piece[cut:], question]), number


def _ask(model: Any, tokenizer: Any, prompt: Tensor, number: str, new_tokens: int) -> tuple[float, float]:
    """Whether the continuation has the number, and the mean NLL of its tokens."""
    ids = prompt[None].to(model.device)
    answer = torch.tensor(tokenizer(f" {number}", add_special_tokens=False)["input_ids"], device=ids.device)
    logits = model(torch.cat([ids, answer[None]], 1), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    nll = float(functional.cross_entropy(logits, answer))
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id or 0}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options)
    return float(number in tokenizer.decode(output[0, len(prompt) :])), nll
