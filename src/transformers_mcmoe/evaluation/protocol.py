# SPDX-License-Identifier: Apache-2.0
"""How a text is cut into windows, which of its tokens are scored, and what a figure needs beside it to be compared.

Knows tokens and the limits that a model's config states; it runs no model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transformers_mcmoe.version import versions


class Window(NamedTuple):
    """A piece of text that a model reads at once.

    Attributes:
        ids: [T] int64.
        given: how many of its T - 1 predictions come first and are not scored, because an earlier window scored them.
    """

    ids: Tensor
    given: int


@dataclass(frozen=True)
class Protocol:
    """What figures must share to be comparable.

    Attributes:
        context: tokens of a window; the last one may be shorter.
        stride: tokens from one window to the next.
        windows: windows that were run.
        of_windows: windows that the text has; `windows` are spread evenly over them.
        tokens: predictions that were scored, or positions whose hidden states were compared.
        dtypes: of the weights of "model" and "reference", of "log_softmax" and of "sums", where there are such.
    """

    context: int
    stride: int
    windows: int
    of_windows: int
    tokens: int
    dtypes: dict[str, str]


def windows(tokens: Tensor, context: int, stride: int | None = None) -> list[Window]:
    """Cut a text into windows so that no token is scored twice.

    With stride < context every token but the first is scored once, and each after the first window has at least
    context - stride tokens before it. With stride == context nothing precedes a window's first token, which is
    not scored. The last window ends with the text and may be shorter; of a single token left over nothing is scored.

    Args:
        tokens: [n] ids, n >= context.
        context: tokens of a window, at least 2.
        stride: tokens from one window to the next, 1 to `context`; default `context`.

    Returns:
        The windows, views of `tokens`.

    Raises:
        ValueError: `tokens` is not [n] or has fewer tokens than a window, or context or stride is out of range.
    """
    stride = context if stride is None else stride
    if context < 2:
        raise ValueError(f"context={context} leaves nothing to predict; take at least 2.")
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride} is not between 1 and context={context}; larger strides would skip tokens.")
    if tokens.dim() != 1:
        raise ValueError(f"The text must be one sequence of ids [n], but its shape is {tuple(tokens.shape)}.")
    if len(tokens) < context:
        raise ValueError(f"The text has {len(tokens)} tokens, too few for context={context}; give more, or lower it.")
    found: list[Window] = []
    end = 0
    for start in range(0, len(tokens) - 1, stride):
        ids = tokens[start : start + context]
        found.append(Window(ids, max(end - start - 1, 0)))
        end = start + len(ids)
        if end == len(tokens):
            break
    return found


@dataclass(frozen=True)
class Text:
    """The windows to run, and where they come from."""

    windows: list[Window]
    of_windows: int
    context: int
    stride: int

    def batches(self, size: int) -> Iterator[list[Window]]:
        """At most `size` windows of one length at a time."""
        for _, group in itertools.groupby(self.windows, key=lambda window: len(window.ids)):
            same = list(group)
            yield from (same[start : start + size] for start in range(0, len(same), size))

    def protocol(self, tokens: int, **dtypes: str) -> Protocol:
        """The protocol of figures over this text."""
        return Protocol(self.context, self.stride, len(self.windows), self.of_windows, tokens, dtypes)


def read_text(tokens: Tensor, context: int | None, stride: int | None, limit: int | None) -> Text:
    """The windows of a text [n], or of windows [N, T] that the caller cut, in int64.

    Raises:
        ValueError: shape, context, stride or limit do not go together.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no window; take at least 1, or None for all.")
    if tokens.is_floating_point() or tokens.is_complex():
        raise ValueError(f"Tokens must be integer ids, but their dtype is {tokens.dtype}.")
    tokens = tokens.to(torch.int64)
    if tokens.dim() == 1:
        if context is None:
            raise ValueError("A text [n] needs a context: the figures depend on it; give context=, and stride=.")
        found, stride = windows(tokens, context, stride), stride or context
    elif tokens.dim() != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise ValueError(f"Windows must be [N, T] with T >= 2, but their shape is {tuple(tokens.shape)}.")
    elif context is not None or stride is not None:
        raise ValueError(
            f"Tokens of shape {tuple(tokens.shape)} are windows already, but context={context} and stride={stride} "
            "cut a text; give it as [n], or leave them out."
        )
    else:
        found = [Window(ids, 0) for ids in tokens]
        context = stride = tokens.shape[1]
    count = len(found)
    if limit is not None and limit < count:
        found = [found[i * count // limit] for i in range(limit)]
    return Text(found, count, context, stride)


def check_fits(text: Text, model: Any, reference: Any) -> int:
    """The size of the vocabulary that model, reference (or None) and text share.

    Raises:
        ValueError: a window is longer than a model's positions, the vocabularies differ, or an id is in neither.
    """
    sizes = []
    for one in (model, reference):
        if one is None:
            continue
        config = one.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if isinstance(positions, int) and text.context > positions:
            raise ValueError(f"Windows of {text.context} tokens exceed the {positions} positions of this model.")
        sizes.append(int(config.vocab_size))
    if sizes[0] != sizes[-1]:
        raise ValueError(
            f"The model has a vocabulary of {sizes[0]} and the reference one of {sizes[1]}; give the dense model that "
            "it was compressed from."
        )
    low = min(int(window.ids.min()) for window in text.windows)
    high = max(int(window.ids.max()) for window in text.windows)
    if low < 0 or high >= sizes[0]:
        raise ValueError(
            f"The text has ids from {low} to {high}, but the model knows 0 to {sizes[0] - 1}; use its own tokenizer."
        )
    return sizes[0]


def check_batch(batch: int) -> None:
    """Raise ValueError if a batch would be empty."""
    if batch < 1:
        raise ValueError(f"batch={batch} runs nothing; take at least 1.")


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """While open, all modules are in eval mode: no dropout, no router noise."""
    training = [module for model in models if model is not None for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def dtype_of(model: Any) -> str:
    """Dtype of a model's dense weights, "float32"."""
    return str(model.dtype).removeprefix("torch.")


def seed_of(model: Any) -> int | None:
    """The seed that a model was compressed with; None if it is dense."""
    config = getattr(model.config, "quantization_config", None)
    return config.get("seed") if isinstance(config, dict) else getattr(config, "seed", None)


def as_json(protocol: Protocol, seed: int | None, figures: dict[str, Any]) -> dict[str, Any]:
    """A JSON-serialisable dict of figures and what they need beside them; numbers that are not finite become None."""
    return {"protocol": asdict(protocol), "seed": seed, "versions": versions(), **_finite(figures)}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
