# SPDX-License-Identifier: Apache-2.0
"""What is left of a model's experts: which are dropped, and at what rank the others are kept. Knows measured outputs and sets of experts, not files or layers."""

from transformers_mcmoe.structure.expert_pruning import (
    drop_counts,
    leave_one_out,
    reception_field,
    search,
    search_is_exhaustive,
)
from transformers_mcmoe.structure.low_rank import break_even, factorize, fit_left, ranks_for, root_of
from transformers_mcmoe.structure.outputs import BlockOutputs, BlockRecorder

__all__ = [
    "BlockOutputs",
    "BlockRecorder",
    "break_even",
    "drop_counts",
    "factorize",
    "fit_left",
    "leave_one_out",
    "ranks_for",
    "reception_field",
    "root_of",
    "search",
    "search_is_exhaustive",
]
