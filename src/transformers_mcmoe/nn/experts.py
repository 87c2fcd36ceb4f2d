# SPDX-License-Identifier: Apache-2.0
"""PackedExperts: a layer's experts over packed matrices, called like the module that it replaces.

It knows widths and shapes from construction and holds exactly the tensors of the checkpoint format; how codes were
chosen and how files are read is not its business.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transformers_mcmoe.kernels import arena, cpu, gpu, ops
from transformers_mcmoe.models.experts import FusedExperts
from transformers_mcmoe.nn.linear import PackedLinear, is_offloaded, stamp_of
from transformers_mcmoe.nn.roles import ExpertsRole
from transformers_mcmoe.plan import FACTORS, ExpertWidths


class PackedExperts(nn.Module):
    """Replaces a fused experts module: one child per expert, with one `PackedLinear` per projection.

    Called like the original. Slots whose expert id is >= E (transformers' sentinel) or whose expert was dropped cost
    nothing. Activation, gate and norm are the original module's own; its weights are gone.

    Attributes:
        num_experts: E.
        widths: width of every expert.
        gate_up, down: the matrices of a role of all experts, for adapters to wrap.
        pruning: given tokens [T, H], expert ids and routing weights [T, K], the ids and weights to go by; or None.

    Args:
        experts: adapter of the original module, on meta or not; its weight parameters are removed.
        widths: width of every expert.
        group_size: the configured group size.
        leaves: projection name -> child name, the names of the published checkpoint.
        guard: keep a zero-size uint8 parameter under the first fused weight's name (format.md).
        device: device of the empty tensors.
    """

    def __init__(
        self,
        experts: FusedExperts,
        widths: ExpertWidths,
        group_size: int,
        leaves: Mapping[str, str],
        guard: bool,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        self.widths, self.leaves = widths, dict(leaves)
        self.pruning: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        for expert in widths.kept:
            self.add_module(str(expert), self._expert(experts, expert, group_size, device))
        self._remove_weights(experts)
        if guard:
            self._add_guard(experts.parameter_names()[0], device)
        for name, child in experts.module.named_children():  # act_fn, post_expert_norm; shared with the original
            if name not in self._modules:
                self.add_module(name, child)
        self._experts = experts
        self.gate_up, self.down = ExpertsRole(self, "gate_up"), ExpertsRole(self, "down")
        self._is_hf_initialized = True
        self._activation = experts.plain_activation()
        sizes = [(p.out_features, p.in_features) for p in experts.projections]
        self._layout, self._arena_bytes = arena.layout(sizes, widths, group_size)
        self._blocks: Tensor | None = None
        self._stamp: tuple[int, ...] | None = None

    def _expert(
        self, experts: FusedExperts, expert: int, group_size: int, device: torch.device | str | None
    ) -> nn.Module:
        child = nn.Module()
        for projection in experts.projections:
            widths = self.widths.down if projection.role == "down" else self.widths.gate_up
            bias = experts.bias(expert, projection.name)
            linear = PackedLinear(
                projection.in_features,
                projection.out_features,
                widths[expert],
                group_size,
                bias.dtype if bias is not None else None,
                device,
                self.widths.rank_of(expert),
                self.widths.rank_bits,
            )
            child.add_module(self.leaves[projection.name], linear)
        child._is_hf_initialized = True  # type: ignore[assignment]
        return child

    def _remove_weights(self, experts: FusedExperts) -> None:
        self._shapes: dict[str, torch.Size] = {}
        for name in experts.parameter_names():
            owner, _, leaf = name.rpartition(".")
            self._shapes[name] = experts.module.get_submodule(owner)._parameters.pop(leaf).shape

    def _add_guard(self, name: str, device: torch.device | str | None) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self
        for part in filter(None, owner.split(".")):
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        guard = torch.empty(0, dtype=torch.uint8, device=device)
        module.register_parameter(leaf, nn.Parameter(guard, requires_grad=False))

    @property
    def adapter(self) -> FusedExperts:
        """What is known of the original module."""
        return self._experts

    @property
    def is_plain(self) -> bool:
        """Whether no adapter wraps a role."""
        return type(self.gate_up) is ExpertsRole and type(self.down) is ExpertsRole

    def expert_bytes(self) -> list[float]:
        """Packed bytes of every expert, 0 for one that was dropped."""
        sizes = dict.fromkeys(range(self.num_experts), 0)
        for expert in self.widths.kept:
            packed = (p for p in self.get_submodule(str(expert)).parameters() if p.dtype == torch.uint8)
            sizes[expert] = sum(p.numel() for p in packed)
        return [float(size) for size in sizes.values()]

    def linear(self, expert: int, projection: str) -> PackedLinear:
        """A projection of an expert that was not dropped."""
        return self._modules[str(expert)]._modules[self.leaves[projection]]  # type: ignore[union-attr, return-value]

    def forward(self, hidden_states: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Combined output of the routed experts; see the original module for shapes."""
        if kwargs:  # families name the routing tensors differently
            signature = inspect.signature(type(self._experts.module).forward)
            args = signature.bind(self, hidden_states, *args, **kwargs).args[2:]
        if self.pruning is not None:
            args = self.pruning(*self._experts.route(hidden_states, *args))
        if self.gate_up.changes or self.down.changes:
            self._blocks = self._stamp = None  # each matrix has its own copy for the kernels
            return self._experts.dispatch(hidden_states, *args, run=self._adapted())
        if self._activation is None or not self._repack():
            return self._experts.dispatch(hidden_states, *args, run=self._run)
        x, index, weights = self._experts.route(hidden_states, *args)
        graded = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
        # gathering hundreds of tensors can take longer than the layer
        needed = graded or self._blocks is None or x.dtype not in cpu.DTYPES  # those of every backend
        qweights, low_rank_a, low_rank_b = self._arguments() if needed else ([], [], [])
        inner = self._experts.projections[-1].in_features
        output = ops.moe_mlp(
            x, index, weights, qweights, self._layout, self._blocks, low_rank_a, low_rank_b, inner, self._activation,
            self._experts.has_gate,
        )  # fmt: skip
        return self._experts.finish(output, hidden_states)

    def _linears(self) -> list[PackedLinear]:
        return [linear for expert in self.widths.kept for linear in self._of(expert)]

    def _arguments(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Matrices and factors as the operator takes them."""
        factors = [factor for own in self._factors() for factor in own]
        return [matrix for own in self._matrices() for matrix in own], factors[::2], factors[1::2]

    def _matrices(self) -> list[list[Tensor]]:
        """The packed matrices of each expert, none for one that was dropped, empty ones where factors stand for them."""
        return [[_bytes(linear) for linear in self._of(expert)] for expert in range(self.num_experts)]

    def _factors(self) -> list[list[Tensor]]:
        """Factors a and b of each of these, empty ones where it has none; nothing if none has any."""
        if not any(self.widths.ranks):
            return []
        return [
            [
                _bytes(linear.get_submodule(name)) if linear.rank else _bytes(None)
                for linear in self._of(expert)
                for name in FACTORS
            ]
            for expert in range(self.num_experts)
        ]

    def _of(self, expert: int) -> list[PackedLinear]:
        """The projections of an expert, none if it was dropped."""
        names = [p.name for p in self._experts.projections if str(expert) in self._modules]
        return [self.linear(expert, name) for name in names]

    @torch.compiler.assume_constant_result  # runs while torch.compile traces, too
    def _repack(self) -> bool:
        """As in `PackedLinear`; False where other modules see to the matrices: offloaded ones, or adapters around them."""
        kept = self.widths.kept
        if not kept:
            return True
        # one module stands for all: experts are moved, offloaded and adapted together
        ends = [self.linear(kept[0], self._experts.projections[0].name)]
        ends.append(self.linear(kept[-1], self._experts.projections[-1].name))
        packed = [part for linear in ends if type(linear) is PackedLinear for part in linear.parts()]
        factors_on_gpu = any(self.widths.ranks) and gpu.backend(next(self.parameters()).device)
        if (
            factors_on_gpu
            or any(type(linear) is not PackedLinear for linear in ends)
            or any(map(is_offloaded, packed))
        ):
            self._blocks = self._stamp = None
            return False
        stamp = stamp_of(*packed)
        if stamp != self._stamp:
            self._stamp = self._blocks = None
            if stamp is not None:
                self._blocks = self._pack()
                for linear in self._linears():  # those of an adapter that was active
                    linear.forget_blocks()
            self._stamp = stamp_of(*packed)
        return True

    def _pack(self) -> Tensor:
        """The experts in the layout of the device's kernels; on a GPU, where memory is short, parameters become parts of it."""
        matrices = self._matrices()
        device = gpu.backend(next(self.parameters()).device)
        if device is None:
            return arena.pack_experts(matrices, self._layout, self._arena_bytes, self._factors())
        with torch.inference_mode(False), torch.no_grad():  # parameters outlive the caller's inference mode
            blocks = device.pack_experts(matrices, self._layout)
            for own, views in zip(matrices, device.views(matrices, blocks), strict=True):
                for matrix, view in zip(own, views, strict=True):
                    matrix.data = view
        return blocks

    def _apply(self, fn: Any, recurse: bool = True) -> PackedExperts:
        self._blocks = self._stamp = None  # would hold on to the old device's memory
        return super()._apply(fn, recurse)

    def _run(self, expert: int, x: Tensor) -> Tensor | None:
        if expert not in self.widths.kept:
            return None
        return self._experts.combine(x, lambda x, projection: self.linear(expert, projection)(x))

    def _adapted(self) -> Callable[[int, Tensor], Tensor | None]:
        """As `_run`, with what adapters add to each projection."""
        added = [role() for role in (self.gate_up, self.down) if role.changes]

        def run(expert: int, x: Tensor) -> Tensor | None:
            if expert not in self.widths.kept:
                return None
            return self._experts.combine(x, linear(expert))

        def linear(expert: int) -> Callable[[Tensor, str], Tensor]:
            parts: dict[str, Tensor] = {}

            def apply(x: Tensor, projection: str) -> Tensor:
                role = self.down if projection == "down_proj" else self.gate_up
                if role.changes and projection not in parts:
                    parts.update(added[-1 if role is self.down else 0](expert, x))
                y = self.linear(expert, projection)(x)
                return y + parts[projection] if projection in parts else y

            return apply

        return run

    def restore(self, dtype: torch.dtype) -> nn.Module:
        """The original module with dense weights of what is packed here; a dropped expert has zeros."""
        module = self._experts.module
        device = next(iter(self.parameters())).device
        for name, shape in self._shapes.items():
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
            module.get_submodule(owner).register_parameter(leaf, parameter)
        for expert in self.widths.kept:
            for projection in self._experts.projections:
                linear = self.linear(expert, projection.name)
                self._experts.matrix(expert, projection.name).copy_(linear.dequantize(dtype))
                bias = self._experts.bias(expert, projection.name)
                if bias is not None and linear.bias is not None:
                    bias.copy_(linear.bias.data)
        return module

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, gate_up={_digits(self.widths.gate_up)}"


def _bytes(linear: nn.Module | None) -> Tensor:
    """The packed bytes of a matrix, none where there is none."""
    weight = None if linear is None else linear.weight
    return torch.empty(0, dtype=torch.uint8) if weight is None else weight  # type: ignore[return-value]


def _digits(widths: Sequence[int]) -> str:
    return "".join(map(str, widths))
