# SPDX-License-Identifier: Apache-2.0
"""Puts expert pruning between the routers and the experts of a model, packed or not, and takes it out again.

Knows modules and hooks; which slots are skipped is decided elsewhere (`odp`, `otp`), and thresholds and routers are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from transformers_mcmoe.calibration.images import image_token_ids
from transformers_mcmoe.config import ODPConfig, OTPConfig
from transformers_mcmoe.models.experts import (
    FusedExperts,
    is_attention,
    layer_of,
    stacks_of,
)
from transformers_mcmoe.nn import PackedExperts
from transformers_mcmoe.routing.call import Call
from transformers_mcmoe.routing.importance import IMPLEMENTATIONS, RECORDER, TokenImportance
from transformers_mcmoe.routing.layer import LayerPruning
from transformers_mcmoe.routing.observe import routing_arguments
from transformers_mcmoe.routing.odp import ThresholdPruning
from transformers_mcmoe.routing.otp import LearnedPruning
from transformers_mcmoe.routing.prunable import (
    base_implementation,
    bytes_of,
    check_attention,
    chosen_layers,
    prunable_experts,
    routers_of,
)

# attribute of a pruned model: its `ExpertPruning`
ATTRIBUTE = "mcmoe_expert_pruning"
# options that skip nothing
_COUNT = ODPConfig(threshold=0, protect=0, renormalize=False)
Rule = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class ExpertPruning:
    """The pruning of one model, while it is attached.

    Args:
        model: a transformers model.
        options: thresholds for the layers they name, or those of trained routers, which the experts modules then have.

    Attributes:
        layers: pruning of each layer, by experts path.

    Raises:
        ValueError: thresholds or routers do not belong to the model; tokens are to be ranked, but the model has no
            attention or one whose weights cannot be taken.
    """

    def __init__(self, model: Any, options: ODPConfig | OTPConfig) -> None:
        self.options = options
        self.layers: dict[str, LayerPruning] = {}
        self._model = model
        self._handles: list[Any] = []
        self._attentions: list[tuple[Any, str]] = []
        found = prunable_experts(model)
        if isinstance(options, OTPConfig):
            self._attach_routers(found, options)
        else:
            self._attach_thresholds(found, options)
        setattr(model, ATTRIBUTE, self)

    def _attach_routers(self, found: Mapping[str, FusedExperts], otp: OTPConfig) -> None:
        routers, shift = routers_of(self._model, found), otp.shift
        calls = {stack: self._follow_calls(stack) for stack in stacks_of(found)}
        for path, experts in found.items():
            call, known = calls[layer_of(path)[0]], self._known(path, experts)
            if path in routers:
                renormalize = otp.renormalize if otp.renormalize is not None else (otp.normalized or {})[path]
                self._attach(path, experts, LearnedPruning(routers[path], shift, path, renormalize, call, *known))
            else:  # nothing is skipped, but counted
                self._attach(path, experts, ThresholdPruning(_COUNT, path, [0.0], False, call, None, *known))

    def _attach_thresholds(self, found: Mapping[str, FusedExperts], odp: ODPConfig) -> None:
        chosen = _with_thresholds(chosen_layers(found, odp), odp)
        if odp.needs_attention:
            check_attention(self._model, chosen)
        ranks = odp.needs_attention or odp.method in ("mean", "variance", "kurtosis")
        repeatable = not ranks and odp.method != "random"
        calls = {stack: self._follow_calls(stack, ranks, repeatable) for stack in stacks_of(found)}
        importance = self._rank_tokens(chosen, calls, odp.causal) if odp.needs_attention else {}
        for path, experts in found.items():
            own, call, known = _COUNT, calls[layer_of(path)[0]], self._known(path, experts)
            ranking = None
            if path in chosen:
                own, ranking = odp, importance.get(_layer(path))
            levels = (own.thresholds or {}).get(path, [0.0])
            renormalize = own.renormalize if own.renormalize is not None else (own.normalized or {})[path]
            self._attach(path, experts, ThresholdPruning(own, path, levels, renormalize, call, ranking, *known))

    def _known(self, path: str, experts: FusedExperts) -> tuple[list[float], int | None]:
        """Bytes of each expert, and the id that stands for none, if the module knows one."""
        module = self._model.get_submodule(path)
        none = experts.num_experts + experts.identity_experts if isinstance(module, PackedExperts) else None
        return bytes_of(module, experts), none

    def _attach(self, path: str, experts: FusedExperts, pruning: LayerPruning) -> None:
        self.layers[path] = pruning
        self._handles.append(reroute(self._model.get_submodule(path), experts, pruning))

    def _follow_calls(self, stack: str, ranks: bool = False, repeatable: bool = True) -> Call:
        """What is known of the calls of a stack of decoder layers."""
        layers = enumerate(self._model.get_submodule(stack))
        attends = next((i for i, layer in layers if any(is_attention(module) for module in layer.modules())), 0)
        call = Call(ranks, repeatable=repeatable, layer=attends)
        owner = self._model.get_submodule(stack.rpartition(".")[0])
        self._handles.append(owner.register_forward_pre_hook(call.begin, with_kwargs=True))
        images = image_token_ids(self._model.config)
        if ranks and images:
            self._handles.append(self._model.register_forward_pre_hook(call.see(images), with_kwargs=True))
            self._handles.append(self._model.register_forward_hook(call.unsee))
        if ranks:
            self._handles.append(owner.register_forward_hook(call.keep))
        return call

    def _rank_tokens(
        self, chosen: Sequence[str], calls: Mapping[str, Call], causal: bool
    ) -> dict[str, TokenImportance]:
        """Importance of tokens by decoder layer, recorded from now on."""
        found: dict[str, TokenImportance] = {}
        sources: dict[int, tuple[nn.Module, Call]] = {}
        for layer, call in {_layer(path): calls[layer_of(path)[0]] for path in chosen}.items():
            before = _attention_before(self._model, layer)
            found[layer] = importance = TokenImportance(call, layer, causal, bool(before))
            hook = self._model.get_submodule(layer).register_forward_pre_hook(importance.enter, with_kwargs=True)
            self._handles.append(hook)
            sources |= {id(module): (module, call) for module in before}
        self._switch_attention([module for module, _ in sources.values()])
        for module, call in sources.values():
            setattr(module, RECORDER, call)
        return found

    def _switch_attention(self, modules: Sequence[Any]) -> None:
        """Let attention run under the function that also records."""
        configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
        for config in configs.values():
            current = base_implementation(config)
            config._attn_implementation = IMPLEMENTATIONS[current]
            self._attentions.append((config, current))

    def detach(self) -> None:
        """Take everything out; the model computes what it did before."""
        for handle in self._handles:
            handle.remove()
        for config, implementation in self._attentions:
            config._attn_implementation = implementation
        for module in self._model.modules():
            if hasattr(module, RECORDER):
                delattr(module, RECORDER)
        self._handles, self._attentions = [], []
        if getattr(self._model, ATTRIBUTE, None) is self:
            delattr(self._model, ATTRIBUTE)


def attached(model: Any) -> ExpertPruning | None:
    """The pruning of a model, None where there is none."""
    return getattr(model, ATTRIBUTE, None)


def _with_thresholds(paths: Sequence[str], odp: ODPConfig) -> list[str]:
    """Those of the paths that thresholds were found for; experts that were not compressed have none.

    Raises:
        ValueError: a layer that the options name has none, or no layer has.
    """
    known = set(odp.thresholds or ()) & set(odp.normalized or ())
    lacking = [path for path in paths if path not in known]
    if lacking and (not isinstance(odp.layers, str) or len(lacking) == len(paths)):
        raise ValueError(f"The pruning thresholds do not fit the model: '{lacking[0]}' has none; calibrate again.")
    return [path for path in paths if path in known]


def _layer(path: str) -> str:
    """Path of the decoder layer that a module lies in."""
    return ".".join(map(str, layer_of(path)))


def _attention_before(model: Any, layer: str) -> list[nn.Module]:
    """Softmax attention modules of a decoder layer, or of the last layer before it that has any."""
    stack, number = layer_of(layer)
    for i in range(number, -1, -1):
        modules = [module for module in model.get_submodule(f"{stack}.{i}").modules() if is_attention(module)]
        if modules:
            return modules
    return []


def reroute(module: nn.Module, experts: FusedExperts, rule: Rule) -> Any:
    """Let a rule change the routing of an experts module: tokens [T, H], ids and weights [T, K] -> ids and weights.

    Returns:
        A handle; its `remove()` undoes it.
    """
    if isinstance(module, PackedExperts):
        module.pruning = rule
        return _Switched(module)

    return module.register_forward_pre_hook(_Rerouted(experts, rule), with_kwargs=True)


class _Rerouted:
    """Pre-hook of dense experts."""

    def __init__(self, experts: FusedExperts, rule: Rule) -> None:
        self._experts, self._rule = experts, rule

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden_states, *routing = routing_arguments(self._experts, args, kwargs)
        return (hidden_states, *self._rule(*self._experts.route(hidden_states, *routing))), {}


class _Switched:
    """Handle of a rule inside a packed module."""

    def __init__(self, module: PackedExperts) -> None:
        self._module = module

    def remove(self) -> None:
        self._module.pruning = None
