# SPDX-License-Identifier: Apache-2.0
"""What compression costs: perplexity, divergence from the dense model, and the error of every layer."""

from transformers_mcmoe.evaluation.layers import ErrorBuildup, LayerError, error_buildup
from transformers_mcmoe.evaluation.predictions import Evaluation, evaluate
from transformers_mcmoe.evaluation.protocol import Protocol, Window, windows

__all__ = [
    "ErrorBuildup",
    "Evaluation",
    "LayerError",
    "Protocol",
    "Window",
    "error_buildup",
    "evaluate",
    "windows",
]
