# SPDX-License-Identifier: Apache-2.0
"""LoRA layers over packed matrices: one linear layer, or one role of all experts of a layer.

y = Q(W) x + s B A x. The base product runs on the kernels of packed matrices; its gradient rebuilds one matrix at a time
(`kernels.ops`). Merging rounds Q(W) + s B A to the same width again and keeps the bytes it replaced, so that unmerging
is exact. Knows modules and adapters; not names, files or calibration.
"""

from __future__ import annotations

import logging
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional

from transformers_mcmoe.integrations.lora.rounding import requantized
from transformers_mcmoe.nn import ExpertsRole

logger = logging.getLogger(__name__)

# called with an expert and its tokens [n, in]; projection -> [n, out]
Added = Callable[[int, Tensor], dict[str, Tensor]]


class PackedLoraLayer(nn.Module, LoraLayer):
    """What both kinds of layers share: activity, and merging by rounding anew.

    What merging loses stays on the base layer as `merge_error`: |merged - (Q(W) + s B A)| / |s B A| in Frobenius norms over
    the layer. Above 1 more is lost to rounding than the adapter changed.
    """

    base_layer: Any
    # dicts of modules by adapter, whose attributes torch types as Tensor | Module
    lora_A: Any
    lora_B: Any
    lora_dropout: Any

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, r: int, lora_alpha: int, **kw: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self._replaced: list[Tensor] = []
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kw)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    @property
    def live(self) -> list[str]:
        """The adapters that change the output beside the packed matrices."""
        if self.disable_adapters:
            return []
        return [n for n in self.active_adapters if n in self.lora_A and n not in self.merged_adapters]

    @abstractmethod
    def _matrices(self) -> list[tuple[Any, int, slice]]:
        """Packed matrices, the expert of each, and their rows in an adapter's output."""

    @abstractmethod
    def delta(self, adapter: str, expert: int, rows: slice) -> Tensor:
        """s B A of some rows, [rows, in] float32."""

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Round packed matrices + adapters to the same widths; nothing is changed if a value is not finite.

        The packed bytes from before stay in memory until `unmerge` or until the layer is unloaded.

        Args:
            safe_merge: as in PEFT; values are always checked.
            adapter_names: default the active ones.

        Raises:
            ValueError: a value of an adapter is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        if any(linear.weight is None for linear, _, _ in self._matrices()):
            raise ValueError(
                "Some experts here have low-rank factors and no matrix that an adapter could be rounded into; keep the adapter beside "
                "the model instead of merging it."
            )
        everything = [*self.merged_adapters, *names]
        originals = self._replaced or [linear.weight.data.clone() for linear, _, _ in self._matrices()]
        new, lost, asked = [], 0.0, 0.0
        for (linear, expert, rows), original in zip(self._matrices(), originals, strict=True):
            change = torch.stack([self.delta(name, expert, rows) for name in everything]).sum(0)
            packed, error = requantized(original, linear.bits, linear.in_features, change)
            new.append(packed)
            lost, asked = lost + error, asked + float(change.square().sum(dtype=torch.float64))
        for (linear, _, _), packed in zip(self._matrices(), new, strict=True):
            linear.write(packed)
        self._replaced = originals
        self.merged_adapters.extend(names)
        self.base_layer.merge_error = math.sqrt(lost / asked) if asked else 0.0
        logger.info("Merged %s: rounding lost %.2f of what was added.", ", ".join(names), self.base_layer.merge_error)

    def unmerge(self) -> None:
        """Put the packed bytes from before merging back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for (linear, _, _), original in zip(self._matrices(), self._replaced, strict=True):
            linear.write(original)
        self._replaced, self.base_layer.merge_error = [], None
        self.merged_adapters.clear()

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


class LoraPackedLinear(PackedLoraLayer):
    """LoRA over a `PackedLinear`."""

    def _matrices(self) -> list[tuple[Any, int, slice]]:
        base = self.base_layer
        return [(base, 0, slice(None))] if base.weight is not None else []

    def delta(self, adapter: str, expert: int, rows: slice) -> Tensor:
        a, b = self.lora_A[adapter].weight.float(), self.lora_B[adapter].weight.float()
        return b[rows] @ a * self.scaling[adapter]

    @torch.no_grad()
    def set_factors(self, adapter: str, expert: int, a: Tensor, b: Tensor) -> None:
        """Set A [r, in] and B [out, r]; `expert` is 0."""
        self.lora_A[adapter].weight.copy_(a)
        self.lora_B[adapter].weight.copy_(b)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s B A, [out, in] float32."""
        return self.delta(adapter, 0, slice(None))

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """[.., in] -> [.., out] in the dtype of `x`."""
        _refuse_batches(adapter_names)
        result = self.base_layer(x)
        for name in self.live:
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            result = result + _low_rank(self.lora_dropout[name](x), a, b, self.scaling[name])
        return result


