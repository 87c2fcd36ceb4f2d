# SPDX-License-Identifier: Apache-2.0
"""Packed checkpoints in vLLM, by its plugin mechanism: `vllm serve DIR` and `LLM(DIR)` find `register` by an entry point.

`config` reads the checkpoint's config, `linear` and `experts` load and run its matrices, `pruning` decides which of their experts
tokens skip. vLLM is imported only when vLLM itself asks for the plugin.
"""

from __future__ import annotations

import importlib.util
import logging

from transformers_mcmoe.config import QUANT_METHOD

logger = logging.getLogger(__name__)

# releases whose interfaces the plugin was written for: the first that it knows, and the first that it does not
SUPPORTED = ("0.32", "0.33")


def register() -> None:
    """Make vLLM take "mcmoe" checkpoints; called in each of its processes, any number of times.

    A vLLM with other interfaces is left as it is, with a warning: it has other models to serve.
    """
    if importlib.util.find_spec("vllm") is None:
        return
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if QUANT_METHOD in QUANTIZATION_METHODS:
        return
    try:
        from transformers_mcmoe.integrations.vllm.config import PackedConfig
    except ImportError as error:
        logger.warning("transformers_mcmoe cannot serve its checkpoints in this vLLM: %s; it was written for %s.",
                       error, supported())  # fmt: skip
        return
    register_quantization_config(QUANT_METHOD)(PackedConfig)


def supported() -> str:
    """The supported releases, in words."""
    return f"vLLM >= {SUPPORTED[0]}, < {SUPPORTED[1]}"
