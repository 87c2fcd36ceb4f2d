# SPDX-License-Identifier: Apache-2.0
"""What calibration measures of one layer's experts: routing counts, routing weights, and samples of their inputs.

Everything is a sum or a uniform sample, so that parts measured apart can be merged. It knows tokens and experts, not
widths or layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from transformers_mcmoe.models.experts import Experts
from transformers_mcmoe.workdir import mapped_tensor

# inputs kept per expert, a uniform sample of its routed tokens; errors are measured on these
SAMPLE = 1024
# below this many routed tokens an expert is listed as starved
FEW_TOKENS = 32
# one sequence in so many is kept from the Hessians where errors of GPTQ are measured: on tokens that it was fitted to, the
# error of an expert that saw few tokens looks up to 2.5 times too small
HELD_OUT = 4


@dataclass
class RoutingStatistics:
    """Routing of one experts module over the calibration tokens.

    Attributes:
        tokens: [E] int64, (token, slot) pairs sent to each expert.
        weight: [E] float64, sum of the routing weights as the experts receive them (after the model's own
            normalisation and scaling); equal to `tokens` where the block applies weights outside the experts.
        image_tokens, image_weight: the same of tokens that stand for parts of images, which both count, too.
    """

    tokens: Tensor
    weight: Tensor
    image_tokens: Tensor
    image_weight: Tensor

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:
        return RoutingStatistics(
            self.tokens + other.tokens,
            self.weight + other.weight,
            self.image_tokens + other.image_tokens,
            self.image_weight + other.image_weight,
        )

    @classmethod
    def zeros(cls, num_experts: int) -> RoutingStatistics:
        def counts(dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_experts, dtype=dtype)

        return cls(*(counts(dtype) for _ in range(2) for dtype in (torch.int64, torch.float64)))

    def weighted(self, image: float) -> tuple[Tensor, Tensor]:
        """Tokens and weights [E] float64 where a token of an image counts as so many of text."""
        return (
            self.tokens.to(torch.float64) + (image - 1) * self.image_tokens.to(torch.float64),
            self.weight + (image - 1) * self.image_weight,
        )


@dataclass(frozen=True)
class Sample:
    """Inputs on which one expert's errors are measured.

    Attributes:
        x: [n, H] tokens.
        weight: [n] float32 routing weights.
        norm: [n] float32, norm of the hidden state that the expert's output is added to; 0 where it is not known.
        scale: routed tokens per sampled token; squared errors are multiplied by it.
        counts: [n] float32, what each token counts; 1 on the average over the calibration.
    """

    x: Tensor
    weight: Tensor
    norm: Tensor
    scale: float
    counts: Tensor


class ExpertInputs:
    """Counts the tokens that reach each expert and keeps a uniform sample of them (reservoir sampling).

    The sample lies in a memory-mapped file, [E, SAMPLE, H]. An expert that gets at most SAMPLE tokens keeps them all.

    Attributes:
        routing: the counts.
    """

    def __init__(self, num_experts: int, path: Path, seed: int) -> None:
        self._counts = torch.ones(num_experts, SAMPLE)
        self.routing = RoutingStatistics.zeros(num_experts)
        self._path = path
        self._x: Tensor | None = None
        self._weight = torch.zeros(num_experts, SAMPLE)
        self._norm = torch.zeros(num_experts, SAMPLE)
        self._seen = torch.zeros(num_experts, dtype=torch.int64)  # tokens that the sample was drawn from
        self._random = torch.Generator().manual_seed(seed)

    def record(
        self,
        expert: int,
        x: Tensor,
        weights: Tensor | None,
        norms: Tensor | None = None,
        sampled: Tensor | None = None,
        images: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        """Count tokens [n, H] of an expert, and let them or those with `sampled` [n] bool into the sample.

        `norms` [n] are those of their hidden states, `images` [n] bool says which stand for parts of images, `counts` [n] what they
        count in errors.
        """
        n = x.shape[0]
        if n == 0:
            return
        weight = torch.ones(n) if weights is None else weights.detach().to("cpu", torch.float32)
        self.routing.tokens[expert] += n
        self.routing.weight[expert] += weight.to(torch.float64).sum()
        norm = torch.zeros(n) if norms is None else norms.to("cpu", torch.float32)
        counts = torch.ones(n) if counts is None else counts
        if images is not None:
            self.routing.image_tokens[expert] += images.sum()
            self.routing.image_weight[expert] += weight[images].to(torch.float64).sum()
        if sampled is not None:
            kept = sampled.cpu()
            x, weight, norm, counts = x[sampled], weight[kept], norm[kept], counts[kept]
        self._sample(expert, x, weight, norm, counts)

    def _sample(self, expert: int, x: Tensor, weight: Tensor, norm: Tensor, counts: Tensor) -> None:
        n = x.shape[0]
        if n == 0:
            return
        if self._x is None:
            self._x = mapped_tensor(self._path, (*self._weight.shape, x.shape[1]), x.dtype)
        order = torch.arange(n) + self._seen[expert]
        draw = (torch.rand(n, generator=self._random, dtype=torch.float64) * (order + 1)).long()
        slot = torch.where(order < SAMPLE, order, draw)
        # several tokens may draw one slot: the last of them stays
        last = torch.full((SAMPLE,), -1).scatter_reduce(
            0, slot.clamp(max=SAMPLE - 1), torch.where(slot < SAMPLE, torch.arange(n), -1), "amax"
        )
        kept = torch.nonzero(last >= 0).flatten()
        self._x[expert, kept] = x[last[kept].to(x.device)].cpu()
        self._weight[expert, kept] = weight[last[kept]]
        self._norm[expert, kept] = norm[last[kept]]
        self._counts[expert, kept] = counts[last[kept]]
        self._seen[expert] += n

    def is_starved(self, expert: int) -> bool:
        """Whether too few tokens were routed to an expert to measure its errors on them."""
        return int(self.routing.tokens[expert]) < FEW_TOKENS or int(self._seen[expert]) < FEW_TOKENS // HELD_OUT

    def sample(self, expert: int) -> Sample:
        """Inputs to measure an expert on.

        A starved expert is measured on tokens of all experts, as if they had been routed to it, with the layer's mean
        routing weight; the scale follows from the tokens it really got, one if it got none.

        Raises:
            ValueError: no token reached any expert of the layer.
        """
        tokens = self.routing.tokens
        if self._x is None or int(tokens.sum()) == 0:
            raise ValueError("No calibration token reached any expert of this layer; use other calibration text.")
        count = int(tokens[expert])
        if not self.is_starved(expert):
            n = min(int(self._seen[expert]), SAMPLE)
            own = (expert, slice(0, n))
            return Sample(self._x[own], self._weight[own], self._norm[own], count / n, self._counts[own])
        share = max(1, SAMPLE // (4 * len(tokens)))
        counts = [min(n, share) for n in self._seen.tolist()]
        x = torch.cat([self._x[e, :n] for e, n in enumerate(counts)])
        norm = torch.cat([self._norm[e, :n] for e, n in enumerate(counts)])
        every = torch.cat([self._counts[e, :n] for e, n in enumerate(counts)])
        mean = float(self.routing.weight.sum() / tokens.sum())
        return Sample(x, torch.full((len(x),), mean), norm, max(count, 1) / len(x), every)


def output_errors(
    experts: Experts,
    expert: int,
    sample: Sample,
    candidates: Iterable[Mapping[str, Tensor]],
    relative: bool = False,
    down: bool = False,
) -> list[float]:
    """Frobenius norm of the change in the MoE block's output when one expert's matrices are replaced.

    Only the expert's own tokens change, by weight * (E'(x) - E(x)); routing does not (arXiv 2410.06270, eq. 3, taken
    on the block's output as the authors' code does).

    Args:
        experts: the layer's experts, with their dense weights.
        expert: which one.
        sample: its inputs.
        candidates: replacements, each [out, in] float32 per projection; read one at a time.
        relative: divide a token's squared change by its norm and by the median norm; the norm is that of what the
            change enters, the hidden state and the expert's own output taken as orthogonal. The next norm layer divides
            by it, so that errors of different layers compare; but tokens of huge norm are attention sinks, which all
            others attend to: divided by their norm alone they count by it, neither nothing nor everything.
        down: candidates change the down projection only.

    Returns:
        One norm per candidate.
    """
    device = experts.matrix(expert, experts.projections[0].name).device
    x, weight = sample.x.to(device, torch.float32), sample.weight.to(device, torch.float64)
    inner = experts.inputs(expert, x)["down"] if down else None
    dense = experts.run(expert, x, inner=inner)
    if relative:
        own = dense.square().sum(-1).to(torch.float64) * weight.square()
        entered = (own + sample.norm.to(device, torch.float64).square()).sqrt().clamp(min=1e-15)
        factor = weight.square() / (entered * entered.median())
    else:
        factor = weight.square()
    factor = factor * sample.counts.to(factor)
    errors = []
    for matrices in candidates:
        given = {name: matrix.to(device) for name, matrix in matrices.items()}
        change = experts.run(expert, x, given, inner).sub_(dense)
        squared = change.square().sum(-1).to(torch.float64) * factor
        errors.append(float((squared.sum() * sample.scale).sqrt()))
    return errors


def hessian_error(
    experts: Experts, expert: int, replacement: Mapping[str, Tensor], traces: Mapping[str, float]
) -> float:
    """Sum of Tr(H) / tokens * |W' - W|^2 over one expert's matrices.

    Args:
        experts: the layer's experts, with their dense weights.
        expert: which one.
        replacement: W' [out, in] float32 per projection.
        traces: Tr(H) / tokens by role, as `Hessian.traces` gives them.
    """
    total = 0.0
    for p in experts.projections:
        dense = experts.matrix(expert, p.name).to(torch.float32)
        total += traces[p.role] * float((replacement[p.name].to(dense.device) - dense).square().sum())
    return total
