# SPDX-License-Identifier: Apache-2.0
"""What is finished of a compression, written down layer by layer in its work folder, so that a run that ended can go on.

A record is one safetensors file: tensors, and JSON in its header. It is written under a temporary name, on the disk, and
renamed, after everything that it speaks of. Knows files, not what is in records.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from safetensors import safe_open
from torch import Tensor

from transformers_mcmoe.distributed import World
from transformers_mcmoe.workdir import WorkDir

logger = logging.getLogger(__name__)

_KEY = "record"


@dataclass
class Record:
    """What was found in a step.

    Attributes:
        data: JSON-serialisable.
        tensors: by name.
        seconds: that the step took.
        fallbacks: what was done otherwise than usual, and why.
    """

    data: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    fallbacks: list[str] = field(default_factory=list)


class Journal:
    """The records of one compression, which its ranks share and the first writes.

    Args:
        work: its folder.
        world: its ranks.
    """

    def __init__(self, work: WorkDir, world: World) -> None:
        self._work, self._world = work, world

    def records(self, name: str, most: int) -> list[Record]:
        """Those of the first layers of a pass, up to `most`, without a gap; the file that a layer was written to must be there."""
        found: list[Record] = []
        while len(found) < most:
            record = self._read(f"{name}-{len(found):05d}")
            if record is None or not all((self._work.path / file).exists() for file in record.data.get("files", ())):
                break
            found.append(record)
        count = self._world.first(lambda: len(found))
        lost = f"Rank {self._world.rank} does not see all that is finished in '{self._work.path}'; give a folder that all ranks share."
        self._world.agree(lost if len(found) < count else None)
        del found[count:]
        if found:
            logger.info("%s: %d of %d layers are finished.", name, len(found), most)
        return found

    def write(self, name: str, layer: int, record: Record) -> None:
        """Write down what a layer of a pass came to, once all ranks are through with it."""
        self._world.barrier()
        self._write(f"{name}-{layer:05d}", record)

    def knows(self, name: str) -> bool:
        """Whether `once` has found something."""
        return self._world.first(lambda: self._work.record(name).is_file())

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """What `find` returned, JSON-serialisable, in this run or in one before it."""
        known = self._world.first(lambda: self._read(name))
        if known is None:
            found = find()
            known = Record({"value": self._world.first(lambda: found)})
            self._write(name, known)
        return known.data["value"]

    def _write(self, name: str, record: Record) -> None:
        if not self._world.leads:
            return
        header = {_KEY: json.dumps([record.data, record.seconds, record.fallbacks])}
        self._work.write_record(name, record.tensors, header)

    def _read(self, name: str) -> Record | None:
        path = self._work.record(name)
        if not path.is_file():
            return None
        with safe_open(str(path), framework="pt") as file:
            data, seconds, fallbacks = json.loads(file.metadata()[_KEY])
            # copies: the file may be removed, and is no memory of ours
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        return Record(data, tensors, seconds, fallbacks)
