# SPDX-License-Identifier: Apache-2.0
"""The matrices of one model that are quantized: its experts and its linear layers, with their names and sizes.

Knows a model and its names, not its weights' values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import transformers
from torch import nn

from transformers_mcmoe.models.experts import Widths, find_experts, find_linears, layer_of, stacks_of
from transformers_mcmoe.models.names import CheckpointNames
from transformers_mcmoe.models.routers import Router
from transformers_mcmoe.plan import Matrix, Plan


def model_class(config: Any) -> Any:
    """The class that a model's config names, or the one for causal language models."""
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


class Structure:
    """What of a model is quantized.

    Args:
        model: a transformers model with its original modules; on meta will do.
        attention_bits: width of attention projections, 16 to leave them, or several to choose from.
        shared_expert_bits: the same of shared experts and dense MLPs.
        modules_to_not_convert: names or patterns of modules to leave.

    Attributes:
        experts: adapters by module path.
        linears: width by module path of linear layers outside the experts; the lowest where there is a choice.
        choices: the widths that a linear layer may take, by path of those that have a choice.
        names: checkpoint names.
        kept: experts that were not dropped, by experts path; all where a path is missing.
        ranks: rank of every expert's factors, by experts path, 0 for none; () where a path is missing.
        rank_bits: width of the factors.

    Raises:
        ValueError, NotImplementedError: see `find_experts`.
    """

    def __init__(
        self,
        model: Any,
        attention_bits: Widths = 16,
        shared_expert_bits: Widths = 16,
        modules_to_not_convert: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.experts = find_experts(model, modules_to_not_convert)
        self.linears: dict[str, int] = {}
        self.choices: dict[str, tuple[int, ...]] = {}
        found = find_linears(model, self.experts, attention_bits, shared_expert_bits, modules_to_not_convert)
        for path, widths in found.items():
            self.linears[path] = widths if isinstance(widths, int) else widths[0]
            if not isinstance(widths, int):
                self.choices[path] = widths
        self.names = CheckpointNames(model)
        self.kept: dict[str, tuple[int, ...]] = {}
        self.ranks: dict[str, tuple[int, ...]] = {}
        self.rank_bits = 0

    def kept_of(self, path: str) -> tuple[int, ...]:
        """The experts of a module that were not dropped."""
        return self.kept.get(path, tuple(range(self.experts[path].num_experts)))

    def keep(self, path: str, kept: Iterable[int]) -> None:
        """Drop all other experts of a module: its router chooses among these from now on.

        Raises:
            NotImplementedError: the router cannot be sliced.
            ValueError: groups of experts would differ in size.
        """
        self.kept[path] = tuple(sorted(kept))
        Router(self.model, self.experts[path]).keep(self.kept[path])

    def keep_all(self) -> None:
        """Take back what was dropped."""
        for path in self.kept:
            Router(self.model, self.experts[path]).release()
        self.kept.clear()

    def follow(self, plan: Plan) -> None:
        """Drop the experts that a plan drops; errors as of `keep`."""
        for path, widths in plan.experts.items():
            if path in self.experts and len(widths.kept) < len(widths.gate_up):
                self.keep(path, widths.kept)

    def expert_weights(self, path: str, role: str | None = None) -> int:
        """Weights of one expert of a module, or of its matrices of a role."""
        projections = (p for p in self.experts[path].projections if role in (None, p.role))
        return sum(p.out_features * p.in_features for p in projections)

    def linear_weights(self) -> dict[str, int]:
        """Weights of every quantized linear layer."""
        return {path: self.model.get_submodule(path).weight.numel() for path in self.linears}

    def matrices(self, plan: Plan) -> list[Matrix]:
        """Every matrix under a plan, experts first."""
        found = []
        for path, experts in self.experts.items():
            widths = plan.experts[path]
            for expert in range(experts.num_experts):
                for p in experts.projections:
                    bits, rank = widths.of_role(p.role)[expert], widths.rank_of(expert)
                    factors = (rank, widths.rank_bits) if rank else (0, 0)
                    found.append(Matrix(f"{path}.{expert}.{p.name}", p.out_features, p.in_features, bits, *factors))
        for path, bits in plan.linears.items():
            linear = self.model.get_submodule(path)
            found.append(Matrix(path, linear.out_features, linear.in_features, bits))
        return found

    def parameters(self) -> tuple[int, int]:
        """Weights of the whole model, tied ones once, and how many tensors they are."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        sizes = [p.numel() for name, p in self.model.named_parameters() if name not in tied]
        return sum(sizes), len(sizes)

    def check(self, plan: Plan) -> None:
        """Raise ValueError if a plan does not fit the model."""
        for path, experts in self.experts.items():
            widths = plan.experts.get(path)
            if widths is None or len(widths.gate_up) != experts.num_experts:
                has = "is missing" if widths is None else f"has {len(widths.gate_up)} widths"
                raise ValueError(
                    f"The plan does not fit the model: '{path}' {has}, but it has {experts.num_experts} experts."
                )
            full = min(size for p in experts.projections for size in (p.out_features, p.in_features))
            if any(rank > full for rank in widths.ranks):
                raise ValueError(
                    f"The plan does not fit the model: '{path}' has a rank of {max(widths.ranks)}, but its matrices have {full} at most."
                )
            if not widths.kept:
                raise ValueError(f"The plan drops every expert of '{path}'; keep at least one.")
        for path in (*plan.experts, *plan.linears):
            if path not in self.experts and not isinstance(_submodule(self.model, path), nn.Linear):
                raise ValueError(f"The plan does not fit the model: '{path}' is no quantizable module of it.")

    def layer_sizes(self) -> tuple[int, int]:
        """Weights of the largest decoder layer, and of all that lies outside the layers."""
        stacks = [stack + "." for stack in stacks_of(self.experts)]
        sizes: dict[tuple[str, int], int] = {}
        rest = 0
        for name, parameter in self.model.named_parameters():
            if name.startswith(tuple(stacks)):
                layer = layer_of(name)
                sizes[layer] = sizes.get(layer, 0) + parameter.numel()
            else:
                rest += parameter.numel()
        return max(sizes.values()), rest


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