class Stack(nn.Module):
    """One matrix per expert: `weight` [E, rows, columns]."""

    def __init__(self, experts: int, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, rows, columns))


class LoraExperts(PackedLoraLayer):
    """LoRA over one role of all experts: A [E, r, in], B [E, out, r]; gate and up share A, gate's rows of B come first."""

    @property
    def changes(self) -> bool:
        """Whether `PackedExperts` must ask for what adapters add."""
        return bool(self.live)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter of rank `r`, scaled by alpha / r, or alpha / sqrt(r) with `use_rslora`."""
        if r <= 0:
            raise ValueError(f"r={r} is not valid: a rank must be positive.")
        base: ExpertsRole = self.base_layer
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name], self.use_dora[adapter_name] = config.use_rslora, False
        self.lora_bias[adapter_name] = False
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.lora_dropout.update({adapter_name: dropout})
        self.lora_A[adapter_name] = Stack(base.num_experts, r, base.in_features)
        self.lora_B[adapter_name] = Stack(base.num_experts, base.out_features, r)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any) -> None:
        """As PEFT does for each expert's matrices: B is zero, unless `init_lora_weights` is False."""
        a, b = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        with torch.no_grad():
            bound = 1 / math.sqrt(a.shape[-1])
            if init_lora_weights == "gaussian":
                a.normal_(std=1 / self.r[adapter_name])
            else:
                a.uniform_(-bound, bound)
            if init_lora_weights is False:
                b.uniform_(-(b.shape[-1] ** -0.5), b.shape[-1] ** -0.5)
            else:
                b.zero_()

    def _matrices(self) -> list[tuple[Any, int, slice]]:
        found = []
        for expert in self.base_layer.experts:
            start = 0
            for linear in self.base_layer.linears(expert):
                found.append((linear, expert, slice(start, start + linear.out_features)))
                start += linear.out_features
        return found

    def delta(self, adapter: str, expert: int, rows: slice) -> Tensor:
        a, b = self.lora_A[adapter].weight[expert].float(), self.lora_B[adapter].weight[expert].float()
        return b[rows] @ a * self.scaling[adapter]

    @torch.no_grad()
    def set_factors(self, adapter: str, expert: int, a: Tensor, b: Tensor) -> None:
        """Set an expert's A [r, in] and B [out, r]."""
        self.lora_A[adapter].weight[expert].copy_(a)
        self.lora_B[adapter].weight[expert].copy_(b)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s B A of all experts, [E, out, in] float32."""
        a, b = self.lora_A[adapter].weight.float(), self.lora_B[adapter].weight.float()
        return b @ a * self.scaling[adapter]

    def forward(self, adapter_names: list[str] | None = None, **kwargs: Any) -> Added:
        """For one call of the layer: what active adapters add to an expert's projections for its tokens."""
        _refuse_batches(adapter_names)
        live = [(n, self.lora_A[n].weight, self.lora_B[n].weight) for n in self.live]
        # a gradient of `unbind` is written once, one of an index is as large as the stack for every expert
        stacks = [(n, a.unbind(0), b.unbind(0)) if a.requires_grad else (n, a, b) for n, a, b in live]
        projections = self.base_layer.projections
        sizes = [p.out_features for p in projections]

        def added(expert: int, x: Tensor) -> dict[str, Tensor]:
            parts = [_low_rank(self.lora_dropout[n](x), a[expert], b[expert], self.scaling[n]) for n, a, b in stacks]
            total = sum(parts[1:], parts[0])
            return {p.name: part for p, part in zip(projections, total.split(sizes, dim=-1), strict=True)}

        return added


def _low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """s B A x in the dtype of `x`: adapters are held in fp32 beside a bf16 model, and multiplied as under autocast."""
    return functional.linear(functional.linear(x, a.to(x.dtype)) * scale, b.to(x.dtype))


def _refuse_batches(adapter_names: list[str] | None) -> None:
    if adapter_names is not None:
        raise NotImplementedError(
            "Batches of several adapters (adapter_names=) are not available on packed models; call set_adapter and run "
            "them one after the other."
        )
