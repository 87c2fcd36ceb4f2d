# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Experts compression inside Hugging Face transformers.

Importing this package registers the quantization method "mcmoe" with transformers; `from_pretrained` then compresses
(`quantization_config=MCMoEConfig(...)`) and loads packed checkpoints.
"""

from transformers_mcmoe.config import MCMoEConfig, ODPConfig, OTPConfig, PruneConfig, RankConfig
from transformers_mcmoe.integrations.exports import unpack
from transformers_mcmoe.kernels import backend_info
from transformers_mcmoe.nn import PackedExperts, PackedLinear
from transformers_mcmoe.plan import Plan
from transformers_mcmoe.pruning import expert_pruning_stats, set_expert_pruning, train_expert_pruning
from transformers_mcmoe.quantizer import MCMoEHfQuantizer
from transformers_mcmoe.report import compression_report
from transformers_mcmoe.version import __version__

__all__ = [
    "MCMoEConfig",
    "MCMoEHfQuantizer",
    "ODPConfig",
    "OTPConfig",
    "PackedExperts",
    "PackedLinear",
    "Plan",
    "PruneConfig",
    "RankConfig",
    "__version__",
    "backend_info",
    "compression_report",
    "expert_pruning_stats",
    "set_expert_pruning",
    "train_expert_pruning",
    "unpack",
]
