# SPDX-License-Identifier: Apache-2.0
"""What was measured of a packed model, kept beside its weights as `mcmoe_evaluation.json`.

One section per kind of measurement; measuring again replaces its section and leaves the others. Reports and model
cards are made from it. Knows files and machines, not how anything was measured.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from transformers_mcmoe.workdir import write_whole

EVALUATION_NAME = "mcmoe_evaluation.json"
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

    Raises:
        OSError: there is no such model.
        ValueError: the file was written by a newer release, or is damaged.
    """
    path = cached_file(str(name), EVALUATION_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    return {} if path is None else read_record(path)


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
    """A record with new sections; texts and tasks are replaced by name, other sections whole."""
    found = dict(record) | {"record_version": RECORD_VERSION}
    for section, value in new.items():
        keep = section in ("text", "tasks") and isinstance(found.get(section), Mapping)
        found[section] = {**found[section], **value} if keep else value
    return found


def write_record(record: Mapping[str, Any], path: str | Path) -> None:
    """Write a record, whole or not at all."""
    write_whole(path, json.dumps(record, indent=2, allow_nan=False) + "\n")
