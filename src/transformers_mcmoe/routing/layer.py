# SPDX-License-Identifier: Apache-2.0
"""Expert pruning in one MoE layer: what remains of a call's routing when a rule has said which slots are skipped.

Knows routing tensors, not modules, and no rule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from transformers_mcmoe.kernels import cpu
from transformers_mcmoe.routing.call import Call


class LayerPruning(ABC):
    """Expert pruning of one layer; subclasses are the rules.

    Args:
        name: distinguishes layers, for messages.
        renormalize: scale kept weights to the sum that all had.
        call: what is known of the model's current call.
        expert_bytes: [E], size of each expert.
        skip: expert id that stands for none; None keeps ids, and skipped slots get the weight 0.
    """

    def __init__(
        self, name: str, renormalize: bool, call: Call, expert_bytes: Sequence[float], skip: int | None
    ) -> None:
        self.name, self.renormalize = name, renormalize
        self.counts = Counts(expert_bytes)
        self._call, self._skip = call, skip

    @abstractmethod
    def skipped(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Which slots are skipped, [T, K] bool.

        Args:
            x: [T, H] tokens.
            index: [T, K] expert ids; ids that are no expert's are not touched.
            weights: [T, K] routing weights, in any order.
        """

    def compiled(self, x: Tensor, index: Tensor) -> Callable[[cpu.Pruned], tuple[Tensor, Tensor]] | None:
        """The rule as a call of the compiled kernels, None where they do not have it: `skipped` and all that follows at once.

        Torch takes some hundred microseconds for it, most of what pruning saves of a token's time.
        """
        return None

    def __call__(self, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids and routing weights [T, K] after pruning; gradients reach the weights that are kept."""
        graded = torch.is_grad_enabled() and weights.requires_grad
        served = not torch.compiler.is_compiling() and cpu.takes(x) and cpu.library() is not None
        if served and not graded and self._skip is not None:
            run = self.compiled(x, index)
            if run is not None:
                counts, valid = self.counts.of(self._call, index)
                return run(cpu.Pruned(index, weights, self._skip, self.renormalize, counts, valid))
        skipped = self.skipped(x, index, weights)
        self.counts.add(index, skipped, self._call)
        kept = weights.masked_fill(skipped, 0)
        if self.renormalize:
            kept = reweighted(weights, kept)
        return (index if self._skip is None else index.masked_fill(skipped, self._skip)), kept


def reweighted(weights: Tensor, kept: Tensor) -> Tensor:
    """What is kept of routing weights [T, K], scaled to the sum that all had."""
    total, left = weights.sum(-1, keepdim=True), kept.sum(-1, keepdim=True)
    # tokens that skip nothing keep their weights to the bit: total / left is 1
    return kept * torch.where(left > 0, total / left.masked_fill(left == 0, 1), 1)


class Counts:
    """Routed slots by expert, and how many of them were skipped; prompts and single tokens apart.

    Args:
        expert_bytes: [E].

    Attributes:
        num_experts: E.
    """

    def __init__(self, expert_bytes: Sequence[float]) -> None:
        self.num_experts = len(expert_bytes)
        self._bytes = torch.tensor(expert_bytes, dtype=torch.float64)
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        # prefill and decode: slots of each expert, ids that are none, the same of skipped slots; and tokens
        self._slots = [torch.zeros(2 * (self.num_experts + 1), dtype=torch.int64) for _ in range(2)]
        self._tokens = [torch.zeros((), dtype=torch.int64) for _ in range(2)]

    def of(self, call: Call, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """For a call with routing [T, K]: [2 * (E + 1)] counts of kept and skipped slots, and its tokens [T] that count.

        Its tokens are counted here. None: all count.
        """
        if self._tokens[0].device != index.device:
            self._slots = [slots.to(index.device) for slots in self._slots]
            self._tokens = [tokens.to(index.device) for tokens in self._tokens]
        phase = int(call.shape is not None and call.shape[1] == 1)
        if call.valid is None or call.valid.numel() != len(index):
            self._tokens[phase].add_(len(index))
            return self._slots[phase], None
        valid = call.valid.reshape(-1).to(index.device)
        self._tokens[phase].add_(valid.sum())
        return self._slots[phase], valid

    def add(self, index: Tensor, skipped: Tensor, call: Call) -> None:
        """Count a call's slots [T, K]; padding does not count."""
        counts, valid = self.of(call, index)
        place = index.clamp(max=self.num_experts) + skipped * (self.num_experts + 1)
        each = torch.ones_like(place) if valid is None else valid[:, None].to(torch.int64).expand_as(place)
        counts.scatter_add_(0, place.flatten(), each.flatten())

    def read(self, phase: int) -> dict[str, float]:
        """Sums of a phase: 0 for prefill, 1 for decode."""
        kept, gone = self._slots[phase].to("cpu", torch.float64).view(2, -1)[:, :-1]
        routed = kept + gone
        return {
            "tokens": float(self._tokens[phase]),
            "slots": float(routed.sum()),
            "slots_skipped": float(gone.sum()),
            "bytes": float(routed @ self._bytes),
            "bytes_skipped": float(gone @ self._bytes),
        }
