# SPDX-License-Identifier: Apache-2.0
"""Tasks on which perplexity is blind: items that the dense model gets right, and how many of them others still do.

Items are made from a local text by a seed: the true continuation among others from elsewhere in the text (`choice`), the last
word of a passage (`cloze`), a list of words that is repeated (`copy`), the next number of an arithmetic progression
(`arithmetic`), a number hidden in a long text (`needle`). All but `choice` are right if every token of the answer is the likeliest. Items that the
dense model gets wrong are dropped. Rows go to results/hard_tasks.jsonl; `--docs` writes
docs/hard_tasks.md from all rows there are.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import here
from transformers import AutoModelForCausalLM, AutoTokenizer

RESULTS = Path(__file__).parent / "results" / "hard_tasks.jsonl"
DOCS = Path(__file__).parent.parent / "docs" / "hard_tasks.md"
TASKS = ("choice", "cloze", "copy", "arithmetic", "needle")
CONTEXT, CONTINUATION, CHOICES = 192, 12, 4
NEEDLE_LENGTH = 700


@dataclass(frozen=True)
class Item:
    """A prompt and answers, token ids; the first answer is the right one. One answer: its tokens must be the likeliest."""

    prompt: list[int]
    answers: list[list[int]]

    @torch.no_grad()
    def solved(self, model: Any) -> bool:
        """Whether a model gets it right."""
        scores = []
        for answer in self.answers:
            ids = torch.tensor([self.prompt + answer])
            logits = model(ids, use_cache=False).logits[0, len(self.prompt) - 1 : -1].float()
            if len(self.answers) == 1:
                return bool((logits.argmax(-1) == ids[0, len(self.prompt) :]).all())
            scores.append(float(logits.log_softmax(-1).gather(1, ids[0, len(self.prompt) :, None]).sum()))
        return scores.index(max(scores)) == 0


class Maker:
    """Makes items of a text."""

    def __init__(self, tokenizer: Any, text: str, seed: int) -> None:
        self._tokenizer, self._random = tokenizer, random.Random(seed)
        self._ids = self._encode(text)
        self._words = sorted(
            {word for word in text.split() if word.isalpha() and word.islower() and 3 < len(word) < 9}
        )

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _piece(self, length: int) -> list[int]:
        start = self._random.randrange(len(self._ids) - length)
        return self._ids[start : start + length]

    def choice(self) -> Item:
        piece = self._piece(CONTEXT + CONTINUATION)
        others = [self._piece(CONTINUATION) for _ in range(CHOICES - 1)]
        return Item(piece[:CONTEXT], [piece[CONTEXT:], *others])

    def cloze(self) -> Item:
        """A word that begins a token of its own and ends where the next word begins."""
        while True:
            piece = self._piece(CONTEXT + 8)
            pieces = [self._tokenizer.decode([token]) for token in piece]
            end = next((n for n in range(CONTEXT + 1, len(piece)) if pieces[n].startswith(" ")), None)
            if end is not None and pieces[CONTEXT].startswith(" ") and pieces[CONTEXT].strip().isalpha():
                return Item(piece[:CONTEXT], [piece[CONTEXT:end]])

    def copy(self) -> Item:
        words = self._random.sample(self._words, 8)
        listed = " ".join(words)
        shown = self._encode(f"{listed}.\n{listed}.\n{' '.join(words[:2])}")
        return Item(shown, [self._encode(" " + " ".join(words[2:]))])

    def arithmetic(self) -> Item:
        start, step = self._random.randrange(1, 30), self._random.randrange(2, 13)
        *shown, last = range(start, start + 8 * step, step)
        return Item(self._encode(", ".join(map(str, shown)) + ","), [self._encode(f" {last},")])

    def needle(self) -> Item:
        number = self._random.randrange(1000, 10000)
        city = self._random.choice(("Lisbon", "Nairobi", "Kyoto", "Quito", "Oslo", "Hanoi", "Perth", "Tunis"))
        hay = self._piece(NEEDLE_LENGTH)
        cut = self._random.randrange(len(hay))
        needle = self._encode(f" The secret number of {city} is {number}. ")
        question = self._encode(f"\nThe secret number of {city} is")
        return Item([*hay[:cut], *needle, *hay[cut:], *question], [self._encode(f" {number}")])


def items(maker: Maker, task: str, dense: Any, wanted: int, tried: int) -> Iterator[Item]:
    """Items that the dense model solves: `wanted` of them, or those among `tried`."""
    found = 0
    for _ in range(tried):
        item = getattr(maker, task)()
        if item.solved(dense):
            yield item
            found += 1
            if found == wanted:
                return


def load(folder: Path) -> Any:
    """A model, packed or dense, without expert pruning."""
    from transformers_mcmoe import MCMoEConfig

    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    options = {}
    if told.get("quantization_config", {}).get("quant_method") == "mcmoe":
        options["quantization_config"] = MCMoEConfig(odp=False, otp=False)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def variants(model: Any, tokenizer: Any, calibration: Path | None) -> Iterator[str]:
    """The model as it is, "", and, given a calibration text, with rule-based and with learned expert pruning."""
    from transformers_mcmoe import set_expert_pruning, train_expert_pruning

    yield ""
    if calibration is not None:
        data: dict[str, Any] = {
            "dataset": str(calibration),
            "tokenizer": tokenizer,
            "num_samples": 16,
            "seq_len": 1024,
        }
        set_expert_pruning(model, **data)
        yield " + ODP"
        train_expert_pruning(model, **data)
        yield " + OTP"


def main() -> None:
    """Append a row per model, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dense", type=Path, help="folder of the dense checkpoint")
    parser.add_argument("--text", type=Path, help="text that items are made of; calibration must not have seen it")
    parser.add_argument(
        "--models", nargs="+", default=[], help="NAME=FOLDER of packed models, or of outputs of peers/"
    )
    parser.add_argument("--pruned", nargs="*", default=[], help="names of packed models to measure with pruning, too")
    parser.add_argument("--calibration", type=Path, help="text that the pruning is calibrated and trained on")
    parser.add_argument("--items", type=int, default=100, help="per task, all of which the dense model solves")
    parser.add_argument("--tried", type=int, default=400, help="per task, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--docs", action="store_true", help="write docs/hard_tasks.md from the committed rows, and stop"
    )
    options = parser.parse_args()
    if options.docs:
        write_docs()
        return
    dense = AutoModelForCausalLM.from_pretrained(options.dense, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.dense)
    maker = Maker(tokenizer, options.text.read_text(encoding="utf-8"), options.seed)
    sets = {task: list(items(maker, task, dense, options.items, options.tried)) for task in TASKS}
    del dense
    print({task: len(own) for task, own in sets.items()}, flush=True)
    for named in options.models:
        name, _, folder = named.partition("=")
        model = load(Path(folder))
        for variant in variants(model, tokenizer, options.calibration if name in options.pruned else None):
            solved = {task: sum(item.solved(model) for item in own) for task, own in sets.items()}
            row = {"row": name + variant, "model": options.dense.name, "text": options.text.name, "seed": options.seed}
            row |= {"items": {task: len(own) for task, own in sets.items()}, "solved": solved} | here()
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(row["row"], solved, flush=True)


