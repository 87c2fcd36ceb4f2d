# SPDX-License-Identifier: Apache-2.0
"""ExpertsRole: what an adapter takes the place of inside a `PackedExperts`.

Experts are many small matrices under one module that has no linear layer of its own; a role stands for the matrices
that read the same input, of all experts. It holds no tensors and computes nothing: what computes is a module that
wraps it, called once per call of the layer (`integrations.lora.layers`). Knows nothing of adapters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from transformers_mcmoe.models.experts import Projection

if TYPE_CHECKING:
    from transformers_mcmoe.nn.experts import PackedExperts
    from transformers_mcmoe.nn.linear import PackedLinear


class ExpertsRole(nn.Module):
    """The matrices of one role of all experts.

    Attributes:
        role: "gate_up" (gate and up, which read the hidden state) or "down".
        projections: the role's projections, in the order of their rows.
        num_experts: E.
        in_features: columns of each matrix.
        out_features: rows of an expert's matrices together.
        merge_error: what was lost when an adapter was rounded into the matrices; None if none was.
        changes: whether experts' outputs differ from those of the packed matrices; false here, wrappers say.
    """

    changes = False

    def __init__(self, owner: PackedExperts, role: str) -> None:
        super().__init__()
        self.merge_error: float | None = None
        self.role = role
        self.projections: tuple[Projection, ...] = tuple(p for p in owner.adapter.projections if p.role == role)
        self.num_experts = owner.num_experts
        self.in_features = self.projections[0].in_features
        self.out_features = sum(p.out_features for p in self.projections)
        self._owner = (owner,)  # a tuple: as a submodule it would be its own parent

    @property
    def experts(self) -> list[int]:
        """The experts that were not dropped."""
        return list(self._owner[0].widths.kept)

    def linears(self, expert: int) -> list[PackedLinear]:
        """The role's packed matrices of an expert, in the order of `projections`."""
        return [self._owner[0].linear(expert, p.name) for p in self.projections]

    @property
    def qweight(self) -> Tensor:
        """One of the packed matrices: adapters go to its device."""
        return next(p for p in self.linears(self.experts[0])[0].parameters() if p.dtype == torch.uint8)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"
