# SPDX-License-Identifier: Apache-2.0
"""What every row of the results says of where and when it was measured."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any


def here() -> dict[str, Any]:
    """Load over the last minute, cores, name of the processor, and the date."""
    return {
        "load": round(os.getloadavg()[0], 1),
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