def write_docs() -> None:
    """docs/hard_tasks.md: one table per dense model and text, the newest row of each name."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    newest = {(row["model"], row["text"], row["row"]): row for row in rows}
    parts = [HEAD]
    for key in dict.fromkeys(key[:2] for key in newest):
        table = [row for k, row in newest.items() if k[:2] == key]
        counts = table[-1]["items"]
        parts.append(f"## {key[0]}, items of {key[1]}\n")
        parts.append("| model | " + " | ".join(f"{task} ({counts[task]})" for task in TASKS) + " | all |")
        parts.append("|---|" + "---|" * (len(TASKS) + 1))
        for row in sorted(table, key=lambda row: -sum(row["solved"].values())):
            cells = [f"{100 * row['solved'][task] / max(row['items'][task], 1):.0f} %" for task in TASKS]
            everything = 100 * sum(row["solved"].values()) / sum(row["items"].values())
            parts.append(f"| {row['row']} | {' | '.join(cells)} | {everything:.1f} % |")
        parts.append("")
    DOCS.write_text("\n".join(parts), encoding="utf-8")


HEAD = """# Hard tasks, measured

Written by `python benchmarks/hard_tasks.py --docs` from `benchmarks/results/hard_tasks.jsonl`. Items are made from text that
calibration never saw, and only those count that the dense model solves, so that it has 100 % everywhere; in brackets, how many they are. `choice`: the true
continuation of 12 tokens among three others, by likelihood. The others are right if every token of the answer is the likeliest: `cloze`, the
next word of a passage; `copy`, the last six words of a list of eight that was shown twice; `arithmetic`, the next number of a progression after seven; `needle`,
a number of four digits hidden in 700 tokens. A share of n items has a standard error of sqrt(p (1 - p) / n).
"""

if __name__ == "__main__":
    main()
