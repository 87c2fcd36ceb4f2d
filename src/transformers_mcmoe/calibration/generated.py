# SPDX-License-Identifier: Apache-2.0
"""Calibration text that a dense model writes itself, for where there is none of the domain it was made for.

Knows a loaded model that generates; a model too large for the memory cannot write.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def generated_tokens(
    model: Any, num_samples: int, seq_len: int, *, batch: int = 16, temperature: float = 1.0, seed: int = 0
) -> Tensor:
    """Sequences sampled from a model, each from its begin-of-text token on; texts that end are followed by others.

    Self-generated calibration data (Liu et al., LLM-QAT, arXiv 2305.17888; Williams and Aletras, arXiv 2410.17170).

    Args:
        model: dense causal model, with its weights in memory.
        num_samples: N.
        seq_len: T.
        batch: sequences that are written together.
        temperature: of the sampling, over the whole vocabulary.
        seed: seed of the sampling.

    Returns:
        [N, T] int64 token ids, to be given as `dataset` of an `MCMoEConfig`.

    Raises:
        ValueError: the model has no begin-of-text token, nor one that ends a text.
    """
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    first = config.bos_token_id if config.bos_token_id is not None else ends[0]
    if first is None:
        raise ValueError(
            f"{type(model).__name__} has neither a begin-of-text nor an end-of-text token to start from; set "
            "model.generation_config.bos_token_id."
        )
    rows = []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, num_samples, batch):
            prompt = torch.full((min(batch, num_samples - start), 1), first, device=model.device)
            written = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=seq_len - 1,
                eos_token_id=[],  # a text that ends is followed by another
                pad_token_id=first,
            )
            rows.append(written.cpu())
    return torch.cat(rows)
