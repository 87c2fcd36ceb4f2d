# SPDX-License-Identifier: Apache-2.0
"""Choosing one option per item under a budget: the scores that price a loss, and the exact solver.

It does not know models, modules, checkpoints or how the statistics were collected.
"""

from __future__ import annotations

from transformers_mcmoe.allocation.knapsack import solve
from transformers_mcmoe.allocation.significance import SCORES, ExpertStatistics, uniform

__all__ = ["SCORES", "ExpertStatistics", "solve", "uniform"]
