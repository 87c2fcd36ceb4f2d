# SPDX-License-Identifier: Apache-2.0
"""Puts expert pruning between the routers and the experts of a model, packed or not, and takes it out again.

Knows modules and hooks; which slots are skipped is decided elsewhere (`odp`), and thresholds are given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from transformers_mcmoe.config import ODPConfig, OTPConfig
from transformers_mcmoe.models.experts import (
    Experts,
    FusedExperts,
    find_experts,
    is_attention,
    layer_of,
    routes_outside,
    stacks_of,
)
from transformers_mcmoe.nn import PackedExperts
from transformers_mcmoe.routing.call import Call
from transformers_mcmoe.routing.importance import IMPLEMENTATIONS, RECORDER, TokenImportance
from transformers_mcmoe.routing.layer import LayerPruning
from transformers_mcmoe.routing.odp import ThresholdPruning
from transformers_mcmoe.routing.otp import LearnedPruning, PrefixRouter
from transformers_mcmoe.routing.ratios import RoutingRatios

# attribute of a pruned model: its `ExpertPruning`
ATTRIBUTE = "mcmoe_expert_pruning"
# attribute of an experts module: its trained `PrefixRouter`
ROUTER = "otp"
# options that skip nothing
_COUNT = ODPConfig(threshold=0, protect=0, renormalize=False)
# names that model configs have for K
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")


def prunable_experts(model: nn.Module) -> dict[str, FusedExperts]:
    """Adapters of all experts modules, packed ones included, by path.

    Raises:
        ValueError: the model has no experts, or their routing cannot be changed: it is applied outside of them, or
            each token has a single expert.
    """
    packed = {path: module.adapter for path, module in model.named_modules() if isinstance(module, PackedExperts)}
    found: dict[str, Experts] = {**packed, **find_experts(model, skip=PackedExperts, required=not packed)}
    for path, experts in found.items():
        if routes_outside(experts):
            raise ValueError(
                f"The experts of class {type(experts.module).__name__} at '{path}' are not handed their routing weights; "
                "expert pruning is not available for this model."
            )
    return dict(sorted(found.items(), key=lambda item: layer_of(item[0])))  # type: ignore[arg-type]


def check_top_k(slots: int, path: str) -> None:
    """Raise ValueError where a token has one expert only."""
    if slots < 2:
        raise ValueError(
            f"The router of '{path}' sends each token to one expert, and one is always kept; "
            "expert pruning needs a model with two experts per token or more, leave odp out."
        )


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
            _check_attention(self._model, chosen)
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
        return _bytes(module, experts), none

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
            current = _base_implementation(config)
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


def routers_of(model: Any, found: Mapping[str, FusedExperts]) -> dict[str, PrefixRouter]:
    """The trained routers of a model, by experts path; experts that were not compressed may have none.

    Raises:
        ValueError: no experts module has one.
    """
    known = {path: getattr(model.get_submodule(path), ROUTER, None) for path in found}
    routers = {path: router for path, router in known.items() if isinstance(router, PrefixRouter)}
    if not routers:
        raise ValueError(
            "This model has no pruning routers; train them with train_expert_pruning(model, dataset, target=0.2)."
        )
    return routers


def set_router(module: nn.Module, router: PrefixRouter | None) -> None:
    """Give an experts module its router, or take it away. It is saved with packed experts, and with no others."""
    if not isinstance(module, PackedExperts):
        module.__dict__[ROUTER] = router  # no submodule: plain transformers would save it
    elif router is not None:
        module.add_module(ROUTER, router)
    else:
        module._modules.pop(ROUTER, None)


def chosen_layers(found: Mapping[str, FusedExperts], odp: ODPConfig) -> list[str]:
    """Experts paths in the decoder layers that the options name; all for "auto".

    Raises:
        ValueError: a layer has no experts.
    """
    if isinstance(odp.layers, str):
        return list(found)
    numbers = {layer_of(path)[1] for path in found}
    unknown = [number for number in odp.layers if number not in numbers]
    if unknown:
        raise ValueError(f"layers={list(odp.layers)} is not valid: layer {unknown[0]} has no experts.")
    return [path for path in found if layer_of(path)[1] in odp.layers]


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


@contextmanager
def observe_routing(model: Any) -> Iterator[dict[str, RoutingRatios]]:
    """While open, every call of the model adds to what is known of its routing, by experts path."""
    found = prunable_experts(model)
    ratios = {path: RoutingRatios(experts.num_experts) for path, experts in found.items()}
    with ExitStack() as stack:
        for path, experts in found.items():
            stack.enter_context(record_routing(model.get_submodule(path), experts, ratios[path]))
        yield ratios


@contextmanager
def record_routing(module: nn.Module, experts: Experts, ratios: RoutingRatios) -> Iterator[None]:
    """While open, every call of an experts module is counted; nothing is where it is not handed its routing."""
    if routes_outside(experts):
        yield
        return

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, index, weights = experts.route(*routing_arguments(experts, args, kwargs))  # type: ignore[attr-defined]
        ratios.add(index, weights)

    with module.register_forward_pre_hook(hook, with_kwargs=True):
        yield


def slots_of(model: Any) -> int | None:
    """K, the experts per token, as the model's config says; None if it does not say so by one of the usual names."""
    config = model.config.get_text_config()
    return next((slots for name in TOP_K if isinstance(slots := getattr(config, name, None), int)), None)


