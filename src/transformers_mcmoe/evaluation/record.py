# SPDX-License-Identifier: Apache-2.0
"""What was measured of a packed model, kept beside its weights as `mcmoe_evaluation.json`.

One section per kind of measurement; measuring again replaces its section and leaves the others. Reports and model
cards are made from it. Knows files and machines, not how anything was measured.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from transformers_mcmoe.workdir import write_whole

logger = logging.getLogger(__name__)

EVALUATION_NAME = "mcmoe_evaluation.json"
NEEDLE_NAME = "mcmoe_needle.png"
RECORD_VERSION = 1


def machine() -> dict[str, Any]:
    """Processor, cores, load over the last minute, and the date."""
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def load_record(name: str | Path, revision: str | None = None) -> dict[str, Any]:
    """What was measured of a packed model, by its folder or Hub id; {} if nothing was.

    Figures of another state of the model, such as with other expert pruning, are left out with a warning.

    Raises:
        OSError: there is no such model.
        ValueError: the file was written by a newer release, or is damaged.
    """
    path = cached_file(str(name), EVALUATION_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    record = {} if path is None else read_record(path)
    if "checkpoint" in record and record["checkpoint"] != checkpoint_mark(name, revision):
        logger.warning("%s of '%s' is of another state of this model; evaluate it again.", EVALUATION_NAME, name)
        return {}
    return record


def checkpoint_mark(name: str | Path, revision: str | None = None) -> str | None:
    """What tells states of a packed model apart: SHA-256 of its config's widths, options and pruning; None if it is dense.

    Raises:
        OSError: there is no such model.
    """
    path = cached_file(str(name), "config.json", revision=revision)
    config = json.loads(Path(str(path)).read_text(encoding="utf-8")).get("quantization_config")
    return None if config is None else hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def read_record(path: str | Path) -> dict[str, Any]:
    """The record in a file."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        version = record.get("record_version", RECORD_VERSION)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"'{path}' is no evaluation record ({error}); delete it, and evaluate again.") from error
    if version > RECORD_VERSION:
        raise ValueError(
            f"'{path}' has version {version}, this release reads up to {RECORD_VERSION}; update the package."
        )
    return record


def merged(record: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """A record with new sections; texts and tasks are replaced by name, other sections whole.

    Figures of another state of the model (`checkpoint`, see `checkpoint_mark`) do not stay.
    """
    same = record.get("checkpoint") == new.get("checkpoint", record.get("checkpoint"))
    found = (dict(record) if same else {}) | {"record_version": RECORD_VERSION}
    for section, value in new.items():
        keep = section in ("text", "tasks") and isinstance(found.get(section), Mapping)
        found[section] = {**found[section], **value} if keep else value
    return found


def write_record(record: Mapping[str, Any], path: str | Path) -> None:
    """Write a record, whole or not at all."""
    write_whole(path, json.dumps(record, indent=2, allow_nan=False) + "\n")
