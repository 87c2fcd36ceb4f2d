# SPDX-License-Identifier: Apache-2.0
"""Classes of tokens, and what each costs."""

import copy

import pytest
import torch
from tiny import tiny_model, tokens

from transformers_mcmoe.evaluation import TokenClasses, Window, evaluate
from transformers_mcmoe.evaluation.predictions import TokenScores
from transformers_mcmoe.evaluation.token_classes import WORST, kinds_of


class Letters:
    """A tokenizer whose ids are characters."""

    def decode(self, ids):
        return "".join(chr(32 + i % 90) for i in ids)

    def convert_ids_to_tokens(self, token):
        return chr(32 + token % 90)


def test_kinds():
    text = [
        "We",
        " met",
        " Ada",
        " in",
        " 18",
        "43",
        ",",
        " then",
        " left",
        ".",
        " She",
        " wrote",
        "\n",
        "x",
        " =",
        " f",
        "(",
        "1",
        ")",
        "\n",
        "end",
    ]
    kinds = kinds_of(text)
    assert kinds[:4] == ["words", "words", "names", "words"]
    assert kinds[4:7] == ["digits", "digits", "punctuation"]
    assert kinds[9:11] == ["punctuation", "words"]  # a capital that begins a sentence is no name
    assert kinds[13:19] == ["code"] * 6
    assert kinds[-1] == "words"
    fenced = kinds_of(["a", "\n", "```", "\n", "plain", "\n", "```", "\n", "b"])
    assert fenced == ["words", "words", *["code"] * 6, "words"]


@torch.no_grad()
def test_classes_add_up_to_the_evaluation():
    dense = tiny_model("mixtral")
    other = copy.deepcopy(dense)
    other.lm_head.weight += 0.3 * torch.randn_like(other.lm_head.weight)
    text = tokens(1, 200)[0]
    classes = TokenClasses(Letters(), text)
    score = evaluate(other, text, dense, context=32, stride=16, observe=classes)
    found = classes.to_dict()
    for partition in ("type", "frequency", "position"):
        rows = found["classes"][partition].values()
        assert sum(row["tokens"] for row in rows) == score.tokens
        assert sum(row["tokens"] * row["kl"] for row in rows) == pytest.approx(score.kl * score.tokens)
        assert sum(row["tokens"] * row["top1"] for row in rows) == pytest.approx(score.top1 * score.tokens)
        assert sum(row["kl_share"] for row in rows) == pytest.approx(1.0)
    assert list(found["classes"]["position"]) == ["0-15", "16-63"]
    assert found["classes"]["position"]["0-15"]["tokens"] == 15
    assert len(found["worst"]) == WORST
    assert [entry["kl"] for entry in found["worst"]] == sorted((e["kl"] for e in found["worst"]), reverse=True)


def test_the_worst_contexts_are_those_of_the_largest_divergence():
    ids = torch.arange(40)
    kl = torch.zeros(39, dtype=torch.float64)
    kl[7], kl[30] = 5.0, 9.0
    top, other = torch.arange(1, 40), torch.arange(2, 41)
    classes = TokenClasses(Letters(), ids)
    classes(Window(ids, 0), TokenScores(kl, top, kl, other, kl))
    worst = classes.to_dict()["worst"]
    assert [entry["position"] for entry in worst[:2]] == [31, 8]
    first = worst[0]
    letters = Letters().decode
    assert (first["token"], first["predicted"], first["reference_predicted"]) == tuple(
        letters([i]) for i in (31, 31, 32)
    )
    assert first["context"] == letters(range(31 - 24, 31))
    assert classes.to_dict()["classes"]["type"].keys() <= {"code", "digits", "names", "punctuation", "words"}


def test_errors():
    model = tiny_model("mixtral")
    classes = TokenClasses(Letters(), tokens(1, 40))
    with pytest.raises(ValueError, match="No token"):
        classes.to_dict()
    with pytest.raises(ValueError, match="compare with the dense model"):
        evaluate(model, tokens(1, 40)[0], context=16, observe=classes)
