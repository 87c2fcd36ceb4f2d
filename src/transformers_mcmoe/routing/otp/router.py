# SPDX-License-Identifier: Apache-2.0
"""Learned expert pruning in one MoE layer: a small router scores a token's slots, and a prefix of them is kept.

The form of "top-any" pruning (MC#, arXiv 2510.10962) that this project chose, as the paper leaves it open: a token's slots,
the largest routing weight first, have K prefixes; the logit of keeping the first m is the sum of scores 2..m, and the
scores are a function of the hidden state and of the sorted routing weights. Knows tensors, not models; how routers
are trained is in `training`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from transformers_mcmoe.kernels import cpu
from transformers_mcmoe.routing.call import Call
from transformers_mcmoe.routing.layer import LayerPruning
from transformers_mcmoe.routing.ratios import sort_slots

# least routing weight and hidden norm whose logarithm is taken
TINY = 1e-6


class PrefixRouter(nn.Module):
    """Scores of the slots after a token's first, from its hidden state and routing weights.

    scores = [SiLU([x, f, 1] hidden^T), f, 1] scores^T, with f = (log w_1, log w_2/w_1, .., log w_K/w_1, log rms(x)).

    Attributes:
        hidden: [rank, 2 * (H + K + 2)] uint8 parameter, the bytes of fp16 numbers: casts of a model do not change them.
        scores: [K - 1, 2 * (rank + K + 2)] uint8 parameter, likewise.

    Args:
        hidden_size: H.
        slots: K.
        rank: hidden units.
        device: device of the empty tensors.
    """

    hidden: nn.Parameter
    scores: nn.Parameter

    def __init__(self, hidden_size: int, slots: int, rank: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.hidden_size, self.slots, self.rank = hidden_size, slots, rank
        shapes = {"hidden": (rank, 2 * (hidden_size + slots + 2)), "scores": (slots - 1, 2 * (rank + slots + 2))}
        for name, shape in shapes.items():
            empty = torch.empty(shape, dtype=torch.uint8, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self._is_hf_initialized = True  # transformers must not initialise bytes
        self._matrices: tuple[Tensor, Tensor] | None = None
        self._stamp: tuple[int, int] | None = None

    def store(self, hidden: Tensor, scores: Tensor) -> None:
        """Take over float matrices [rank, H + K + 2] and [K - 1, rank + K + 2], rounded to fp16."""
        for name, value in (("hidden", hidden), ("scores", scores)):
            half = value.detach().to(torch.float16).contiguous().view(torch.uint8)
            setattr(self, name, nn.Parameter(half.to(getattr(self, name).device), requires_grad=False))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The two matrices in float32, kept: where accelerate has the bytes on disk, from the last `forward` on."""
        if self.hidden.is_meta and self._matrices is not None:
            return self._matrices
        stamp = (self.hidden.data_ptr(), self.scores.data_ptr())
        if self._matrices is None or self._stamp != stamp:
            first, second = self.hidden.data.view(torch.float16), self.scores.data.view(torch.float16)
            self._matrices, self._stamp = (first.to(torch.float32), second.to(torch.float32)), stamp
        return self._matrices

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Scores [T, K - 1] float32 of tokens [T, H] with routing weights [T, K], the largest first."""
        return prefix_scores(x, weights, *self.matrices())


def routing_features(x: Tensor, weights: Tensor) -> Tensor:
    """[T, K + 1] float32: log w_1, the logarithms of w_j / w_1, and of the hidden vector's root mean square.

    Args:
        x: [T, H] tokens.
        weights: [T, K] routing weights, the largest first.
    """
    first = weights[:, :1].clamp(min=TINY)
    ratios = (weights[:, 1:] / first).clamp(min=TINY)
    size = x.to(torch.float32).square().mean(-1, keepdim=True).sqrt().clamp(min=TINY)
    return torch.cat([first, ratios, size], dim=-1).log()


def prefix_scores(x: Tensor, weights: Tensor, hidden: Tensor, scores: Tensor) -> Tensor:
    """Scores [T, K - 1] of the slots after the first; see `PrefixRouter`."""
    weights = weights.to(torch.float32)
    features = routing_features(x, weights)
    inputs, width = hidden.shape[1], x.shape[1]
    units = x.to(torch.float32) @ hidden[:, :width].T
    units = units + functional.linear(features, hidden[:, width : inputs - 1], hidden[:, -1])
    rank = hidden.shape[0]
    return functional.linear(functional.silu(units), scores[:, :rank]) + functional.linear(
        features, scores[:, rank:-1], scores[:, -1]
    )


def kept_slots(scores: Tensor) -> Tensor:
    """[T] int64, how many slots, the largest weight first, each token keeps: the prefix of the largest logit.

    Args:
        scores: [T, K - 1], the gain of keeping each further slot; equal logits keep fewer.
    """
    return prefix_logits(scores).argmax(-1) + 1


def dropping_points(scores: Tensor) -> Tensor:
    """Where each slot is dropped as scores are lowered: slot j is kept while the shift is below its point.

    The points are the scores made to fall from slot to slot by pooling neighbours (isotonic regression): slots that only pay
    together are kept and dropped together.

    Args:
        scores: [T, K - 1].

    Returns:
        [T, K - 1], falling along a token's slots.
    """
    count = scores.shape[1]
    sums = functional.pad(scores.cumsum(-1), (1, 0))
    points = []
    for slot in range(count):
        best = None
        for first in range(slot + 1):
            lengths = torch.arange(slot + 1, count + 1, device=scores.device) - first
            largest = ((sums[:, slot + 1 :] - sums[:, first : first + 1]) / lengths).amax(-1)
            best = largest if best is None else torch.minimum(best, largest)
        points.append(best)
    return torch.stack(points, dim=-1) if points else scores  # type: ignore[arg-type]


def prefix_logits(scores: Tensor) -> Tensor:
    """[T, K] logits of keeping the first 1 .. K slots."""
    return functional.pad(scores.cumsum(-1), (1, 0))


def sampled_mask(scores: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Mask [T, K] over sorted slots: a sampled prefix, with the gradient of the softmax it was sampled from.

    Gumbel-softmax with a straight-through hard sample (arXiv 1611.01144).

    Args:
        scores: [T, K - 1].
        temperature: of the softmax.
        generator: of the noise; None takes the most likely prefix.
    """
    logits = prefix_logits(scores)
    if generator is not None:
        noise = torch.rand(logits.shape, generator=generator).clamp(1e-9, 1 - 1e-7).to(logits.device)
        logits = logits - (-noise.log()).log()
    chosen = (logits / temperature).softmax(-1)
    # slot j is kept by every prefix of j slots or more
    soft = chosen.flip(-1).cumsum(-1).flip(-1)
    kept = chosen.argmax(-1, keepdim=True)
    hard = (torch.arange(logits.shape[1], device=logits.device) <= kept).to(soft.dtype)
    return hard + (soft - soft.detach())


