# SPDX-License-Identifier: Apache-2.0
"""Names of tensors: in the checkpoint as published, and in the model after transformers' renamings.

The only file that reads transformers' conversion mapping. It knows names, not tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from transformers_mcmoe.models.experts import Experts, FusedExperts


class CheckpointNames:
    """The conversion mapping of one model.

    Args:
        model: a transformers model (on meta will do), with its original experts modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self.mapping: list[Any] = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        self.renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        self._prefix = getattr(model, "base_model_prefix", "")
        self._state: Mapping[str, Any] = model.state_dict()

    def target(self, key: str) -> tuple[str, str | None]:
        """Model tensor that a checkpoint tensor ends in, and the pattern of the converter it passes, if any."""
        name, pattern = rename_source_key(key, self.renamings, self.converters, self._prefix, self._state)  # type: ignore[arg-type]
        if name not in self._state and key in self._state:
            return key, None
        return name, pattern

    def holds(self, target: str) -> bool:
        """Whether a name is a tensor of the model."""
        return target in self._state

    def renamed(self, key: str) -> str:
        """A checkpoint name after renamings only, the name under which a packed tensor is loaded.

        A model with a head and its base model differ by a prefix, and either loads the other's checkpoints: the
        prefix goes or comes as it does for the tensor that the dense one ends in.
        """
        name = self.unprefixed(key)
        target, prefix = self.target(key)[0], f"{self._prefix}."
        if self._prefix and name.startswith(prefix) and not target.startswith(prefix):
            return name.removeprefix(prefix)
        if self._prefix and target.startswith(prefix) and not name.startswith(prefix):
            return prefix + name
        return name

    def unprefixed(self, key: str) -> str:
        """A checkpoint name after renamings, with the checkpoint's own prefix or none."""
        return rename_source_key(key, self.renamings, [])[0]

    def packed_name(self, key: str, state: Mapping[str, Any]) -> str:
        """The name in a packed model's `state` of a tensor of its checkpoint."""
        return rename_source_key(key, self.renamings, [], self._prefix, state)[0]  # type: ignore[arg-type]

    def published(self, name: str, example: str | None = None) -> str:
        """The checkpoint name of a packed model tensor: the inverse of `packed_name`, else the name itself.

        Args:
            name: the model's name.
            example: a checkpoint name of a tensor beside it, which tells whether the checkpoint has the prefix.
        """
        key = name
        for renaming in reversed(self.renamings):
            if renaming.was_used():
                key, _ = renaming.reverse_transform().rename_source_key(key)
        prefix = f"{self._prefix}."
        if example is not None and self._prefix:
            key = key.removeprefix(prefix)
            key = prefix + key if example.startswith(prefix) else key
        return key if self.packed_name(key, {name: True}) == name else name

    def leaves(self, experts: Experts) -> dict[str, str]:
        """Projection name -> name of its tensor's module below `{path}.{expert}`, e.g. gate_proj -> w1 for Mixtral.

        Families that are fused on disk get the projections' own names.
        """
        own = {projection.name: projection.name for projection in experts.projections}
        if not isinstance(experts, FusedExperts):
            return own
        names: dict[str, str] = {}
        inputs = [p.name for p in experts.projections if p.role == "gate_up"]
        first, down = experts.parameter_names()[:2]
        for target, projections in ((first, inputs), (down, ["down_proj"])):
            names |= self._per_expert_leaves(f"{experts.path}.{target}", experts.path, projections)
        return names if set(names) == set(own) else own

    def _per_expert_leaves(self, target: str, path: str, projections: Sequence[str]) -> dict[str, str]:
        for converter in self.converters:
            sources = [re.search(r"\.\*\.(.+)\.weight$", s) for s in converter._original_source_patterns]
            if len(sources) != len(projections) or not all(sources):
                continue
            leaves = [match.group(1) for match in sources if match]
            if all(converter.rename_source_key(f"{path}.0.{leaf}.weight")[0] == target for leaf in leaves):
                return dict(zip(projections, leaves, strict=True))
        return {}

    def is_fused_on_disk(self, experts: Experts) -> bool:
        """Whether the family publishes one tensor for all experts of a layer."""
        if not isinstance(experts, FusedExperts):
            return False
        target = f"{experts.path}.{experts.parameter_names()[0]}"
        inputs = [p.name for p in experts.projections if p.role == "gate_up"]
        if self._per_expert_leaves(target, experts.path, inputs):
            return False
        # Ernie's experts of text and of images are published in one list
        builders = (c for c in self.converters if _builds_experts(c, {experts.path: experts}))
        return not any("*." in source for c in builders for source in c._original_source_patterns)


def packed_conversions(conversions: Iterable[Any], packed: Mapping[str, Experts], dense: Iterable[str]) -> list[Any]:
    """The conversions for a model whose experts are packed.

    Converters that build fused experts go; where one takes a fused tensor, a renaming stays in its place for the guard
    tensor. Experts modules that are left dense keep the converters, narrowed to their path.

    Args:
        conversions: transformers' list.
        packed: experts by path that are packed.
        dense: paths of experts modules that stay as they are.
    """
    result: list[Any] = []
    dense = list(dense)
    for entry in conversions:
        if not isinstance(entry, WeightConverter) or not _builds_experts(entry, packed):
            result.append(entry)
            continue
        if not any("*." in source for source in entry._original_source_patterns) and _first_stack(entry, packed):
            sources = entry._original_source_patterns[:1]
            renaming = WeightRenaming(source_patterns=sources, target_patterns=entry._original_target_patterns[:1])
            result.append(_in_scope_of(entry, renaming))
        for path in dense:
            prefix = path.rpartition(".")[0]
            parent = prefix.rpartition(".")[2]
            narrow = [_under(prefix, parent, pattern) for pattern in entry._original_source_patterns]
            targets = [_under(prefix, parent, pattern) for pattern in entry._original_target_patterns]
            converter = WeightConverter(narrow, targets, list(entry.operations), force_cpu=entry.force_cpu)
            result.append(_in_scope_of(entry, converter))
    return result


def _in_scope_of(entry: Any, other: Any) -> Any:
    other.scope_prefix, other.base_model_prefix = entry.scope_prefix, entry.base_model_prefix
    return other


def _under(prefix: str, parent: str, pattern: str) -> str:
    """`mlp.experts.*.w1.weight` or `.experts.*.w1.weight` below one layer's MoE block."""
    pattern = pattern.replace("\\.", ".").lstrip(".")
    return f"{prefix}.{pattern.removeprefix(parent + '.')}"


def _plain(pattern: str) -> str:
    return pattern.replace("\\.", ".").lstrip(".")


def _builds_experts(converter: WeightConverter, packed: Mapping[str, Experts]) -> bool:
    targets = [_plain(pattern) for pattern in converter._original_target_patterns]
    return any(_matches(experts, targets, slice(None)) for experts in packed.values())


def _first_stack(converter: WeightConverter, packed: Mapping[str, Experts]) -> bool:
    targets = [_plain(pattern) for pattern in converter._original_target_patterns]
    return any(_matches(experts, targets, slice(1)) for experts in packed.values())


def _matches(experts: Experts, targets: Sequence[str], which: slice) -> bool:
    if not isinstance(experts, FusedExperts):
        return False
    names = [f"{experts.path}.{name}" for name in experts.parameter_names()[which]]
    return any(name == target or name.endswith("." + target) for name in names for target in targets)
