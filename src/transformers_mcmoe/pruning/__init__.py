# SPDX-License-Identifier: Apache-2.0
"""Expert pruning of loaded models: `switching` is what users call, `thresholds` and `learned` find what the two rules go by,
`stats` tells what was skipped. `routing` applies it.
"""

from transformers_mcmoe.pruning.learned import add_routers, start_learned_pruning, trained
from transformers_mcmoe.pruning.stats import expert_pruning_stats
from transformers_mcmoe.pruning.switching import set_expert_pruning, train_expert_pruning, without_expert_pruning
from transformers_mcmoe.pruning.thresholds import recorded_ratios, start_expert_pruning, with_thresholds

__all__ = [
    "add_routers",
    "expert_pruning_stats",
    "recorded_ratios",
    "set_expert_pruning",
    "start_expert_pruning",
    "start_learned_pruning",
    "train_expert_pruning",
    "trained",
    "with_thresholds",
    "without_expert_pruning",
]
