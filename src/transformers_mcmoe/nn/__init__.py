# SPDX-License-Identifier: Apache-2.0
"""Modules over packed matrices."""

from transformers_mcmoe.nn.packed import PackedExperts, PackedLinear

__all__ = ["PackedExperts", "PackedLinear"]
