# SPDX-License-Identifier: Apache-2.0
"""Which modules of a packed model the names in a LoraConfig mean.

A name means what it means for the dense model: `experts`, `gate_proj`, `w1`, a path, a regular expression, or
"all-linear". Experts are adapted role by role (`nn.ExpertsRole`). Knows names, not weights.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from transformers_mcmoe.models.experts import FusedExperts
from transformers_mcmoe.models.experts.fused import is_fused
from transformers_mcmoe.nn import ExpertsRole, PackedExperts, PackedLinear

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
# variants of LoRA that change what an adapter computes: options of LoraConfig that must stay empty
UNSUPPORTED = ("use_dora", "lora_bias", "layer_replication", "megatron_config", "alora_invocation_tokens")
INITIALISATIONS = (True, False, "gaussian", "mcmoe")


def is_packed(model: nn.Module) -> bool:
    """Whether any module of a model is packed."""
    return any(isinstance(module, PackedExperts | PackedLinear) for module in model.modules())


def adapt_config(config: Any, model: nn.Module) -> None:
    """Resolve a LoraConfig's names for a packed model, in place, before PEFT reads them.

    Raises:
        ValueError: a name means nothing in this model or a part of what can only be adapted together, or an option
            cannot be had on packed modules.
        NotImplementedError: the config is not LoRA's.
    """
    from transformers_mcmoe.integrations.lora.layers import LoraExperts, LoraPackedLinear

    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise NotImplementedError(f"{type(config).__name__} cannot adapt a packed model; use peft.LoraConfig.")
    _check_options(config)
    config._register_custom_module({PackedLinear: LoraPackedLinear, ExpertsRole: LoraExperts})
    if config.target_modules is None and not config.target_parameters:
        return  # PEFT's own default for the family, which resolves to attention, or its error
    names = Names(model)
    dense = names.dense_parameters(config) if config.target_modules else set()
    targets = names.all_linear(config) if _is_all_linear(config) else names.matched(config)
    parameters, roles = names.parameters(config.target_parameters or ())
    targets |= roles
    for pattern in ("rank_pattern", "alpha_pattern"):
        setattr(config, pattern, names.patterns(getattr(config, pattern) or {}, targets))
    config.target_modules = {target for target in targets if target not in names.routers}
    parameters |= dense
    config.target_parameters = parameters | {f"{t}.weight" for t in targets & names.routers.keys()} or None
    _log(targets, names, dense)
    if config.init_lora_weights == "mcmoe":
        config.init_lora_weights = True
        if not config.inference_mode:
            logger.warning(
                'init_lora_weights="mcmoe": the adapter starts at zero until '
                "transformers_mcmoe.integrations.lora.initialize_lora(model, dense, ...) is called."
            )


def _check_options(config: Any) -> None:
    for name in UNSUPPORTED:
        if getattr(config, name, None):
            raise ValueError(f"{name}={getattr(config, name)!r} is not available on packed models; leave it out.")
    if config.init_lora_weights not in INITIALISATIONS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} is not available on packed models; take one of "
            f"{INITIALISATIONS}."
        )
    for name, field in type(config).__dataclass_fields__.items():
        if field.metadata.get("is_lora_variant") and getattr(config, name):
            raise ValueError(f"{name}={getattr(config, name)!r} is not available on packed models; leave it out.")
    if getattr(config, "bias", "none") != "none":
        raise ValueError(f"bias={config.bias!r} is not available on packed models; leave it out.")


def _is_all_linear(config: Any) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR


@dataclass(frozen=True)
class Role:
    """One role of an experts module, and the names that users have for it.

    Attributes:
        path: its module path.
        experts: path of the experts module.
        module: the role.
        whole: names of all of it.
        parts: projection -> the names of its matrices of all experts; the role is meant by those of all projections.
        singles: projection -> the name of each expert's matrix.
    """

    path: str
    experts: str
    module: ExpertsRole
    whole: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]
    singles: Mapping[str, tuple[str, ...]]

    @property
    def names(self) -> Iterator[str]:
        yield from self.whole
        for names in (*self.parts.values(), *self.singles.values()):
            yield from names

    def is_meant(self, wanted: Callable[[str], bool]) -> bool:
        """Whether names that are wanted mean the role.

        Raises:
            ValueError: they mean a part of it.
        """
        if any(map(wanted, self.whole)):
            return True
        found: dict[str, int] = {}
        for projection, names in self.parts.items():
            every = len(self.module.experts)
            count = every if any(map(wanted, names)) else sum(map(wanted, self.singles[projection]))
            if 0 < count < every:
                raise ValueError(
                    f"target_modules names {count} of {every} experts of '{self.experts}'; their adapters are stacked: "
                    "name all."
                )
            found[projection] = count
        if not any(found.values()):
            return False
        missing = [projection for projection, count in found.items() if not count]
        if missing:
            given = next(projection for projection, count in found.items() if count)
            raise ValueError(
                f"target_modules names {given} of '{self.experts}' without {missing[0]}; the two read the same input "
                "and share one adapter: name both."
            )
        return True


class Names:
    """The adaptable modules of a packed model.

    Attributes:
        roles: of all packed experts, by path.
        linears: other linear layers, by path.
        routers: modules that choose experts and are no linear layers, by path; their `weight` is a parameter.
    """

    def __init__(self, model: nn.Module) -> None:
        self.roles: dict[str, Role] = {}
        self.linears: dict[str, nn.Module] = {}
        self.routers: dict[str, nn.Module] = {}
        self._containers: list[str] = []
        self._dense: list[str] = []  # experts modules that were not packed
        self._others: list[str] = []
        self._choosing: set[str] = set()
        self._model: Any = model
        experts: dict[str, int] = {}
        inside: tuple[str, ...] = ()
        for path, module in model.named_modules():
            if path.startswith(inside) and inside:
                continue
            base = module.get_base_layer() if hasattr(module, "get_base_layer") and path else module
            if base is not module:
                inside += (path + ".",)
            if isinstance(base, PackedExperts):
                inside += (path + ".",)
                experts[path] = base.num_experts + base.adapter.identity_experts
                self.roles |= {role.path: role for role in _roles(path, base)}
            elif isinstance(base, nn.Linear | PackedLinear):
                self.linears[path] = base
            elif isinstance(base, nn.ModuleList | nn.ModuleDict):
                self._containers.append(path)
            elif is_fused(base):
                self._dense.append(path)
            else:
                self._others.append(path)
        self._find_routers(experts)

    def _find_routers(self, experts: Mapping[str, int]) -> None:
        """A layer in the experts' block, alone in its parent, with no more outputs than there are experts: it chooses among
        them, or weighs the shared expert. Linear layers of a shared expert have each other beside them."""
        blocks = {path.rpartition(".")[0]: count for path, count in experts.items()}
        for path in [path for path in self._containers if "expert" in path.rpartition(".")[2]]:
            blocks.setdefault(path.rpartition(".")[0], len(list(self._model.get_submodule(path).children())))
        beside = Counter(path.rpartition(".")[0] for path in self.linears)
        for block, count in blocks.items():
            for path, module in self.linears.items():
                parent = path.rpartition(".")[0]
                alone = parent == block or (parent.startswith(block + ".") and beside[parent] == 1)
                if alone and isinstance(module, nn.Linear) and module.out_features <= count:
                    self._choosing.add(path)
            for path in (path for path in self._others if path.startswith(block + ".")):
                weight = self._model.get_submodule(path)._parameters.get("weight")
                if weight is not None and weight.dim() == 2 and weight.shape[0] <= count:
                    self.routers[path] = self._model.get_submodule(path)

    def all_linear(self, config: Any) -> set[str]:
        """Every linear layer and role but the output head and the routers."""
        from peft.tuners.tuners_utils import check_target_module_exists

        head = self._model.get_output_embeddings() if hasattr(self._model, "get_output_embeddings") else None
        found = {path for path, module in self.linears.items() if module is not head and path not in self._choosing}
        config.target_modules = found | set(self.roles)
        return {path for path in config.target_modules if check_target_module_exists(config, path)}

    def matched(self, config: Any) -> set[str]:
        """What a config's target_modules mean.

        Raises:
            ValueError: a name means nothing, or a part of what can only be adapted together.
        """
        from peft.tuners.tuners_utils import check_target_module_exists

        if config.target_modules is None:
            return set()

        def wanted(name: str) -> bool:
            return bool(check_target_module_exists(config, name))

        found = {path for path in (*self.linears, *self.routers) if wanted(path)}
        for path in filter(wanted, self._containers):
            found |= {linear for linear in self.linears if linear.startswith(path + ".")}
        for role in self.roles.values():
            if role.is_meant(wanted):
                found.add(role.path)
        found |= {
            path for path in self._others if path and path not in self.routers and wanted(path)
        }  # PEFT's to judge
        self._check_known(config.target_modules)
        for path in sorted(found & self._choosing):
            if type(self.linears[path]) is not nn.Linear:  # Llama 4: it returns a tuple
                raise ValueError(
                    f"The router '{path}' of class {type(self.linears[path]).__name__} cannot be adapted; leave it out."
                )
        return found

    def dense_parameters(self, config: Any) -> set[str]:
        """Stacked weights of experts that were not packed, where names mean them: PEFT adapts those as parameters."""
        from peft.tuners.tuners_utils import check_target_module_exists

        found = set()
        for path in self._dense:
            inputs, down = FusedExperts(path, self._model.get_submodule(path)).parameter_names()[:2]
            for stacked, names in ((inputs, ("gate_proj", "up_proj", inputs)), (down, ("down_proj",))):
                every = (path, *(f"{path}.{name}" for name in names))
                if _is_all_linear(config) or any(check_target_module_exists(config, name) for name in every):
                    found.add(f"{path}.{stacked}")
        return found

    def _check_known(self, targets: str | Iterable[str]) -> None:
        if isinstance(targets, str):
            return  # an expression that matches nothing is PEFT's error
        names = [*self.linears, *self.routers, *self._containers, *self._others, *self._dense]
        names += [
            f"{path}.{name}" for path in self._dense for name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
        ]
        names += [name for role in self.roles.values() for name in role.names]
        known = {part for name in names for part in _suffixes(name)}
        for target in sorted(targets):
            if target not in known:
                raise ValueError(
                    f"target_modules has '{target}', which is no module of this model; its linear layers are "
                    f"{sorted({path.rpartition('.')[2] for path in self.linears})}, its experts {self._expert_names()}."
                )

    def _expert_names(self) -> list[str]:
        return sorted(
            {name.rpartition(".")[2] for role in self.roles.values() for name in role.names if "*" not in name}
        )

    def parameters(self, targets: Iterable[str]) -> tuple[set[str], set[str]]:
        """target_parameters that PEFT can adapt as such, and the roles that the others mean."""
        rest, roles = set(), set()
        for target in targets:
            named = {r.path for r in self.roles.values() for name in r.whole if f".{name}".endswith(f".{target}")}
            roles |= named
            if not named:
                rest.add(target)
        return rest, roles

    def patterns(self, given: Mapping[str, Any], targets: set[str]) -> dict[str, Any]:
        """rank_pattern or alpha_pattern with the names of experts replaced by those of their roles."""
        found: dict[str, Any] = {}
        for pattern, value in given.items():
            expression = re.compile(rf"(.*\.)?({pattern})$")
            roles = [r for r in self.roles.values() if r.path in targets and any(map(expression.match, r.names))]
            found |= {re.escape(role.path): value for role in roles}
            if not roles or any(expression.match(path) for path in targets - self.roles.keys()):
                found[pattern] = value
        return found


def _roles(path: str, packed: PackedExperts) -> Iterator[Role]:
    for name in ("gate_up", "down"):
        wrapped: Any = getattr(packed, name)
        module = wrapped.get_base_layer() if hasattr(wrapped, "get_base_layer") else wrapped
        stacked = next((p for p in packed.adapter.parameter_names() if p.startswith(name)), f"{name}_proj")
        whole = (path, f"{path}.{name}", f"{path}.{stacked}")
        leaves = {p.name: packed.leaves[p.name] for p in module.projections}
        parts = {p: (f"{path}.{p}", f"{path}.{leaf}") for p, leaf in leaves.items()}
        singles = {p: tuple(f"{path}.{expert}.{leaf}" for expert in module.experts) for p, leaf in leaves.items()}
        yield Role(f"{path}.{name}", path, module, whole, parts, singles)


def _suffixes(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.partition(".")[2]


def _log(targets: set[str], names: Names, dense: set[str]) -> None:
    roles = [role for path, role in names.roles.items() if path in targets]
    experts = {role.experts: len(role.module.experts) for role in roles}
    logger.info(
        "Adapted: %d linear layers, %s of %d experts in %d layers, %d routers, %d stacks of dense experts.",
        sum(path in names.linears and path not in names._choosing for path in targets),
        " and ".join(sorted({role.module.role for role in roles})) or "no matrices",
        sum(experts.values()),
        len(experts),
        sum(path in names.routers or path in names._choosing for path in targets),
        len(dense),
    )
