# SPDX-License-Identifier: Apache-2.0
"""Packed experts in vLLM: one layer's, of which a rank has some experts, or a slice of each. Knows that layer, not the plan.

Where experts were dropped, a token is routed among those that were kept, as if the model had no others: the layer then asks
for the router's logits instead of its choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router
from vllm.model_executor.utils import set_weight_attrs

from transformers_mcmoe.integrations.vllm.loading import Packed, Part, check_grids
from transformers_mcmoe.kernels import arena, cpu, gpu, ops
from transformers_mcmoe.kernels.reference import ACTIVATIONS
from transformers_mcmoe.plan import ExpertWidths

# vLLM's names of gate, up and down: w1, w3 and w2
GATE_UP, DOWN = ("w1", "w3"), "w2"
Rule = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class PackedExpertsMethod(FusedMoEMethodBase):
    """Loads and runs the experts of one layer.

    Args:
        layer: vLLM's module.
        prefix: its name in the checkpoint.
        widths: of all experts.
        group_size: the configured one.
        rule: given tokens [T, H], ids and weights [T, K], those after run-time pruning; None for none.

    Raises:
        ValueError: experts compute what packed ones do not.
    """

    def __init__(self, layer: Any, prefix: str, widths: ExpertWidths, group_size: int, rule: Any) -> None:
        super().__init__(layer.moe_config)
        self._prefix, self._widths, self._group_size, self._rule = prefix, widths, group_size, rule
        self._activation = _activation(layer, prefix)
        self._gated = bool(layer.moe_config.is_act_and_mul)
        if self.is_monolithic and layer.custom_routing_function is not None:
            raise ValueError(
                f"'{prefix}' has dropped experts and a routing function of its model's own, which may know their number; the vLLM plugin "
                "does not serve it: use transformers (mcmoe serve), or compress without prune."
            )
        self._router: Any = None
        if len(widths.gate_up) != layer.moe_config.num_experts:
            raise ValueError(
                f"'{prefix}' has {layer.moe_config.num_experts} experts in vLLM, the plan {len(widths.gate_up)}; expert load balancing "
                "with redundant experts is not served."
            )

    @property
    def is_monolithic(self) -> bool:
        """Whether the layer is handed logits."""
        return len(self._widths.kept) < len(self._widths.gate_up)

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, act_dtype: torch.dtype, moe_parallel_config: Any
    ) -> tuple[int, int]:
        """Sizes stay: the kernels need no padding."""
        return hidden_size, intermediate_size_per_partition

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Give the layer its empty parameters; see vLLM for the arguments.

        Raises:
            ValueError: a rank's columns of a down projection end inside a group.
        """
        own, inner = intermediate_size_per_partition, self.moe.intermediate_size
        rank, names = (self.moe.tp_rank if own != inner else 0), _leaves(layer)
        self._sizes = [(own, hidden_size)] * (1 + self._gated) + [(hidden_size, own)]
        local = {layer._map_global_expert_id_to_local_expert_id(e): e for e in self._widths.kept}
        local.pop(-1, None)
        self._local, self._count = dict(sorted(local.items())), num_experts
        inputs: dict[tuple[int, str], Part] = {}
        outputs: dict[tuple[int, str], Part] = {}
        for n, expert in self._local.items():
            for shard in GATE_UP if self._gated else GATE_UP[:1]:
                name = f"{self._prefix}.{expert}.{names[shard]}.weight"
                rows, columns = (own, rank * own), (hidden_size, 0)
                bits = self._widths.gate_up[expert]
                inputs[n, shard] = Part(name, bits, (inner, hidden_size), rows, columns, self._group_size)
            name = f"{self._prefix}.{expert}.{names[DOWN]}.weight"
            rows, columns = (hidden_size, 0), (own, rank * own)
            outputs[n, DOWN] = Part(
                name, self._widths.down[expert], (hidden_size, inner), rows, columns, self._group_size
            )
        self._packed = {"w13_weight": Packed(inputs), "w2_weight": Packed(outputs)}
        for name, packed in self._packed.items():
            parameter = packed.parameter()
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, {"weight_loader": self._loader(layer, packed)})

    def _loader(self, layer: Any, packed: Packed[tuple[int, str]]) -> Callable[..., bool | None]:
        def load(
            param: Tensor,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            key = (layer._map_global_expert_id_to_local_expert_id(expert_id), shard_id)
            known = key in packed.parts and loaded_weight.numel() > 0  # guards of fused weights are empty
            if known:
                packed.load(param, key, loaded_weight)
            return known if return_success else None

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all came, and lay them out for the kernels.

        Raises:
            ValueError: a matrix is missing or damaged.
        """
        for packed in self._packed.values():
            packed.check()
        matrices: list[list[Tensor]] = [[] for _ in range(self._count)]
        for name, packed in self._packed.items():
            for key, part in packed.parts.items():
                view = packed.view(getattr(layer, name), key)
                check_grids(part.name, view)
                matrices[key[0]].append(view)
        self._arrange(layer, matrices)
        if self.is_monolithic:
            self._route_among_kept(layer)

    def _arrange(self, layer: Any, matrices: list[list[Tensor]]) -> None:
        """Exchange the parameters for the layout of the device's kernels; the reference reads them as they are."""
        widths = ExpertWidths(self._of_local(self._widths.gate_up), self._of_local(self._widths.down))
        layer.mcmoe_layout, size = arena.layout(self._sizes, widths, self._group_size)
        weight = layer.w13_weight
        device = gpu.backend(weight.device)
        on_cpu = device is None and weight.device.type == "cpu" and cpu.library() is not None
        layer.mcmoe_matrices, layer.mcmoe_blocks = [], None
        if not self._local:
            return
        if on_cpu:
            layer.mcmoe_blocks = arena.pack_experts(matrices, layer.mcmoe_layout, size)
        elif device is not None:
            layer.mcmoe_blocks = device.pack_experts(matrices, layer.mcmoe_layout)
        else:
            layer.mcmoe_matrices = [matrix for own in matrices for matrix in own]
            return
        for name in self._packed:
            empty = torch.empty(0, dtype=torch.uint8, device=weight.device)
            setattr(layer, name, nn.Parameter(empty, requires_grad=False))

    def _of_local(self, widths: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(widths[self._local[n]] if n in self._local else 0 for n in range(self._count))

    def _route_among_kept(self, layer: Any) -> None:
        """Make the router of the experts that were kept."""
        kept = torch.tensor(self._widths.kept, device=layer.w13_weight.device)
        bias = layer.e_score_correction_bias
        layer.mcmoe_kept = kept
        self._router = create_fused_moe_router(
            top_k=layer.top_k,
            global_num_experts=len(kept),
            renormalize=layer.renormalize,
            use_grouped_topk=layer.use_grouped_topk,
            num_expert_group=layer.num_expert_group,
            topk_group=layer.topk_group,
            custom_routing_function=layer.custom_routing_function,
            scoring_func=layer.scoring_func,
            routed_scaling_factor=layer.routed_scaling_factor,
            e_score_correction_bias=None if bias is None else nn.Parameter(bias.data[kept], requires_grad=False),
        )

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: vLLM's own kernels are not used."""
        return

    def apply_monolithic(
        self, layer: Any, x: Tensor, router_logits: Tensor, input_ids: Tensor | None = None
    ) -> Tensor:
        """As `apply`, from the logits [T, E] of all experts."""
        weights, ids = self._router.select_experts(x, router_logits[:, layer.mcmoe_kept], input_ids=input_ids)
        return self._run(layer, x, weights, layer.mcmoe_kept[ids.long()])

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The rank's part of the combined output [T, H]; vLLM sums over ranks."""
        return self._run(layer, x, topk_weights, topk_ids.long())

    def _run(self, layer: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        if self._rule is not None:
            ids, weights = self._rule(x, ids, weights)
        if not self._local:  # all of the rank's experts were dropped
            return torch.zeros_like(x)
        if layer.expert_map is not None:
            # skipped slots stay skipped: -1, as the experts of other ranks
            local = layer.expert_map[ids.clamp(0, len(self._widths.gate_up) - 1)].long()
            ids = torch.where((ids >= 0) & (ids < len(self._widths.gate_up)), local, -1)
        return ops.moe_mlp(
            x, ids, weights, layer.mcmoe_matrices, layer.mcmoe_layout, layer.mcmoe_blocks, [], [], self._sizes[-1][1],
            self._activation, self._gated,
        )  # fmt: skip


def _activation(layer: Any, prefix: str) -> str:
    """The experts' activation; raises ValueError where they compute more than act(gate(x)) * up(x)."""
    name = layer.activation.value.removesuffix("_no_mul")
    special = {
        "an activation that the packed kernels do not have": name not in ACTIVATIONS,
        "biases": layer.moe_config.has_bias,
        "a limited gate": layer.swiglu_limit is not None or layer.swiglu_alpha is not None,
        "routing weights that scale their inputs": layer.apply_router_weight_on_input,
    }
    for what, found in special.items():
        if found:
            raise ValueError(f"The experts of '{prefix}' have {what} ({name}); the vLLM plugin does not serve them.")
    return str(name)


def _leaves(layer: Any) -> dict[str, str]:
    """Names of the projections in the checkpoint, by vLLM's."""
    names = {"w1": layer.ckpt_gate_proj_name, "w2": layer.ckpt_down_proj_name}
    if layer.ckpt_up_proj_name is not None:
        names["w3"] = layer.ckpt_up_proj_name
    return names
