# SPDX-License-Identifier: Apache-2.0
"""Learned expert pruning: the "top-any" pruning of MC# (arXiv 2510.10962), in the form that this project chose.

`router` decides in one layer. Routers are trained by `training`: `costs` measures what slots cost, `fitting` fits a layer's
router to that, `joint` runs the model under all of them.
"""

from transformers_mcmoe.routing.otp.router import (
    LearnedPruning,
    PrefixRouter,
    dropping_points,
    kept_slots,
    prefix_scores,
    routing_features,
    sampled_mask,
)

__all__ = [
    "LearnedPruning",
    "PrefixRouter",
    "dropping_points",
    "kept_slots",
    "prefix_scores",
    "routing_features",
    "sampled_mask",
]
