# SPDX-License-Identifier: Apache-2.0
"""The work folder of a compression: whose it is, its finished layers, and what is removed at the end.

Knows files, not what is in them.
"""

from __future__ import annotations

import hashlib
import json
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

FINGERPRINT = "fingerprint.json"
# pieces of every checkpoint file that tell two fine-tunes of one model apart
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


def fingerprint(parts: Mapping[str, Any], files: Sequence[str | Path]) -> str:
    """Hash of everything a compression's result depends on.

    Args:
        parts: JSON-serialisable settings (versions, configs, a hash of the data).
        files: the dense checkpoint, told apart by names, sizes, headers and samples of their content.
    """
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for file in files:
        path = Path(file)
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        with path.open("rb") as handle:
            digest.update(handle.read(int.from_bytes(handle.read(8), "little")))
            for part in range(_SAMPLES):
                handle.seek(path.stat().st_size * part // _SAMPLES)
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()


class WorkDir:
    """Folder of one compression.

    Args:
        path: the folder; it is made if need be.
        mark: fingerprint of the compression.
    """

    def __init__(self, path: Path, mark: str) -> None:
        self.path, self.mark = path, mark

    def claim(self, need: int) -> None:
        """Make the folder this compression's.

        Args:
            need: bytes that it will take at most.

        Raises:
            ValueError: the folder holds something else, or another compression.
            OSError: the disk has too little room.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / FINGERPRINT
        if file.is_file():
            if json.loads(file.read_text(encoding="utf-8")).get("fingerprint") != self.mark:
                raise ValueError(
                    f"work_dir '{self.path}' holds a compression of another model, config, dataset or version; "
                    "choose another folder or delete this one."
                )
        elif any(self.path.iterdir()):
            raise ValueError(f"work_dir '{self.path}' holds files that are not ours; choose an empty or a new folder.")
        free = shutil.disk_usage(self.path).free
        if free < need:
            raise OSError(
                f"work_dir '{self.path}' has {size(free)} free, but up to {size(need)} are needed; "
                "choose a work_dir on a larger disk."
            )
        write_whole(file, json.dumps({"fingerprint": self.mark}))

    def write_layer(self, index: int, tensors: dict[str, Tensor], name: str = "layer") -> Path:
        """Write the packed tensors of one layer: all of them or none."""
        path = self.path / f"{name}-{index:05d}.safetensors"
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"format": "pt", "fingerprint": self.mark})
        os.replace(temporary, path)
        return path

    def clean(self) -> None:
        """Remove hidden states and samples; finished layers stay."""
        for file in [*self.path.glob("*.bin"), *self.path.glob("*.tmp")]:
            file.unlink()


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
