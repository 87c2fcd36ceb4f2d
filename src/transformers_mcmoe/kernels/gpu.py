# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a device that is not a CPU. Knows devices and packages, no kernels."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

DEVICES = ("cuda", "xpu")


def backend(device: torch.device) -> Any | None:
    """The module whose kernels serve a device, `kernels.triton`; None where the reference does."""
    return _triton() if device.type in DEVICES else None


@cache
def _triton() -> Any | None:
    try:
        return importlib.import_module("transformers_mcmoe.kernels.triton")
    except ImportError as error:
        logger.warning(
            "Triton cannot be imported (%s); packed layers run on the slow reference on this device.", error
        )
        return None