class LearnedPruning(LayerPruning):
    """Expert pruning of one layer by its trained router.

    Args:
        router: the layer's router.
        shift: subtracted from its scores.
        name: experts path, for messages.
        renormalize: scale kept weights to the sum that all had.
        call: what is known of the model's current call.
        expert_bytes: [E], size of each expert.
        skip: expert id that stands for none; None keeps ids, and skipped slots get the weight 0.
    """

    def __init__(
        self,
        router: PrefixRouter,
        shift: float,
        name: str,
        renormalize: bool,
        call: Call,
        expert_bytes: Sequence[float],
        skip: int | None,
    ) -> None:
        super().__init__(name, renormalize, call, expert_bytes, skip)
        self.router, self.shift = router, shift

    @torch.no_grad()
    def skipped(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Which slots are skipped, [T, K] bool; see `LayerPruning`."""
        ordered, _, _, order = sort_slots(index, weights)
        kept = kept_slots(self.router(x, ordered) - self.shift)
        beyond = torch.arange(index.shape[1], device=index.device) >= kept[:, None]
        chosen = torch.zeros_like(beyond).scatter(-1, order, beyond)
        return chosen & (index < self.counts.num_experts)

    def compiled(self, x: Tensor, index: Tensor) -> Callable[[cpu.Pruned], tuple[Tensor, Tensor]] | None:
        """See `LayerPruning`."""
        if self.router.hidden.is_meta:
            return None
        return lambda routing: routing.keep_prefixes(x, self.router.matrices(), self.shift)
