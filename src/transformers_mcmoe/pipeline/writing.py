# SPDX-License-Identifier: Apache-2.0
"""Gives packed matrices their names in the checkpoint, and the layer in memory the weights they stand for.

Knows names and tensors; it does not know how they were rounded.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from transformers_mcmoe.models.experts import Experts, FusedExperts
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.pipeline.rounding import rebuilt
from transformers_mcmoe.plan import FACTORS, ExpertWidths
from transformers_mcmoe.quantization import dequantize


class Writer:
    """Collects the packed tensors of one layer after the other under the checkpoint's names.

    Args:
        structure: the model's matrices.
        targets: checkpoint tensor -> the model tensor that it becomes or is a part of.

    Attributes:
        replaced: checkpoint names that packed tensors replace under other names.
    """

    def __init__(self, structure: Structure, targets: Mapping[str, str]) -> None:
        self._structure = structure
        self.replaced: list[str] = []
        self._keys: dict[str, list[str]] = {}  # model tensor -> checkpoint tensors it is made of
        self._originals: dict[str, str] = {}  # model name after renamings only -> checkpoint tensor
        for key, target in sorted(targets.items()):
            self._keys.setdefault(target, []).append(key)
            self._originals[structure.names.renamed(key)] = key

    def linear(self, path: str, packed: Tensor, bits: int, tensors: dict[str, Tensor], replace: bool) -> None:
        """Add a linear layer to `tensors`; with `replace`, the one in memory gets the rounded weights."""
        tensors[self.published(f"{path}.weight")] = packed
        if replace:
            weight = self._structure.model.get_submodule(path).weight.data
            weight.copy_(dequantize(packed, bits, weight.shape[1]))

    def experts(
        self,
        experts: Experts,
        widths: ExpertWidths,
        packed: Mapping[int, Mapping[str, Tensor]],
        tensors: dict[str, Tensor],
        replace: bool,
    ) -> None:
        """Add the experts of a module to `tensors`; with `replace`, those in memory get the rounded weights."""
        leaves = self._structure.names.leaves(experts)
        for expert in range(experts.num_experts):
            if expert not in packed:
                if replace:
                    experts.drop(expert)
                for p in experts.projections:
                    name = experts.tensor(expert, leaves[p.name])
                    self.replaced += self._keys.get(f"{name}.weight", []) + self._keys.get(f"{name}.bias", [])
                continue
            for p in experts.projections:
                name, matrix = experts.tensor(expert, leaves[p.name]), packed[expert]
                if p.name in matrix:
                    tensors[self.published(f"{name}.weight")] = matrix[p.name]
                else:
                    self.replaced += self._keys.get(f"{name}.weight", [])
                for factor in FACTORS:
                    if f"{p.name}.{factor}" in matrix:
                        key = self.published(f"{name}.weight").removesuffix("weight")
                        tensors[f"{key}{factor}.weight"] = matrix[f"{p.name}.{factor}"]
                if replace:
                    dense = rebuilt(matrix, p, widths.of_role(p.role)[expert], widths.rank_bits)
                    experts.matrix(expert, p.name).copy_(dense)
                bias = experts.bias(expert, p.name)
                if bias is not None and isinstance(experts, FusedExperts):
                    # of a layer that is not in memory there is the name alone, where it is recalled
                    kept = bias if bias.is_meta else bias.to("cpu", copy=True).contiguous()
                    tensors[self.published(f"{name}.bias")] = kept
        if isinstance(experts, FusedExperts):
            self._guard(experts, tensors)

    def packed(self, experts: Experts, tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """The packed matrices of a module's experts among tensors that were written; the inverse of `experts`."""
        leaves = self._structure.names.leaves(experts)
        found: dict[int, dict[str, Tensor]] = {}
        for expert in range(experts.num_experts):
            for p in experts.projections:
                key = self.published(f"{experts.tensor(expert, leaves[p.name])}.weight")
                keys = {p.name: key} | {
                    f"{p.name}.{factor}": f"{key.removesuffix('weight')}{factor}.weight" for factor in FACTORS
                }
                own = {name: tensors[key] for name, key in keys.items() if key in tensors}
                if own:
                    found.setdefault(expert, {}).update(own)
        return found

    def _guard(self, experts: FusedExperts, tensors: dict[str, Tensor]) -> None:
        """The guard tensor of families that are fused on disk; names of dense tensors that nothing reads any more."""
        keys = [key for name in experts.parameter_names() for key in self._keys.get(f"{experts.path}.{name}", [])]
        if self._structure.names.is_fused_on_disk(experts):
            tensors[keys[0]] = torch.empty(0, dtype=torch.uint8)
        self.replaced += [key for key in keys if key not in tensors]

    def published(self, name: str) -> str:
        """The checkpoint's own name for a tensor, or the family's where the checkpoint has none."""
        if name in self._originals:
            return self._originals[name]
        layer = ".".join(name.split(".")[:-4])
        example = next((key for target, keys in self._keys.items() if target.startswith(layer) for key in keys), None)
        return self._structure.names.published(name, example)