def check_learnable(model: Any, otp: OTPConfig) -> None:
    """Raise ValueError if a model cannot be pruned by routers that skip the wanted share, before anything is run."""
    found = prunable_experts(model)
    if (slots := slots_of(model)) is not None:
        check_top_k(slots, next(iter(found)))
        if otp.target is not None and otp.target > (slots - 1) / slots:
            raise ValueError(
                f"target={otp.target} cannot be met: a token keeps one of its {slots} experts at least, so at most "
                f"{(slots - 1) / slots:.2f} of the routed slots can be skipped; lower it."
            )


def check_prunable(model: Any, odp: ODPConfig) -> None:
    """Raise ValueError if a model cannot be pruned with these options, before anything is run.

    Whether a token has one expert only is read from the model's config, where it has one of the usual names.
    """
    found = prunable_experts(model)
    chosen_layers(found, odp)
    if (slots := slots_of(model)) is not None:
        check_top_k(slots, next(iter(found)))
        most = (1 - odp.protect) * (slots - 1) / slots  # type: ignore[operator]
        if odp.rate is not None and odp.rate > most + odp.drop_all:
            raise ValueError(
                f"rate={odp.rate} cannot be met: with {slots} experts per token and protect={odp.protect} about "
                f"{most:.2f} of the routed bytes can be skipped; lower it."
            )
    if odp.needs_attention:
        _check_attention(model, found)


def _check_attention(model: Any, paths: Iterable[str]) -> None:
    """Raise ValueError where tokens cannot be ranked by attention."""
    modules = [module for stack in stacks_of(paths) for module in model.get_submodule(stack).modules()]
    attentions = [module for module in modules if is_attention(module)]
    if not attentions:
        raise ValueError(f"{type(model).__name__} has no attention to rank tokens by; set protect=0 and drop_all=0.")
    for module in attentions:
        if hasattr(module, "config") and (current := _base_implementation(module.config)) not in IMPLEMENTATIONS:
            raise ValueError(
                f"attn_implementation={current!r} does not give the attention that tokens receive; load the model "
                f"with one of {tuple(IMPLEMENTATIONS)}, or set protect=0."
            )


def _base_implementation(config: Any) -> str:
    """What a model computes attention with, without what is put around it here."""
    current = config._attn_implementation or "eager"
    return next((name for name, ours in IMPLEMENTATIONS.items() if ours == current), current)


def _attention_before(model: Any, layer: str) -> list[nn.Module]:
    """Softmax attention modules of a decoder layer, or of the last layer before it that has any."""
    stack, number = layer_of(layer)
    for i in range(number, -1, -1):
        modules = [module for module in model.get_submodule(f"{stack}.{i}").modules() if is_attention(module)]
        if modules:
            return modules
    return []


def expert_bytes(model: nn.Module) -> dict[str, list[float]]:
    """Bytes of every expert, by experts path."""
    return {path: _bytes(model.get_submodule(path), experts) for path, experts in prunable_experts(model).items()}


def _bytes(module: nn.Module, experts: FusedExperts) -> list[float]:
    if isinstance(module, PackedExperts):
        return module.expert_bytes()
    size = sum(p.out_features * p.in_features for p in experts.projections)
    itemsize = next(experts.module.parameters()).element_size()
    return [float(size * itemsize)] * experts.num_experts


def routing_arguments(experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """A call's arguments in their order."""
    signature = inspect.signature(type(experts.module).forward)
    return signature.bind(experts.module, *args, **kwargs).args[1:]


Rule = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


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
