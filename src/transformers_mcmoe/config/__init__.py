# SPDX-License-Identifier: Apache-2.0
"""MCMoEConfig and the options of its parts: every knob there is, validated on construction, stored as JSON.

Knows no model: what depends on shapes is checked by the pipeline.
"""

from transformers_mcmoe.config.compression import FORMAT_VERSION, QUANT_METHOD, MCMoEConfig
from transformers_mcmoe.config.otp import TARGET, OTPConfig
from transformers_mcmoe.config.pruning import ODPConfig
from transformers_mcmoe.config.structure import PruneConfig, RankConfig
from transformers_mcmoe.config.values import ALLOCATIONS, PRESETS, ROUNDINGS

__all__ = [
    "ALLOCATIONS",
    "FORMAT_VERSION",
    "PRESETS",
    "QUANT_METHOD",
    "ROUNDINGS",
    "TARGET",
    "MCMoEConfig",
    "ODPConfig",
    "OTPConfig",
    "PruneConfig",
    "RankConfig",
]
