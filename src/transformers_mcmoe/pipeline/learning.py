# SPDX-License-Identifier: Apache-2.0
"""Learned rounding: the codes and grids of one expert's matrices, moved together until its output is nearest to the dense one.

GPTQ and coordinate descent lower the error of each matrix by itself; here the three share one loss, the squared change of
the expert's output on its own tokens. Knows one expert and its packed matrices.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from transformers_mcmoe.calibration.statistics import SAMPLE, Sample, token_factors
from transformers_mcmoe.config import MCMoEConfig
from transformers_mcmoe.models.experts import Experts
from transformers_mcmoe.quantization import Latent, dequantize, pack, unpack

# tokens of an expert that are kept to learn from
TOKENS = 4096
# tokens per step
BATCH = 512
# one token in so many is kept aside: what is learned is taken only where it helps there, too
JUDGED = 8
# of the first step, falling to 0: codes move by this share of a code
RATE, GRID_RATE = 0.005, 0.002


def sample_size(config: MCMoEConfig) -> int:
    """Tokens of every expert that are kept: to measure errors on, and to learn from."""
    return TOKENS if config.learning_steps else SAMPLE


def learn(
    experts: Experts,
    expert: int,
    packed: Mapping[str, Tensor],
    widths: Mapping[str, int],
    sample: Sample,
    steps: int,
    seed: int,
) -> tuple[dict[str, Tensor], float]:
    """Lower the output error of one expert.

    Args:
        experts: its module's adapter, with dense weights.
        expert: which.
        packed: its packed matrices by projection.
        widths: their widths by projection.
        sample: tokens routed to it.
        steps: gradient steps.
        seed: of the order of tokens.

    Returns:
        Packed matrices, those given where nothing is gained; and their error as a share of that of those given, on
        tokens that were not learned from.
    """
    columns = {p.name: p.in_features for p in experts.projections}
    device = experts.matrix(expert, experts.projections[0].name).device
    x = sample.x.to(device, torch.float32)
    dense = experts.run(expert, x)
    factors = token_factors(dense, sample).to(torch.float32)
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=random)
    judged, learned = order[: len(x) // JUDGED], order[len(x) // JUDGED :]
    if len(judged) == 0:
        return dict(packed), 1.0

    def loss(matrices: Mapping[str, Tensor], part: Tensor) -> Tensor:
        change = experts.run(expert, x[part], matrices) - dense[part]
        return (change.square().sum(-1) * factors[part]).sum()

    latents = {
        name: Latent(experts.matrix(expert, name), unpack(matrix, widths[name], columns[name]))
        for name, matrix in packed.items()
    }
    for step in range(steps):
        at = torch.randint(len(learned), (min(BATCH, len(learned)),), generator=random)
        matrices = {name: latent.weight().requires_grad_() for name, latent in latents.items()}
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(matrices, learned[at]), list(matrices.values()))
        left = 1 - step / steps
        for latent, gradient in zip(latents.values(), gradients, strict=True):
            latent.step(gradient, RATE * left, GRID_RATE * left)
    found = {name: pack(latent.quantized()).cpu() for name, latent in latents.items()}
    before, after = (
        float(loss({name: dequantize(m, widths[name], columns[name]).to(device) for name, m in own.items()}, judged))
        for own in (packed, found)
    )
    return (found, after / before) if after < before else (dict(packed), 1.0)
