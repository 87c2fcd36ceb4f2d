# SPDX-License-Identifier: Apache-2.0
"""Which of the experts that a router chose a token really runs: dynamic expert pruning at run time.

`ratios` counts routing weights in calibration and reads thresholds from the counts, `importance` ranks tokens; `odp` and
`otp` are rules that decide in one layer, `layer` is what rules have in common. `prunable` says what of a model can be pruned,
`observe` counts its routing, `attach` puts a rule into it.
"""

from transformers_mcmoe.routing.attach import ExpertPruning, attached, reroute
from transformers_mcmoe.routing.importance import attention_received
from transformers_mcmoe.routing.layer import LayerPruning, reweighted
from transformers_mcmoe.routing.observe import observe_routing, record_routing, routing_arguments
from transformers_mcmoe.routing.odp import ThresholdPruning
from transformers_mcmoe.routing.otp import (
    LearnedPruning,
    PrefixRouter,
    dropping_points,
    kept_slots,
    prefix_scores,
    routing_features,
    sampled_mask,
)
from transformers_mcmoe.routing.prunable import (
    ROUTER,
    check_learnable,
    check_prunable,
    check_top_k,
    chosen_layers,
    expert_bytes,
    prunable_experts,
    routers_of,
    set_router,
)
from transformers_mcmoe.routing.ratios import RatioTable, RoutingRatios, sort_slots

__all__ = [
    "ROUTER",
    "ExpertPruning",
    "LayerPruning",
    "LearnedPruning",
    "PrefixRouter",
    "RatioTable",
    "RoutingRatios",
    "ThresholdPruning",
    "attached",
    "attention_received",
    "check_learnable",
    "check_prunable",
    "check_top_k",
    "chosen_layers",
    "dropping_points",
    "expert_bytes",
    "kept_slots",
    "observe_routing",
    "prefix_scores",
    "prunable_experts",
    "record_routing",
    "reroute",
    "reweighted",
    "routers_of",
    "routing_arguments",
    "routing_features",
    "sampled_mask",
    "set_router",
    "sort_slots",
]
