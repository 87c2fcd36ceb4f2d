# SPDX-License-Identifier: Apache-2.0
"""Finds the experts of a model and the linear layers that are quantized beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from transformers_mcmoe.models.experts.base import Experts
from transformers_mcmoe.models.experts.exceptions import DbrxExperts, Llama4Experts, LongcatExperts
from transformers_mcmoe.models.experts.fused import FusedExperts, is_fused
from transformers_mcmoe.models.experts.listed import ListExperts, is_expert_list

# Classes that the five flags do not describe. A string says why a class cannot be packed.
EXCEPTIONS: dict[str, type[Experts] | str] = {
    "Step3p7Experts": FusedExperts,
    "LongcatFlashExperts": LongcatExperts,
    "DbrxExperts": DbrxExperts,
    "Llama4TextExperts": Llama4Experts,
    "JetMoeParallelExperts": "its experts are routed in the attention as well",
    "DogeCDMoE": "its experts are rows of an embedding",
    "VitPoseNaiveMoe": "its experts are not gated by a router per token",
    "SwitchTransformersExperts": "its experts cast their input to the dtype of their weights",
}


# a width, or several to choose from
Widths = int | tuple[int, ...]


def find_experts(
    model: nn.Module,
    modules_to_not_convert: Sequence[str] = (),
    skip: type[nn.Module] | None = None,
    required: bool = True,
) -> dict[str, Experts]:
    """All experts of a model, by module path.

    Args:
        model: a model with its original modules.
        modules_to_not_convert: names or patterns of modules to leave.
        skip: class of modules that are passed over, with what is in them.
        required: whether it is an error to find none.

    Raises:
        ValueError: the model has no experts, or all of them are excluded.
        NotImplementedError: the model has experts that cannot be packed; the message names their class and path.
    """
    found: dict[str, Experts] = {}
    excluded = False
    passed: list[str] = []
    for path, module in model.named_modules():
        if skip is not None and isinstance(module, skip):
            passed.append(path + ".")
            continue
        if passed and path.startswith(tuple(passed)):
            continue
        kind = EXCEPTIONS.get(type(module).__name__)
        if kind is None:
            if is_fused(module):
                kind = FusedExperts
            elif is_expert_list(path, module):
                kind = ListExperts
            elif not _looks_unsupported(path, module, found):
                continue
            else:
                kind = "its layout is not known"
        if isinstance(kind, str):
            raise NotImplementedError(
                f"The experts of class {type(module).__name__} at '{path}' cannot be packed ({kind}); "
                "this model is not supported."
            )
        if should_convert_module(path, list(modules_to_not_convert)):
            found[path] = kind(path, module)
        else:
            excluded = True
    if not found and required:
        reason = "modules_to_not_convert excludes all of its experts" if excluded else "it has no MoE experts"
        raise ValueError(
            f"{type(model).__name__} cannot be compressed: {reason}; transformers_mcmoe is for Mixture-of-Experts models."
        )
    return found


def _looks_unsupported(path: str, module: nn.Module, found: Mapping[str, Experts]) -> bool:
    """Whether a module is a set of routed experts that no adapter covers: never skip one in silence."""
    name = path.rpartition(".")[2]
    named = re.search(r"Experts?$", type(module).__name__) is not None or name == "experts"
    if not named or "shared" in path.lower() or "Shared" in type(module).__name__:
        return False
    inside = any(path == other or path.startswith(other + ".") for other in found)
    return not inside and any(parameter.dim() >= 2 for parameter in module.parameters())


def find_linears(
    model: nn.Module,
    experts: Mapping[str, Experts],
    attention_bits: Widths,
    shared_expert_bits: Widths,
    modules_to_not_convert: Sequence[str] = (),
) -> dict[str, Widths]:
    """Width of every linear layer that is quantized beside the experts, or its candidates, by module path.

    Attention projections (MLA's too) take `attention_bits`, shared experts and dense MLPs `shared_expert_bits`, both
    only in the decoder layers that belong to the experts' stack; 16 leaves them. Routers, gates of shared experts,
    convolution, Mamba and linear-attention projections stay as they are.
    """
    stacks = [stack + "." for stack in stacks_of(experts)]
    widths: dict[str, Widths] = {}
    for path, module in model.named_modules():
        if type(module) is not nn.Linear or not path.startswith(tuple(stacks)):
            continue
        if any(path.startswith(other + ".") for other in experts):
            continue
        parent_path = path.rpartition(".")[0]
        parent = model.get_submodule(parent_path)
        if is_attention(parent):
            bits = attention_bits
        elif _is_mlp(parent) and not any(other.startswith(parent_path + ".") for other in experts):
            bits = shared_expert_bits
        else:
            continue
        if bits != 16 and should_convert_module(path, list(modules_to_not_convert)):
            widths[path] = bits
    return widths


def layer_of(path: str) -> tuple[str, int]:
    """The ModuleList and the index of the decoder layer a module lies in: "model.layers.3.mlp" -> ("model.layers", 3).

    Raises:
        NotImplementedError: the path has no layer number.
    """
    match = re.match(r"(.*?)\.(\d+)(?:\.|$)", path)
    if match is None:
        raise NotImplementedError(f"'{path}' lies in no numbered decoder layer; this model is not supported.")
    return match.group(1), int(match.group(2))


def stacks_of(paths: Iterable[str]) -> list[str]:
    """The ModuleLists of decoder layers that modules lie in, each once."""
    return list(dict.fromkeys(layer_of(path)[0] for path in paths))


def is_attention(module: nn.Module) -> bool:
    """Softmax attention: it has a scale for its logits, which linear attention and state-space layers lack."""
    name = type(module).__name__
    if not hasattr(module, "scaling") or re.search(r"Linear|Lightning|Delta|Mamba|Indexer", name):
        return False
    return hasattr(module, "num_key_value_groups") or "Attention" in name


def routes_outside(experts: Experts) -> bool:
    """Whether routing weights are applied by the block around the experts, which are not handed them."""
    return not isinstance(experts, FusedExperts) or isinstance(experts, Llama4Experts)


def _is_mlp(module: nn.Module) -> bool:
    return re.search(r"(MLP|FeedForward|DenseActDense)$", type(module).__name__) is not None
