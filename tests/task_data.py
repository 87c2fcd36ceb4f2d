# SPDX-License-Identifier: Apache-2.0
"""Small local data sets in the layout and with the columns that lm-eval's tasks read on the Hub; all rows are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
ROWS = 6


def write(folder: Path, name: str, configs: dict[str, dict[str, Rows]]) -> None:
    """A data set: configuration -> split -> rows."""
    root = folder / name
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            file = root / config / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            lines += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (root / "README.md").write_text("\n".join([*lines, "---", ""]))


def write_paper(folder: Path) -> None:
    """The eight sets of the group "paper"."""
    n = range(ROWS)
    both = ("train", "validation", "test")

    def splits(rows: Rows) -> dict[str, Rows]:
        return dict.fromkeys(both, rows)

    write(
        folder,
        "baber/piqa",
        {"default": splits([{"goal": f"open {i}", "sol1": "a b", "sol2": "c", "label": i % 2} for i in n])},
    )
    arc = [
        {
            "question": f"What is {i}?",
            "choices": {"text": ["one", "two", "three"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[i % 3],
        }
        for i in n
    ]
    write(folder, "allenai/ai2_arc", {"ARC-Easy": splits(arc), "ARC-Challenge": splits(arc)})
    boolq = [{"passage": "A list is a sequence.", "question": f"is {i} a list", "idx": i, "label": i % 2} for i in n]
    write(folder, "aps/super_glue", {"boolq": splits(boolq)})
    hellaswag = [
        {
            "ind": i, "activity_label": "Reading", "ctx_a": "He opens a file.", "ctx_b": "he", "ctx": "He opens a file. he",
            "endings": ["reads it.", "eats it.", "sings it.", "folds it."], "source_id": "", "split": "val",
            "split_type": "indomain", "label": str(i % 4),
        }
        for i in n
    ]  # fmt: skip
    write(folder, "Rowan/hellaswag", {"default": splits(hellaswag)})
    winogrande = [
        {
            "sentence": "The list holds the set because _ is larger.",
            "option1": "the list",
            "option2": "the set",
            "answer": str(1 + i % 2),
        }
        for i in n
    ]
    write(folder, "allenai/winogrande", {"winogrande_xl": splits(winogrande)})
    mathqa = [
        {
            "Problem": f"{i} plus one?",
            "Rationale": "",
            "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5",
            "correct": "abcde"[i % 5],
        }
        for i in n
    ]
    write(folder, "regisss/math_qa", {"default": splits(mathqa)})
    subjects = _subsets("mmlu/default")
    rows = [{"question": f"What is {i}?", "subject": "x", "choices": ["0", "1", "2", "3"], "answer": i % 4} for i in n]
    write(folder, "cais/mmlu", {subject: {"test": rows[:2], "dev": rows} for subject in subjects})


def _subsets(folder: str) -> list[str]:
    """The names of data that lm-eval's own tasks in a folder ask for."""
    import lm_eval

    files = (Path(lm_eval.__file__).parent / "tasks" / folder).glob("*.yaml")
    lines = [line.split(":") for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted({line[1].strip(" \"'") for line in lines if line[0].strip(" \"'") == "dataset_name"})


def write_hard(folder: Path) -> None:
    """GSM8K and HumanEval; the first problem of HumanEval is solved by an empty continuation."""
    gsm = [{"question": f"What is {i} and 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(ROWS)]
    write(folder, "openai/gsm8k", {"main": {"train": gsm, "test": gsm[:2]}})
    humaneval = [
        {
            "task_id": f"Made/{i}", "prompt": f"def f(x):\n    return x + {i}\n", "entry_point": "f",
            "canonical_solution": "", "test": "def check(f):\n    assert f(1) == 1",
        }
        for i in range(2)
    ]  # fmt: skip
    write(folder, "openai/openai_humaneval", {"openai_humaneval": {"test": humaneval}})


def write_longbench(folder: Path) -> None:
    """All subsets of LongBench."""
    row = {
        "input": "Which?", "context": "A list is a sequence. Paragraph 1: text.", "answers": ["Paragraph 1 段落1"], "length": 9,
        "dataset": "x", "language": "en", "all_classes": ["Paragraph 1", "other"], "_id": "0",
        "question": "Which?",
    }  # fmt: skip
    write(folder, "Xnhyacinth/LongBench", {name: {"test": [row]} for name in _subsets("longbench")})
