# SPDX-License-Identifier: Apache-2.0
"""Speed, needles and the record of what was measured."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_mcmoe.evaluation import find_needles, load_record, measure_speed, write_record
from transformers_mcmoe.evaluation.needle import _prompt
from transformers_mcmoe.evaluation.record import EVALUATION_NAME, merged

DEMO = Path(__file__).parent.parent / "examples" / "demo-mixtral"


def test_speed():
    models = {"one": tiny_model("mixtral"), "two": tiny_model("mixtral")}
    found = json.loads(json.dumps(measure_speed(models, prompt=24, new_tokens=5, rounds=2, batch=2)))
    assert set(found["models"]) == {"one", "two"}
    for row in found["models"].values():
        assert row["decode_tokens_per_second"] > 0
        assert row["prefill_tokens_per_second"] == pytest.approx(48 / row["first_token_seconds"], rel=0.5)
        assert row["peak_memory_bytes"] > 1 << 20
    assert found["protocol"]["prompt"] == 24
    assert found["machine"]["cpus"] >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_tokens": 1}, "new_tokens=1 is too small"),
        ({"rounds": 0}, "rounds=0"),
        ({"prompt": 126, "new_tokens": 5}, "exceed the 128 positions"),
    ],
)
def test_errors_of_speed(options, message):
    with pytest.raises(ValueError, match=message):
        measure_speed({"model": tiny_model("mixtral")}, **options)


@pytest.fixture(scope="module")
def demo():
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32), AutoTokenizer.from_pretrained(DEMO)


class Finder:
    """A model that answers with the last number it was told; everything else is the demo model's."""

    def __init__(self, model, tokenizer):
        self._model, self._tokenizer = model, tokenizer
        self.config, self.device, self.dtype = model.config, model.device, model.dtype

    def modules(self):
        return self._model.modules()

    def __call__(self, *args, **kwargs):
        return self._model(*args, **kwargs)

    def generate(self, ids, **kwargs):
        text = self._tokenizer.decode(ids[0])
        number = text.partition(" is ")[2][:8] if "secret number" in text.partition(" is ")[0] else "?"
        return torch.cat([ids, torch.tensor([self._tokenizer(number)["input_ids"]])], 1)


def test_needles(demo):
    model, tokenizer = demo
    steps = []
    options = {"lengths": [64, 96], "depths": 3, "repeats": 2, "progress": lambda *step: steps.append(step)}
    found = find_needles(Finder(model, tokenizer), tokenizer, "A list holds values. " * 50, **options)
    assert found["found"] == [[1.0] * 3] * 2
    assert found["depths"] == [0.0, 0.5, 1.0]
    assert steps == [(i, 12) for i in range(1, 13)]
    missed = find_needles(model, tokenizer, "A list holds values. " * 50, lengths=[64], depths=2)
    assert missed["found"] == [[0.0, 0.0]]
    assert all(value > 0 for value in missed["nll"][0])
    again = find_needles(model, tokenizer, "A list holds values. " * 50, lengths=[64], depths=2)
    assert again["nll"] == missed["nll"]


def test_prompts_have_their_length_and_depth(demo):
    import random

    tokenizer = demo[1]
    haystack = torch.tensor(tokenizer("some text " * 10)["input_ids"])
    for depth, place in ((0.0, "start"), (1.0, "end")):
        ids, number = _prompt(tokenizer, haystack, 100, depth, random.Random(0))
        text = tokenizer.decode(ids)
        assert len(ids) == 100
        assert text.count(number) == 1
        assert (text.index(number) < 60) == (place == "start")
        assert text.rstrip().endswith("is")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {"lengths": [64]}, "empty"),
        ("text", {"lengths": []}, "at least one"),
        ("text", {"lengths": [8]}, "shorter than needle"),
        ("text", {"lengths": [2048]}, "2048 positions"),
    ],
)
def test_errors_of_needles(demo, text, options, message):
    with pytest.raises(ValueError, match=message):
        find_needles(*demo, text, **options)


def test_record(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert load_record(tmp_path) == {}
    record = merged({}, {"text": {"a": {"kl": 1.0}}, "speed": {"old": 1}})
    record = merged(record, {"text": {"b": {"kl": 2.0}}, "speed": {"new": 2}})
    write_record(record, tmp_path / EVALUATION_NAME)
    assert load_record(tmp_path) == {
        "record_version": 1,
        "text": {"a": {"kl": 1.0}, "b": {"kl": 2.0}},
        "speed": {"new": 2},
    }
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["config.json", EVALUATION_NAME]
    other = merged(record | {"checkpoint": "a"}, {"checkpoint": "b", "text": {"c": {"kl": 3.0}}})
    assert other == {"record_version": 1, "checkpoint": "b", "text": {"c": {"kl": 3.0}}}
    (tmp_path / EVALUATION_NAME).write_text("{")
    with pytest.raises(ValueError, match="no evaluation record"):
        load_record(tmp_path)
    (tmp_path / EVALUATION_NAME).write_text('{"record_version": 2}')
    with pytest.raises(ValueError, match="version 2"):
        load_record(tmp_path)
