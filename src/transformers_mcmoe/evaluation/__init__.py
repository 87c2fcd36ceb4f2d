# SPDX-License-Identifier: Apache-2.0
"""What compression costs: perplexity, divergence from the dense model, benchmark tasks, speed, and the error of every layer."""

from transformers_mcmoe.evaluation.benchmarks import run_benchmarks
from transformers_mcmoe.evaluation.layers import ErrorBuildup, LayerError, error_buildup
from transformers_mcmoe.evaluation.needle import find_needles
from transformers_mcmoe.evaluation.predictions import Evaluation, TokenScores, evaluate
from transformers_mcmoe.evaluation.protocol import Protocol, Window, windows
from transformers_mcmoe.evaluation.record import load_record, write_record
from transformers_mcmoe.evaluation.samples import evaluate_samples
from transformers_mcmoe.evaluation.speed import measure_speed
from transformers_mcmoe.evaluation.token_classes import TokenClasses

__all__ = [
    "ErrorBuildup",
    "Evaluation",
    "LayerError",
    "Protocol",
    "TokenClasses",
    "TokenScores",
    "Window",
    "error_buildup",
    "evaluate",
    "evaluate_samples",
    "find_needles",
    "load_record",
    "measure_speed",
    "run_benchmarks",
    "windows",
    "write_record",
]
