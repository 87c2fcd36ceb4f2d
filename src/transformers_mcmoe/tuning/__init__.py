# SPDX-License-Identifier: Apache-2.0
"""Tuning of a packed model on the dense model's output: codes stay, and all that is real-valued in them and around them moves."""

from transformers_mcmoe.tuning.linear import TunedLinear
from transformers_mcmoe.tuning.training import (
    Teacher,
    Tuned,
    Tuning,
    check_head,
    sequences_for,
    sequences_per_step,
    tune,
)

__all__ = ["Teacher", "Tuned", "TunedLinear", "Tuning", "check_head", "sequences_for", "sequences_per_step", "tune"]
