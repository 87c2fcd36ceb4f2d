# SPDX-License-Identifier: Apache-2.0
"""The work folder: who may use it, files that are whole or absent, and folders that replace each other."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from transformers_mcmoe import workdir
from transformers_mcmoe.distributed import World
from transformers_mcmoe.pipeline.journal import Journal, Record
from transformers_mcmoe.workdir import (
    FINGERPRINT,
    WorkDir,
    check_replaceable,
    fingerprint,
    is_begun,
    replace_directory,
)

Usage = namedtuple("Usage", "total used free")
MARK = {"model": "mark", "config": "mark"}


class TestClaim:
    def test_new_folder(self, tmp_path: Path):
        path = tmp_path / "a" / "b"
        WorkDir(path, MARK).claim(0)
        assert json.loads((path / FINGERPRINT).read_text(encoding="utf-8"))["marks"] == MARK
        assert [file.name for file in path.iterdir()] == [FINGERPRINT]

    def test_empty_folder(self, tmp_path: Path):
        WorkDir(tmp_path, MARK).claim(0)
        assert (tmp_path / FINGERPRINT).is_file()

    def test_again(self, tmp_path: Path):
        work = WorkDir(tmp_path, MARK)
        work.claim(0)
        file = work.write_layer(0, {"a": torch.zeros(2)})
        work.write_record("layers-00000", {}, {})
        WorkDir(tmp_path, MARK).claim(0, resume=True)
        assert file.is_file()
        assert is_begun(tmp_path)
        WorkDir(tmp_path, MARK).claim(0)
        assert not file.exists()
        assert not is_begun(tmp_path)

    def test_other_number_of_threads(self, tmp_path: Path, caplog):
        WorkDir(tmp_path, MARK).claim(0)
        known = json.loads((tmp_path / FINGERPRINT).read_text(encoding="utf-8"))
        (tmp_path / FINGERPRINT).write_text(json.dumps(known | {"threads": 99}), encoding="utf-8")
        WorkDir(tmp_path, MARK).claim(0, resume=True)
        assert "was begun with 99 threads" in caplog.text

    def test_other_compression(self, tmp_path: Path):
        WorkDir(tmp_path, MARK).claim(0)
        for resume in (True, False):
            with pytest.raises(ValueError, match="holds a compression of another config; choose"):
                WorkDir(tmp_path, MARK | {"config": "other"}).claim(0, resume)
            with pytest.raises(ValueError, match="holds a compression of another model and config; choose"):
                WorkDir(tmp_path, dict.fromkeys(MARK, "other")).claim(0, resume)
        assert json.loads((tmp_path / FINGERPRINT).read_text(encoding="utf-8"))["marks"] == MARK

    def test_foreign_files(self, tmp_path: Path):
        (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
        with pytest.raises(ValueError, match="holds files that are not ours; choose an empty or a new folder"):
            WorkDir(tmp_path, MARK).claim(0)
        assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]

    def test_folder_is_named(self, tmp_path: Path):
        (tmp_path / "x").mkdir()
        with pytest.raises(ValueError, match=str(tmp_path)):
            WorkDir(tmp_path, MARK).claim(0)

    def test_too_little_disk(self, tmp_path: Path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 5 * 10**9))
        message = r"has 5\.00 GB free, but up to 7\.30 GB are needed; choose a work_dir on a larger disk"
        with pytest.raises(OSError, match=message):
            WorkDir(tmp_path, MARK).claim(7_300_000_000)
        assert not (tmp_path / FINGERPRINT).exists()
        WorkDir(tmp_path, MARK).claim(5 * 10**9)
        assert (tmp_path / FINGERPRINT).exists()


class TestLayers:
    def test_write(self, tmp_path: Path):
        tensors = {"a": torch.arange(6, dtype=torch.uint8).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
        path = WorkDir(tmp_path, MARK).write_layer(7, tensors)
        assert path == tmp_path / "layer-00007.safetensors"
        loaded = load_file(path)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"
        assert [file.name for file in tmp_path.iterdir()] == [path.name]

    def test_names_sort_by_layer(self, tmp_path: Path):
        work = WorkDir(tmp_path, MARK)
        files = [work.write_layer(i, {}) for i in (2, 10, 9, 100)]
        assert sorted(files) == [files[0], files[2], files[1], files[3]]

    def test_interrupted(self, tmp_path: Path, monkeypatch):
        work = WorkDir(tmp_path, MARK)
        path = work.write_layer(0, {"a": torch.zeros(4)})

        def save(tensors: Any, file: Path, **kwargs: Any) -> None:
            save_file(tensors, file, **kwargs)
            with Path(file).open("r+b") as handle:
                handle.truncate(20)
            raise KeyboardInterrupt

        monkeypatch.setattr(workdir, "save_file", save)
        for index in (0, 1):
            with pytest.raises(KeyboardInterrupt):
                work.write_layer(index, {"a": torch.ones(4)})
        assert torch.equal(load_file(path)["a"], torch.zeros(4))
        assert [file.name for file in tmp_path.glob("*.safetensors")] == [path.name]
        work.clean()
        assert [file.name for file in tmp_path.iterdir()] == [path.name]

    def test_records_are_whole_or_absent(self, tmp_path: Path, monkeypatch):
        journal = Journal(WorkDir(tmp_path, MARK), World())
        first = Record({"a": [1, 0.1]}, {"x": torch.arange(3)}, 2.5, ["a reason"])
        journal.write("allocate", 0, first)
        journal.write("allocate", 2, first)  # there is none of layer 1
        (known,) = journal.records("allocate", 5)
        assert (known.data, known.seconds, known.fallbacks) == (first.data, 2.5, ["a reason"])
        assert torch.equal(known.tensors["x"], first.tensors["x"])
        assert journal.once("value", lambda: 3) == journal.once("value", lambda: 4) == 3
        monkeypatch.setattr(workdir, "save_file", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            journal.write("allocate", 1, first)
        assert len(journal.records("allocate", 5)) == 1

    def test_record_of_a_layer_whose_file_is_gone(self, tmp_path: Path):
        work = WorkDir(tmp_path, MARK)
        journal = Journal(work, World())
        file = work.write_layer(0, {})
        journal.write("layers", 0, Record({"files": [file.name]}))
        assert len(journal.records("layers", 1)) == 1
        file.unlink()
        assert journal.records("layers", 1) == []

    def test_clean(self, tmp_path: Path):
        work = WorkDir(tmp_path, MARK)
        work.claim(0)
        work.write_layer(0, {"a": torch.zeros(4)})
        for name in ("inputs-0.bin", "layer-00001.tmp", "layers-00001.hidden", "keep.txt"):
            (tmp_path / name).write_bytes(b"x")
        work.clean()
        assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors", ".txt", ".hidden"}
        work.clean(finished=True)
        work.clean(finished=True)
        assert {file.name for file in tmp_path.iterdir()} == {FINGERPRINT, "layer-00000.safetensors", "keep.txt"}


class TestFingerprint:
    PARTS = {"version": "1", "config": {"bits": 2.5, "seed": 0}}  # noqa: RUF012

    def _file(self, folder: Path, name: str = "model.safetensors", tensor: str = "a", size: int = 4) -> Path:
        folder.mkdir(exist_ok=True)
        save_file({tensor: torch.zeros(size)}, folder / name)
        return folder / name

    def test_same(self, tmp_path: Path):
        file = self._file(tmp_path)
        other = {"config": {"seed": 0, "bits": 2.5}, "version": "1"}  # the order does not count
        copied = self._file(tmp_path / "elsewhere")
        assert fingerprint(self.PARTS, [file]) == fingerprint(other, [str(copied)])

    def test_different(self, tmp_path: Path):
        file = self._file(tmp_path)
        marks = [
            fingerprint(self.PARTS, [file]),
            fingerprint(self.PARTS | {"version": "2"}, [file]),
            fingerprint(self.PARTS, [file, self._file(tmp_path, "second.safetensors")]),
            fingerprint(self.PARTS, [self._file(tmp_path, "second.safetensors")]),
            fingerprint(self.PARTS, [self._file(tmp_path / "name", tensor="b")]),
            fingerprint(self.PARTS, [self._file(tmp_path / "size", size=5)]),
            fingerprint(self.PARTS, []),
        ]
        assert len({tuple(sorted(mark.items())) for mark in marks}) == len(marks)
        assert [name for name in marks[0] if marks[0][name] != marks[1][name]] == ["version"]


def _folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content, encoding="utf-8")
    return path


def _content(path: Path) -> str:
    return (path / "file").read_text(encoding="utf-8")


class TestReplaceDirectory:
    def test_new(self, tmp_path: Path):
        replace_directory(_folder(tmp_path / "new", "new"), tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert _content(tmp_path / "out") == "new"

    def test_existing(self, tmp_path: Path):
        (_folder(tmp_path / "out", "old") / "gone").write_text("x", encoding="utf-8")
        replace_directory(_folder(tmp_path / "new", "new"), tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
        assert _content(tmp_path / "out") == "new"

    def test_killed_between_the_renames(self, tmp_path: Path):
        _folder(tmp_path / ".out.mcmoe-old", "old")
        replace_directory(_folder(tmp_path / "new", "new"), tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert _content(tmp_path / "out") == "new"

    def test_killed_before_the_old_one_is_removed(self, tmp_path: Path):
        _folder(tmp_path / ".out.mcmoe-old", "older")
        _folder(tmp_path / "out", "old")
        replace_directory(_folder(tmp_path / "new", "new"), tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert _content(tmp_path / "out") == "new"

    def test_old_one_survives_a_failure(self, tmp_path: Path):
        """The second rename fails: the old folder is whole and back in its place."""
        _folder(tmp_path / "out", "old")
        with pytest.raises(OSError, match="missing"):
            replace_directory(tmp_path / "missing", tmp_path / "out")
        assert _content(tmp_path / "out") == "old"
        with pytest.raises(OSError, match="missing"):
            replace_directory(tmp_path / "missing", tmp_path / "out")
        assert [_content(path) for path in tmp_path.iterdir()] == ["old"]

    def test_suffix_of_the_name_is_kept(self, tmp_path: Path):
        """model-2.54bit has a "suffix": the old folder is not model-2."""
        other = _folder(tmp_path / "model-2.old", "other")
        _folder(tmp_path / "model-2.54bit", "old")
        replace_directory(_folder(tmp_path / "new", "new"), tmp_path / "model-2.54bit")
        assert _content(other) == "other"
        assert _content(tmp_path / "model-2.54bit") == "new"


class TestCheckReplaceable:
    def test_ours_new_and_empty_ones_may_be_replaced(self, tmp_path: Path):
        (tmp_path / "ours").mkdir()
        (tmp_path / "ours" / "mark").touch()
        (tmp_path / "empty").mkdir()
        for name in ("ours", "empty", "new"):
            check_replaceable(tmp_path / name, "mark")

    def test_a_users_folder_may_not(self, tmp_path: Path):
        _folder(tmp_path / "thesis", "text")
        with pytest.raises(ValueError, match="holds no compressed model"):
            check_replaceable(tmp_path / "thesis", "mark")
        with pytest.raises(ValueError, match="is a file"):
            check_replaceable(tmp_path / "thesis" / "file", "mark")
