# SPDX-License-Identifier: Apache-2.0
"""What every row of the results says of where and when it was measured."""

from __future__ import annotations

from typing import Any

from transformers_mcmoe.evaluation.record import machine


def here() -> dict[str, Any]:
    """Load over the last minute, cores, name of the processor, and the date."""
    return machine()
