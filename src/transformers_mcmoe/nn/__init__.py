# SPDX-License-Identifier: Apache-2.0
"""Modules over packed matrices."""

from transformers_mcmoe.nn.experts import PackedExperts
from transformers_mcmoe.nn.linear import PackedLinear
from transformers_mcmoe.nn.roles import ExpertsRole

__all__ = ["ExpertsRole", "PackedExperts", "PackedLinear"]
