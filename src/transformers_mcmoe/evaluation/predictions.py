# SPDX-License-Identifier: Apache-2.0
"""Perplexity, and KL divergence and top-1 agreement to a reference model, on given tokens.

Logits are compared batch by batch and never stored. Knows models and tokens, not how a model was compressed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from transformers_mcmoe.evaluation.protocol import (
    Protocol,
    Window,
    as_json,
    check_batch,
    check_fits,
    dtype_of,
    evaluating,
    read_text,
    seed_of,
)

# logits of one forward pass; batches of more are split, down to one window
LOGITS = 1 << 27
# logits that are in float32 at a time, with a handful of temporaries of their size
CHUNK = 1 << 22


class TokenScores(NamedTuple):
    """What is measured of each of S predictions; what compares to a reference is None without one.

    Attributes:
        nll: [S] float64, negative log-likelihood of the token that comes, nats.
        top: [S] int64, the most likely token.
        reference_nll: [S] float64, the reference's.
        reference_top: [S] int64, the reference's.
        kl: [S] float64, KL divergence from the reference to the model, nats.
    """

    nll: Tensor
    top: Tensor
    reference_nll: Tensor | None = None
    reference_top: Tensor | None = None
    kl: Tensor | None = None

    def sums(self) -> Tensor:
        """[NLL, the reference's NLL, KL, agreements] float64."""
        if self.reference_nll is None or self.reference_top is None or self.kl is None:
            return torch.stack([self.nll.sum(), *torch.zeros(3, dtype=torch.float64)])
        same = (self.top == self.reference_top).sum().to(torch.float64)
        return torch.stack([self.nll.sum(), self.reference_nll.sum(), self.kl.sum(), same])


# is given a window and the scores of its scored tokens, `window.ids[window.given + 1 :]`
Observer = Callable[[Window, TokenScores], None]


@dataclass(frozen=True)
class Evaluation:
    """Means over all scored tokens; what compares to a reference is None without one.

    Standard errors are over windows, taken as independent, and None for a single window. They say how the figure
    would vary over other text of this kind, and nothing about other calibration data or seeds.

    Attributes:
        perplexity: exp of `nll`, inf beyond the range of a float.
        nll: negative log-likelihood in nats per token.
        reference_perplexity: the reference's perplexity.
        dnll: `nll` minus the reference's.
        dnll_se: its standard error.
        kl: KL divergence from the reference to the model in nats per token.
        kl_se: its standard error.
        top1: share of tokens whose most likely prediction equals the reference's.
        tokens: number of scored tokens.
        protocol: what other figures must share to be comparable.
        seed: the one the model was compressed with, None for a dense model.
    """

    perplexity: float
    nll: float
    reference_perplexity: float | None
    dnll: float | None
    dnll_se: float | None
    kl: float | None
    kl_se: float | None
    top1: float | None
    tokens: int
    protocol: Protocol
    seed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable: the figures, `protocol`, `seed` and `versions`; numbers that are not finite are None."""
        figures = {name: value for name, value in vars(self).items() if name not in ("protocol", "seed")}
        return as_json(self.protocol, self.seed, figures)


@torch.no_grad()
def evaluate(
    model: Any,
    tokens: Tensor,
    reference: Any = None,
    *,
    context: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    batch: int = 8,
    observe: Observer | None = None,
) -> Evaluation:
    """Score a causal language model on a text, alone or beside a reference.

    Args:
        model: a causal language model.
        tokens: [n] int ids of a text, cut as `windows` says; or [N, T], windows without overlap, of which every token
            but the first is scored.
        reference: the dense model, or None. It runs on each batch right after the model.
        context: tokens of a window; a text needs it, windows [N, T] state it themselves.
        stride: tokens from one window to the next; default `context`, no overlap.
        limit: windows to run, spread evenly over the text; default all.
        batch: windows per forward pass at most; fewer where their logits would be large.
        observe: is given every window with the scores of its tokens.

    Returns:
        Means over tokens, with log-softmax in float32 and sums in float64.

    Raises:
        ValueError: there are too few tokens, context, stride, limit or batch is out of range, a window exceeds the
            model's positions, or text, model and reference differ in vocabulary.
    """
    check_batch(batch)
    text = read_text(tokens, context, stride, limit)
    vocabulary = check_fits(text, model, reference)
    size = max(1, min(batch, LOGITS // (text.context * vocabulary)))
    sums: list[Tensor] = []
    with evaluating(model, reference):
        for group in text.batches(size):
            for window, scores in zip(group, _score_windows(model, reference, group), strict=True):
                sums.append(scores.sums())
                if observe is not None:
                    observe(window, scores)
    counts = [len(window.ids) - 1 - window.given for window in text.windows]
    return summary(model, reference, sums, counts, text.protocol(sum(counts), **dtypes_of(model, reference)))


def dtypes_of(model: Any, reference: Any) -> dict[str, str]:
    """What figures were computed in, for their protocol."""
    known = {"model": dtype_of(model), "log_softmax": "float32", "sums": "float64"}
    return known if reference is None else known | {"reference": dtype_of(reference)}


def summary(
    model: Any, reference: Any, sums: Sequence[Tensor], scored: Sequence[int], protocol: Protocol
) -> Evaluation:
    """Means over all windows, from the sums of each one's scores and how many there are."""
    counts = torch.tensor(scored, dtype=torch.float64)
    columns = torch.stack(list(sums)).unbind(1)
    nll, _ = _mean(columns[0], counts)
    expected = dnll = dnll_se = kl = kl_se = top1 = None
    if reference is not None:
        expected, _ = _mean(columns[1], counts)
        dnll, dnll_se = _mean(columns[0] - columns[1], counts)
        kl, kl_se = _mean(columns[2], counts)
        top1, _ = _mean(columns[3], counts)
    return Evaluation(
        perplexity=_exp(nll),
        nll=nll,
        reference_perplexity=_exp(expected) if expected is not None else None,
        dnll=dnll,
        dnll_se=dnll_se,
        kl=kl,
        kl_se=kl_se,
        top1=top1,
        tokens=sum(scored),
        protocol=protocol,
        seed=seed_of(model),
    )


def _score_windows(model: Any, reference: Any, group: Sequence[Window]) -> list[TokenScores]:
    """Scores of each of some windows of one length; the logits are freed on return."""
    ids = torch.stack([window.ids for window in group])
    first = min(window.given for window in group)
    ours = _logits(model, ids, first)
    dense = None
    if reference is not None:
        dense = ours if reference is model else _logits(reference, ids, first)
    found = []
    for row, window in enumerate(group):
        scored = slice(window.given - first, -1)
        expected = dense[row, scored] if dense is not None else None
        found.append(score(ours[row, scored], expected, window.ids[window.given + 1 :]))
    return found


def _logits(model: Any, ids: Tensor, first: int) -> Tensor:
    """[N, T - first, V], from position `first` on."""
    keep = ids.shape[1] - first
    options = {}
    if first and "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = keep
    return model(input_ids=ids.to(model.device), use_cache=False, **options).logits[:, -keep:]


def score(logits: Tensor, reference: Tensor | None, targets: Tensor) -> TokenScores:
    """Scores of S predictions.

    Args:
        logits: [S, V].
        reference: [S, V] or None.
        targets: [S] int64.
    """
    parts: list[list[Tensor]] = []
    size = max(1, CHUNK // logits.shape[-1])
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        scores = functional.log_softmax(logits[part].to(torch.float32), dim=-1)
        target = targets[part, None].to(scores.device)
        found = [-scores.gather(-1, target)[:, 0].to(torch.float64), scores.argmax(-1)]
        if reference is not None:
            expected = functional.log_softmax(reference[part].to(scores.device, torch.float32), dim=-1)
            kl = functional.kl_div(scores, expected, log_target=True, reduction="none")
            found += [-expected.gather(-1, target)[:, 0].to(torch.float64), expected.argmax(-1)]
            found.append(kl.sum(-1, dtype=torch.float64))
        parts.append(found)
    return TokenScores(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _mean(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """Mean per token and its standard error over windows, from each window's sum and count [N] float64.

    Windows of unequal counts are weighted by them: the linearised error of a ratio (Cochran, Sampling Techniques,
    section 6.4); with equal counts it is the deviation of the windows' means over the root of their number.
    """
    mean = sums.sum() / counts.sum()
    n = len(sums)
    if n < 2:
        return float(mean), None
    variance = (sums - mean * counts).square().sum() * n / (n - 1)
    return float(mean), float(variance.sqrt() / counts.sum())


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
