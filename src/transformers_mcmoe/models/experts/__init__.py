# SPDX-License-Identifier: Apache-2.0
"""Finds the experts of any transformers model and reads, runs and replaces them through one interface.

Shapes come from tensors and flags from instances, never from configs. An adapter knows one experts module; none knows
checkpoints, calibration or widths. A new layout is a class (`fused`, `exceptions`, `listed`) and, where its class name
must be known, a line of the table in `finding`.

E experts, H hidden size, I intermediate size, T tokens, K experts per token.
"""

from transformers_mcmoe.models.experts.base import BLOCK, Experts, Projection, Record, forward_as
from transformers_mcmoe.models.experts.finding import (
    EXCEPTIONS,
    Widths,
    find_experts,
    find_linears,
    is_attention,
    layer_of,
    routes_outside,
    stacks_of,
)
from transformers_mcmoe.models.experts.fused import FusedExperts
from transformers_mcmoe.models.experts.listed import ListExperts

__all__ = [
    "BLOCK",
    "EXCEPTIONS",
    "Experts",
    "FusedExperts",
    "ListExperts",
    "Projection",
    "Record",
    "Widths",
    "find_experts",
    "find_linears",
    "forward_as",
    "is_attention",
    "layer_of",
    "routes_outside",
    "stacks_of",
]
