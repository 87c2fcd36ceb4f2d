# SPDX-License-Identifier: Apache-2.0
"""Items of benchmarks/hard_tasks.py: what is asked can be answered from the prompt, and only the right answer counts."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from example_data import EXAMPLES
from transformers import AutoTokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tasks():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import hard_tasks

        yield hard_tasks


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLES / "demo-mixtral")


@pytest.fixture(scope="module")
def maker(tasks, tokenizer):
    return tasks.Maker(tokenizer, (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8"), seed=0)


def answering(answer):
    """A model that expects the tokens of one answer at the end of whatever it reads."""

    def run(ids, use_cache):
        logits = torch.zeros(1, ids.shape[1], 5000)
        for n, token in enumerate(answer):
            logits[0, ids.shape[1] - 1 - len(answer) + n, token] = 9.0
        return SimpleNamespace(logits=logits)

    return run


def test_items_can_be_answered(tasks, tokenizer, maker):
    for _ in range(20):
        item = maker.copy()
        once, twice, again = tokenizer.decode(item.prompt).split(".\n")
        assert once == twice
        assert again.split() == once.split()[:2]
        assert tokenizer.decode(item.answers[0]).split() == once.split()[2:]
        item = maker.arithmetic()
        shown = [int(number) for number in tokenizer.decode(item.prompt).strip(",").split(",")]
        assert {b - a for a, b in pairwise(shown)} == {int(tokenizer.decode(item.answers[0]).strip(",")) - shown[-1]}
        item = maker.needle()
        text = tokenizer.decode(item.prompt)
        question, number = text.splitlines()[-1], tokenizer.decode(item.answers[0]).strip()
        assert f"{question.strip()} {number}." in text
        item = maker.cloze()
        assert tokenizer.decode(item.answers[0]).strip()
        item = maker.choice()
        assert [len(answer) for answer in item.answers] == [tasks.CONTINUATION] * tasks.CHOICES


@pytest.mark.parametrize("task", ["choice", "cloze", "copy", "arithmetic", "needle"])
def test_only_the_right_answer_counts(maker, task):
    item = getattr(maker, task)()
    assert item.solved(answering(item.answers[0]))
    wrong = item.answers[1] if len(item.answers) > 1 else [token + 1 for token in item.answers[0]]
    assert not item.solved(answering(wrong))


def test_items_that_the_dense_model_solves(tasks, maker, monkeypatch):
    tried = []

    def every_other(item, model):
        tried.append(item)
        return len(tried) % 2 == 0

    monkeypatch.setattr(tasks.Item, "solved", every_other)
    assert list(tasks.items(maker, "choice", None, wanted=2, tried=10)) == [tried[1], tried[3]]
    assert len(tried) == 4
    assert len(list(tasks.items(maker, "choice", None, wanted=9, tried=6))) == 3
