# SPDX-License-Identifier: Apache-2.0
"""Stacked experts that the contract's five flags do not describe."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from transformers_mcmoe.models.experts.base import Projection
from transformers_mcmoe.models.experts.fused import FusedExperts


class LongcatExperts(FusedExperts):
    """LongcatFlash: ids from E on are experts that return their input."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__(path, module)
        self.identity_experts = int(self.module.zero_expert_num)


class DbrxExperts(FusedExperts):
    """DBRX: three flat matrices [E * I, H] in a child module; the down projection is stored transposed."""

    _NAMES = {"gate_proj": "w1", "up_proj": "v1", "down_proj": "w2"}  # noqa: RUF012

    def _read_shapes(self) -> None:
        glu = self.module.mlp
        self.num_experts = int(glu.moe_num_experts)
        hidden, inner = glu.w1.shape[1], glu.w1.shape[0] // self.num_experts
        self.projections = (
            Projection("gate_proj", "gate_up", inner, hidden),
            Projection("up_proj", "gate_up", inner, hidden),
            Projection("down_proj", "down", hidden, inner),
        )

    def parameter_names(self) -> tuple[str, ...]:
        return ("mlp.w1", "mlp.v1", "mlp.w2")

    def matrix(self, expert: int, projection: str) -> Tensor:
        flat = getattr(self.module.mlp, self._NAMES[projection]).data
        matrix = flat.unflatten(0, (self.num_experts, -1))[expert]
        return matrix.T if projection == "down_proj" else matrix

    def _activation(self) -> Callable[[Tensor], Tensor]:
        return self.module.mlp.activation_fn

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self._activation()(gate) * up

    def finish(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        return output.view(hidden_states.shape[0], -1, output.shape[-1])


class Llama4Experts(FusedExperts):
    """Llama 4: the block hands over [E * T, H], every token once per expert, zero where it is not routed there."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__(path, module)
        self.is_transposed = True
        self._read_shapes()

    def route(self, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (hidden_states,) = args
        rows = hidden_states.shape[0]
        expert = torch.arange(self.num_experts, device=hidden_states.device)
        index = expert.repeat_interleave(rows // self.num_experts).unsqueeze(1)
        # a row of zeros gives zeros (no biases), so it may be skipped: id E
        index = torch.where((hidden_states != 0).any(-1, keepdim=True), index, self.num_experts)
        return hidden_states, index, hidden_states.new_ones(rows, 1)
