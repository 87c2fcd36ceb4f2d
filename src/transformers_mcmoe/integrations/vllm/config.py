# SPDX-License-Identifier: Apache-2.0
"""PackedConfig: which layers of a vLLM model are packed, and how wide. It knows names and the plan, no tensors.

vLLM joins matrices that read the same input into one layer, and calls modules as the original checkpoint does, which need not
be what transformers calls them: a linear layer is found by its place behind the number of its decoder layer.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from packaging.version import Version
from transformers import AutoConfig
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.utils import WeightsMapper
from vllm.version import __version__

from transformers_mcmoe.config import QUANT_METHOD, MCMoEConfig
from transformers_mcmoe.integrations.vllm import SUPPORTED, supported
from transformers_mcmoe.integrations.vllm.experts import PackedExpertsMethod
from transformers_mcmoe.integrations.vllm.linear import PackedLinearMethod
from transformers_mcmoe.integrations.vllm.pruning import Pruning
from transformers_mcmoe.kernels import gpu
from transformers_mcmoe.models.experts import layer_of
from transformers_mcmoe.models.stream import checkpoint_files
from transformers_mcmoe.nn.checks import check_complete, check_tensors
from transformers_mcmoe.plan import Plan
from transformers_mcmoe.replacement import packed_model
from transformers_mcmoe.routing import ROUTER

logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
# parts of multimodal models that are never packed, though their layers are numbered too
_OTHER = re.compile(r"(?:^|\.)(?:visual|vision\w*|audio\w*|embed_vision|embed_audio)\.")


class PackedConfig(QuantizationConfig):
    """A packed checkpoint, as vLLM asks about it layer by layer.

    Args:
        config: of the checkpoint.

    Raises:
        ValueError: the checkpoint has parts that the plugin does not serve, or no plan.
    """

    def __init__(self, config: MCMoEConfig) -> None:
        super().__init__()
        if config.plan is None:
            raise ValueError("The checkpoint's quantization_config has no plan; it was not written by this package.")
        _check(config.plan)
        self.config, self.plan = config, config.plan
        self._experts = {layer_of(path)[1]: path for path in self.plan.experts}
        self._linears = {_place(path): bits for path, bits in self.plan.linears.items()}
        self.pruning = Pruning(config)

    def get_name(self) -> str:
        """The checkpoint's `quant_method`."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What activations may be."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of NVIDIA's GPUs, as vLLM writes it."""
        return 10 * gpu.CAPABILITY[0] + gpu.CAPABILITY[1]

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        """From config.json's `quantization_config`.

        Raises:
            ValueError: this vLLM is not one that the plugin was written for, or the config is not valid.
        """
        release = Version(Version(__version__).base_version)
        if not Version(SUPPORTED[0]) <= release < Version(SUPPORTED[1]):
            raise ValueError(f"This is vLLM {__version__}, but packed checkpoints are served by {supported()}.")
        return cls(MCMoEConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Learn which checkpoint it is, and look at its tensors' names and shapes; called before the model is built.

        Raises:
            ValueError: a tensor is missing, misnamed, or has another shape, packed or not, which vLLM itself does not ask; or the plan
                belongs to another model.
        """
        self.pruning.source = (model_name, revision)
        try:
            config = AutoConfig.from_pretrained(model_name, revision=revision)
        except (ValueError, KeyError) as error:  # code of the model's own, or newer than this transformers
            logger.warning("transformers has no '%s' to check its tensors by (%s).", model_name, error)
            return
        model, structure, _ = packed_model(config, self.config)
        files = checkpoint_files(model_name, revision)
        check_tensors(model, structure, files)
        check_complete(model, structure, files)

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """What of the checkpoint vLLM's loaders pass over: routers of learned pruning, which `pruning` reads."""
        return WeightsMapper(orig_to_new_suffix=dict.fromkeys((".g_idx", f".{ROUTER}.hidden", f".{ROUTER}.scores")))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is loaded and run; None for embeddings and the head.

        Raises:
            ValueError: vLLM joins matrices of which only some are packed.
        """
        if isinstance(layer, RoutedExperts):
            path = self._experts.get(_number(prefix))
            if path is None:
                return None
            rule = self.pruning.of(path)
            return PackedExpertsMethod(layer, prefix, self.plan.experts[path], self.config.group_size, rule)
        if not isinstance(layer, LinearBase):
            return None
        names = self.parts(prefix)
        widths = [None if _OTHER.search(name) else self._linears.get(_place(name)) for name in names]
        known = [bits for bits in widths if bits is not None]
        if not known:
            return UnquantizedLinearMethod()
        if len(known) < len(widths):
            dense = names[widths.index(None)]
            raise ValueError(
                f"vLLM joins '{dense}', which is dense, with packed matrices in '{prefix}'; pack all of them."
            )
        return PackedLinearMethod(names, known, self.config.group_size)

    def parts(self, prefix: str) -> list[str]:
        """Names in the checkpoint of what vLLM calls by one: "..qkv_proj" -> those of q, k and v."""
        head, dot, leaf = prefix.rpartition(".")
        return [head + dot + name for name in self.packed_modules_mapping.get(leaf, [leaf])]


def _check(plan: Plan) -> None:
    """Raise ValueError for what cannot be served."""
    numbers = [layer_of(path)[1] for path in plan.experts]
    if len(set(numbers)) < len(numbers):
        twice = next(path for path in plan.experts if numbers.count(layer_of(path)[1]) > 1)
        raise ValueError(
            f"'{twice}' shares its decoder layer with other experts; the vLLM plugin serves one set of experts a layer."
        )
    for path, widths in plan.experts.items():
        if any(widths.ranks):
            raise ValueError(
                f"The experts of '{path}' have low-rank factors, which the vLLM plugin does not serve; use transformers "
                "(mcmoe serve), or compress with rank=None."
            )
        if not widths.kept:
            raise ValueError(f"'{path}' keeps no expert; the vLLM plugin needs one at least.")


def _number(name: str) -> int:
    """Number of the decoder layer a module lies in, -1 for none."""
    match = _NUMBER.search(name)
    return int(match.group(1)) if match else -1


def _place(name: str) -> tuple[int, str]:
    """A module's decoder layer, and its name inside."""
    match = _NUMBER.search(name)
    return (int(match.group(1)), name[match.end() :]) if match else (-1, name)
