# SPDX-License-Identifier: Apache-2.0
"""The work folder of a compression: whose it is, its finished layers, and what is removed at the end.

Knows files, not what is in them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from transformers_mcmoe.progress import size

logger = logging.getLogger(__name__)

FINGERPRINT = "fingerprint.json"
# subfolder of what is known of finished steps
RECORDS = "records"
# files that serve a running compression
SCRATCH = ("*.bin", "*.tmp")
# those that it can go on with
STATES = "*.hidden"
# and what it has finished
OURS = ("layer-[0-9]*.safetensors", "joint-[0-9]*.safetensors", "teacher.states")
# pieces of every checkpoint file that tell two fine-tunes of one model apart; small files are read whole
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
_SMALL = 1 << 26


def fingerprint(parts: Mapping[str, Any], files: Sequence[str | Path]) -> dict[str, str]:
    """Hashes of everything a compression's result depends on, by name.

    Args:
        parts: JSON-serialisable settings (versions, configs, a hash of the data).
        files: the dense checkpoint, told apart by names, sizes, headers and samples of their content.
    """
    marks = {
        name: hashlib.sha256(json.dumps(part, sort_keys=True, default=str).encode()).hexdigest()
        for name, part in parts.items()
    }
    digest = hashlib.sha256()
    for file in files:
        path = Path(file)
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        with path.open("rb") as handle:
            digest.update(handle.read(int.from_bytes(handle.read(8), "little")))
            if path.stat().st_size <= _SMALL:
                digest.update(handle.read())
                continue
            for part in range(_SAMPLES):
                handle.seek(path.stat().st_size * part // _SAMPLES)
                digest.update(handle.read(_SAMPLE_BYTES))
    return {"checkpoint": digest.hexdigest(), **marks}


class WorkDir:
    """Folder of one compression.

    Args:
        path: the folder; it is made if need be.
        marks: fingerprint of the compression, by what it is of.
        rank: of this process, if several share the folder; each but the first has a subfolder for what serves it alone.

    Attributes:
        path: as given.
        scratch: where this process puts what the others do not read.
    """

    def __init__(self, path: Path, marks: Mapping[str, str], rank: int = 0) -> None:
        self.path, self._marks, self._rank = path, dict(marks), rank
        self.scratch = path / f"rank-{rank:05d}" if rank else path

    def claim(self, need: int, resume: bool = False) -> None:
        """Make the folder this compression's.

        Args:
            need: bytes that it will take at most.
            resume: keep what is finished of this compression; else it begins anew.

        Raises:
            ValueError: the folder holds something else, or another compression.
            OSError: the disk has too little room.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / FINGERPRINT
        if file.is_file():
            self._check(json.loads(file.read_text(encoding="utf-8")))
            self._clear(resume)
        elif {other.name for other in self.path.iterdir()} - {f"{FINGERPRINT}.tmp"}:
            raise ValueError(f"work_dir '{self.path}' holds files that are not ours; choose an empty or a new folder.")
        there = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        free = shutil.disk_usage(self.path).free + there
        if free < need:
            raise OSError(
                f"work_dir '{self.path}' has {size(free)} free, but up to {size(need)} are needed; "
                "choose a work_dir on a larger disk."
            )
        write_whole(file, json.dumps({"marks": self._marks, "threads": torch.get_num_threads()}))

    def join(self) -> str | None:
        """Take part in what the first rank has claimed; returns what is wrong, if something is."""
        if not self._rank:
            return None
        file = self.path / FINGERPRINT
        if not file.is_file():
            return f"work_dir '{self.path}' is not the same folder for all ranks (rank {self._rank} sees another); give one that they share."
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["threads"] != torch.get_num_threads():
            return (
                f"Rank {self._rank} has {torch.get_num_threads()} threads and rank 0 {known['threads']}, so that their sums differ; "
                "set OMP_NUM_THREADS alike."
            )
        others = self._others(known)
        if others:
            return f"Rank {self._rank} has another {' and '.join(others)} than rank 0; give all ranks the same."
        self.scratch.mkdir(exist_ok=True)
        return None

    def _others(self, known: Mapping[str, Any]) -> list[str]:
        """What the folder's compression has otherwise."""
        marks = known.get("marks", {})
        return [name for name, mark in self._marks.items() if marks.get(name) != mark]

    def _check(self, known: Mapping[str, Any]) -> None:
        others = self._others(known)
        if others:
            raise ValueError(
                f"work_dir '{self.path}' holds a compression of another {' and '.join(others)}; "
                "choose another folder or delete this one."
            )
        if known.get("threads") != torch.get_num_threads():
            logger.warning(
                "work_dir '%s' was begun with %s threads, and this run has %d: sums may be rounded otherwise.",
                *(self.path, known.get("threads"), torch.get_num_threads()),
            )

    def write_layer(self, index: int, tensors: dict[str, Tensor], name: str = "layer", part: str = "") -> Path:
        """Write the packed tensors of one layer, or a part of it that has a name: all of them or none."""
        path = self.path / f"{name}-{index:05d}{part}.safetensors"
        # one entry: several would come in any order, and files would differ
        self._write(path, tensors, {"format": "pt"})
        return path

    def record(self, name: str) -> Path:
        """Where what is known of a finished step lies."""
        return self.path / RECORDS / f"{name}.safetensors"

    def write_record(self, name: str, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        """Write what is known of a finished step: all of it or nothing."""
        self.record(name).parent.mkdir(exist_ok=True)
        self._write(self.record(name), tensors, header)

    def _write(self, path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata=header)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def clean(self, finished: bool = False) -> None:
        """Remove samples, and hidden states where no run will go on with them; finished layers stay."""
        for pattern in (*SCRATCH, *([STATES] if finished else [])):
            for file in self.scratch.glob(pattern):
                file.unlink(missing_ok=True)
        if self.scratch != self.path and self.scratch.is_dir() and not any(self.scratch.iterdir()):
            self.scratch.rmdir()

    def _clear(self, resume: bool) -> None:
        """Remove what an earlier run of the same compression left, or of it what a run that goes on has no use for."""
        self.clean(finished=not resume)
        for folder in self.path.glob("rank-[0-9]*"):  # the first rank hands on what it has
            shutil.rmtree(folder, ignore_errors=True)
        if not resume:
            shutil.rmtree(self.path / RECORDS, ignore_errors=True)
            for pattern in OURS:
                for file in self.path.glob(pattern):
                    file.unlink()


def is_begun(path: Path) -> bool:
    """Whether something is finished in a work folder, so that a run could go on there."""
    return any(path.glob("teacher.states")) or any(path.glob("teach-*")) or any((path / RECORDS).glob("*.safetensors"))


def mapped_tensor(path: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor that lies in a file: it costs disk, not memory.

    Raises:
        OSError: the disk has no room for it. Without the reservation, a write to the tensor would end the process.
    """
    count = math.prod(shape)
    with path.open("a+b") as file:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(*shape)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def check_replaceable(output: Path, mark: str) -> None:
    """Raise ValueError unless a folder may be replaced as a whole: it is new, empty, or holds the file `mark`."""
    if output.is_dir() and any(output.iterdir()) and not (output / mark).is_file():
        raise ValueError(f"'{output}' is not empty and holds no compressed model; choose another output folder.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"'{output}' is a file; choose a folder for the output.")


def replace_directory(new: Path, output: Path) -> None:
    """Put a finished folder in the place of another; the old one is whole until the new one stands."""
    recover_directory(output)
    old = _old(output)
    if output.exists():
        output.rename(old)
    try:
        new.rename(output)
    except OSError:
        recover_directory(output)
        raise
    if old.exists():
        shutil.rmtree(old)


def recover_directory(output: Path) -> None:
    """Undo the half of a `replace_directory` that was killed between its steps."""
    old = _old(output)
    if old.exists():
        if output.exists():
            shutil.rmtree(old)
        else:
            old.rename(output)


def _old(output: Path) -> Path:
    return output.with_name(f".{output.name}.mcmoe-old")
