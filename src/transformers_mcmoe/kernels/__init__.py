# SPDX-License-Identifier: Apache-2.0
"""The operators of packed matrices, `torch.ops.mcmoe.*`. Knows tensors only, no modules and no models."""

from __future__ import annotations

from typing import Any

from transformers_mcmoe.kernels import cpu, gpu, ops

__all__ = ["backend_info", "ops"]


def backend_info() -> dict[str, Any]:
    """What computes here.

    Returns:
        "cpu": "compiled" or "reference" (no compiled kernels, or MCMOE_ISA=reference); "instruction_set" in use;
        "instruction_sets" that this machine runs, best first; "mode": "exact" or "int8"; "gpu": "triton", "reference" or "none".
    """
    return {
        "cpu": "reference" if cpu.library() is None else "compiled",
        "instruction_set": cpu.instruction_set(),
        "instruction_sets": cpu.instruction_sets(),
        "mode": cpu.mode(),
        "gpu": gpu.name(),
    }
