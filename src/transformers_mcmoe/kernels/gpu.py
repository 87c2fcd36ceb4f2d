# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a device that is not a CPU. Knows devices and packages, no kernels.

MCMOE_GPU=reference switches the kernels off, in favour of the reference.
"""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

DEVICES = ("cuda", "xpu")
CAPABILITY = (8, 0)  # the least of NVIDIA's that the kernels were compiled for


def backend(device: torch.device) -> Any | None:
    """The module whose kernels serve a device, `kernels.triton`; None where the reference does."""
    return _backend(device) if device.type in DEVICES else None


def name() -> str:
    """What computes on this machine's GPU: "triton", "reference", or "none" where there is no GPU."""
    device = next((kind for kind in DEVICES if torch.get_device_module(kind).is_available()), None)
    if device is None:
        return "none"
    return "reference" if backend(torch.device(device)) is None else "triton"


@cache
def _backend(device: torch.device) -> Any | None:
    if os.environ.get("MCMOE_GPU", "") == "reference":
        return None
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < CAPABILITY:
            logger.warning("Packed layers run on the slow reference on %s: capability %s.%s.", device, *capability)
            return None
    try:
        return importlib.import_module("transformers_mcmoe.kernels.triton")
    except ImportError as error:
        logger.warning(
            "Triton cannot be imported (%s); packed layers run on the slow reference on this device.", error
        )
        return None
