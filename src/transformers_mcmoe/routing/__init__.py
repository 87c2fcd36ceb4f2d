# SPDX-License-Identifier: Apache-2.0
"""Which of the experts that a router chose a token really runs: dynamic expert pruning at run time.

`ratios` counts routing weights in calibration and reads thresholds from the counts, `importance` ranks tokens, `odp`
decides in one layer, `attach` puts that into a model.
"""

from transformers_mcmoe.routing.attach import (
    ExpertPruning,
    attached,
    check_prunable,
    check_top_k,
    chosen_layers,
    expert_bytes,
    observe_routing,
    prunable_experts,
    record_routing,
)
from transformers_mcmoe.routing.importance import attention_received
from transformers_mcmoe.routing.odp import LayerPruning
from transformers_mcmoe.routing.ratios import RatioTable, RoutingRatios

__all__ = [
    "ExpertPruning",
    "LayerPruning",
    "RatioTable",
    "RoutingRatios",
    "attached",
    "attention_received",
    "check_prunable",
    "check_top_k",
    "chosen_layers",
    "expert_bytes",
    "observe_routing",
    "prunable_experts",
    "record_routing",
]
