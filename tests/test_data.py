# SPDX-License-Identifier: Apache-2.0
"""Calibration tokens from every kind of dataset, and what is said when there are none; without any network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

from transformers_mcmoe.calibration import data
from transformers_mcmoe.calibration.data import calibration_tokens

EOS = 1


class Tokenizer:
    """One token per word, the word's number; `eos_token_id` closes a text."""

    eos_token_id: int | None = EOS

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert add_special_tokens is False
        return {"input_ids": [int(word) for word in text.split()]}


class WithoutEnd(Tokenizer):
    eos_token_id = None


def _tokens(dataset: Any, num_samples: int = 2, seq_len: int = 4, **kwargs: Any) -> Tensor:
    options: dict[str, Any] = {"tokenizer": Tokenizer(), "seed": 0} | kwargs
    return calibration_tokens(dataset, options.pop("tokenizer"), num_samples=num_samples, seq_len=seq_len, **options)


def _text(start: int, stop: int) -> str:
    return " ".join(map(str, range(start, stop)))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("A test must not load a dataset from the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


class Hub:
    """Stands for `datasets.load_dataset`: a streaming dataset of rows, and how it was asked for."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows, self.calls, self.shuffles = rows, [], []

    def __call__(self, *args: Any, **kwargs: Any) -> Hub:
        self.calls.append((args, kwargs))
        return self

    def shuffle(self, **kwargs: Any) -> Hub:
        self.shuffles.append(kwargs)
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


@pytest.fixture
def hub(monkeypatch) -> Hub:
    fake = Hub(
        [{"text": _text(10, 14), "content": _text(110, 114)}, {"text": _text(20, 40), "content": _text(120, 140)}]
    )
    monkeypatch.setattr(datasets, "load_dataset", fake)
    return fake


class TestTexts:
    def test_strings_are_joined_and_cut(self):
        tokens = _tokens(["10 11 12", "20 21 22 23"], num_samples=2, seq_len=4)
        assert tokens.dtype == torch.int64
        assert tokens.tolist() == [[10, 11, 12, EOS], [20, 21, 22, 23]]

    def test_no_end_token(self):
        assert _tokens(["10 11 12", "20"], 1, tokenizer=WithoutEnd()).tolist() == [[10, 11, 12, 20]]

    def test_blank_texts_add_nothing(self):
        assert _tokens(["", "10 11", " \n", "20", "\t"], 1, 5).tolist() == [[10, 11, EOS, 20, EOS]]

    def test_samples_are_spread_over_local_text(self):
        tokens = _tokens([_text(100, 140)], num_samples=4, seq_len=4, tokenizer=WithoutEnd())
        assert tokens[:, 0].tolist() == [100, 108, 120, 128]  # rows 0, 2, 5 and 7 of 10
        assert (tokens == tokens[:, :1] + torch.arange(4)).all()

    def test_local_text_is_read_up_to_a_multiple(self):
        """Sixteen times what is needed, so a large file is not tokenized whole."""
        seen: list[str] = []

        class Counting(WithoutEnd):
            def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
                seen.append(text)
                return super().__call__(text, add_special_tokens)

        tokens = _tokens([_text(8 * i, 8 * i + 8) for i in range(1000)], 2, 4, tokenizer=Counting())
        assert len(seen) == 16
        assert tokens.tolist() == [[0, 1, 2, 3], [64, 65, 66, 67]]

    def test_tuple_of_strings(self):
        assert _tokens(("10 11 12 13",), 1).tolist() == [[10, 11, 12, 13]]

    def test_result_owns_its_memory(self):
        tokens = _tokens([_text(100, 140)], 2)
        assert tokens.is_contiguous()
        assert tokens.untyped_storage().nbytes() == tokens.numel() * 8


class TestFiles:
    @pytest.mark.parametrize("kind", [str, Path])
    def test_txt(self, tmp_path: Path, kind: type):
        file = tmp_path / "calib.txt"
        file.write_text("10 11\n\n12 13\n20 21 22 23", encoding="utf-8")
        assert _tokens(kind(file)).tolist() == [[10, 11, 12, 13], [20, 21, 22, 23]]

    @pytest.mark.parametrize("suffix", [".jsonl", ".json"])
    def test_jsonl(self, tmp_path: Path, suffix: str):
        file = tmp_path / f"calib{suffix}"
        lines = [json.dumps({"id": 1, "text": "10 11 12"}), "", json.dumps({"id": 2, "text": "20 21\n22 23"})]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        assert _tokens(str(file)).tolist() == [[10, 11, 12, EOS], [20, 21, 22, 23]]

    def test_parquet(self, tmp_path: Path):
        import pyarrow
        from pyarrow import parquet

        file = tmp_path / "calib.parquet"
        parquet.write_table(pyarrow.table({"text": ["10 11 12", "20 21 22 23"], "id": [1, 2]}), file)
        assert _tokens(str(file)).tolist() == [[10, 11, 12, EOS], [20, 21, 22, 23]]

    @pytest.mark.parametrize("name", ["calib.txt", "calib.jsonl"])
    def test_empty_file(self, tmp_path: Path, name: str):
        (tmp_path / name).write_text("\n \n", encoding="utf-8")
        with pytest.raises(ValueError, match="The calibration dataset is empty, but num_samples=2 are asked for"):
            _tokens(tmp_path / name)

    def test_no_text_field(self, tmp_path: Path):
        file = tmp_path / "calib.jsonl"
        file.write_text(json.dumps({"content": "10", "id": 1}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"calib\.jsonl' has no text field 'text' \(it has \['content', 'id'\]\)"):
            _tokens(file)
        file.write_text("[1, 2]", encoding="utf-8")
        with pytest.raises(ValueError, match=r"has no text field 'text' \(a row is list\)"):
            _tokens(file)
        file.write_text(json.dumps({"text": 3}), encoding="utf-8")
        with pytest.raises(ValueError, match="has no text field 'text'"):
            _tokens(file)

    def test_no_text_field_in_parquet(self, tmp_path: Path):
        import pyarrow
        from pyarrow import parquet

        file = tmp_path / "calib.parquet"
        parquet.write_table(pyarrow.table({"body": ["10"]}), file)
        with pytest.raises(ValueError, match=r"has no text field 'text' \(it has \['body'\]\)"):
            _tokens(file)

    def test_unknown_suffix(self, tmp_path: Path):
        file = tmp_path / "calib.csv"
        file.write_text("text\n10", encoding="utf-8")
        with pytest.raises(ValueError, match=r"calib\.csv' has no known format; use one of .*'\.txt', '\.jsonl'"):
            _tokens(str(file))

    @pytest.mark.parametrize("kind", [str, Path])
    @pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
    def test_missing_file(self, tmp_path: Path, kind: type, suffix: str):
        with pytest.raises(ValueError, match=rf"missing{suffix}' is no file; give a Hub id, or dataset= a local"):
            _tokens(kind(tmp_path / f"missing{suffix}"))

    def test_folder(self, tmp_path: Path):
        with pytest.raises(ValueError, match="is no file"):
            _tokens(str(tmp_path))

    def test_missing_path_of_no_known_format(self, tmp_path: Path):
        with pytest.raises(ValueError, match=r"dataset=.*missing"):
            _tokens(tmp_path / "missing")

    def test_broken_json_names_the_file(self, tmp_path: Path):
        file = tmp_path / "calib.jsonl"
        file.write_text('{"text": "10"}\n{"text": ', encoding="utf-8")
        with pytest.raises(ValueError, match=r"calib\.jsonl"):
            _tokens(file)


class TestTokens:
    def test_tensor(self):
        given = torch.arange(12, dtype=torch.int32).view(3, 4)
        tokens = _tokens(given, num_samples=2, seq_len=999, tokenizer=None)
        assert tokens.dtype == torch.int64
        assert tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]

    def test_fewer_rows_than_asked_for(self):
        assert _tokens(torch.arange(6).view(2, 3), num_samples=100).tolist() == [[0, 1, 2], [3, 4, 5]]

    @pytest.mark.parametrize(
        "given", [[[1, 2], [3, 4]], ((1, 2), (3, 4)), [torch.tensor([1, 2]), torch.tensor([3, 4])]], ids=str
    )
    def test_lists(self, given: Any):
        assert _tokens(given).tolist() == [[1, 2], [3, 4]]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (torch.zeros(2, 4), r"non-empty integer tensor \[N, T\]; this one is torch\.float32 of shape \(2, 4\)"),
            (torch.zeros(4, dtype=torch.int64), r"this one is torch\.int64 of shape \(4,\)"),
            (torch.zeros(2, 2, 2, dtype=torch.int64), r"of shape \(2, 2, 2\)"),
            (torch.zeros(0, 4, dtype=torch.int64), r"of shape \(0, 4\)"),
            (torch.zeros(4, 0, dtype=torch.int64), r"of shape \(4, 0\)"),
            ([1, 2, 3], r"of shape \(3,\)"),
            ([[0.5, 1.5]], r"torch\.float32"),
            ([[1, 2], [3]], "must be sequences of one length"),
            ([[1, "a"]], "must be sequences of one length"),
            ([{"text": "10"}], "must be sequences of one length"),
        ],
    )
    def test_refused(self, given: Any, message: str):
        with pytest.raises(ValueError, match=rf"Token ids given as dataset.*{message}"):
            _tokens(given)


class TestErrors:
    def test_empty(self):
        for dataset in ([], [""], ["", " "]):
            with pytest.raises(
                ValueError, match="is empty, but num_samples=2 are asked for; give more text, or lower"
            ):
                _tokens(dataset)

    def test_too_short(self):
        message = (
            r"gives 10 tokens, 2 sequences of 4, but num_samples=3 are asked for; .* lower num_samples or seq_len"
        )
        with pytest.raises(ValueError, match=message):
            _tokens([_text(100, 109)], num_samples=3)

    def test_just_enough(self):
        assert _tokens([_text(100, 111)], num_samples=3).shape == (3, 4)

    @pytest.mark.parametrize("dataset", [5, 2.5, object()])
    def test_unknown_kind(self, dataset: Any):
        with pytest.raises(ValueError, match=r"dataset=.* is of type .*; give a Hub id, or dataset= a local \.txt"):
            _tokens(dataset)

    @pytest.mark.parametrize(
        ("tokenizer", "model_name", "named"),
        [
            (None, "nobody/no-such-model", "nobody/no-such-model"),
            ("nobody/no-such-tokenizer", "model", "nobody/no-such-tokenizer"),
            (None, "", ""),
        ],
    )
    def test_no_tokenizer(self, tokenizer: Any, model_name: str, named: str):
        message = rf"There is no tokenizer for '{named}' .* give tokenizer=, or token ids \[N, T\] as dataset"
        with pytest.raises(ValueError, match=message):
            _tokens(["10 11"], tokenizer=tokenizer, model_name=model_name)

    def test_tokenizer_is_not_needed_for_tokens(self):
        assert _tokens(torch.zeros(1, 3, dtype=torch.int64), tokenizer=None, model_name="nobody/none").shape == (1, 3)

    def test_tokenizer_by_name(self, monkeypatch):
        import transformers

        asked = []
        monkeypatch.setattr(
            transformers.AutoTokenizer, "from_pretrained", lambda name: asked.append(name) or Tokenizer()
        )
        for tokenizer in (None, "my/tokenizer", Path("folder")):
            _tokens(["10 11 12 13"], 1, tokenizer=tokenizer, model_name="my/model")
        assert asked == ["my/model", "my/tokenizer", "folder"]


class TestHub:
    def test_default_is_c4(self, hub: Hub):
        tokens = _tokens(None, num_samples=3, seq_len=5, seed=7)
        assert hub.calls == [
            (
                ("allenai/c4", None),
                {
                    "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
                    "split": "train",
                    "streaming": True,
                },
            )
        ]
        assert hub.shuffles == [{"seed": 7, "buffer_size": 10_000}]
        # two texts give five sequences, of which three are taken evenly
        assert tokens.tolist() == [[10, 11, 12, 13, EOS], [20, 21, 22, 23, 24], [30, 31, 32, 33, 34]]

    @pytest.mark.parametrize(
        ("dataset", "path", "subset", "split", "first"),
        [
            ("org/name", "org/name", None, "train", 10),
            ("name", "name", None, "train", 10),
            ("org/name:sub", "org/name", "sub", "train", 10),
            ("org/name:sub:test", "org/name", "sub", "test", 10),
            ("org/name:sub:split:content", "org/name", "sub", "split", 110),
            ("org/name:::content", "org/name", None, "train", 110),
            ("org/name::validation", "org/name", None, "validation", 10),
            ({"path": "org/name"}, "org/name", None, "train", 10),
            (
                {"path": "org/name", "subset": "sub", "split": "split", "field": "content"},
                "org/name",
                "sub",
                "split",
                110,
            ),
        ],
        ids=str,
    )
    def test_parts(self, hub: Hub, dataset: Any, path: str, subset: str | None, split: str, first: int):
        tokens = _tokens(dataset, num_samples=1, seq_len=4)
        assert hub.calls == [((path, subset), {"data_files": None, "split": split, "streaming": True})]
        assert tokens.tolist() == [[first, first + 1, first + 2, first + 3]]

    def test_no_more_rows_than_needed(self, monkeypatch):
        class Endless(Hub):
            def __iter__(self) -> Iterator[Any]:
                while True:
                    yield {"text": _text(10, 20)}

        monkeypatch.setattr(datasets, "load_dataset", Endless([]))
        assert _tokens("org/name", num_samples=50, seq_len=11).shape == (50, 11)

    @pytest.mark.parametrize("error", [ConnectionError("no route"), FileNotFoundError("gone"), ValueError("split")])
    def test_out_of_reach(self, error: Exception, monkeypatch):
        def load_dataset(*args: Any, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(OSError, match="'org/name' cannot be read from the Hub") as caught:
            _tokens("org/name")
        message = str(caught.value)
        assert type(error).__name__ in message
        for alternative in ("local .txt, .jsonl or .parquet file", "list of strings", "token ids [N, T]"):
            assert alternative in message
        assert caught.value.__cause__ is error

    def test_out_of_reach_at_the_first_row(self, monkeypatch):
        class Broken(Hub):
            def __iter__(self) -> Iterator[Any]:
                raise ConnectionError("no route")

        monkeypatch.setattr(datasets, "load_dataset", Broken([]))
        with pytest.raises(OSError, match="'allenai/c4' cannot be read from the Hub"):
            _tokens(None)

    def test_empty(self, monkeypatch):
        monkeypatch.setattr(datasets, "load_dataset", Hub([]))
        with pytest.raises(ValueError, match="is empty"):
            _tokens("org/name")

    def test_too_short(self, hub: Hub):
        with pytest.raises(ValueError, match="gives 26 tokens, 6 sequences of 4, but num_samples=9 are asked for"):
            _tokens("org/name", num_samples=9)

    def test_no_text_field(self, hub: Hub):
        with pytest.raises(ValueError, match=r"'org/name' has no text field 'body' \(it has \['content', 'text'\]\)"):
            _tokens("org/name:sub:train:body")

    def test_a_dict_needs_a_path(self, hub: Hub):
        with pytest.raises(ValueError, match="path"):
            _tokens({"split": "train"})


def test_local_names_are_not_looked_up():
    assert data._is_hub("org/name")
    assert data._is_hub(None)
    assert data._is_hub({"path": "org/name"})
    assert not data._is_hub("some/calib.txt")
    assert not data._is_hub(["a text"])


def test_a_text_is_no_path():
    with pytest.raises(ValueError, match="dataset is a text of 5000 characters; give texts as a list of strings"):
        _tokens("word " * 1000)


class TestMixture:
    """Several data sets with their shares."""

    @pytest.fixture
    def files(self, tmp_path: Path) -> tuple[str, str]:
        names = []
        for name, first in (("a.txt", 100), ("b.txt", 5000)):
            path = tmp_path / name
            path.write_text(" ".join(str(first + n) for n in range(400)))
            names.append(str(path))
        return names[0], names[1]

    def test_shares(self, files: tuple[str, str]):
        tokens = _tokens({files[0]: 3, files[1]: 1}, num_samples=8)
        assert tokens.shape == (8, 4)
        second = (tokens >= 5000).all(1)
        assert second.sum() == 2
        assert ((tokens < 5000).all(1) | second).all()
        # any first ones are of both
        assert second[:4].sum() == 1

    def test_the_same_sequences_as_alone(self, files: tuple[str, str]):
        mixed = _tokens({files[0]: 0.5, files[1]: 0.5}, num_samples=6)
        for name in files:
            alone = _tokens(name, num_samples=3)
            assert all((mixed == row).all(1).any() for row in alone)

    @pytest.mark.parametrize(
        ("shares", "count", "expected"),
        [
            ({"a": 1, "b": 1}, 5, [3, 2]),
            ({"a": 0.7, "b": 0.2, "c": 0.1}, 10, [7, 2, 1]),
            ({"a": 100, "b": 1, "c": 1}, 4, [2, 1, 1]),
            ({"a": 2}, 3, [3]),
        ],
    )
    def test_counts(self, shares: dict[str, float], count: int, expected: list[int]):
        assert list(data.shares_of(shares, count).values()) == expected

    def test_refused(self, files: tuple[str, str]):
        with pytest.raises(ValueError, match="positive number"):
            _tokens({files[0]: 1, files[1]: 0})
        with pytest.raises(ValueError, match="num_samples=1 is less than the 2 data sets"):
            _tokens({files[0]: 1, files[1]: 1}, num_samples=1)

    def test_folders_are_not_stored(self, files: tuple[str, str]):
        from transformers_mcmoe import MCMoEConfig

        config = MCMoEConfig(dataset={files[0]: 1, "org/name": 2})
        assert config.to_dict()["dataset"] == {"a.txt": 1, "org/name": 2}
