# SPDX-License-Identifier: Apache-2.0
"""Which tokens compression costs most: KL divergence by class of token, and the contexts of the worst.

Knows ids, their text and scores; it runs no model.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from transformers_mcmoe.evaluation.predictions import TokenScores
from transformers_mcmoe.evaluation.protocol import Window

WORST = 20
# tokens of text before a bad prediction that are shown
CONTEXT = 24
# ranks of a token's id by how often it comes in the text: the bounds of buckets
RANKS = (100, 1000)
# tokens before a prediction in its window: the bounds of buckets
POSITIONS = (16, 64, 256, 1024)
_CODE = re.compile(
    r"^\s*(>>>|\.\.\.\s|def \w|class \w+[(:]|import \w|from \w+ import|return\b|#include|@\w+\s*$)"
    r"|[;{]\s*$|\w\(.*\)\s*[:;]?\s*$|^\s*\w[\w.\[\]]*\s*[-+*/|&]?=\s*\S"
)
_CLASSES = {
    "type": "the first that fits: code (the line looks like it), digits, punctuation, names (a capital inside a sentence), words",
    "frequency": f"rank of the token in the text by count: the {RANKS[0]} commonest, up to {RANKS[1]:,}, rarer",
    "position": "tokens of the window before it",
}


class TokenClasses:
    """Adds up scores by class of the token that was to be predicted; an observer of `evaluate`.

    Args:
        tokenizer: turns ids into text.
        tokens: the text's ids, of any shape; ranks of frequency are those in it.
    """

    def __init__(self, tokenizer: Any, tokens: Tensor) -> None:
        self._tokenizer = tokenizer
        counts = Counter(tokens.flatten().tolist())
        self._rank = {token: rank for rank, (token, _) in enumerate(counts.most_common())}
        self._pieces: dict[int, str] = {}
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._worst: list[tuple[float, int, dict[str, Any]]] = []
        self._seen = 0

    def __call__(self, window: Window, scores: TokenScores) -> None:
        """Add a window.

        Raises:
            ValueError: the scores have no reference.
        """
        if scores.kl is None or scores.reference_top is None:
            raise ValueError("Classes of tokens compare with the dense model; give evaluate a reference.")
        ids = window.ids.tolist()
        kinds = kinds_of([self._piece(token) for token in ids])
        same = scores.top == scores.reference_top
        for i in range(len(scores.kl)):
            at = window.given + 1 + i
            kl, agree = float(scores.kl[i]), float(same[i])
            row = torch.tensor([1.0, kl, agree], dtype=torch.float64)
            rank = self._rank.get(ids[at], len(self._rank))
            for key in (
                ("type", kinds[at]),
                ("frequency", _bucket(rank, RANKS, 1)),
                ("position", _bucket(at, POSITIONS)),
            ):
                self._sums[key] = self._sums.get(key, 0) + row
            self._keep(kl, ids, at, int(scores.top[i]), int(scores.reference_top[i]))

    def _keep(self, kl: float, ids: list[int], at: int, top: int, reference_top: int) -> None:
        """One of the worst so far?"""
        self._seen += 1
        if len(self._worst) == WORST and kl <= self._worst[0][0]:
            return
        decode = self._tokenizer.decode
        entry = {
            "kl": kl,
            "context": decode(ids[max(0, at - CONTEXT) : at]),
            "token": decode([ids[at]]),
            "predicted": decode([top]),
            "reference_predicted": decode([reference_top]),
            "position": at,
        }
        heapq.heappush(self._worst, (kl, -self._seen, entry))
        if len(self._worst) > WORST:
            heapq.heappop(self._worst)

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            piece = self._tokenizer.decode([token])
            # SentencePiece strips the space that a word begins with
            raw = self._tokenizer.convert_ids_to_tokens(token)
            starts = isinstance(raw, str) and raw.startswith("\u2581") and not piece.startswith(" ")
            self._pieces[token] = " " + piece if starts else piece
        return self._pieces[token]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable: per partition its classes with `tokens`, mean `kl`, `kl_share` of all and `top1`; `worst`."""
        if not self._sums:
            raise ValueError("No token has been scored yet; run evaluate with this as observe=.")
        total = sum(float(row[1]) for (partition, _), row in self._sums.items() if partition == "type")
        found: dict[str, Any] = {partition: {} for partition in _CLASSES}
        for (partition, name), (count, kl, agree) in sorted(self._sums.items(), key=lambda item: _order(item[0])):
            found[partition][name] = {
                "tokens": int(count),
                "kl": float(kl / count),
                "kl_share": float(kl) / total if total else 0.0,
                "top1": float(agree / count),
            }
        worst = [entry for _, _, entry in sorted(self._worst, key=lambda item: (-item[0], -item[1]))]
        return {"classes": found, "definitions": _CLASSES, "worst": worst}


def kinds_of(pieces: Iterable[str]) -> list[str]:
    """The type of every token of a text: "code", "digits", "punctuation", "names" or "words".

    Args:
        pieces: text of each token, in order.
    """
    pieces = list(pieces)
    text = "".join(pieces)
    code = _code_lines(text)
    found, at, line = [], 0, 0
    sentence_starts = True
    for piece in pieces:
        word = piece.strip()
        # the line that its first visible character stands in
        here = line + piece[: len(piece) - len(piece.lstrip())].count("\n") if word else line
        if here in code:
            kind = "code"
        elif any(c.isdigit() for c in word):
            kind = "digits"
        elif word and not any(c.isalnum() for c in word):
            kind = "punctuation"
        elif word[:1].isupper() and not sentence_starts and (piece[0].isspace() or not text[at - 1 : at].isalnum()):
            kind = "names"
        else:
            kind = "words"
        found.append(kind)
        if word:
            sentence_starts = word[-1] in ".!?:\"'([" and (sentence_starts or word[-1] in ".!?:")
        sentence_starts = sentence_starts or "\n" in piece
        at += len(piece)
        line += piece.count("\n")
    return found


def _code_lines(text: str) -> set[int]:
    """Numbers of the lines that look like source code, and those between fences."""
    found, fenced = set(), False
    for number, line in enumerate(text.split("\n")):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            found.add(number)
        elif fenced or _CODE.search(line):
            found.add(number)
    return found


def _bucket(value: int, bounds: Iterable[int], first: int = 0) -> str:
    """The bucket of a value >= 0, "low-high", both counted from `first`; the last one has no end."""
    low = 0
    for bound in bounds:
        if value < bound:
            return f"{low + first}-{bound - 1 + first}"
        low = bound
    return f"{low + first}-"


def _order(key: tuple[str, str]) -> tuple[str, int, str]:
    partition, name = key
    number = re.match(r"\d+", name)
    return partition, int(number.group()) if number else 0, name
