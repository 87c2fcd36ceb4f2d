# SPDX-License-Identifier: Apache-2.0
"""Perplexity of text given images, and divergence from the dense model, on samples with images.

Knows samples and models; tokens that stand for parts of images are read, not scored.
"""

from __future__ import annotations

from typing import Any

import torch

from transformers_mcmoe.calibration.images import calibration_sequences
from transformers_mcmoe.evaluation.predictions import Evaluation, dtypes_of, score, summary
from transformers_mcmoe.evaluation.protocol import Protocol, evaluating
from transformers_mcmoe.models.stream import model_inputs


@torch.no_grad()
def evaluate_samples(
    model: Any,
    dataset: Any,
    reference: Any = None,
    *,
    processor: Any = None,
    num_samples: int | None = None,
    seq_len: int = 4096,
    seed: int = 0,
) -> Evaluation:
    """Score a vision-language model on the text of samples with images, alone or beside a reference.

    Args:
        model: the model.
        dataset: samples as for calibration (docs/vision.md), text among them if need be.
        reference: the dense model, or None.
        processor: processor object or id; default the model's own.
        num_samples: how many; default all of a list, else 128.
        seq_len: tokens of a sample, at most.
        seed: of the order of a Hub data set.

    Returns:
        Means over all tokens of text but the first of a sample; a window of the protocol is a sample.

    Raises:
        ValueError: the samples cannot be used.
    """
    sequences = calibration_sequences(
        model,
        dataset,
        None,
        processor=processor,
        num_samples=num_samples or (len(dataset) if isinstance(dataset, list | tuple) else 128),
        seq_len=seq_len,
        seed=seed,
        model_name=getattr(model.config, "name_or_path", ""),
    )
    sums, counts = [], []
    with evaluating(model, reference):
        for batch in sequences.batches(1):
            scored = torch.ones(batch.ids.shape[1] - 1, dtype=torch.bool)
            if batch.images is not None:
                scored = ~batch.images[0, 1:]
            found = [
                one(**model_inputs(one, batch.to(one.device))).logits[0, :-1][scored.to(one.device)]
                for one in (model, reference)
                if one is not None
            ]
            sums.append(score(found[0], found[1] if reference is not None else None, batch.ids[0, 1:][scored]).sums())
            counts.append(int(scored.sum()))
    longest, number = sequences.longest, len(sequences)
    protocol = Protocol(longest, longest, number, number, sum(counts), dtypes_of(model, reference))
    return summary(model, reference, sums, counts, protocol)
